"""Requests for more adapters than host memory has places for: each gets a place in its turn."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest

from nanovllm import LLM, LoRARequest
from nanovllm.engine.engine import Engine
from tests.engine.adapter_cases import PROMPTS, adapters, make
from tests.engine.seeing import GREEDY, PICTURE
from tests.engine.seeing import make as make_seeing
from tests.engine.test_images import asked
from tests.engines import drain, greedy
from tests.media.vision_cases import picture
from tests.models import lora_cases

__all__ = ["adapters"]  # a fixture
ONE_PLACE = {"max_loras": 1, "max_cpu_loras": 1}


def step(engine: Engine) -> list[int]:
    """A step, with nothing left to do for threads before it; returns the ids of requests that it
    ends."""
    wait([one for _, work in engine._media._running.values() for one in work._futures], 60)
    engine.adapters.wait(60)
    return [one.request_id for one in engine.step() if one.finished]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, list[LoRARequest]]]:
    """An engine with a place for one adapter, which prepares no media while an unfinished request
    has some; and two adapters."""
    case = make_seeing("Qwen3VLProcessor", tmp_path_factory.mktemp("seeing"))
    root = tmp_path_factory.mktemp("adapters")
    folders = [lora_cases.save_adapter(root / str(i), case.folder, seed=i) for i in (1, 2)]
    llm = case.llm(
        enforce_eager=True, enable_lora=True, max_lora_rank=8, media_limits={"max_held_bytes": 1},
        **ONE_PLACE,
    )  # fmt: skip
    yield llm, [LoRARequest(one.name, int(one.name), str(one)) for one in folders]
    llm.close()


def test_requests_with_media_and_adapters_do_not_wait_for_each_other(
    seeing: tuple[LLM, list[LoRARequest]],
) -> None:
    """One needs the place of the other's adapter, whose media wait until the first has ended."""
    llm, (first, second) = seeing
    engine = llm.engine
    prompts = [asked(f"see {PICTURE}", image=picture(60, 80, seed=i)) for i in range(2)]
    of_text = engine.add_request("only text", greedy(20), lora_request=first)
    for _ in range(3):
        assert not step(engine)
    waits_for_place = engine.add_request(prompts[0], GREEDY, lora_request=second)
    for _ in range(3):
        assert not step(engine)
    waits_for_media = engine.add_request(prompts[1], GREEDY, lora_request=first)
    order: list[int] = []
    for _ in range(100):
        order += step(engine)
    engine.abort_all([of_text, waits_for_place, waits_for_media])
    assert order == [waits_for_media, of_text, waits_for_place]
    assert not engine._media._gate._held and not engine._held.items


def test_an_engine_waits_for_media_of_a_request_whose_adapter_is_there(
    seeing: tuple[LLM, list[LoRARequest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of asking again and again, as it did while any request had an adapter."""
    llm, (first, _) = seeing
    llm.generate("only text", greedy(1), lora_request=first)
    engine, waits = llm.engine, []
    take = engine._media.take

    def recorded(wait_s: float) -> object:
        waits.append(wait_s)
        return take(wait_s)

    monkeypatch.setattr(engine._media, "take", recorded)
    prompt = asked(f"see {PICTURE}", image=picture(60, 80))
    engine.add_request(prompt, GREEDY, lora_request=first)
    drain(llm)
    assert waits[0] > 0


def test_an_adapter_that_cannot_be_read_ends_a_request_whose_media_wait_for_it(
    seeing: tuple[LLM, list[LoRARequest]], tmp_path: Path
) -> None:
    llm, (first, _) = seeing
    engine = llm.engine
    folder = lora_cases.save_adapter(tmp_path / "other", Path(llm.engine.config.model))
    running = engine.add_request("only text", greedy(20), lora_request=first)
    other = LoRARequest("other", 3, str(folder))
    prompt = asked(f"see {PICTURE}", image=picture(60, 80))
    waiting = engine.add_request(prompt, GREEDY, lora_request=other)
    lora_cases.save_adapter(folder, Path(llm.engine.config.model), named=lambda name: "q_" in name)
    done = drain(llm)
    assert done[running].finish_reason == "length"
    assert done[waiting].finish_reason == "error"
    assert "has changed since it was checked" in (done[waiting].error or "")
    assert not engine._media and not engine._preparation


def test_new_requests_take_no_place_that_others_wait_for(
    checkpoint: Path, adapters: dict[str, LoRARequest]
) -> None:
    """Each new one comes when the place is free, before the next step."""
    llm = make(checkpoint, **ONE_PLACE)
    engine = llm.engine
    order: list[int] = []

    def add(name: str) -> int:
        return engine.add_request(PROMPTS[0], greedy(4), lora_request=adapters[name])

    ids = [add("german"), add("french")]
    for name in ("dutch", "danish", "german", "dutch"):
        num_done = len(order)
        while len(order) == num_done:
            order += step(engine)
        ids.append(add(name))
    order += drain(llm)
    assert order == ids
    llm.close()
