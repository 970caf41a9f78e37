"""The methods of `LLM` for models that pool, under vLLM's names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from nanovllm import pairs, progress
from nanovllm.pooling_params import PoolingInfo, PoolingParams
from nanovllm.progress import UseTqdm
from nanovllm.prompts import AnyPrompts, Prompt, as_prompt, each_prompt

if TYPE_CHECKING:
    from nanovllm.engine.engine_client import AnyEngine
    from nanovllm.engine.locked_engine import LockedEngine
    from nanovllm.pooling_outputs import (
        ClassificationRequestOutput,
        EmbeddingRequestOutput,
        PoolingOutput,
        PoolingRequestOutput,
        ScoringRequestOutput,
    )
    from nanovllm.schedule.outputs import FinishedOutput, OutputDelta

T = TypeVar("T")
CHUNK = 32  # prompts that are encoded at once, while the device computes earlier ones
Params = PoolingParams | Sequence[PoolingParams] | None
ChatFields = Mapping[str, Any] | None


class PoolingMethods:
    """All raise ValueError, and leave nothing queued, if a prompt is invalid or the model does not
    do what is asked, and `PoolingFailed` for a prompt without a result.

    A prompt may also be a conversation, a list of messages, in the checkpoint's chat template.
    `chat_options` are those of `LLM.chat`; by default nothing follows the last message."""

    engine: AnyEngine
    shared: LockedEngine
    _chat_prompts: Callable[[Any, Mapping[str, Any]], list[Prompt]]

    def embed(
        self,
        prompts: AnyPrompts,
        *,
        use_tqdm: UseTqdm = True,
        pooling_params: Params = None,
        truncate_prompt_tokens: int | None = None,
        lora_request: None = None,
        chat_options: ChatFields = None,
    ) -> list[EmbeddingRequestOutput]:
        """The embeddings of prompts: `output.outputs.embedding` is a list of numbers."""
        from nanovllm.pooling_outputs import embedding_output

        params = _params(pooling_params, "embed", truncate_prompt_tokens)
        given = self._given(prompts, chat_options)
        return self._pooled(given, params, use_tqdm, lora_request, embedding_output)

    def classify(
        self,
        prompts: AnyPrompts,
        *,
        use_tqdm: UseTqdm = True,
        pooling_params: Params = None,
        truncate_prompt_tokens: int | None = None,
        lora_request: None = None,
        chat_options: ChatFields = None,
    ) -> list[ClassificationRequestOutput]:
        """The probabilities of classes for prompts: `output.outputs.probs`."""
        from nanovllm.pooling_outputs import classification_output

        params = _params(pooling_params, "classify", truncate_prompt_tokens)
        given = self._given(prompts, chat_options)
        return self._pooled(given, params, use_tqdm, lora_request, classification_output)

    def encode(
        self,
        prompts: AnyPrompts,
        pooling_params: Params = None,
        *,
        use_tqdm: UseTqdm = True,
        truncate_prompt_tokens: int | None = None,
        lora_request: None = None,
        pooling_task: str | None = None,
        chat_options: ChatFields = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """The results of prompts as tensors: `output.outputs.data`. `pooling_task` is "embed" or
        "classify", None for what the model makes."""
        from nanovllm.pooling_outputs import pooling_output

        params = _params(pooling_params, pooling_task, truncate_prompt_tokens)
        given = self._given(prompts, chat_options)
        return self._pooled(given, params, use_tqdm, lora_request, pooling_output)

    def reward(
        self,
        prompts: AnyPrompts,
        *,
        use_tqdm: UseTqdm = True,
        pooling_params: Params = None,
        truncate_prompt_tokens: int | None = None,
        lora_request: None = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """The rewards of prompts as tensors: the logits of a reward model."""
        given = pooling_params or PoolingParams(use_activation=False)
        return self.encode(
            prompts, given, use_tqdm=use_tqdm, truncate_prompt_tokens=truncate_prompt_tokens,
            lora_request=lora_request, pooling_task="classify",
        )  # fmt: skip

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        *,
        use_tqdm: UseTqdm = True,
        pooling_params: PoolingParams | None = None,
        truncate_prompt_tokens: int | None = None,
        lora_request: None = None,
        instruction: str | None = None,
    ) -> list[ScoringRequestOutput]:
        """How well the texts of each pair fit: `output.outputs.score`. One text on the first side
        is paired with all of the second. A model with a head reads both texts; another one gives
        the cosine of their embeddings. `instruction` is that of Qwen3-Reranker."""
        all_pairs = pairs.paired(_texts("data_1", data_1), _texts("data_2", data_2))
        params = _params(pooling_params, "score", truncate_prompt_tokens)
        if self._info.makes == "embed":
            if instruction is not None:
                raise ValueError("instruction is given, but this model reads none")
            return self._cosines(all_pairs, params, use_tqdm, lora_request)
        return self._cross_scores(all_pairs, params, use_tqdm, lora_request, instruction)

    @property
    def _info(self) -> PoolingInfo:
        found = self.engine.info.pooling
        if found is None:
            raise ValueError(
                f"{self.engine.config.model!r} was loaded to generate: load it with task='embed', "
                "'classify' or 'score'"
            )
        return found

    def _cross_scores(
        self,
        all_pairs: Sequence[tuple[str, str]],
        params: PoolingParams,
        use_tqdm: UseTqdm,
        lora_request: None,
        instruction: str | None,
    ) -> list[ScoringRequestOutput]:
        from nanovllm.pooling_outputs import numbers, scoring_output

        if self._info.size != 1:
            raise ValueError(
                f"score needs a model with one class, and this one has {self._info.size}"
            )
        limit = params.truncate_prompt_tokens
        limit = self.engine.max_model_len if limit == -1 else limit
        tokenizer = self.engine.tokenizer
        prompts = [
            pairs.pair_prompt(self._info, tokenizer, *pair, instruction, limit)
            for pair in all_pairs
        ]

        def output(request_id: str, done: FinishedOutput) -> ScoringRequestOutput:
            return scoring_output(request_id, float(numbers(done)[0]), done.prompt_ids)

        return self._pooled(prompts, params, use_tqdm, lora_request, output)

    def _cosines(
        self,
        all_pairs: Sequence[tuple[str, str]],
        params: PoolingParams,
        use_tqdm: UseTqdm,
        lora_request: None,
    ) -> list[ScoringRequestOutput]:
        from nanovllm.pooling_outputs import numbers, scoring_output

        texts = list(dict.fromkeys(text for pair in all_pairs for text in pair))
        done = self._pooled(texts, params, use_tqdm, lora_request, lambda _, one: one)
        by_text = dict(zip(texts, done))
        outputs = []
        for i, (first, second) in enumerate(all_pairs):
            both = by_text[first], by_text[second]
            score = pairs.cosine(*map(numbers, both))
            prompt_ids = [*both[0].prompt_ids, *both[1].prompt_ids]
            outputs.append(scoring_output(str(i), score, prompt_ids))
        return outputs

    def _given(self, prompts: Any, chat_options: ChatFields) -> list[Any]:
        """The prompts of a call; conversations are rendered."""
        given = [prompts] if _is_conversation(prompts) else each_prompt(prompts)
        conversations = [one for one in given if _is_conversation(one)]
        if not conversations:
            if chat_options:
                raise ValueError("chat_options are given, but no prompt is a list of messages")
            return given
        options = {"add_generation_prompt": False, **(chat_options or {})}
        rendered = iter(self._chat_prompts(conversations, options))
        return [next(rendered) if _is_conversation(one) else one for one in given]

    def _pooled(
        self,
        prompts: Sequence[Any],
        params: Params,
        use_tqdm: UseTqdm,
        lora_request: object,
        output: Callable[[str, FinishedOutput], T],
    ) -> list[T]:
        """The outputs of prompts, in order. If one is invalid, none stays queued.

        Prompts are read and outputs are made while the device computes others.
        """
        if lora_request is not None:
            raise ValueError("lora_request is not supported by models that pool")
        assert self._info
        each = _one_each(params, len(prompts))
        place_of: dict[int, int] = {}  # by the ids of requests
        made: dict[int, T] = {}

        def note(outputs: Sequence[OutputDelta]) -> None:
            for one in outputs:
                if one.completion is not None:
                    name = str(place_of[one.request_id])
                    made[one.request_id] = output(name, one.completion)

        try:
            for begin in range(0, len(prompts), CHUNK):
                given = list(map(as_prompt, prompts[begin : begin + CHUNK]))
                chunk = self._encoded(given, each[begin : begin + CHUNK])
                with self.shared.exclusive() as engine:
                    for prompt, one in zip(chunk, each[begin:]):
                        request_id = engine.add_request(prompt, one, incremental=False)
                        place_of[request_id] = len(place_of)
                    engine.run_full_steps()
                    finished = engine.take(place_of)
                note(finished)
            self._wait_until_made(place_of, made, note, use_tqdm)
        except BaseException:
            self.shared.drop(list(place_of))
            raise
        return [made[request_id] for request_id in place_of]

    def _encoded(self, prompts: Sequence[Prompt], each: Sequence[PoolingParams]) -> list[Prompt]:
        """The prompts with token ids, if all are texts with the same limit of tokens."""
        tokenizer, limits = self.engine.tokenizer, {one.truncate_prompt_tokens for one in each}
        texts = [
            one.text for one in prompts if one.token_ids is None and one.text and not one.media
        ]
        if tokenizer is None or len(limits) > 1 or len(texts) < len(prompts):
            return list(prompts)
        limit = limits.pop()
        limit = self.engine.max_model_len if limit == -1 else limit
        ids = tokenizer.encode_many(texts, limit)
        return [replace(one, token_ids=found) for one, found in zip(prompts, ids)]

    def _wait_until_made(
        self,
        ids: Collection[int],
        made: Collection[int],
        note: Callable[[Sequence[OutputDelta]], None],
        use_tqdm: UseTqdm,
    ) -> None:
        """Let `note` have the outputs of requests until all are `made`, with a progress bar."""
        make_bar = use_tqdm if callable(use_tqdm) else progress.bar
        with make_bar(
            total=len(ids), desc="pooling", unit="req", disable=not use_tqdm, dynamic_ncols=True
        ) as bar:
            bar.update(len(made))
            while len(made) < len(ids):
                num_before = len(made)
                note(self.shared.outputs(ids))
                bar.update(len(made) - num_before)


def _is_conversation(given: Any) -> bool:
    if not isinstance(given, Sequence) or not given or isinstance(given, (str, bytes)):
        return False
    return isinstance(given[0], Mapping) and "role" in given[0]


def _params(given: Params, task: str | None, truncate: int | None) -> Any:
    """The parameters of a call, for its task."""
    if given is not None and not isinstance(given, PoolingParams):
        return [_params(one, task, truncate) for one in given]
    params = given or PoolingParams()
    if truncate is not None:
        if params.truncate_prompt_tokens not in (None, truncate):
            raise ValueError(
                f"truncate_prompt_tokens is {truncate}, and {params.truncate_prompt_tokens} in "
                "pooling_params"
            )
        own = params.non_default() | {"truncate_prompt_tokens": truncate}
        params = PoolingParams(**own)  # type: ignore[arg-type]
    return params if task is None else params.for_task(task)


def _one_each(params: Params, num: int) -> list[PoolingParams]:
    if params is None or isinstance(params, PoolingParams):
        return [params or PoolingParams()] * num
    each = list(params)
    if len(each) != num:
        raise ValueError(f"{len(each)} pooling params for {num} prompts: give one for each, or one")
    return each


def _texts(name: str, given: str | Sequence[str]) -> list[str]:
    texts = [given] if isinstance(given, (str, Mapping)) else list(given)
    for text in texts:
        if not isinstance(text, str):
            what = "a prompt" if isinstance(text, Mapping) else repr(text)
            raise ValueError(
                f"{name} has {what}: it must be a text, or a list of texts. Images are not scored "
                "in pairs: compare the results of embed, or give classify the whole prompt"
            )
    return texts
