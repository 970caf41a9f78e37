"""Which word of `nanovllm run` is the model, which the prompt; --json, files, and input."""

from __future__ import annotations

import base64
import json
import os
import pty
import select
import stat
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from nanovllm.cli import attach, chat, chat_backend
from nanovllm.cli.input_lines import Input
from nanovllm.cli.main import run
from tests.cli.mock_server import Mock, serving

ROOT = Path(__file__).parents[2]
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
TRIPLE = '"""'


class Fake:
    """A model that answers with what it was asked. asked: all questions."""

    has_template = True

    def __init__(self, model: str | None) -> None:
        self.model = model
        self.asked: list[Any] = []

    def answer(self, messages: Any, write: Any, think: Any) -> None:
        self.asked.append([one["content"] for one in messages])
        write("yes")

    def complete(self, prompt: str, write: Any) -> None:
        self.asked.append(prompt)
        write("more")

    def ask(self, asked: Any) -> chat_backend.Reply:
        self.asked.append(asked)
        return chat_backend.Reply(str(self.model), "yes \x9b", "", "stop", 3, 2)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    """The models that commands have opened, all of them fakes. Stdin has a question."""
    models: list[Fake] = []

    def open_model(args: Any) -> Fake:
        models.append(Fake(args.model))
        return models[-1]

    monkeypatch.setattr(chat_backend, "open_model", open_model)
    monkeypatch.setattr("sys.stdin", StringIO("from stdin"))
    return models


@pytest.mark.parametrize(
    ("words", "model", "prompt"),
    [
        (["tiny-qwen3", "What is 1?"], "tiny-qwen3", "What is 1?"),
        (["tiny-qwen3", "What", "is", "1?"], "tiny-qwen3", "What is 1?"),
        (["tiny-qwen3", "--max-tokens", "9", "Hello"], "tiny-qwen3", "Hello"),
        (["tiny-qwen3", "--", "-b is an option"], "tiny-qwen3", "-b is an option"),
        (["tiny-qwen3"], "tiny-qwen3", "from stdin"),
        (["a/b"], "a/b", "from stdin"),
        (["a/b", "-"], "a/b", "from stdin"),
        (["./here", "Hello"], "./here", "Hello"),
        (["What is 1?"], None, "What is 1?"),
        ([], None, "from stdin"),
        (["-"], None, "from stdin"),
        (["Hello", "--model", "a/b"], "a/b", "Hello"),
        (["a/b", "--model", "a/b"], "a/b", "from stdin"),
        (["a/b", "Hello", "--model", "a/b"], "a/b", "Hello"),
        (["Hello", "--url", "http://a"], None, "Hello"),
        (["mock", "Hello", "--url", "http://a"], "mock", "Hello"),
        (["tiny-qwen3", "--url", "http://a"], "tiny-qwen3", "from stdin"),
    ],
)
def test_the_model_comes_first(
    words: list[str], model: str | None, prompt: str, opened: list[Fake]
) -> None:
    assert not run("run", words)
    (found,) = opened
    assert (found.model, found.asked) == (model, [[prompt]])


