"""Loads the measured engine, and describes it and the machine."""

from __future__ import annotations

import argparse
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from nanovllm.cli.engine_options import SET_BY_BENCH
from nanovllm.compat.engine_args import given_engine_options
from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.engine.metrics import PREFIX
from nanovllm.kernels.cpu.build import installed
from nanovllm.llm import LLM


def check_options(args: argparse.Namespace, model: str) -> EngineConfig:
    """The engine's options from the arguments. Raises ValueError for unsupported ones."""
    config = EngineConfig.from_options(model, given_engine_options(args, skip=SET_BY_BENCH))
    if config.replicas_option:
        raise ValueError(f"{config.replicas_option} is not supported: this measures one engine")
    return config


def load(
    args: argparse.Namespace, model: str, max_num_seqs: int, max_model_len: int
) -> tuple[LLM, dict[str, Any]]:
    """The engine, and the fields of the result that describe it and this machine."""
    started = time.perf_counter()
    options = {
        **given_engine_options(args, skip=SET_BY_BENCH),
        "max_num_seqs": max_num_seqs,
        "max_model_len": max_model_len,
        "random_weights": args.random_weights is not None,
    }
    llm = LLM(model, **options)
    load_seconds = time.perf_counter() - started
    engine, config = engine_of(llm), llm.engine.config
    runner = engine.runner
    device = runner.platform.device
    is_graph = runner.compiler.lowering is not None and not config.enforce_eager
    return llm, {
        "model": args.random_weights or args.model,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or "cpu",
        "dtype": str(runner.cfg.dtype).removeprefix("torch."),
        "attention_backend": config.attention_backend,
        "kv_cache_dtype": str(runner.spec.cache_dtype).removeprefix("torch."),
        "expert_offload": config.expert_offload,
        "tensor_parallel_size": config.tensor_parallel_size,
        "expert_parallel": runner.cfg.moe.is_expert_parallel
        if runner.cfg.moe is not None
        else None,
        "mode": "graph" if is_graph else "eager",
        "capture": is_graph and config.tuned.capture,
        "fuse": is_graph and config.tuned.fuse,
        "deterministic": config.deterministic,
        "run_ahead": engine.run_ahead,
        "max_num_seqs": max_num_seqs,
        "load_seconds": round(load_seconds, 2),
        "memory": engine.memory.as_dict(),
        "versions": versions(),
        "command": shlex.join([*_program(), *sys.argv[1:]]),
    }


def _program() -> list[str]:
    script = Path(sys.argv[0]).name
    return (
        ["python", script] if script.endswith(".py") and script != "__main__.py" else ["nanovllm"]
    )


def engine_of(llm: LLM) -> Engine:
    """The engine of an `LLM` without replicas."""
    assert isinstance(llm.engine, Engine)
    return llm.engine


def num_generated(llm: LLM) -> int:
    """The number of tokens generated so far."""
    name = PREFIX + "generation_tokens"
    return int(next(one.value for one in llm.get_metrics() if one.name == name))


def expert_traffic(llm: LLM, num_tokens: int) -> dict[str, float | None] | None:
    """Expert transfers over the bus in the latest batch, which generated `num_tokens` tokens, and
    the tokens per second that the bus allows. None if all experts are on the device."""
    stats = engine_of(llm).metrics.experts
    if stats is None:
        return None
    batch = stats.batch
    return {
        **batch.as_dict(),
        "moved_bytes_per_token": round(batch.moved_bytes / num_tokens),
        "bus_gb_s": batch.bus_rate and round(batch.bus_rate / 1e9, 2),
        "bus_limit_tokens_per_second": round(num_tokens / batch.bus_seconds, 2)
        if batch.bus_seconds
        else None,
    }


def versions() -> dict[str, str]:
    """Versions of Python, torch, Triton, transformers, CUDA and its driver, if installed."""
    found = {"torch": torch.__version__, "python": platform.python_version()}
    for package in ("triton", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        if program := installed("nvidia-smi"):
            query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
            output = subprocess.run(query, capture_output=True, text=True).stdout
            found["driver"] = output.split("\n")[0].strip()
    return found
