"""EAGLE-3 heads draft what their formula gives, in every published layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams
from nanovllm.engine.engine import Engine
from nanovllm.kernels.cpu.recording import RecordedStep
from nanovllm.models.checkpoint import CheckpointError
from nanovllm.runner.draft_head import DraftHead
from nanovllm.startup.draft_heads import Eagle3
from nanovllm.startup.load import load
from tests.conftest import save_tiny
from tests.engines import greedy, random_prompts
from tests.engines import tokens as llm_tokens
from tests.runner.heads import EagleCase, Watched, make
from tests.runner.proposers import MODES, config_of, run, tokens

NUM = 3
PROMPTS = random_prompts([19, 1, 40, 7], seed=3)
DRAWN = SamplingParams(temperature=0.9, seed=4, max_tokens=15, ignore_eos=True)
ONE_STEP = {"max_num_batched_tokens": 256}  # each prompt in one piece
AUX = "eagle_aux_hidden_state_layer_ids"

PLAIN = EagleCase("midlayer")
CASES = (
    PLAIN,
    EagleCase("speculators", {AUX: [1, 2, 4]}, "layers.0.", nested=True),
    EagleCase("after", {"norm_before_residual": False}, "layers.0.", nested=True),
    EagleCase(
        "all-norms", {"norm_before_fc": True, "fc_norm": True, "norm_output": True},
        num_drafted=512,
    ),
    EagleCase(
        "lent", {"eagle_config": {AUX: [0, 1, 3]}}, hidden=64, num_drafted=512, has_table=False,
        has_head=False,
    ),
)  # fmt: skip
READ = {"speculators": (0, 1, 3), "lent": (0, 1, 3)}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    return save_tiny(folder, "qwen3", vocab_size=512, hidden_size=64, num_hidden_layers=4)


@pytest.fixture(scope="module")
def hf(target: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()


def plain_tokens(folder: Path, params: SamplingParams) -> list[list[int]]:
    sizes = {"max_model_len": 256, "kvcache_block_size": 16, "num_kvcache_blocks": 100}
    llm = LLM(str(folder), dtype="float32", device="cpu", enforce_eager=True, **sizes)
    found = llm_tokens(llm, PROMPTS, params)
    llm.close()
    return found


@pytest.fixture(scope="module")
def expected(target: Path) -> list[list[int]]:
    return plain_tokens(target, greedy(15))


def check_drafts(
    case: EagleCase, folder: Path, target: Path, hf: Any, expected: list[list[int]],
    read: tuple[int, ...], **options: Any,
) -> None:  # fmt: skip
    watched = Watched(Eagle3(NUM, str(case.save(folder))))
    engine = make(target, watched, NUM, **ONE_STEP, **options)
    for prompt, answer in zip(PROMPTS, expected):
        watched.seen.clear()
        assert tokens(engine, [prompt], greedy(15)) == [answer]
        sequence = prompt + answer
        checked = [one for one in watched.seen if one[0] < len(sequence)]
        assert len(checked) > 4
        for pos, drafted in checked:
            found = case.drafts(hf, sequence[: pos + 1], NUM, read)
            assert drafted == found, f"after {pos}"
    engine.close()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_head_drafts_what_its_formula_gives(
    case: EagleCase, target: Path, hf: Any, tmp_path: Path, expected: list[list[int]]
) -> None:
    read = READ.get(case.name, (1, 1, 0))
    check_drafts(case, tmp_path / "head", target, hf, expected, read, **MODES["eager"])


def test_a_head_reads_the_states_of_another_family(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    changes = {"vocab_size": 96, "num_hidden_layers": 7, "sliding_window": 8}
    folder = save_tiny(tmp_path / "model", "gemma3_text", **changes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    case = replace(PLAIN, vocab_size=96)
    prompts = [[one % 96 for one in prompt] for prompt in PROMPTS]
    watched = Watched(Eagle3(NUM, str(case.save(tmp_path / "head"))))
    engine = make(folder, watched, NUM, num_kvcache_blocks=200, **MODES["eager"])
    (answer,) = tokens(engine, prompts[:1], greedy(12))
    sequence = prompts[0] + answer
    checked = [one for one in watched.seen if one[0] < len(sequence)]
    assert len(checked) > 4
    for pos, drafted in checked:
        assert drafted == case.drafts(model, sequence[: pos + 1], NUM, (1, 2, 3))
    engine.close()


def test_captured_steps_with_a_head_give_the_same_answers_and_drafts(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Several rows and padding rows share steps, whose programs are mostly those of test_draft."""
    folder = str(PLAIN.save(tmp_path / "head"))
    of_params = [greedy(15), DRAWN]
    expected = [plain_tokens(checkpoint, params) for params in of_params]
    seen = []
    for options in (MODES["eager"], {"graph_batch_sizes": (6,)}):
        watched = Watched(Eagle3(2, folder))
        engine = make(checkpoint, watched, 2, **options)
        watched.seen.clear()
        assert [tokens(engine, PROMPTS, params) for params in of_params] == expected
        seen.append(sorted(watched.seen))
        engine.close()
    assert seen[0] == seen[1]


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_verifying_steps_with_a_head_are_recorded(
    quantization: str | None, target: Path, tmp_path: Path, expected: list[list[int]]
) -> None:
    """On a CPU: else most of such a step of a small model is Python."""
    speculative = {
        "method": "eagle3", "model": str(PLAIN.save(tmp_path / "head")),
        "num_speculative_tokens": 2,
    }  # fmt: skip
    if quantization is not None:
        speculative["quantization"] = quantization
    common = {"speculative_config": speculative, "tuning": {"adapt_draft_length": False}}
    drafts = []
    for mode in ({"graph_batch_sizes": (1,)}, MODES["eager"]):
        engine = Engine(load(config_of(target, {**common, **mode, "max_num_seqs": 1})))
        drafting = engine.runner.steps.drafting
        assert drafting is not None
        assert isinstance(drafting.steps.params.head_VD, torch.Tensor) == (quantization is None)
        if mode is not MODES["eager"]:
            assert isinstance(engine.runner.buckets.verify(1, 3).replay, RecordedStep)
        engine.add_request(PROMPTS[0], greedy(15), incremental=False)
        (request,), seen = engine.scheduler.waiting, []
        while engine.has_unfinished:
            engine.step()
            seen.append(engine.runner.steps.state.draft_SK[:-1].tolist())  # type: ignore[index]
        assert request.output_ids == expected[0]
        drafts.append(seen)
        engine.close()
    assert drafts[0] == drafts[1] and len(drafts[0]) > 4


