"""What a GGUF file's metadata says of the tokens that end an answer, and of yarn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import LlamaConfig

from nanovllm.models.gguf.config import fields
from nanovllm.models.gguf.header import GgufError, read
from nanovllm.models.rope import rotary_frequencies

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def written(
    path: Path, add: Callable[[gguf.GGUFWriter], None], architecture: str = "llama"
) -> Path:
    """A file with a table alone."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    add(writer)
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ends(path: Path, tokens: dict[str, int], **ids: int | list[int]) -> list[int] | None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_token_list(list(tokens))
        writer.add_token_types(list(tokens.values()))
        for name, value in ids.items():
            if isinstance(value, list):
                writer.add_array(f"tokenizer.ggml.{name}", value)
            else:
                writer.add_uint32(f"tokenizer.ggml.{name}", value)

    found: list[int] | None = fields(read(written(path, add)))["eos_token_id"]
    return found


def test_harmony_ends_at_return_and_calls_alone(tmp_path: Path) -> None:
    names = ("<|endoftext|>", "<|return|>", "a", "<|end|>", "<|call|>")
    tokens = dict.fromkeys(names, CONTROL)
    path = tmp_path / "model.gguf"
    assert ends(path, tokens, eos_token_id=1) == [0, 1, 4]
    assert ends(path, tokens, eos_token_id=1, eot_token_id=3) == [0, 1, 4]
    del tokens["<|return|>"]
    assert ends(path, tokens, eos_token_id=0) == [0, 2]


def test_gemma4_ends_at_turns_and_tool_responses(tmp_path: Path) -> None:
    tokens = {
        "<pad>": CONTROL, "<eos>": CONTROL, "a": NORMAL, "<turn|>": CONTROL,
        "<|tool_response>": USER_DEFINED, "<|turn>": CONTROL, "<tool_response|>": USER_DEFINED,
    }  # fmt: skip
    assert ends(tmp_path / "model.gguf", tokens, eos_token_id=1) == [1, 3, 4]
    tokens |= {"<|tool_response>": NORMAL, "<end_of_turn>": USER_DEFINED}
    assert ends(tmp_path / "model.gguf", tokens, eos_token_id=1) == [1, 3]


def test_a_list_of_ends(tmp_path: Path) -> None:
    path, tokens = tmp_path / "model.gguf", {"a": NORMAL, "b": NORMAL, "<|im_end|>": CONTROL}
    assert ends(path, tokens, eos_token_ids=[1]) == [1, 2]
    assert ends(path, tokens, eos_token_id=0, eos_token_ids=[1]) == [0, 1, 2]
    for wrong in (3, -1):
        with pytest.raises(GgufError, match=f"eos_token_ids has {wrong}, which is no id of 3 tok"):
            ends(path, tokens, eos_token_ids=[1, wrong])


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def scaled(rope: dict[str, Any]) -> tuple[tuple[float, ...], float]:
    config = LlamaConfig(
        hidden_size=16, num_attention_heads=1, max_position_embeddings=64,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )  # fmt: skip
    return rotary_frequencies(config, 16, 64)


@pytest.mark.parametrize(
    ("keys", "original"),
    [
        ({}, {}),
        # of DeepSeek-R1-0528-Qwen3-8B: the product is 1
        ({"yarn_attn_factor": 0.8782488562869419}, {"attn_factor": 0.8782488562869419}),
        ({"attn_factor": 0.75}, {"attn_factor": 0.75}),
        ({"yarn_attn_factor": 0.5, "attn_factor": 0.75}, {"attn_factor": 0.5}),
        ({"yarn_attn_factor": 1.25}, {"attention_factor": 1.25}),
        ({"attn_factor": 1.25}, {"attention_factor": 1.25}),
        ({"yarn_attn_factor": 1.0, "attn_factor": 1.0}, {}),
        ({"yarn_beta_fast": 2.0, "yarn_beta_slow": 0.5}, {"beta_fast": 2.0, "beta_slow": 0.5}),
    ],
)
def test_yarn_has_the_numbers_of_the_checkpoint(
    keys: dict[str, float], original: dict[str, float], tmp_path: Path
) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)
        for name, value in keys.items():
            writer.add_float32(f"llama.rope.scaling.{name}", value)

    found = fields(read(written(tmp_path / "model.gguf", add)))["rope_parameters"]
    (freqs, scale), expected = scaled(found), scaled({**YARN, **original})
    assert freqs == expected[0]
    assert scale == pytest.approx(expected[1], rel=1e-6)


def test_an_olmo2_with_windows_is_an_olmo3(tmp_path: Path) -> None:
    """Every fourth layer has none where the file does not say which."""

    def add(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop("olmo2.block_count")
        writer.add_block_count(5)
        writer.add_sliding_window(16)

    found = fields(read(written(tmp_path / "model.gguf", add, "olmo2")))
    assert found["architectures"] == ["Olmo3ForCausalLM"] and found["sliding_window"] == 16
    assert [one == "full_attention" for one in found["layer_types"]] == [0, 0, 0, 1, 0]
