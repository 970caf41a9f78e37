"""Masks along drafts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from nanovllm.config import EngineConfig
from nanovllm.replicas import child_config
from nanovllm.structured import matcher
from nanovllm.structured.grammars import GrammarCompiler
from nanovllm.structured.library import Source
from nanovllm.structured.matcher import Matcher


@pytest.fixture
def compiler() -> Iterator[GrammarCompiler]:
    tokenizer = child_config.tokenizer(EngineConfig("tiny-qwen3"))
    assert tokenizer is not None
    made = GrammarCompiler(tokenizer, tokenizer.num_tokens(), [0])
    yield made
    made.close()


def test_slow_masks_after_drafts_make_the_grammar_slow(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask of the next token can be fast where those after drafts are not, and drafts that are
    always wrong would delay every step of all requests."""
    monkeypatch.setattr(matcher, "SLOW_S", 1e9)
    compiled, masks = compiler.compile(Source("regex", "[a-e]{9}"), 60.0), compiler.masks
    assert masks is not None
    one = Matcher(compiled, masks, ignores_eos=False)
    drafts = [int(np.flatnonzero(allowed_of(compiled.allowed_W))[0])] * 2
    masks.along([one], [drafts])
    assert not one.is_slow
    monkeypatch.setattr(matcher, "SLOW_S", 0.0)
    other = Matcher(compiled, masks, ignores_eos=False)
    assert masks.along([one, other], [drafts, []]).shape[0] == 4
    assert one.is_slow and one.is_ready and not one.is_ended
    assert not other.is_slow


def allowed_of(mask_W: np.ndarray) -> np.ndarray:
    """A bit for each token."""
    return np.unpackbits(mask_W.view(np.uint8), bitorder="little")
