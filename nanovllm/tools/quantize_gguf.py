"""Writes a checkpoint as a GGUF file, by the package gguf: Llama, Qwen2 and Qwen3.

Matrices are in one of two types; the table and the head are in Q8_0, norms and biases in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm import extras
from nanovllm.models.checkpoint import Checkpoint
from nanovllm.models.config import ModelConfig
from nanovllm.models.rope import rope_parameters
from nanovllm.startup.config_file import read_object
from nanovllm.tools.quantize_source import Progress, Source, check_target

BLOCK = 32  # columns that share a scale
ARCHITECTURES = {
    "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3",
}  # fmt: skip
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
# The ends of the regular expressions by which tokenizers cut texts, after the contractions.
_CUTS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {"llama-bpe": _CUTS % "{1,3}", "qwen2": _CUTS % ""}
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6  # types of tokens


class Item(NamedTuple):
    """A tensor of the file; `read` gives its numbers, `type` is that of GGUF."""

    name: str
    type: Any
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray[Any, Any]]


def write(source: Source, name: str, target: Path, progress: Progress) -> None:
    """Write `target`/NAME.gguf, with NAME that of the checkpoint's folder.

    Raises ValueError for a model or a tokenizer that this does not know, before anything is
    written.
    """
    gguf = _library()
    arch = ARCHITECTURES.get(source.model.config.architecture)
    if arch is None:
        raise ValueError(
            f"{source.model.config.architecture} cannot be written as GGUF: only "
            f"{', '.join(ARCHITECTURES)} can"
        )
    check_target(target)
    work = target.with_name(target.name + ".partial")
    work.mkdir(parents=True, exist_ok=True)
    stored_as = gguf.GGMLQuantizationType[name.removeprefix("gguf-").upper()]
    path = work / f"{source.folder.name}-{stored_as.name}.gguf"
    with Checkpoint(source.folder) as checkpoint:
        items = list(_items(gguf, source, checkpoint, arch, stored_as))
        file = gguf.GGUFWriter(path, arch)
        _describe(gguf, file, source, stored_as)
        _add_tokenizer(gguf, file, source, checkpoint.shape(TABLES[0])[0])
        for one in items:
            num_bytes = _num_bytes(gguf, one)
            np_type = np.dtype(np.float32)
            file.add_tensor_info(one.name, one.shape, np_type, num_bytes, raw_dtype=one.type)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_ti_data_to_file()
        for one in items:
            values = one.read()
            if not np.isfinite(values).all():
                raise ValueError(
                    f"{one.name} holds NaN or infinity, so that it cannot be quantized"
                )
            file.write_tensor_data(gguf.quants.quantize(values, one.type))
            progress(values.size * 2)
        file.close()
    if target.exists():
        target.rmdir()
    work.rename(target)


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise ValueError(f"GGUF files need the package gguf: {extras.install('gguf')}") from None
    return gguf


def _num_bytes(gguf: Any, item: Item) -> int:
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[item.type]
    return int(np.prod(item.shape)) // per_block * block_bytes


def _items(
    gguf: Any, source: Source, checkpoint: Checkpoint, arch: str, stored_as: Any
) -> Iterator[Item]:
    cfg, types = source.model.config, gguf.GGMLQuantizationType
    kind = next(one for one, text in gguf.MODEL_ARCH_NAMES.items() if text == arch)
    names = gguf.get_tensor_name_map(kind, cfg.num_layers)
    skipped = {TABLES[1]} if cfg.tied_embeddings else set()
    for stored in sorted(checkpoint):
        if stored in skipped or stored.endswith("rotary_emb.inv_freq"):
            continue
        found = names.get_name(stored, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"{stored} has no name in a GGUF file of {arch}")
        shape = checkpoint.shape(stored)
        is_matrix = len(shape) == 2
        if is_matrix and shape[1] % BLOCK:
            raise ValueError(f"{stored} {list(shape)}: {shape[1]} is no multiple of {BLOCK}")
        type_ = (types.Q8_0 if stored in TABLES else stored_as) if is_matrix else types.F32
        heads = {"q_proj": cfg.num_heads, "k_proj": cfg.num_kv_heads} if arch == "llama" else {}
        yield Item(found, type_, shape, _reader(checkpoint, stored, heads))
    if (factors := _rope_factors(cfg, source.hf)) is not None:
        yield Item("rope_freqs.weight", types.F32, factors.shape, lambda: factors)


def _reader(
    checkpoint: Checkpoint, stored: str, heads: dict[str, int]
) -> Callable[[], np.ndarray[Any, Any]]:
    def read() -> np.ndarray[Any, Any]:
        weight = torch.empty(checkpoint.shape(stored))
        checkpoint.read([(stored, weight)])
        found: np.ndarray[Any, Any] = _paired(weight, stored.split(".")[-2], heads).numpy()
        return found

    return read


def _paired(weight: Tensor, module: str, heads: dict[str, int]) -> Tensor:
    """The rows of queries and keys as llama.cpp rotates them in a Llama: numbers that rotate
    together are neighbours."""
    if module not in heads:
        return weight
    halves = weight.unflatten(0, (heads[module], 2, -1))
    return halves.transpose(1, 2).flatten(0, 2).contiguous()


def _rope_factors(cfg: ModelConfig, hf: Any) -> np.ndarray[Any, Any] | None:
    """What llama.cpp divides each frequency by; None: nothing."""
    parameters = rope_parameters(hf)
    kind, base = parameters["rope_type"], parameters["rope_theta"]
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope_type {kind!r} is not written as GGUF: only 'default' and 'llama3'")
    size = 2 * len(cfg.inv_freq)
    plain = np.array([base ** (-2 * i / size) for i in range(size // 2)])
    factors: np.ndarray[Any, Any] = (plain / np.array(cfg.inv_freq)).astype(np.float32)
    return factors


def _describe(gguf: Any, file: Any, source: Source, stored_as: Any) -> None:
    cfg, hf = source.model.config, source.hf
    file.add_name(source.folder.name)
    file.add_block_count(cfg.num_layers)
    file.add_context_length(hf.max_position_embeddings)
    file.add_embedding_length(cfg.hidden_size)
    file.add_feed_forward_length(hf.intermediate_size)
    file.add_head_count(cfg.num_heads)
    file.add_head_count_kv(cfg.num_kv_heads)
    file.add_key_length(cfg.head_dim)
    file.add_value_length(cfg.head_dim)
    file.add_rope_dimension_count(2 * len(cfg.inv_freq))
    file.add_rope_freq_base(rope_parameters(hf)["rope_theta"])
    file.add_layer_norm_rms_eps(cfg.norm_eps)
    file.add_vocab_size(hf.vocab_size)
    file.add_file_type(gguf.LlamaFileType[f"MOSTLY_{stored_as.name}"])
    file.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(gguf: Any, file: Any, source: Source, num_rows: int) -> None:
    """Raises ValueError for one that is not of Llama 3's, Qwen's or SentencePiece's kind."""
    path = source.folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{source.folder} has no tokenizer.json, from which a GGUF file has tokens"
        )
    described = read_object(path)
    model = described.get("model") or {}
    if model.get("type") != "BPE":
        raise ValueError(f"{path} has a model of type {model.get('type')!r}: only 'BPE' is written")
    vocab, added = dict(model["vocab"]), described.get("added_tokens") or []
    kinds = dict.fromkeys(vocab, NORMAL)
    for one in added:
        vocab[one["content"]] = one["id"]
        kinds[one["content"]] = CONTROL if one.get("special") else USER_DEFINED
    by_id = {i: token for token, i in vocab.items() if i < num_rows}
    if len(by_id) < len(vocab):
        raise ValueError(f"{path} has tokens that the table of {num_rows} rows does not have")
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(num_rows)]
    types = [kinds.get(token, UNUSED) for token in tokens]
    is_sentence_piece = bool(model.get("byte_fallback"))
    file.add_tokenizer_model("llama" if is_sentence_piece else "gpt2")
    if not is_sentence_piece:
        file.add_tokenizer_pre(_cuts(path, described.get("pre_tokenizer")))
    else:
        types = [BYTE if _is_byte(token) else kind for token, kind in zip(tokens, types)]
        # merges in the order of their ids: the first ones have the highest scores
        file.add_token_scores([-float(i) for i in range(num_rows)])
    file.add_token_list(tokens)
    file.add_token_types(types)
    gguf.SpecialVocab(
        source.folder, load_merges=not is_sentence_piece, n_vocab=num_rows
    ).add_to_gguf(file, quiet=True)


def _cuts(path: Path, described: Any) -> str:
    """llama.cpp's name for the way in which a tokenizer cuts texts before merges."""
    expressions = [one["Regex"] for one in _objects(described) if isinstance(one.get("Regex"), str)]
    for name, ends in CUTS.items():
        if len(expressions) == 1 and expressions[0].replace("(?i:", "(?:").endswith(ends):
            return name
    raise ValueError(f"{path} cuts texts by {expressions}: only {', '.join(CUTS)} are known")


def _objects(described: Any) -> Iterator[dict[str, Any]]:
    """All objects within a JSON value."""
    if isinstance(described, dict):
        yield described
    for one in described.values() if isinstance(described, dict) else described or ():
        if isinstance(one, (dict, list)):
            yield from _objects(one)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
