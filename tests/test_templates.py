"""Chat templates are code of strangers: what they do ends, and nothing else suffers."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nanovllm import templates
from nanovllm.config import EngineConfig
from nanovllm.confined import Confined
from nanovllm.prompts import PromptTooLong
from nanovllm.replicas import child_config
from nanovllm.templates import Renderer
from tests.api.mock_api_server import served

ROOT = Path(__file__).parents[1]
USER = [{"role": "user", "content": "hi"}]
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
LOOP = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)
# equal lists of lists of lists, which Python compares without running any of its bytecode
EQUAL = (
    "{% set n = namespace(a=[1], b=[1]) %}"
    "{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}"
    "{{ n.a == n.b }}"
)
TOO_SLOW = {
    "nested loops": LOOP,
    "one operation": EQUAL,
    "sum": "{% for a in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
}
TOO_LARGE = {
    "text": "{{ 'a' * 10 ** 10 }}",
    "text of a variable": "{% set n = messages | length %}{{ 'a' * (n * 10 ** 10) }}",
    "list": "{{ [0] * 10 ** 10 }}",
    "width": "{{ '%2100000000d' | format(1) }}",
    "filter": "{{ 'a' | center(10 ** 10) }}",
    "doubled": "{% set n = namespace(x='a') %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
}
REFUSED = {
    "range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "change": "{{ messages.append(1) }}",
    "import": "{% import 'os' as os %}",
    "file": "{% include '/etc/passwd' %}",
    "error": "{{ raise_exception('no' * 10000) }}",
}


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    renderer = Renderer()
    yield renderer
    renderer.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "CPU_S", 0.3)


def render(renderer: Renderer, template: str, **options: Any) -> str:
    return renderer.render(template, USER, options, {}, None)


@pytest.mark.parametrize("template", TOO_SLOW.values(), ids=TOO_SLOW)
def test_what_never_ends_is_ended(renderer: Renderer, template: str, impatient: None) -> None:
    with pytest.raises(ValueError, match=r"longer than 0\.3 s of processor time"):
        render(renderer, template)
    assert render(renderer, PLAIN) == "[user]hi", "other templates go on"


def test_what_loops_without_messages_is_tried_once(renderer: Renderer, impatient: None) -> None:
    started: list[int] = []
    start = renderer._start

    def counted() -> None:
        started.append(1)
        start()

    renderer._start = counted  # type: ignore[method-assign]
    try:
        for _ in range(3):
            with pytest.raises(ValueError, match="processor time"):
                renderer.facts(LOOP, {})
        assert len(started) == 1
    finally:
        del renderer._start  # type: ignore[method-assign]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
@pytest.mark.parametrize("template", TOO_LARGE.values(), ids=TOO_LARGE)
def test_what_takes_all_memory_is_refused(renderer: Renderer, template: str) -> None:
    with pytest.raises(ValueError, match=r"too much memory|Memory|memory"):
        render(renderer, template)
    assert render(renderer, PLAIN) == "[user]hi"


@pytest.mark.parametrize("template", REFUSED.values(), ids=REFUSED)
def test_the_sandbox_is_that_of_transformers(renderer: Renderer, template: str) -> None:
    with pytest.raises(ValueError, match="the chat template") as caught:
        render(renderer, template)
    assert len(str(caught.value)) < 3000
    assert render(renderer, PLAIN) == "[user]hi"


def test_a_text_that_is_too_long_stays_in_the_process(renderer: Renderer) -> None:
    template = "{{ 'a' * 10 ** 8 }}"
    with pytest.raises(PromptTooLong, match="100000000 characters in its template: the limit is 9"):
        renderer.render(template, USER, {}, {}, 9)
    assert renderer.render(PLAIN, USER, {}, {}, 8) == "[user]hi"


def test_any_text_comes_back_as_it_is(renderer: Renderer) -> None:
    for text in ("", "a\n\r\n\tb", "naïve 日本語 🙂", "\ud83d", "\x00\x1b\ufdd0", "x" * 10**6):
        messages = [{"role": "user", "content": text}]
        assert renderer.render("{{ messages[0].content }}", messages, {}, {}, None) == text


def test_values_without_a_form_in_json_are_named(renderer: Renderer) -> None:
    with pytest.raises(ValueError, match="a value of the type object"):
        render(renderer, "{{ x }}", x=object())
    assert render(renderer, "{{ x }}", x=(1, {2})) == "[1, [2]]"


def test_threads_get_the_texts_of_their_own_conversations(renderer: Renderer) -> None:
    def work(number: int) -> bool:
        messages = [{"role": "user", "content": str(number)}]
        return renderer.render(PLAIN, messages, {}, {}, None) == f"[user]{number}"

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(200)))


def test_many_templates_are_forgotten_and_read_again(renderer: Renderer) -> None:
    for _ in range(2):
        for number in range(templates.MAX_TEMPLATES + 5):
            assert render(renderer, f"{number}{PLAIN}") == f"{number}[user]hi"
            renderer.facts(f"{number}{PLAIN}", {})
    assert len(renderer._facts) <= templates.MAX_TEMPLATES
    assert len(renderer._numbers) <= templates.MAX_TEMPLATES


def test_an_answer_after_ctrl_c_is_not_that_of_another_conversation(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Confined) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Confined, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render(renderer, PLAIN)
    assert render(renderer, "other") == "other"


def test_a_process_that_was_killed_starts_again(renderer: Renderer) -> None:
    render(renderer, PLAIN)
    process = renderer._program.process
    assert process is not None
    process.kill()
    process.wait()
    assert not renderer.is_ready
    assert render(renderer, PLAIN) == "[user]hi"
    assert renderer.is_ready


def _killed_before_requests(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is killed before each of the next requests to it."""
    send, left = Confined.send, [None] * count

    def killed(self: Confined, message: Any) -> None:
        if left:
            left.pop()
            assert self.process is not None
            self.process.kill()
            self.process.wait()
        send(self, message)

    monkeypatch.setattr(Confined, "send", killed)


