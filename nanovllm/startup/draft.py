"""Adds a proposer on the device, and the model that it may need, to what a start has chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from nanovllm import hub
from nanovllm.models.layer_state import pages_of
from nanovllm.models.model import Model
from nanovllm.platforms import attention
from nanovllm.runner.proposer import DeviceProposer
from nanovllm.runner.spec import DraftSpec
from nanovllm.startup.checkpoint_cache import read_config
from nanovllm.startup.model_options import make_model, on_ranks
from nanovllm.startup.resolve import ResolvedConfig


class Drafts(Protocol):
    """What makes the proposer for the model of a start."""

    def parts(self, resolved: ResolvedConfig) -> tuple[DraftSpec, Path | None]:
        """The proposer, and the folder of the checkpoint if it has a model. Raises ValueError."""
        ...


@dataclass(frozen=True)
class Draft:
    """A proposer, and the checkpoint of its model: a folder, or a name on the Hugging Face Hub.

    reads_fed, reads_history, num_past: see `DraftSpec`.
    """

    proposer: DeviceProposer
    model: str | None = None
    reads_fed: bool = True
    reads_history: bool = False
    num_past: int = 0

    def parts(self, resolved: ResolvedConfig) -> tuple[DraftSpec, Path | None]:
        """See `Drafts`."""
        spec = DraftSpec(
            self.proposer,
            reads_fed=self.reads_fed,
            reads_history=self.reads_history,
            num_past=self.num_past,
        )
        if self.model is None:
            return spec, None
        config = resolved.config
        folder = hub.resolve(self.model, weights=not config.random_weights)
        hf = read_config(folder, resolved.store, None)
        model = make_model(replace(config, quantization=None), hf, resolved.model.config.dtype)
        return replace(spec, model=divided(resolved, model)), folder


def divided(resolved: ResolvedConfig, model: Model) -> Model:
    """A second model as each rank has it. Raises ValueError if it cannot be divided."""
    config = resolved.config
    if resolved.shard.size == 1:
        return model
    if model.config.moe is None:
        config = replace(config, expert_parallel=False)  # it is about the first model
    return on_ranks(config, model)


def with_draft(resolved: ResolvedConfig, draft: Drafts) -> ResolvedConfig:
    """The resolved with a proposer. Raises ValueError for what does not go with it."""
    config, layout, traits = resolved.config, resolved.spec.layout, resolved.platform.traits
    spec, folder = draft.parts(resolved)
    num = spec.proposer.num
    if 1 + num not in layout.verify_tokens:
        raise ValueError(
            f"the proposer drafts {num} tokens, but steps verify "
            f"{list(config.verified_lengths)}: these must hold {num}"
        )
    layers, num_layers = spec.proposer.layers, resolved.model.config.num_layers
    if not all(0 <= layer_idx < num_layers for layer_idx in layers):
        raise ValueError(
            f"the proposer reads hidden states after layers {list(layers)}: they must be "
            f"0 … {num_layers - 1}"
        )
    is_whole = traits.whole_steps and not config.enforce_eager
    if is_whole or traits.wants_lengths:
        raise ValueError(
            f"a proposer on the device is not supported on a {traits.name} device"
            f"{' with graphs: set enforce_eager=True' if is_whole else ''}"
        )
    spec = replace(
        spec,
        adapts=config.speculative is not None and config.adapts_drafts,
        reads_last=num_layers - 1 in layers,
    )
    if spec.model is not None:
        _check(resolved, spec.model)
    return replace(resolved, spec=replace(resolved.spec, draft=spec), draft_folder=folder)


def _check(resolved: ResolvedConfig, model: Model) -> None:
    ours, theirs = resolved.model.config, model.config
    if theirs.vocab_size != ours.vocab_size:
        raise ValueError(
            f"the draft model has {theirs.vocab_size} tokens in its vocabulary, the model has "
            f"{ours.vocab_size}: they must have the same"
        )
    pages = {replace(one, window=0) for one in map(pages_of, model.kept) if one is not None}
    if len(pages) > 1:
        raise ValueError(
            "the draft model keeps pages of several sizes, or reads the caches of other layers, "
            f"which is not supported: {', '.join(sorted(map(str, pages)))}"
        )
    windows = [kind.window for kind in model.layer_kinds]
    block_size = resolved.config.kvcache_block_size
    has_sinks = any(kind.has_sinks for kind in model.layer_kinds)
    facts = attention.AttentionNeeds(
        theirs.dtype,
        theirs.head_dim,
        block_size,
        windows,
        theirs.dtype,
        model.has_latents,
        has_sinks,
    )
    backend = attention.choose(resolved.config.attention_backend, resolved.platform, facts)
    if backend != resolved.spec.attention:
        raise ValueError(
            f"the draft model needs {backend.describe()}, and the model "
            f"{resolved.spec.attention.describe()}: they must use the same attention"
        )
