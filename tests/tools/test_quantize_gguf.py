"""`nanovllm quantize --format gguf-…`: files as the package gguf reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from nanovllm.tools import quantize_gguf, quantize_source
from nanovllm.tools.quantize_gguf import CUTS
from tests.conftest import save_tiny

MERGES = [("a", "b"), ("ab", "c"), ("Ġ", "a")]
SIZES: Any = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96}


def add_tokenizer(folder: Path, cuts: str) -> None:
    """Byte-level BPE: 256 bytes, the results of three merges, and a control token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(a + b for a, b in MERGES)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, MERGES))
    split = pre_tokenizers.Split(Regex(cuts), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def written(folder: Path, name: str, target: Path) -> Any:
    source = quantize_source.read_source(folder)
    quantize_gguf.write(source, name, target, int)
    (path,) = target.iterdir()
    return gguf.GGUFReader(path)


def value(reader: Any, key: str) -> Any:
    return reader.get_field(key).contents()


CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("name", "bound"), [("gguf-q8_0", 0.01), ("gguf-q4_0", 0.12)])
def test_a_file_has_the_model(arch: str, name: str, bound: float, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "source", arch, tie_word_embeddings=False, **SIZES)
    pre = "llama-bpe" if arch == "llama" else "qwen2"
    add_tokenizer(folder, CONTRACTIONS + CUTS[pre])
    reader, weights = (
        written(folder, name, tmp_path / "out"),
        load_file(folder / "model.safetensors"),
    )
    assert value(reader, "general.architecture") == arch
    assert value(reader, f"{arch}.block_count") == 2
    assert value(reader, f"{arch}.embedding_length") == 64
    assert value(reader, f"{arch}.attention.head_count_kv") == 2
    assert value(reader, f"{arch}.attention.key_length") == 32
    assert value(reader, f"{arch}.rope.freq_base") == 10000.0
    assert value(reader, "tokenizer.ggml.pre") == pre
    tokens = value(reader, "tokenizer.ggml.tokens")
    assert len(tokens) == 320 and tokens[256:260] == ["ab", "abc", "Ġa", "<|end|>"]
    assert value(reader, "tokenizer.ggml.token_type")[258:261] == [1, 3, 5]
    assert value(reader, "tokenizer.ggml.merges") == ["a b", "ab c", "Ġ a"]
    tensors = {one.name: one for one in reader.tensors}
    assert len(tensors) == len(weights)
    named = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
        "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
    }
    for short, full in named.items():
        one, expected = tensors[short], weights[full]
        if short == "blk.0.attn_q.weight" and arch == "llama":
            # of each head, numbers j and j + 16 rotate together: they become 2j and 2j + 1
            expected = expected.view(4, 32, 64)[:, [i // 2 + i % 2 * 16 for i in range(32)]]
            expected = expected.reshape(128, 64)
        found = torch.from_numpy(np.array(gguf.quants.dequantize(one.data, one.tensor_type)))
        is_table = short in ("token_embd.weight", "output.weight")
        error = (found.view_as(expected) - expected).norm() / expected.norm()
        assert error < (0.01 if is_table else bound)
        assert one.tensor_type.name == (
            "F32" if "norm" in short else "Q8_0" if is_table else name[5:].upper()
        )


def test_frequencies_of_llama_3(tmp_path: Path) -> None:
    """llama.cpp divides each frequency by a factor: 1 for the highest ones, 8 for the lowest."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 128}  # fmt: skip
    folder = save_tiny(tmp_path / "source", "llama", rope_parameters=rope, **SIZES)
    add_tokenizer(folder, CONTRACTIONS + CUTS["llama-bpe"])
    reader = written(folder, "gguf-q8_0", tmp_path / "out")
    (factors,) = [one.data for one in reader.tensors if one.name == "rope_freqs.weight"]
    assert factors.shape == (16,) and factors[0] == 1 and np.isclose(factors[-1], 8)
    assert (np.diff(factors) > -1e-5).all()
    assert "output.weight" not in {one.name for one in reader.tensors}


def test_what_a_file_cannot_have_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "out"
    folder = save_tiny(tmp_path / "qwen3", **SIZES)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        written(folder, "gguf-q8_0", target)
    add_tokenizer(folder, r"\s+")
    with pytest.raises(ValueError, match=r"cuts texts by .* only llama-bpe, qwen2 are known"):
        written(folder, "gguf-q8_0", target)
    odd = save_tiny(tmp_path / "odd", **{**SIZES, "intermediate_size": 80})
    with pytest.raises(ValueError, match=r"down_proj.* 80 is no multiple of 32"):
        written(odd, "gguf-q8_0", target)
    other = save_tiny(tmp_path / "olmo2", "olmo2", **SIZES)
    with pytest.raises(ValueError, match="Olmo2ForCausalLM cannot be written as GGUF: only Llama"):
        written(other, "gguf-q8_0", target)
    assert not target.exists()
