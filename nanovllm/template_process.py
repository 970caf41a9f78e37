"""The program of a process that renders chat templates (`python -m`): a template is untrusted code,
which can loop forever or produce a text of any size. An operation such as 'a' * 10**10 cannot be
interrupted within a process. So the operating system limits the memory of this process and ends it
once a rendering has used too much processor time. The sandbox is that of transformers, an
ImmutableSandboxedEnvironment of Jinja.

Requests and answers go through `confined.py`.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import Any

from nanovllm import confined, programs

MEMORY_BYTES = 1 << 30  # in addition to the memory at start-up
MAX_ERROR_CHARS = 2000
PROBE = "nanovllm-probe"  # a content that no template writes by itself


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


def answer(templates: dict[int, str], request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request, which defines a template or uses one: facts, a text, the length of
    one that is too long, or an error."""
    from jinja2 import TemplateSyntaxError

    number = request["template"]
    try:
        if "source" in request:
            templates[number] = source = request["source"]
            return {"facts": [variables(source), writes_text(source, request["tokens"])]}
        text = rendered(templates[number], [request["messages"]], **request["options"])
    except TemplateSyntaxError as error:
        return _refusal(f"the chat template cannot be read: {error}")
    except MemoryError:
        return _refusal("the chat template needs too much memory for these messages")
    except Exception as error:  # a template's code can raise any
        return _refusal(f"the chat template refuses these messages: {error}")
    if request["max_chars"] is not None and len(text) > request["max_chars"]:
        return {"num_chars": len(text)}
    return {"text": text}


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


def _refusal(text: str) -> dict[str, Any]:
    return {"error": text[:MAX_ERROR_CHARS].encode("utf-8", "replace").decode()}


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
    sys.modules["torch"] = None  # type: ignore[assignment]  # transformers would import it
    import transformers.utils.chat_template_utils  # noqa: F401

    _limit_memory()
    templates: dict[int, str] = {}
    while (request := confined.request()) is not None:
        _limit_time(request["cpu_s"])
        found = answer(templates, request)
        _limit_time(0)
        confined.answer(found)


if __name__ == "__main__":
    main()
