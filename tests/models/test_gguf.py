"""GGUF files give the logits of their real values, which gguf dequantizes, in every architecture
and type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from nanovllm import LLM, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.models.formats import gguf as formats
from nanovllm.models.formats.format import Extent, Piece, num_bytes, tensors_of
from nanovllm.models.formats.gguf import GgmlWeight
from nanovllm.models.formats.mixed import Mixed
from nanovllm.models.formats.packed_weight import PackedWeight
from nanovllm.models.gguf.types import TYPES
from nanovllm.platforms import cpu
from tests.conftest import save_tiny
from tests.models import families, harness
from tests.models.gguf_cases import HALVES, TypeOf, Written, blocks, in_turns, write
from tests.models.harness import engine_logits, max_difference, sequences, transformers_logits
from tests.models.moe_cases import NORMALIZED, Case
from tests.models.routes import edit
from tests.models.test_more_experts import biased
from tests.models.test_quantized_checkpoints import plain_device as plain_device
from tests.models.test_shards import load_rank, options
from tests.models.thread_ranks import on_ranks

TOLERANCE = 1e-4
LENGTHS = ((1, 3), (19, 22))
IN_CODES = [one.name for one in TYPES.values() if one.dtype is None]
SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 256, "intermediate_size": 256, "initializer_range": 0.06,
    "head_dim": 64, "pad_token_id": None, "max_position_embeddings": 128,
}  # fmt: skip


def check(written: Written, vocab_size: int = 99, tolerance: float = TOLERANCE, **how: Any) -> Any:
    """The engine's logits are those of transformers for the real values; returns the parameters."""
    known = sequences(vocab_size, *LENGTHS)
    runner = harness.load(written.path, "cpu", **{"enforce_eager": True, **how})
    expected = transformers_logits(written.real, known, "cpu")
    assert max_difference(engine_logits(runner, known), expected) < tolerance
    return runner.params


