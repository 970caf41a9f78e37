"""Experts larger than the device: the same tokens as with all experts on it, and honest counts."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.models.experts import offloaded
from nanovllm.models.experts.offloaded import Offloaded
from nanovllm.startup import offload
from tests.conftest import save_tiny
from tests.engines import VOCAB_SIZE, assert_all_free, greedy, random_prompts, tokens

NUM_EXPERTS, TOP_K = 8, 2
PROMPTS = random_prompts([1, 7, 19, 40])
Make = Callable[..., LLM]

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K},
    # the layer in the middle is dense
    "qwen3_moe": {
        "num_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": 48,
        "norm_topk_prob": True, "mlp_only_layers": [1],
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=CHECKPOINTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = CHECKPOINTS[request.param]
    path = tmp_path_factory.mktemp(request.param)
    return save_tiny(path, request.param, num_hidden_layers=3, vocab_size=VOCAB_SIZE, **changes)


@pytest.fixture(scope="module")
def make(folder: Path, device: str) -> Make:
    def made(**options: Any) -> LLM:
        defaults: dict[str, Any] = {
            "dtype": "float32", "device": device, "enforce_eager": True, "max_num_seqs": 8,
            "max_num_batched_tokens": 64, "max_model_len": 96, "kvcache_block_size": 16,
            "num_kvcache_blocks": 60, "graph_batch_sizes": (1, 3, 8), "skip_tokenizer_init": True,
        }  # fmt: skip
        return LLM(str(folder), **{**defaults, **options})

    return made


@pytest.fixture(scope="module")
def expected(make: Make) -> list[list[int]]:
    """The tokens with all experts on the device."""
    llm = make()
    found = tokens(llm, PROMPTS, greedy())
    llm.close()
    return found


@pytest.fixture(scope="module")
def quarter(make: Make) -> Iterator[LLM]:
    llm = make(expert_offload=2)
    yield llm
    llm.close()


def layers(llm: LLM) -> list[Offloaded]:
    return llm.engine.runner.offloaded


def check_tables(llm: LLM) -> None:
    """Every slot holds the weights of its owner."""
    for stored in layers(llm):
        residents, first = stored.residents, int(stored.first_1)
        for slot, owner in enumerate(residents.owner_S.tolist()):
            assert residents.slot_I[owner] == slot
            if 0 <= owner - first < NUM_EXPERTS:
                weights = stored.host_gate_up_EGD[owner - first]
                assert residents.slots_gate_up_SGD[slot].equal(weights)


@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graph"])
@pytest.mark.parametrize("share", [2, 4, 8, "all bytes but one", "three experts for all layers"])
def test_tokens_are_those_of_a_fully_resident_model(
    make: Make, expected: list[list[int]], share: Any, enforce_eager: bool
) -> None:
    sizes = {"all bytes but one": -1, "three experts for all layers": None}
    if isinstance(share, str):
        probe = make(expert_offload=2)
        expert_bytes, num_layers = layers(probe)[0].expert_bytes, len(layers(probe))
        probe.close()
        num = 3 if sizes[share] is None else num_layers * NUM_EXPERTS
        share = f"{num * expert_bytes + (sizes[share] or 0)}B"
    llm = make(expert_offload=share, enforce_eager=enforce_eager)
    assert tokens(llm, PROMPTS, greedy()) == expected
    assert tokens(llm, PROMPTS[::-1], greedy()) == expected[::-1]  # with other experts resident
    check_tables(llm)
    assert_all_free(llm)
    llm.close()


@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graph"])
def test_the_trained_model_answers_as_if_all_experts_were_there(
    device: str, enforce_eager: bool
) -> None:
    questions = ["What is 7 plus 5?", "Reverse the word: planet", "Sort: 31, 4, 15", "Who are you?"]
    chats = [[{"role": "user", "content": question}] for question in questions]
    answers = []
    for options in ({}, {"expert_offload": 2}):
        llm = LLM(
            "tiny-mixtral", device=device, enforce_eager=enforce_eager, max_num_seqs=4,
            max_num_batched_tokens=64, graph_batch_sizes=(1, 4), **options,
        )  # fmt: skip
        params = SamplingParams(temperature=0, max_tokens=32)
        outputs = llm.chat(chats, params, use_tqdm=False)
        answers.append([(output["text"], output["token_ids"]) for output in outputs])
        llm.close()
    assert answers[0] == answers[1]


@pytest.mark.parametrize("num_buffers", [0, 1, 2])
def test_prefill_streams_with_any_number_of_buffers(
    make: Make, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, num_buffers: int
) -> None:
    monkeypatch.setattr(offload, "MAX_BUFFERS", num_buffers)
    llm = make(expert_offload=3)
    buffers = [stored.buffer for stored in layers(llm)]
    assert len({id(one) for one in buffers if one is not None}) == num_buffers
    assert tokens(llm, PROMPTS, greedy()) == expected
    streamed = llm.engine.metrics.experts.batch.streamed  # type: ignore[union-attr]
    # the longest prompts make two steps; their last layers go on with few tokens
    assert streamed == (2 * (len(layers(llm)) - 1) * (NUM_EXPERTS - 3) if num_buffers else 0)
    llm.close()


def test_buffers_need_memory(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With half a buffer's worth of memory left there is none."""
    llm = make(expert_offload=2)
    spec = llm.engine.runner.spec
    assert spec.offload is not None and spec.offload.num_buffers == 2
    llm.close()
    monkeypatch.setattr(type(llm.engine.runner.platform), "total_bytes", lambda self: 10_000)
    llm = make(expert_offload=2)
    assert llm.engine.runner.spec.offload.num_buffers == 0  # type: ignore[union-attr]
    llm.close()


