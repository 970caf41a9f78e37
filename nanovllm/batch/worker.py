"""Answers rows with an engine, or with replicas of one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nanovllm.batch import results
from nanovllm.batch.results import Result
from nanovllm.batch.rows import Line, Refused, Row, parse
from nanovllm.chat import ChatOptions, render
from nanovllm.config import EngineConfig
from nanovllm.lora_request import LoRARequest
from nanovllm.pooling_params import PoolingParams
from nanovllm.prompts import Prompt, as_prompt
from nanovllm.replicas.engine_factory import open_engine
from nanovllm.sampling import SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine.locked_engine import LockedEngine
    from nanovllm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

ROWS_PER_SEQUENCE = 2  # rows in the engine for each sequence that runs


@dataclass(frozen=True)
class WorkerSettings:
    """Settings for all rows.

    params: fields of SamplingParams that override the checkpoint's defaults; a row's fields
    override them. chat: options of `LLM.chat`, for rows with messages. pools: whether params are
    those of `PoolingParams`. adapters: their folders, by the names that rows have as their model.
    """

    params: Mapping[str, Any] = field(default_factory=dict)
    chat: Mapping[str, Any] = field(default_factory=dict)
    pools: bool = False
    adapters: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError for unknown names and invalid values."""
        if self.pools:
            PoolingParams(**_known(self.params, PoolingParams))
            return
        _known(self.params)
        _one_answer(SamplingParams(**self.params))
        ChatOptions.from_options(self.chat)


def load_engine(config: EngineConfig) -> LockedEngine:
    """Load a model and warm up, or replicas of it. A lost replica's rows are answered again. Raises
    what `load` raises."""
    engine = open_engine(config)
    from nanovllm.engine.locked_engine import LockedEngine  # imports torch

    return LockedEngine(engine)


class EngineWorker:
    """Takes lines and gives results, in any order."""

    def __init__(self, shared: LockedEngine, settings: WorkerSettings) -> None:
        self._shared, self._settings = shared, settings
        self._owners: dict[int, tuple[int, Any]] = {}  # request id: (row, the row's own id)
        self._refused: list[Result] = []
        self._adapters = {
            name: LoRARequest(name, number, path)
            for number, (name, path) in enumerate(settings.adapters.items(), 1)
        }
        self._room = ROWS_PER_SEQUENCE * shared.engine.max_num_seqs

    def has_room(self) -> bool:
        """Whether it wants another line now."""
        return len(self._owners) < self._room

    def submit(self, line: Line) -> None:
        try:
            row = parse(line)
        except Refused as error:
            self._refused.append(results.failure(line.row, error.id, str(error)))
            return
        try:
            prompt, params = self._prompt(row), self._params(row, line.row)
            self._note_raw_prompt(row, line.row)
            if not self._settings.pools:  # else truncation needs the text
                prompt = self._shared.engine.encoded(prompt)
            adapter = self._adapter(row)
            with self._shared.exclusive() as engine:
                request_id = engine.add_request(
                    prompt, params, incremental=False, lora_request=adapter
                )
        except (ValueError, OverflowError, RecursionError) as error:
            self._refused.append(results.failure(line.row, row.id, str(error)))
            return
        self._owners[request_id] = line.row, row.id

    def wait(self) -> list[Result]:
        """Wait until lines are finished; returns their results. All must be submitted before.
        Raises ReplicaFailed if no replica is left."""
        finished, self._refused = self._refused, []
        if finished or not self._owners:
            return finished
        for increment in self._shared.outputs(self._owners):
            if increment.completion is not None:
                row, row_id = self._owners.pop(increment.request_id)
                finished.append(results.answer(row, row_id, increment.completion))
        return finished

    def close(self) -> None:
        """Drop everything that is unfinished."""
        self._shared.drop(self._owners)
        self._owners = {}

    def check_adapters(self) -> None:
        """Check the adapters' files, before any row. Raises ValueError."""
        with self._shared.exclusive() as engine:
            for adapter in self._adapters.values():
                engine.add_lora(adapter)

    def _adapter(self, row: Row) -> LoRARequest | None:
        if row.model is None:
            return None
        if row.model not in self._adapters:
            known = ", ".join(self._adapters) or "there is none: --lora-modules names them"
            raise ValueError(f"model is {row.model[:64]!r}, which is not an adapter: {known}")
        return self._adapters[row.model]

    def _prompt(self, row: Row) -> Prompt:
        if row.messages is None:
            return as_prompt(row.prompt)
        engine = self._shared.engine
        if engine.tokenizer is None:
            raise ValueError(f"{engine.config.model!r} has no chat template: use prompts")
        options = ChatOptions.from_options(self._settings.chat)
        return render(engine.tokenizer, row.messages, options, engine.check_media)[0]

    def _note_raw_prompt(self, row: Row, number: int) -> None:
        """Warn once per process if a chat model gets a text without the chat template: it often
        generates nothing."""
        tokenizer = self._shared.engine.tokenizer
        if tokenizer is None or self._settings.pools or not isinstance(row.prompt, str):
            return
        special = tokenizer.once("special texts of chats", lambda: _special_texts(tokenizer))
        if special is None or any(text in row.prompt for text in special):
            return
        model = self._shared.engine.config.model
        tokenizer.once("warned of raw prompts", lambda: _warn_of_raw_prompt(number, model))

    def _params(self, row: Row, number: int) -> SamplingParams | PoolingParams:
        """The row's parameters, over those of the settings, over the checkpoint's.

        A drawn seed depends only on the row, not on other rows or the replica.
        """
        from nanovllm.engine.input_processor import drawn_seed

        engine = self._shared.engine
        if self._settings.pools:
            own = _known(row.params, PoolingParams)
            return PoolingParams(**{**self._settings.params, **own})
        given = {**self._settings.params, **_known(row.params)}
        params = _one_answer(dataclasses.replace(engine.default_params, **given))
        if params.seed is None:
            params.seed = drawn_seed(engine.config.seed, number)
        return params


def _special_texts(tokenizer: Tokenizer) -> list[str] | None:
    """The special tokens' texts, which chat templates write; None without a chat template."""
    if not tokenizer.for_reading.chat_template:
        return None
    try:
        return list(tokenizer.special_tokens().values())
    except ValueError:  # a tokenizer without tokenizer.json
        return list(tokenizer.for_reading.all_special_tokens)


def _warn_of_raw_prompt(number: int, model: str) -> None:
    logger.warning(
        "row %d has a prompt without the chat template of %s, which may generate nothing for it: "
        "use messages for conversations (logged only for the first such row)", number, model,
    )  # fmt: skip


def _known(params: Mapping[str, Any], kind: Any = SamplingParams) -> Mapping[str, Any]:
    known = {one.name for one in dataclasses.fields(kind)}
    what = "sampling" if kind is SamplingParams else "pooling"
    for name in params:
        if name not in known:
            raise ValueError(f"params has {name!r}, which is not a {what} parameter")
    return params


def _one_answer(params: SamplingParams) -> SamplingParams:
    if params.n != 1:
        raise ValueError(f"n is {params.n}: a row has one answer, so only 1 is supported")
    return params
