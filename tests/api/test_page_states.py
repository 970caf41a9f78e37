"""The page around the chat: charts, states of the server, keys, small screens, what it keeps and
loads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from nanovllm.api.page import FOLDER, HEADERS, POLICY, files
from tests.api.page_browser import WAIT_MS, Open, ask, browser, open_page, opening, png, server
from tests.api.page_server import PageServer

__all__ = ["browser", "open_page", "server"]  # fixtures


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
    # nothing is deleted before the page is closed
    page.evaluate("() => { IDBDatabase.prototype.transaction = () => { throw new Error(); }; }")
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
