"""Training of the embedded model that sees: prompts, positions, attention, going on."""

from __future__ import annotations

import copy
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

# scripts are run as files, and import each other as such
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import train_tiny
from tiny import vision_model
from tiny.card import Run
from tiny.picture_batches import (
    IGNORED,
    Encoder,
    Level,
    Plan,
    Turn,
    batches,
    draw_batch,
    encode,
    make_conversation,
)
from tiny.picture_card import card
from tiny.picture_scoring import score
from tiny.picture_tasks import KINDS, held_out, text_task
from tiny.picture_training import Trainer, train
from tiny.pictures import GRIDS, draw
from tiny.vision_model import IMAGE, SETTINGS, build_model, build_tokenizer, equal_sizes

from nanovllm.hub import SEEING, resolve
from nanovllm.media import mm_inputs, settings
from nanovllm.media.options import MediaOptions
from nanovllm.media.placeholders import Placeholders
from nanovllm.media.prepare import Preparer

PLAN = Plan(steps=4, batch=2, turns=3, seed=0, learning_rate=2e-3)
LEVEL = Level(describes=0.5)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def whole(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
    torch.manual_seed(0)
    return build_model(tokenizer).eval()


@pytest.fixture
def small(whole: Qwen3VLForConditionalGeneration) -> Qwen3VLForConditionalGeneration:
    """The same architecture, narrower and with fewer layers."""
    fields = whole.config.to_dict()
    fields["text_config"] |= {
        "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4,
    }  # fmt: skip
    fields["vision_config"] |= {"hidden_size": 32, "intermediate_size": 24, "out_hidden_size": 32}
    torch.manual_seed(0)
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(**fields))


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_conversation_is_the_prompt_that_the_engine_makes_and_its_answers(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, grid: tuple[int, int], text_first: bool
) -> None:
    turns = make_conversation(random.Random(1), grid, LEVEL, 3)
    turns[0] = turns[0]._replace(text_first=text_first)
    batch = encode(Encoder(tokenizer), [turns])
    picture = turns[0].picture
    assert picture is not None
    messages: list[dict[str, Any]] = []
    for i, turn in enumerate(turns):
        parts = [{"type": "image"}, {"type": "text", "text": turn.task.question}]
        content = turn.task.question if i else parts[::-1] if text_first else parts
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": turn.task.answer})
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    found = settings.VisionSettings(
        settings.image_settings(SETTINGS), settings.video_settings(SETTINGS, over_time=True), True
    )
    image = Image.fromarray(draw([picture])[0])
    preparer = Preparer(found, MediaOptions())
    (item,) = preparer.submit(mm_inputs.from_data({"image": image})).result()
    expanded = Placeholders(tokenizer, True).of_text(text, [item])
    assert batch.input_BS[0].tolist() == expanded.token_ids
    assert batch.patch_PD is not None and batch.grid_B3 is not None
    assert torch.equal(batch.patch_PD, item.values)
    assert tuple(batch.grid_B3[0].tolist()) == tuple(item.grid)
    labels = batch.label_BS[0]
    answers = "".join(f"{turn.task.answer}<|im_end|>" for turn in turns)
    assert tokenizer.decode(labels[labels != IGNORED]) == answers
    is_answer = labels != IGNORED
    assert torch.equal(labels[is_answer], batch.input_BS[0][is_answer])


def test_positions_are_those_of_transformers(
    tokenizer: PreTrainedTokenizerFast, whole: Qwen3VLForConditionalGeneration
) -> None:
    rng = random.Random(2)
    rows = [make_conversation(rng, (2, 3), LEVEL, num) for num in (1, 3, 2)]
    rows.append([*rows[0], *make_conversation(rng, (2, 3), LEVEL, 2)])  # two pictures
    rows.append([Turn(text_task(rng))])
    batch = encode(Encoder(tokenizer), rows)
    kinds = (batch.input_BS == tokenizer.get_vocab()[IMAGE]).int()
    mask = torch.zeros_like(batch.input_BS)
    for i, row in enumerate(rows):
        mask[i, : encode(Encoder(tokenizer), [row]).input_BS.shape[1]] = 1
    expected, _ = whole.model.get_rope_index(
        batch.input_BS, mm_token_type_ids=kinds, image_grid_thw=batch.grid_B3, attention_mask=mask
    )
    seen = mask.bool()
    torch.testing.assert_close(batch.position_3BS[:, seen], expected[:, seen])
    assert (batch.position_3BS[1] != batch.position_3BS[2]).any()  # rows are not columns


