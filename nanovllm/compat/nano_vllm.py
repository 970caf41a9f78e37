"""nano-vllm's methods, so that its scripts run unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanovllm.sampling import SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine.engine_client import AnyEngine
    from nanovllm.engine.locked_engine import LockedEngine


class NanoMethods:
    """The methods of nano-vllm's LLM that step requests manually."""

    engine: AnyEngine
    shared: LockedEngine

    def add_request(self, prompt: Any, sampling_params: SamplingParams) -> None:
        """Queue a prompt: text or token ids."""
        with self.shared.exclusive() as engine:
            request_id = engine.add_request(prompt, sampling_params, incremental=False)
        self._stepped().add(request_id)

    def step(self) -> tuple[list[tuple[int, list[int]]], int]:
        """Run one step. Returns ([(request number, token ids)] of finished requests, and the step's
        number of prompt tokens or, negative, of decode rows; 0 with several replicas)."""
        with self.shared.exclusive() as engine:
            plan = engine.advance()
            increments = engine.take(self._stepped())
        ended = [(one.request_id, one.completion) for one in increments if one.completion]
        self._stepped().difference_update(request_id for request_id, _ in ended)
        num_tokens = 0
        if plan is not None:
            num_tokens = len(plan.token_T) if plan.is_prefill else -len(plan.rows)
        return [(request_id, completion.token_ids) for request_id, completion in ended], num_tokens

    def is_finished(self) -> bool:
        """Whether all requests of `add_request` have finished."""
        return not self._stepped()

    def exit(self) -> None:
        """Free all memory."""
        with self.shared.exclusive() as engine:
            engine.close()

    def _stepped(self) -> set[int]:
        """The unfinished requests of `add_request`."""
        return self.__dict__.setdefault("_stepped_ids", set())
