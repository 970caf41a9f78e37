"""Damaged and hostile GGUF files are refused with a reason, before memory is taken for them."""

from __future__ import annotations

import resource
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM
from nanovllm.models.gguf import header
from nanovllm.models.gguf.config import fields
from nanovllm.models.gguf.header import GgufError, read
from nanovllm.models.gguf.names import ARCHITECTURES
from tests.conftest import save_tiny
from tests.models.gguf_cases import in_turns, write
from tests.models.test_gguf import SIZES

TEXT, ARRAY, U32, F32 = 8, 9, 4, 6


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, raw: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + raw


def tensor(name: str, shape: Sequence[int], kind: int = 0, begin: int = 0) -> bytes:
    """`shape` as files have it, the innermost axis first."""
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + axes + struct.pack("<IQ", kind, begin)


def file(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: int = 256,
    *,
    start: bytes = b"GGUF" + struct.pack("<I", 3),
    counts: tuple[int, int] | None = None,
) -> bytes:
    num_tensors, num_keys = counts or (len(tensors), len(keys))
    head = start + struct.pack("<QQ", num_tensors, num_keys) + b"".join((*keys, *tensors))
    return head + bytes(-len(head) % 32) + bytes(data)


HUGE = 1 << 60
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the beginning has 4 bytes, but 0 are left"),
    "other": (b"PK\3\4" * 9, "does not begin with GGUF"),
    "old": (file(start=b"GGUF" + struct.pack("<I", 1)), "it is of version 1: only little-endian"),
    "big": (file(start=b"GGUF" + struct.pack(">I", 3)), "it is big-endian: only little-endian"),
    "tensors": (file(counts=(HUGE, 0)), f"it has {HUGE} tensors: at most 131072"),
    "keys": (file(counts=(0, HUGE)), f"it has {HUGE} keys: at most 65536"),
    "few keys": (file(counts=(0, 999)), "the key '' is there twice"),
    "key": (file([struct.pack("<Q", HUGE)]), f"a key has {HUGE} bytes, but"),
    "value": (file([key("a", TEXT, struct.pack("<Q", HUGE))]), f"a has {HUGE} bytes, but"),
    "type": (file([key("a", 13, b"")]), "a has the unknown type 13"),
    "array": (
        file([key("a", ARRAY, struct.pack("<IQ", U32, HUGE))]),
        f"a has {HUGE} values: at most 4194304",
    ),
    "short array": (
        file([key("a", ARRAY, struct.pack("<IQ", U32, 1 << 20))]), "a has 4194304 bytes, but",
    ),
    "texts": (
        file([key("a", ARRAY, struct.pack("<IQQ", TEXT, 1, HUGE))]), f"a has {HUGE} bytes, but",
    ),
    "nested": (file([key("a", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "array of the type 9"),
    "twice": (file([key("a", U32, bytes(4))] * 2), "the key 'a' is there twice"),
    "no text": (file([key("a", TEXT, text(b"\xff"))]), "a text of the header is not UTF-8"),
    "alignment": (
        file([key("general.alignment", U32, struct.pack("<I", 3))]), "it must be a power of 2",
    ),
    "axes": (file(tensors=[tensor("w", [1] * 5)]), "tensor w has 5 axes: it must have 1 to 4"),
    "no rows": (file(tensors=[tensor("w", [4, 0])]), r"tensor w has shape \[0, 4\]"),
    "many rows": (file(tensors=[tensor("w", [HUGE, 16])]), "but the file has"),
    "overflow": (file(tensors=[tensor("w", [1 << 32, 1 << 32])]), "but the file has"),
    "outside": (file(tensors=[tensor("w", [4], begin=HUGE)]), "but the file has"),
    "within": (file(tensors=[tensor("w", [4], begin=8)]), "not at a multiple of 32 bytes"),
    "overlap": (
        file(tensors=[tensor("a", [16]), tensor("b", [4], begin=32)]),
        "tensor b overlaps with tensor a",
    ),
    "same": (
        file(tensors=[tensor("a", [8]), tensor("a", [8], begin=32)]), "tensor a is there twice",
    ),
    "other type": (
        file(tensors=[tensor("w", [256], 16)]),
        "the type IQ2_XXS, which is not supported: only F32, F16, BF16, Q8_0, Q4_0, .*MXFP4 are",
    ),
    "unknown type": (file(tensors=[tensor("w", [256], 99)]), "the type 99, which is not supported"),
    "blocks": (file(tensors=[tensor("w", [99], 2)]), "must be multiples of 32, the block of Q4"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused(name: str, tmp_path: Path) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(GgufError, match=message) as found:
        read(path)
    assert str(path) in str(found.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16  # kB


def test_every_shorter_file_is_refused(tmp_path: Path) -> None:
    keys = [key("a", TEXT, text("b")), key("c", ARRAY, struct.pack("<IQ", U32, 2) + bytes(8))]
    whole = file(keys, [tensor("w", [16]), tensor("v", [16], begin=64)], 128)
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    assert list(read(path).tensors) == ["w", "v"]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(GgufError, match=r"model\.gguf"):
            read(path)


def test_long_headers_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "FIRST_READ", 64)
    path = tmp_path / "model.gguf"
    path.write_bytes(file([key("a", TEXT, text("b" * 999))], [tensor("w", [16])]))
    assert read(path).metadata == {"a": "b" * 999}
    monkeypatch.setattr(header, "LARGEST_HEADER", 256)
    path.write_bytes(file([key("a", TEXT, text("c" * 9999))], [tensor("w", [16])]))
    with pytest.raises(GgufError, match="the header has more than 256 bytes"):
        read(path)


LLAMA: dict[str, Any] = {
    "block_count": 1, "context_length": 64, "embedding_length": 64, "feed_forward_length": 64,
    "attention.head_count": 4,
}  # fmt: skip


def with_config(**changes: int | float | bytes) -> bytes:
    """A file of a llama; values are numbers, or bytes with their type."""
    values: dict[str, Any] = LLAMA | {name.replace("__", "."): v for name, v in changes.items()}
    keys = [key("general.architecture", TEXT, text("llama"))]
    for name, value in values.items():
        if isinstance(value, bytes):
            keys.append(text(f"llama.{name}") + value)
        else:
            kind, code = (F32, "f") if isinstance(value, float) else (U32, "I")
            keys.append(key(f"llama.{name}", kind, struct.pack(f"<{code}", value)))
    table = tensor("token_embd.weight", [64, 8], begin=0)
    return file(keys, [table], 64 * 8 * 4)


CONFIGS: dict[str, tuple[bytes, str]] = {
    "none": (file(), "general.architecture is missing"),
    "other": (
        file([key("general.architecture", TEXT, text("bert"))]),
        f"architecture 'bert' is not supported: use one of {', '.join(ARCHITECTURES)}",
    ),
    "no table": (file([key("general.architecture", TEXT, text("llama"))]), "token_embd.weight is"),
    "zero": (with_config(attention__head_count=0), "head_count is 0: it must be above 0"),
    "text": (with_config(context_length=struct.pack("<I", TEXT) + text("x")), "another type"),
    "nan": (with_config(rope__freq_base=float("nan")), "rope.freq_base is nan: it must be finite"),
    "layers": (
        with_config(feed_forward_length=struct.pack("<IIQII", ARRAY, U32, 2, 64, 128)),
        r"is \(64, 128\): layers of several sizes are not supported",
    ),
    "values": (with_config(attention__value_length=32), "keys and values of different sizes"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_cannot_be_are_refused(name: str, tmp_path: Path) -> None:
    content, message = CONFIGS[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(GgufError, match=message):
        fields(read(path))


def test_huge_sizes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(with_config(block_count=1 << 31))
    with pytest.raises(ValueError, match="num_hidden_layers is 2147483648: it must be at most"):
        LLM(str(path), device="cpu")
    path.write_bytes(with_config(feed_forward_length=1 << 22))
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight is missing"):
        LLM(str(path), device="cpu", enforce_eager=True, max_model_len=32, num_kvcache_blocks=4)


def damaged(path: Path, name: str, change: Callable[[bytearray], None]) -> None:
    """Change the bytes of a tensor in a file."""
    one, content = read(path).tensors[name], bytearray(path.read_bytes())
    raw = content[one.begin : one.begin + one.num_bytes]
    change(raw)
    content[one.begin : one.begin + one.num_bytes] = raw
    path.write_bytes(content)


# Where numbers in fp16 are in the blocks of each type; in MXFP4 a byte.
SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "MXFP4": (0,),
    "Q5_0": (0,), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


@pytest.mark.parametrize(
    "type_name, at", [(name, at) for name, places in SCALES.items() for at in places]
)
def test_scales_that_are_no_numbers_are_refused(type_name: str, at: int, tmp_path: Path) -> None:
    sizes = {**SIZES, "num_hidden_layers": 1}
    path = write(save_tiny(tmp_path, "llama", **sizes), in_turns(type_name)).path

    def change(raw: bytearray) -> None:
        raw[at : at + 2] = b"\xff\x7e"

    damaged(path, "blk.0.ffn_up.weight", change)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight: a scale is NaN"):
        LLM(str(path), device="cpu", enforce_eager=True, max_model_len=32, num_kvcache_blocks=4)
    damaged(path, "blk.0.ffn_up.weight", lambda raw: raw.__setitem__(slice(None), bytes(len(raw))))
    LLM(str(path), device="cpu", enforce_eager=True, max_model_len=32, num_kvcache_blocks=4)


def test_split_models_need_all_their_files(tmp_path: Path) -> None:
    sizes = {**SIZES, "num_hidden_layers": 1}
    path = write(save_tiny(tmp_path, "llama", **sizes), in_turns("Q8_0"), num_files=3).path
    assert len(read(path).tensors) == 11
    second, third = (path.with_name(f"model-0000{i}-of-00003.gguf") for i in (2, 3))
    content = third.read_bytes()
    third.write_bytes(second.read_bytes())
    with pytest.raises(GgufError, match="it is file 1 of 3, not 2 of 3"):
        read(path)
    third.unlink()
    with pytest.raises(GgufError, match=r"model-00003-of-00003\.gguf is missing: a split model"):
        read(path)
    third.write_bytes(content)
    alone = path.rename(tmp_path / "alone.gguf")
    with pytest.raises(GgufError, match="it is one of 3 files: keep their names"):
        read(alone)
