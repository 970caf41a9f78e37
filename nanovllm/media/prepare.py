"""Prepares images and videos (patches) and audio clips (mel features) in threads, with a cache
keyed by content.

Encoded files are decoded in processes (`decoders.py`), since decoders can crash, hang or exhaust
memory. The rest runs in threads: Pillow, NumPy, zlib and hashlib release the GIL, and a process
would have to send megabytes of patches. docs/media.md has the figures.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanovllm.media import clips, mels, patches, pictures, sounds, sources
from nanovllm.media.cache import ByteCache
from nanovllm.media.decoders import Decoders
from nanovllm.media.fair_pool import FairPool
from nanovllm.media.memory import Memory, Reservation
from nanovllm.media.mm_inputs import AUDIO, IMAGE, VIDEO, MMInput, check_counts
from nanovllm.media.options import MediaOptions
from nanovllm.media.patches import Grid
from nanovllm.media.pictures import Pixels
from nanovllm.media.settings import PatchSettings, VisionSettings
from nanovllm.programs import DoesNotStart


@dataclass(frozen=True)
class Prepared:
    """An image, video or clip in the form for the encoder and the prompt.

    values: the patches [P, C] or the mel features [frames, mel bins], float32. Prompts share it,
        so it must not be written to.
    grid: patches over time, height and width, whose product is P; of a clip (frames,).
    num_tokens: placeholder tokens in the prompt.
    digest: SHA-256 of the salt, the decoded pixels or samples, the times of frames and the
        processor's settings. Equal digests mean equal values and positions.
    times: of a video, the seconds of each patch over time. seconds_per_grid: between two of them.
    """

    kind: str
    values: Tensor
    grid: tuple[int, ...]
    num_tokens: int
    digest: bytes
    times: tuple[float, ...] = ()
    seconds_per_grid: float = 0.0

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes


class _Budget:
    """The encoded bytes that a prompt may still read, and whether it was cancelled.

    root: the prefix of all digests of its media. `closed` is set when all prompts are cancelled.
    """

    def __init__(self, max_bytes: int, root: bytes, closed: threading.Event) -> None:
        self._max_bytes, self._num_bytes, self.root = max_bytes, 0, root
        self._closed = closed
        self._lock = threading.Lock()
        self.cancelled = threading.Event()

    def take(self, num_bytes: int) -> None:
        with self._lock:
            self._num_bytes += num_bytes
            if self._num_bytes > self._max_bytes:
                raise ValueError(f"the prompt's media have more than {self._max_bytes} bytes")

    def check(self) -> None:
        if self.cancelled.is_set() or self._closed.is_set():
            raise CancelledError


class MediaPreparation:
    """The media of one prompt, which threads prepare."""

    def __init__(self, budget: _Budget, futures: Sequence[Future[Prepared]]) -> None:
        self._budget, self._futures = budget, futures

    def done(self) -> bool:
        """Whether `result` returns or raises at once."""
        return all(one.done() for one in self._futures)

    def result(self, timeout_s: float | None = None) -> list[Prepared]:
        """All items in their original order. Raises the first item's ValueError or DoesNotStart,
        CancelledError after `cancel`, or TimeoutError."""
        wait(self._futures, timeout_s, FIRST_EXCEPTION)
        try:
            for one in self._futures:
                if one.done():
                    one.result()
        except BaseException:
            self.cancel()  # the other items are not needed
            raise
        if not self.done():
            raise TimeoutError(f"the media were not ready after {timeout_s} s")
        return [one.result() for one in self._futures]

    def when_changed(self, call: Callable[[], object]) -> None:
        """Call `call`, in another thread or at once, each time an item is ready."""
        for one in self._futures:
            one.add_done_callback(lambda _: call())

    def cancel(self) -> None:
        """Ends the work on all items as soon as possible."""
        self._budget.cancelled.set()
        for one in self._futures:
            one.cancel()


class Preparer:
    """Prepares the media of prompts for one checkpoint. Several threads can use it."""

    def __init__(self, settings: VisionSettings, options: MediaOptions) -> None:
        self.settings, self.options = settings, options
        self.cache: ByteCache[Prepared] = ByteCache(options.media_cache_bytes)
        # by digests of encoded images and clips: known ones are not decoded again
        self._seen: ByteCache[bytes] = ByteCache(1 << 20)
        self._of_kind = {IMAGE: self._image, VIDEO: self._video, AUDIO: self._audio}
        self._pool = FairPool(options.num_media_workers, "media")
        self._decoders = Decoders(options, self._pool.num_threads)
        self._memory = Memory(options.max_decoding_bytes, self._pool.num_threads)
        self._closed = threading.Event()

    def submit(self, given: Sequence[MMInput], salt: str | None = None) -> MediaPreparation:
        """Starts the work. Nothing is read or decoded in the calling thread.

        Prompts share prepared media, and their digests, only with prompts of the same `salt`.
        Images in memory must not change until the result is ready. Raises ValueError for more items
        than a prompt may have.
        """
        check_counts(given, self.options)
        root = hashlib.sha256(salt.encode()).digest() if salt else b""
        budget = _Budget(self.options.max_prompt_bytes, root, self._closed)
        return MediaPreparation(
            budget, [self._pool.submit(budget, partial(self._one, one, budget)) for one in given]
        )

    def close(self) -> None:
        """Ends the threads and processes. All work is cancelled."""
        self._closed.set()
        self._pool.close()
        self._decoders.close()

    def _one(self, given: MMInput, budget: _Budget) -> Prepared:
        budget.check()
        try:
            return self._of_kind[given.kind](given, budget)
        except ValueError as error:
            raise ValueError(f"{given.name}: {error}") from None
        except MemoryError:
            raise ValueError(f"{given.name}: there is not enough memory for it") from None
        except DoesNotStart as error:
            raise DoesNotStart(f"{given.name}: {error}") from None

    def _image(self, given: MMInput, budget: _Budget) -> Prepared:
        encoded = b""
        if isinstance(given.value, str):
            data = self._read(given.value, IMAGE, budget)
            encoded = hashlib.sha256(budget.root + data).digest()
            known = self._known(encoded)
            if known is not None:
                return known
            with self._memory.part(budget.check) as part:
                found = self._patched(self._decoded(data, part), budget)
        else:
            found = self._patched(self._picture(given.value), budget)
        return self._remembered(encoded, found)

    def _patched(self, pixels: Pixels, budget: _Budget) -> Prepared:
        settings = self.settings.image
        budget.check()
        height, width = pixels.shape[:2]
        size = patches.image_size(height, width, settings)
        grid = self._grid(1, size, settings)
        digest = hashlib.sha256(
            budget.root + b"image" + settings.digest + repr(pixels.shape).encode()
        )
        digest.update(pixels.data)
        found = self.cache.get(digest.digest())
        if found is None:
            resized = patches.resized(pixels, *size, settings.resample)
            values = torch.from_numpy(patches.image_patches(resized, settings))
            num_tokens = patches.num_tokens(grid, settings)
            found = Prepared(IMAGE, values, grid, num_tokens, digest.digest())
            self.cache.put(found.digest, found, found.num_bytes)
        return found

    def _audio(self, given: MMInput, budget: _Budget) -> Prepared:
        settings, encoded = self.settings.audio, b""
        if settings is None:
            raise ValueError("this model has no audio encoder")
        rate, longest = settings.sampling_rate, min(self.options.max_audio_s, settings.chunk_length)
        if isinstance(given.value, str):
            data = self._read(given.value, AUDIO, budget)
            encoded = hashlib.sha256(budget.root + b"audio" + data).digest()
            known = self._known(encoded)
            if known is not None:
                return known
            with self._memory.part(budget.check) as part, self._decoders.one() as decoder:
                samples = decoder.sound(data, part, rate, longest)
        else:
            values, given_rate = given.value
            samples = sounds.of_array(values, given_rate, rate, longest)
        budget.check()
        head = budget.root + b"audio" + settings.digest
        digest = hashlib.sha256(head + samples.tobytes()).digest()
        found = self.cache.get(digest)
        if found is None:
            mel_FM = torch.from_numpy(mels.features(samples, settings))
            num_frames = len(mel_FM)
            num_tokens = mels.num_tokens(num_frames)
            found = Prepared(AUDIO, mel_FM, (num_frames,), num_tokens, digest)
            self.cache.put(digest, found, found.num_bytes)
        return self._remembered(encoded, found)

    def _remembered(self, encoded: bytes, found: Prepared) -> Prepared:
        if encoded:
            self._seen.put(encoded, found.digest, len(encoded) + len(found.digest))
        return found

    def _known(self, encoded: bytes) -> Prepared | None:
        digest = self._seen.get(encoded)
        return None if digest is None else self.cache.get(digest)

    def _video(self, given: MMInput, budget: _Budget) -> Prepared:
        with self._memory.part(budget.check) as part, self._clip(given, budget, part) as clip:
            return self._of_clip(clip, budget)

    def _of_clip(self, clip: clips.Clip, budget: _Budget) -> Prepared:
        settings = self.settings.video
        if settings is None:
            raise ValueError("this model accepts no videos")
        chosen = clips.sampled(clip, settings)
        if len(chosen) > self.options.max_video_frames:
            raise ValueError(
                f"it has {len(chosen)} frames: at most {self.options.max_video_frames} are allowed"
            )
        facts_of = clip, chosen, settings
        seconds, fps = clips.times(*facts_of), clips.sampled_fps(*facts_of)
        facts = (len(chosen), seconds, fps)
        digest = hashlib.sha256(budget.root + b"video" + settings.digest + repr(facts).encode())
        frames: list[Pixels] = []
        shape, size, grid = None, (0, 0), (0, 0, 0)
        for pixels in clip.pick(chosen):
            budget.check()
            if shape is None:
                shape = pixels.shape
                size = patches.video_size(len(chosen), shape[0], shape[1], settings)
                grid = self._grid(len(chosen), size, settings)
                digest.update(repr(shape).encode())
            if pixels.shape != shape:
                raise ValueError("its frames differ in size")
            digest.update(pixels.data)
            frames.append(patches.resized(pixels, *size, settings.resample))
        found = self.cache.get(digest.digest())
        if found is None:
            over = settings.temporal_patch_size
            found = Prepared(
                VIDEO, torch.from_numpy(patches.video_patches(frames, settings)), grid,
                patches.num_tokens(grid, settings), digest.digest(),
                _patch_times(seconds, over), over / fps,
            )  # fmt: skip
            self.cache.put(found.digest, found, found.num_bytes)
        return found

    @contextlib.contextmanager
    def _clip(self, given: MMInput, budget: _Budget, part: Reservation) -> Iterator[clips.Clip]:
        if isinstance(given.value, str):
            data = self._read(given.value, VIDEO, budget)
            with self._decoders.one() as decoder, decoder.clip(data, part) as clip:
                yield clip
            return

        def read(frame: Any) -> Pixels:
            if isinstance(frame, str):
                return self._decoded(self._read(frame, IMAGE, budget), part)
            return self._picture(frame)

        yield clips.of_frames(given.value, read, dict(given.metadata))

    def _decoded(self, data: bytes, part: Reservation) -> Pixels:
        with self._decoders.one() as decoder:
            return decoder.picture(data, part)

    def _read(self, reference: str, kind: str, budget: _Budget) -> bytes:
        data = sources.read(reference, kind, self.options)
        budget.take(len(data))
        budget.check()
        return data

    def _picture(self, value: Any) -> Pixels:
        most = self.options.max_image_pixels
        if hasattr(value, "getbands"):
            return pictures.of_image(value, most)
        return pictures.of_array(value, most)

    def _grid(self, num_frames: int, size: tuple[int, int], settings: PatchSettings) -> Grid:
        """The grid of resized frames, if its patches are small enough."""
        grid = patches.grid_of(num_frames, *size, settings)
        values = grid[0] * settings.temporal_patch_size * size[0] * size[1] * 3
        if values * 4 > self.options.max_patches_bytes:
            raise ValueError(
                f"its patches have {values * 4} bytes: at most {self.options.max_patches_bytes} "
                "are allowed"
            )
        return grid


def _patch_times(seconds: Sequence[float], over: int) -> tuple[float, ...]:
    """The middle of each patch over time, as `_calculate_timestamps` of transformers' Qwen3-VL."""
    whole = [*seconds, *[seconds[-1]] * (-len(seconds) % over)]
    return tuple((whole[i] + whole[i + over - 1]) / 2 for i in range(0, len(whole), over))