def test_counters_add_up(quarter: LLM) -> None:
    """One request. Its prompt is streamed, except for the last layer, which goes on with one token.
    Its length is known, so no step is launched after the one that gives the last token."""
    stats = quarter.engine.metrics.experts
    assert stats is not None
    before = stats.total
    tokens(quarter, PROMPTS[:1], greedy(12))
    batch, num_layers = stats.batch, len(layers(quarter))
    assert batch.needed == TOP_K * (1 + 11 * num_layers)
    assert batch.needed == batch.resident + batch.fetched
    # K slots suffice for one token
    assert batch.in_place == batch.ahead == 0 and batch.fetched > 0
    assert batch.streamed == (num_layers - 1) * (NUM_EXPERTS - 2)
    assert stats.total.needed == before.needed + batch.needed
    assert batch.hit_rate == batch.resident / batch.needed
    expert_bytes = layers(quarter)[0].expert_bytes
    assert batch.moved_bytes == (batch.fetched + batch.streamed) * expert_bytes
    assert batch.bus_rate is not None and batch.bus_seconds == batch.moved_bytes / batch.bus_rate


def test_padding_rows_fetch_nothing(make: Make) -> None:
    """The same requests in a bucket that fits, and in one with five rows of padding."""
    needed = []
    for sizes in ((3,), (8,)):
        llm = make(expert_offload=4, graph_batch_sizes=sizes)
        assert llm.engine.metrics.experts is not None
        tokens(llm, PROMPTS[:3], greedy())
        needed.append(llm.engine.metrics.experts.batch)
        llm.close()
    assert needed[0].needed == needed[1].needed and needed[0].fetched == needed[1].fetched


def test_each_batch_of_requests_is_logged(quarter: LLM, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="nanovllm"):
        tokens(quarter, PROMPTS, greedy())
        tokens(quarter, PROMPTS[:1], greedy())
    lines = [one.message for one in caplog.records if one.message.startswith("experts: ")]
    stats = quarter.engine.metrics.experts
    assert len(lines) == 2 and stats is not None and lines[1] == f"experts: {stats.batch}"
    assert f"{stats.batch.hit_rate:.1%} of {stats.batch.needed} experts" in lines[1]


