"""A whole batch job: checks the options, and answers a file with one engine or several replicas."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nanovllm.batch.job import Job
from nanovllm.batch.worker import EngineWorker, WorkerSettings, load_engine
from nanovllm.config import EngineConfig
from nanovllm.hub import is_local
from nanovllm.models.lora.peft_config import PeftConfig
from nanovllm.programs import INTERRUPTED, TERMINATED
from nanovllm.replicas import cluster

# options that do not change answers: a job may go on with other values
FREE_OPTIONS = (
    "compile_cache", "compile_cache_mode", "disable_log_stats",
    "data_parallel_size", "distributed_executor_backend",
)  # fmt: skip
USER = "--replicas (without --no-ray)"


@dataclass(frozen=True)
class JobOptions:
    """The options of a job.

    params: sampling parameters of all rows. chat_options: options of `LLM.chat` for messages.
    lora_modules: adapters that rows name as their model, each NAME=FOLDER.
    replicas: engines in Ray. uses_ray: False for what `config` says; None: if there are several
    replicas or an address of a cluster.
    """

    source: Path
    target: Path
    config: EngineConfig
    params: Any = None
    chat_options: Any = None
    lora_modules: Sequence[str] = ()
    replicas: int = 1
    uses_ray: bool | None = None
    ray_address: str | None = None
    overwrite: bool = False
    show_progress: bool = True

    @property
    def is_on_ray(self) -> bool:
        """Raises ValueError for options that exclude each other."""
        if self.replicas < 1:
            raise ValueError(f"--replicas is {self.replicas}: it must be at least 1")
        if self.uses_ray is False and self.ray_address is not None:
            raise ValueError("--no-ray cannot be combined with --ray-address")
        return self.uses_ray is None and (self.replicas > 1 or self.ray_address is not None)

    @property
    def adapters(self) -> dict[str, str]:
        """The folders of `lora_modules` by their names. Raises ValueError."""
        found: dict[str, str] = {}
        for one in self.lora_modules:
            name, _, folder = one.partition("=")
            if not name or not folder or name in found:
                raise ValueError(f"--lora-modules has {one!r}: each must be another NAME=FOLDER")
            found[name] = folder
        if found and not self.config.enable_lora:
            raise ValueError("--lora-modules needs --enable-lora: the engine takes no adapters")
        for name, folder in found.items():
            try:
                PeftConfig.checked(Path(folder), self.config.max_lora_rank)
            except ValueError as error:
                raise ValueError(f"--lora-modules has {name!r}: {error}") from error
        return found

    @property
    def engine(self) -> EngineConfig:
        """The options of the engine, or of its replicas. Raises ValueError."""
        if not self.is_on_ray:
            return self.config
        return replace(
            self.config, data_parallel_size=self.replicas, distributed_executor_backend="ray"
        )


def answer_file(request: JobOptions) -> int:
    """Exit status 0: every row has its line in the output. INTERRUPTED: ended by Ctrl-C.
    TERMINATED: ended by SIGTERM (`programs.sigterm_as_exit`).

    Raises ValueError, TypeError and OSError for mistakes of the user.
    """
    params, chat = request.params, request.chat_options
    config = request.engine
    settings = WorkerSettings(
        _object("params", params), _object("chat_options", chat), config.pools, request.adapters
    )
    facts = {"params": settings.params, "chat_options": settings.chat, **_facts(config)}
    if settings.adapters:
        facts["lora_modules"] = settings.adapters
    job = Job(request.source, request.target, facts, overwrite=request.overwrite)
    with ExitStack() as stack:
        stack.callback(job.close)

        def make_worker() -> EngineWorker:
            if request.is_on_ray:
                cluster.SHARED.open(USER, request.ray_address)
                stack.callback(cluster.SHARED.close)
            shared = load_engine(config)
            if config.replicas_option:
                stack.callback(shared.engine.close)
            worker = EngineWorker(shared, settings)
            worker.check_adapters()
            return worker

        try:
            job.run(make_worker, show_progress=request.show_progress)
        except (KeyboardInterrupt, SystemExit) as stop:
            print(f"stopped: {job.summary}; run the same command to resume", file=sys.stderr)
            return INTERRUPTED if isinstance(stop, KeyboardInterrupt) else TERMINATED
    print(f"{request.target}: {job.summary}")
    return 0


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, (dict, type(None))):
        raise ValueError(f"{name} is {value!r}: it must be a JSON object")
    return value or {}


def _facts(config: EngineConfig) -> dict[str, Any]:
    """The model, and the options that differ from their defaults."""
    folder = os.path.expanduser(config.model)
    model = os.path.realpath(folder) if is_local(Path(folder)) else config.model
    options = {
        option.name: getattr(config, option.name)
        for option in fields(EngineConfig)
        if option.name not in ("model", *FREE_OPTIONS)
        and getattr(config, option.name) != option.default
    }
    return {"model": model, "options": options}
