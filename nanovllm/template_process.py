"""The program of a process that renders chat templates (`python -m`): a template is untrusted code,
which can loop forever or produce a text of any size. An operation such as 'a' * 10**10 cannot be
interrupted within a process. So the operating system limits the memory of this process and ends it
once a rendering has used too much processor time. The sandbox is that of transformers, an
ImmutableSandboxedEnvironment of Jinja.

Requests and answers are frames: the length in 8 bytes, little endian, then the content. A request
is JSON; the first byte of an answer says what follows.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from typing import Any

from nanovllm import programs

MEMORY_BYTES = 1 << 30  # in addition to the memory at start-up
MAX_ERROR_CHARS = 2000
HEAD_BYTES = 8
# the first byte of an answer: a text; its length, which is too long; facts, as JSON; an error
TEXT, TOO_LONG, FACTS, ERROR = b"t", b"l", b"f", b"e"
PROBE = "nanovllm-probe"  # a content that no template writes by itself


def read(fd: int) -> bytes | None:
    """The next frame; None at the end."""
    head = read_exactly(fd, HEAD_BYTES)
    return None if head is None else read_exactly(fd, int.from_bytes(head, "little"))


def read_exactly(fd: int, num_bytes: int) -> bytes | None:
    found = os.read(fd, min(num_bytes, 1 << 20)) if num_bytes else b""
    if len(found) == num_bytes:  # the usual case
        return found
    pieces, num_left = [found], num_bytes - len(found)
    while num_left and pieces[-1]:
        pieces.append(os.read(fd, min(num_left, 1 << 20)))
        num_left -= len(pieces[-1])
    return None if num_left else b"".join(pieces)


def write(fd: int, *parts: bytes) -> None:
    """Write a frame."""
    left = memoryview(b"".join((sum(map(len, parts)).to_bytes(HEAD_BYTES, "little"), *parts)))
    while left:
        left = left[os.write(fd, left) :]


def variables(template: str) -> list[str]:
    """The variables that a template reads. Raises TemplateSyntaxError."""
    from jinja2 import meta, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block {% generation %}, which transformers defines."""

        tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(extensions=[Generation, "jinja2.ext.loopcontrols"])
    return sorted(meta.find_undeclared_variables(environment.parse(template)))


def answer(templates: dict[int, str], request: dict[str, Any]) -> tuple[bytes, bytes]:
    """The kind of an answer, and its content. A request defines a template or uses one."""
    from jinja2 import TemplateSyntaxError

    number = request["template"]
    try:
        if "source" in request:
            templates[number] = source = request["source"]
            facts = [variables(source), writes_text(source, request["tokens"])]
            return FACTS, json.dumps(facts).encode()
        text = rendered(templates[number], [request["messages"]], **request["options"])
    except TemplateSyntaxError as error:
        return ERROR, _cut(f"the chat template cannot be read: {error}")
    except MemoryError:
        return ERROR, b"the chat template needs too much memory for these messages"
    except Exception as error:  # a template's code can raise any
        return ERROR, _cut(f"the chat template refuses these messages: {error}")
    if request["max_chars"] is not None and len(text) > request["max_chars"]:
        return TOO_LONG, str(len(text)).encode()
    return TEXT, text.encode("utf-8", "surrogatepass")


def rendered(template: str, conversations: list[Any], **options: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    found: Any = render_jinja_template(
        conversations=conversations, chat_template=template, **options
    )
    return str(found[0][0])


def writes_text(template: str, tokens: dict[str, Any]) -> bool:
    """Whether the template writes a content that is a string. Some write only lists of parts."""
    try:
        return PROBE in rendered(template, [[{"role": "user", "content": PROBE}]], **tokens)
    except MemoryError:
        raise
    except Exception:  # a template may require a system message: assume text, as usual
        return True


def _cut(text: str) -> bytes:
    return text[:MAX_ERROR_CHARS].encode("utf-8", "replace")


def _limit_memory() -> None:
    """Limit the growth of the address space, where the system can."""
    if sys.platform == "linux":
        import resource

        with contextlib.suppress(ValueError, OSError):  # a lower limit is already set
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[0]) * resource.getpagesize()
            most = used + MEMORY_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _limit_time(seconds: float) -> None:
    """End this process once it has used this much more processor time; 0: no limit."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def main() -> None:
    programs.begin()
    source, target = os.dup(0), int(sys.argv[-1])
    sys.modules["torch"] = None  # type: ignore[assignment]  # transformers would import it
    import transformers.utils.chat_template_utils  # noqa: F401

    _limit_memory()
    templates: dict[int, str] = {}
    while (data := read(source)) is not None:
        request = json.loads(data)
        _limit_time(request["cpu_s"])
        kind, content = answer(templates, request)
        _limit_time(0)
        write(target, kind, content)


if __name__ == "__main__":
    main()
