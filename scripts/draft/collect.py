"""What a model says to prompts, and its hidden states over that, both from the engine.

T tokens of one text | D hidden | V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.kernels.reference.sample import NO_TOKEN
from nanovllm.models import formats
from nanovllm.models.config import ModelConfig
from nanovllm.runner.proposer import DeviceProposer, Fed
from nanovllm.runner.spec import DraftSpec
from nanovllm.runner.state import DeviceState
from nanovllm.startup.draft import Draft, Drafts
from nanovllm.startup.load import load
from nanovllm.startup.resolve import ResolvedConfig


class Text(NamedTuple):
    """A prompt and its answer: `token_T`, of which the first `num_prompt` are the prompt's."""

    token_T: list[int]
    num_prompt: int


class Example(NamedTuple):
    """A text with the hidden states after the layers that are read, beside each other, and with the
    token that the model would choose after each."""

    text: Text
    states_TJ: Tensor
    choice_T: Tensor


class Target(NamedTuple):
    """What a head shares with its model, on the CPU in fp32, and the model's sizes."""

    config: ModelConfig
    embed_VD: Tensor
    head_VD: Tensor
    final_norm_D: Tensor


def answers(
    model: str, prompts: Sequence[str], params: list[SamplingParams], options: dict[str, Any]
) -> list[Text]:
    """What the model answers to prompts, in its chat template if it has one."""
    llm = LLM(model, **options)
    try:
        template = getattr(llm.get_tokenizer(), "chat_template", None)
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        given: Any = llm.chat_prompts(chats) if template else list(prompts)
        found = llm.generate(given, params)
        return [
            Text([*one.prompt_token_ids, *one.outputs[0].token_ids], len(one.prompt_token_ids))
            for one in found
        ]
    finally:
        llm.close()


@dataclass(frozen=True)
class Collector:
    """Proposes nothing, and keeps the hidden states of prompts."""

    layers: tuple[int, ...]
    num: int = 1
    seen: list[tuple[Tensor, ...]] = field(default_factory=list, repr=False, compare=False)

    def propose(self, state: DeviceState, fed: Fed, steps: Any) -> Tensor:
        if fed.phase == "prefill":
            num_tokens = int(fed.batch.q_start_S[1])  # of the only row
            assert fed.states_TJ is not None
            states_TJ = fed.states_TJ[:num_tokens].float().cpu()
            self.seen.append(states_TJ.chunk(len(self.layers), dim=1))
        return fed.row_idx_R.unsqueeze(1).new_full((len(fed.row_idx_R), self.num), NO_TOKEN)


def engine(model: str, drafts: Drafts, num: int, options: dict[str, Any]) -> Engine:
    """An eager engine, whose proposer may read numbers on the host."""
    given = {**options, "enforce_eager": True, "draft_lengths": (num,)}
    config = EngineConfig.from_options(model, given)
    return Engine(load(config, show_progress=False, draft=drafts))


def run(one: Engine, requests: Sequence[tuple[list[int], SamplingParams]]) -> None:
    for prompt, params in requests:
        one.add_request(prompt, params, incremental=False)
    while one.has_unfinished:
        one.step()


def examples(
    model: str, texts: Sequence[Text], layers: tuple[int, ...], options: dict[str, Any]
) -> tuple[list[Example], Target]:
    """The texts with hidden states after `layers`, and what a head shares with the model."""
    plan = {**options, "enable_prefix_caching": False}
    last = num_layers(model, options) - 1
    collector = Collector((*layers, last))
    reader, found = engine(model, Draft(collector), 1, plan), []
    try:
        params, steps = reader.runner.params, reader.runner.steps
        for text in texts:
            collector.seen.clear()
            run(reader, [(text.token_T, SamplingParams(temperature=0, max_tokens=1))])
            *states, last_TD = (torch.cat(parts) for parts in zip(*collector.seen))
            with torch.no_grad():
                h_TD = last_TD.to(reader.runner.platform.device, reader.runner.model_dtype)
                choice_T = torch.cat([steps._head(one).argmax(-1) for one in h_TD.split(256)])
            found.append(Example(text, torch.cat(states, -1), choice_T.cpu()))
        target = Target(
            reader.runner.cfg,
            formats.rows(params.embed_VD, 0).cpu(),
            formats.rows(params.head_VD, 0).cpu(),
            params.final_norm_D.float().cpu(),
        )
        return found, target
    finally:
        reader.close()


def num_layers(model: str, options: dict[str, Any]) -> int:
    from nanovllm.startup.resolve import resolve_without_weights

    config = EngineConfig.from_options(model, {**options, "enforce_eager": True})
    return resolve_without_weights(config).model.config.num_layers


# accept lengths -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counting:
    """Counts how many draft tokens of each step were accepted."""

    inner: DeviceProposer
    accepted: list[int] = field(repr=False, compare=False)

    @property
    def num(self) -> int:
        return self.inner.num

    @property
    def layers(self) -> tuple[int, ...]:
        return self.inner.layers

    def propose(self, state: DeviceState, fed: Fed, steps: Any) -> Tensor | None:
        if fed.phase == "verify":
            fed_R = fed.batch.q_start_S.diff()
            moved_R = state.pos_S[fed.row_idx_R] - (fed.batch.seq_len_R - fed_R)
            is_whole_R = (fed_R == self.num + 1) & (fed.row_idx_R != state.pad_row)
            self.accepted.extend((moved_R[is_whole_R] - 1).tolist())
        return self.inner.propose(state, fed, steps)


@dataclass(frozen=True)
class Counted:
    """Drafts whose accepted tokens are counted."""

    drafts: Drafts
    accepted: list[int]

    def parts(self, resolved: ResolvedConfig) -> tuple[DraftSpec, Path | None]:
        spec, folder = self.drafts.parts(resolved)
        return replace(spec, proposer=Counting(spec.proposer, self.accepted)), folder


def accepted(
    model: str, drafts: Drafts, texts: Sequence[Text], num: int, options: dict[str, Any]
) -> list[int]:
    """The numbers of draft tokens that were accepted, step by step, in answers to the prompts of
    `texts` of the same lengths."""
    counts: list[int] = []
    one = engine(model, Counted(drafts, counts), num, options)
    try:
        counts.clear()  # those of warm-up
        nums = [max(len(text.token_T) - text.num_prompt, 1) for text in texts]
        params = [SamplingParams(temperature=0, max_tokens=num, ignore_eos=True) for num in nums]
        prompts = [text.token_T[: text.num_prompt] for text in texts]
        run(one, list(zip(prompts, params)))
        return counts
    finally:
        one.close()
