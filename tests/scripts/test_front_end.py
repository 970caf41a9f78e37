"""scripts/bench/front_end.py in a small size."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nanovllm.cli.bench import against_server
from scripts.bench import front_end

SMALL = ["--rounds", "2", "--clients", "2", "--streams", "3", "--tokens", "19", "--requests", "5",
         "--concurrency", "2"]  # fmt: skip


def test_each_figure_is_its_count_by_the_processor_time_of_the_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Requests go to a real server. Its clock says that each part has taken 2 seconds."""
    times = iter(range(0, 999, 2))
    sent: list[tuple[str, int]] = []
    send = against_server.send

    async def noted(server: Any, work: Any, *args: Any, **options: Any) -> Any:
        sent.append((server.path, len(work)))
        return await send(server, work, *args, **options)

    def processor_seconds(server: front_end.Server) -> float:
        assert float(read(server)) > 0, "the real one"
        return next(times)

    read = front_end.Server.processor_seconds
    monkeypatch.setattr(front_end.Server, "processor_seconds", processor_seconds)
    monkeypatch.setattr(against_server, "send", noted)
    assert front_end.main(SMALL) == 0
    found = json.loads(capsys.readouterr().out)
    for name, num in (("tokens", 3 * 19), ("completions", 5), ("conversations", 5)):
        assert found[f"{name}_per_processor_second"] == {
            "median": num / 2, "least": num / 2, "most": num / 2, "rounds": [num / 2] * 2
        }, name  # fmt: skip
    assert found["tokens_per_event"]["least"] >= 1
    a_round = [("/v1/completions", 3), ("/v1/completions", 5), ("/v1/chat/completions", 5)]
    assert sent == a_round * 3, "one round more than those that count"


def test_a_number_below_1_is_refused() -> None:
    with pytest.raises(ValueError, match="--streams is 0: it must be at least 1"):
        front_end.main(["--streams", "0"])
