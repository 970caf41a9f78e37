"""Batch jobs on one engine, through the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, extras
from nanovllm.batch import command, worker
from nanovllm.batch import job as job_module
from nanovllm.batch import output as output_module
from nanovllm.cli.main import run as run_command
from nanovllm.tools import command_line
from tests.engines import greedy, random_prompts

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if loud %}!{% endif %}"
PARAMS = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def run(eager_llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a job on rows (dicts, or lines as they are); returns the rows of its output."""
    monkeypatch.setattr(command, "load_engine", lambda config: eager_llm.shared)
    monkeypatch.setattr(worker, "ROWS_PER_SEQUENCE", 1)

    def main(rows: list[Any], *options: str, params: Any = PARAMS) -> list[dict[str, Any]]:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "in.jsonl").write_text("\n".join(lines))
        target = tmp_path / "out.jsonl"
        given = [str(tmp_path / "in.jsonl"), "-o", str(target), "--no-progress"]
        assert run_command("batch", [*given, "--params", json.dumps(params), *options]) == 0
        return [json.loads(line) for line in target.read_text().splitlines()]

    return main


@pytest.mark.parametrize("num", [1, 19, 99])
def test_answers_are_those_of_generate(
    num: int, run: Any, eager_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_module, "MAX_WAITING", 37)
    prompts: list[Any] = random_prompts([1 + 7 * i % 40 for i in range(num)])
    prompts[::3] = [f"the {i}" for i in range(0, num, 3)]
    rows = [{"prompt": prompt, "id": [i]} for i, prompt in enumerate(prompts)]
    wanted = eager_llm.generate(prompts, greedy(4), use_tqdm=False)
    for i, (found, output) in enumerate(zip(run(rows), wanted, strict=True)):
        assert (found["row"], found["id"]) == (i, [i])
        assert found["token_ids"] == output.token_ids and found["text"] == output.text
        assert found["finish_reason"] == "length"
        num_prompt = output.num_prompt_tokens
        assert found["usage"] == {
            "prompt_tokens": num_prompt,
            "completion_tokens": 4,
            "total_tokens": num_prompt + 4,
        }


def test_parameters_of_a_row_come_before_those_of_the_job(run: Any, eager_llm: LLM) -> None:
    rows = [{"prompt": "a", "params": {"max_tokens": 7, "logprobs": 2}}, {"prompt": "a"}]
    first, second = run(rows)
    (wanted,) = eager_llm.generate(["a"], greedy(7, logprobs=2), use_tqdm=False)
    assert first["token_ids"] == wanted.token_ids
    assert second["token_ids"] == wanted.token_ids[:4] and "logprobs" not in second
    for position, logprobs in zip(first["logprobs"], wanted.logprobs, strict=True):
        assert {one["token_id"] for one in position} == set(logprobs)
        for one in position:
            logprob = logprobs[one["token_id"]]
            assert one["logprob"] == pytest.approx(float(logprob), abs=1e-4)
            assert one["rank"] == logprob.rank


def test_messages_go_through_the_template(run: Any, eager_llm: LLM) -> None:
    options = {"chat_template": TEMPLATE, "loud": True}
    row = {"messages": [{"role": "user", "content": "the end"}]}
    bad = {"messages": [{"content": "a"}]}
    found, refused = run([row, bad], "--chat-options", json.dumps(options))
    assert "a dict with a 'role'" in refused["error"]
    (wanted,) = eager_llm.generate(["the end!"], greedy(4), use_tqdm=False)
    assert found["token_ids"] == wanted.token_ids


def test_a_raw_prompt_for_a_model_with_a_chat_template_is_said_once(
    run: Any, eager_llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = eager_llm.engine.tokenizer
    assert tokenizer is not None
    monkeypatch.setattr(tokenizer, "_derived", {})
    rows = [{"prompt": [5, 6]}, {"prompt": "<s>the"}, {"prompt": "the"}, {"prompt": "a"}]
    run(rows)
    assert "chat template" not in caplog.text, "the model has none"
    monkeypatch.setattr(tokenizer, "_derived", {})
    monkeypatch.setattr(tokenizer.for_reading, "chat_template", TEMPLATE)
    run([{"messages": [{"role": "user", "content": "a"}]}, *rows], "--overwrite")
    (said,) = [one.message for one in caplog.records if "chat template" in one.message]
    assert said.startswith("row 3 has a prompt") and "use messages for conversations" in said


def test_a_row_with_an_image_is_an_error_for_a_text_model(run: Any) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    rows = [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, image]}]},
        {"prompt": {"prompt": "a", "multi_modal_data": {"image": "x.png"}}},
        {"messages": [{"role": "user", "content": "the end"}]},
    ]
    options = {"chat_template": TEMPLATE}
    first, second, answered = run(rows, "--chat-options", json.dumps(options))
    assert "has image 1, but" in first["error"] and "accepts text only" in first["error"]
    assert "it must be text or a list of token ids" in second["error"]
    assert len(answered["token_ids"]) == 4


