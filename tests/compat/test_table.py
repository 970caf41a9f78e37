"""docs/compatibility.md says what the code does."""

from __future__ import annotations

from tests.compat.table import PAGE, page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.compat.table"