def test_a_folder_is_a_model(
    opened: list[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my model").mkdir()
    monkeypatch.chdir(tmp_path)
    run("run", ["my model"])
    assert opened[0].model == "my model"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny-qwen"], "'tiny-qwen' is neither an embedded model .* run MODEL 'tiny-qwen'"),
        (["What", "is", "1?"], "'What' is neither .*: use nanovllm run MODEL 'What is 1\\?'"),
        (["a/b", "Hello", "--model", "c/d"], "MODEL is 'a/b', but --model is 'c/d'"),
        (["a/b", "Hello", "--raw", "--file", "x"], "--file cannot be combined with --raw"),
        (["a/b", "Hello", "--file", "/no/such"], "there is no file '/no/such'"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_refused_with_the_right_command(
    words: list[str], message: str, opened: list[Fake]
) -> None:
    with pytest.raises(ValueError, match=message):
        run("run", words)
    assert not opened


class TerminalIn(StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_prompt_a_terminal_is_a_chat(
    opened: list[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", TerminalIn("one\ntwo\n"))
    run("run", ["a/b", "--system", "short"])
    assert opened[0].asked == [["short", "one"], ["short", "one", "yes", "two"]]
    for option in ("--json", "--raw"):
        with pytest.raises(ValueError, match="there is no prompt: use nanovllm run MODEL PROMPT"):
            run("run", ["a/b", option])


# --json -------------------------------------------------------------------------------------------


def test_an_answer_as_json(
    opened: list[Fake], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("run", ["a/b", "Hello", "--json", "--system", "short"])
    assert opened[0].asked[0][1] == {"role": "user", "content": "Hello"}
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {
        "text": "yes \x9b", "finish_reason": "stop", "model": "a/b",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }  # fmt: skip
    run("run", ["a/b", "Hello", "--json", "--raw"])
    assert opened[1].asked == ["Hello"]


@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_an_answer_of_a_server_as_json(raw: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as mock:
        run("run", ["mock", "abc", "--url", mock.url, "--max-tokens", "2", "--json", *raw])
    found = json.loads(capsys.readouterr().out)
    num = 3 if raw else 0  # the server counts characters of prompts
    usage = {"prompt_tokens": num, "completion_tokens": 2, "total_tokens": num + 2}
    assert found == {
        "text": "word word ", "finish_reason": "length", "usage": usage, "model": "mock"
    }  # fmt: skip


# files --------------------------------------------------------------------------------------------


def test_a_text_stands_before_the_message_and_an_image_is_a_part(tmp_path: Path) -> None:
    text, image = tmp_path / "notes.txt", tmp_path / "dot.png"
    text.write_text("one\ntwo\n")
    image.write_bytes(PIXEL)
    parts = [attach.read(str(text))]
    assert attach.content("Why?", parts) == "notes.txt:\n\none\ntwo\n\nWhy?"
    parts.append(attach.read(str(image)))
    url = "data:image/png;base64," + base64.b64encode(PIXEL).decode()
    assert attach.content("Why?", parts)[1:] == [
        {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Why?"}
    ]  # fmt: skip


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"a\0b"])
def test_a_file_that_cannot_be_attached_is_named(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"data.bin' is neither an image nor text in UTF-8"):
        attach.read(str(path))
    with pytest.raises(ValueError, match="is not a file"):
        attach.read(str(tmp_path))


def test_a_file_that_is_too_large_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long.txt"
    path.write_text("abcd")
    monkeypatch.setattr(attach, "MAX_BYTES", 3)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("it was read"))
    with pytest.raises(ValueError, match="has 4 bytes: at most 3 can be attached"):
        attach.read(str(path))


def test_files_of_a_conversation(
    opened: list[Fake],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"text of {name}")
    lines = ["one", "/file /no/such", f"/file {tmp_path / 'b'}", "two", "three"]
    monkeypatch.setattr("sys.stdin", StringIO("\n".join(lines)))
    run("chat", ["a/b", "--file", str(tmp_path / "a")])
    first, _, second, _, third = opened[0].asked[-1]
    assert first == "a:\n\ntext of a\n\none"
    assert second == "b:\n\ntext of b\n\ntwo" and third == "three"
    assert "error: there is no file '/no/such'" in capsys.readouterr().err


def test_run_sends_a_file(opened: list[Fake], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("text of a")
    run("run", ["a/b", "Why?", "--file", str(tmp_path / "a")])
    assert opened[0].asked == [["a:\n\ntext of a\n\nWhy?"]]


# messages of several lines ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{TRIPLE}a\n b\n{TRIPLE}\nc\n", ["a\n b", "c"]),
        (f"{TRIPLE}a{TRIPLE}\nc\n", ["a", "c"]),
        (f"{TRIPLE}\na\n/quit\n\nb {TRIPLE}\n", ["a\n/quit\n\nb"]),
        (f"{TRIPLE}a\nb", ["a\nb"]),
        (f'{TRIPLE}\n"" x\n{TRIPLE}', ['"" x']),
    ],
)
def test_lines_between_triple_quotes_are_one_message(
    text: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", StringIO(text))
    source = Input(has_history=True)
    assert [source.read() for _ in expected] == expected
    with pytest.raises(EOFError):
        source.read()


def test_a_message_of_several_lines_is_no_command(
    opened: list[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", StringIO(f"{TRIPLE}/quit\nx{TRIPLE}\n"))
    run("chat", ["a/b"])
    assert opened[0].asked == [["/quit\nx"]]
    assert chat.USAGE


class Session:
    """`nanovllm chat` in a terminal, with a made-up server."""

    def __init__(self, mock: Mock, home: Path, *options: str) -> None:
        self._mock, self._shown = mock, b""
        self._own, theirs = pty.openpty()
        words = ["chat", "--url", mock.url, "--max-tokens", "1", *options]
        variables = {**os.environ, "XDG_STATE_HOME": str(home), "TERM": "xterm"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nanovllm", *words],
            cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=variables,
        )  # fmt: skip
        os.close(theirs)

    def __enter__(self) -> Session:
        self._until(b"> ")
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._own, b"/quit\r")
        self._until(None)
        os.close(self._own)
        assert self._process.wait(30) == 0

    def send(self, keys: bytes) -> str:
        """Type; the message that the server gets."""
        num = len(self._mock.bodies)
        os.write(self._own, keys)
        self._until(b"word ")
        self._until(b"> ")
        assert len(self._mock.bodies) == num + 1
        return str(self._mock.bodies[-1]["messages"][-1]["content"])

    def _until(self, text: bytes | None) -> None:
        """Read until a text is shown; None: until the end."""
        deadline = time.monotonic() + 60
        while text is None or text not in self._shown:
            assert time.monotonic() < deadline, self._shown
            if not select.select([self._own], [], [], 1)[0]:
                continue
            try:
                data = os.read(self._own, 4096)
            except OSError:  # Linux says so at the end
                data = b""
            if not data:
                assert text is None, self._shown
                return
            self._shown += data
        self._shown = self._shown.partition(text)[2]


def test_pasted_lines_are_one_message_and_inputs_are_kept(tmp_path: Path) -> None:
    readline = pytest.importorskip("readline")
    if "libedit" in (readline.__doc__ or ""):
        pytest.skip("libedit has no bracketed paste")
    path = tmp_path / "nanovllm" / "history"
    with serving() as mock:
        with Session(mock, tmp_path, "--no-history") as session:
            assert session.send(b"hello\r") == "hello"
        assert not path.exists()
        with Session(mock, tmp_path) as session:
            assert session.send(b"\x1b[200~one\rtwo\x1b[201~\r").splitlines() == ["one", "two"]
            assert session.send(b"kept\r") == "kept"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        path.chmod(0o644)
        with Session(mock, tmp_path) as session:
            # up: /quit, which ended the last session, and the message before it
            assert session.send(b"\x1b[A\x1b[A\r") == "kept"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_history_that_cannot_be_kept_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "nanovllm").write_text("no folder")
    with serving() as mock, Session(mock, tmp_path) as session:
        assert session.send(b"hello\r") == "hello"


def test_a_history_follows_no_link(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("precious\n")
    (tmp_path / "nanovllm").mkdir(mode=0o700)
    (tmp_path / "nanovllm" / "history").symlink_to(other)
    with serving() as mock, Session(mock, tmp_path) as session:
        assert session.send(b"hello\r") == "hello"
    assert other.read_text() == "precious\n"


# the model of this process ------------------------------------------------------------------------


def test_a_model_here_sees_an_image_and_counts_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pillow = pytest.importorskip("PIL.Image")
    pillow.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "red.png")
    words = ["tiny-qwen3-vl", "What colour?", "--json", "--max-tokens", "3", "--temperature", "0"]
    options = [
        "--device",
        "cpu",
        "--enforce-eager",
        "--max-model-len",
        "256",
        "--max-num-seqs",
        "1",
    ]
    usages = []
    for file in ([], ["--file", str(tmp_path / "red.png")]):
        run("run", [*words, *file, *options])
        found = json.loads(capsys.readouterr().out)
        assert found["model"] == "tiny-qwen3-vl" and found["text"]
        assert found["finish_reason"] in ("stop", "length")
        usages.append(found["usage"])
    without, having = usages
    assert 0 < having["completion_tokens"] <= 3
    assert having["prompt_tokens"] > without["prompt_tokens"], "the image has tokens"