def test_a_conversation_is_rendered_though_its_process_is_killed(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    render(renderer, PLAIN)
    _killed_before_requests(1, monkeypatch)
    assert render(renderer, PLAIN) == "[user]hi"


def test_a_process_that_is_killed_twice_is_an_error(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    render(renderer, PLAIN)
    _killed_before_requests(2, monkeypatch)
    with pytest.raises(ValueError, match="the process of the chat template was killed"):
        render(renderer, PLAIN)
    assert render(renderer, PLAIN) == "[user]hi"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_process_ends_with_the_one_that_uses_it(how: signal.Signals) -> None:
    code = (
        "from nanovllm.templates import renderer as r; import time; r.start()\n"
        "print(r.render('x', [{}], {}, {}, None), r._program.process.pid, flush=True)\n"
        "time.sleep(600)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        text, pid = process.stdout.readline().split()
        assert text == "x"
        process.send_signal(how)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and _state(pid) != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _state(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_a_forked_process_has_a_process_of_its_own(renderer: Renderer) -> None:
    code = (
        "import os; from nanovllm.templates import renderer as r\n"
        "def ask(text):\n"
        "    return r.render('{{ messages[0].content }}', [{'content': text}], {}, {}, 9)\n"
        "ask('a'); first = r._program.process.pid; pid = os.fork()\n"
        "ok = all(ask(str(pid)[:9]) == str(pid)[:9] for _ in range(200))\n"
        "ok &= (r._program.process.pid == first) == bool(pid)\n"
        "if not pid: r.close(); os._exit(not ok)\n"
        "assert os.waitpid(pid, 0)[1] == 0 and ok"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_a_server_with_a_template_that_loops_starts_and_refuses_conversations(
    impatient: None,
) -> None:
    with served(template=LOOP) as server:
        assert server.http.get("/ready").status_code == 200
        answer = server.http.post("/v1/chat/completions", json={"messages": USER})
        assert answer.status_code == 400 and "processor time" in answer.text
        answer = server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
        assert answer.status_code == 200


def test_a_server_goes_on_while_a_template_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "CPU_S", 0.5)
    loops = "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}" + PLAIN
    with served(template=loops) as server:

        def ask(text: str) -> int:
            messages = [{"role": "user", "content": text}]
            body = {"messages": messages, "max_tokens": 1}
            return server.http.post("/v1/chat/completions", json=body).status_code

        assert ask("a") == 200
        threads = [threading.Thread(target=ask, args=("loop",)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ask("a") == 200


def test_prompts_are_those_of_transformers() -> None:
    """Through the whole of `render`, with the embedded models."""
    from nanovllm.chat import ChatOptions
    from nanovllm.chat import render as whole
    from nanovllm.hub import EMBEDDED

    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": " two\n lines ", "name": None},
        {"role": "assistant", "content": "<think>\nx\n</think>\n\nfine"},
        {"role": "user", "content": "[x] < y && z > 1 | {{ a }}"},
    ]
    for model in EMBEDDED:
        tokenizer = child_config.tokenizer(EngineConfig(model))
        assert tokenizer is not None
        full = tokenizer.for_reading
        (prompt,) = whole(tokenizer, messages, ChatOptions())
        text = full.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert prompt.text == text
        assert prompt.token_ids == full.encode(text, add_special_tokens=False)


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_the_process_has_no_keys_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "hidden-key")
    renderer = Renderer()
    try:
        render(renderer, PLAIN)
        assert renderer._program.process is not None
        found = Path(f"/proc/{renderer._program.process.pid}/environ").read_bytes()
    finally:
        renderer.close()
    assert b"PYTHONPATH" in found and b"hidden-key" not in found