def test_a_bad_row_is_an_error_in_its_place(run: Any) -> None:
    bad = {
        "{bad": "not valid JSON",
        '{"prompt": ""}': "the prompt is empty",
        '{"prompt": []}': "the prompt is empty",
        '{"prompt": [5, 512]}': "token id 512 is outside the vocabulary",
        '{"prompt": [5, true]}': "token id True is outside the vocabulary",
        json.dumps({"prompt": [5] * 256}): "the prompt has 256 tokens",
        '{"prompt": "a", "id": 1e999}': "id is not a finite number",
        '{"prompt": "a", "id": {"x": [NaN]}}': "id.x[0] is not a finite number",
        '{"prompt": "\\ud800"}': "half of a surrogate pair",
        '{"prompt": "a", "params": {"foo": 1}}': "'foo', which is not a sampling parameter",
        '{"prompt": "a", "params": {"top_p": 2}}': "top_p is 2.0",
        '{"prompt": "a", "params": {"n": 2}}': "n is 2: a row has one answer",
        '{"prompt": "a", "params": {"max_tokens": "x"}}': "max_tokens is 'x'",
        '{"messages": [{"role": "user", "content": "a"}]}': "no chat template",
    }
    rows: list[Any] = []
    for text in bad:
        rows += [{"prompt": "a", "id": len(rows)}, "", text]
    found = run(rows)
    assert [row["row"] for row in found] == [i for i, row in enumerate(rows) if row]
    for answer, (error, reason) in zip(found[::2], zip(found[1::2], bad.values())):
        assert answer["id"] == answer["row"] and len(answer["token_ids"]) == 4
        assert reason in error["error"] and set(error) == {"row", "id", "error"}


def test_a_row_whose_parameters_forbid_every_token_is_an_error(run: Any, eager_llm: LLM) -> None:
    assert eager_llm.tokenizer is not None
    (token_id,) = eager_llm.tokenizer.encode("q", add_special_tokens=False)
    forbidding = {"allowed_token_ids": [token_id], "bad_words": ["q"]}
    good, bad = run([{"prompt": "a"}, {"prompt": "a", "params": forbidding}])
    assert len(good["token_ids"]) == 4
    assert "token" in bad["error"] and "text" not in bad


def test_a_job_that_was_cut_anywhere_goes_on(run: Any, tmp_path: Path) -> None:
    """With drawn seeds: they depend on the row, not on what the engine has answered before."""
    rows = [{"prompt": [5 + i, 7]} if i % 4 else "" for i in range(19)]
    params = {"max_tokens": 2, "temperature": 1}
    wanted, target = run(rows, params=params), tmp_path / "out.jsonl"
    whole = target.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in (0, 1, ends[0] - 1, ends[0], ends[0] + 1, ends[5], ends[-1] - 1, ends[-1]):
        target.write_bytes(whole[:size])
        assert run(rows, params=params) == wanted, size
        assert target.read_bytes() == whole


def test_a_finished_job_loads_nothing(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run([{"prompt": "a"}])
    monkeypatch.setattr(command, "load_engine", None)
    run([{"prompt": "a"}], "--data-parallel-size", "2")  # another number of replicas may go on
    assert "0 of 1 rows written after 1 from earlier runs, 0 left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "rows", "options"),
    [
        ("input", [{"prompt": "b"}], []),
        ("model", [{"prompt": "a"}], ["--model", "tiny-mixtral"]),
        ("params", [{"prompt": "a"}], ["--params", '{"top_k": 3}']),
        ("chat_options", [{"prompt": "a"}], ["--chat-options", '{"chat_template": "x"}']),
        ("options", [{"prompt": "a"}], ["--seed", "3"]),
    ],
)
def test_another_job_is_refused_unless_it_overwrites(
    name: str, rows: list[Any], options: list[str], run: Any, tmp_path: Path
) -> None:
    run([{"prompt": "a"}])
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"was written with a different {name}"):
        run(rows, *options)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert len(run(rows, *options, "--overwrite")) == 1
    assert len(run(rows, *options)) == 1


