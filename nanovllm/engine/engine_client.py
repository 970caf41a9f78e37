"""The interface of an engine, one or several behind a router, for `LLM` and `LockedEngine`."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

    from nanovllm.config import EngineConfig
    from nanovllm.engine.input_processor import Embeddings
    from nanovllm.engine.metrics import Metric
    from nanovllm.engine.request import EngineInfo, EngineRequest, MediaPrompt
    from nanovllm.lora_request import LoRARequest
    from nanovllm.media.mm_inputs import MMInput
    from nanovllm.pooling_params import PoolingParams
    from nanovllm.prompts import AnyPrompt, Prompt
    from nanovllm.sampling import SamplingParams
    from nanovllm.schedule.outputs import OutputDelta
    from nanovllm.schedule.plan import StepPlan
    from nanovllm.tokenizer import Tokenizer


# vLLM's methods that start and stop a profile of an engine
NO_PROFILE = (
    "start_profile and stop_profile are not supported: a captured step replays without its ops. "
    "`nanovllm bench throughput --profile DIR` profiles prompts and decode steps"
)


class Metrics(Protocol):
    def read(self) -> list[Metric]: ...


class AnyEngine(Protocol):
    """`Engine` documents the methods. `Router` is the other implementation."""

    config: EngineConfig
    max_model_len: int
    default_params: SamplingParams
    tokenizer: Tokenizer | None

    @property
    def info(self) -> EngineInfo: ...

    @property
    def metrics(self) -> Metrics: ...

    @property
    def eos_ids(self) -> frozenset[int]: ...

    @property
    def max_num_seqs(self) -> int: ...

    @property
    def is_sleeping(self) -> bool: ...

    def close(self) -> None: ...

    def check_ranks(self) -> None: ...

    def call_on_failure(self, callback: Callable[[Exception], None]) -> None: ...

    def sleep(self, level: int = 1) -> None: ...

    def wake_up(self, tags: Iterable[str] | None = None) -> None: ...

    def enter_thread(self) -> None: ...

    def prompt_ids(self, request_id: int) -> list[int]: ...

    def token_ids(self, prompt: Prompt) -> list[int]: ...

    def encoded(self, prompt: Prompt) -> Prompt: ...

    def check_media(self, media: Sequence[MMInput]) -> None: ...

    def forget_prefixes(self) -> None: ...

    def prepare_grammars(self) -> None: ...

    def run_full_steps(self) -> None: ...

    def add_request(
        self,
        prompt: AnyPrompt | Prompt | MediaPrompt,
        params: SamplingParams | PoolingParams | None = None,
        *,
        incremental: bool = True,
        embeddings: Embeddings = (),
        positions: np.ndarray | None = None,
        priority: int = 0,
        lora_request: LoRARequest | None = None,
    ) -> int: ...

    def add(self, asked: EngineRequest) -> int: ...

    def add_lora(self, request: LoRARequest) -> bool: ...

    def remove_lora(self, lora_int_id: int) -> bool: ...

    def abort(self, request_id: int, reason: str = "abort") -> None: ...

    def abort_all(self, request_ids: Iterable[int]) -> None: ...

    def advance(self) -> StepPlan | None: ...

    def take(self, request_ids: Container[int] | None = None) -> list[OutputDelta]: ...

    def has_outputs(self, request_ids: Container[int] | None = None) -> bool: ...
