"""Preparation in threads: order, cache, digests, limits, cancellation."""

from __future__ import annotations

import base64
import io
import threading
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nanovllm.media import mm_inputs, patches, pictures
from nanovllm.media.cache import ByteCache
from nanovllm.media.prepare import Prepared, Preparer
from tests.media.vision_cases import Case, picture

VISION = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture
def preparer(qwen3: Case) -> Any:
    found = qwen3.preparer()
    yield found
    found.close()


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def run(preparer: Preparer, **data: Any) -> list[Prepared]:
    return preparer.submit(mm_inputs.from_data(data)).result(60)


def test_all_forms_of_one_image_have_one_digest(preparer: Preparer) -> None:
    image = picture(60, 40)
    forms = [image, np.array(image), torch.from_numpy(np.array(image)), data_url(image),
             data_url(image, "BMP"), image.convert("RGBA")]  # fmt: skip
    found = run(preparer, image=forms)
    assert len({one.digest for one in found}) == 1
    assert all(torch.equal(one.values, found[0].values) for one in found)


def test_prompts_of_different_salts_share_no_media(preparer: Preparer) -> None:
    sound_free = {"image": [data_url(picture(60, 40))], "video": [[picture(60, 40)] * 2]}
    items = mm_inputs.from_data(sound_free)

    def digests(salt: str | None) -> list[bytes]:
        return [one.digest for one in preparer.submit(items, salt).result(60)]

    plain, first = digests(None), digests("a")
    hits = preparer.cache.num_hits
    assert digests("a") == first
    assert preparer.cache.num_hits > hits, "the same salt finds its own media"
    hits = preparer.cache.num_hits
    other = digests("b")
    assert preparer.cache.num_hits == hits
    assert len({*plain, *first, *other}) == 6


def test_other_content_has_another_digest(qwen3: Case, preparer: Preparer) -> None:
    image = picture(60, 40)
    one_pixel = image.copy()
    one_pixel.putpixel((59, 39), tuple(255 - v for v in image.getpixel((59, 39))))  # type: ignore
    # the same bytes in another shape, and as a video
    reshaped = np.array(image).reshape(60, 40, 3)
    found = run(preparer, image=[image, one_pixel, reshaped], video=[[image, image]])
    times = [run(preparer, video=([image] * 4, {"fps": fps})) for fps in (2.0, 4.0)]
    digests = [one.digest for one in (*found, *times[0], *times[1])]
    assert len(set(digests)) == len(digests)


def test_settings_are_part_of_the_digest(case: Case, qwen3: Case) -> None:
    digests = set()
    for one in (case, qwen3):
        other = one.preparer()
        digests.add(run(other, image=picture(60, 40))[0].digest)
        other.close()
    assert len(digests) == (1 if case.settings == qwen3.settings else 2)


