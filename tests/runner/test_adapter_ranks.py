"""What the first rank makes of what the others say of an adapter. The others are made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm.models.lora.peft_config import AdapterError
from nanovllm.runner import adapter_ranks
from nanovllm.runner.adapter_ranks import AdapterRanks

Handler = Callable[[bytes], "bytes | None"]
DIGEST = b"d"


class Other:
    """The runner of another rank. error: of checks and reads."""

    def __init__(self) -> None:
        self.found, self.has_read = DIGEST, False
        self.error: Exception | None = None
        self.adapters = SimpleNamespace(digest=lambda adapter_id: self.found)

    def check_adapter(self, adapter_id: int, folder: Path) -> bytes:
        self._raise()
        return self.found

    def adapter_is_read(self, adapter_id: int) -> bool:
        self._raise()
        return self.has_read

    def wait_for_adapters(self, seconds: float) -> bool:
        self.has_read = True
        return True

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error


class Group:
    """asked: the names of calls."""

    def __init__(self, others: list[Any]) -> None:
        self._handlers = [adapter_ranks.handlers(one) for one in others]
        self.asked: list[str] = []

    def call(self, name: str, payload: bytes) -> list[bytes]:
        self.asked.append(name)
        return [one[name](payload) or b"" for one in self._handlers]


@pytest.fixture
def others() -> list[Other]:
    return [Other(), Other()]


def test_an_adapter_is_read_once_all_ranks_have_read_it(others: list[Other]) -> None:
    group: Any = Group(others)
    ranks = AdapterRanks(group)
    ranks.check(1, Path("/a"), DIGEST)
    assert not ranks.wait(0.1), "the first rank has not read it"
    others[0].has_read = True
    assert not ranks.have_read(1, DIGEST)
    assert ranks.wait(0.1) and ranks.have_read(1, DIGEST)
    asked = len(group.asked)
    assert ranks.have_read(1, DIGEST) and not ranks.wait(0.1)
    assert len(group.asked) == asked, "they are not asked again"
    ranks.forget(1)
    others[1].has_read = False
    assert not ranks.have_read(1, DIGEST)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (AdapterError("it is torn"), AdapterError, "^rank 2: it is torn$"),
        (MemoryError("none left"), RuntimeError, "^rank 2: MemoryError: none left$"),
        (None, AdapterError, "^rank 2 has found other files: they have changed$"),
    ],
)
def test_what_one_rank_finds_is_the_error_of_all(
    error: Exception | None, kind: type[Exception], message: str, others: list[Other]
) -> None:
    group: Any = Group(others)
    ranks = AdapterRanks(group)
    others[1].error, others[1].found = error, b"other"
    with pytest.raises(kind, match=message):
        ranks.check(1, Path("/a"), DIGEST)
    with pytest.raises(kind, match=message):
        ranks.have_read(1, DIGEST)
