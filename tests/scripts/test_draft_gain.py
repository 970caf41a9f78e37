"""The benchmark of trained heads trains one and compares it with plain decoding, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.bench import draft_gain
from scripts.bench.draft_gain import Answer


def test_a_head_is_trained_and_compared(tmp_path: Path) -> None:
    out, head = tmp_path / "gain.json", tmp_path / "head"
    training = ["--steps", "4", "--num-tokens", "8", "--num-prompts", "12", "--batch", "4"]
    training += ["--num-speculative-tokens", "2", "--draft-vocab-size", "200"]
    given = ["--model", "tiny-qwen3", "--head", str(head), "--out", str(out), "--num", "2"]
    given += ["--train-minutes", "1", "--each", "1", "--tokens", "9", "--turns", "2", "--always"]
    given += ["--max-model-len", "256", "--enforce-eager", "--device", "cpu", "--", *training]
    draft_gain.main(given)
    found = json.loads(out.read_text())
    assert (head / "config.json").is_file()
    assert found["training"]["trained_steps"] == 4 and "held out" in found["training"]["right"]
    assert [one["kind"] for one in found["results"]] == ["prose", "code", "chat"]
    for one in found["results"]:
        assert one["equal_answers"] == "1 of 1" and 0 < one["tokens"] <= 9
        assert len(one["accepted_per_position"]) == 2 and len(one["gain_by_turn"]) == 2
        assert one["gain"] > 0 and one["processor_gain"] > 0


def test_gains_are_of_the_least_times_by_prompt() -> None:
    plain = [[Answer((1, 2), 2.0, 1.0), Answer((3,), 8.0, 6.0)],
             [Answer((1, 2), 4.0, 3.0), Answer((3,), 4.0, 3.0)]]  # fmt: skip
    drafts = [[Answer((1, 2), 1.0, 1.0), Answer((4,), 4.0, 3.0)],
              [Answer((1, 2), 3.0, 3.0), Answer((4,), 5.0, 3.0)]]  # fmt: skip
    assert draft_gain.gains(plain, drafts) == {
        "gain_by_turn": [2.0, 1.0], "seconds": [6.0, 5.0], "gain": 1.2,
        "processor_seconds": [4.0, 4.0], "processor_gain": 1.0, "equal_answers": "1 of 2",
        "tokens": 3,
    }  # fmt: skip
