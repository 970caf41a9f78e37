"""`nanovllm chat` and `nanovllm run`, with a model in this process and behind a server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM
from nanovllm.cli import chat_backend
from nanovllm.cli.main import run
from nanovllm.tools import command_line, terminal
from tests.cli.mock_server import serving

ROOT = Path(__file__).parents[2]
SMALL = {"device": "cpu", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 2}
QUESTION = [{"role": "user", "content": "What is 37 + 45?"}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM("tiny-qwen3", **SMALL)
    yield llm
    llm.close()


@pytest.fixture
def local(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Models of this process are `llm`. What they were made with."""
    made: list[Any] = []

    def make(model: str, **options: Any) -> LLM:
        made.append((model, options))
        return llm

    monkeypatch.setattr("nanovllm.llm.LLM", make)
    return made


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command with lines on stdin; returns (stdout, stderr)."""

    def say(words: list[str], *lines: str) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", StringIO("".join(f"{line}\n" for line in lines)))
        assert not run(words[0], words[1:])
        shown = capsys.readouterr()
        return shown.out, shown.err

    return say


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wanted(llm: LLM, messages: list[dict[str, str]]) -> str:
    params = llm.get_default_sampling_params()
    params.max_tokens, params.temperature = None, 0.0
    return str(llm.chat(messages, params, use_tqdm=False)[0]["text"])


def test_run_streams_what_chat_answers(llm: LLM, local: list[Any], say: Any) -> None:
    text = QUESTION[0]["content"]
    expected = wanted(llm, QUESTION)
    for words in (["run", text], ["run", "-"], ["run"], ["run", "tiny-qwen3"]):
        out, _ = say([*words, "--temperature", "0", "--max_model_len", "64"], text)
        assert out.rstrip("\n") == expected.rstrip("\n") and out.endswith("\n")
    assert local == [("tiny-qwen3", {"max_model_len": 64})] * 4
    with_system = [{"role": "system", "content": "Be short."}, *QUESTION]
    out, _ = say(["run", text, "--system", "Be short.", "--temperature", "0"])
    assert out.rstrip("\n") == wanted(llm, with_system).rstrip("\n")


def test_run_raw_continues_the_prompt(llm: LLM, local: list[Any], say: Any) -> None:
    params = llm.get_default_sampling_params()
    params.max_tokens, params.temperature = 7, 0.0
    (expected,) = llm.generate(["the end of"], params, use_tqdm=False)
    out, _ = say(["run", "--raw", "the end of", "--max-tokens", "7", "--temperature", "0"])
    assert out.removesuffix("\n") == expected["text"].removesuffix("\n")


def test_chat_keeps_the_conversation_and_obeys_commands(
    llm: LLM, local: list[Any], say: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    answer = chat_backend.LocalModel.answer

    def watched(self: Any, messages: Any, *writes: Any) -> None:
        asked.append([one["content"] for one in messages])
        answer(self, messages, *writes)

    monkeypatch.setattr(chat_backend.LocalModel, "answer", watched)
    lines = [
        "a b",
        "",
        "c",
        "/again",
        "/sytem x",
        "/new",
        "d",
        "/system be kind",
        "e",
        "/quit",
        "f",
    ]
    out, _ = say(["chat", "--system", "short", "--temperature", "0", "--max-tokens", "4"], *lines)
    assert "unknown command /sytem: did you mean /system?" in out
    first, second, again, new, other = asked
    assert first == ["short", "a b"] and new == ["short", "d"] and other == ["be kind", "e"]
    assert second[:2] == first and second[3] == "c" and again == second
    assert second[2] in out


def test_a_message_that_is_too_long_is_one_error_and_forgotten(local: list[Any], say: Any) -> None:
    out, err = say(["chat", "--max-tokens", "2"], "word " * 200, "a")
    assert err.startswith("\nerror: the prompt has ") and err.count("\n") == 2
    assert out.strip()


@pytest.mark.parametrize("num_pieces", [1, 3])
def test_ctrl_c_ends_the_answer_and_not_the_conversation(
    num_pieces: int, llm: LLM, local: list[Any], say: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, num = llm.stream, 0

    def interrupted(*args: Any) -> Iterator[Any]:
        nonlocal num
        for piece in stream(*args):
            num += 1
            if num == num_pieces:
                os.kill(os.getpid(), signal.SIGINT)
            yield piece

    monkeypatch.setattr(llm, "stream", interrupted)
    options = ["--ignore-eos", "--max-tokens", "9", "--temperature", "0"]
    out, err = say(["chat", *options], "a b", "/new", "a b")
    stopped, whole = out.split(" …\n")
    assert not err and num == num_pieces + 9
    assert whole.startswith(stopped) and len(whole) > len(stopped) + 1
    assert not llm.engine.has_unfinished
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_server_answers_with_the_same_words(say: Any) -> None:
    with serving(answer="wörd ") as mock:
        out, _ = say(["chat", "--url", mock.url, "--max-tokens", "3"], "a", "b")
        assert out == "wörd wörd wörd \n" * 2
        roles = [one["role"] for one in mock.bodies[1]["messages"]]
        assert roles == ["user", "assistant", "user"]
        assert mock.bodies[1]["messages"][1]["content"] == "wörd wörd wörd "
        words = ["--url", mock.url, "--max-tokens", "2", "--seed", "5", "--top-k", "3"]
        kwargs = ["--chat-template-kwargs", '{"enable_thinking": false}', "--stop", "x", "y"]
        out, _ = say(["run", "a", *words, *kwargs])
    assert out == "wörd wörd \n"
    assert mock.bodies[2] == {
        "model": "mock", "messages": [{"role": "user", "content": "a"}], "stream": True,
        "max_tokens": 2, "seed": 5, "top_k": 3, "stop": ["x", "y"],
        "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_a_server_s_reasoning_has_either_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = chat_backend.ServedModel("http://127.0.0.1:1", None, "m", {})
    event = {"delta": {name: "Hm.", "content": None}}
    monkeypatch.setattr(model, "_stream", lambda path, body, on_choice: on_choice(event))
    thoughts: list[str] = []
    model.answer(QUESTION, lambda text: None, thoughts.append)
    assert thoughts == ["Hm."]


def test_run_raw_asks_a_server_for_a_completion(say: Any) -> None:
    with serving(models=("a", "b")) as mock:
        out, _ = say(["run", "--raw", "x", "--url", mock.url, "--max-tokens", "1", "--model", "b"])
    assert out == "word \n" and mock.bodies[0]["prompt"] == "x" and mock.bodies[0]["model"] == "b"


HOSTILE = "\x1b]52;c;aGk=\x07\x1b[2J\x9b31m\rno\x08\x7f\tyes\n"


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("splits", [0, 1])
@pytest.mark.parametrize("command", ["chat", "run", "run --raw"])
def test_no_answer_controls_a_terminal(
    say: Any, monkeypatch: pytest.MonkeyPatch, command: str, splits: int
) -> None:
    words = [*command.split(), *([] if command == "chat" else ["a"])]
    shown = Terminal()
    with serving(answer=HOSTILE, splits=splits) as mock:
        monkeypatch.setattr("sys.stdout", shown)
        say([*words, "--url", mock.url, "--max-tokens", "2"], "a")
    text = shown.getvalue()
    assert all(one.isprintable() or one in "\n\t" for one in text), text
    assert text.count("\u241b]52;c;aGk=\u2407\u241b[2J\ufffd31m\u240d") == 2


def test_a_pipe_gets_what_the_model_writes(say: Any) -> None:
    with serving(answer=HOSTILE) as mock:
        out, _ = say(["run", "a", "--url", mock.url, "--max-tokens", "1"])
    assert out == HOSTILE


def test_pieces_of_a_sequence_are_replaced_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    for one in HOSTILE:
        terminal.write(one, shown)
    assert shown.getvalue() == terminal.printable(HOSTILE)


def test_no_error_of_a_server_controls_a_terminal(
    say: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"\x1b]0;hello\x07{HOSTILE}"
    monkeypatch.setattr("nanovllm.cli.http.error_text", lambda body: words)
    with serving(error_every=1) as mock:
        _, err = say(["chat", "--url", mock.url], "a")
        assert "error: the server returned 400: \u241b]0;hello\u2407" in err
        status = command_line.run(lambda: run("run", ["a", "--url", mock.url]))
    err += capsys.readouterr().err
    assert status == command_line.STATUS and "\u241b]0;hello\u2407" in err
    assert not any(one in err for one in "\x1b\x07\x9b\x7f\r\x08")


def test_errors_of_a_server_are_shown_and_the_conversation_goes_on(say: Any) -> None:
    with serving(error_every=2, broken_every=3) as mock:
        words = ["chat", "--url", mock.url, "--max-tokens", "4"]
        out, err = say(words, "a", "refused", "broken", "d")
    assert "error: the server returned 400: not this one" in err
    assert "error: the server closed the connection before the end" in err
    contents = [one["content"] for one in mock.bodies[2]["messages"]]
    assert contents == ["a", "word " * 4, "broken"], "a refused message is forgotten"
    assert out == "word " * 4 + "\n" + "word " * 3 + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", " "], "the prompt is empty"),
        (["run", "a", "--raw", "--system", "b"], "--system cannot be combined with --raw"),
        (["run", "tiny-qwen3", "a", "--api-key", "b"], "--api-key needs --url"),
        (["run", "a", "--url", "http://a", "--max-model-len", "9"],
         "--max-model-len is an engine option: not supported with --url"),
        (["run", "a", "--url", "ftp://a"], "is not a server's URL"),
        (["run", "a", "--url", "http://127.0.0.1:9", "--top-p", "2"], "top_p is 2.0"),
        (["run", "tiny-qwen3", "a", "--top-p", "2"], "top_p is 2.0"),
        (["run", "tiny-qwen3", "a", "--chat-template-kwargs", "[]"], "must be a JSON object"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(words[0], words[1:])


def test_a_key_is_taken_from_the_environment(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(api_key="secret") as mock:
        words = ["run", "a", "--url", mock.url, "--max-tokens", "1"]
        with pytest.raises(ValueError, match="401: no such key"):
            say(words)
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        assert say(words)[0] == "word \n"


def test_ctrl_c_closes_the_connection_to_a_server() -> None:
    """In a process of its own: an event loop handles the signal there."""
    with serving(itl=0.05) as mock:
        words = ["chat", "--url", mock.url, "--max-tokens", "4000"]  # 200 s
        command = [sys.executable, "-m", "nanovllm", *words]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("a\n")
            process.stdin.flush()
            assert process.stdout.read(5) == "word "
            process.send_signal(signal.SIGINT)
            wait_until(lambda: not mock.num_open)
            out, _ = process.communicate("/quit\n", timeout=60)
        assert process.returncode == 0 and out.endswith(" …\n")
        assert mock.num_events < 4000
