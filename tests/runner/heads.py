"""Small random heads, and what they draft by a formula that computes everything again each time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanovllm.engine.engine import Engine
from nanovllm.kernels import recorded
from nanovllm.runner.proposer import DeviceProposer, Fed
from nanovllm.runner.spec import DraftSpec
from nanovllm.runner.state import DeviceState
from nanovllm.startup.draft import Drafts
from nanovllm.startup.load import load
from nanovllm.startup.resolve import ResolvedConfig
from tests.runner.proposers import config_of

Weights = dict[str, Tensor]
Draft = tuple[int, list[int]]  # (position of the newest token, the tokens drafted after it)


@dataclass(frozen=True)
class Noting:
    """Notes what a proposer drafts, row by row, in steps that a CPU does not record."""

    inner: DeviceProposer
    seen: list[Draft] = field(default_factory=list, repr=False, compare=False)

    @property
    def num(self) -> int:
        return self.inner.num

    @property
    def layers(self) -> tuple[int, ...]:
        return self.inner.layers

    def propose(self, state: DeviceState, fed: Fed, steps: Any) -> Tensor | None:
        token_RK = self.inner.propose(state, fed, steps)
        if token_RK is None:
            return None
        recorded.refuse("a proposer that reads on the host")
        pos_R = state.pos_S.index_select(0, fed.row_idx_R)
        for row_idx, pos, drafted in zip(
            fed.row_idx_R.tolist(), pos_R.tolist(), token_RK.tolist(), strict=True
        ):
            if row_idx != state.pad_row:
                self.seen.append((pos, drafted))
        return token_RK


@dataclass(frozen=True)
class Watched:
    """Drafts whose proposer is `Noting`."""

    drafts: Drafts
    seen: list[Draft] = field(default_factory=list)

    def parts(self, resolved: ResolvedConfig) -> tuple[DraftSpec, Path | None]:
        spec, folder = self.drafts.parts(resolved)
        return replace(spec, proposer=Noting(spec.proposer, self.seen)), folder


def make(folder: Path, drafts: Drafts, num: int, **options: Any) -> Engine:
    """An engine with a head that drafts `num` tokens, and with run-ahead."""
    config = config_of(folder, {"draft_lengths": (num,), **options})
    return Engine(load(config, show_progress=False, draft=drafts))


# the formula --------------------------------------------------------------------------------------


def rms(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return x_TD * torch.rsqrt(x_TD.pow(2).mean(-1, keepdim=True) + eps) * weight_D


def rotated(x_TNH: Tensor, theta: float) -> Tensor:
    half = x_TNH.shape[-1] // 2
    freq = theta ** (-torch.arange(half) / half)
    angle_T1h = (torch.arange(len(x_TNH)).unsqueeze(1) * freq).unsqueeze(1)
    a, b = x_TNH.chunk(2, -1)
    cos, sin = angle_T1h.cos(), angle_T1h.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def causal(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
    repeats = q_TNH.shape[1] // k_TKH.shape[1]
    k, v = (x.repeat_interleave(repeats, 1) for x in (k_TKH, v_TKH))
    scores = torch.einsum("tnh,snh->nts", q_TNH, k) * q_TNH.shape[-1] ** -0.5
    mask = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return torch.einsum("nts,snh->tnh", scores.masked_fill(mask, -torch.inf).softmax(-1), v)


def drafted(
    tokens: Sequence[int],
    num: int,
    state_TD: Tensor,
    layer: Callable[[Tensor, Tensor], Tensor],
    choose: Callable[[Tensor], int],
    again: Callable[[Tensor], Tensor],
) -> list[int]:
    """`num` tokens after `tokens`. `state_TD` are the states of the model after all but the last,
    as the head reads them; `layer(token_T, state_TD)` is the whole head but the last norm, and
    `again` its state for the next token."""
    following, found = list(tokens[1:]), []
    for _ in range(num):
        out_TD = layer(torch.tensor(following), state_TD)
        found.append(choose(out_TD[-1]))
        following.append(found[-1])
        state_TD = torch.cat((state_TD, again(out_TD[-1:])))
    return found


def states(hf: Any, tokens: Sequence[int], layers: Sequence[int]) -> list[Tensor]:
    """transformers' hidden states [T, D] after these layers."""
    kept: dict[int, Tensor] = {}

    def note(layer_idx: int) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            kept[layer_idx] = (output[0] if isinstance(output, tuple) else output).reshape(
                len(tokens), -1
            )

        return hook

    all_layers = hf.model.layers
    handles = [all_layers[idx].register_forward_hook(note(idx)) for idx in set(layers)]
    with torch.no_grad():
        hf(torch.tensor([list(tokens)]))
    for handle in handles:
        handle.remove()
    return [kept[idx] for idx in layers]