def test_the_same_image_is_patched_once(
    preparer: Preparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(preparer, image=picture(60, 40))[0]

    def never(*_: Any) -> None:
        raise AssertionError("patched again")

    monkeypatch.setattr(patches, "image_patches", never)
    assert run(preparer, image=picture(60, 40))[0] is first


def test_the_same_file_is_decoded_once(preparer: Preparer, monkeypatch: pytest.MonkeyPatch) -> None:
    url = data_url(picture(60, 40))
    first = run(preparer, image=url)[0]
    monkeypatch.setattr(pictures, "decode", None)
    assert run(preparer, image=url)[0] is first


def test_a_cache_of_nothing_keeps_nothing(qwen3: Case) -> None:
    preparer = qwen3.preparer(media_cache_bytes=0)
    first, second = (run(preparer, image=picture(60, 40))[0] for _ in range(2))
    assert first is not second and len(preparer.cache) == 0
    assert torch.equal(first.values, second.values)
    preparer.close()


def test_images_are_prepared_side_by_side(qwen3: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = threading.Barrier(3, timeout=30)
    original = pictures.of_image

    def together(*args: Any) -> Any:
        barrier.wait()  # passes when three threads are here
        return original(*args)

    monkeypatch.setattr(pictures, "of_image", together)
    preparer = qwen3.preparer(num_media_workers=3)
    found = run(preparer, image=[picture(60 + 20 * i, 40, seed=i) for i in range(3)])
    alone = [qwen3.theirs.image_processor([picture(60 + 20 * i, 40, seed=i)], return_tensors="pt")
             for i in range(3)]  # fmt: skip
    for one, expected in zip(found, alone):
        assert torch.equal(one.values, expected["pixel_values"])
    preparer.close()


def test_submit_does_not_wait_for_the_work(
    preparer: Preparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    original = pictures.of_image
    monkeypatch.setattr(pictures, "of_image", lambda *args: go.wait(30) and original(*args))
    preparation = preparer.submit(mm_inputs.from_data({"image": picture(60, 40)}))
    assert not preparation.done()
    with pytest.raises(TimeoutError):
        preparation.result(0.01)
    go.set()
    assert len(preparation.result(30)) == 1


def test_cancelled_work_ends_and_later_work_goes_on(
    qwen3: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    preparer = qwen3.preparer(num_media_workers=1)
    running, go = threading.Event(), threading.Event()
    original, seen = pictures.of_image, []

    def slow(image: Any, most: int) -> Any:
        seen.append(image)
        running.set()
        go.wait(30)
        return original(image, most)

    monkeypatch.setattr(pictures, "of_image", slow)
    images = [picture(60, 40, seed=i) for i in range(4)]
    preparation = preparer.submit(mm_inputs.from_data({"image": images}))
    running.wait(30)
    preparation.cancel()
    go.set()
    with pytest.raises(CancelledError):
        preparation.result(30)
    assert seen == images[:1] and len(preparer.cache) == 0
    assert len(run(preparer, image=images[1])) == 1
    preparer.close()


def test_a_bad_image_is_named_and_harms_no_other(preparer: Preparer) -> None:
    good = picture(60, 40)
    bad = "data:image/png;base64,AAAA"
    first = preparer.submit(mm_inputs.from_data({"image": [good, bad, good]}))
    other = preparer.submit(mm_inputs.from_data({"image": good}))
    with pytest.raises(ValueError, match="image 2: the data are not a picture"):
        first.result(60)
    assert len(other.result(60)) == 1


def test_one_image_object_is_read_by_one_thread_at_a_time(qwen3: Case) -> None:
    file = io.BytesIO()
    picture(300, 200).save(file, "PNG")
    lazy = Image.open(file)
    preparer = qwen3.preparer(num_media_workers=4, max_images=64)
    found = run(preparer, image=[lazy] * 32)
    assert len({one.digest for one in found}) == 1
    preparer.close()


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"max_images": 1}, {"image": [picture(40, 40)] * 2}, "2 images: at most 1 are allowed"),
        ({"max_image_pixels": 999}, {"image": picture(40, 25)}, "image 1: .* at most 999"),
        ({"max_image_pixels": 999}, {"video": [picture(40, 25)]}, "video 1: .* at most 999"),
        ({"max_video_frames": 3}, {"video": [picture(40, 25)] * 19}, "4 frames: at most 3"),
        ({"max_item_bytes": 99}, {"image": data_url(picture(40, 25))}, "more than 99 bytes"),
        ({"max_prompt_bytes": 999}, {"image": [data_url(picture(40, 25))]}, "more than 999 bytes"),
        ({"max_patches_bytes": 999}, {"image": picture(64, 64)}, "98304 bytes: at most 999"),
        ({"max_patches_bytes": 999}, {"video": [picture(64, 64)] * 2}, "bytes: at most 999"),
    ],
)  # fmt: skip
def test_limits_are_refused_with_their_values(
    qwen3: Case, options: Any, data: Any, message: str
) -> None:
    preparer = qwen3.preparer(**options)
    with pytest.raises(ValueError, match=message):
        run(preparer, **data)
    assert len(preparer.cache) == 0
    preparer.close()


