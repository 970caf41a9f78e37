"""Offline inference: completes lists of prompts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

from nanovllm import log, progress
from nanovllm.compat.nano_vllm import NanoMethods
from nanovllm.config import EngineConfig
from nanovllm.engine.engine_client import NO_PROFILE
from nanovllm.lora_request import LoRARequest
from nanovllm.pooling_llm import PoolingMethods
from nanovllm.progress import UseTqdm
from nanovllm.prompts import AnyPrompts, Prompt, prompt_list
from nanovllm.replicas.engine_factory import open_engine
from nanovllm.sampling import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from nanovllm.beam_search import BeamSearchOutput
    from nanovllm.compat.llm_engine import LLMEngine
    from nanovllm.engine.engine_client import AnyEngine
    from nanovllm.engine.metrics import Metric
    from nanovllm.outputs import RequestOutput, StreamOutput
    from nanovllm.schedule.outputs import FinishedOutput

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
Params = SamplingParams | Sequence[SamplingParams] | None
LoraRequests = LoRARequest | Sequence[LoRARequest | None] | None


class PerPrompt(NamedTuple):
    """What prompts have: one for all, or one for each."""

    sampling_params: Params
    priority: Sequence[int] | None
    lora_request: LoraRequests


class LLM(NanoMethods, PoolingMethods):
    """A loaded model. Options are the fields of `EngineConfig`, and vLLM's names for them.

    Several threads may call one LLM: their prompts run in the same batches. Raises TypeError for an
    unknown option.
    """

    def __init__(self, model: str | PathLike[str], **options: Any) -> None:
        log.configure()
        config = EngineConfig.from_options(model, options)
        self.engine: AnyEngine = open_engine(config)
        from nanovllm.engine.locked_engine import LockedEngine  # imports torch

        self.shared = LockedEngine(self.engine)
        self._has_logged_defaults = False

    def close(self) -> None:
        """Free all memory now. `del llm` does the same. Using a closed model is an error."""
        with self.shared.exclusive() as engine:
            engine.close()

    @property
    def tokenizer(self) -> Any | None:
        """transformers' tokenizer of the checkpoint, or the assigned one; None if there is none."""
        tokenizer = self.engine.tokenizer
        return None if tokenizer is None else tokenizer.full

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        if self.engine.tokenizer is None:
            raise ValueError(f"{self.engine.config.model!r} has no tokenizer to replace")
        if not callable(getattr(tokenizer, "decode", None)) or isinstance(tokenizer, bytes):
            raise ValueError(f"the tokenizer is {tokenizer!r}: it must have encode and decode")
        if option := self.engine.config.replicas_option:
            raise ValueError(
                f"the tokenizer cannot be replaced with {option}: each replica has its own"
            )
        self.engine.tokenizer.full = tokenizer

    def get_tokenizer(self) -> Any | None:
        return self.tokenizer

    def set_tokenizer(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def llm_engine(self) -> LLMEngine:
        """The same engine with vLLM's interface, for requests that are stepped by hand."""
        from nanovllm.compat.llm_engine import LLMEngine

        return LLMEngine(self.shared)

    # completing prompts -----------------------------------------------------------------------

    def generate(
        self,
        prompts: AnyPrompts | None = None,
        sampling_params: Params = None,
        use_tqdm: UseTqdm = True,
        *,
        prompt_token_ids: Any = None,
        priority: Sequence[int] | None = None,
        lora_request: LoraRequests = None,
    ) -> list[RequestOutput]:
        """Complete prompts (see `nanovllm/prompts.py`) and wait for all of them.

        Returns one `RequestOutput` per prompt, in order: a dict with text, token_ids and more whose
        keys are also attributes. `lora_request` is an adapter (docs/lora.md), or one for each
        prompt. Without sampling_params, those of the checkpoint's
        generation_config.json are used. Prompts with a lower `priority` number run first.

        Raises ValueError, and queues nothing, if a prompt is invalid. Ctrl-C aborts all prompts and
        leaves the engine usable.
        """
        from nanovllm.outputs import completion_output, request_output

        asked = prompt_list(prompts, prompt_token_ids)
        adapters = _lora_requests(lora_request, len(asked))
        given = PerPrompt(sampling_params, priority, adapters)
        owners = self._add_all(asked, given, incremental=False)
        done = self._wait(owners, use_tqdm)
        grouped: dict[int, list[FinishedOutput]] = {}
        for request_id, (prompt_idx, _) in owners.items():
            grouped.setdefault(prompt_idx, []).append(done[request_id])
        return [
            request_output(
                str(prompt_idx),
                asked[prompt_idx].text,
                group[0].prompt_ids,
                [completion_output(idx, completion) for idx, completion in enumerate(group)],
                group[0].prompt_logprobs,
                adapters[prompt_idx],
            )
            for prompt_idx, group in grouped.items()
        ]

    def stream(
        self,
        prompts: AnyPrompts | None = None,
        sampling_params: Params = None,
        *,
        prompt_token_ids: Any = None,
        priority: Sequence[int] | None = None,
        lora_request: LoraRequests = None,
    ) -> Iterator[StreamOutput]:
        """Yield the answers in pieces (`StreamOutput`) as they grow. Leaving the loop early aborts
        unfinished requests."""
        from nanovllm.outputs import stream_output

        asked = prompt_list(prompts, prompt_token_ids)
        given = PerPrompt(sampling_params, priority, lora_request)
        owners = self._add_all(asked, given, incremental=True)
        num_left = len(owners)
        try:
            while num_left:
                for increment in self.shared.outputs(owners):
                    num_left -= increment.finished
                    yield stream_output(*owners[increment.request_id], increment)
        finally:
            self.shared.drop(owners)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: UseTqdm = True,
        *,
        lora_request: LoraRequests = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """`generate` for one or more conversations, in the checkpoint's chat template.

        Options are the fields of `chat.ChatOptions` and variables of the template, such as
        enable_thinking. `lora_request` is that of `generate`. Raises ValueError for a variable that
        the template does not read.
        """
        prompts = self._chat_prompts(messages, options)
        return self.generate(prompts, sampling_params, use_tqdm, lora_request=lora_request)

    def chat_prompts(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], **options: Any
    ) -> list[list[int]]:
        """Token ids of conversations in the checkpoint's chat template, up to the answer."""
        prompts = self._chat_prompts(messages, options)
        for prompt in prompts:
            if prompt.media:
                raise ValueError(
                    f"the conversation has {prompt.media[0].name}, which has no token ids yet: "
                    "use chat()"
                )
        return [list(prompt.token_ids or ()) for prompt in prompts]

    def beam_search(
        self, prompts: AnyPrompts, params: BeamSearchParams, use_tqdm: UseTqdm = False
    ) -> list[BeamSearchOutput]:
        """The likeliest answers to each prompt, by beam search. See `nanovllm/beam_search.py`."""
        from nanovllm.beam_search import search

        return search(self, prompt_list(prompts), params, use_tqdm)

    # the engine -------------------------------------------------------------------------------

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters that requests without any get: those of generation_config.json."""
        return self.engine.default_params.clone()

    def reset_prefix_cache(self) -> bool:
        """Empty the prefix cache. Returns True."""
        with self.shared.exclusive() as engine:
            engine.forget_prefixes()
        return True

    def sleep(self, level: int = 1) -> None:
        """Give the memory of weights and cache back to the device until `wake_up`.

        Level 1 moves the weights to host memory (on a CPU they stay there); level 2 drops them.
        Captured graphs are kept. On a GPU this needs enable_sleep_mode=True. A sleeping engine
        takes no requests.

        Raises ValueError for another level, for an engine that cannot sleep, and while requests
        are unfinished.
        """
        with self.shared.exclusive() as engine:
            engine.sleep(level)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Undo `sleep` for "weights", "kv_cache" or, without `tags`, both. After level 2 the
        weights are read from the checkpoint again. Raises ValueError for other tags."""
        with self.shared.exclusive() as engine:
            engine.wake_up(tags)

    def get_metrics(self) -> list[Metric]:
        """Gauges and counters of the engine."""
        return self.engine.metrics.read()

    def start_profile(self, *_: object, **__: object) -> None:
        """Refused, like stop_profile: see `nanovllm bench throughput --profile`."""
        raise ValueError(NO_PROFILE)

    stop_profile = start_profile

    def _chat_prompts(self, messages: Any, options: Mapping[str, Any]) -> list[Prompt]:
        from nanovllm.chat import ChatOptions, render

        template_source = self.engine.tokenizer
        if template_source is None:
            raise ValueError(
                f"{self.engine.config.model!r} has no chat template: "
                "use generate() with plain prompts"
            )
        chat_options = ChatOptions.from_options(options)
        return render(template_source, messages, chat_options, self.engine.check_media)

    def _wait(self, owners: Mapping[int, object], use_tqdm: UseTqdm) -> dict[int, FinishedOutput]:
        """The completions of requests, with a progress bar."""
        make_bar = use_tqdm if callable(use_tqdm) else progress.bar
        done: dict[int, FinishedOutput] = {}
        num_tokens = 0
        try:
            with make_bar(
                total=len(owners),
                desc="generating",
                unit="req",
                disable=not use_tqdm,
                dynamic_ncols=True,
            ) as bar:
                while len(done) < len(owners):
                    for increment in self.shared.outputs(owners):
                        if increment.completion is None:
                            continue
                        done[increment.request_id] = increment.completion
                        num_tokens += len(increment.completion.token_ids)
                        bar.update()
                        seconds = max(bar.format_dict["elapsed"], 1e-9)
                        bar.set_postfix_str(f"{num_tokens / seconds:.0f} tok/s")
        except BaseException:
            self.shared.drop(owners)
            raise
        return done

    def _add_all(
        self, asked: Sequence[Prompt], given: PerPrompt, *, incremental: bool
    ) -> dict[int, tuple[int, int]]:
        """Queue all prompts, or none if one is invalid.

        Returns {request id: (index of the prompt, index of the answer to it)}.
        """
        all_params = self._params(given.sampling_params, len(asked))
        priorities = _one_each("priorities", given.priority, len(asked), 0)
        adapters = _lora_requests(given.lora_request, len(asked))
        encoded = [self.engine.encoded(prompt) for prompt in asked]
        owners: dict[int, tuple[int, int]] = {}
        try:
            with self.shared.exclusive() as engine:
                rows = zip(encoded, all_params, priorities, adapters)
                for prompt_idx, (prompt, params, prio, adapter) in enumerate(rows):
                    for sample_idx, one in enumerate(params.of_answers()):
                        request_id = engine.add_request(
                            prompt,
                            one,
                            incremental=incremental,
                            priority=prio,
                            lora_request=adapter,
                        )
                        owners[request_id] = prompt_idx, sample_idx
        except BaseException:
            self.shared.drop(owners)
            raise
        return owners

    def _params(self, given: Params, num: int) -> list[SamplingParams]:
        """The sampling parameters of each of `num` prompts."""
        if given is None:
            default = self.engine.default_params
            if default != SamplingParams() and not self._has_logged_defaults:
                logger.info("no sampling_params given: using generation_config.json's %s", default)
                self._has_logged_defaults = True
            return [default] * num
        if isinstance(given, SamplingParams):
            return [given] * num
        if not isinstance(given, Iterable):
            raise ValueError(f"sampling_params is {given!r}: it must be SamplingParams")
        several = list(given)
        for params in several:
            if not isinstance(params, SamplingParams):
                raise ValueError(
                    f"sampling_params holds {params!r}: "
                    "it must be one SamplingParams, or one per prompt"
                )
        return _one_each("sampling params", several, num, None)


def _one_each(name: str, given: Sequence[Any] | None, num: int, default: Any) -> list[Any]:
    if given is None:
        return [default] * num
    if not isinstance(given, Iterable):
        raise ValueError(f"the {name} are {given!r}: give a list with one for each prompt")
    given = list(given)
    if len(given) != num:
        raise ValueError(f"{len(given)} {name} for {num} prompts: give one, or one for each prompt")
    return given


def _lora_requests(given: LoraRequests, num: int) -> list[LoRARequest | None]:
    """The adapter of each of `num` prompts."""
    if given is None or isinstance(given, LoRARequest):
        return [given] * num
    return _one_each("lora requests", given, num, None)
