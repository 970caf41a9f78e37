"""Checkpoints with experts: which experts an engine and transformers choose, and other spellings.

A route is the list of experts that a token goes to, the likeliest first. Routes are kept by
(layer, sequence, position); a dense layer has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm.kernels import ops
from nanovllm.runner.runner import Runner
from nanovllm.runner.state import span_batch
from nanovllm.runner.steps import Steps
from tests.models.harness import Known, engine_logits, transformers_model

Routes = dict[tuple[int, int, int], list[int]]
STACKED = ("gate_up_proj", "down_proj")
ONE = re.compile(
    r"(?P<layer>model\.layers\.\d+\.)(mlp|block_sparse_moe)\.experts\.(?P<expert>\d+)\."
    r"(?P<matrix>gate_proj|up_proj|down_proj|w1|w3|w2)\.weight"
)


def engine_routes(runner: Runner, known: Sequence[Known]) -> tuple[list[Tensor], Routes]:
    """`engine_logits` of a runner in eager mode, and the routes of all tokens on the way."""
    recorder = _Recorder(runner)
    with pytest.MonkeyPatch.context() as patch:
        recorder.install(patch)
        return engine_logits(runner, known), recorder.routes


class _Recorder:
    """Records the routes of decode steps, and of spans whose hidden states are all computed.

    The runner's state says which token of a step is which.
    """

    def __init__(self, runner: Runner) -> None:
        self.routes: Routes = {}
        self._runner = runner
        kinds = enumerate(runner.model.layer_kinds)
        self._layers = [layer_idx for layer_idx, kind in kinds if kind.sparse]
        self._places: list[tuple[int, int]] | None = None  # row and position of the step's tokens
        self._num_seen = 0  # sparse layers of this step

    def install(self, patch: pytest.MonkeyPatch) -> None:
        def decode(row_idx_R: Tensor) -> list[tuple[int, int]]:
            pos_R = self._runner.state.pos_S[row_idx_R]
            return list(zip(row_idx_R.tolist(), pos_R.tolist()))

        def span(span: Any, *_: Any) -> list[tuple[int, int]]:
            steps = self._runner.steps
            tokens, _batch = span_batch(steps.block_size, steps.state, span)
            pos_T = self._runner.state.pos_S[tokens.row_T] + tokens.num_T - 1
            return list(zip(tokens.row_T.tolist(), pos_T.tolist()))

        route = ops.topk_softmax

        def recorded(logits_TE: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
            found = route(logits_TE, top_k, normalize)
            self._record(found[1])
            return found

        patch.setattr(ops, "topk_softmax", recorded)
        for name, places in (("decode_logits", decode), ("hidden", span)):
            patch.setattr(Steps, name, self._watching(getattr(Steps, name), places))

    def _watching(
        self, method: Callable[..., Any], places: Callable[..., list[tuple[int, int]]]
    ) -> Callable[..., Any]:
        def watched(steps: Steps, *args: Any, **kwargs: Any) -> Any:
            self._places, self._num_seen = places(*args, **kwargs), 0
            try:
                return method(steps, *args, **kwargs)
            finally:
                assert self._num_seen == len(self._layers)
                self._places = None

        return watched

    def _record(self, expert_TK: Tensor) -> None:
        if self._places is None:  # a step that goes on with some of its tokens
            return
        layer_idx = self._layers[self._num_seen]
        self._num_seen += 1
        for (row, pos), expert_K in zip(self._places, expert_TK.tolist(), strict=True):
            if row != self._runner.state.pad_row:
                self.routes[layer_idx, row, pos] = expert_K


@torch.no_grad()
def transformers_routes(
    folder: Path, known: Sequence[Known], device: str, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Routes]:
    """The logits of transformers for whole sequences, and their routes."""
    model = transformers_model(folder, device, dtype)
    routes: Routes = {}
    logits: list[Tensor] = []

    def watch(layer_idx: int) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            for pos, expert_K in enumerate(output[2].tolist()):
                routes[layer_idx, len(logits), pos] = expert_K

        return hook

    for name, module in model.named_modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(watch(int(name.split(".")[2])))
    for ids, _ in known:
        logits.append(model(torch.tensor([ids], device=device)).logits[0].float().cpu())
    return logits, routes


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]) -> Path:
    """Rewrite a checkpoint's tensors; `change` edits them in place or returns others."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    changed = change(weights)
    save_file(weights if changed is None else changed, path, {"format": "pt"})
    return folder


def stacked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights as transformers 5 has them: one tensor for the experts of a layer."""
    found: dict[str, Tensor] = {}
    matrices: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, weight in weights.items():
        if match := ONE.fullmatch(name):
            of_layer = matrices.setdefault(match["layer"], {})
            of_layer[int(match["expert"]), match["matrix"]] = weight
        else:
            found[name.replace("block_sparse_moe.gate", "mlp.gate")] = weight
    for layer, of_layer in matrices.items():
        num = 1 + max(expert for expert, _ in of_layer)
        gate, up, down = (
            ("w1", "w3", "w2") if (0, "w1") in of_layer else ("gate_proj", "up_proj", "down_proj")
        )
        pairs = [torch.cat((of_layer[e, gate], of_layer[e, up])) for e in range(num)]
        found[f"{layer}mlp.experts.gate_up_proj"] = torch.stack(pairs)
        found[f"{layer}mlp.experts.down_proj"] = torch.stack(
            [of_layer[e, down] for e in range(num)]
        )
    return found
