"""Turns prompts and sampling parameters into requests. A refused prompt leaves nothing behind.

Importing this module does not import torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from nanovllm.checks import InvalidValue, as_python
from nanovllm.config import EngineConfig
from nanovllm.engine.request import EngineInfo, EngineRequest, MediaPrompt
from nanovllm.lora_request import LoRARequest
from nanovllm.lora_request import checked as lora_request_checked
from nanovllm.media import mm_inputs as media_given
from nanovllm.pooling_params import PoolingInfo, PoolingParams
from nanovllm.prompts import (
    AnyPrompt,
    Prompt,
    PromptRefused,
    PromptTooLong,
    as_prompt,
    check_pooled,
    checked_text,
)
from nanovllm.sampling import INT64_MAX, SamplingParams
from nanovllm.schedule import edit_limits
from nanovllm.schedule.plan import LogitEdits
from nanovllm.schedule.request import MMSpan
from nanovllm.schedule.whole_images import WholeImages
from nanovllm.structured import library
from nanovllm.structured.library import Source
from nanovllm.structured_params import FIELD
from nanovllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from nanovllm.runner.encoders import MMItem

Embeddings = Sequence[tuple[int, "Tensor"]]  # (position, [n, D]) pairs


NO_SAMPLING = SamplingParams(detokenize=False)  # of requests that pool


@dataclass(frozen=True)
class InputProcessor:
    """Checks requests against the limits of a model. All methods raise ValueError."""

    model: str
    tokenizer: Tokenizer | None
    vocab_size: int
    hidden_size: int
    max_model_len: int
    num_deepstack: int = 0
    uses_mrope: bool = False
    max_grammar_bytes: int = 0
    has_towers: bool = True
    has_adapters: bool = False
    whole_images: WholeImages | None = None
    pooling: PoolingInfo | None = None

    @classmethod
    def of(
        cls, config: EngineConfig, tokenizer: Tokenizer | None, info: EngineInfo
    ) -> InputProcessor:
        return cls(
            config.model,
            tokenizer,
            info.vocab_size,
            info.hidden_size,
            info.max_model_len,
            num_deepstack=info.num_deepstack,
            uses_mrope=info.uses_mrope,
            max_grammar_bytes=config.max_grammar_bytes,
            has_towers=info.has_towers,
            has_adapters=config.enable_lora,
            whole_images=info.whole_images,
            pooling=info.pooling,
        )

    def request(
        self,
        prompt: AnyPrompt | Prompt | MediaPrompt,
        params: SamplingParams | PoolingParams,
        *,
        incremental: bool = True,
        embeddings: Embeddings = (),
        positions: np.ndarray | None = None,
        priority: int = 0,
        lora_request: LoRARequest | None = None,
    ) -> EngineRequest:
        """A request for an engine. The arguments are those of `Engine.add_request`.

        Media of a `Prompt` are not checked. `check_forms` checks the rest of `params`.
        """
        if isinstance(params, PoolingParams):
            if lora_request is not None or embeddings or positions is not None:
                raise ValueError("prompts of a model that pools are texts or token ids alone")
            return self.pooling_request(prompt, params, incremental, priority)
        if self.pooling is not None:
            raise ValueError(f"{self.model!r} was loaded to pool: generating needs task='generate'")
        self.check(params)
        adapter = lora_request_checked(lora_request, is_enabled=self.has_adapters)
        given, media, media_contents = self._parts(prompt)
        if isinstance(prompt, MediaPrompt):
            positions = prompt.position_3T
        prompt_ids = self.prompt_ids(given, params)
        num_prompt = len(prompt_ids)
        contents = self.contents(embeddings, num_prompt)
        self.check_positions(positions, num_prompt)
        if self.whole_images is not None:
            max_output = self.max_output(params, num_prompt, positions)
            self.whole_images.check(contents + media_contents, num_prompt, max_output)
        return EngineRequest(
            prompt_ids,
            params,
            incremental,
            checked_priority(priority),
            given.cache_salt,
            params.seed,
            contents=contents + media_contents,
            embeddings={one.key: embeds for one, (_, embeds) in zip(contents, embeddings)},
            media=media,
            positions=positions,
            adapter=adapter,
        )

    def pooling_request(
        self,
        prompt: AnyPrompt | Prompt | MediaPrompt,
        params: PoolingParams,
        incremental: bool = False,
        priority: int = 0,
    ) -> EngineRequest:
        """A request for an engine that pools. Raises ValueError if this one does not."""
        if self.pooling is None:
            raise ValueError(
                f"{self.model!r} was loaded to generate: load it with task='embed', 'classify' or "
                "'score'"
            )
        self.pooling.check(params)
        given, media, contents = self._parts(prompt)
        if given.media and not self.has_towers:
            media_given.refuse(self.model, given.media)
        prompt_ids = self._checked_ids(self._pooled_ids(given, params))
        check_pooled(len(prompt_ids), self.max_model_len)
        positions = prompt.position_3T if isinstance(prompt, MediaPrompt) else None
        self.check_positions(positions, len(prompt_ids))
        return EngineRequest(
            prompt_ids,
            NO_SAMPLING,
            incremental,
            checked_priority(priority),
            contents=contents,
            media=media,
            positions=positions,
            pooling=params,
            second_at=given.second_at,
        )

    def _parts(
        self, prompt: AnyPrompt | Prompt | MediaPrompt
    ) -> tuple[Prompt, dict[str, MMItem], tuple[MMSpan, ...]]:
        """A prompt, the media that are prepared for it, and their places."""
        if not isinstance(prompt, MediaPrompt):
            return as_prompt(prompt), {}, ()
        if prompt.images and not self.has_towers:
            raise ValueError(f"the prompt has images, but {self.model!r} accepts text only")
        media = {content.key: item for content, item in prompt.images}
        given = Prompt(None, prompt.token_ids, prompt.cache_salt)
        return given, media, tuple(content for content, _ in prompt.images)

    def _pooled_ids(self, prompt: Prompt, params: PoolingParams) -> list[int]:
        """The prompt's tokens, truncated as `params` require."""
        limit = params.truncate_prompt_tokens
        if limit is not None and limit > self.max_model_len:
            words = f"truncate_prompt_tokens is {limit}: it must be at most {self.max_model_len}"
            raise InvalidValue("truncate_prompt_tokens", words)
        limit = self.max_model_len if limit == -1 else limit
        if prompt.token_ids is not None:
            prompt_ids = prompt.token_ids if limit is None else prompt.token_ids[-limit:]
        elif self.tokenizer is None:
            raise PromptRefused(f"{self.model!r} has no tokenizer: give token ids instead of text")
        else:
            assert prompt.text is not None
            if not prompt.text:
                raise PromptRefused("the prompt is empty: it must have at least 1 token")
            prompt_ids = self.tokenizer.encode_first(prompt.text, limit)
        if not prompt_ids:
            raise PromptRefused("the prompt is empty: it must have at least 1 token")
        return prompt_ids

    def check_forms(self, params: SamplingParams) -> None:
        """Refuse grammars and edits of logits that an engine would refuse."""
        edits, _ = self.forms(params)
        if edits is not None:
            edit_limits.check(edits, self.vocab_size)

    def prompt_ids(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """The prompt's token ids, truncated as `params` require and checked against the limits."""
        if prompt.token_ids is not None:
            prompt_ids = prompt.token_ids
        elif self.tokenizer is None:
            raise PromptRefused(f"{self.model!r} has no tokenizer: give token ids instead of text")
        else:
            assert prompt.text is not None
            prompt_ids = self.tokenizer.encode(prompt.text)
        longest = self.max_model_len - 1
        if params.truncate_prompt_tokens is not None:
            num = params.truncate_prompt_tokens
            prompt_ids = prompt_ids[-min(num if num > 0 else longest, len(prompt_ids)) :]
        if not prompt_ids:
            raise PromptRefused("the prompt is empty: it must have at least 1 token")
        prompt_ids = self._checked_ids(prompt_ids)
        if len(prompt_ids) > longest:
            raise PromptTooLong(
                f"the prompt has {len(prompt_ids)} tokens: with max_model_len {self.max_model_len} "
                f"at most {longest} fit, since the answer needs at least one"
            )
        return prompt_ids

    def _checked_ids(self, token_ids: list[Any]) -> list[int]:
        # the usual case: no Python loop over the tokens
        are_ints = set(map(type, token_ids)) == {int}
        if are_ints and min(token_ids) >= 0 and max(token_ids) < self.vocab_size:
            return token_ids
        token_ids = list(map(as_python, token_ids))
        for token_id in token_ids:
            if type(token_id) is not int or not 0 <= token_id < self.vocab_size:
                raise PromptRefused(
                    f"token id {token_id!r} is outside the vocabulary: ids are whole numbers, "
                    f"0 … {self.vocab_size - 1}"
                )
        return token_ids

    def text_ids(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt, checked as those of a request, but without media."""
        if prompt.media:
            raise ValueError(f"the prompt has {prompt.media[0].name}: only text is supported here")
        return self.prompt_ids(prompt, SamplingParams())

    def encoded(self, prompt: Prompt) -> Prompt:
        """The prompt with token ids, unless it has media."""
        if prompt.token_ids is not None or prompt.media or self.tokenizer is None:
            return prompt
        assert prompt.text is not None
        return replace(prompt, token_ids=self.tokenizer.encode(prompt.text))

    def max_output(
        self, params: SamplingParams, prompt_len: int, positions: np.ndarray | None = None
    ) -> int:
        """The most tokens of the answer: max_tokens, at most what max_model_len leaves. With
        `positions` [3, T] the answer's go on after the largest one."""
        last = prompt_len if positions is None else max(prompt_len, int(positions.max()) + 1)
        left = max(1, self.max_model_len - last)  # the first token is none of the model's inputs
        return left if params.max_tokens is None else min(params.max_tokens, left)

    def check(self, params: SamplingParams) -> None:
        """Refuse parameters that need a tokenizer if there is none."""
        if self.tokenizer is None:
            for name, given in (("stop", params.stop_strings), ("bad_words", params.bad_words)):
                if given:
                    raise InvalidValue(
                        name,
                        f"{name}={list(given)} needs a tokenizer: {self.model!r} does not have one",
                    )

    def forms(self, params: SamplingParams) -> tuple[LogitEdits | None, Source | None]:
        """The edits of logits and the grammar of `params`. This takes long for large ones."""
        return self.edits(params), self.source(params)

    def source(self, params: SamplingParams) -> Source | None:
        """The grammar of `params`, before it is compiled."""
        if params.structured_outputs is None:
            return None
        if self.tokenizer is None:
            raise InvalidValue(
                FIELD, f"structured_outputs needs a tokenizer: {self.model!r} does not have one"
            )
        library.check_installed()
        return library.source(params.structured_outputs, self.max_grammar_bytes)

    def edits(self, params: SamplingParams) -> LogitEdits | None:
        """The edits of logits that `params` specify."""
        if not params.has_edits:
            return None
        bad = [tokens for word in params.bad_words or () for tokens in self._bad_tokens(word)]
        return LogitEdits(dict(params.logit_bias or {}), params.allowed_token_ids, bad)

    def _bad_tokens(self, word: str) -> list[list[int]]:
        """The tokens of a word at the start of a text, and inside it after a space.

        The second form is left out if the space is a separate token: the first form forbids the
        tokens after it.
        """
        assert self.tokenizer is not None
        checked_text("bad_words", word, "bad_words")
        start, inside = (
            self.tokenizer.encode(space + word.lstrip(), add_special_tokens=False)
            for space in ("", " ")
        )
        if not start:
            words = f"bad_words has {word!r}, which this tokenizer cannot encode"
            raise InvalidValue("bad_words", words)
        return [start, inside] if inside[0] != start[0] and len(inside) == len(start) else [start]

    def check_positions(self, positions: np.ndarray | None, prompt_len: int) -> None:
        """Refuse positions in time, height and width that do not fit the prompt or the model."""
        if positions is None:
            return
        if not self.uses_mrope:
            raise ValueError(f"positions are given, but {self.model!r} has one for each token")
        if positions.shape != (3, prompt_len) or positions.dtype != np.int64:
            raise ValueError(
                f"positions have shape {list(positions.shape)} and dtype {positions.dtype}: they "
                f"must be [3, {prompt_len}] and int64"
            )
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= self.max_model_len:
            raise ValueError(
                f"positions are {low} … {high}: they must be 0 … {self.max_model_len - 1}"
            )

    def contents(self, embeddings: Embeddings, prompt_len: int) -> tuple[MMSpan, ...]:
        """The position, length and digest of each of the given embeddings."""
        contents: list[MMSpan] = []
        if embeddings:
            from torch import uint8
        for start, embeds in embeddings:
            shape = list(embeds.shape)
            widths = [self.hidden_size * (1 + num) for num in range(self.num_deepstack + 1)]
            if len(shape) != 2 or shape[1] not in widths or not shape[0]:
                allowed = " or ".join(f"[n, {width}]" for width in widths)
                raise ValueError(f"embeddings have shape {shape}: it must be {allowed}")
            if start < 0 or start + shape[0] > prompt_len:
                raise ValueError(
                    f"{shape[0]} embeddings from position {start} on do not fit a prompt of "
                    f"{prompt_len} tokens"
                )
            values = embeds.detach().cpu().contiguous().view(uint8).numpy()
            digest = hashlib.sha256(f"{embeds.dtype} {shape}".encode() + values.tobytes()).digest()
            contents.append(MMSpan(start, shape[0], digest))
        ends = sorted((one.start, one.start + one.num) for one in contents)
        if any(start < end for (_, end), (start, _) in pairwise(ends)):
            raise ValueError(f"embeddings overlap: they lie at positions {ends}")
        return tuple(contents)


def drawn_seed(engine_seed: int, request_id: int) -> int:
    """The seed of a request that has none."""
    digest = hashlib.sha256(f"{engine_seed} {request_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def checked_priority(priority: object) -> int:
    value = as_python(priority)
    if type(value) is not int or not -INT64_MAX <= value <= INT64_MAX:
        words = f"priority is {priority!r}: it must be a whole number of 64 bits"
        raise InvalidValue("priority", words)
    return value
