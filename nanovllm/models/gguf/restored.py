"""Tensors that llama.cpp's converter cuts, joins or reorders, as transformers has them.

A tensor in transformers' layout is made of stored ones (`Restored`): of their rows as they are
stored where only the order differs, so that codes stay codes, and else of their numbers in fp32.

G key heads and V value heads of a gated delta rule | I size of a value | C channels | W taps
N heads | L latent | P, V parts of a head's key and value | E experts | F width of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.models.gguf.header import GgufError, GgufTensor, Header

RULE = re.compile(r"blk\.(\d{1,5})\.ssm_a")
KEYS = re.compile(r"blk\.(\d{1,5})\.attn_k_b\.weight")
GATES = re.compile(r"blk\.(\d{1,5})\.ffn_gate_exps\.bias")
BLOCK = re.compile(r"blk\.(\d{1,5})\.")


class Restored(NamedTuple):
    """A tensor of `shape` and `dtype`, in the terms of a checkpoint, that `make` makes of the
    stored ones `sources`: of their bytes in rows if it has the `type_name` of codes, of numbers of
    `dtype` otherwise."""

    sources: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    make: Callable[..., Tensor]
    type_name: str | None = None


class Changes(NamedTuple):
    """`made` are tensors by their names in transformers' layout; `unread` the stored tensors that
    have no name there: their sources, and those of layers that are not read."""

    made: dict[str, Restored]
    unread: frozenset[str]


def changes(header: Header) -> Changes:
    """What differs in a file. Raises GgufError for tensors that do not fit the metadata."""
    made = dict(MAKERS[header.architecture](header)) if header.architecture in MAKERS else {}
    unread = {source for one in made.values() for source in one.sources}
    if header.architecture == "deepseek2":  # files of a time have the matrices in both forms
        unread |= {name for name in header.tensors if re.search(r"\.attn_[kv]_b\.", name)}
    if header.architecture in HYBRID:
        unread |= set(_proposing(header))
    return Changes(made, frozenset(unread))


def num_proposing(header: Header) -> int:
    """The blocks after the layers, which propose tokens."""
    return int(header.get(f"{header.architecture}.nextn_predict_layers", int, 0))


def _proposing(header: Header) -> Iterator[str]:
    num = header.get(f"{header.architecture}.block_count", int, 0) - num_proposing(header)
    for name in header.tensors:
        found = BLOCK.match(name)
        if found is not None and int(found[1]) >= num:
            yield name


def _layers(header: Header, pattern: re.Pattern[str]) -> Iterator[int]:
    """The numbers of blocks that have a tensor of this name."""
    for name in header.tensors:
        if (found := pattern.fullmatch(name)) is not None:
            yield int(found[1])


def _tensor(header: Header, name: str, *shape: int | None) -> GgufTensor:
    """A stored tensor, which must have this shape; None is any size."""
    tensor = header.tensors.get(name)
    if tensor is None:
        raise GgufError(f"{header.path}: tensor {name} is missing")
    sizes = zip(tensor.shape, shape)
    if len(tensor.shape) != len(shape) or any(b not in (None, a) for a, b in sizes):
        asked = ", ".join("any" if one is None else str(one) for one in shape)
        raise GgufError(
            f"{header.path}: tensor {name} has shape {list(tensor.shape)}, but the metadata asks "
            f"for [{asked}]"
        )
    return tensor


# gpt-oss -----------------------------------------------------------------------------------------


def _gpt_oss(header: Header) -> Iterator[tuple[str, Restored]]:
    """The biases of gate and up take turns."""
    for layer in _layers(header, GATES):
        names = tuple(f"blk.{layer}.ffn_{one}_exps.bias" for one in ("gate", "up"))
        num, width = _tensor(header, names[0], None, None).shape
        _tensor(header, names[1], num, width)
        yield (
            f"model.layers.{layer}.mlp.experts.gate_up_proj_bias",
            Restored(names, "F32", (num, 2 * width), _in_turns),
        )


def _in_turns(gate_EF: Tensor, up_EF: Tensor) -> Tensor:
    return torch.stack((gate_EF, up_EF), dim=-1).flatten(1)


# latents -----------------------------------------------------------------------------------------


def _deepseek2(header: Header) -> Iterator[tuple[str, Restored]]:
    """The keys' and the values' matrices of each head below each other."""
    for layer in _layers(header, KEYS):
        if f"blk.{layer}.attn_kv_b.weight" in header.tensors:
            continue
        names = tuple(f"blk.{layer}.attn_{one}_b.weight" for one in "kv")
        num, latent, key = _tensor(header, names[0], None, None, None).shape
        value = _tensor(header, names[1], num, None, latent).shape[1]
        shape = (num * (key + value), latent)
        yield (
            f"model.layers.{layer}.self_attn.kv_b_proj.weight",
            Restored(names, "F32", shape, _heads_in_turn),
        )


def _heads_in_turn(key_NLP: Tensor, value_NVL: Tensor) -> Tensor:
    return torch.cat((key_NLP.transpose(1, 2), value_NVL), dim=1).flatten(0, 1)


# gated delta rule --------------------------------------------------------------------------------


class _Rule:
    """The layers with a gated delta rule. If value heads are in `tiles`, the first of every key
    head come first: head j of key head g is j · G + g, and g · V/G + j in transformers."""

    def __init__(self, header: Header, *, tiles: bool) -> None:
        self.header = header
        of_rule = ("group_count", "time_step_rank", "state_size", "inner_size", "conv_kernel")
        keys, values, size, inner, self.taps = (_size(header, f"ssm.{key}") for key in of_rule)
        if values % keys or inner % values:
            raise GgufError(
                f"{header.path}: {keys} key heads, {values} value heads and values of {inner} "
                "numbers do not fit each other"
            )
        self.keys, self.values, self.value_size = keys, values, inner // values
        self.key_rows = 2 * keys * size
        order_V = torch.arange(values)
        self.order_V = order_V.view(-1, keys).t().flatten() if tiles else order_V
        self.tiles = tiles and keys not in (1, values)

    def of_layer(self, layer: int) -> Iterator[tuple[str, Restored]]:
        stored, prefix = f"blk.{layer}.", f"model.layers.{layer}.linear_attn."
        own_C = torch.cat((torch.arange(self.key_rows), self.key_rows + self._rows()))
        yield f"{prefix}in_proj_qkv.weight", self._ordered(stored + "attn_qkv.weight", own_C)
        yield f"{prefix}in_proj_z.weight", self._ordered(stored + "attn_gate.weight", self._rows())
        for name, rows in self._gates(stored):
            yield f"{prefix}in_proj_{name}.weight", rows
        conv = stored + "ssm_conv1d.weight"
        _tensor(self.header, conv, len(own_C), self.taps)
        yield (
            f"{prefix}conv1d.weight",
            Restored((conv,), "F32", (len(own_C), 1, self.taps), lambda x: x[own_C].unsqueeze(1)),
        )
        for name, source, make in (
            ("A_log", "ssm_a", self._logarithms), ("dt_bias", "ssm_dt.bias", self._in_order),
        ):  # fmt: skip
            _tensor(self.header, stored + source, self.values)
            yield prefix + name, Restored((stored + source,), "F32", (self.values,), make)
        yield f"{prefix}out_proj.weight", self._out(stored + "ssm_out.weight")

    def _rows(self) -> Tensor:
        """The rows of all values."""
        return (self.order_V[:, None] * self.value_size + torch.arange(self.value_size)).flatten()

    def _gates(self, stored: str) -> Iterator[tuple[str, Restored]]:
        """b and a: two tensors, or one that has those of each key head in turn."""
        if stored + "ssm_ba.weight" not in self.header.tensors:
            yield "b", self._ordered(stored + "ssm_beta.weight", self.order_V)
            yield "a", self._ordered(stored + "ssm_alpha.weight", self.order_V)
            return
        name, num = stored + "ssm_ba.weight", 2 * self.values
        b_V, a_V = torch.arange(num).view(self.keys, 2, -1).transpose(0, 1).flatten(1)
        yield "b", self._ordered(name, b_V, num)
        yield "a", self._ordered(name, a_V, num)

    def _ordered(self, name: str, order_O: Tensor, num_rows: int | None = None) -> Restored:
        """Rows of a matrix as they are stored."""
        tensor = _tensor(self.header, name, num_rows or len(order_O), None)
        shape = (len(order_O), _width(tensor))
        return _as_stored(name, tensor, shape, lambda x: x[order_O])

    def _out(self, name: str) -> Restored:
        """The columns in the order of value heads. Blocks that have columns of several heads are
        dequantized."""
        tensor = _tensor(self.header, name, None, self.values * self.value_size)
        num_rows, order_V = tensor.shape[0], self.order_V

        def make(x: Tensor) -> Tensor:
            return x.view(num_rows, self.values, -1)[:, order_V].flatten(1)

        if self.tiles and self.value_size % tensor.type.columns:
            return Restored((name,), "F32", tensor.shape, make)
        return _as_stored(name, tensor, (num_rows, _width(tensor)), make if self.tiles else _same)

    def _in_order(self, x_V: Tensor) -> Tensor:
        return x_V[self.order_V]

    def _logarithms(self, x_V: Tensor) -> Tensor:
        return _logarithms_of(self.header)(x_V)[self.order_V]


# Mamba-2 -----------------------------------------------------------------------------------------


def _mamba2(header: Header) -> Iterator[tuple[str, Restored]]:
    """Vectors of heads are columns there, and the norm has a row for each group."""
    sizes = {key: _size(header, f"ssm.{key}") for key in MAMBA_KEYS}
    heads, groups, inner = (sizes[key] for key in MAMBA_KEYS[:3])
    if heads % groups or inner % heads:
        raise GgufError(
            f"{header.path}: {heads} heads, {groups} groups and values of {inner} numbers do not "
            "fit each other"
        )
    channels, taps = inner + 2 * groups * sizes["state_size"], sizes["conv_kernel"]
    for layer in _layers(header, RULE):
        stored, prefix = f"blk.{layer}.", f"model.layers.{layer}.{MIXERS[header.architecture]}."
        of_layer = (
            ("A_log", "ssm_a", (heads, 1), (heads,), _logarithms_of(header)),
            ("D", "ssm_d", (heads, 1), (heads,), _same),
            ("dt_bias", "ssm_dt.bias", (heads,), (heads,), _same),
            ("conv1d.weight", "ssm_conv1d.weight", (channels, taps), (channels, 1, taps), _same),
            ("norm.weight", "ssm_norm.weight", (groups, inner // groups), (inner,), _same),
        )
        for name, source, shape, own, make in of_layer:
            if source == "ssm_norm.weight" and stored + source not in header.tensors:
                continue  # Falcon-H1 has mixers without one
            _tensor(header, stored + source, *shape)
            yield prefix + name, Restored((stored + source,), "F32", own, make)


def _logarithms_of(header: Header) -> Callable[[Tensor], Tensor]:
    """log(-x) of numbers that must be below 0."""

    def make(x: Tensor) -> Tensor:
        if not (x < 0).all():
            raise GgufError(f"{header.path}: ssm_a has numbers that are not below 0")
        return torch.log(-x)

    return make


def _size(header: Header, key: str) -> int:
    """A number of the metadata above 0."""
    name = f"{header.architecture}.{key}"
    found = header.get(name, int)
    if found is None or found < 1:
        raise GgufError(f"{header.path}: {name} is {found}: it must be above 0")
    return int(found)


def _same(x: Tensor) -> Tensor:
    return x


def _width(tensor: GgufTensor) -> int:
    """The numbers of a row, or its bytes in codes."""
    columns = tensor.shape[-1]
    if tensor.type.dtype is not None:
        return columns
    return columns // tensor.type.columns * tensor.type.num_bytes


def _as_stored(
    name: str, tensor: GgufTensor, shape: tuple[int, ...], make: Callable[[Tensor], Tensor]
) -> Restored:
    if tensor.type.dtype is not None:
        return Restored((name,), tensor.type.dtype, shape, make)
    return Restored((name,), "U8", shape, make, tensor.type.name)


def _hybrid(header: Header) -> Iterator[tuple[str, Restored]]:
    rule = _Rule(header, tiles=header.architecture != "qwen3next")
    for layer in _layers(header, RULE):
        yield from rule.of_layer(layer)


HYBRID = ("qwen3next", "qwen35", "qwen35moe")
MIXERS = {"falcon-h1": "mamba", "nemotron_h": "mixer"}
MAMBA_KEYS = ("time_step_rank", "group_count", "inner_size", "state_size", "conv_kernel")
MAKERS: dict[str, Callable[[Header], Iterator[tuple[str, Restored]]]] = {
    "gpt-oss": _gpt_oss,
    "deepseek2": _deepseek2,
    **dict.fromkeys(HYBRID, _hybrid),
    **dict.fromkeys(MIXERS, _mamba2),
}
