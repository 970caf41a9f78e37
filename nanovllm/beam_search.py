"""Beam search over whole answers, one `generate` call with log-probabilities for each token.

The beams of all prompts run in one batch and share blocks through the prefix cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from nanovllm import progress
from nanovllm.progress import UseTqdm
from nanovllm.prompts import Prompt, TokensPrompt
from nanovllm.sampling import BeamSearchParams, SamplingParams
from nanovllm.schedule.logprobs import Logprob
from nanovllm.tokenizer import Decoding

if TYPE_CHECKING:
    from nanovllm.engine.engine_client import AnyEngine
    from nanovllm.outputs import RequestOutput


class Generates(Protocol):
    """What beam search uses of `LLM`."""

    @property
    def engine(self) -> AnyEngine: ...

    def generate(
        self, prompts: Any, sampling_params: Any, *, use_tqdm: bool
    ) -> list[RequestOutput]: ...


@dataclass(frozen=True)
class BeamSearchSequence:
    """One answer, with vLLM's fields. `tokens` and `text` begin with the prompt, and an answer that
    ended has its end-of-sequence token in both.

    orig_prompt: the prompt as token ids, with its salt.
    lora_request: there are no adapters in a beam search.
    logprobs: the log-probabilities of each generated token's step, as in `CompletionOutput`.
    stop_reason: the end-of-sequence token for finish_reason "stop".
    """

    orig_prompt: TokensPrompt
    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    lora_request: None = None
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None  # "stop" | "length" | "error"
    stop_reason: int | None = None


@dataclass(frozen=True)
class BeamSearchOutput:
    """The best sequences of a prompt, best first."""

    sequences: list[BeamSearchSequence]


def score(sequence: BeamSearchSequence, length_penalty: float, eos_ids: frozenset[int]) -> float:
    """Log-probability / length ** `length_penalty`, as in vLLM and transformers. The length counts
    the prompt, but not end-of-sequence."""
    num_tokens = len(sequence.tokens) - (sequence.tokens[-1] in eos_ids)
    return float(sequence.cum_logprob / num_tokens**length_penalty)


def search(
    llm: Generates, prompts: Sequence[Prompt], params: BeamSearchParams, use_tqdm: UseTqdm
) -> list[BeamSearchOutput]:
    """The `beam_width` best sequences of each prompt. Raises ValueError as `generate` does."""
    if not isinstance(params, BeamSearchParams):
        raise ValueError(f"params is {params!r}: it must be BeamSearchParams")
    eos_ids = frozenset() if params.ignore_eos else llm.engine.eos_ids
    step = SamplingParams(
        temperature=0.0, max_tokens=1, logprobs=2 * params.beam_width, ignore_eos=True,
        detokenize=False,
    )  # fmt: skip
    beams = [[_begun(llm.engine.token_ids(prompt), prompt.cache_salt)] for prompt in prompts]
    ended: list[list[BeamSearchSequence]] = [[] for _ in prompts]
    max_len = llm.engine.max_model_len
    bar: Any = use_tqdm if callable(use_tqdm) else progress.bar
    for _ in bar(range(params.max_tokens), desc="beam search", disable=not use_tqdm):
        # all beams of a prompt have the same length
        growing = [several and len(several[0].tokens) < max_len for several in beams]
        living = [
            (idx, beam) for idx, several in enumerate(beams) if growing[idx] for beam in several
        ]
        if not living:
            break
        grown_prompts = [
            {**beam.orig_prompt, "prompt_token_ids": beam.tokens} for _, beam in living
        ]
        outputs = llm.generate(grown_prompts, step, use_tqdm=False)
        grown: list[list[BeamSearchSequence]] = [[] for _ in prompts]
        for (idx, beam), output in zip(living, outputs):
            for sequence in _extended(beam, output, eos_ids):
                (ended if sequence.finish_reason else grown)[idx].append(sequence)
        beams = [
            _best(new, params, eos_ids) if grows else old
            for new, old, grows in zip(grown, beams, growing)
        ]
    return [
        BeamSearchOutput([_finished(llm, one) for one in _best(done + left, params, eos_ids)])
        for done, left in zip(ended, beams)
    ]


def _best(
    sequences: list[BeamSearchSequence], params: BeamSearchParams, eos_ids: frozenset[int]
) -> list[BeamSearchSequence]:
    """The `beam_width` best, best first."""
    ranked = sorted(sequences, key=lambda one: -score(one, params.length_penalty, eos_ids))
    return ranked[: params.beam_width]


def _begun(token_ids: list[int], cache_salt: str | None) -> BeamSearchSequence:
    prompt: TokensPrompt = {"prompt_token_ids": token_ids}
    if cache_salt is not None:
        prompt["cache_salt"] = cache_salt
    return BeamSearchSequence(prompt, token_ids, [])


def _extended(
    beam: BeamSearchSequence, output: RequestOutput, eos_ids: frozenset[int]
) -> list[BeamSearchSequence]:
    """The beam extended by each likely next token. A beam with an error ends unchanged."""
    if output["finish_reason"] == "error":
        return [replace(beam, finish_reason="error")]
    found = output["logprobs"][0]
    return [
        replace(
            beam,
            tokens=[*beam.tokens, token_id],
            logprobs=[*beam.logprobs, found],
            cum_logprob=beam.cum_logprob + logprob,
            finish_reason="stop" if token_id in eos_ids else None,
            stop_reason=token_id if token_id in eos_ids else None,
        )
        for token_id, logprob in found.items()
    ]


def _finished(llm: Generates, sequence: BeamSearchSequence) -> BeamSearchSequence:
    tokenizer = llm.engine.tokenizer
    how = Decoding(skip_special_tokens=False)  # so the text has the end, as in vLLM
    text = tokenizer.decode(sequence.tokens, how) if tokenizer is not None else None
    return replace(sequence, text=text, finish_reason=sequence.finish_reason or "length")
