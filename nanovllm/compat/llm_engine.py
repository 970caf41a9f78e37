"""vLLM's LLMEngine: named requests, stepped manually, with their text so far."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.engine.locked_engine import LockedEngine
from nanovllm.engine.metrics import Metric
from nanovllm.lora_request import LoRARequest
from nanovllm.output_stream import Kind, StreamedAnswer, StreamedOutput
from nanovllm.outputs import RequestOutput
from nanovllm.prompts import AnyPrompt, as_prompt
from nanovllm.replicas.engine_factory import open_engine
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.outputs import OutputDelta


class LLMEngine:
    """An engine that is stepped manually. Thread-safe."""

    @classmethod
    def from_engine_args(
        cls,
        engine_args: EngineConfig,
        usage_context: object = None,
        stat_loggers: None = None,
        enable_multiprocessing: bool = False,
    ) -> LLMEngine:
        """Load a model and warm it up. `usage_context` (vLLM's usage statistics) has no effect.
        Raises ValueError for other values of the last two options than the defaults."""
        if stat_loggers is not None:
            raise ValueError("stat_loggers is not supported: use `get_metrics()`")
        if enable_multiprocessing is not False:
            raise ValueError(
                f"enable_multiprocessing is {enable_multiprocessing!r}: only False is supported; "
                "AsyncLLM runs the engine in another process"
            )
        return cls(LockedEngine(open_engine(engine_args)))

    @classmethod
    def from_options(cls, model: str, **options: Any) -> LLMEngine:
        """An engine from the options of `LLM`."""
        return cls.from_engine_args(EngineConfig.from_options(model, options))

    def __init__(self, shared: LockedEngine) -> None:
        self.shared, self.engine = shared, shared.engine
        self._pending: dict[str, StreamedOutput] = {}
        self._owner: dict[int, StreamedOutput] = {}  # by the engine's request id

    def add_request(
        self,
        request_id: str,
        prompt: AnyPrompt,
        params: SamplingParams,
        *,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
    ) -> None:
        """Queue a request under a name. Raises ValueError, and queues nothing, for a name in use
        and for anything that `Engine.add_request` refuses."""
        if not isinstance(request_id, str):
            raise ValueError(f"request_id is {request_id!r}: it must be text")
        if request_id in self._pending:
            raise ValueError(f"request_id {request_id!r} is in use")
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params is {params!r}: it must be SamplingParams")
        given = as_prompt(prompt)
        encoded = self.engine.encoded(given)
        incremental = params.output_kind is not Kind.FINAL_ONLY
        engine_ids: list[int] = []
        with self.shared.exclusive() as engine:
            try:
                for one in params.of_answers():
                    engine_ids.append(
                        engine.add_request(
                            encoded,
                            one,
                            incremental=incremental,
                            priority=priority,
                            lora_request=lora_request,
                        )
                    )
            except BaseException:
                engine.abort_all(engine_ids)
                raise
            prompt_ids = engine.prompt_ids(engine_ids[0])
            kind = params.output_kind
            pending = StreamedOutput(request_id, given.text, prompt_ids, kind, lora_request)
            for index, engine_id in enumerate(engine_ids):
                pending.answers[engine_id] = StreamedAnswer(index, len(prompt_ids))
                self._owner[engine_id] = pending
            self._pending[request_id] = pending

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Check an adapter and begin to read it. Raises ValueError."""
        with self.shared.exclusive() as engine:
            return engine.add_lora(lora_request)

    def remove_lora(self, lora_id: int) -> bool:
        """Forget an adapter; False if it is not known. Raises ValueError while requests use it."""
        with self.shared.exclusive() as engine:
            return engine.remove_lora(lora_id)

    def abort_request(self, request_id: str | Iterable[str]) -> None:
        """Abort requests without further outputs. Unknown names are ignored."""
        names = [request_id] if isinstance(request_id, str) else list(request_id)
        with self.shared.exclusive() as engine:
            for name in names:
                pending = self._pending.pop(name, None)
                if pending is not None:
                    engine.abort_all(pending.answers)
                    for engine_id in pending.answers:
                        self._owner.pop(engine_id, None)

    def step(self) -> list[RequestOutput]:
        """Run one step. Returns the requests with new output."""
        with self.shared.exclusive() as engine:
            if not engine.has_outputs(self._owner):
                engine.advance()
            found: dict[str, dict[int, OutputDelta]] = {}
            # there may be several of one request if `LLM.generate` stepped in the meantime
            for increment in engine.take(self._owner):
                increments = found.setdefault(self._owner[increment.request_id].request_id, {})
                before = increments.get(increment.request_id)
                increments[increment.request_id] = before + increment if before else increment
            outputs = []
            for name, increments in found.items():
                output = self._pending[name].output(increments)
                outputs += [output] if output is not None else []
                self._forget_finished(name, increments)
        return outputs

    def _forget_finished(self, name: str, increments: dict[int, OutputDelta]) -> None:
        for engine_id, increment in increments.items():
            if increment.finished:
                del self._owner[engine_id]
        if all(answer.done is not None for answer in self._pending[name].answers.values()):
            del self._pending[name]

    def has_unfinished_requests(self) -> bool:
        return bool(self._pending)

    def get_num_unfinished_requests(self) -> int:
        return len(self._pending)

    def get_tokenizer(self) -> Any | None:
        """transformers' tokenizer; None if the checkpoint has none."""
        return None if self.engine.tokenizer is None else self.engine.tokenizer.full

    tokenizer = property(get_tokenizer)

    def sleep(self, level: int = 1) -> None:
        """Sleep as `LLM.sleep` does."""
        with self.shared.exclusive() as engine:
            engine.sleep(level)

    def wake_up(self, tags: Iterable[str] | None = None) -> None:
        """Wake up as `LLM.wake_up` does."""
        with self.shared.exclusive() as engine:
            engine.wake_up(tags)

    def is_sleeping(self) -> bool:
        return self.engine.is_sleeping

    def get_metrics(self) -> list[Metric]:
        return self.engine.metrics.read()
