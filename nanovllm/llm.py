"""Offline inference: completes lists of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from nanovllm import log
from nanovllm.config import EngineConfig
from nanovllm.platforms import preload
from nanovllm.sampling import SamplingParams
from nanovllm.startup.compile_farm.farm import CompileFarm

if TYPE_CHECKING:
    from nanovllm.engine import LLMEngine
    from nanovllm.schedule.outputs import Completion, RequestOutput

Prompt = str | Sequence[int]
Message = dict[str, str]


class LLM:
    """A loaded model. Options are the fields of `EngineConfig`; an unknown one raises TypeError."""

    def __init__(self, model: str, **options: Any) -> None:
        log.configure()
        config = EngineConfig.from_options(model, options)
        with closing(CompileFarm.start(config)) as farm:
            wait = preload.begin(config.device)
            # This import takes long, because it imports torch: the farm and the device start
            # in the meantime.
            from nanovllm.engine import LLMEngine
            from nanovllm.startup.load import load

            wait()
            self.engine: LLMEngine = LLMEngine(load(config, farm))

    def close(self) -> None:
        """Free all memory now. `del llm` does the same. Using a closed model is an error."""
        self.engine.close()

    @property
    def tokenizer(self) -> Any | None:
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[dict[str, Any]]:
        """Complete prompts (texts, lists of token ids, or a mix) and wait for all of them.

        Returns one dict per prompt: text, token_ids, finish_reason ("stop" | "length" | "abort"),
        num_prompt_tokens, num_cached_tokens; logprobs and prompt_logprobs if requested. With n > 1
        `outputs` is a list of n such dicts, and the other keys are those of the first.

        Raises ValueError, and queues nothing, if a prompt is invalid. Ctrl-C aborts all prompts and
        leaves the engine usable.
        """
        owners = self._add_all(prompts, sampling_params, incremental=False)
        done: dict[int, Completion] = {}
        with (
            self._aborting(owners),
            tqdm(
                total=len(owners),
                desc="generating",
                unit="req",
                disable=not use_tqdm,
                dynamic_ncols=True,
            ) as bar,
        ):
            num_tokens = 0
            while len(done) < len(owners):
                for output in self._step(owners):
                    if output.completion is not None:
                        done[output.request_id] = output.completion
                        num_tokens += len(output.completion.token_ids)
                        bar.update()
                        bar.set_postfix_str(
                            f"{num_tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tok/s"
                        )
        grouped: dict[int, list[dict[str, Any]]] = {}
        for request_id, prompt_idx in owners.items():
            grouped.setdefault(prompt_idx, []).append(_as_dict(done[request_id]))
        return [
            {**group[0], "outputs": group} if len(group) > 1 else group[0]
            for group in grouped.values()
        ]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **template_options: Any,
    ) -> list[dict[str, Any]]:
        """`generate` for one or more conversations, in the checkpoint's chat template."""
        return self.generate(
            self.chat_prompts(messages, **template_options), sampling_params, use_tqdm
        )

    def chat_prompts(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], **template_options: Any
    ) -> list[list[int]]:
        """Token ids of conversations in the checkpoint's chat template, up to the answer."""
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise ValueError(
                f"{self.engine.config.model!r} has no chat template: "
                "use generate() with plain prompts"
            )
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        return [
            list(
                self.tokenizer.apply_chat_template(
                    list(conversation),
                    add_generation_prompt=True,
                    return_dict=True,
                    **template_options,
                )["input_ids"]
            )
            for conversation in conversations
        ]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yield increments: dicts with index (of the prompt), text and token_ids (the new ones),
        finish_reason (None until the last). Leaving the loop early aborts unfinished requests."""
        owners = self._add_all(prompts, sampling_params, incremental=True)
        num_left = len(owners)
        with self._aborting(owners):
            while num_left:
                for output in self._step(owners):
                    num_left -= output.finished
                    yield {
                        "index": owners[output.request_id],
                        "text": output.text,
                        "token_ids": output.token_ids,
                        "finish_reason": output.completion.finish_reason
                        if output.completion
                        else None,
                    }

    def _step(self, owners: dict[int, int]) -> list[RequestOutput]:
        """The next outputs of `owners`. Those of other requests, such as an open stream's, stay."""
        waiting = self.engine.take(owners)
        if waiting:
            return waiting
        self.engine.advance()
        return self.engine.take(owners)

    def _add_all(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        incremental: bool,
    ) -> dict[int, int]:
        """Queue all prompts, or none if one is invalid; returns {request id: index of prompt}."""
        is_single = isinstance(prompts, str) or bool(prompts and isinstance(prompts[0], int))
        all_prompts: Sequence[Any] = [prompts] if is_single else prompts
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            all_params = [sampling_params or SamplingParams()] * len(all_prompts)
        else:
            all_params = list(sampling_params)
        strange = [params for params in all_params if not isinstance(params, SamplingParams)]
        if strange:
            raise ValueError(
                f"sampling_params holds {strange[0]!r}: "
                "it must be one SamplingParams, or one per prompt"
            )
        if len(all_params) != len(all_prompts):
            raise ValueError(
                f"{len(all_params)} sampling params for {len(all_prompts)} prompts: "
                "give one, or one for each prompt"
            )
        owners: dict[int, int] = {}
        with self._aborting(owners, only_on_error=True):
            for prompt_idx, (prompt, params) in enumerate(zip(all_prompts, all_params)):
                for sample_idx in range(params.n):
                    seed = (
                        params.seed
                        if params.seed is None or not sample_idx
                        else params.seed + sample_idx
                    )
                    one = replace(params, n=1, seed=seed) if params.n > 1 else params
                    owners[self.engine.add_request(prompt, one, incremental=incremental)] = (
                        prompt_idx
                    )
        return owners

    def _aborting(self, owners: dict[int, int], *, only_on_error: bool = False) -> _Aborting:
        return _Aborting(self.engine, owners, only_on_error)


class _Aborting:
    """Aborts the requests when the block ends early: by an error, Ctrl-C or a closed generator."""

    def __init__(self, engine: LLMEngine, owners: dict[int, int], only_on_error: bool) -> None:
        self._engine, self._owners, self._only_on_error = engine, owners, only_on_error

    def __enter__(self) -> None:
        pass

    def __exit__(self, error: object, *_: object) -> None:
        if error is None and self._only_on_error:
            return
        self._engine.abort_all(self._owners)


def _as_dict(completion: Completion) -> dict[str, Any]:
    # `asdict` copies every token: 0.1 s for a batch of 134,000
    values = {field.name: getattr(completion, field.name) for field in fields(completion)}
    return {
        name: value
        for name, value in values.items()
        if value is not None or name not in ("logprobs", "prompt_logprobs")
    }
