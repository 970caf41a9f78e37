"""Prompts that a model makes up when it goes on where a user's turn of a chat begins.

They are about what the model was trained on. Source: Xu et al. 2024,
https://arxiv.org/abs/2406.08464.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import count, islice
from typing import Any, NamedTuple

from draft.collect import as_chats, has_template

from nanovllm import LLM, CompletionOutput, SamplingParams

logger = logging.getLogger("train_draft")
PROMPT_TOKENS = 96  # of a prompt, at most
ROUNDS = 4  # of prompts in place of repeated ones
PLACE = "\u241f"  # in place of a prompt, to find where it begins in a chat


class Turn(NamedTuple):
    """What the chat template has around a user's text. After it comes a token or, in a template
    without one, a string. If there is neither, only the tokens that end answers end the text."""

    begin: list[int]
    end_token: int | None
    end_string: str | None


class Made(NamedTuple):
    """is_whole: it has reached the end of the user's turn."""

    text: str
    is_whole: bool


def own_prompts(llm: LLM, num: int, seed: int, others: Iterable[str] = ()) -> list[str]:
    """Up to `num` prompts, each once and none of `others`; first those that end. The model is
    asked again for those that it repeats, but not for ever: small models repeat themselves. Raises
    ValueError without a chat template that shows where a user's turn begins.
    """
    if not has_template(llm):
        raise ValueError("the model has no chat template, so it cannot make up prompts")
    turn, seeds, made = turn_of(llm), count(seed), dict[str, bool]()
    unwanted = {"", *others}
    for _ in range(ROUNDS):
        missing = num - len(made)
        if missing <= 0:
            break
        for one in sampled(llm, turn, list(islice(seeds, missing + missing // 2))):
            if one.text not in unwanted:
                made.setdefault(one.text, one.is_whole)
    found = sorted(made, key=lambda text: not made[text])[:num]
    if len(found) < num:
        logger.warning("the model made up %d different prompts of %d", len(found), num)
    return found


def turn_of(llm: LLM) -> Turn:
    """The user's turn in the model's chat template. Raises ValueError if it is not found."""
    tokenizer: Any = llm.get_tokenizer()
    (chat,) = as_chats(llm, [PLACE])
    text = tokenizer.decode(chat, skip_special_tokens=False)
    before, place, after = text.partition(PLACE)
    if not place or not before.strip():
        raise ValueError(
            "the model cannot make up prompts: no begin of a user's turn is found in its chat "
            f"template, which makes {text!r} of {PLACE!r}"
        )
    # the model writes the space before a word itself: it is part of the word's token
    begin = tokenizer.encode(before.rstrip(" "), add_special_tokens=False)
    return Turn(begin, *end_of(after, tokenizer.get_added_vocab()))


def end_of(after: str, ids: dict[str, int]) -> tuple[int | None, str | None]:
    """The token of `ids` at the begin of the text after the user's, else its first line."""
    after = after.lstrip()
    first = min(
        (token for token in ids if token in after),
        key=lambda token: (after.index(token), -len(token)),
        default="",
    )
    if first and after.startswith(first):
        return ids[first], None
    line = (after.partition(first)[0] if first else after).partition("\n")[0].rstrip()
    return None, line or None


def sampled(llm: LLM, turn: Turn, seeds: Sequence[int]) -> list[Made]:
    """What the model says in a user's turn with each of the seeds."""
    params = [
        SamplingParams(
            temperature=1.0, top_p=0.95, max_tokens=PROMPT_TOKENS, seed=seed, stop=turn.end_string,
            stop_token_ids=[] if turn.end_token is None else [turn.end_token],
            detokenize=turn.end_string is not None,
        )
        for seed in seeds
    ]  # fmt: skip
    begin: Any = {"prompt_token_ids": turn.begin}
    tokenizer, found = llm.get_tokenizer(), llm.generate([begin] * len(params), params)
    return [made_of(one.outputs[0], turn, tokenizer) for one in found]


def made_of(output: CompletionOutput, turn: Turn, tokenizer: Any) -> Made:
    is_whole, text = output.finish_reason == "stop", output.text
    if turn.end_string is None:  # at once, which is quicker than token by token
        ids = output.token_ids[:-1] if is_whole else output.token_ids
        text = tokenizer.decode(ids, skip_special_tokens=True)
    return Made(text.strip(), is_whole)
