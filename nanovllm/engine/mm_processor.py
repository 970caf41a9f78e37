"""Turns prompts with images, videos and audio into token ids, positions and patches, in threads."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from nanovllm import hub
from nanovllm.checks import InvalidValue, WorkFailed
from nanovllm.config import EngineConfig
from nanovllm.engine.input_processor import Embeddings
from nanovllm.engine.mm_admission import MediaGate
from nanovllm.engine.request import MediaPrompt
from nanovllm.media import mm_inputs, settings
from nanovllm.media.options import MediaOptions
from nanovllm.media.placeholders import Expanded, Placeholders, Span
from nanovllm.media.prepare import MediaPreparation, Prepared, Preparer
from nanovllm.media.settings import VisionSettings
from nanovllm.models.vision import positions
from nanovllm.models.vision.vision_encoder import TowerConfig
from nanovllm.pooling_params import PoolingParams
from nanovllm.programs import DoesNotStart
from nanovllm.prompts import Prompt
from nanovllm.runner.encoders import MMItem
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.request import MMSpan
from nanovllm.tokenizer import Tokenizer


class Scale(NamedTuple):
    """The sizes from which the positions of a prompt follow; fields as in `TowerConfig`. Without
    `uses_mrope` they are those in the sequence."""

    merge_size: int
    tokens_per_second: float
    videos_span_time: bool
    uses_mrope: bool = True

    @classmethod
    def of(cls, tower: TowerConfig, *, uses_mrope: bool = True) -> Scale:
        return cls(tower.merge_size, tower.tokens_per_second, tower.videos_span_time, uses_mrope)


class MediaPrompts:
    """Makes the prompts of one checkpoint. Several threads can use it.

    scale: None for a text model.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer | None,
        scale: Scale | None,
        settings: VisionSettings | None,
        options: MediaOptions,
    ) -> None:
        self._model, self._scale, self._options = model, scale, options
        self._preparer: Preparer | None = None
        self._placeholders: Placeholders | None = None
        if tokenizer is not None and settings is not None:
            self._preparer = Preparer(settings, options)
            self._placeholders = Placeholders(tokenizer, settings.with_times, **settings.tokens)

    @classmethod
    def of(
        cls,
        config: EngineConfig,
        tokenizer: Tokenizer | None,
        scale: Sequence[Any],
        options: MediaOptions,
    ) -> MediaPrompts:
        """Those of an engine elsewhere. scale: the fields of `Scale`. Raises ValueError for a
        checkpoint whose processor is not supported."""
        folder = hub.resolve(config.model, weights=False, revision=config.revision)
        return cls(config.model, tokenizer, Scale(*scale), settings.load(folder), options)

    def check_media(self, media: Sequence[mm_inputs.MMInput]) -> None:
        """Raises ValueError for media of a text model, and for too many."""
        if media and self._scale is None:
            mm_inputs.refuse(self._model, media)
        if media and self._preparer is None:
            raise ValueError(
                f"the prompt has {media[0].name}, but {self._model!r} has no tokenizer or no "
                "preprocessor_config.json"
            )
        mm_inputs.check_counts(media, self._options)
        if self._preparer is not None and not self._preparer.settings.audio:
            sounds = [one for one in media if one.kind == mm_inputs.AUDIO]
            mm_inputs.refuse(self._model, sounds, "has no audio encoder")
        if self._preparer is not None and not self._preparer.settings.video:
            videos = [one for one in media if one.kind == mm_inputs.VIDEO]
            mm_inputs.refuse(self._model, videos, "accepts no videos")

    def check(self, prompt: Prompt, params: SamplingParams | PoolingParams) -> None:
        """`check_media`. Also raises ValueError for more or fewer media than placeholders, and for
        parameters that media exclude."""
        if params.truncate_prompt_tokens is not None:
            raise InvalidValue(
                "truncate_prompt_tokens",
                f"truncate_prompt_tokens is {params.truncate_prompt_tokens}: a prompt with "
                f"{prompt.media[0].name} cannot be truncated",
            )
        self.check_media(prompt.media)
        assert self._placeholders is not None
        self._placeholders.check(prompt.text, prompt.token_ids, [one.kind for one in prompt.media])

    def submit(self, prompt: Prompt) -> MediaPreparation:
        """Begin to prepare the media of a prompt that `check` has accepted."""
        assert self._preparer is not None
        return self._preparer.submit(prompt.media, prompt.cache_salt)

    def close(self) -> None:
        """End the threads. Waiting work is cancelled, running work is waited for."""
        if self._preparer is not None:
            self._preparer.close()

    def made(self, prompt: Prompt, items: list[Prepared]) -> MediaPrompt:
        """The prompt with its prepared media. Raises ValueError if they do not fit it."""
        assert self._placeholders is not None
        if prompt.token_ids is None:
            assert prompt.text is not None
            expanded = self._placeholders.of_text(
                prompt.text, items, add_special_tokens=not prompt.has_special_tokens
            )
        else:
            expanded = self._placeholders.of_ids(prompt.token_ids, items)
        num_tokens, position_3T = len(expanded.token_ids), None
        assert self._scale is not None
        if self._scale.uses_mrope:
            position_3T, _ = positions.mrope_positions(num_tokens, self._items(items, expanded))
        pairs = zip(items, expanded.spans)
        images = [one for item, spans in pairs for one in self._images(item, spans)]
        return MediaPrompt(expanded.token_ids, position_3T, images, prompt.cache_salt)

    def _items(self, items: Sequence[Prepared], expanded: Expanded) -> list[positions.Item]:
        """The images and videos of a prompt in order. A frame with separate tokens is one item."""
        assert self._scale is not None
        merge, per_second, spans_time, _ = self._scale
        found: list[positions.Item] = []
        for item, spans in zip(items, expanded.spans):
            if item.kind == mm_inputs.AUDIO:
                continue
            frames, rows, columns = item.grid
            size = frames // len(spans), rows // merge, columns // merge
            interval, per_unit = positions.interval(item.seconds_per_grid, per_second), 1.0
            if spans_time:  # the model's own code rounds after each product
                interval, per_unit = item.seconds_per_grid, per_second
            found += [
                positions.Item(start, *size, interval, per_unit, spans_time) for start, _ in spans
            ]
        return sorted(found)

    def _images(self, item: Prepared, spans: Sequence[Span]) -> Iterator[tuple[MMSpan, MMItem]]:
        """The frames of an item (one for an audio clip), each with its place in the prompt and its
        digest."""
        if item.kind == mm_inputs.AUDIO:
            ((start, num_tokens),) = spans
            content = MMSpan(start, num_tokens, item.digest)
            yield content, MMItem(item.values, item.grid, "audio")
            return
        frames, rows, columns = item.grid
        num_tokens, num_patches = item.num_tokens // frames, rows * columns
        starts = [start for first, num in spans for start in range(first, first + num, num_tokens)]
        for index, start in enumerate(starts):
            digest = item.digest
            if frames > 1:
                digest = hashlib.sha256(digest + index.to_bytes(4, "little")).digest()
            pixels = item.values[index * num_patches : (index + 1) * num_patches]
            yield MMSpan(start, num_tokens, digest), MMItem(pixels, (1, rows, columns))