# EAGLE-3 ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EagleCase:
    """A head for a model of `width` and `vocab_size`, in one of the published layouts."""

    name: str
    flags: dict[str, Any] = field(default_factory=dict)
    prefix: str = "midlayer."
    nested: bool = False
    hidden: int = 48
    num_drafted: int = 70
    has_table: bool = True
    has_head: bool = True
    width: int = 64
    vocab_size: int = 512
    eps: float = 1e-5
    theta: float = 5e3

    def __str__(self) -> str:
        return self.name

    def on(self, width: int, vocab_size: int) -> EagleCase:
        return replace(self, width=width, vocab_size=vocab_size)

    @property
    def norms_residual(self) -> bool:
        return bool(self.flags.get("norm_before_residual", self.nested))

    def weights(self) -> Weights:
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int, std: float = 0.3, mean: float = 0.0) -> Tensor:
            return torch.randn(shape, generator=generator) * std + mean

        hidden, width, ffn, one = self.hidden, self.width, 80, self.prefix
        made = {
            "fc.weight": draw(hidden, 3 * width),
            "norm.weight": draw(hidden, std=0.1, mean=1),
            **{f"{one}{name}.weight": draw(hidden, std=0.1, mean=1)
               for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")},
            **{f"{one}self_attn.{name}_proj.weight": draw(size, 2 * hidden)
               for name, size in (("q", 64), ("k", 32), ("v", 32))},
            f"{one}self_attn.o_proj.weight": draw(hidden, 64),
            **{f"{one}mlp.{name}_proj.weight": draw(ffn, hidden) for name in ("gate", "up")},
            f"{one}mlp.down_proj.weight": draw(hidden, ffn),
        }  # fmt: skip
        if self.has_head:
            made["lm_head.weight"] = draw(self.num_drafted, hidden)
        if self.has_table:
            made["embed_tokens.weight"] = draw(self.vocab_size, hidden, std=1.0)
        if self.num_drafted < self.vocab_size:
            ids = torch.randperm(self.vocab_size, generator=generator)[: self.num_drafted].sort()[0]
            made["d2t"] = ids - torch.arange(self.num_drafted)
            made["t2d"] = torch.zeros(self.vocab_size, dtype=torch.bool)
        if self.flags.get("norm_before_fc"):
            made["input_norm.weight"] = draw(3 * width, std=0.1, mean=1)
        if self.flags.get("fc_norm"):
            made |= {f"fc_norm.{i}.weight": draw(width, std=0.1, mean=1) for i in range(3)}
        return made

    def save(self, folder: Path) -> Path:
        layer = {
            "model_type": "llama", "hidden_size": self.hidden, "intermediate_size": 80,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "vocab_size": self.vocab_size, "rms_norm_eps": self.eps,
            "rope_theta": self.theta, "max_position_embeddings": 64, "hidden_act": "silu",
        }  # fmt: skip
        own = {"draft_vocab_size": self.num_drafted, "target_hidden_size": self.width, **self.flags}
        if self.nested:
            config = {
                "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3",
                "speculators_config": {"algorithm": "eagle3"}, "transformer_layer_config": layer,
            }  # fmt: skip
        else:
            config = {"architectures": ["LlamaForCausalLMEagle3"], **layer}
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**config, **own}))
        save_file(self.weights(), folder / "model.safetensors")
        return folder

    def drafts(self, hf: Any, tokens: Sequence[int], num: int, read: Sequence[int]) -> list[int]:
        """What the head drafts after tokens, from transformers' states after layers `read`."""
        w, one, eps = self.weights(), self.prefix, self.eps
        table = w.get("embed_tokens.weight", hf.get_input_embeddings().weight.detach())
        parts = states(hf, tokens[:-1], read)
        joined = torch.cat(parts, -1)
        if "input_norm.weight" in w:
            joined = rms(joined, w["input_norm.weight"], eps)
        if "fc_norm.0.weight" in w:
            chunks = enumerate(joined.chunk(3, -1))
            joined = torch.cat([rms(x, w[f"fc_norm.{i}.weight"], eps) for i, x in chunks], -1)

        def layer(token_T: Tensor, state_TD: Tensor) -> Tensor:
            normed = rms(state_TD, w[f"{one}hidden_norm.weight"], eps)
            x = torch.cat((rms(table[token_T], w[f"{one}input_layernorm.weight"], eps), normed), -1)
            q, k, v = (
                (x @ w[f"{one}self_attn.{c}_proj.weight"].T).view(len(x), -1, 16) for c in "qkv"
            )
            o = causal(rotated(q, self.theta), rotated(k, self.theta), v).flatten(1)
            h = normed if self.norms_residual else state_TD
            h = h + o @ w[f"{one}self_attn.o_proj.weight"].T
            x = rms(h, w[f"{one}post_attention_layernorm.weight"], eps)
            gate, up = (x @ w[f"{one}mlp.{c}_proj.weight"].T for c in ("gate", "up"))
            gated = torch.nn.functional.silu(gate) * up
            return h + gated @ w[f"{one}mlp.down_proj.weight"].T

        def final(out_D: Tensor) -> Tensor:
            return rms(out_D, w["norm.weight"], eps)

        def choose(out_D: Tensor) -> int:
            head = w.get("lm_head.weight", hf.get_output_embeddings().weight.detach())
            best = int((head @ final(out_D)).argmax())
            return best + int(w["d2t"][best]) if "d2t" in w else best

        norms_output = self.flags.get("norm_output")
        again = final if norms_output else (lambda out_TD: out_TD)
        return drafted(tokens, num, joined @ w["fc.weight"].T, layer, choose, again)
