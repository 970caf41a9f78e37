"""Images and videos that cannot be used: a clear error for their prompt, and the engine goes on."""

from __future__ import annotations

import base64
import errno
import io
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from itertools import count
from typing import Any

import pytest
from PIL import Image

from nanovllm import LLM, SamplingParams
from nanovllm.media import decoders
from nanovllm.media.prepare import Preparer
from nanovllm.schedule.scheduler import Scheduler
from tests.engine.interrupts import is_interrupted
from tests.engine.seeing import FILM, GREEDY, PICTURE, Seeing, make
from tests.engine.test_images import asked, data_url, ids
from tests.media.vision_cases import picture

TEXT = f"see {PICTURE} now"


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    return make("Qwen3VLProcessor", tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def llm(seeing: Seeing) -> Iterator[LLM]:
    limits = {"max_image_pixels": 300 * 300, "max_item_bytes": 1 << 20, "num_media_workers": 2}
    llm = seeing.llm(
        enforce_eager=True, media_limits=limits, limit_mm_per_prompt={"image": 3, "video": 1}
    )
    yield llm
    llm.close()


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def as_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


GOOD = encoded(picture(60, 80), "JPEG")
BAD: dict[str, tuple[Any, str]] = {
    "corrupt": (as_url(b"no picture at all"), "image 1: .*format"),
    "truncated": (as_url(GOOD[: len(GOOD) // 2]), "image 1: ."),
    "bomb": (as_url(encoded(Image.new("1", (9000, 9000)))), "image 1: .*9000 × 9000 pixels.*90000"),
    "narrow": (picture(1000, 3), "image 1: .*200"),
    "channels": (picture(60, 80).convert("F"), "image 1: ."),
    "bytes": (as_url(bytes(2 << 20)), "image 1: .*1048576"),
    "remote": ("https://example.com/secret.png", "image 1: .*allowed_media_domains"),
    "internal": ("http://169.254.169.254/latest", "image 1: remote URLs are refused"),
    "local": ("/etc/passwd", "image 1: .*allowed_local_media_path"),
    "file": ("file:///etc/passwd", "image 1: .*allowed_local_media_path"),
    "svg": (as_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "image 1: ."),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_ends_its_own_prompt(llm: LLM, name: str) -> None:
    value, error = BAD[name]
    prompts = [asked(TEXT, image=picture(60, 80)), asked(TEXT, image=value), asked("only text")]
    before, found, after = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert found.outputs[0].finish_reason == "error"
    assert re.match(error, found.error), found.error
    for secret in ("passwd", "example.com", "169.254", "/tmp"):
        assert secret not in found.error
    assert found.outputs[0].token_ids == []
    assert before.outputs[0].finish_reason == after.outputs[0].finish_reason == "length"
    assert not llm.engine.has_unfinished  # type: ignore[attr-defined]
    assert not llm.engine._held.items  # type: ignore[attr-defined]


def test_a_decoder_that_does_not_start_ends_its_own_prompt(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(shared: int) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable", "/path/of/python")

    monkeypatch.setattr(decoders, "start", start)
    llm.engine._media._prompts._preparer._decoders.close()  # type: ignore[attr-defined]
    image = as_url(encoded(picture(61, 83), "PNG"))
    found, after = llm.generate([asked(TEXT, image=image), "only text"], GREEDY, use_tqdm=False)
    assert found.outputs[0].finish_reason == "error"
    assert found.error == (
        "image 1: the process that decodes it does not start: Resource temporarily unavailable"
    )
    assert after.outputs[0].finish_reason == "length"


def test_too_little_memory_for_a_decoder_ends_its_own_prompt(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write_all(fd: int, data: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/path")

    image = as_url(encoded(picture(61, 85), "PNG"))
    prompts = [asked(TEXT, image=image), "only text"]
    with monkeypatch.context() as patched:
        patched.setattr(decoders, "write_all", write_all)
        found, after = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert found.outputs[0].finish_reason == "error"
    assert found.error == "preparing the media has failed: No space left on device"
    assert after.outputs[0].finish_reason == "length"
    assert any(one.exc_info for one in caplog.records)
    for one in llm.generate(prompts, GREEDY, use_tqdm=False):
        assert one.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        (asked("none", image=picture(60, 80)), "0 placeholders for images, but 1 images"),
        (asked(TEXT, image=[picture(60, 80)] * 2), "1 placeholders for images, but 2 images"),
        (asked(f"{PICTURE}{PICTURE}", image=picture(9, 9)), "2 placeholders for images, but 1"),
        (asked(FILM, image=picture(9, 9)), "placeholders for"),
        (asked(PICTURE * 4, image=[picture(9, 9)] * 4), "4 images: at most 3 are allowed"),
        (asked(FILM * 2, video=[[picture(9, 9)] * 2] * 2), "2 videos: at most 1 are allowed"),
        (asked(TEXT, sound="x"), "multi_modal_data has the key 'sound'"),
        (asked(TEXT, audio="x"), "the prompt has audio 1, but .* has no audio encoder"),
        (asked(TEXT, image=7), "image 1 is of type int"),
    ],
)
def test_wrong_prompts_are_refused_at_once(llm: LLM, prompt: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        llm.generate([asked("only text"), prompt], GREEDY, use_tqdm=False)
    assert not llm.engine.has_unfinished  # type: ignore[attr-defined]
    assert len(ids(llm.generate(["only text"], GREEDY, use_tqdm=False)[0])) == GREEDY.max_tokens


def test_options_that_media_exclude_are_refused(llm: LLM) -> None:
    prompt = asked(TEXT, image=picture(60, 80))
    with pytest.raises(ValueError, match="truncate_prompt_tokens is 7"):
        llm.generate([prompt], SamplingParams(truncate_prompt_tokens=7), use_tqdm=False)
    with pytest.raises(ValueError, match="has image 1, which has no token ids yet"):
        llm.chat_prompts([{"role": "user", "content": [{"type": "image", "image": picture(9, 9)}]}])
    with pytest.raises(ValueError, match="no place for it"):
        llm.chat(
            [{"role": "user", "content": [{"type": "image", "image": picture(9, 9)}]}],
            chat_template_content_format="string",
        )


def test_prompts_that_are_too_long_with_their_images_end_with_an_error(llm: LLM) -> None:
    prompt = asked(TEXT + "x" * 480, image=picture(250, 250))
    good, found = llm.generate(["only text", prompt], GREEDY, use_tqdm=False)
    assert "max_model_len 512" in found.error
    assert good.outputs[0].finish_reason == "length"


def test_a_text_model_refuses_images() -> None:
    llm = LLM("tiny-qwen3", device="cpu", enforce_eager=True, max_num_seqs=2)
    content = [{"type": "image_url", "image_url": {"url": data_url(picture(9, 9))}}]
    try:
        with pytest.raises(
            ValueError, match="the prompt has image 1, but 'tiny-qwen3' accepts text only"
        ):
            llm.chat([{"role": "user", "content": content}])
        with pytest.raises(
            ValueError, match="the prompt has image 1, but 'tiny-qwen3' accepts text only"
        ):
            llm.generate([asked("a", image=picture(9, 9))])
    finally:
        llm.close()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"allowed_local_media_path": "/nowhere/at/all"}, "it must be a folder"),
        ({"allowed_media_domains": ["https://a.b/"]}, "it must be 'host' or 'host:port'"),
        ({"limit_mm_per_prompt": {"sound": 1}}, "limit_mm_per_prompt is .*, 'video' and 'audio'"),
        ({"limit_mm_per_prompt": {"image": -1}}, "limit_mm_per_prompt is"),
        ({"media_limits": {"max_pixels": 1}}, "media_limits is .*max_image_pixels"),
        ({"media_limits": {"max_image_pixels": 0}}, "max_image_pixels is 0: .* at least 1"),
        ({"media_limits": {"max_image_pixels": 1.5}}, "max_image_pixels is 1.5: .* whole number"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        LLM("tiny-qwen3", **options)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Preparation of images waits for this event."""
    go, one = threading.Event(), Preparer._one

    def wait(self: Preparer, *args: Any) -> Any:
        assert go.wait(60)
        return one(self, *args)

    monkeypatch.setattr(Preparer, "_one", wait)
    yield go
    go.set()


def run(llm: LLM, until: Any, seconds: float = 60.0) -> list[Any]:
    """Steps and their outputs until a condition holds."""
    found: list[Any] = []
    end = time.monotonic() + seconds
    while not until(found):
        assert time.monotonic() < end
        llm.engine.advance()
        found += llm.engine.take()
    return found


def test_other_requests_run_while_images_are_prepared(llm: LLM, slow: threading.Event) -> None:
    engine: Any = llm.engine
    seeing_id = engine.add_request(asked(TEXT, image=picture(60, 80)), GREEDY)
    text_id = engine.add_request("only text", GREEDY)
    found = run(llm, lambda found: any(one.finished for one in found))
    assert {one.request_id for one in found} == {text_id}
    slow.set()
    found = run(llm, lambda found: any(one.finished for one in found))
    assert {one.request_id for one in found} == {seeing_id}
    assert found[-1].completion.finish_reason == "length"


def test_a_request_can_be_aborted_while_its_images_are_prepared(
    llm: LLM, slow: threading.Event
) -> None:
    engine: Any = llm.engine
    first, second = (engine.add_request(asked(TEXT, image=picture(60, 80)), GREEDY) for _ in "ab")
    engine.abort(first)
    (aborted,) = engine.take()
    assert aborted.completion.finish_reason == "abort"
    slow.set()
    found = run(llm, lambda found: any(one.finished for one in found))
    assert {one.request_id for one in found} == {second}
    assert not engine.has_unfinished and not engine._media


def test_few_prompts_are_prepared_at_the_same_time(llm: LLM, slow: threading.Event) -> None:
    """And none while the patches of unfinished requests take too much."""
    engine: Any = llm.engine
    prompts = [asked(TEXT, image=picture(60, 80, seed=100 + i)) for i in range(20)]
    requests = [engine.add_request(one, GREEDY) for one in prompts]
    assert len(engine._media._running) == 4  # two for each worker
    gate = engine._media._gate
    held, max_held, gate.max_held = gate._held, gate.max_held, 1
    try:
        slow.set()
        most = 0

        def done(found: list[Any]) -> bool:
            nonlocal most
            most = max(most, len(held))
            return sum(one.finished for one in found) == len(requests)

        run(llm, done)
    finally:
        gate.max_held = max_held
    assert most <= 4
    assert not held and not engine._media and not engine._held.items


@pytest.mark.parametrize("image", [picture(60, 80), "/etc/passwd"], ids=["good", "refused"])
def test_an_interrupt_before_a_request_is_queued_changes_no_answer(llm: LLM, image: Any) -> None:
    """At whichever line of a step it comes, after the image was prepared."""
    engine: Any = llm.engine
    expected, num_interrupts = None, 0
    for nth in count():  # 0: without an interrupt
        ids = [engine.add_request(asked(TEXT, image=image), GREEDY)]
        ids.append(engine.add_request("only text", GREEDY))
        ((_, work),) = engine._media._running.values()
        wait(work._futures, 60)
        was_interrupted = is_interrupted(engine.advance, nth, end=Scheduler.schedule)
        found = run(llm, lambda found: not engine.has_unfinished)
        done = [(one.request_id, one.completion) for one in found if one.finished]
        assert sorted(request_id for request_id, _ in done) == ids, f"line {nth}"
        ends = [(one.token_ids, one.finish_reason) for _, one in sorted(done)]
        expected = expected or ends
        assert ends == expected, f"line {nth}"
        assert not engine._media._gate._held and not engine._held.items
        if nth and not was_interrupted:
            break
        num_interrupts += was_interrupted
    assert num_interrupts > 20


def test_waiting_for_images_is_measured(llm: LLM, slow: threading.Event) -> None:
    name = "nanovllm:media_wait_seconds"

    def waited() -> float:
        return next(one.value for one in llm.get_metrics() if one.name == name)

    before = waited()

    def go_on_late() -> None:
        end = time.monotonic() + 30
        while llm.engine.metrics.media_wait_seconds < before + 0.2 and time.monotonic() < end:
            time.sleep(0.01)
        slow.set()

    start = time.perf_counter()
    threading.Thread(target=go_on_late).start()
    llm.generate([asked(TEXT, image=picture(61, 80))], GREEDY, use_tqdm=False)
    assert 0.2 <= waited() - before <= time.perf_counter() - start
