"""Chats on the page, against a small server: turns, stop, edit, settings, images; and one picture
through the command's server with the embedded model that sees."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from nanovllm.hub import SEEING
from tests.api.command_server import command_server
from tests.api.page_browser import WAIT_MS, Open, ask, browser, open_page, opening, png, server
from tests.api.page_server import PageServer

__all__ = ["browser", "open_page", "server"]  # fixtures


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
def test_a_screen_reader_gets_the_answer_once(open_page: Open) -> None:
    page = open_page()
    ask(page, "Say hello")
    expect(page.locator(".answer .actions")).to_be_visible()
    expect(page.locator("[aria-live=polite]")).to_have_text(
        re.compile(r"Hello from the server\.\s+The answer is complete, with 4 tokens\.")
    )
