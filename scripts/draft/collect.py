"""What a model says to prompts, and its hidden states over that, both from the engine.

T tokens of a step or a text | N tokens of all texts | B texts of a batch | D hidden | V vocabulary
P likely tokens | J = D times the states
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.cli.bench.engines import engine_of
from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.kernels.reference.sample import NO_TOKEN
from nanovllm.models import formats
from nanovllm.models.config import ModelConfig
from nanovllm.progress import bar
from nanovllm.runner.proposer import Fed
from nanovllm.runner.state import DeviceState
from nanovllm.startup.draft import Draft
from nanovllm.startup.load import load

LIKELY = 16  # tokens whose probabilities are kept
HEAD_TOKENS = 1024  # whose logits are computed at a time


class Text(NamedTuple):
    """A prompt and its answer: `token_T`, of which the first `num_prompt` are the prompt's."""

    token_T: list[int]
    num_prompt: int


class Places(NamedTuple):
    """Where the tokens of some texts, padded to the longest one, are among those of all texts.

    at_BT: places of padding are those of a text's last token. is_own_BT: False for padding.
    of_answer_BT: the number of a token in its answer; negative in prompts.
    """

    at_BT: Tensor
    is_own_BT: Tensor
    of_answer_BT: Tensor


class Examples(NamedTuple):
    """Texts with the model's hidden states after each token, text after text: those after the
    layers that are read, beside each other, and those after the last layer. After each token the
    model finds the tokens `likely_NP` most likely, the first the most, with the probabilities
    `chance_NP`."""

    texts: Sequence[Text]
    firsts: Sequence[int]  # the place of each text's first token
    token_N: Tensor
    states_NJ: Tensor
    last_ND: Tensor
    likely_NP: Tensor
    chance_NP: Tensor

    def places(self, numbers: Sequence[int]) -> Places:
        """Those of the texts of these numbers."""
        some = [self.texts[one] for one in numbers]
        rows = [
            (self.firsts[number], len(one.token_T), one.num_prompt)
            for number, one in zip(numbers, some)
        ]
        column_3B = torch.tensor(rows, device=self.token_N.device).T.unsqueeze(-1)
        first_B1, num_B1, num_prompt_B1 = column_3B
        size = max(len(one.token_T) for one in some)
        number_T = torch.arange(size, device=self.token_N.device)
        at_BT = first_B1 + number_T.minimum(num_B1 - 1)
        return Places(at_BT, number_T < num_B1, number_T - num_prompt_B1)


class Target(NamedTuple):
    """What a head shares with its model, on the CPU in fp32, and the model's sizes."""

    config: ModelConfig
    embed_VD: Tensor
    head_VD: Tensor
    final_norm_D: Tensor


def answers(llm: LLM, prompts: Sequence[str], params: list[SamplingParams]) -> list[Text]:
    """What the model answers to prompts, in its chat template if it has one."""
    found = llm.generate(as_chats(llm, prompts) if has_template(llm) else list(prompts), params)
    return [
        Text([*one.prompt_token_ids, *one.outputs[0].token_ids], len(one.prompt_token_ids))
        for one in found
    ]


def has_template(llm: LLM) -> bool:
    return bool(getattr(llm.get_tokenizer(), "chat_template", None))


def as_chats(llm: LLM, prompts: Sequence[str]) -> Any:
    return llm.chat_prompts([[{"role": "user", "content": prompt}] for prompt in prompts])


@dataclass(frozen=True)
class Collector:
    """Proposes nothing, and keeps the tokens and the hidden states of steps with prompts."""

    layers: tuple[int, ...]
    num: int = 1
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False, compare=False)

    def propose(self, state: DeviceState, fed: Fed, steps: Any) -> Tensor:
        if fed.phase == "prefill":
            num_tokens = int(fed.batch.q_start_S[-1])  # padding follows
            assert fed.states_TJ is not None
            # the next step writes to the same memory
            self.seen.append((fed.token_T[:num_tokens], fed.states_TJ[:num_tokens].clone()))
        return fed.row_idx_R.unsqueeze(1).new_full((len(fed.row_idx_R), self.num), NO_TOKEN)


def reader(model: str, collector: Collector, options: dict[str, Any]) -> Engine:
    """An eager engine, whose proposer may read numbers on the host."""
    plan = {**options, "enable_prefix_caching": False, "enforce_eager": True, "draft_lengths": (1,)}
    config = EngineConfig.from_options(model, plan)
    return Engine(load(config, show_progress=False, draft=Draft(collector)))


