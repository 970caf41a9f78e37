"""Streamed outputs in vLLM's forms: the text so far, the new text, or the final output."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanovllm.lora_request import LoRARequest
from nanovllm.outputs import (
    CompletionOutput,
    RequestOutput,
    TopLogprobs,
    completion_output,
    cumulative,
    request_output,
)
from nanovllm.sampling import RequestOutputKind
from nanovllm.schedule.outputs import FinishedOutput, OutputDelta

Kind = RequestOutputKind


@dataclass
class StreamedAnswer:
    """The text, tokens and log-probabilities so far of one answer."""

    index: int
    prompt_len: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TopLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    done: FinishedOutput | None = None

    def add(self, increment: OutputDelta) -> None:
        self.texts.append(increment.text)
        self.token_ids += increment.token_ids
        self.logprobs += increment.logprobs or []
        self.cumulative_logprob += cumulative(increment.token_ids, increment.logprobs) or 0.0
        self.done = increment.completion

    def output(self) -> CompletionOutput:
        """The whole answer so far, copied."""
        if self.done is not None:
            return completion_output(self.index, self.done)
        self.texts = ["".join(self.texts)]
        return self._output(self.texts[0], self.token_ids[:], self.logprobs[:] or None)

    def delta(self, increment: OutputDelta) -> CompletionOutput:
        """Only the new text, tokens and log-probabilities."""
        return self._output(increment.text, increment.token_ids, increment.logprobs)

    def _output(
        self, text: str, token_ids: list[int], logprobs: list[TopLogprobs] | None
    ) -> CompletionOutput:
        if self.done is not None:
            output = completion_output(self.index, self.done)
            output.update(text=text, token_ids=token_ids)
        else:
            output = CompletionOutput(
                index=self.index,
                text=text,
                token_ids=token_ids,
                finish_reason=None,
                stop_reason=None,
                cumulative_logprob=self.cumulative_logprob if self.logprobs else None,
                num_prompt_tokens=self.prompt_len,
                num_cached_tokens=0,
            )
        if logprobs is not None:
            output["logprobs"] = logprobs
        return output


@dataclass
class StreamedOutput:
    """A prompt with its n answers, by the caller's keys, and the form of its outputs."""

    request_id: str
    prompt: str | None
    prompt_ids: list[int]
    kind: RequestOutputKind
    lora_request: LoRARequest | None = None
    answers: dict[int, StreamedAnswer] = field(default_factory=dict)

    def output(self, increments: dict[int, OutputDelta]) -> RequestOutput | None:
        """The output after these new increments; None if there is nothing to show."""
        for key, increment in increments.items():
            self.answers[key].add(increment)
        dones = [answer.done for answer in self.answers.values()]
        if self.kind is Kind.FINAL_ONLY and None in dones:
            return None
        if self.kind is Kind.DELTA:
            shown = [self.answers[key].delta(increment) for key, increment in increments.items()]
        else:
            shown = [answer.output() for answer in self.answers.values()]
        first = next((done for done in dones if done is not None), None)
        found = (done.prompt_logprobs for done in dones if done is not None)
        prompt_logprobs = next((one for one in found if one is not None), None)
        # the prompt of a finished answer includes the tokens of images
        prompt_ids = first.prompt_ids if first is not None else self.prompt_ids
        output = request_output(
            self.request_id, self.prompt, prompt_ids, shown, prompt_logprobs, self.lora_request
        )
        output["finished"] = None not in dones
        return output
