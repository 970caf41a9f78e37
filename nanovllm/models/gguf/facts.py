"""A GGUF file's metadata as fields of config.json that all architectures have.

Keys have the architecture's name in front; here they are written without it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from nanovllm.models.gguf.checkpoint import small_tensor
from nanovllm.models.gguf.header import GgufError, Header
from nanovllm.models.gguf.names import ARCHITECTURES, without_number
from nanovllm.models.gguf.restored import changes

Fields = dict[str, Any]
LARGEST_ROPE = 1 << 12  # rotary factors
DTYPES = {"F32": "float32", "F16": "float16"}
# Tokens that end an answer, if they are control tokens: files may name only one of several.
ENDS = frozenset(
    {"<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"}
)
CONTROL, USER_DEFINED = 3, 4  # types of tokens
# Where gpt-oss ends an answer. <|end|> closes each message before it, such as the reasoning.
HARMONY_ENDS, HARMONY_MESSAGE_END = frozenset({"<|return|>", "<|call|>"}), "<|end|>"
# Gemma 4's files name <eos> alone, and the converter does not mark all of these as control tokens.
GEMMA4_ENDS = frozenset({"<turn|>", "<|tool_response>"})


class Facts:
    """The metadata of one file."""

    def __init__(self, header: Header) -> None:
        self.header, self.tensors = header, header.tensors
        self.layout = ARCHITECTURES[header.architecture]
        self.changes = changes(header)

    def get(self, key: str, kind: Any, default: Any = None) -> Any:
        """A value, which may be an array of equal values, one for each layer."""
        name = f"{self.header.architecture}.{key}"
        value = self.header.metadata.get(name)
        if isinstance(value, tuple):
            if len(set(value)) != 1:
                raise GgufError(
                    f"{self.header.path}: {name} is {value!r:.80}: layers of several sizes are not "
                    "supported"
                )
            value = value[0]
            if isinstance(value, bool) or not isinstance(value, kind):
                raise GgufError(f"{self.header.path}: {name} is {value!r:.80}")
            return value
        return self.header.get(name, kind, default)

    def size(self, key: str, default: int | None = None) -> int:
        """A number above 0. Raises GgufError if it is missing and has no default."""
        found = self.get(key, int, default)
        if found is None or found < 1:
            name = f"{self.header.architecture}.{key}"
            what = "missing" if found is None else f"{found}: it must be above 0"
            raise GgufError(f"{self.header.path}: {name} is {what}")
        return int(found)

    def number(self, key: str, default: float | None = None) -> float | None:
        found = self.get(key, (int, float), default)
        if found is not None and not math.isfinite(found):
            raise GgufError(
                f"{self.header.path}: {self.header.architecture}.{key} is {found}: it must be "
                "finite"
            )
        return found

    def has(self, name: str) -> bool:
        return name in self.tensors

    def layers(self, key: str, kind: type) -> tuple[Any, ...]:
        """A value for each layer, also where the file has one for all of them."""
        name, num = f"{self.header.architecture}.{key}", self.size("block_count")
        value = self.header.get(name, (kind, tuple))
        found = value if isinstance(value, tuple) else (value,) * num
        if len(found) != num or any(type(one) is not kind for one in found):
            raise GgufError(f"{self.header.path}: {name} is {value!r:.80}")
        return found

    def common(self, own: Fields) -> Fields:
        """The fields that `own` does not have."""
        table = self.tensors.get("token_embd.weight")
        if table is None or len(table.shape) != 2:
            raise GgufError(f"{self.header.path}: tensor token_embd.weight is missing")
        heads, hidden = self.size("attention.head_count"), self.size("embedding_length")
        if not self.get("attention.causal", bool, True):
            raise GgufError(f"{self.header.path}: only causal attention is supported")
        sizes: dict[str, Callable[[], Any]] = {
            "num_hidden_layers": lambda: self.size("block_count"),
            "num_key_value_heads": lambda: self.size("attention.head_count_kv", heads),
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn_size,
            "rope_parameters": lambda: self.rope(self.head_dim()),
        }
        return {
            "vocab_size": table.shape[0],
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "max_position_embeddings": self.size("context_length"),
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon", 1e-6),
            "tie_word_embeddings": not self.has("output.weight"),
            "hidden_act": "silu",
            "dtype": self.dtype(),
            **self.tokens(),
            **{name: find() for name, find in sizes.items() if name not in own},
        }

    def head_dim(self) -> int:
        """The size of keys, which is that of values."""
        heads, hidden = self.size("attention.head_count"), self.size("embedding_length")
        head_dim = self.size("attention.key_length", max(1, hidden // heads))
        if self.size("attention.value_length", head_dim) != head_dim:
            raise GgufError(f"{self.header.path}: keys and values of different sizes are not read")
        return head_dim

    def ffn_size(self) -> int:
        """A file of experts alone may lack it: then no layer needs it."""
        expert_size = self.get("expert_feed_forward_length", int)
        return self.size("feed_forward_length", expert_size)

    def dtype(self) -> str:
        """That of most matrices, and bfloat16 if these are in codes."""
        kinds = Counter(one.type.name for one in self.tensors.values() if len(one.shape) > 1)
        return DTYPES.get(kinds.most_common(1)[0][0], "bfloat16")

    def types(self) -> dict[str, str]:
        """The types of matrices in codes, by their names in transformers' layout."""
        made = self.changes.made.items()
        return {
            without_number(self.layout.name_of(name).replace("{expert}", "0")): one.type.name
            for name, one in self.tensors.items()
            if one.type.dtype is None and name not in self.changes.unread
        } | {name: one.type_name for name, one in made if one.type_name is not None}

    def tokens(self) -> Fields:
        get, prefix = self.header.get, "tokenizer.ggml."
        bos, pad = (get(f"{prefix}{name}_token_id", int) for name in ("bos", "padding"))
        ends = {get(f"{prefix}{name}_token_id", int) for name in ("eos", "eot", "eom")} - {None}
        texts, kinds = (get(prefix + name, tuple, ()) for name in ("tokens", "token_type"))
        ends |= self.listed_ends(len(texts))
        if ends:
            ends = ends_by_text(ends, texts, kinds)
        return {"bos_token_id": bos, "eos_token_id": sorted(ends) or None, "pad_token_id": pad}

    def listed_ends(self, num_tokens: int) -> set[int]:
        """The ids of files that list several."""
        name = "tokenizer.ggml.eos_token_ids"
        found = self.header.get(name, tuple, ())
        for one in found:
            if type(one) is not int or not 0 <= one < num_tokens:
                raise GgufError(
                    f"{self.header.path}: {name} has {one!r:.80}, which is no id of {num_tokens} "
                    "tokens"
                )
        return set(found)

    def rope(self, head_dim: int) -> Fields:
        """The rotary parameters. Factors of single frequencies are those of "longrope", which
        multiplies by nothing else."""
        found: Fields = {"rope_type": "default", "rope_theta": self.number("rope.freq_base", 1e4)}
        rotated = self.size("rope.dimension_count", head_dim)
        if rotated != head_dim:
            found["partial_rotary_factor"] = rotated / head_dim
        kind = self.get("rope.scaling.type", str, "none")
        factor = self.number("rope.scaling.factor") or self.number("rope.scale_linear")
        context = self.size("context_length")
        original = self.size("rope.scaling.original_context_length", context)
        if self.has("rope_freqs.weight"):
            factors = small_tensor(self.header, "rope_freqs.weight", LARGEST_ROPE)
            return {
                **found, "rope_type": "longrope", "short_factor": factors, "long_factor": factors,
                "attention_factor": 1.0, "original_max_position_embeddings": context,
            }  # fmt: skip
        if kind == "longrope" or self.has("rope_factors_long.weight"):
            names = {"short_factor": "short", "long_factor": "long"}
            factors_of = {
                key: small_tensor(self.header, f"rope_factors_{name}.weight", LARGEST_ROPE)
                for key, name in names.items()
                if self.has(f"rope_factors_{name}.weight")
            }
            attention = self.number("rope.scaling.attn_factor")
            more = {} if attention is None else {"attention_factor": attention}
            return {
                **found, **factors_of, **more, "rope_type": "longrope",
                "original_max_position_embeddings": original,
            }  # fmt: skip
        if kind == "none" or factor in (None, 1.0):
            return found
        if kind not in ("linear", "yarn"):
            raise GgufError(f"{self.header.path}: rope.scaling.type {kind!r} is not supported")
        found |= {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            found |= {"original_max_position_embeddings": original, **self.yarn()}
        return found

    def yarn(self) -> Fields:
        """The bounds of frequencies that are scaled partly, and the factor on cos and sin; most
        files have neither."""
        names = ("beta_fast", "beta_slow")
        betas = {name: self.number(f"rope.scaling.yarn_{name}") for name in names}
        found: Fields = {name: one for name, one in betas.items() if one is not None}
        factor = self.number("rope.scaling.yarn_attn_factor")
        if factor is None:
            factor = self.number("rope.scaling.attn_factor")
        if factor not in (None, 1.0):
            # the converter writes both under one key: above 1 it is what replaces yarn's own factor
            # (OLMo-3), below 1 it multiplies it to about 1 (DeepSeek-R1-0528-Qwen3-8B)
            found["attention_factor" if factor > 1 else "attn_factor"] = factor
        return found


def ends_by_text(ends: set[int], texts: tuple[object, ...], kinds: tuple[object, ...]) -> set[int]:
    """`ends` and the tokens that end an answer by their texts, without those that do not."""
    special = [
        (i, text, kind)
        for i, (text, kind) in enumerate(zip(texts, kinds))
        if kind in (CONTROL, USER_DEFINED)
    ]
    harmony = any(text == "<|return|>" and kind == CONTROL for _, text, kind in special)
    of_control = (ENDS | HARMONY_ENDS) - {HARMONY_MESSAGE_END} if harmony else ENDS
    found = {
        i for i, text, kind in special
        if text in GEMMA4_ENDS or (kind == CONTROL and text in of_control)
    }  # fmt: skip
    inner = {i for i, text, _ in special if harmony and text == HARMONY_MESSAGE_END}
    return (ends | found) - inner
