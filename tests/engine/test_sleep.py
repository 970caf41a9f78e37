"""A sleeping engine gives memory back, refuses requests, and answers as before once awake."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM
from nanovllm.platforms.mps import MpsPlatform
from tests.engine.test_lifetime import touch_cache, used_bytes
from tests.engines import greedy, random_prompts, tokens

PROMPTS = random_prompts([5, 40, 99], seed=31)
Make = Callable[..., LLM]


@pytest.fixture
def make(make_llm: Make) -> Make:
    """Makes engines that can sleep on any device."""
    return lambda **options: make_llm(enable_sleep_mode=True, **options)


def held_bytes(llm: LLM) -> dict[str, int]:
    """Bytes of the memory that weights and cache have now, where tensors can be shrunk."""
    runner = llm.engine.runner
    groups = {"weights": runner.params, "kv_cache": runner.steps.caches}
    return {
        name: sum(tensor.untyped_storage().nbytes() for tensor in _leaves(group))
        for name, group in groups.items()
    }


def _leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for part in value if part is not None for leaf in _leaves(part)]


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"enforce_eager": False, "graph_batch_sizes": (1, 4), "max_num_seqs": 4},
     {"random_weights": True, "seed": 7}, {"kv_cache_dtype": "fp8"}],
    ids=["eager", "graph", "random", "fp8"],
)  # fmt: skip
def test_answers_are_the_same_after_sleep(
    make: Make, options: dict[str, Any], level: int, captured: list[object]
) -> None:
    llm = make(**options)
    params = [greedy(), greedy(logprobs=2), greedy(temperature=1.0, seed=4)]
    expected = tokens(llm, PROMPTS, params)
    compiler, num_captured = llm.engine.runner.compiler, len(captured)
    num_compiled = compiler.num_compiled
    for _ in range(2):
        llm.sleep(level)
        llm.wake_up()
        assert tokens(llm, PROMPTS, params) == expected
    assert (compiler.num_compiled, len(captured)) == (num_compiled, num_captured)


def test_weights_in_a_format_come_back(make_llm: Make) -> None:
    llm = make_llm(device="cpu", quantization="int8")
    expected = tokens(llm, PROMPTS, greedy())
    llm.sleep(2)
    llm.wake_up()
    assert tokens(llm, PROMPTS, greedy()) == expected


def test_dropped_weights_are_read_from_the_checkpoint(make: Make, make_llm: Make) -> None:
    expected = tokens(make_llm(), PROMPTS, greedy())
    llm = make()
    with torch.no_grad():
        llm.engine.runner.params.embed_VD.fill_(1)
    assert tokens(llm, PROMPTS, greedy()) != expected
    llm.sleep(1)
    llm.wake_up()
    assert tokens(llm, PROMPTS, greedy()) != expected
    llm.sleep(2)
    llm.wake_up()
    assert tokens(llm, PROMPTS, greedy()) == expected


@pytest.mark.parametrize("level", [1, 2])
def test_a_cpu_engine_frees_its_storages(make_llm: Make, level: int) -> None:
    llm = make_llm(device="cpu")
    full = held_bytes(llm)
    llm.sleep(level)
    weights = full["weights"] if level == 1 else 0
    assert held_bytes(llm) == {"weights": weights, "kv_cache": 0}
    llm.wake_up(["kv_cache"])
    assert held_bytes(llm) == {"weights": weights, "kv_cache": full["kv_cache"]}
    llm.wake_up(["weights"])
    assert held_bytes(llm) == full


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_the_system_gets_the_memory_back(make_llm: Make) -> None:
    make_llm(device="cpu").close()
    before = used_bytes("cpu")
    llm = make_llm(device="cpu", num_kvcache_blocks=16_384)
    cache_bytes = 16_384 * llm.engine.runner.block_bytes
    touch_cache(llm)
    assert used_bytes("cpu") - before > 0.9 * cache_bytes
    llm.sleep()
    assert used_bytes("cpu") - before < 0.25 * cache_bytes


def test_sleep_forgets_cached_prefixes_and_clears_the_cache(make: Make) -> None:
    llm = make()
    prompt = random_prompts([64], seed=32)
    expected = tokens(llm, prompt, greedy())
    (again,) = llm.generate(prompt, greedy(), use_tqdm=False)
    assert again["num_cached_tokens"] > 0
    for cache in llm.engine.runner.steps.caches:
        cache.k_CBKH.fill_(float("nan"))
    llm.sleep()
    llm.wake_up()
    assert not any(cache.k_CBKH.any() for cache in llm.engine.runner.steps.caches)
    (fresh,) = llm.generate(prompt, greedy(), use_tqdm=False)
    assert fresh["num_cached_tokens"] == 0 and [fresh["token_ids"]] == expected


def test_a_sleeping_engine_refuses_requests(make: Make) -> None:
    llm = make()
    expected = tokens(llm, PROMPTS, greedy())
    llm.sleep()
    assert llm.engine.is_sleeping and llm.llm_engine.is_sleeping()
    for use in (
        lambda: tokens(llm, PROMPTS, greedy()),
        lambda: next(llm.stream(PROMPTS, greedy())),
        lambda: llm.llm_engine.add_request("a", {"prompt_token_ids": [5]}, greedy()),
    ):
        with pytest.raises(RuntimeError, match=r"sleeps: call wake_up\(\)"):
            use()
    llm.wake_up(["weights"])
    with pytest.raises(RuntimeError, match=r"wake_up\(\) \(asleep: kv_cache\)"):
        tokens(llm, PROMPTS, greedy())
    llm.wake_up(["kv_cache"])
    assert not llm.engine.is_sleeping
    assert tokens(llm, PROMPTS, greedy()) == expected


def test_repeated_calls_change_nothing(make: Make) -> None:
    llm = make()
    expected = tokens(llm, PROMPTS, greedy())
    llm.wake_up()
    for level in (1, 1, 2, 2, 1):
        llm.sleep(level)
    llm.wake_up([])
    assert llm.engine.is_sleeping
    llm.wake_up()
    llm.wake_up()
    assert tokens(llm, PROMPTS, greedy()) == expected


@pytest.mark.parametrize("level", [0, 3, -1, None, "1"])
def test_other_levels_are_refused(make: Make, level: Any) -> None:
    llm = make()
    with pytest.raises(ValueError, match=f"level is {level!r}: it must be 1 .* or 2"):
        llm.sleep(level)
    assert not llm.engine.is_sleeping
    llm.close()


@pytest.mark.parametrize(
    "tags, message",
    [(["weights", "x"], "tags holds 'x'"), ("weights", "tags is 'weights': it must be a list"),
     (1, "tags is 1: it must be a list of weights or kv_cache")],
)  # fmt: skip
def test_other_tags_are_refused(make: Make, tags: Any, message: str) -> None:
    llm = make()
    llm.sleep()
    with pytest.raises(ValueError, match=message):
        llm.wake_up(tags)
    assert llm.engine.is_sleeping
    llm.wake_up()
    tokens(llm, PROMPTS, greedy())


def test_unfinished_requests_keep_an_engine_awake(make: Make, make_llm: Make) -> None:
    expected = tokens(make_llm(), PROMPTS, greedy())
    llm = make()
    found: list[list[int]] = [[] for _ in PROMPTS]
    stream = llm.stream(PROMPTS, greedy())
    for num, piece in enumerate(stream):
        found[piece["index"]] += piece["token_ids"]
        if num == 5:
            with pytest.raises(ValueError, match=r"3 request\(s\) are unfinished"):
                llm.sleep()
    assert found == expected
    llm.sleep()


def test_a_checkpoint_that_is_gone_leaves_the_engine_asleep(
    make_llm: Make, checkpoint: Path, tmp_path: Path, device: str
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    sizes: dict[str, Any] = {"max_model_len": 256, "num_kvcache_blocks": 99, "dtype": "float32"}
    llm = LLM(folder, device=device, enforce_eager=True, enable_sleep_mode=True, **sizes)
    expected = tokens(llm, PROMPTS, greedy())
    llm.sleep(2)
    weights = folder / "model.safetensors"
    weights.rename(folder / "away")
    with pytest.raises(ValueError, match=r"no .safetensors file"):
        llm.wake_up()
    assert llm.engine._sleeper.asleep == {"weights", "kv_cache"}
    (folder / "away").rename(weights)
    llm.wake_up()
    assert tokens(llm, PROMPTS, greedy()) == expected


def test_a_closed_engine_cannot_sleep(make: Make) -> None:
    llm = make()
    llm.sleep()
    llm.close()
    for use in (llm.sleep, llm.wake_up):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_devices_without_sleep_say_so(
    make_llm: Make, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    platform = MpsPlatform(torch.device("cpu"))
    monkeypatch.setattr("nanovllm.platforms.select", lambda device, **_: platform)
    llm = make_llm(device="mps", num_kvcache_blocks=99)
    for level in (1, 2):
        with pytest.raises(ValueError, match="sleep is not supported on a mps device"):
            llm.sleep(level)
    assert not llm.engine.is_sleeping
    tokens(llm, PROMPTS, greedy())
    with pytest.raises(ValueError, match=r"enable_sleep_mode is True, but .* mps device"):
        make_llm(device="mps", enable_sleep_mode=True)


@pytest.mark.gpu
def test_a_gpu_needs_the_option(make_llm: Make) -> None:
    llm = make_llm()
    with pytest.raises(ValueError, match="sleep needs an engine loaded with enable_sleep_mode"):
        llm.sleep()
    tokens(llm, PROMPTS, greedy())


def gpu_bytes() -> int:
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return total_bytes - free_bytes


@pytest.mark.shows("GPU", architectures=["Qwen3ForCausalLM"])
@pytest.mark.gpu
@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graph"])
def test_a_gpu_gets_the_memory_back(make: Make, enforce_eager: bool, level: int) -> None:
    """Of weights and cache; after `close`, of everything."""
    make().close()
    before = gpu_bytes()
    options = {"enforce_eager": enforce_eager, "graph_batch_sizes": (1, 4), "max_num_seqs": 4}
    llm = make(num_kvcache_blocks=16_384, **options)
    expected = tokens(llm, PROMPTS, greedy())
    memory, awake = llm.engine.memory, gpu_bytes()
    llm.sleep(level)
    asleep = gpu_bytes()
    assert awake - asleep >= memory.weights_bytes + memory.cache_bytes
    llm.wake_up()
    assert gpu_bytes() >= asleep + memory.weights_bytes + memory.cache_bytes
    assert tokens(llm, PROMPTS, greedy()) == expected
    if level == 1:
        llm.sleep()
    llm.close()
    assert gpu_bytes() - before < memory.cache_bytes // 2


@pytest.mark.gpu
def test_a_budget_counts_what_a_region_holds(make: Make, make_llm: Make) -> None:
    """The measured cache is as large as without the option, less the rest of two chunks."""
    sizes = {"num_kvcache_blocks": None, "max_num_seqs": 256, "max_model_len": None}
    share = {"gpu_memory_utilization": 0.3, **sizes}
    plain = make_llm(**share)
    expected = plain.engine.memory.budget
    plain.close()
    budget = make(**share).engine.memory.budget
    assert expected is not None and budget is not None
    assert abs(expected.allowance_bytes - budget.allowance_bytes) < 256 << 20
