"""Logging: every module has its own logger, and only entry points call `configure`."""

from __future__ import annotations

import logging
import sys

from nanovllm import env


class AboveBars(logging.StreamHandler):
    """Writes lines above the progress bars of its stream."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        if tqdm is None:
            super().emit(record)
            return
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def configure() -> None:
    """Log to stderr at NANOVLLM_LOG_LEVEL, unless the application has set up logging."""
    logger = logging.getLogger("nanovllm")
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = AboveBars()
    handler.setFormatter(logging.Formatter("%(levelname).1s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(env.read().log_level)
