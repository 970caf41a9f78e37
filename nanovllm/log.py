"""Logging: modules use their own loggers; only entry points call `configure`."""

from __future__ import annotations

import logging

from nanovllm import env


def configure() -> None:
    """Show this package's log on stderr at NANOVLLM_LOG_LEVEL. Does nothing where the application has set up logging."""
    logger = logging.getLogger("nanovllm")
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname).1s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(env.read().log_level)