def test_a_perfect_head_is_accepted(target: Path, tmp_path: Path) -> None:
    """A head that reads the last layer's state alone, and passes it on, chooses what the model's
    head chooses: it repeats the model's newest choice."""
    case = replace(
        PLAIN, hidden=64, num_drafted=512, has_table=False, has_head=False,
        flags={"eagle_config": {AUX: [0, 1, 3]}},
    )  # fmt: skip
    folder = case.save(tmp_path / "head")
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name].zero_()
    weights["fc.weight"] = torch.cat((torch.zeros(64, 128), torch.eye(64)), 1)
    weights["norm.weight"] = load_file(target / "model.safetensors")["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")
    watched = Watched(Eagle3(1, str(folder)))
    engine = make(target, watched, 1, **ONE_STEP, **MODES["eager"])
    watched.seen.clear()
    (prompt,) = PROMPTS[:1]
    (answer,) = tokens(engine, [prompt], greedy(12))
    sequence = prompt + answer
    checked = [one for one in watched.seen if one[0] < len(sequence)]
    assert checked and all(drafted == [sequence[pos]] for pos, drafted in checked)
    engine.close()


def test_a_head_sleeps_and_wakes_with_its_model(target: Path, tmp_path: Path) -> None:
    case = replace(PLAIN, hidden=64, has_table=False)
    watched = Watched(Eagle3(NUM, str(case.save(tmp_path / "head"))))
    engine = make(target, watched, NUM, **ONE_STEP, **MODES["eager"])
    seen = []
    for _ in range(2):
        watched.seen.clear()
        tokens(engine, PROMPTS[:2], greedy(9))
        seen.append(list(watched.seen))
        engine.forget_prefixes()
        engine.sleep(2)
        engine.wake_up()
    params = engine.runner.params
    assert seen[0] == seen[1] and params.draft.embed_VD is params.embed_VD
    engine.close()


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_hidden_layers": 2}, "num_hidden_layers of an EAGLE-3 head is 2: only 1 is"),
    "type": ({"model_type": "deepseek_v3"}, "model_type 'deepseek_v3' of an EAGLE-3 head is not"),
    "method": (
        {"transformer_layer_config": {}, "speculators_model_type": "dflash"},
        "speculators_model_type 'dflash' is not supported: only 'eagle3' is",
    ),
    "vocabulary": ({"vocab_size": 500}, "has 500 tokens in its vocabulary, the model has 512"),
    "drafted": ({"draft_vocab_size": 513}, "draft_vocab_size is 513: it must be at most"),
    "width": ({"target_hidden_size": 32}, "reads hidden states of 32 numbers, the model has 64"),
    "flag": ({"fc_norm": 1}, "fc_norm is 1: it must be true or false"),
    "two states": ({AUX: [1, 2]}, r"is \[1, 2\]: it must be three layers, from 1 on"),
    "embedding": ({AUX: [0, 1, 2]}, r"is \[0, 1, 2\]: it must be three layers, from 1 on"),
    "beyond": ({AUX: [1, 2, 5]}, r"after layers \[0, 1, 4\]: they must be 0 … 3"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config of an EAGLE-3 head"),
    "window": ({"sliding_window": 64}, "sliding_window of an EAGLE-3 head is not supported"),
    "nextn": ({"eagle_config": {"use_aux_hidden_state": False}}, "it is not an EAGLE-3 head"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_configs_of_other_heads_are_refused(name: str, target: Path, tmp_path: Path) -> None:
    changes, message = CHANGES[name]
    folder = PLAIN.save(tmp_path / "head")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        make(target, Eagle3(NUM, str(folder)), NUM, **MODES["eager"])


def test_a_map_to_tokens_that_the_model_lacks_is_refused(target: Path, tmp_path: Path) -> None:
    folder = PLAIN.save(tmp_path / "head")
    weights = load_file(folder / "model.safetensors")
    weights["d2t"][-1] = 512 - PLAIN.num_drafted + 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"d2t maps to tokens from .* to 512: .* to 511"):
        make(target, Eagle3(NUM, str(folder)), NUM, **MODES["eager"])


def test_random_weights_need_the_config_alone(target: Path, tmp_path: Path) -> None:
    folder = PLAIN.save(tmp_path / "head")
    (folder / "model.safetensors").unlink()
    drafts = Eagle3(NUM, str(folder))
    engine = make(target, drafts, NUM, random_weights=True, **MODES["eager"])
    assert len(run(engine, PROMPTS[:1], greedy(5))[0].token_ids) == 5
    engine.close()


def test_the_option_names_a_head(target: Path, tmp_path: Path, expected: list[list[int]]) -> None:
    speculative = {
        "method": "eagle3", "model": str(PLAIN.save(tmp_path / "head")),
        "num_speculative_tokens": 2,
    }  # fmt: skip
    engine = Engine(load(config_of(target, {"speculative_config": speculative, **MODES["eager"]})))
    drafting = engine.runner.steps.drafting
    assert drafting is not None and drafting.proposer == DraftHead(2, (1, 1, 0))
    assert tokens(engine, PROMPTS, greedy(15)) == expected
    engine.close()
