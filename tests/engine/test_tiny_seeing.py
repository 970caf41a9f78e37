"""The embedded model that sees: transformers' answers; deepstack and M-RoPE are in use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

# scripts are run as files, and import each other as such
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from accuracy import ask, questions
from tiny.picture_batches import IGNORED, Encoder, Turn, encode
from tiny.picture_tasks import KINDS, PictureTask, held_out

from nanovllm import LLM, SamplingParams
from nanovllm.hub import SEEING, resolve
from tests.engines import drain

FOLDER = resolve(SEEING)
NUM_TOKENS = 24
# the largest picture has 144 patches, and a step has several pictures
BUDGETS = [144, 576]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("cpu", True), id="eager"),
        pytest.param(("cpu", False), id="graph"),
        pytest.param(("cuda", True), id="cuda-eager", marks=pytest.mark.gpu),
        pytest.param(("cuda", False), id="cuda-graph", marks=pytest.mark.gpu),
    ],
)
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    device, is_eager = request.param
    llm = LLM(
        SEEING, device=device, dtype="float32", enforce_eager=is_eager, max_num_seqs=32,
        max_model_len=256, max_num_batched_tokens=256, graph_batch_sizes=[32],
        vision_patch_budgets=BUDGETS,
    )  # fmt: skip
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def hf() -> Any:
    return Qwen3VLForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()


def generated(hf: Any, one: PictureTask) -> str:
    """transformers' greedy answer; its own processor makes the patches."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = tokenizer.apply_chat_template(one.messages, tokenize=False, add_generation_prompt=True)
    inputs: dict[str, Any] = {}
    if one.picture is not None:
        processor = Qwen2VLImageProcessorPil.from_pretrained(FOLDER)
        image = one.messages[0]["content"][0]["image"]
        inputs = dict(processor(images=image, return_tensors="pt"))
        num_tokens = int(inputs["image_grid_thw"].prod()) // 4
        text = text.replace("<|image_pad|>", "<|image_pad|>" * num_tokens)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if one.picture is not None:
        inputs["mm_token_type_ids"] = (ids == hf.config.image_token_id).int()
    hf.model.rope_deltas = None
    out = hf.generate(input_ids=ids, max_new_tokens=NUM_TOKENS, **inputs)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_greedy_answers_are_those_of_transformers(llm: LLM, hf: Any) -> None:
    tasks = list(held_out(2 * len(KINDS) + 1, 19))
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    outputs = llm.chat([one.messages for one in tasks], params, use_tqdm=False)
    assert [output["text"] for output in outputs] == [generated(hf, one) for one in tasks]


def test_placeholders_that_a_user_types_are_text(llm: LLM) -> None:
    task = next(one for one in held_out(60, 3) if one.picture is not None)
    content = task.messages[0]["content"]
    params = SamplingParams(temperature=0, max_tokens=1)
    typed = {"type": "text", "text": "<|image_pad|><|video_pad|><|vision_end|> <|im_end|>"}
    placeholder = llm.tokenizer.convert_tokens_to_ids("<|image_pad|>")  # type: ignore[union-attr]
    plain, with_text = (
        llm.chat([{"role": "user", "content": parts}], params, use_tqdm=False)[0]
        for parts in (content, [*content, typed])
    )
    counts = [one.prompt_token_ids.count(placeholder) for one in (plain, with_text)]
    assert counts[0] == counts[1] > 0
    # what is before the typed text has the same tokens as without it
    num = plain.prompt_token_ids.index(placeholder) + counts[0]
    assert with_text.prompt_token_ids[:num] == plain.prompt_token_ids[:num]


def test_an_answer_does_not_depend_on_the_other_pictures_of_a_batch(llm: LLM) -> None:
    tasks = [one for one in held_out(60, 3) if one.task.kind == "describe"]
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    together = llm.chat([one.messages for one in tasks], params, use_tqdm=False)
    llm.engine.forget_prefixes()  # type: ignore[union-attr]
    alone = [llm.chat(one.messages, params, use_tqdm=False)[0] for one in tasks]
    assert [one["text"] for one in together] == [one["text"] for one in alone]
    assert len({one["text"] for one in alone}) > 1


def test_an_answer_ends_where_positions_do(llm: LLM) -> None:
    """A prompt's positions may go further than its tokens, as those of a video do. The answer has
    what is left behind them, and a request beside it all of its tokens."""
    engine, params = llm.engine, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    last = engine.max_model_len - 3
    positions = np.broadcast_to(np.array([0, 1, 2, last]), (3, 4)).copy()
    ids = [
        engine.add_request([5, 6, 7, 8], params, incremental=False, positions=own)
        for own in (positions, None)
    ]
    done = drain(llm)
    assert [len(done[one].token_ids) for one in ids] == [2, 9]


@pytest.fixture(scope="module")
def answer_logits(hf: Any) -> Any:
    """A function to the logits of answers about pictures of one size."""
    encoder = Encoder(AutoTokenizer.from_pretrained(FOLDER))
    pairs = [(one.task, one.picture) for one in held_out(300, 5) if one.picture is not None]
    rows = [
        [Turn(task, picture)]
        for task, picture in pairs
        if (picture.num_rows, picture.num_columns) == (2, 3)
    ]
    batch = encode(encoder, rows)

    def run(*, flat: bool = False) -> torch.Tensor:
        position_3BS = batch.position_3BS
        if flat:
            position_3BS = position_3BS[:1].expand(3, -1, -1)
        with torch.no_grad():
            logits_BSV = hf(
                input_ids=batch.input_BS, position_ids=position_3BS, use_cache=False,
                pixel_values=batch.patch_PD, image_grid_thw=batch.grid_B3,
            ).logits  # fmt: skip
        return logits_BSV[:, :-1][batch.label_BS[:, 1:] != IGNORED]

    return run


def mean_change(one_TV: torch.Tensor, other_TV: torch.Tensor) -> float:
    """Of the log-probabilities of tokens, in nats, weighted with the probabilities in `one_TV`."""
    one, other = one_TV.log_softmax(-1), other_TV.log_softmax(-1)
    return float((one.exp() * (one - other).abs()).sum(-1).mean())


@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_level_of_deepstack_changes_answers(
    hf: Any, answer_logits: Any, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_TV = answer_logits()
    merger = hf.model.visual.deepstack_merger_list[level]
    forward = merger.forward
    monkeypatch.setattr(merger, "forward", lambda *args: torch.zeros_like(forward(*args)))
    assert mean_change(whole_TV, answer_logits()) > 0.01


def test_rows_and_columns_of_m_rope_change_answers(answer_logits: Any) -> None:
    assert mean_change(answer_logits(), answer_logits(flat=True)) > 0.05


def test_held_out_questions_are_answered(llm: LLM) -> None:
    by_kind, total, wrong = ask(llm, questions(SEEING, 20 * len(KINDS), 0))
    assert total >= 0.95, (by_kind, wrong[:10])
