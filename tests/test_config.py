"""The engine checks its options before it loads anything."""

from __future__ import annotations

import json
import math
from dataclasses import Field, FrozenInstanceError, fields
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from nanovllm import EngineConfig
from nanovllm.api.config import ServerConfig
from nanovllm.checks import to_options
from nanovllm.config import num_bytes
from nanovllm.parallel import ranks as ranks_module
from nanovllm.replicas import child_config
from nanovllm.startup import ranks
from nanovllm.startup.compile_farm.worker_handle import worker_command


def make(**options: Any) -> EngineConfig:
    return EngineConfig.from_options("some/model", options)


def test_unknown_options_are_named_beside_the_known_ones() -> None:
    with pytest.raises(
        TypeError,
        match=r"unknown option max_seqs, swap_room; the options are model, dtype, device, .*",
    ):
        make(swap_room=4, max_seqs=1, dtype="auto")


@pytest.mark.parametrize("value", ["fp16", "float8", "FP8", None, 8])
def test_the_cache_is_in_the_model_s_dtype_or_fp8(value: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"kv_cache_dtype is {value!r}: it must be one of auto, fp8"
    ):
        make(kv_cache_dtype=value)
    assert make().kv_cache_dtype == "auto" and make(kv_cache_dtype="fp8").kv_cache_dtype == "fp8"


@pytest.mark.parametrize(
    ("name", "low"), [("max_num_seqs", 1), ("max_num_batched_tokens", 16), ("max_model_len", 2)]
)
@pytest.mark.parametrize("value", [0, -1, 2.5, "4", True])
def test_counts_are_whole_numbers_from_a_limit(name: str, low: int, value: Any) -> None:
    with pytest.raises(
        ValueError, match=f"{name} is {value!r}: it must be a whole number, at least {low}"
    ):
        make(**{name: value})


def test_a_seed_has_64_bits() -> None:
    assert make(seed=-(2**63)).seed == -(2**63)
    with pytest.raises(ValueError, match=f"seed is {2**63}: it must be a whole number of 64 bits"):
        make(seed=2**63)


def test_a_model_length_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_model_len is 1: .* at least 2 .*one of the answer"):
        make(max_model_len=1)


@pytest.mark.parametrize(
    "name", ["enforce_eager", "random_weights", "enable_prefix_caching", "skip_tokenizer_init"]
)
@pytest.mark.parametrize("value", ["False", 0, 1, None])
def test_switches_are_true_or_false(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value!r}: it must be True or False"):
        EngineConfig("some/model", **{name: value})


@pytest.mark.parametrize("option", fields(EngineConfig), ids=lambda option: option.name)
def test_every_option_is_checked_by_its_annotation(option: Field[Any]) -> None:
    """No option takes an object that it has no type for."""
    with pytest.raises(ValueError, match=f"{option.name} is <object"):
        EngineConfig(**{"model": "some/model", option.name: object()})


def test_none_as_a_device_and_other_types_are_named() -> None:
    for name, value in {"device": None, "seed": "x", "seed ": 1.5, "dtype": 16}.items():
        with pytest.raises(ValueError, match=f"{name.strip()} is {value!r}: it must be"):
            EngineConfig("some/model", **{name.strip(): value})


@pytest.mark.parametrize("value", [1, 0, -5, 3.0])
def test_the_cache_needs_a_block_beside_the_padding(value: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"num_kvcache_blocks is {value!r}: .* at least 2 \(one is for padding\)"
    ):
        make(num_kvcache_blocks=value)


@pytest.mark.parametrize("value", [0, 1, 15, 17, 24, -16, 32.0, "16"])
def test_blocks_hold_a_multiple_of_16_tokens(value: Any) -> None:
    with pytest.raises(ValueError, match=f"kvcache_block_size is {value!r}: it must be a"):
        make(kvcache_block_size=value)


@pytest.mark.parametrize("value", [[], [0], [-1, 2], [1.0], ["1"], [True], 4, "124"])
def test_graph_batch_sizes_are_whole_numbers(value: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"graph_batch_sizes is .*: it must be a list of whole numbers of at least 1",
    ):
        make(graph_batch_sizes=value)