def test_frames_of_different_sizes_are_refused(preparer: Preparer) -> None:
    with pytest.raises(ValueError, match="video 1: its frames differ in size"):
        run(preparer, video=[picture(40, 40), picture(40, 41)])


def test_frames_can_be_references_and_arrays(preparer: Preparer) -> None:
    frames = [picture(60, 40, seed=i) for i in range(4)]
    urls = preparer.submit(
        mm_inputs.from_messages(
            [{"content": [{"type": "video", "video": [data_url(one) for one in frames]}]}]
        )[1]
    ).result(60)
    arrays = run(preparer, video=np.stack([np.array(one) for one in frames]))
    assert {one.digest for one in (*urls, *arrays)} == {run(preparer, video=frames)[0].digest}


def test_frames_that_were_sampled_elsewhere_keep_their_times(preparer: Preparer) -> None:
    facts = {"fps": 10.0, "frames_indices": [0, 10, 20, 40], "total_num_frames": 99}
    (found,) = run(preparer, video=([picture(60, 40)] * 4, facts))
    assert found.times == (0.5, 3.0)
    assert found.seconds_per_grid == pytest.approx(2 / (4 / 99 * 10.0))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"frames_indices": [0]}, "1 frames_indices do not fit 4 frames"),
        ({"total_num_frames": 3}, "total_num_frames is 3"),
        ({"frames_indices": [0, 1, 2, 9], "do_sample_frames": True}, "already sampled"),
    ],
)
def test_wrong_facts_about_frames_are_refused(
    preparer: Preparer, facts: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(preparer, video=([picture(60, 40)] * 4, facts))


@pytest.mark.parametrize(("text", "num"), [("a", 1), (VISION, 2), (VISION * 2, 1), (VISION, 0)])
def test_placeholders_must_fit_the_images(
    qwen3: Case, preparer: Preparer, text: str, num: int
) -> None:
    items = run(preparer, image=[picture(40, 40)] * num)
    count = text.count("<|image_pad|>")
    message = f"{count} placeholders for images, but {num} images were given"
    with pytest.raises(ValueError, match=message):
        qwen3.placeholders.of_text(text, items)
    with pytest.raises(ValueError, match=message):
        qwen3.placeholders.of_ids(qwen3.theirs.tokenizer(text)["input_ids"], items)


def test_the_cache_drops_what_was_used_longest_ago() -> None:
    cache: ByteCache[str] = ByteCache(10)
    for name in "abc":
        cache.put(name.encode(), name, 4)
    assert cache.get(b"a") is None and cache.num_bytes == 8
    assert cache.get(b"b") == "b"  # now `c` is the oldest
    cache.put(b"d", "d", 3)
    assert b"c" not in cache and cache.get(b"b") == "b" and cache.num_bytes == 7
    cache.put(b"d", "D", 5)
    assert cache.num_bytes == 9 and cache.get(b"d") == "D" and len(cache) == 2
    cache.put(b"e", "e", 11)
    assert b"e" not in cache and len(cache) == 2
    cache.clear()
    assert cache.num_bytes == 0 and len(cache) == 0
    assert (cache.num_hits, cache.num_misses) == (3, 1)


def test_the_cache_holds_its_bytes_with_many_threads() -> None:
    cache: ByteCache[int] = ByteCache(100)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(500):
            size = int(rng.integers(1, 40))
            cache.put(bytes([int(rng.integers(20))]), size, size)
            cache.get(bytes([int(rng.integers(20))]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert cache.num_bytes <= 100
    assert cache.num_bytes == sum(size for _, size in cache._entries.values())


def test_a_lack_of_memory_is_not_called_damage(
    qwen3: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> None:
        raise MemoryError

    image = picture(70, 50)
    monkeypatch.setattr(type(image), "load", load)
    preparer = qwen3.preparer()
    try:
        with pytest.raises(ValueError, match="image 1: there is not enough memory for it"):
            preparer.submit(mm_inputs.from_data({"image": image})).result(60)
    finally:
        preparer.close()
