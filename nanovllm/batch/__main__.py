"""Answers a file of prompts with one engine or with several replicas.

python -m nanovllm.batch prompts.jsonl -o out.jsonl [--model M] [--replicas N] [options of LLM]

Each line of the input is a JSON object: "prompt" (text or token ids) or "messages", and optionally
"id" and "params" (sampling parameters). The output has one line for each row, in the order of the
input: an answer, or an "error". A job that was stopped goes on when it is started again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from nanovllm import log
from nanovllm.batch.job import Job
from nanovllm.batch.worker import EngineWorker, Settings, Worker, load_engine
from nanovllm.compat.engine_args import EngineArgs
from nanovllm.config import EngineConfig
from nanovllm.tools import command_line

# options that do not change answers: a job may go on with other values
FREE_OPTIONS = ("compile_cache", "compile_cache_mode", "disable_log_stats")
INTERRUPTED = 130  # the exit status of a shell's command after Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: every row has its line in the output. 130: Ctrl-C has ended the job.

    Raises ValueError, TypeError and OSError for mistakes of the user.
    """
    args = _parser().parse_args(arguments)
    log.configure()
    if args.replicas < 1:
        raise ValueError(f"--replicas is {args.replicas}: it must be at least 1")
    config = EngineArgs.from_cli_args(args)
    settings = Settings(_object("params", args.params), _object("chat_options", args.chat_options))
    uses_ray = not args.no_ray and (args.replicas > 1 or args.ray_address is not None)
    if args.no_ray and args.ray_address is not None:
        raise ValueError("--no-ray does not go with --ray-address")

    def make_worker(num_rows: int) -> Worker:
        if not uses_ray:
            return EngineWorker(load_engine(config), settings)
        from nanovllm.batch.replicas import Replicas

        return Replicas(config, settings, args.replicas, num_rows, address=args.ray_address)

    facts = {"params": settings.params, "chat_options": settings.chat, **_facts(config)}
    job = Job(args.input, args.output, facts, overwrite=args.overwrite)
    try:
        job.run(make_worker, show_progress=args.progress)
    except KeyboardInterrupt:
        print(f"stopped: {job.summary}; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    finally:
        job.close()
    print(f"{args.output}: {job.summary}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nanovllm.batch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", type=Path, help="a file with one JSON object per line")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="start anew")
    parser.add_argument("--replicas", type=int, default=1, help="engines; more than 1 need Ray")
    parser.add_argument(
        "--no-ray", action="store_true", help="one engine in this process, whatever --replicas says"
    )
    parser.add_argument("--ray-address", help="a running cluster: HOST:PORT or auto; default: none")
    parser.add_argument(
        "--params", type=json.loads, metavar="JSON", help="sampling parameters of all rows"
    )
    parser.add_argument(
        "--chat-options", type=json.loads, metavar="JSON", help="options of LLM.chat for messages"
    )
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    EngineArgs.add_cli_args(parser.add_argument_group("options of LLM"))  # type: ignore[arg-type]
    return parser


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, (dict, type(None))):
        raise ValueError(f"{name} is {value!r}: it must be a JSON object")
    return value or {}


def _facts(config: EngineConfig) -> dict[str, Any]:
    """The model, and the options that are not at their defaults."""
    folder = os.path.expanduser(config.model)
    model = os.path.realpath(folder) if os.path.isdir(folder) else config.model
    options = {
        option.name: getattr(config, option.name)
        for option in fields(EngineConfig)
        if option.name not in ("model", *FREE_OPTIONS)
        and getattr(config, option.name) != option.default
    }
    return {"model": model, "options": options}


if __name__ == "__main__":
    # the same clean end as for Ctrl-C
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(command_line.run(main))