def raw_of(type_name: str, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    if type_name in HALVES:
        return blocks(shape, type_name, 0)
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return quantize(values, gguf.GGMLQuantizationType[type_name])


@pytest.mark.parametrize("keeps_blocks", [True, False])
@pytest.mark.parametrize("type_name", IN_CODES)
def test_stored_weights_are_the_file_s_real_values(type_name: str, keeps_blocks: bool) -> None:
    """Exactly, also with scales that are no powers of 2; those of types with K are rounded to fp16
    where they become codes."""
    raw, extent = raw_of(type_name, (7, 512)), Extent((7, 512), torch.float32, 0, 0, 512)
    stored_as = formats.of_type(type_name, keeps_blocks=keeps_blocks)
    for at in HALVES.get(type_name, ()):
        one = raw.reshape(7, -1, TYPES[stored_as.ggml_type].num_bytes)
        half = np.random.default_rng(at).uniform(1e-3, 1e-2, (*one.shape[:-1], 1))
        one[..., at : at + 2] = half.astype(np.float16).view(np.uint8)
    piece = Piece("", (7, 512), range(7), range(512))
    weight: Any = stored_as.read({"weight": torch.from_numpy(raw)}, piece, extent)
    expected = torch.from_numpy(dequantize(raw, gguf.GGMLQuantizationType[type_name]))
    found = weight.rows(0)
    if type_name.endswith(("K", "XS")) and isinstance(weight, PackedWeight):
        most = {"Q2_K": 3, "Q3_K": 7, "Q4_K": 15, "Q5_K": 31, "Q6_K": 63, "IQ4_XS": 127}[type_name]
        offset = 0.0 if weight.offset_OG is None else weight.offset_OG.float().abs()
        bound = weight.scale_OG.float().abs() * most + offset
        bound = bound.repeat_interleave(weight.group, -1) * 2**-11
        assert ((found - expected).abs() <= bound).all()
        assert not torch.equal(found, torch.zeros_like(found))
    else:
        assert torch.equal(found, expected)
    declared: Any = stored_as.empty(extent, "meta")
    wanted = [(one.shape, one.dtype) for one in tensors_of(declared)]
    assert [(one.shape, one.dtype) for one in tensors_of(weight)] == wanted
    assert isinstance(weight, PackedWeight) or keeps_blocks
    many = {"Q2_K": 2.3, "Q3_K": 1.75, "Q5_0": 1.64, "Q5_1": 1.5, "Q5_K": 1.64, "Q6_K": 1.53}
    most = 1.15 if keeps_blocks else many.get(type_name, 1.15)
    assert num_bytes(stored_as, extent) <= most * raw.nbytes + 64  # a table of levels
    row_T = torch.tensor([6, 0, 6])
    assert torch.equal(weight.lookup(row_T, torch.float32), found[row_T])


@pytest.mark.parametrize("keeps_blocks", [True, False])
@pytest.mark.parametrize("type_name", IN_CODES)
def test_random_weights_are_near_what_was_drawn(type_name: str, keeps_blocks: bool) -> None:
    extent, drawn = Extent((5, 256), torch.float32, 0, 0, 256), 0.02 * torch.randn(5, 256)
    stored_as = formats.of_type(type_name, keeps_blocks=keeps_blocks)
    weight: Any = stored_as.quantized("x", drawn, extent)
    declared: Any = stored_as.empty(extent, "meta")
    assert [x.shape for x in tensors_of(weight)] == [x.shape for x in tensors_of(declared)]
    levels = {"Q2_K": 2, "Q3_K": 4, "MXFP4": 3}.get(type_name, 7)
    group = drawn.view(5, 8, 32) if TYPES[stored_as.ggml_type].columns == 32 else drawn[:, None]
    largest = group.abs().amax(-1, keepdim=True)
    assert ((weight.rows(0) - drawn).view_as(group).abs() <= largest / levels).all()


MIXES = {
    "legacy": (in_turns("Q4_0", "Q5_1", "Q8_0", "Q4_1", "Q5_0"), "Q5_1"),
    "k": (in_turns("Q4_K", "Q6_K", "Q3_K", "Q5_K", "Q2_K"), "Q6_K"),
    "other": (in_turns("IQ4_NL", "BF16", "IQ4_XS", "MXFP4", "F16"), "MXFP4"),
}


@pytest.mark.parametrize("name", MIXES)
def test_types_in_turns(name: str, tmp_path: Path) -> None:
    """q, k and v differ in type; so do layers."""
    types, table = MIXES[name]
    saved = save_tiny(tmp_path, "llama", **SIZES)
    params = check(write(saved, lambda one: table if one == "token_embd.weight" else types(one)))
    assert isinstance(params.layers[0].qkv_ED, Mixed)
    assert params.head_VD is params.embed_VD
    assert isinstance(params.embed_VD, GgmlWeight if name != "other" else PackedWeight)


@pytest.mark.parametrize("name", ["legacy", "k"])
def test_devices_without_products_of_blocks_take_codes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GPUs do."""
    monkeypatch.setattr(cpu, "TRAITS", replace(cpu.TRAITS, takes_blocks=False))
    types, table = MIXES[name]
    saved = save_tiny(tmp_path, "llama", **SIZES)
    written = write(saved, lambda one: table if one == "token_embd.weight" else types(one))
    params = check(written, tolerance=2e-3)  # scales are rounded to fp16
    assert isinstance(params.embed_VD, PackedWeight)
    stored = [one for layer in params.layers for one in layer]
    parts = [part for one in stored for part in (one if isinstance(one, Mixed) else (one,))]
    assert not any(isinstance(one, GgmlWeight) for one in parts)


@pytest.mark.usefixtures("plain_device")
def test_devices_without_products_dequantize(tmp_path: Path) -> None:
    saved = save_tiny(tmp_path, "llama", **SIZES)
    params = check(write(saved, in_turns("Q4_K", "Q4_0", "Q6_K")))
    assert params.head_VD is params.embed_VD
    found = {type(one) for layer in params.layers for one in layer} | {type(params.embed_VD)}
    assert found <= {torch.Tensor, type(None)}


@pytest.mark.parametrize("type_name", ["Q4_K", "MXFP4", "Q6_K"])
def test_experts(type_name: str, tmp_path: Path) -> None:
    sizes = {**SIZES, **NORMALIZED, "num_hidden_layers": 1, "moe_intermediate_size": 256}
    saved = Case("qwen3_moe", 4, 2, sizes).save(tmp_path)
    params = check(write(saved, lambda name: type_name))
    assert not isinstance(params.layers[0].experts[0], torch.Tensor)


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "yarn": ("qwen2", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 32}}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 6, "sliding_window": 17, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}},
        "query_pre_attn_scalar": 64}),
    "longrope": ("phi3", {**families.longrope(32)}),
    "partly": ("phi3", {"rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}}),
    "granite": ("granite", families.GRANITE),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {**families.WINDOWS, "rope_parameters": {
        "full_attention": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                           "original_max_position_embeddings": 32},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0, 1], "num_hidden_layers": 5}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_architectures(name: str, tmp_path: Path) -> None:
    model_type, changes = FAMILIES[name]
    saved = save_tiny(tmp_path, model_type, **{**SIZES, **changes})
    # the factor of Gemma's table is a power of 2; Granite's rounds the scales of codes
    plain = {"granite": "F32"}.get(name, "Q8_0")
    # short sequences have the short factors if longer ones are not allowed
    how = {"max_model_len": families.ORIGINAL_LEN} if name == "longrope" else {}
    check(write(saved, lambda one: plain if one == "token_embd.weight" else "Q8_0"), **how)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_architectures_with_experts(model_type: str, tmp_path: Path) -> None:
    sizes = {**SIZES, "num_hidden_layers": 1, "moe_intermediate_size": 256,
             "shared_expert_intermediate_size": 64}  # fmt: skip
    check(write(Case(model_type, 4, 2, sizes).save(tmp_path), in_turns("Q8_0", "Q5_0")))


GLM = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
    "attention_bias": True, "use_qk_norm": True, "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
}  # fmt: skip


def test_experts_with_sigmoid_scores(tmp_path: Path) -> None:
    """A dense layer first; the bias of scores decides choices."""
    saved = edit(save_tiny(tmp_path, "glm4_moe", **{**SIZES, **GLM}), biased)
    params = check(write(saved, in_turns("Q8_0", "Q5_0")))
    assert params.layers[1].router_bias_E.abs().max() > 0.1


def test_blocks_that_propose_tokens_are_not_layers(tmp_path: Path) -> None:
    """llama.cpp counts them as blocks."""
    saved = save_tiny(tmp_path, "glm4_moe", **{**SIZES, **GLM})
    counts = {"glm4moe.nextn_predict_layers": 1, "glm4moe.block_count": 3}
    extra = {"blk.2.nextn.eh_proj.weight": np.ones((2, 2), np.float32)}
    runner = harness.load(
        write(saved, metadata=counts, tensors=extra).path, "cpu", enforce_eager=True
    )
    assert len(runner.params.layers) == 2


def small(folder: Path, types: TypeOf, **how: Any) -> Written:
    sizes = {**SIZES, "num_hidden_layers": 1, "vocab_size": 512}
    return write(save_tiny(folder, "llama", **sizes), types, **how)


def test_graphs(tmp_path: Path) -> None:
    written = small(tmp_path, in_turns("Q4_K", "Q6_K", "Q4_0"))
    check(written, 512, enforce_eager=False, graph_batch_sizes=[2], max_num_batched_tokens=16)


def test_two_ranks_read_their_parts(tmp_path: Path) -> None:
    written = small(tmp_path, in_turns("Q4_0", "Q8_0", "Q5_0"))
    known = sequences(512, *LENGTHS)
    expected = transformers_logits(written.real, known, "cpu")
    config = EngineConfig.from_options(str(written.path), options(2))
    for found in on_ranks(2, lambda group: engine_logits(load_rank(config, group), known)):
        assert max_difference(found, expected) < TOLERANCE


def test_ranks_do_not_cut_blocks(tmp_path: Path) -> None:
    written = small(tmp_path, lambda name: "Q6_K")
    message = r"rank\(s\): a block of the type Q6_K has 256 columns, and cannot be cut"
    with pytest.raises(ValueError, match=message):
        harness.load(written.path, "cpu", enforce_eager=True, tensor_parallel_size=2)


def test_split_files_that_sleep_and_two_processes(tmp_path: Path) -> None:
    """A model in several files, whose weights are read again after sleep, and by two ranks."""
    written = small(tmp_path, in_turns("Q4_1", "Q5_1"), num_files=3)
    assert written.path.name == "model-00001-of-00003.gguf"
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    llm = LLM(str(tmp_path), **options(1), enable_sleep_mode=True)
    expected = llm.generate([[5, 6, 7]], params, use_tqdm=False)[0]["token_ids"]
    known = [harness.Known([5, 6, 7, *expected], 3)]
    (logits,) = transformers_logits(written.real, known, "cpu")
    assert logits[2:-1].argmax(-1).tolist() == expected
    for level in (1, 2):
        llm.sleep(level=level)
        llm.wake_up()
        assert llm.generate([[5, 6, 7]], params, use_tqdm=False)[0]["token_ids"] == expected
    both = LLM(str(written.path), **options(2))
    assert both.generate([[5, 6, 7]], params, use_tqdm=False)[0]["token_ids"] == expected
    both.close()
