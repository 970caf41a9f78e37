"""What a request to a model that pools asks for, under vLLM's name, and the facts of such a model.

Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from nanovllm.checks import InvalidValue, Rule, check_fields, one_of, whole
from nanovllm.sampling import INT32_MAX

TASKS = ("embed", "classify", "score")
MAX_DIMENSIONS = 1 << 20

ALLOWED: dict[str, Rule] = {
    "dimensions": whole(1, MAX_DIMENSIONS),
    "truncate_prompt_tokens": (
        f"a whole number of at least 1, at most {INT32_MAX}, or -1",
        lambda value: value == -1 or 1 <= value <= INT32_MAX,
    ),
    "task": one_of(*TASKS, None),
}


@dataclass(frozen=True)
class PoolingParams:
    """What to make of a prompt. Raises ValueError for other values.

    dimensions: of an embedding: its first numbers alone, before it is normalized.
    use_activation: False gives logits in place of probabilities, and embeddings that are not
        normalized. None is the model's default. `normalize` is the same for embeddings.
    truncate_prompt_tokens: the most tokens of the prompt, the rest is dropped. -1: as many as
        max_model_len allows. A text keeps its first tokens, and the special tokens around it; of
        token ids the last are kept; a pair keeps all around its second text.
    task: "embed", "classify" or "score"; None is what the model is loaded for.
    """

    dimensions: int | None = None
    use_activation: bool | None = None
    normalize: bool | None = None
    truncate_prompt_tokens: int | None = None
    task: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, ALLOWED)
        both = (self.use_activation, self.normalize)
        if None not in both and both[0] != both[1]:
            raise InvalidValue(
                "normalize",
                f"normalize is {self.normalize} and use_activation {self.use_activation}: they are "
                "the same option",
            )

    @property
    def activates(self) -> bool | None:
        return self.normalize if self.use_activation is None else self.use_activation

    def for_task(self, task: str) -> PoolingParams:
        """These parameters for a task. Raises ValueError if they name another."""
        if self.task not in (None, task):
            raise InvalidValue("task", f"task is {self.task!r}, but the call is for {task!r}")
        return replace(self, task=task)

    def clone(self) -> PoolingParams:
        return self

    def non_default(self) -> dict[str, object]:
        """The fields that differ from their defaults."""
        found = ((field.name, field.default) for field in fields(self))
        return {name: value for name, default in found if (value := getattr(self, name)) != default}


@dataclass(frozen=True)
class PoolingInfo:
    """Facts of a model that pools.

    makes: "embed" for embeddings, "classify" for scores of classes. size: numbers of a result.
    normalizes: whether results are normalized, or activated, by default. activation: "softmax",
    "sigmoid" or "none" of classes. labels: their names. template: "qwen3" or
    "qwen3_vl" for prompts of pairs in the published form of Qwen3-Reranker or Qwen3-VL-Reranker.
    has_pairs: whether the tokenizer joins two texts, whose tokens may have types.
    """

    makes: str
    size: int
    normalizes: bool = True
    activation: str = "none"
    labels: Sequence[str] = ()
    template: str = ""
    has_pairs: bool = False
    has_types: bool = False

    def check(self, params: PoolingParams) -> None:
        """Raise ValueError for parameters that do not fit the model."""
        wanted = {"embed": ("embed",), "classify": ("classify",), "score": ("embed", "classify")}
        if params.task is not None and self.makes not in wanted[params.task]:
            what = "embeddings" if self.makes == "embed" else "scores of classes"
            words = f"task is {params.task!r}, but this model makes {what}"
            raise InvalidValue("task", words)
        if params.dimensions is None:
            return
        if self.makes != "embed":
            raise InvalidValue(
                "dimensions",
                f"dimensions is {params.dimensions}: this model makes scores of classes",
            )
        if params.dimensions > self.size:
            raise InvalidValue(
                "dimensions",
                f"dimensions is {params.dimensions}: embeddings of this model have {self.size}",
            )
