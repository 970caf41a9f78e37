"""The outputs of models that pool, under vLLM's names. Importing this module imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanovllm.schedule.outputs import FinishedOutput

Output = TypeVar("Output")


class PoolingFailed(RuntimeError):
    """A prompt for which there is no result."""


@dataclass(frozen=True, eq=False)
class PoolingOutput:
    """data: the result, fp32 [O]."""

    data: Tensor


@dataclass(frozen=True)
class EmbeddingOutput:
    """embedding: its numbers."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(frozen=True)
class ClassificationOutput:
    """probs: one number for each class."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        return len(self.probs)


@dataclass(frozen=True)
class ScoringOutput:
    """score: how well the second text fits the first."""

    score: float


@dataclass(frozen=True)
class PoolingRequestOutput(Generic[Output]):
    """The result of one prompt, or of a pair of texts."""

    request_id: str
    outputs: Output
    prompt_token_ids: list[int]
    finished: bool = True


EmbeddingRequestOutput = PoolingRequestOutput[EmbeddingOutput]
ClassificationRequestOutput = PoolingRequestOutput[ClassificationOutput]
ScoringRequestOutput = PoolingRequestOutput[ScoringOutput]


def numbers(done: FinishedOutput) -> np.ndarray:
    """A request's result. Raises PoolingFailed if it ended without one."""
    if done.pooled is None:
        raise PoolingFailed(done.error or f"the request ended: {done.finish_reason}")
    return done.pooled


def pooling_output(request_id: str, done: FinishedOutput) -> PoolingRequestOutput[PoolingOutput]:
    data = torch.from_numpy(numbers(done))
    return PoolingRequestOutput(request_id, PoolingOutput(data), done.prompt_ids)


def embedding_output(request_id: str, done: FinishedOutput) -> EmbeddingRequestOutput:
    found = EmbeddingOutput(numbers(done).tolist())
    return PoolingRequestOutput(request_id, found, done.prompt_ids)


def classification_output(request_id: str, done: FinishedOutput) -> ClassificationRequestOutput:
    found = ClassificationOutput(numbers(done).tolist())
    return PoolingRequestOutput(request_id, found, done.prompt_ids)


def scoring_output(
    request_id: str, score: float, prompt_token_ids: list[int]
) -> ScoringRequestOutput:
    return PoolingRequestOutput(request_id, ScoringOutput(score), prompt_token_ids)
