"""Expands placeholders of prompts: from one per image, video or clip to one per token."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from nanovllm.media.mm_inputs import AUDIO, IMAGE, KINDS, VIDEO
from nanovllm.media.prepare import Prepared

Span = tuple[int, int]  # (first token, number of tokens)


class TextEncoder(Protocol):
    """The required interface of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class Expanded:
    """A prompt with all placeholder tokens.

    spans: for each item, in the order of the items, its runs of placeholder tokens. An image or
    clip has one run; a video has one, or one for each patch over time if there is text between
    them.
    """

    token_ids: list[int]
    spans: list[tuple[Span, ...]]


@dataclass(frozen=True)
class Placeholders:
    """The special tokens of a checkpoint. The names are those of Qwen's vision models.

    with_times: the prompt has the time before each patch of a video, and the two border tokens
    around it (Qwen3-VL). Tokens of kinds that a model does not take are empty. image_text: what
    replaces an image's placeholder before tokenization, with one run_token, which stands for the
    image's tokens (Gemma-3); empty where the placeholder itself does.
    """

    tokenizer: TextEncoder
    with_times: bool
    image_token: str = "<|image_pad|>"
    video_token: str = "<|video_pad|>"
    start_token: str = "<|vision_start|>"
    end_token: str = "<|vision_end|>"
    audio_token: str = ""
    run_token: str = ""
    image_text: str = ""

    def __post_init__(self) -> None:
        assert self._kind_of_id

    @cached_property
    def _kind_of(self) -> dict[str, str]:
        kinds = {self.image_token: IMAGE, self.video_token: VIDEO, self.audio_token: AUDIO}
        return {token: kind for token, kind in kinds.items() if token}

    @cached_property
    def _kind_of_id(self) -> dict[int, str]:
        return {self._id_of(token): kind for token, kind in self._kind_of.items()}

    @cached_property
    def _run_ids(self) -> set[int]:
        """The tokens that stand for a run, after tokenization."""
        return {self._id_of(self.run_token)} if self.run_token else set(self._kind_of_id)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._kind_of)))

    def check(
        self, text: str | None, token_ids: Sequence[int] | None, kinds: Sequence[str]
    ) -> None:
        """Raises ValueError for a prompt with more or fewer placeholders than items of a kind."""
        if token_ids is None:
            found = [self._kind_of[one] for one in self._pattern.findall(text or "")]
        else:
            found = [self._kind_of_id[one] for one in token_ids if one in self._kind_of_id]
        _order(found, kinds)

    def of_text(
        self, text: str, items: Sequence[Prepared], *, add_special_tokens: bool = True
    ) -> Expanded:
        """The tokens of a text with one placeholder for each item. Raises ValueError if there are
        more or fewer placeholders than items of a kind.

        Each patch of a video over time keeps one placeholder in the text, which is expanded after
        tokenization: the tokenizer gets no long runs.
        """
        kinds = [self._kind_of[one] for one in self._pattern.findall(text)]
        order = _order(kinds, [one.kind for one in items])
        waiting = iter(order)
        short = self._pattern.sub(lambda one: self._short(one[0], items[next(waiting)]), text)
        ids = self.tokenizer.encode(short, add_special_tokens=add_special_tokens)
        return self._expanded(ids, order, items)

    def of_ids(self, token_ids: Sequence[int], items: Sequence[Prepared]) -> Expanded:
        """The same for a prompt of token ids."""
        kind_of = self._kind_of_id
        kinds = [kind_of[one] for one in token_ids if one in kind_of]
        order = _order(kinds, [one.kind for one in items])
        waiting = iter(order)
        ids: list[int] = []
        for one in token_ids:
            if one not in kind_of:
                ids.append(one)
                continue
            token = next(name for name, kind in self._kind_of.items() if kind == kind_of[one])
            short = self._short(token, items[next(waiting)])
            ids += self.tokenizer.encode(short, add_special_tokens=False)
        return self._expanded(ids, order, items)

    def _short(self, token: str, item: Prepared) -> str:
        """The text of an item with one placeholder for each run of tokens."""
        if item.kind == IMAGE and self.image_text:
            return self.image_text
        if item.kind != VIDEO or not self.with_times:
            return token
        one = self.start_token + token + self.end_token
        return "".join(f"<{time:.1f} seconds>{one}" for time in item.times)

    def _expanded(
        self, ids: Sequence[int], order: Sequence[int], items: Sequence[Prepared]
    ) -> Expanded:
        """Replaces each placeholder by the tokens of its run."""
        lengths = [(i, num) for i in order for num in self._runs(items[i])]
        num_given = sum(one in self._run_ids for one in ids)
        if num_given != len(lengths):
            raise ValueError(
                f"the prompt has the token {self.run_token!r}, which is made of images: give "
                f"{self.image_token!r} for each image"
            )
        runs = iter(lengths)
        out: list[int] = []
        spans: list[list[Span]] = [[] for _ in items]
        for one in ids:
            if one not in self._run_ids:
                out.append(one)
                continue
            i, num = next(runs)
            spans[i].append((len(out), num))
            out += [one] * num
        return Expanded(out, list(map(tuple, spans)))

    def _runs(self, item: Prepared) -> list[int]:
        num_runs = len(item.times) if item.kind == VIDEO and self.with_times else 1
        return [item.num_tokens // num_runs] * num_runs

    def _id_of(self, token: str) -> int:
        ids = self.tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"the tokenizer has no token {token!r}: it does not fit the processor")
        return ids[0]


def _order(kinds: Sequence[str], of_items: Sequence[str]) -> list[int]:
    """The index of the item for each placeholder, by kind. Raises ValueError if there are more or
    fewer."""
    waiting: dict[str, Iterator[int]] = {}
    for kind in KINDS:
        indices = [i for i, one in enumerate(of_items) if one == kind]
        num = kinds.count(kind)
        if num != len(indices):
            raise ValueError(
                f"the prompt has {num} placeholders for {kind}s, but {len(indices)} {kind}s "
                "were given"
            )
        waiting[kind] = iter(indices)
    return [next(waiting[kind]) for kind in kinds]
