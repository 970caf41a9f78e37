"""Texts of answers on the page: Markdown, formulas, code, and hostile texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, expect

from tests.api.page_browser import Open, ask, browser, open_page, opening, server
from tests.api.page_server import MARKDOWN, PageServer

__all__ = ["browser", "open_page", "server"]  # fixtures


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
