"""Prompts that the model makes up end where the user's turn ends, and each is there once."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

# scripts are run as files, and import each other as such
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from draft import collect
from draft import own_prompts as module
from draft.own_prompts import Made, Turn, end_of, own_prompts, sampled, turn_of

from nanovllm import LLM

BEGIN = "<|im_start|>user\n"  # here the model says "Hello! How can I help you?", or more of it


@pytest.fixture(scope="module")
def loaded() -> Iterator[LLM]:
    with closing(LLM("tiny-qwen3", enforce_eager=True, max_num_seqs=8, device="cpu")) as llm:
        yield llm


@pytest.fixture
def llm(loaded: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """Tests change its chat template."""
    tokenizer = loaded.get_tokenizer()
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template)
    return loaded


def set_template(llm: LLM, before: str, after: str) -> None:
    llm.get_tokenizer().chat_template = f"{before}{{{{ messages[0].content }}}}{after}"


def test_the_model_makes_up_prompts_where_a_user_speaks(llm: LLM) -> None:
    made = own_prompts(llm, 2, seed=1)
    assert made == own_prompts(llm, 2, seed=1)
    (chat,) = collect.as_chats(llm, made[:1])
    assert made[0] in llm.get_tokenizer().decode(chat, skip_special_tokens=False)
    assert len(made) == 2 and all(made)
    llm.get_tokenizer().chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        own_prompts(llm, 1, seed=0)


def test_prompts_end_where_the_users_turn_ends_in_plain_text(llm: LLM) -> None:
    set_template(llm, BEGIN, " can I\n")
    made = sampled(llm, turn_of(llm), range(8))
    assert all(one.is_whole and one.text and "can I" not in one.text for one in made)


def test_a_prompt_begins_with_the_space_before_its_first_word(llm: LLM) -> None:
    set_template(llm, "[INST] ", " [/INST]")
    begin = llm.get_tokenizer().encode("[INST]", add_special_tokens=False)
    assert turn_of(llm) == (begin, None, "[/INST]")


@pytest.mark.parametrize(
    ("after", "end"),
    [
        (" [/INST]", (None, "[/INST]")),
        ("[/INST]</s>", (None, "[/INST]")),
        ("\n\n### Response:\n", (None, "### Response:")),
        ("<|end|><|start|>model\n", (7, None)),
        ("\n<|end|>\n", (7, None)),
        ("</s>ASSISTANT: ", (8, None)),
        ("\n", (None, None)),
    ],
)
def test_the_end_of_a_turn_is_a_token_or_a_line(
    after: str, end: tuple[int | None, str | None]
) -> None:
    assert end_of(after, {"<|end": 5, "<|end|>": 7, "</s>": 8, "<|start|>": 9}) == end


@pytest.mark.parametrize(
    ("before", "after"),
    [("", "<|im_end|>"), (" ", "\n"), (BEGIN + "{% set messages = [{'content': 'x'}] %}", "")],
)
def test_a_template_without_a_users_turn_is_refused(llm: LLM, before: str, after: str) -> None:
    set_template(llm, before, after)
    with pytest.raises(ValueError, match="no begin of a user's turn is found in its chat template"):
        own_prompts(llm, 2, seed=0)


def test_a_prompt_is_made_up_once(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="train_draft"):
        made = own_prompts(llm, 20, seed=1)
    assert 1 < len(made) == len(set(made)) < 20
    assert f"the model made up {len(made)} different prompts of 20" in caplog.text
    assert not set(made[:1]) & set(own_prompts(llm, 20, seed=1, others=made[:1]))


def test_the_model_is_asked_again_for_prompts_that_it_repeats(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that end come first, whenever they were made."""

    def sampled(_: LLM, turn: Turn, seeds: list[int]) -> list[Made]:
        return [Made(str(seed // 2), is_whole=seed > 5) for seed in seeds]

    monkeypatch.setattr(module, "sampled", sampled)
    assert own_prompts(llm, 6, seed=0) == ["3", "4", "5", "0", "1", "2"]


def test_empty_prompts_are_left_out(llm: LLM) -> None:
    set_template(llm, BEGIN, "Hello!")
    assert {one.text for one in sampled(llm, turn_of(llm), range(4))} == {""}
    assert own_prompts(llm, 4, seed=0) == []
