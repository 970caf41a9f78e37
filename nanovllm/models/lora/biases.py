"""The biases of linear layers that an adapter's file has (PEFT's `bias`), in place of the model's.

O outputs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from nanovllm.models.lora.expert_file import NESTED
from nanovllm.models.lora.peft_config import CONFIG, AdapterError
from nanovllm.models.lora.slots import Target
from nanovllm.models.param import Param
from nanovllm.models.shards import Shard, taken

BIAS = ".bias"


class TrainedBiases:
    """Finds the biases of a file. `keys` are their names in it, by the names of the model's."""

    def __init__(
        self, known: Sequence[Target], trained: str, own_name: Callable[[str], str]
    ) -> None:
        """`known` are the targets of the model, `trained` is the field `bias` of the config, and
        `own_name` gives a module's name in the model."""
        self.keys: dict[str, str] = {}
        self._trained, self._own_name = trained, own_name
        params = (one.bias for one in known if one.bias is not None)
        self._sizes = {
            source: rows for one in params for source, rows in zip(one.sources, one.parts)
        }

    def note(self, name: str, key: str, shape: tuple[int, ...]) -> None:
        """Remember a tensor. Raises AdapterError if there is no slot for it."""
        own = self._own_name(name.removesuffix(BIAS).removesuffix(NESTED)) + BIAS
        if own not in self._sizes:
            raise AdapterError(
                f"{name} is not the bias of a linear layer that adapters can change: those of "
                "linear layers need the option lora_biases=True"
            )
        if shape != (self._sizes[own],):
            raise AdapterError(
                f"{name} has the shape {list(shape)}: it must be [{self._sizes[own]}]"
            )
        if self._trained == "none":
            raise AdapterError(f"there is {name}, but bias is 'none' in {CONFIG}")
        self.keys[own] = key


def added(param: Param, shard: Shard, given: Mapping[str, Tensor], base_O: Tensor) -> Tensor:
    """What an adapter adds to a rank's part of a bias, in fp32, so that the `given` sources are in
    the place of the model's. `base_O` is the model's part."""
    whole_O, is_given_O = torch.zeros(param.shape), torch.zeros(param.shape)
    parts = zip(param.sources, whole_O.split(param.parts), is_given_O.split(param.parts))
    for source, part_O, is_given in parts:
        if source in given:
            part_O.copy_(given[source])
            is_given.fill_(1.0)
    both = [taken(shard, param, one) for one in (whole_O, is_given_O)]
    if param.adapt is not None:
        for one in both:
            param.adapt(one, param.local(shard.size).parts)
    return torch.where(both[1] != 0, both[0] - base_O, 0.0)