class MMProcessor:
    """Prepares the prompts of requests in worker threads, as the gate admits them. One thread at a
    time may use it."""

    def __init__(self, prompts: MediaPrompts, options: MediaOptions) -> None:
        """Takes over `prompts`."""
        self._prompts, self._gate = prompts, MediaGate(options)
        self._waiting: dict[int, Prompt] = {}
        self._running: dict[int, tuple[Prompt, MediaPreparation]] = {}
        self._changed = threading.Event()

    def check_media(self, media: Sequence[mm_inputs.MMInput]) -> None:
        """See `MediaPrompts`."""
        self._prompts.check_media(media)

    def check(
        self,
        prompt: Prompt,
        params: SamplingParams | PoolingParams,
        embeddings: Embeddings,
        positions: np.ndarray | None,
    ) -> None:
        """`MediaPrompts.check`, and refuse what follows from media."""
        if embeddings or positions is not None:
            raise ValueError(
                f"the prompt has {prompt.media[0].name}: embeddings and positions follow from it, "
                "so none can be given"
            )
        self._prompts.check(prompt, params)

    def add(self, request_id: int, prompt: Prompt) -> None:
        """Prepare the prompt of a request that `check` has accepted."""
        self._waiting[request_id] = prompt
        self._gate.enter(request_id, partial(self._begin, request_id))

    def take(self, wait_s: float = 0.0) -> Iterator[tuple[int, MediaPrompt | str | WorkFailed]]:
        """Requests that are ready, with their prompts, with the errors of their media, or with
        errors that are not theirs.

        If none is ready, wait up to `wait_s` for one. A request is removed when the caller advances
        to the next one: after an earlier Ctrl-C it is yielded again.
        """
        if wait_s and not any(work.done() for _, work in self._running.values()):
            self._changed.wait(wait_s)
        self._changed.clear()
        for request_id, (prompt, work) in list(self._running.items()):
            if not work.done():
                continue
            num_bytes = 0
            try:
                found = self._prompts.made(prompt, work.result())
            except (ValueError, DoesNotStart) as error:
                yield request_id, str(error)
            except Exception as error:  # raised here, it would come back in each step
                yield request_id, WorkFailed.of("preparing the media", error)
            else:
                num_bytes = found.num_bytes
                yield request_id, found
            if self._running.pop(request_id, None) is not None:  # unless it was dropped
                self._gate.hold(request_id, num_bytes)

    def drop(self, request_id: int) -> None:
        """Remove a request that has ended, and cancel its work."""
        self._waiting.pop(request_id, None)
        _, work = self._running.pop(request_id, (None, None))
        if work is not None and all(work is not other for _, other in self._running.values()):
            work.cancel()
        self._gate.leave(request_id)

    def __contains__(self, request_id: int) -> bool:
        """Whether a request is in preparation."""
        return request_id in self._waiting or request_id in self._running

    def __len__(self) -> int:
        """The number of requests in preparation."""
        return len(self._waiting) + len(self._running)

    def close(self) -> None:
        for request_id in [*self._waiting, *self._running]:
            self.drop(request_id)
        self._prompts.close()

    def _begin(self, request_id: int) -> None:
        prompt = self._waiting.get(request_id)
        if prompt is not None:  # unless it has begun
            self._running[request_id] = prompt, self._work(prompt)
            del self._waiting[request_id]

    def _work(self, prompt: Prompt) -> MediaPreparation:
        """The preparation of a prompt; several answers to one prompt share it."""
        for other, work in self._running.values():
            if other.media is prompt.media and other.cache_salt == prompt.cache_salt:
                return work
        work = self._prompts.submit(prompt)
        work.when_changed(self._changed.set)
        return work
