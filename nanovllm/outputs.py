"""The outputs that users read: dicts whose keys are also attributes, with vLLM's names."""

from __future__ import annotations

from typing import Any, ClassVar

from nanovllm.lora_request import LoRARequest
from nanovllm.schedule.logprobs import Logprob
from nanovllm.schedule.outputs import FinishedOutput, OutputDelta

TopLogprobs = dict[int, Logprob]  # by token id, likeliest first


class _Record(dict[str, Any]):
    """A dict that can be read by attributes. Attributes in ABSENT_AS_NONE may lack their key."""

    ABSENT_AS_NONE: ClassVar[tuple[str, ...]] = ()

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in self.ABSENT_AS_NONE:
            return None
        raise AttributeError(f"{type(self).__name__} has no {name!r}")


class CompletionOutput(_Record):
    """One answer.

    logprobs: for each token, the `Logprob` of the likeliest tokens and of itself, by token id.
    cumulative_logprob: the sum over the tokens. Both are None unless requested.
    error: what went wrong, for finish_reason "error". The tokens before the error are kept.
    """

    ABSENT_AS_NONE = ("logprobs", "prompt_logprobs", "lora_request", "error")

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None  # "stop" | "length" | "abort" | "error"; None while it grows
    stop_reason: int | str | None
    cumulative_logprob: float | None
    logprobs: list[TopLogprobs] | None
    lora_request: LoRARequest | None
    num_prompt_tokens: int
    num_cached_tokens: int
    error: str | None

    def finished(self) -> bool:
        return self.finish_reason is not None


class RequestOutput(_Record):
    """A prompt with its answers. Keys of an answer read the first answer: `output["text"]`."""

    ABSENT_AS_NONE = (
        "logprobs", "prompt_logprobs", "lora_request", "encoder_prompt", "metrics", "error",
    )  # fmt: skip

    request_id: str
    prompt: str | None  # None if the prompt was token ids
    prompt_token_ids: list[int]
    finished: bool
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TopLogprobs | None] | None
    lora_request: LoRARequest | None
    num_prompt_tokens: int
    num_cached_tokens: int
    error: str | None  # of the first answer


class StreamOutput(_Record):
    """A piece of an answer.

    index: the number of the prompt. output_index: of the answer to it, 0 … n − 1.
    text, token_ids, logprobs: the new ones. finish_reason: None until the last piece. error: that
    of `CompletionOutput`.
    """

    ABSENT_AS_NONE = ("logprobs", "error")

    index: int
    output_index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: list[TopLogprobs] | None
    error: str | None


def stream_output(index: int, output_index: int, increment: OutputDelta) -> StreamOutput:
    done = increment.completion
    piece = StreamOutput(
        index=index,
        output_index=output_index,
        text=increment.text,
        token_ids=increment.token_ids,
        finish_reason=done.finish_reason if done else None,
        stop_reason=done.stop_reason if done else None,
    )
    if increment.logprobs is not None:
        piece["logprobs"] = increment.logprobs
    if done is not None and done.error is not None:
        piece["error"] = done.error
    return piece


def completion_output(index: int, done: FinishedOutput) -> CompletionOutput:
    answer = CompletionOutput(
        index=index,
        text=done.text,
        token_ids=done.token_ids,
        finish_reason=done.finish_reason,
        stop_reason=done.stop_reason,
        cumulative_logprob=cumulative(done.token_ids, done.logprobs),
        num_prompt_tokens=len(done.prompt_ids),
        num_cached_tokens=done.num_cached_tokens,
    )
    if done.logprobs is not None:
        answer["logprobs"] = done.logprobs
    if done.error is not None:
        answer["error"] = done.error
    return answer


def cumulative(token_ids: list[int], logprobs: list[TopLogprobs] | None) -> float | None:
    """The sum of the tokens' log-probabilities; None without any."""
    if logprobs is None:
        return None
    return sum(float(found[token_id]) for token_id, found in zip(token_ids, logprobs))


def request_output(
    request_id: str,
    prompt: str | None,
    prompt_token_ids: list[int],
    answers: list[CompletionOutput],
    prompt_logprobs: list[TopLogprobs | None] | None,
    lora_request: LoRARequest | None = None,
) -> RequestOutput:
    """The output of a prompt, from its answers in order, with the adapter of its request."""
    first = answers[0]
    output = RequestOutput(
        request_id=request_id,
        prompt=prompt,
        prompt_token_ids=prompt_token_ids,
        finished=all(answer.finished() for answer in answers),
        outputs=answers,
    )
    for name in ("text", "token_ids", "finish_reason", "num_prompt_tokens", "num_cached_tokens"):
        output[name] = first[name]
    if first.logprobs is not None:
        output["logprobs"] = first.logprobs
    if first.error is not None:
        output["error"] = first.error
    if prompt_logprobs is not None:
        output["prompt_logprobs"] = prompt_logprobs
    if lora_request is not None:
        for one in (output, *answers):
            one["lora_request"] = lora_request
    return output
