"""Models that pool on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.pooling.pooling_cases import pooling_llm, save_decoder
from tests.pooling.test_encoders import save_encoder

NUM_TOKENS = 160  # of the model
PROMPTS = [[(7 * i) % NUM_TOKENS for i in range(length)] for length in (1, 19, 99, 33)]


def test_two_ranks_give_the_scores_of_transformers(tmp_path: Path) -> None:
    """The rows of the labels' tokens are on different ranks."""
    hf = save_decoder(tmp_path, vocab_size=NUM_TOKENS, tie_word_embeddings=False)
    labels = {"hf_overrides": {"classifier_from_token": ["a", "~"]}}
    llm = pooling_llm(tmp_path, "classify", tensor_parallel_size=2, **labels)
    assert llm.engine.tokenizer is not None
    ids = [llm.engine.tokenizer.encode(one)[0] for one in "a~"]
    assert ids[0] < NUM_TOKENS // 2 <= ids[1]
    for prompt, found in zip(PROMPTS, llm.classify(PROMPTS, use_tqdm=False), strict=True):
        with torch.no_grad():
            both = hf(torch.tensor([prompt])).logits[0, -1, ids]
        wanted = [float(both.softmax(-1)[1])]
        assert found.outputs.probs == pytest.approx(wanted, abs=1e-4)
    llm.close()


def test_encoders_are_refused_on_several_ranks(tmp_path: Path) -> None:
    save_encoder(tmp_path, "bert")
    with pytest.raises(ValueError, match="BertModel run on one device: use data_parallel_size"):
        pooling_llm(tmp_path, tensor_parallel_size=2)
