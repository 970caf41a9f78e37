"""The picture in docs/page.md: a conversation with the embedded model that sees.

    python -m tests.api.draw_page        # writes docs/page.png, in two minutes

It starts `nanovllm serve`, attaches a picture in Chromium, asks about it, checks the answers, and
takes the picture. Meanwhile it sends other requests, a changing number at a time, for the charts.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from PIL import Image, ImageDraw
from playwright.sync_api import Page, expect, sync_playwright

from nanovllm.hub import SEEING
from tests.api.command_server import ROOT, command_server

PAGE = ROOT / "docs" / "page.png"
WORDS = (SEEING, "--device", "cpu", "--max-num-seqs", "8", "--max-model-len", "1024")
QUESTIONS = {
    "What do you see?": "red circle, blue square, nothing; nothing, green circle, orange triangle.",
    "What is left of the square?": "A red circle.",
    "How many circles are there?": "2.",
}
LOAD = ("Once upon a time", "What is 4 + 5?", "Who are you? " * 20)
SECONDS = 118  # of the charts
MOST_RUNNING = 5
PERIOD_SECONDS = 40


def draw_picture() -> Image.Image:
    """Two rows of three cells of 32 pixels, two of them empty. Drawn larger, for smooth edges."""
    image = Image.new("RGB", (384, 256), (245, 245, 245))
    pen = ImageDraw.Draw(image)
    pen.ellipse((16, 16, 112, 112), fill=(220, 30, 30))
    pen.rectangle((148, 20, 236, 108), fill=(40, 70, 220))
    pen.ellipse((144, 144, 240, 240), fill=(30, 160, 50))
    pen.polygon([(320, 144), (368, 240), (272, 240)], fill=(250, 140, 20))
    return image.resize((96, 64), Image.Resampling.LANCZOS)


def load(url: str, end: threading.Event) -> None:
    """Send requests until `end`, from 1 to MOST_RUNNING at a time, in waves."""
    start, running = time.monotonic(), threading.Semaphore(0)

    def ask(number: int) -> None:
        body = {
            "model": SEEING, "prompt": LOAD[number % len(LOAD)], "ignore_eos": True,
            "max_tokens": 40 + 67 * number % 100, "temperature": 1, "stream": True,
        }  # fmt: skip
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            answer.raise_for_status()
            answer.read()
        running.release()

    with ThreadPoolExecutor(MOST_RUNNING) as pool:
        number = num_running = 0
        while not end.wait(0.05):
            while running.acquire(blocking=False):
                num_running -= 1
            wave = (1 - math.cos((time.monotonic() - start) * math.tau / PERIOD_SECONDS)) / 2
            if num_running < 1 + round(wave * (MOST_RUNNING - 1)):
                pool.submit(ask, number)
                number, num_running = number + 1, num_running + 1


def talk(page: Page, folder: Path) -> None:
    """Ask the questions, the first one with the picture. Raises AssertionError if an answer is
    wrong."""
    draw_picture().save(folder / "picture.png")
    page.locator("#files").set_input_files(folder / "picture.png")
    for number, (question, answer) in enumerate(QUESTIONS.items()):
        page.get_by_label("Message").fill(question)
        page.keyboard.press("Enter")
        expect(page.locator(".answer .text").nth(number)).to_have_text(answer, timeout=60_000)
        expect(page.locator(".answer .actions").nth(number)).to_be_visible()


def main() -> int:
    end = threading.Event()
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
    with (
        tempfile.TemporaryDirectory() as folder,
        command_server(*WORDS) as (url, _),
        ThreadPoolExecutor(1) as pool,
        sync_playwright() as playwright,
    ):
        loading = pool.submit(load, url, end)
        try:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=flags
            )
            page = browser.new_page(viewport={"width": 1280, "height": 840})
            page.goto(url)
            expect(page.locator("#attach")).to_be_visible(timeout=60_000)
            page.wait_for_timeout(SECONDS * 1000)
            talk(page, Path(folder))
            page.wait_for_timeout(1500)  # for the charts
            page.screenshot(path=PAGE)
            browser.close()
        finally:
            end.set()
        loading.result()
    return 0


if __name__ == "__main__":
    sys.exit(main())
