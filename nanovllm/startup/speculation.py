"""From the option `speculative_config` to a proposer: a function for each method."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from nanovllm.runner.draft import DraftModel
from nanovllm.runner.ngram import Ngram
from nanovllm.speculative import SpeculativeConfig
from nanovllm.startup.draft import Draft, Drafts, with_draft
from nanovllm.startup.draft_heads import DFlash, Eagle3, Mtp
from nanovllm.startup.resolve import ResolvedConfig

SUFFIX_MIN = 2  # the fewest tokens that "suffix" looks for
Builder = Callable[[SpeculativeConfig, ResolvedConfig], Drafts]


def draft_model(config: SpeculativeConfig, resolved: ResolvedConfig) -> Drafts:
    assert config.num_speculative_tokens is not None and config.model is not None
    return Draft(DraftModel(config.num_speculative_tokens), str(config.model))


def eagle3(config: SpeculativeConfig, resolved: ResolvedConfig) -> Drafts:
    assert config.num_speculative_tokens is not None and config.model is not None
    return Eagle3(config.num_speculative_tokens, str(config.model), config.quantization)


def dflash(config: SpeculativeConfig, resolved: ResolvedConfig) -> Drafts:
    assert config.num_speculative_tokens is not None and config.model is not None
    return DFlash(config.num_speculative_tokens, str(config.model))


def mtp(config: SpeculativeConfig, resolved: ResolvedConfig) -> Drafts:
    assert config.num_speculative_tokens is not None
    return Mtp(config.num_speculative_tokens)


def ngram(config: SpeculativeConfig, resolved: ResolvedConfig) -> Drafts:
    assert config.num_speculative_tokens is not None
    proposer = Ngram(config.num_speculative_tokens, *config.ngram_lengths)
    return Draft(proposer, reads_fed=False, reads_history=True)


def suffix(config: SpeculativeConfig, resolved: ResolvedConfig) -> Drafts:
    assert config.num_speculative_tokens is not None
    depth, num_past = config.suffix_sizes
    proposer = Ngram(config.num_speculative_tokens, min(SUFFIX_MIN, depth), depth)
    return Draft(proposer, reads_fed=False, reads_history=True, num_past=num_past)


# Those of `speculative.METHODS`. A function raises ValueError for what the model does not support.
BUILDERS: dict[str, Builder] = {
    "draft_model": draft_model,
    "eagle3": eagle3,
    "dflash": dflash,
    "mtp": mtp,
    "ngram": ngram,
    "suffix": suffix,
}

logger = logging.getLogger(__name__)


def with_speculation(resolved: ResolvedConfig) -> ResolvedConfig:
    """The resolved with the proposer of the options, if they name one.

    Raises ValueError for what does not go with it.
    """
    config = resolved.config.speculative
    if config is None:
        return resolved
    assert config.method is not None
    made = with_draft(resolved, BUILDERS[config.method](config, resolved))
    assert made.spec.draft is not None
    if config.synthetic_rate is not None:
        logger.warning("answers are meaningless: rejection_sample_method is 'synthetic'")
    draft = replace(made.spec.draft, synthetic_rate=config.synthetic_rate)
    return replace(made, spec=replace(made.spec, draft=draft))
