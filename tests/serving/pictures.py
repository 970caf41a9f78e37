"""Small pictures as clients send them, and conversations about them."""

from __future__ import annotations

import base64
import io
import threading
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nanovllm.media.prepare import Preparer

SECRET = "https://user:secret-key@pictures.example.com/hidden.png?token=secret"


def data_url(number: int, side: int = 64) -> str:
    """A PNG of a checkerboard in two random colours, which has a number."""
    rng = np.random.default_rng(number)
    cells_HW = np.indices((side, side)).sum(0) // 16 % 2
    pixels_HWC = rng.integers(0, 256, (2, 3), np.uint8)[cells_HW]
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "PNG")
    return encoded(file.getvalue())


def encoded(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def corrupt() -> str:
    """A PNG whose pixels end too early."""
    whole = base64.b64decode(data_url(0).partition(",")[2])
    return encoded(whole[:60])


def about(*urls: str, text: str = "what is this ?") -> list[dict[str, Any]]:
    """A question about pictures."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


class Held:
    """Images wait in their thread until they may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()
        self.num_begun = 0
        image = Preparer._image

        def wait(preparer: Preparer, given: Any, budget: Any) -> Any:
            self.num_begun += 1
            self.has_begun.set()
            assert self.may_go_on.wait(60)
            return image(preparer, given, budget)

        monkeypatch.setattr(Preparer, "_image", wait)
