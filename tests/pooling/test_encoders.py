"""Encoders against transformers: embeddings, windows, types of tokens, and heads of classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm import LLM
from tests.engines import VOCAB_SIZE, random_prompts, save_tokenizer
from tests.pooling.pooling_cases import (
    LENGTHS,
    MAX_LEN,
    assert_near,
    embeddings,
    fill,
    hidden,
    logits,
    pooling_llm,
    unit,
    write_modules,
)

PROMPTS = random_prompts(LENGTHS)
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
    "initializer_range": 0.2,
}  # fmt: skip
# a third layer of ModernBERT has a window, and the first and the fourth have none
KINDS: dict[str, dict[str, Any]] = {
    "bert": {"max_position_embeddings": MAX_LEN},
    "roberta": {"max_position_embeddings": MAX_LEN + 2, "type_vocab_size": 1},
    "xlm-roberta": {"max_position_embeddings": MAX_LEN + 2, "type_vocab_size": 1},
    "modernbert": {"max_position_embeddings": MAX_LEN, "local_attention": 14,
                   "num_hidden_layers": 4, "cls_token_id": 2, "sep_token_id": 3},
}  # fmt: skip


def save_pair_tokenizer(folder: Path) -> None:
    """`save_tokenizer`, whose ids stand between those of <s> and </s>."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s>:0 $A:0 </s>:0",
        pair="<s>:0 $A:0 </s>:0 $B:1 </s>:1",
        special_tokens=[("<s>", 1), ("</s>", 3)],
    )
    tokenizer.save_pretrained(folder)


def save_encoder(folder: Path, kind: str, head: str = "", **changes: Any) -> Any:
    """Save a tiny encoder; returns transformers' model of it."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind], **changes})
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    model = fill(auto.from_config(config))
    model.save_pretrained(folder)
    save_pair_tokenizer(folder)
    return model


class Saved(NamedTuple):
    folder: Path
    model: Any


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("encoder")
    return Saved(folder, save_encoder(folder, request.param))


@pytest.fixture(scope="module")
def llm(saved: Saved) -> Iterator[LLM]:
    llm = pooling_llm(saved.folder)
    yield llm
    llm.close()


def first(saved: Saved) -> list[Tensor]:
    return [unit(hidden(saved.model, prompt)[0]) for prompt in PROMPTS]


def test_embeddings_are_the_normalized_state_of_the_first_token(llm: LLM, saved: Saved) -> None:
    assert_near(embeddings(llm, PROMPTS), first(saved))


def test_layer_norms_may_have_the_names_of_tensorflow(tmp_path: Path) -> None:
    """With and without the prefix of a model with a head."""
    model = save_encoder(tmp_path, "bert", num_hidden_layers=1)
    path, prompt = tmp_path / "model.safetensors", PROMPTS[1]
    ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = load_file(path)
    for end, other in ends.items():
        old = {name.replace(end, other): one for name, one in old.items()}
    for prefix in ("", "bert."):
        save_file({prefix + name: one for name, one in old.items()}, path, {"format": "pt"})
        llm = pooling_llm(tmp_path)
        assert_near(embeddings(llm, [prompt]), [unit(hidden(model, prompt)[0])])
        llm.close()


def test_order_and_company_change_only_rounding(llm: LLM) -> None:
    alone = [embeddings(llm, [prompt])[0] for prompt in PROMPTS]
    assert_near(embeddings(llm, PROMPTS[::-1]), alone[::-1], atol=1e-6)


def test_a_prompt_may_be_as_long_as_the_table_of_positions(llm: LLM) -> None:
    assert llm.engine.max_model_len == MAX_LEN
    with pytest.raises(ValueError, match=f"{MAX_LEN + 1} tokens: at most max_model_len"):
        llm.embed({"prompt_token_ids": [9] * (MAX_LEN + 1)}, use_tqdm=False)
    assert len(embeddings(llm, {"prompt_token_ids": [9] * MAX_LEN})[0]) == 64


def test_graphs_pool_the_mean_as_transformers_does(tmp_path: Path) -> None:
    model = save_encoder(tmp_path, "bert")
    write_modules(tmp_path, "pooling_mode_mean_tokens", normalize=True)
    llm = pooling_llm(
        tmp_path, enforce_eager=False, max_model_len=32, max_num_batched_tokens=32, max_num_seqs=3
    )
    prompts = [prompt[:32] for prompt in PROMPTS]
    assert_near(embeddings(llm, prompts), [unit(hidden(model, one).mean(0)) for one in prompts])
    llm.close()


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
def test_classes_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    changes = {"classifier_pooling": "mean"} if kind == "modernbert" else {}
    model = save_encoder(tmp_path, kind, "SequenceClassification", num_labels=3, **changes)
    llm = pooling_llm(tmp_path, "classify")
    found = llm.classify(PROMPTS, use_tqdm=False)
    wanted = [logits(model, prompt).softmax(-1) for prompt in PROMPTS]
    assert_near([torch.tensor(one.outputs.probs) for one in found], wanted)
    llm.close()


def test_a_cross_encoder_reads_both_texts_with_types(tmp_path: Path) -> None:
    model = save_encoder(tmp_path, "bert", "SequenceClassification", num_labels=1)
    llm = pooling_llm(tmp_path, "score")
    assert llm.engine.tokenizer is not None
    pairs = [("the cat", "a cat"), ("the cat", "an error on the ban")]
    found = llm.score("the cat", [second for _, second in pairs], use_tqdm=False)
    for one, pair in zip(found, pairs, strict=True):
        asked = llm.engine.tokenizer.for_reading(*pair, return_token_type_ids=True)
        types = torch.tensor([asked["token_type_ids"]])
        assert one.prompt_token_ids == asked["input_ids"] and types.any()
        wanted = logits(model, asked["input_ids"], token_type_ids=types).sigmoid()
        assert one.outputs.score == pytest.approx(float(wanted), abs=1e-5)
    (short,) = llm.score(*pairs[1], truncate_prompt_tokens=16, use_tqdm=False)
    assert len(short.prompt_token_ids) == 16 and short.prompt_token_ids[-1] == 3
    llm.close()


def test_a_truncated_text_keeps_its_special_tokens(llm: LLM) -> None:
    assert llm.engine.tokenizer is not None
    whole = llm.engine.tokenizer.encode("abcdefgh")
    assert llm.engine.tokenizer.encode_first("abcdefgh", 5) == [*whole[:4], 3]


def test_an_encoder_does_not_generate(saved: Saved) -> None:
    with pytest.raises(ValueError, match=r"does not generate text: set task='embed'"):
        LLM(str(saved.folder), device="cpu", enforce_eager=True)