def test_attention_over_equal_sizes_is_that_of_transformers(
    tokenizer: PreTrainedTokenizerFast, whole: Qwen3VLForConditionalGeneration
) -> None:
    rows = [make_conversation(random.Random(seed), (3, 2), LEVEL, 1) for seed in range(3)]
    batch = encode(Encoder(tokenizer), rows)
    faster = copy.deepcopy(whole)
    equal_sizes(faster)
    results = []
    for model in (whole, faster):
        found = model.model.visual(batch.patch_PD, grid_thw=batch.grid_B3)
        outputs = [found.pooler_output, *found.deepstack_features]
        weight = model.model.visual.blocks[0].attn.qkv.weight
        (grad,) = torch.autograd.grad(sum(one.square().sum() for one in outputs), [weight])
        results.append([*outputs, grad])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_training_reaches_the_tower_deepstack_and_text(
    tokenizer: PreTrainedTokenizerFast, small: Qwen3VLForConditionalGeneration
) -> None:
    before = {name: param.clone() for name, param in small.named_parameters()}
    trainer = Trainer(small, PLAN, amp=False)
    for _ in range(2):
        trainer.update(draw_batch(PLAN, 3, Encoder(tokenizer)))
    unchanged = {
        name for name, param in small.named_parameters() if torch.equal(param, before[name])
    }
    assert not unchanged


