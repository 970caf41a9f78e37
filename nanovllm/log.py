"""Logging: every module has its own logger, and only entry points call `configure`."""

from __future__ import annotations

import logging

from nanovllm import env


def configure() -> None:
    """Log to stderr at NANOVLLM_LOG_LEVEL, unless the application has set up logging."""
    logger = logging.getLogger("nanovllm")
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname).1s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(env.read().log_level)
