"""The page in a browser, against a small server: chat, stop, edit, charts, states, keys, images;
and one picture through the command's server with the embedded model that sees."""

from __future__ import annotations

import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from nanovllm.api.page import FOLDER, HEADERS, POLICY, files
from nanovllm.hub import SEEING
from tests.api.command_server import command_server
from tests.api.page_server import MARKDOWN, PageServer

Open = Callable[..., Page]
WAIT_MS = 20_000  # for what takes milliseconds on a machine that is not busy
expect.set_options(timeout=WAIT_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium")
    assert program is not None, "Chromium is missing: apt-get install chromium"
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[PageServer]:
    server = PageServer()
    yield server
    server.end()


@pytest.fixture
def open_page(browser: Browser, server: PageServer) -> Iterator[Open]:
    """Opens the page of the small server."""
    with opening(browser, server.start()) as open_page:
        yield open_page


@contextmanager
def opening(browser: Browser, url: str) -> Iterator[Open]:
    """Opens the page. At the end, nothing in it may have failed or gone to another server."""
    problems: list[str] = []
    contexts = []

    def open_page(width: int = 1280, height: int = 800, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on(
            "request",
            lambda one: one.url.startswith((url, "data:", "blob:")) or problems.append(one.url),
        )
        page.on(
            "console", lambda said: "Security Policy" in said.text and problems.append(said.text)
        )
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def ask(page: Page, text: str) -> None:
    expect(page.locator("#status")).to_have_text("ready")
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def png(width: int, height: int) -> bytes:
    """A grey picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = b"".join(b"\x00" + bytes([128]) * width for _ in range(height))
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.browser
def test_a_turn_streams_an_answer_and_shows_its_speed(open_page: Open, server: PageServer) -> None:
    page = open_page()
    expect(page.locator("#model")).to_have_text("tiny-qwen3")
    server.waits = True
    ask(page, "Say hello")
    answer = page.locator(".answer")
    expect(answer.locator(".text")).to_have_text("Hello")
    page.wait_for_timeout(10)  # words that arrive at once have no rate
    server.goes_on.set()
    expect(answer.locator(".text")).to_have_text("Hello from the server.")
    expect(answer.locator(".stats")).to_have_text(
        re.compile(r"^4 tokens · [\d.,]+ tokens/s · first token after \d+ ms$")
    )
    ask(page, "And again")
    expect(page.locator(".answer .actions").nth(1)).to_be_visible()
    assert [len(body["messages"]) for body in server.bodies] == [1, 3]
    assert server.bodies[1]["messages"][1] == {
        "role": "assistant",
        "content": "Hello from the server.",
    }


@pytest.mark.browser
def test_markup_of_an_answer_is_shown_and_nothing_of_it_runs(open_page: Open) -> None:
    page = open_page()
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    ask(page, "Write a list")
    text = page.locator(".answer .text")
    expect(page.locator(".answer .actions")).to_be_visible()
    expect(text.locator("pre code")).to_contain_text("# <b>not bold</b>")
    assert text.locator("ol > li > ul > li").count() == 1 and text.locator("td code").count() == 1
    assert (
        text.locator("strong").inner_text() == "merge" and text.locator("em").inner_text() == "one"
    )
    assert [link.get_attribute("href") for link in text.locator("a").all()] == [
        "https://example.org/x"
    ]
    assert text.locator("img, script").count() == 0
    expect(text).to_contain_text("<img src=x onerror=alert(2)>")


@pytest.mark.browser
def test_a_text_that_grows_looks_like_the_whole_text(open_page: Open) -> None:
    page = open_page()
    different = page.evaluate(
        """async (text) => {
          const { Growing, render } = await import("/page/markdown.js");
          const node = document.createElement("div"), whole = document.createElement("div");
          const growing = new Growing(node), found = [];
          for (let at = 1; at <= text.length; at++) {
            growing.show(text.slice(0, at));
            whole.replaceChildren(...render(text.slice(0, at), true));
            if (node.innerHTML !== whole.innerHTML) found.push(at);
          }
          return found;
        }""",
        MARKDOWN + "\nAnd\n\n" + MARKDOWN,
    )
    assert different == []


@pytest.mark.browser
def test_escape_stops_an_answer_and_the_server_notices(open_page: Open, server: PageServer) -> None:
    page = open_page()
    ask(page, "Go on forever")
    expect(page.locator(".answer .text")).to_contain_text("on on on")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".answer .note")).to_have_text("Stopped.")
    for _ in range(WAIT_MS // 20):
        if server.num_left == 1:
            break
        page.wait_for_timeout(20)
    assert server.num_left == 1 and server.num_running == 0
    ask(page, "Say hello")
    expect(page.locator(".answer .text").nth(1)).to_have_text("Hello from the server.")


@pytest.mark.browser
def test_an_edited_message_replaces_what_followed_it(open_page: Open, server: PageServer) -> None:
    page = open_page()
    for text in ("First", "Second"):
        ask(page, text)
        expect(page.locator(".answer .actions").last).to_be_visible()
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit the message").fill("Other")
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(2)
    expect(page.locator(".user .plain")).to_have_text("Other")
    expect(page.locator(".answer .actions")).to_be_visible()
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "Other"}]
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".answer .actions")).to_be_visible()
    assert server.bodies[-1] == server.bodies[-2] and len(server.bodies) == 4


@pytest.mark.browser
def test_reasoning_is_folded(open_page: Open) -> None:
    page = open_page()
    ask(page, "Please think")
    expect(page.locator(".answer .text")).to_have_text("Hello from the server.")
    expect(page.locator("summary")).to_have_text(re.compile(r"Thought for \d+ ms"))
    expect(page.locator(".thought")).not_to_be_visible()
    page.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".thought")).to_contain_text("The user wants a short answer.")


@pytest.mark.browser
def test_settings_are_sent_and_empty_ones_are_left_to_the_server(
    open_page: Open, server: PageServer
) -> None:
    page = open_page()
    ask(page, "One")
    expect(page.locator(".answer .actions")).to_be_visible()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Maximum tokens").fill("99")
    page.get_by_label("Reasoning").select_option("off")
    page.get_by_role("button", name="Done").click()
    page.get_by_role("button", name="New chat").click()
    ask(page, "Two")
    expect(page.locator(".answer .actions")).to_be_visible()
    stream = {
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    assert server.bodies == [
        {"messages": [{"role": "user", "content": "One"}], **stream},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Two"},
            ],
            "temperature": 0.5,
            "max_completion_tokens": 99,
            "chat_template_kwargs": {"enable_thinking": False},
            **stream,
        },
    ]


@pytest.mark.browser
def test_charts_move(open_page: Open) -> None:
    page = open_page()
    ask(page, "Go on forever")
    tokens = page.locator("[data-chart=tokens]")
    expect(tokens.locator(".value").first).to_have_text(re.compile(r"^generated [1-9]"))
    line = tokens.locator("path.line.series-0")
    before = line.get_attribute("d")
    for key, said in (
        ("requests", "running 1"), ("cache", "9.0 %"), ("first", r"p50 [\d.]+ ms"),
        ("between", r"p50 [\d.]+ ms"),
    ):  # fmt: skip
        words = page.locator(f"[data-chart={key}] .value").first
        expect(words).to_have_text(re.compile(said))
    expect(line).not_to_have_attribute("d", str(before))
    assert re.match(
        r"Tokens per second: generated [\d.]+",
        str(tokens.locator("svg").get_attribute("aria-label")),
    )


@pytest.mark.browser
def test_arrow_keys_show_earlier_values_of_a_chart(open_page: Open) -> None:
    page = open_page()
    chart = page.locator("[data-chart=requests]")
    expect(chart.locator(".value").first).to_have_text("running 0")
    ask(page, "Go on forever")
    expect(chart.locator(".value").first).to_have_text("running 1")
    chart.locator("svg").focus()
    # a chosen value is as old as it is, so on a busy machine a later one takes its place
    for _ in range(10):
        for _ in range(120):
            page.keyboard.press("ArrowLeft")
        if chart.locator(".value").first.inner_text() == "running 0":
            break
    else:
        pytest.fail("the chart does not show the value before the request")
    expect(chart.locator(".when")).to_have_text(re.compile(r"^\d+ s ago$"))
    page.keyboard.press("Tab")
    expect(chart.locator(".value").first).to_have_text("running 1")


@pytest.mark.browser
def test_a_broken_draining_or_missing_server_is_shown_as_such(
    open_page: Open, server: PageServer
) -> None:
    page = open_page()
    status, banner, send = (page.locator(name) for name in ("#status", "#banner", "#send"))
    ask(page, "Go on forever")
    expect(page.locator(".answer .text")).to_contain_text("on on")
    for state, words in (
        ("draining", "Messages cannot be sent now"),
        ("broken", "engine has failed"),
    ):
        server.state = state
        expect(status).to_have_text(state)
        expect(banner).to_contain_text(words)
        page.get_by_label("Message").fill("Hello?")
        expect(send).to_be_disabled()
    server.state = "ready"
    expect(status).to_have_text("ready")
    expect(banner).not_to_be_visible()
    server.end()
    expect(page.locator(".answer .note")).to_contain_text("The answer was cut off")
    expect(status).to_have_text("not reachable")
    expect(page.locator("#charts-note")).to_have_text("The server does not respond.")


@pytest.mark.browser
def test_a_key_is_asked_for_and_kept_only_if_wanted(open_page: Open, server: PageServer) -> None:
    server.key = "secret-19"
    page = open_page()
    expect(page.locator("#settings-note")).to_contain_text("needs an API key")
    page.keyboard.type("secret-19")
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_text("tiny-qwen3")
    ask(page, "Say hello")
    expect(page.locator(".answer .text")).to_have_text("Hello from the server.")
    kept = "JSON.stringify([sessionStorage, localStorage, document.cookie])"
    assert "secret-19" not in page.evaluate(kept)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Remember the key").check()
    page.get_by_role("button", name="Done").click()
    page.reload()
    expect(page.locator("#model")).to_have_text("tiny-qwen3")
    assert "secret-19" in page.evaluate("JSON.stringify(sessionStorage)")


@pytest.mark.browser
def test_images_are_attached_only_if_the_model_sees(
    open_page: Open, server: PageServer, tmp_path: Path
) -> None:
    page = open_page()
    expect(page.locator("#model")).to_have_text("tiny-qwen3")
    expect(page.get_by_role("button", name="Attach images")).not_to_be_visible()
    server.sees = True
    page.reload()
    picture = tmp_path / "grey.png"
    picture.write_bytes(png(19, 9))
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Attach images").click()
    chooser.value.set_files([picture, picture])
    expect(page.locator(".attached img")).to_have_count(2)
    page.get_by_role("button", name="Remove image 1").click()
    ask(page, "What is this?")
    expect(page.locator(".bubble img")).to_be_visible()
    expect(page.locator(".answer .actions")).to_be_visible()
    image, text = server.bodies[0]["messages"][0]["content"]
    assert text == {"type": "text", "text": "What is this?"}
    assert image["type"] == "image_url"
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


@pytest.mark.browser
def test_a_model_that_sees_answers_about_an_attached_picture(browser: Browser) -> None:
    picture = Path(__file__).parents[2] / "docs" / "shapes.png"
    words = (
        SEEING, "--device", "cpu", "--enforce-eager", "--max-model-len", "256",
        "--max-num-seqs", "1", "--vision-patch-budgets", "256",
    )  # fmt: skip
    with command_server(*words) as (url, _), opening(browser, url) as open_page:
        page = open_page()
        # the page takes pictures once the server has told it that the model sees
        expect(page.get_by_role("button", name="Attach images")).to_be_visible()
        page.locator("#files").set_input_files(picture)
        expect(page.locator(".attached img")).to_be_visible()
        for number, (question, answer) in enumerate(
            (("What is left of the square?", "A red circle."), ("What is 4 + 5?", "4 + 5 = 9."))
        ):
            ask(page, question)
            expect(page.locator(".answer .text").nth(number)).to_have_text(answer)
            expect(page.locator(".answer .actions").nth(number)).to_be_visible()
        expect(page.locator("[data-chart=tokens] .value").first).to_have_text(
            re.compile(r"^generated \d")
        )


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 390])
def test_the_page_fits_a_phone_and_needs_no_mouse(open_page: Open, width: int) -> None:
    page = open_page(width, 700)
    ask(page, "Write a list")
    expect(page.locator(".answer .actions")).to_be_visible()
    too_wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(too_wide) == 0
    expect(page.locator("#charts")).not_to_be_visible()
    page.locator("#show-charts").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#charts")).to_be_visible()
    assert page.evaluate(too_wide) == 0
    page.get_by_role("button", name="Close").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#show-charts")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    expect(page.get_by_label("System prompt")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).not_to_be_visible()


@pytest.mark.browser
def test_a_refused_turn_goes_back_into_the_box_and_out_of_later_requests(
    open_page: Open, server: PageServer, tmp_path: Path
) -> None:
    server.sees = True
    page = open_page()
    ask(page, "One")
    expect(page.locator(".answer .actions")).to_be_visible()
    (tmp_path / "grey.png").write_bytes(png(19, 9))
    expect(page.locator("#attach")).to_be_visible()
    page.locator("#files").set_input_files(tmp_path / "grey.png")
    expect(page.locator(".attached img")).to_have_count(1)
    server.refusal = 400
    ask(page, "Two")
    expect(page.locator("#composer-note")).to_have_text("too long by 19 tokens")
    expect(page.get_by_label("Message")).to_have_value("Two")
    expect(page.get_by_label("Message")).to_be_focused()
    expect(page.locator(".attached img")).to_have_count(1)
    expect(page.locator(".turn")).to_have_count(2)
    page.get_by_role("button", name="Remove image 1").click()
    server.refusal = 0
    ask(page, "Three")
    expect(page.locator(".answer .actions").nth(1)).to_be_visible()
    assert [message["content"] for message in server.bodies[-1]["messages"]] == [
        "One", "Hello from the server.", "Three",
    ]  # fmt: skip
    expect(page.locator("#composer-note")).not_to_be_visible()


RENDER = """async (texts) => {
  const { render } = await import("/page/markdown.js");
  await (await import("/page/formulas.js")).temml.ready();
  await (await import("/page/colours.js")).highlighter.ready();
  return texts.map((text) => {
    const node = document.createElement("div");
    node.append(...render(text));
    return node.innerHTML;
  });
}"""


@pytest.fixture(scope="module")
def rendered(browser: Browser) -> Iterator[Callable[[list[str]], list[str]]]:
    """Returns the HTML of Markdown texts."""
    server = PageServer()
    with opening(browser, server.start()) as open_page:
        page = open_page()
        yield lambda texts: page.evaluate(RENDER, texts)
    server.end()


Rendered = Callable[[list[str]], list[str]]


@pytest.mark.browser
def test_bare_links_are_links_without_what_ends_a_sentence(rendered: Rendered) -> None:
    texts = {
        "See https://example.org/a_b*c, or": "https://example.org/a_b*c",
        "(https://example.org/x_(y)).": "https://example.org/x_(y)",
        "**http://example.org/?a=1&b=2#c**": "http://example.org/?a=1&amp;b=2#c",
        "<https://example.org/>": "https://example.org/",
        "| a |\n|---|\n| https://example.org/t |": "https://example.org/t",
        "- https://example.org/i!": "https://example.org/i",
        "[https://example.org/l](https://example.org/m)": "https://example.org/m",
    }
    for text, html in zip(texts, rendered(list(texts)), strict=True):
        assert re.findall(r'<a href="([^"]*)"', html) == [texts[text]], text
        assert 'target="_blank" rel="noopener noreferrer"' in html
    none = ["javascript:alert(1)", "[a](javascript:alert(1))", "`https://example.org`", "https://",
            "data:text/html,x", "xhttps://example.org", "[a](data:text/html,x)"]  # fmt: skip
    assert not any("<a" in html for html in rendered(none))


@pytest.mark.browser
def test_task_lists_strike_and_code_colours_are_shown(rendered: Rendered) -> None:
    html = rendered([
        "- [x] done\n- [ ] ~~not~~ yet",
        "```python\ndef f(x):\n    return 'a'  # <b>\n```",
        "```nosuchlanguage\ndef\n```",
        "1. One\n   - Two\n     ```js\n     let a;\n     ```",
        "> a\n> - b\n>\n> > c",
        "| a | b |\n|:-:|--:|\n| x \\| y | 1 | too many |\n| z |",
    ])  # fmt: skip
    assert re.findall(r'<input type="checkbox" disabled=""( checked="")?>', html[0]) == [
        ' checked=""', "",
    ]  # fmt: skip
    assert "<del>not</del> yet" in html[0]
    for scope, word in (("keyword", "def"), ("string", "'a'"), ("comment", "# &lt;b&gt;")):
        assert f'<span class="in-{scope}">{word}</span>' in html[1]
    assert "<code>def</code>" in html[2]
    assert '<span class="in-keyword">let</span> a;' in html[3]
    assert (
        html[4]
        == "<blockquote><p>a</p><ul><li>b</li></ul><blockquote><p>c</p></blockquote></blockquote>"
    )
    assert '<td class="middle">x | y</td><td class="right">1</td></tr>' in html[5]
    assert '<td class="middle">z</td><td class="right"></td>' in html[5]


@pytest.mark.browser
def test_mathematics_is_shown_in_all_four_marks(rendered: Rendered) -> None:
    shown = [
        "so $x^2$.", "$$\\frac{1}{2}$$", "so \\(x_1\\) is", "\\[ x = 1 \\]",
        "$5$ or $2x + 3y$", "$|x|$",
        "$$\na\n+ b\n- c\n$$",
        "Thus\n\\[\n\\begin{aligned}a &= b \\\\[4pt] c &= d\\end{aligned}\n\\]\nx",
        "1. One\n   $$\n   x\n   $$\n2. Two", "**so $a * b$**", "$3 \\text{ apples and pears}$",
    ]  # fmt: skip
    for text, html in zip(shown, rendered(shown), strict=True):
        assert "<math" in html and "$" not in html and "\\[" not in html, (text, html)
        assert ("display" in html) == ("$$" in text or "\\[" in text), text
    assert "<ol" in rendered(["1. One\n   $$\n   x\n   $$\n2. Two"])[0]
    assert "<li>Two</li>" in rendered(["1. One\n   $$\n   x\n   $$\n2. Two"])[0]


@pytest.mark.browser
def test_dollars_and_formulas_that_cannot_be_read_stay_text(rendered: Rendered) -> None:
    plain = [
        "it costs $5 and $6", "it costs $5.", "$5-$6", "US$5 or A$6", "$5 (or 6 US$)", "5$ and 6$",
        "set $HOME/$USER and $PATH", "a $$ b", "$ x $", "`$x$`", "```\n$x$\n```", r"\$x\$",
        "$\\frac{1}$", "$\\nosuchcommand{x}$",
        "$" + r"\sqrt" * 700 + " x$", "$x", "\\(x", "$$\nx\n\n- a",
    ]  # fmt: skip
    for text, html in zip(plain, rendered(plain), strict=True):
        assert "<math" not in html, text
    assert rendered(["it costs $5 and $6"]) == ["<p>it costs $5 and $6</p>"]
    assert (
        rendered([r"\href{javascript:alert(1)}{x} $\href{javascript:alert(1)}{x}$"])[0].count("<a")
        == 0
    )


@pytest.mark.browser
def test_a_growing_formula_table_or_fence_changes_its_kind_once(open_page: Open) -> None:
    page = open_page()
    for text, kind in (
        ("$$\na * b * c\n- d\n$$", "math"), ("\\[\nx\n= **1**\n\\]", "math"),
        ("| a | b |\n|---|---|\n| 1 | 2 |", "table"),
        ("```js\nlet a;\n```", ".code"),
    ):  # fmt: skip
        seen = page.evaluate(
            """async ([text, kind]) => {
              const { Growing } = await import("/page/markdown.js");
              await (await import("/page/formulas.js")).temml.ready();
              const node = document.createElement("div"), growing = new Growing(node), seen = [];
              for (let at = 1; at <= text.length; at++) {
                growing.show(text.slice(0, at));
                seen.push([Boolean(node.querySelector(kind)),
                           Boolean(node.querySelector("em, strong, li, hr, h3"))].join());
              }
              return seen;
            }""",
            [text, kind],
        )
        runs = [one for i, one in enumerate(seen) if i == 0 or one != seen[i - 1]]
        assert runs in (["false,false", "true,false"], ["true,false"]), (text, runs)
        assert kind != "table" or seen[0] == "true,false" or seen[2] == "true,false"


HOSTILE = (
    "[", "*", "$", "`", "~", "\\(", "\\[", "$$ ", "<", "| ", "> ", "- ", "a*", "**a ", "*a ", "$a ",
    "~~a ",    "`a ``", "[a](", "http://", "[a](http://b", "$a$ ", "\\[x", "# ", "``` `", "*a\n",
    "[a\n", "> [ ] \n",    "- [ ] \n", "$$\n", "| a |\n", "|-", "{", "\\", " ",
)  # fmt: skip


@pytest.mark.browser
def test_hostile_text_takes_time_in_proportion_to_its_length(open_page: Open) -> None:
    page = open_page()
    slow = page.evaluate(
        """async (parts) => {
          const { render } = await import("/page/markdown.js");
          await (await import("/page/formulas.js")).temml.ready();
          const slow = [];
          for (const part of parts) {
            for (const length of [19_000, 100_000]) {
              for (const end of ["", "x", "\\n"]) {
                const text = part.repeat(length / part.length) + end;
                const start = performance.now();
                render(text);
                const ms = performance.now() - start;
                if (ms > 3000) slow.push([part, length, ms]);
              }
            }
          }
          return slow;
        }""",
        HOSTILE,
    )
    assert slow == []


@pytest.mark.browser
def test_hostile_markup_stays_text(rendered: Rendered) -> None:
    texts = [
        "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<style>*{}</style>",
        "[<img src=x>](https://example.org)", "- [ ] <svg onload=alert(1)>", "~~<b>~~",
        "| <img> |\n|---|\n| <script> |", "```html\n<script>alert(1)</script>\n```",
        "$\\text{<img src=x onerror=alert(1)>}$", "https://example.org/\"onmouseover=alert(1)",
    ]  # fmt: skip
    for html in rendered(texts):
        assert not re.search(r"<(script|img|style|svg|b)\b", html), html
        assert not re.search(r"<[^>]* on\w+=", html), html
    assert "in-" in rendered(["```js\n" + "`${\n" * 3000 + "\n```"])[0]  # nested scopes
    (deep,) = rendered(["> " * 5000 + "x\n\n" + "\n".join(" " * 2 * i + "- x" for i in range(300))])
    assert deep.count("<blockquote") <= 5 and deep.count("<ul") <= 12


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 1280])
def test_wide_tables_code_and_formulas_scroll_within_themselves(
    open_page: Open, server: PageServer, width: int
) -> None:
    cells = "| " + " | ".join(f"column{i}" for i in range(40)) + " |\n"
    server.text = (
        f"{cells}|{'---|' * 40}\n{cells}\n```\n{'word ' * 99}\n```\n\n"
        f"$$ {' + '.join(f'x_{{{i}}}' for i in range(99))} $$\n\nHere ${'+'.join('abcdef' * 19)}$."
    )
    server.delay = 0
    page = open_page(width, 700)
    ask(page, "Go")
    expect(page.locator(".answer .actions")).to_be_visible()
    expect(page.locator(".answer math")).to_have_count(2)
    for name in (".wide", ".code pre", ".formula.display", ".formula.long"):
        room = page.locator(f".answer {name}")
        assert room.evaluate("(one) => one.scrollWidth > one.clientWidth + 99"), name
        room.focus()
        page.keyboard.press("ArrowRight")
        expect(room).to_be_focused()
    for name in ("document.documentElement", "document.getElementById('messages')"):
        assert page.evaluate(f"{name}.scrollWidth - {name}.clientWidth") == 0


@pytest.mark.browser
def test_suggestions_suit_the_model(open_page: Open, server: PageServer) -> None:
    page = open_page()
    expect(page.locator(".idea").nth(1)).to_have_text("What is the capital of France?")
    server.model = "big/model"
    page.reload()
    expect(page.locator(".idea").nth(1)).to_have_text("Write a haiku about a compiler.")
    server.sees = True
    page.reload()
    with page.expect_file_chooser():
        page.get_by_role("button", name="Describe this picture.").click()
    expect(page.get_by_label("Message")).to_have_value("Describe this picture.")
    expect(page.locator(".idea")).to_have_count(3)
    assert server.bodies == []
    server.model = SEEING
    page.reload()
    expect(page.locator(".idea").first).to_have_text("What do you see?")
    page.locator(".idea").nth(1).click()
    expect(page.locator(".answer .actions")).to_be_visible()
    assert server.bodies[0]["messages"][0]["content"] == "What is 4 + 5?"


@pytest.mark.browser
def test_a_chat_survives_a_reload_until_a_new_one(
    open_page: Open, server: PageServer, tmp_path: Path
) -> None:
    server.sees = True
    page = open_page()
    (tmp_path / "grey.png").write_bytes(png(19, 9))
    expect(page.locator("#attach")).to_be_visible()
    page.locator("#files").set_input_files(tmp_path / "grey.png")
    expect(page.locator(".attached img")).to_have_count(1)
    ask(page, "One")
    expect(page.locator(".answer .actions")).to_be_visible()
    page.reload()
    expect(page.locator(".answer .text")).to_have_text("Hello from the server.")
    expect(page.locator(".bubble img")).to_be_visible()
    expect(page.locator("#welcome")).not_to_be_visible()
    ask(page, "Go on forever")
    expect(page.locator(".answer .text").nth(1)).to_contain_text("on on on")
    kept = """async () => {
      const { ChatStore } = await import("/page/storage.js");
      return (await new ChatStore().load())[3]?.text ?? "";
    }"""
    for _ in range(WAIT_MS // 100):  # an unfinished answer is kept once a second
        if "on on" in page.evaluate(kept):
            break
        page.wait_for_timeout(100)
    page.reload()
    note = page.locator(".answer .note").nth(1)
    expect(note).to_have_text("The page was closed before the answer ended.")
    expect(page.locator(".answer .text").nth(1)).to_contain_text("on on")
    ask(page, "Three")
    expect(page.locator(".answer .actions").nth(2)).to_be_visible()
    messages = server.bodies[-1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2 + ["user"]
    assert messages[0] == server.bodies[0]["messages"][0]
    page.get_by_role("button", name="New chat").click()
    page.reload()
    expect(page.locator(".idea").first).to_be_visible()
    expect(page.locator(".turn")).to_have_count(0)


@pytest.mark.browser
def test_what_is_kept_of_chats_is_bounded(open_page: Open) -> None:
    page = open_page()
    found = page.evaluate(
        """async () => {
          const { ChatStore } = await import("/page/storage.js");
          const message = (role, text) => ({ role, text, images: [] });
          const kept = [];
          for (let chat = 0; chat < 9; chat++) {
            sessionStorage.setItem("chat", `chat ${chat}`);
            const store = new ChatStore(1000);
            for (let i = 0; i < 8; i++) {
              await store.put(i, message(i % 2 ? "assistant" : "user", `${i}`.repeat(199)));
            }
            const again = new ChatStore(1000);
            kept.push((await again.load()).map(({ text }) => text[0]).join(""));
            await again.put(4, message("user", "x".repeat(1001)));
            kept.push((await again.load()).length);
          }
          const chats = new Set();
          await new Promise((resolve) => {
            indexedDB.open("nanovllm", 1).onsuccess = ({ target }) => {
              target.result.transaction("chats").objectStore("chats").getAll().onsuccess =
                (event) => { for (const { id } of event.target.result) chats.add(id); resolve(); };
            };
          });
          return [kept, chats.size];
        }"""
    )
    assert found == [["4567", 0] * 9, 4]


@pytest.mark.browser
def test_the_page_works_and_keeps_nothing_where_storage_is_blocked(
    browser: Browser, server: PageServer
) -> None:
    url = server.start()
    with opening(browser, url) as open_page:
        page = open_page()
        page.add_init_script(
            """for (const name of ["sessionStorage", "localStorage", "indexedDB"]) {
              Object.defineProperty(window, name, {
                get() { throw new DOMException("blocked", "SecurityError"); },
              });
            }"""
        )
        page.reload()
        ask(page, "Say hello")
        expect(page.locator(".answer .text")).to_have_text("Hello from the server.")
        page.get_by_role("button", name="Settings").click()
        page.get_by_role("button", name="Done").click()
        page.reload()
        expect(page.locator(".idea").first).to_be_visible()
        expect(page.locator(".turn")).to_have_count(0)


@pytest.mark.browser
def test_a_screen_reader_gets_the_answer_once(open_page: Open) -> None:
    page = open_page()
    ask(page, "Say hello")
    expect(page.locator(".answer .actions")).to_be_visible()
    expect(page.locator("[aria-live=polite]")).to_have_text(
        re.compile(r"Hello from the server\.\s+The answer is complete, with 4 tokens\.")
    )


def test_the_page_loads_nothing_from_elsewhere_and_has_no_code_inline() -> None:
    found = files()
    assert {"/", "/page/app.js", "/page/style.css", "/page/icon.svg"} <= found.keys()
    html = found["/"].body.decode()
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script>|javascript:", html)
    for path, file in found.items():
        text = file.body.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(
            r"(?:src|href|url|import|fetch)[^\n]{0,9}[\"'(](?:https?:)?//", text
        ), path
        if path.endswith(".min.js"):  # libraries, whose parts that use it are not called
            assert re.match(r"/\*!.*?\d+\.\d+\.\d+.*?License", text, re.DOTALL)
            continue
        assert "innerHTML" not in text and "eval(" not in text, path
    linked = set(re.findall(r'(?:src|href)="(page/[^"]+)"', html))
    assert {f"/{path}" for path in linked} <= found.keys()
    for name in re.findall(
        r'from "\./([^"]+)"', "".join(p.read_text() for p in FOLDER.glob("*.js"))
    ):
        assert f"/page/{name}" in found


def test_the_policy_allows_scripts_of_the_server_alone() -> None:
    assert dict(HEADERS)[b"content-security-policy"].decode() == POLICY
    assert "default-src 'none'" in POLICY and "unsafe" not in POLICY
    assert not re.search(r"\*|https?:", POLICY)