def test_a_run_that_goes_on_ends_as_one_without_a_break(
    tokenizer: PreTrainedTokenizerFast, small: Qwen3VLForConditionalGeneration, tmp_path: Path
) -> None:
    encoder, path = Encoder(tokenizer), tmp_path / "state.pt"
    straight, broken, resumed = (Trainer(copy.deepcopy(small), PLAN, amp=False) for _ in range(3))
    train(straight, batches(PLAN, encoder, 0, 1), None, PLAN.steps)
    train(broken, batches(PLAN, encoder, 0, 1), path, 2)
    resumed.resume(path)
    assert resumed.step == 2
    train(resumed, batches(PLAN, encoder, 2, 1), path, PLAN.steps)
    for (name, param), other in zip(straight.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(param, other), name


def test_a_run_does_not_go_on_with_another_plan(
    small: Qwen3VLForConditionalGeneration, tmp_path: Path
) -> None:
    trainer = Trainer(small, PLAN, amp=False)
    with pytest.raises(ValueError, match="there is no file"):
        trainer.resume(tmp_path / "state.pt")
    trainer.save(tmp_path / "state.pt")
    other = Plan(**{**vars(PLAN), "batch": 3})
    with pytest.raises(ValueError, match=r"state\.pt is of step 0 .*batch=3"):
        Trainer(small, other, amp=False).resume(tmp_path / "state.pt")


def test_a_step_draws_the_same_data_again(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer)
    for step in (0, 3, 19):
        first, again = (draw_batch(PLAN, step, encoder) for _ in range(2))
        assert torch.equal(first.input_BS, again.input_BS)
        assert (first.patch_PD is None) == (step == 19)
        if first.patch_PD is not None and again.patch_PD is not None:
            assert torch.equal(first.patch_PD, again.patch_PD)


class Knowing:
    """A model that knows what comes next, but not in questions that begin as given."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: PreTrainedTokenizerFast, unknown: tuple[str, ...]) -> None:
        self.tokenizer, self.unknown = tokenizer, unknown

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        next_BS = input_ids.roll(-1, 1)
        logits = torch.nn.functional.one_hot(next_BS, vision_model.VOCAB_SIZE).float()
        for row, text in zip(logits, self.tokenizer.batch_decode(input_ids)):
            if any(one in text for one in self.unknown):
                row[:] = row.roll(1, -1)
        return SimpleNamespace(logits=logits)


def test_worker_processes_draw_the_same_data(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer)
    alone, shared = (list(batches(PLAN, encoder, 1, workers)) for workers in (1, 2))
    assert len(alone) == len(shared) == PLAN.steps - 1
    for one, other in zip(alone, shared):
        for mine, theirs in zip(one, other):
            assert mine is not None and theirs is not None
            assert torch.equal(mine, theirs)


def test_a_score_counts_answers_whose_tokens_are_all_the_likeliest(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model: Any = Knowing(tokenizer, ("How many", "Count the"))
    tasks = list(held_out(90, 0))
    accuracies, wrong = score(model, Encoder(tokenizer), tasks, batch_size=7)
    assert accuracies == {kind: float(kind != "count") for kind in KINDS}
    assert len(wrong) == 10


def test_saved_files_are_read_by_transformers_and_by_the_engine(
    tokenizer: PreTrainedTokenizerFast, small: Qwen3VLForConditionalGeneration, tmp_path: Path
) -> None:
    vision_model.save(small, tokenizer, tmp_path)
    read = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path)
    assert read.dtype == torch.bfloat16
    for (name, param), other in zip(small.named_parameters(), read.parameters()):
        assert torch.equal(param.bfloat16(), other), name
    found = settings.load(tmp_path)
    assert found is not None
    assert found.image == vision_model.PATCH_SETTINGS
    assert (found.video.patch_size, found.with_times) == (vision_model.PATCH, True)


def test_the_shipped_card_is_what_the_script_writes() -> None:
    folder = resolve(SEEING)
    text = (folder / "README.md").read_text()

    def find(pattern: str) -> str:
        found = re.search(pattern, text)
        assert found is not None, pattern
        return found[1].replace(",", "")

    plan = Plan(
        steps=int(find(r"--steps (\d+)")),
        batch=int(find(r"--batch (\d+)")),
        turns=int(find(r"pictures with\s+(\d+)\s+questions")),
        seed=int(find(r"--seed (\d+)")),
        learning_rate=float(find(r"peak learning rate of\s+([\d.]+),")),
    )
    stop = re.search(r"--stop (\d+)", text)
    run = Run(
        steps=plan.steps if stop is None else int(stop[1]),
        examples=0,
        batch_tokens=0,
        seed=plan.seed,
        seconds=60 * float(find(r"took\s+(\d+)\s+minutes")),
        device=find(r"on one (.+) with torch"),
        torch_version=find(r"with torch (\S+)\."),
        num_eval=int(find(r"weights on (\d+) held-out")),
        accuracies={
            kind: float(share) / 100
            for kind, share in re.findall(r"^\| (\w+) \| ([\d.]+)% \|$", text, re.M)
        },
        total=float(find(r"\*\*all\*\* \| \*\*([\d.]+)%")) / 100,
    )
    plans = re.search(r"other plans\. Steps: ([\d, ]+)\.", text)
    planned = (
        [plan.steps]
        if plans is None
        else [int(one.replace(",", "")) for one in plans[1].split(", ")]
    )
    assert card(folder, run, plan, float(find(r"ended at ([\d.]+)\.")), planned) == text


@pytest.mark.parametrize(
    ("arch", "option"),
    [
        ("qwen3-vl", ["--examples", "9"]),
        ("qwen3-vl", ["--minutes", "9"]),
        ("qwen3", ["--batch", "9"]),
        ("mixtral", ["--resume"]),
    ],
)
def test_options_of_other_architectures_are_refused(
    arch: str,
    option: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", "--out", "x", "--arch", arch, *option])
    with pytest.raises(SystemExit):
        train_tiny.parse_args()
    assert f"{option[0]} is not an option of {arch}" in capsys.readouterr().err
