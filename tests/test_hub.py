"""A model's name is an embedded model, a folder or a Hub id; only the last has revisions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from nanovllm import hub


@pytest.mark.parametrize("revision", [None, "v1.0"])
def test_a_revision_is_passed_to_the_hub(
    revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(model: str, *, revision: str | None, **_: Any) -> str:
        asked.append((model, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve("owner/name", revision=revision) == tmp_path
    assert asked == [("owner/name", revision)]


@pytest.mark.parametrize("model", [*hub.EMBEDDED, "."])
def test_a_revision_of_what_is_no_hub_id_is_refused(model: str) -> None:
    with pytest.raises(ValueError, match=f"revision is 'v1', but model '{model}' is not a Hub id"):
        hub.resolve(model, revision="v1")