@pytest.mark.parametrize("value", [[0], [-1, 2], [1.0], [True], 4, "124", None])
def test_draft_lengths_are_whole_numbers(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"draft_lengths is .*: it must be a list of whole numbers of at least 1"
    ):
        make(draft_lengths=value)
    assert make(draft_lengths=[]).draft_lengths == ()


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.01, 90, float("nan"), "0.9", None, True])
def test_gpu_memory_utilization_is_a_share(value: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"gpu_memory_utilization is {value!r}: it must be a number in \(0, 1\]"
    ):
        make(gpu_memory_utilization=value)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": "fp8"}, "dtype is 'fp8': it must be one of auto, float32, float16, bfloat16"),
        (
            {"skip_tokenizer_init": True, "tokenizer": "x"},
            "skip_tokenizer_init=True does not go with tokenizer='x'",
        ),
        ({"pad_batches": False}, "pad_batches=False needs enforce_eager=True"),
        ({"fuse": False, "enforce_eager": True}, "fuse=False needs enforce_eager=False"),
        ({"max_stall_ms": 0}, "max_stall_ms is 0: it must be a number above 0, or inf"),
        (
            {"max_stall_ms": float("nan")},
            "max_stall_ms is nan: it must be a number above 0, or inf",
        ),
        ({"max_stall_ms": "30"}, "max_stall_ms is '30': it must be a number above 0, or inf"),
        ({"run_ahead": 2}, "run_ahead is 2: it must be 0 or 1"),
        ({"run_ahead": -1}, "run_ahead is -1: it must be 0 or 1"),
        ({"run_ahead": True}, "run_ahead is True: it must be 0 or 1"),
        (
            {"tensor_parallel_size": 0},
            "tensor_parallel_size is 0: it must be a whole number, at least 1",
        ),
        ({"expert_parallel": "yes"}, "expert_parallel is 'yes': it must be True, False or 'auto'"),
        ({"expert_parallel": 1}, "expert_parallel is 1: it must be True, False or 'auto'"),
        ({"expert_parallel": None}, "expert_parallel is None: it must be True, False or 'auto'"),
        ({"expert_parallel": True}, "expert_parallel=True needs tensor_parallel_size above 1"),
    ],
)
def test_what_is_not_supported_says_what_is(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(**options)


def test_options_are_frozen_and_hashable() -> None:
    config = make(
        graph_batch_sizes=[4, 2], max_num_seqs=3, kvcache_block_size=48, gpu_memory_utilization=1
    )
    assert config.graph_batch_sizes == (4, 2) and hash(config) == hash(make(**vars_of(config)))
    with pytest.raises(FrozenInstanceError):
        config.dtype = "float32"  # type: ignore[misc]


def vars_of(config: EngineConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if name != "model"}


@pytest.mark.parametrize(
    "value", [0, -2, 2.5, True, "4", "", "8 G", "GiB", "-1GB", "1e3MB", "0B", "9" * 400 + "B"]
)
def test_offloaded_experts_are_counted_or_given_in_bytes_with_a_unit(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"expert_offload is .*: it must be a number of experts per"
    ):
        make(expert_offload=value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1B", 1), ("500MB", 500 * 10**6), ("8GiB", 8 << 30), ("1.5 kB", 1500), ("2KiB", 2048)],
)
def test_bytes_have_decimal_and_binary_units(text: str, expected: int) -> None:
    assert num_bytes(text) == expected
    assert make(expert_offload=text).expert_offload == text


def test_prefetching_experts_needs_offload() -> None:
    with pytest.raises(ValueError, match="expert_prefetch=True needs expert_offload"):
        make(expert_prefetch=True)
    assert make(tuning={"expert_prefetch": True}, expert_offload=2).tuned.expert_prefetch


@pytest.mark.parametrize(
    "options",
    [{"enforce_eager": True}, {"deterministic": True}, {"tuning": {"fuse": False}}],
    ids=str,
)
def test_steps_that_need_several_kernels_are_never_one(options: dict[str, Any]) -> None:
    tuning = {**options.get("tuning", {}), "persistent_step": True}
    with pytest.raises(ValueError, match="persistent_step=True does not go with"):
        make(**{**options, "tuning": tuning})
    assert make(**options).not_persistent is not None
    assert make().not_persistent is None


EVERYTHING: dict[str, Any] = {
    "graph_batch_sizes": [4, 2], "max_stall_ms": math.inf, "gpu_memory_utilization": 1,
    "kvcache_block_size": np.int64(48), "seed": -(2**63), "expert_offload": 3,
    "hf_overrides": {"rope_scaling": {"factor": 4.0, "short_factor": (1, 2.5)}, "x": None},
    "tuning": {"npu_graph_options": {"a": (1, 2)}, "vision_patch_budgets": [np.int64(64)]},
    "compile_cache": Path("/tmp/store"),
    "speculative_config": {"model": Path("x"), "num_speculative_tokens": np.int64(2)},
    "tokenizer": Path("folder \udcff"), "allowed_local_media_path": Path(__file__).parent,
    "limit_mm_per_prompt": {"image": 4}, "media_limits": {"max_image_pixels": 10**6},
}  # fmt: skip


def test_options_reach_another_process_exactly_as_they_are() -> None:
    config = make(**EVERYTHING)
    read = EngineConfig(**json.loads(json.dumps(to_options(config))))
    assert read == config and vars(read) == vars(config)
    assert [type(value) for value in vars(read).values()] == [
        type(value) for value in vars(config).values()
    ]
    server = ServerConfig(ssl_certfile=Path("a.pem"), ssl_keyfile=Path("b.pem"), api_key=["k"])
    assert ServerConfig(**json.loads(json.dumps(to_options(server)))) == server


def test_every_program_that_is_told_options_gets_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, told = make(**EVERYTHING), []
    *_, farm = worker_command(config)
    told.append(json.loads(farm))
    setup = child_config.setup(
        config, "x", compile_cache=config.compile_cache, waits_for=None, environment={}
    )
    told.append(json.loads(json.dumps(setup))["options"])
    monkeypatch.setattr(ranks_module.WorkerGroup, "start", lambda setup, *rest: setup)
    monkeypatch.setattr(ranks, "checkpoint_digest", lambda folder: "")
    platform = Mock(traits=Mock(max_ranks=None), rank_environment=lambda *rest: {})
    choice = Mock(config=config, platform=platform, shard=Mock(size=2))
    told.append(json.loads(json.dumps(ranks.start(choice).ranks))["options"])
    assert all(EngineConfig(**options) == config for options in told)


@pytest.mark.parametrize("name", ["hf_overrides", "npu_graph_options"])
def test_values_that_no_other_process_can_get_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*: it must be a dict .* with JSON values"):
        make(**{name: {"x": Path("y")}})


def test_a_path_of_bytes_is_refused() -> None:
    class Bytes:
        def __fspath__(self) -> bytes:
            return b"folder"

    with pytest.raises(ValueError, match=r"tokenizer is .*: it must be"):
        make(tokenizer=Bytes())


def test_options_for_developers_are_in_tuning(caplog: pytest.LogCaptureFixture) -> None:
    config = make(tuning={"run_ahead": 0, "vision_patch_budgets": [64]})
    assert (config.tuned.run_ahead, config.tuned.capture) == (0, True)
    assert not caplog.records
    assert make(run_ahead=0, vision_patch_budgets=(64,)) == config
    assert "run_ahead, vision_patch_budgets: give it in tuning" in caplog.text
    with pytest.raises(ValueError, match="run_ahead is given as an option and in tuning"):
        make(run_ahead=0, tuning={"run_ahead": 1})
    with pytest.raises(TypeError, match="unknown option run; the options are capture, fuse"):
        make(tuning={"run": 1})
    with pytest.raises(ValueError, match="run_ahead is 2: it must be 0 or 1"):
        make(tuning={"run_ahead": 2})


@pytest.mark.parametrize("value", [10**9, 2**40, 10**30])
@pytest.mark.parametrize(
    "name",
    [
        "max_num_seqs", "max_num_batched_tokens", "max_model_len", "num_kvcache_blocks",
        "kvcache_block_size", "graph_batch_sizes", "draft_lengths", "vision_patch_budgets",
        "tensor_parallel_size", "data_parallel_size",
    ],
)  # fmt: skip
def test_sizes_beyond_any_machine_are_refused_with_the_limit(name: str, value: int) -> None:
    value *= 1 if name != "num_kvcache_blocks" else 16  # blocks are many if they are small
    many = name in ("graph_batch_sizes", "draft_lengths", "vision_patch_budgets")
    with pytest.raises(ValueError, match=rf"{name} is .*{value}.*: it must be .*at most \d+"):
        make(**{name: [value] if many else value})