@torch.no_grad()
def examples(
    model: str, texts: Sequence[Text], layers: tuple[int, ...], options: dict[str, Any],
    device: torch.device,
) -> tuple[Examples, Target]:  # fmt: skip
    """The texts with hidden states after `layers`, on `device` if they take at most half of its
    free memory, else on the host; and what a head shares with its model.

    A step reads as many texts as the engine's steps have room for.
    """
    collector = Collector((*layers, num_layers(model, options) - 1))
    with closing(reader(model, collector, options)) as one:
        found = made_room(texts, len(layers), one, device)
        collector.seen.clear()  # what warm-up has read
        for text in texts:
            params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
            one.add_request(text.token_T, params, incremental=False)
        progress, done = bar(range(len(found.token_N)), desc="hidden states", unit="token"), 0
        while one.has_unfinished:
            one.step()
            for token_T, states_TJ in collector.seen:
                keep(found, done, token_T, states_TJ, one)
                done += len(token_T)
                progress.update(len(token_T))
            collector.seen.clear()
        told = torch.tensor([token for text in texts for token in text.token_T])
        # requests are read in their order, so that a place tells the text
        assert torch.equal(found.token_N.cpu(), told), "steps read the texts in another order"
        return found, target_of(one)


def made_room(
    texts: Sequence[Text], num_layers: int, one: Engine, device: torch.device
) -> Examples:
    """Examples without numbers."""
    cfg, dtype = one.runner.cfg, one.runner.model_dtype
    firsts = [0, *accumulate(len(text.token_T) for text in texts)]
    num, num_likely = firsts.pop(), min(LIKELY, cfg.vocab_size)
    token_bytes = (num_layers + 1) * cfg.hidden_size * dtype.itemsize + 8 + 8 * num_likely
    if device.type == "cuda" and num * token_bytes > torch.cuda.mem_get_info()[0] // 2:
        device = torch.device("cpu")
    return Examples(
        texts,
        firsts,
        torch.full((num,), NO_TOKEN, dtype=torch.int64, device=device),
        torch.empty(num, num_layers * cfg.hidden_size, dtype=dtype, device=device),
        torch.empty(num, cfg.hidden_size, dtype=dtype, device=device),
        torch.empty(num, num_likely, dtype=torch.int32, device=device),
        torch.empty(num, num_likely, device=device),
    )


def keep(found: Examples, first: int, token_T: Tensor, states_TJ: Tensor, one: Engine) -> None:
    """Write the tokens of a step, and what the model made of them, from place `first` on."""
    place, hidden = slice(first, first + len(token_T)), found.last_ND.shape[1]
    found.token_N[place] = token_T.to(found.token_N.device)
    found.states_NJ[place] = states_TJ[:, :-hidden].to(found.states_NJ.device)
    last_TD = states_TJ[:, -hidden:].contiguous()
    found.last_ND[place] = last_TD.to(found.last_ND.device)
    for part_TD in last_TD.split(HEAD_TOKENS):
        logits_TV = one.runner.steps._head(part_TD).float()
        chance_TP, likely_TP = logits_TV.softmax(-1).topk(found.likely_NP.shape[1])
        place = slice(first, first + len(part_TD))
        found.likely_NP[place] = likely_TP.int().to(found.likely_NP.device)
        found.chance_NP[place] = chance_TP.to(found.chance_NP.device)
        first += len(part_TD)


def target_of(one: Engine) -> Target:
    params = one.runner.params
    return Target(
        one.runner.cfg,
        formats.rows(params.embed_VD, 0).cpu(),
        formats.rows(params.head_VD, 0).cpu(),
        params.final_norm_D.float().cpu(),
    )


def num_layers(model: str, options: dict[str, Any]) -> int:
    from nanovllm.startup.resolve import resolve_without_weights

    config = EngineConfig.from_options(model, {**options, "enforce_eager": True})
    return resolve_without_weights(config).model.config.num_layers


# accept lengths -----------------------------------------------------------------------------------


class Counts(NamedTuple):
    """num_steps: rows of steps that verified drafts. accepted: those whose draft at a position was
    accepted."""

    num_steps: int
    accepted: tuple[int, ...]

    def since(self, before: Counts) -> Counts:
        later = (new - old for new, old in zip(self.accepted, before.accepted))
        return Counts(self.num_steps - before.num_steps, tuple(later))


def counts_of(llm: LLM, num: int) -> Counts:
    """What an engine has drafted until now, `num` tokens of a step at most."""
    counts = engine_of(llm).scheduler.counts
    return Counts(counts.num_drafts, tuple(counts.accepted_at[place] for place in range(num)))


def accepted(
    model: str, drafts: dict[str, Any], texts: dict[str, list[Text]], options: dict[str, Any]
) -> dict[str, Counts]:
    """How many draft tokens of each step were accepted in greedy answers to the prompts of each
    kind of `texts`, of the same lengths. `drafts` is a `speculative_config`."""
    num, found = drafts["num_speculative_tokens"], {}
    always = {"speculative_config": drafts, "tuning": {"adapt_draft_length": False}}
    with closing(LLM(model, **options, **always)) as llm:
        for kind, some in texts.items():
            nums = [max(len(text.token_T) - text.num_prompt, 1) for text in some]
            params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in nums]
            prompts: Any = [{"prompt_token_ids": text.token_T[: text.num_prompt]} for text in some]
            before = counts_of(llm, num)
            llm.generate(prompts, params, use_tqdm=False)
            found[kind] = counts_of(llm, num).since(before)
    return found