def test_an_idle_step_is_no_batch(quarter: LLM, caplog: pytest.LogCaptureFixture) -> None:
    tokens(quarter, PROMPTS[:1], greedy())
    stats = quarter.engine.metrics.experts
    assert stats is not None
    batch = stats.batch
    with caplog.at_level(logging.INFO, logger="nanovllm"):
        quarter.engine.step()
    assert stats.batch is batch and batch.needed and "experts: " not in caplog.text


def test_an_aborted_request_ends_its_batch(quarter: LLM) -> None:
    stats = quarter.engine.metrics.experts
    assert stats is not None
    request_id = quarter.engine.add_request(PROMPTS[0], greedy())
    for _ in range(4):
        quarter.engine.step()
    before = stats.batch
    quarter.engine.abort(request_id)
    while quarter.engine.has_unfinished:
        quarter.engine.step()
    assert stats.batch is not before and stats.batch.needed > 0


@pytest.mark.parametrize("share", [2, "three experts for all layers"])
@pytest.mark.parametrize("prefetch", [False, True])
def test_after_an_interrupted_fetch_every_slot_has_the_weights_of_its_owner(
    make: Make,
    expected: list[list[int]],
    share: Any,
    prefetch: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C when the tables have changed and weights are still to be copied."""
    if isinstance(share, str):
        probe = make(expert_offload=2)
        share = f"{3 * layers(probe)[0].expert_bytes}B"
        probe.close()
    llm = make(expert_offload=share, expert_prefetch=prefetch)
    original, count = offloaded.prepare, 0

    def prepare(*args: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        found = original(*args, **more)
        if count == 20:
            for stored in layers(llm):
                stored.residents.slots_gate_up_SGD.fill_(torch.nan)
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch:
        patch.setattr(offloaded, "prepare", prepare)
        with pytest.raises(KeyboardInterrupt):
            tokens(llm, PROMPTS, greedy())
    assert tokens(llm, PROMPTS, greedy()) == expected
    check_tables(llm)
    llm.close()


def test_metrics_show_experts_if_they_are_offloaded(quarter: LLM, shared_llm: LLM) -> None:
    tokens(quarter, PROMPTS[:2], greedy())
    found = {one.name.removeprefix("nanovllm:"): one.value for one in quarter.get_metrics()}
    stats = quarter.engine.metrics.experts
    assert stats is not None
    assert found["expert_hit_rate"] == stats.batch.hit_rate
    assert found["experts_fetched"] == stats.total.fetched
    assert found["experts_moved_bytes"] == stats.total.moved_bytes
    assert not any("expert" in one.name for one in shared_llm.get_metrics())


def test_the_device_holds_its_share_of_the_experts(make: Make) -> None:
    plain, llm = make(), make(expert_offload=2)
    expert_bytes, num_layers = layers(llm)[0].expert_bytes, len(layers(llm))
    all_bytes = num_layers * NUM_EXPERTS * expert_bytes
    tables = sum(
        tensor.nbytes
        for one in layers(llm)
        for tensor in (one.first_1, one.counters_C, *one.residents[2:])
    )
    slots = sum(one.buffer.slot_I.nbytes for one in layers(llm)[:2] if one.buffer is not None)
    held = (2 * num_layers + 2 * (NUM_EXPERTS - 2)) * expert_bytes + tables + slots
    memory = llm.engine.memory
    assert memory.host_bytes == all_bytes
    assert memory.weights_bytes == plain.engine.memory.weights_bytes - all_bytes + held
    assert "experts on the host" in str(memory)
    assert "experts on the host" not in str(plain.engine.memory)
    plain.close()
    llm.close()


def test_a_batch_of_many_rows_streams_and_gives_the_same_tokens(
    make: Make, expected: list[list[int]]
) -> None:
    """Sixteen rows have four pairs for each expert."""
    llm = make(expert_offload=2, max_num_seqs=16, graph_batch_sizes=(16,))
    assert llm.engine.metrics.experts is not None
    assert tokens(llm, PROMPTS * 4, greedy()) == expected * 4
    batch = llm.engine.metrics.experts.batch
    assert batch.streamed > 11 * len(layers(llm)) * (NUM_EXPERTS - 2)
    llm.close()


def test_proposals_are_verified_with_offloaded_experts(
    make: Make, expected: list[list[int]]
) -> None:
    llm = make(expert_offload=2, draft_lengths=(3,))
    llm.engine.propose = lambda request: (request.prompt_ids + request.output_ids)[:3]
    assert tokens(llm, PROMPTS, greedy()) == expected
    check_tables(llm)
    llm.close()


@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graph"])
def test_predicted_experts_change_no_token(
    make: Make, expected: list[list[int]], enforce_eager: bool
) -> None:
    llm = make(expert_offload=3, expert_prefetch=True, enforce_eager=enforce_eager)
    assert llm.engine.metrics.experts is not None
    assert tokens(llm, PROMPTS, greedy()) == expected
    batch = llm.engine.metrics.experts.batch
    assert batch.ahead > 0 and batch.needed == batch.resident + batch.fetched + batch.in_place
    check_tables(llm)
    llm.close()


def test_random_weights_are_those_of_a_fully_resident_model(make: Make) -> None:
    options = {"random_weights": True, "seed": 7}
    plain, llm = make(**options), make(**options, expert_offload=3)
    assert tokens(llm, PROMPTS, greedy()) == tokens(plain, PROMPTS, greedy())
    plain.close()
    llm.close()


# bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [1, 9])
def test_a_number_outside_of_active_and_all_experts_is_refused(make: Make, num: int) -> None:
    message = (
        f"expert_offload is {num}: it must be at least {TOP_K}, the active experts of a token, and "
        f"at most {NUM_EXPERTS}, the experts of a layer"
    )
    with pytest.raises(ValueError, match=message):
        make(expert_offload=num)


def test_bytes_for_less_than_the_active_experts_of_a_layer_are_refused(make: Make) -> None:
    message = r"expert_offload is '20kB', which holds 0 expert\(s\) of .* must hold the 2 active"
    with pytest.raises(ValueError, match=message):
        make(expert_offload="20kB")


def test_bytes_for_all_experts_are_refused(make: Make) -> None:
    message = r"expert_offload is '1GiB', which holds all \d+ experts \(.* MiB\): leave it out"
    with pytest.raises(ValueError, match=message):
        make(expert_offload="1GiB")


def test_a_model_without_experts_is_refused(make_llm: Callable[..., LLM]) -> None:
    message = "expert_offload is 2, but Qwen3ForCausalLM has no experts"
    with pytest.raises(ValueError, match=message):
        make_llm(expert_offload=2)


def test_a_model_without_a_sparse_layer_is_refused(tmp_path: Path, device: str) -> None:
    folder = save_tiny(tmp_path, "qwen3_moe", num_experts=8, mlp_only_layers=[0, 1])
    message = "expert_offload is 8, but Qwen3MoeForCausalLM has no experts in any layer"
    with pytest.raises(ValueError, match=message):
        LLM(str(folder), device=device, expert_offload=8, skip_tokenizer_init=True,
            enforce_eager=True)  # fmt: skip


def test_sleep_is_refused(make: Make, quarter: LLM) -> None:
    with pytest.raises(ValueError, match="sleep is not supported with expert_offload"):
        quarter.sleep()
    assert not quarter.engine.is_sleeping
    assert tokens(quarter, PROMPTS[:1], greedy(3))
    message = "expert_offload=2 does not go with enable_sleep_mode=True"
    with pytest.raises(ValueError, match=message):
        make(expert_offload=2, enable_sleep_mode=True)


@pytest.mark.parametrize("other", ["mps", "npu"])
def test_other_devices_are_refused(quarter: LLM, other: str) -> None:
    """Their traits decide."""
    traits = importlib.import_module(f"nanovllm.platforms.{other}").TRAITS
    platform: Any = SimpleNamespace(traits=traits)
    engine = quarter.engine
    message = f"expert_offload is 2, which is not supported on this {other} device: it needs a CPU"
    with pytest.raises(ValueError, match=message):
        offload.choose_offload(engine.config, engine.runner.model, platform)
