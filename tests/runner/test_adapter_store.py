"""Host memory of adapters: what is pinned is reserved at the start, and no step waits for more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.models.shards import ALL
from nanovllm.runner import adapter_store
from nanovllm.runner.adapter_store import AdapterStore
from tests.models.harness import load
from tests.models.lora_cases import save_adapter


def test_no_more_is_pinned_than_was_reserved(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = load(
        checkpoint, "cpu", enforce_eager=True, enable_lora=True, max_loras=1, max_lora_rank=8
    )
    pinned: list[int] = []

    def host_buffer(num_bytes: int) -> torch.Tensor:
        pinned.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    monkeypatch.setattr(runner.platform, "host_buffer", host_buffer)
    parts: tuple[Any, ...] = runner.model, runner.params, runner.platform, ALL
    folders = [save_adapter(tmp_path / str(i), checkpoint) for i in range(3)]
    for most_bytes, num in ((adapter_store.MAX_RESERVED_BYTES, 2), (1, 1)):
        monkeypatch.setattr(adapter_store, "MAX_RESERVED_BYTES", most_bytes)
        store = AdapterStore(*parts)
        num_blocks = len(pinned) // num  # of one adapter
        pinned.clear()
        for number, folder in enumerate(folders, 1):
            read(store, number, folder)
        assert len(pinned) == num * num_blocks > 0, "the others are in pageable memory"
        store.drop(1)
        read(store, 4, folders[0])
        assert len(pinned) == (num + 1) * num_blocks, "what an adapter had is free for another"
        pinned.clear()
        store.close()


def read(store: AdapterStore, number: int, folder: Path) -> None:
    store.check(number, folder)
    store.read(number)
    store.wait(60)
    assert store.is_read(number)
