"""Shows the devices of this machine, and the settings that an engine would choose.

    nanovllm info
    nanovllm info Qwen/Qwen3-0.6B --max-num-seqs 64 --json

Reads the model's config.json, but no weights. Compiles C++ kernels that the store lacks.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from nanovllm.cli.engine_options import add_engine_options, engine_config
from nanovllm.cli.serve import NEEDED as SERVER
from nanovllm.flags import Parser

if TYPE_CHECKING:
    from nanovllm.config import EngineConfig
    from nanovllm.startup.resolve import ResolvedConfig

FLASH_ATTN = ("flash-attn", "flash-attn-3", "fa3-fwd", "flash-attn-4")
USAGE = "[MODEL] [--json] [options]"
OPTIONAL = (
    "triton", *FLASH_ATTN, "ray", "pillow", "av", *SERVER, "opentelemetry-sdk",
)  # fmt: skip
GIVEN = "as given"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="write a JSON object")
    add_engine_options(parser, positional=True)


def main(args: argparse.Namespace) -> None:
    """Print the facts. Raises ValueError for options that the device or model does not support."""
    config = engine_config(args)
    from nanovllm.startup.resolve import resolve_without_weights  # imports torch

    resolved = resolve_without_weights(config)
    found = {
        "versions": _versions(),
        "devices": _devices(),
        "attention": _attention(resolved),
        "model": _model(resolved),
        "picked": _picked(resolved, config),
    }
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for title, rows in found.items():
        print(f"{title}:")
        for name, value in rows.items():
            if isinstance(value, dict):
                value = f"{value['value']}  ({value['why']})"
            print(f"  {name:<24}{value}")


def _versions() -> dict[str, str]:
    from importlib import metadata

    from nanovllm import __version__
    from nanovllm.cli.bench.engines import versions

    found = {"nanovllm": __version__, **versions()}
    for package in OPTIONAL:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found.setdefault(package, "not installed")
    return found


def _devices() -> dict[str, str]:
    from nanovllm import platforms

    return {
        name: "can be used" if problem is None else f"cannot be used: {problem}"
        for name, problem in platforms.unusable().items()
    }


def _attention(resolved: ResolvedConfig) -> dict[str, str]:
    from nanovllm.platforms.attention import attention_facts

    rows = attention_facts(resolved.platform)
    return {name: text for name, text in rows.items() if name not in ("device", "installed")}


def _model(resolved: ResolvedConfig) -> dict[str, Any]:
    cfg, spec = resolved.model.config, resolved.spec
    return {
        "name": resolved.config.model,
        "architecture": cfg.architecture,
        "layers": cfg.num_layers,
        "vocabulary": cfg.vocab_size,
        "weights_gib": round(resolved.model.param_bytes / 2**30, 3),
        "cache_bytes_per_token": resolved.model.page_groups.token_bytes(spec.cache_dtype),
        "longest_sequence": cfg.max_position,
    }


def _picked(resolved: ResolvedConfig, config: EngineConfig) -> dict[str, dict[str, Any]]:
    """The options chosen when a model is loaded: {name: {"value": …, "why": …}}."""
    platform, spec, layout = resolved.platform, resolved.spec, resolved.spec.layout
    traits, run_ahead = platform.traits, config.tuned.run_ahead
    store = resolved.store.folder
    rows = {
        "device": (f"{platform.device} ({platform.describe()})", _why_device()),
        "dtype": (_name(resolved.model.config.dtype), _why_dtype(resolved)),
        "mode": _mode(resolved, config),
        "attention_backend": (spec.attention.describe(), "auto"),
        "kv_cache_dtype": (_name(spec.cache_dtype), "the model's dtype"),
        "max_model_len": (layout.max_model_len, "the model's longest sequence"),
        "max_num_seqs": (layout.max_num_seqs, "the device's default"),
        "max_num_batched_tokens": (layout.prefill_tokens[-1], "the device's default"),
        "kvcache_block_size": (layout.block_size, "the default of the attention backend"),
        "graph_batch_sizes": (list(layout.decode_rows), "the device's default"),
        "run_ahead": (
            traits.run_ahead if run_ahead is None else run_ahead,
            "the device's default" if run_ahead is None else GIVEN,
        ),
        "persistent_step": _persistent_step(resolved, config),
        "compile_cache": (str(store), "NANOVLLM_CACHE, or the folder of this user"),
    }
    picked = {}
    for name, (value, why) in rows.items():
        is_given = getattr(config, name, None) not in (None, "auto")
        picked[name] = {"value": value, "why": GIVEN if is_given else why}
    return picked


def _persistent_step(resolved: ResolvedConfig, config: EngineConfig) -> tuple[bool, str]:
    """Whether decode steps may be one kernel; which of them are is in the log of a start."""
    from nanovllm.compile.lower.persistent.plan import Unfit
    from nanovllm.compile.lower.persistent.step import num_programs

    asked = config.tuned.persistent_step
    if asked is False:
        return False, GIVEN
    if config.not_persistent is not None:
        option, why = config.not_persistent
        return False, f"{option}: {why}"
    try:
        num_programs(resolved.platform.device)
    except Unfit as why:
        return False, str(why)
    return True, f"{GIVEN if asked else 'the default'}; for the sizes that the log names"


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _why_device() -> str:
    from nanovllm import platforms

    return f"the first of {', '.join(platforms.DEVICES)} that can be used"


def _why_dtype(resolved: ResolvedConfig) -> str:
    if resolved.platform.traits.auto_dtype is resolved.model.config.dtype:
        return f"the default on a {resolved.platform.traits.name}"
    stored = resolved.hf.dtype
    if stored is None:
        return "the checkpoint names none"
    if stored is resolved.model.config.dtype:
        return "the checkpoint's"
    return f"the device does not have the checkpoint's {_name(stored)}"


def _mode(resolved: ResolvedConfig, config: EngineConfig) -> tuple[str, str]:
    if config.enforce_eager:
        return "eager", "enforce_eager is given"
    lowering, problem = resolved.platform.lowering()
    if lowering is None:
        return "eager", problem
    return "graph", "the device compiles whole regions"
