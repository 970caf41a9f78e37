"""Heads that draft tokens from the model's hidden states, made for the model of a start."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from nanovllm import hub
from nanovllm.models import dflash, eagle3, mtp
from nanovllm.models.draft_head import HeadModel
from nanovllm.models.gguf.header import is_gguf
from nanovllm.models.schemes import OPTIONS
from nanovllm.platforms.base import Traits
from nanovllm.runner.draft_block import DraftBlock
from nanovllm.runner.draft_head import DraftHead
from nanovllm.runner.spec import DraftSpec
from nanovllm.startup.draft import divided
from nanovllm.startup.head_config import dflash_config, eagle3_config, tensor_names
from nanovllm.startup.model_options import check_quantization, make_model
from nanovllm.startup.resolve import ResolvedConfig


@dataclass(frozen=True)
class Eagle3:
    """An EAGLE-3 head that drafts `num` tokens. `model` is its checkpoint: a folder, or a name on
    the Hugging Face Hub. `quantization` converts its weights, see `OPTIONS`."""

    num: int
    model: str
    quantization: str | None = None

    def parts(self, resolved: ResolvedConfig) -> tuple[DraftSpec, Path]:
        """See `Drafts`."""
        config, cfg = resolved.config, resolved.model.config
        folder = hub.resolve(self.model, weights=not config.random_weights)
        hf = eagle3_config(folder)
        found = eagle3.model(
            hf,
            frozenset() if config.random_weights else tensor_names(folder),
            num_layers=cfg.num_layers,
            dtype=cfg.dtype,
            max_model_len=config.max_model_len,
        )
        if hf.state_size != cfg.hidden_size:
            raise ValueError(
                f"the head reads hidden states of {hf.state_size} numbers, the model has "
                f"{cfg.hidden_size}"
            )
        if self.quantization is not None:
            found = quantized(found, self.quantization, resolved.platform.traits)
        return DraftSpec(DraftHead(self.num, found.reads), divided(resolved, found)), folder


def quantized(model: HeadModel, option: str, traits: Traits) -> HeadModel:
    """The head with weights that the option converts. Raises ValueError if a device or the head
    does not take them."""
    check_quantization(option, traits)
    # storing multiplies a part of a weight, which a format may not have: the layer runs instead
    made = model.with_scheme(OPTIONS[option])
    assert isinstance(made, HeadModel)
    return replace(made, store=None)


@dataclass(frozen=True)
class Mtp:
    """The first layer of the model's own checkpoint that proposes tokens; it drafts `num`."""

    num: int

    def parts(self, resolved: ResolvedConfig) -> tuple[DraftSpec, Path]:
        """See `Drafts`."""
        config = resolved.config
        if resolved.spec.offload is not None or is_gguf(resolved.folder):
            what = "expert_offload" if resolved.spec.offload is not None else "a GGUF file"
            raise ValueError(f"method 'mtp' does not go with {what}")
        target = make_model(config, resolved.hf, resolved.model.config.dtype)
        stored = None if config.random_weights else tensor_names(resolved.folder)
        found = mtp.model(target, stored)
        proposer = DraftHead(self.num, found.reads)
        return DraftSpec(proposer, divided(resolved, found)), resolved.folder


@dataclass(frozen=True)
class DFlash:
    """A DFlash draft of `num` tokens. `model` is its checkpoint: a folder, or a name on the Hugging
    Face Hub."""

    num: int
    model: str

    def parts(self, resolved: ResolvedConfig) -> tuple[DraftSpec, Path]:
        """See `Drafts`."""
        config, cfg = resolved.config, resolved.model.config
        folder = hub.resolve(self.model, weights=not config.random_weights)
        hf = dflash_config(folder)
        found = dflash.model(hf, dtype=cfg.dtype, max_model_len=config.max_model_len)
        if found.config.hidden_size != cfg.hidden_size:
            raise ValueError(
                f"the draft has {found.config.hidden_size} numbers in a hidden state, the model "
                f"has {cfg.hidden_size}: they must be equal"
            )
        most = found.block_size - (not hf.sample_from_anchor)
        if self.num > most:
            raise ValueError(
                f"num_speculative_tokens is {self.num}: a DFlash draft with blocks of "
                f"{found.block_size} has at most {most}"
            )
        return DraftSpec(DraftBlock(self.num, found.reads), divided(resolved, found)), folder