def test_an_output_with_a_missing_line_is_refused(run: Any, tmp_path: Path) -> None:
    rows, target = [{"prompt": "a"}] * 5, tmp_path / "out.jsonl"
    run(rows)
    lines = target.read_bytes().splitlines(keepends=True)
    target.write_bytes(b"".join(lines[:1] + lines[2:4]))
    with pytest.raises(ValueError, match=r"has 3 rows up to row 3, but the input has 4"):
        run(rows)


def test_an_input_that_changes_is_an_error(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = iter([(1, 1), (1, 2)])
    monkeypatch.setattr(job_module.Job, "_source_state", lambda self: next(states))
    with pytest.raises(ValueError, match="has changed during the job"):
        run([{"prompt": "a"}])


@pytest.mark.parametrize(
    ("stop", "status"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)], ids=["Ctrl-C", "TERM"]
)
def test_a_job_that_is_stopped_goes_on_later(
    run: Any,
    eager_llm: LLM,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stop: BaseException,
    status: int,
) -> None:
    rows = [{"prompt": [5 + i, 7]} for i in range(99)]
    wanted = run(rows)
    advance, calls = eager_llm.engine.advance, []

    def interrupted() -> Any:
        calls.append(None)
        if len(calls) == 9:
            raise stop
        return advance()

    monkeypatch.setattr(eager_llm.engine, "advance", interrupted)
    with pytest.raises(AssertionError, match=f"{status} == 0"):
        run(rows, "--overwrite")
    assert not eager_llm.engine.has_unfinished
    assert "run the same command to resume" in capsys.readouterr().err
    assert run(rows) == wanted


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--replicas", "0"], "--replicas is 0: it must be at least 1"),
        (["--params", "[1]"], r"params is \[1\]: it must be a JSON object"),
        (["--params", '{"foo": 1}'], "'foo', which is not a sampling parameter"),
        (["--params", '{"n": 2}'], "n is 2: a row has one answer"),
        (["--chat-options", '{"add_generation_prompt": 1}'], "add_generation_prompt is 1"),
        (["--no-ray", "--ray-address", "auto"], "--no-ray cannot be combined with --ray-address"),
        (["--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["--lora-modules", "a=/a"], "--lora-modules needs --enable-lora"),
        (["--lora-modules", "a", "--enable-lora"], "--lora-modules has 'a': each must be another"),
        (["--lora-modules", "a=/no", "--enable-lora"], "'a': /no/adapter_config.json cannot be"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    options: list[str], reason: str, run: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        run([{"prompt": "a"}], *options)
    assert not (tmp_path / "out.jsonl").exists()


def test_the_input_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("{}\n")
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ValueError, match="is the input"):
        run_command("batch", [str(path), "-o", str(tmp_path / "link"), "--overwrite"])
    with pytest.raises(ValueError, match="is not a file"):
        run_command("batch", [str(tmp_path / "none"), "-o", str(tmp_path / "out")])
    assert path.read_text() == "{}\n"


def test_without_ray_several_replicas_are_refused_with_the_command(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    status = command_line.run(lambda: run([{"prompt": "a"}], "--replicas", "2") and None)
    assert status == 2 and extras.install("ray") in capsys.readouterr().err
    assert len(run([{"prompt": "a"}], "--replicas", "2", "--no-ray")) == 1


def test_a_killed_process_loses_and_doubles_nothing(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": f"{i} + 1 =", "id": i} for i in range(500)]
    source.write_text("\n".join(map(json.dumps, rows)))
    words = ["--params", '{"max_tokens": 2, "temperature": 0}', "--enforce-eager", "--no-progress"]
    line = [sys.executable, "-m", "nanovllm", "batch", str(source), "-o", str(target), *words]
    line += ["--device", "cpu", "--max-num-seqs", "8"]
    job = subprocess.Popen(line, cwd=ROOT)
    deadline = time.monotonic() + 120
    while not (target.exists() and target.read_bytes().count(b"\n") > 40):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    before = target.read_bytes()
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "from earlier runs, 0 left; 0 errors" in done.stdout
    num_kept = before.rfind(b"\n") + 1
    assert target.read_bytes()[:num_kept] == before[:num_kept]
    found = [json.loads(one) for one in target.read_text().splitlines()]
    assert [row["id"] for row in found] == list(range(500))
