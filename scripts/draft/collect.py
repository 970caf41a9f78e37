"""What a model says to prompts, and its hidden states over that, both from the engine.

T tokens of one text | D hidden | V vocabulary | P likely tokens
"""

from __future__ import annotations

import json
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
from nanovllm.progress import bar
from nanovllm.runner.proposer import DeviceProposer, Fed
from nanovllm.runner.spec import DraftSpec
from nanovllm.runner.state import DeviceState
from nanovllm.startup.draft import Draft, Drafts
from nanovllm.startup.load import load
from nanovllm.startup.resolve import ResolvedConfig

LIKELY = 16  # tokens whose probabilities are kept


class Text(NamedTuple):
    """A prompt and its answer: `token_T`, of which the first `num_prompt` are the prompt's."""

    token_T: list[int]
    num_prompt: int


class Example(NamedTuple):
    """A text with the model's hidden states: those after the layers that are read, beside each
    other, and those after the last layer. After each token the model finds the tokens `likely_TP`
    most likely, the first the most, with the probabilities `chance_TP`."""

    text: Text
    states_TJ: Tensor
    last_TD: Tensor
    likely_TP: Tensor
    chance_TP: Tensor

    @property
    def choice_T(self) -> Tensor:
        """The token that the model would choose after each."""
        return self.likely_TP[:, 0]


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


def write(file: Path, texts: Sequence[Text]) -> None:
    """Write texts to a file, one on each line."""
    lines = [json.dumps({"num_prompt": one.num_prompt, "tokens": one.token_T}) for one in texts]
    file.write_text("\n".join(lines) + "\n")


def read(file: Path, num: int) -> list[Text]:
    """The texts of a file of `write`. Raises ValueError if they are not `num`."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    if len(found) != num:
        raise ValueError(
            f"{file} has {len(found)} texts, but there are {num} prompts: name another file"
        )
    return [Text(one["tokens"], one["num_prompt"]) for one in found]


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
        for text in bar(texts, desc="hidden states", unit="text"):
            collector.seen.clear()
            run(reader, [(text.token_T, SamplingParams(temperature=0, max_tokens=1))])
            *states, last_TD = (torch.cat(parts) for parts in zip(*collector.seen))
            with torch.no_grad():
                h_TD = last_TD.to(reader.runner.platform.device, reader.runner.model_dtype)
                likely = [likely_of(steps._head(one)) for one in h_TD.split(256)]
            found.append(
                Example(text, torch.cat(states, -1), last_TD, *map(torch.cat, zip(*likely)))
            )
        target = Target(
            reader.runner.cfg,
            formats.rows(params.embed_VD, 0).cpu(),
            formats.rows(params.head_VD, 0).cpu(),
            params.final_norm_D.float().cpu(),
        )
        return found, target
    finally:
        reader.close()


def likely_of(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely tokens [T, P], and their probabilities."""
    chance_TP, likely_TP = logits_TV.float().softmax(-1).topk(min(LIKELY, logits_TV.shape[-1]))
    return likely_TP.cpu(), chance_TP.cpu()


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
    model: str, drafts: Drafts, texts: dict[str, list[Text]], num: int, options: dict[str, Any]
) -> dict[str, list[int]]:
    """The numbers of draft tokens that were accepted, step by step, in answers to the prompts of
    each kind of `texts`, of the same lengths."""
    counts: list[int] = []
    one, found = engine(model, Counted(drafts, counts), num, options), {}
    try:
        for kind, some in texts.items():
            counts.clear()  # those of warm-up, or of another kind
            nums = [max(len(text.token_T) - text.num_prompt, 1) for text in some]
            params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in nums]
            prompts = [text.token_T[: text.num_prompt] for text in some]
            run(one, list(zip(prompts, params)))
            found[kind] = list(counts)
        return found
    finally:
        one.close()
