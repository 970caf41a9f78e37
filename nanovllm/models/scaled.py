"""Factors on embeddings, residuals and logits, folded into parameters when they are read.

With such factors a model is h₀ = e · table row, then h + r · f(norm(h)) in each half of a layer,
then logits = norm(h) · headᵀ / s. The layers of this engine have no r. They compute h / r: norms do
not change if their eps is divided by r². So the table is multiplied by e / r, the final norm's
weight by 1 / s, and the programs are those of a Llama.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nanovllm.models.config import ModelConfig
from nanovllm.models.dense import outer_params
from nanovllm.models.model import Model, Param
from nanovllm.models.param import Times


@dataclass(frozen=True)
class Factors:
    """Factors of a model, by their names in its config, for messages. Raises ValueError for other
    values than numbers above 0."""

    embed: tuple[str, float] = ("", 1.0)
    residual: tuple[str, float] = ("", 1.0)
    head: tuple[str, float] = ("", 1.0)

    def __post_init__(self) -> None:
        for name, value in (self.embed, self.residual, self.head):
            check_factor(name, value)

    @property
    def of_table(self) -> float:
        """The factor on the rows of the embedding table."""
        return self.embed[1] / self.residual[1]

    def outer_params(self, cfg: ModelConfig) -> dict[str, Param]:
        """`dense.outer_params`, with the factors folded in. A tied head is the table with its
        factor, which the final norm undoes."""
        declared = outer_params(cfg)
        of_norm = self.head[1] / (self.of_table if cfg.tied_embeddings else 1.0)
        for name, factor in (("embed_VD", self.of_table), ("final_norm_D", of_norm)):
            declared[name] = declared[name]._replace(adapt=Times(factor))
        return declared


def scaled_model(plain: Model, factors: Factors) -> Model:
    """The model of one without factors, dense or with experts."""
    cfg, residual = plain.config, factors.residual[1]
    return replace(
        plain,
        config=replace(cfg, norm_eps=cfg.norm_eps / residual**2),
        outer_params=factors.outer_params,
        embed_factor=factors.of_table,
    )


def check_factor(name: str, value: object) -> None:
    """Raise ValueError unless a config's field is a number above 0."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < float(str(value)) < math.inf:
        raise ValueError(f"{name} is {value!r}: it must be a number above 0")
