"""A step of the model, put together from regions. Each region is traced and compiled by itself, once per bucket; a
decode step as a whole is what a platform captures.

R rows | T tokens | D hidden | V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from nanovllm.compile.program import Compiler
from nanovllm.compile.trace import tensors
from nanovllm.models.config import ModelConfig
from nanovllm.models.dense import Batch, LayerCache, Params
from nanovllm.runner.state import DeviceState, decode_batch, sample_and_advance

# Regions are no methods: the compiler keeps them in eager mode, and they would keep the weights alive.


def _begin(
    model: ModuleType,
    cfg: ModelConfig,
    block_size: int,
    state: DeviceState,
    embed_VD: Tensor,
    row_idx_R: Tensor,
) -> tuple[Tensor, Batch]:
    token_R, batch = decode_batch(block_size, state, row_idx_R)
    return model.embed(cfg, embed_VD, token_R), batch


def _inlined(
    model: ModuleType,
    cfg: ModelConfig,
    layer_windows: tuple[int, ...],
    method: Callable[..., Any],
    state: DeviceState,
    params: Params,
    caches: tuple[LayerCache, ...],
    cos_sin_MH: Tensor,
    *inputs: object,
) -> Any:
    """A step as one region: a method of `Steps` on a compiler that compiles nothing."""
    if params.head_VD is None:
        params = params._replace(head_VD=params.embed_VD)
    steps = Steps(
        model, cfg, params, caches, cos_sin_MH, state, Compiler(None), layer_windows=layer_windows
    )
    return method(steps, *inputs)


class Steps:
    """The steps of one model. Programs are built on first use; `runner.warm_up` uses every bucket once."""

    def __init__(
        self,
        model: ModuleType,
        cfg: ModelConfig,
        params: Params,
        caches: tuple[LayerCache, ...],
        cos_sin_MH: Tensor,
        state: DeviceState,
        compiler: Compiler,
        *,
        whole: bool = False,
        layer_windows: tuple[int, ...] | None = None,
    ) -> None:
        """With `whole` a step's regions are inlined into one program, for compilers that want to see all of it.

        `layer_windows` are those of `cfg` where a program must not read them there.
        """
        self._layer_windows = layer_windows
        self.model, self.cfg, self.params, self.caches = model, cfg, params, caches
        self.whole = whole
        self.cos_sin_MH, self.state, self.compiler = cos_sin_MH, state, compiler
        self.block_size = caches[0].k_CBKH.shape[1]

    @property
    def layer_windows(self) -> tuple[int, ...]:
        return self.cfg.layer_windows if self._layer_windows is None else self._layer_windows

    @property
    def last_layer_is_alone(self) -> bool:
        """Whether a prefill step of all tokens' hidden states has a program that one of the last tokens' has not: the
        ordinary one of the last layer, whose window no other layer has."""
        *others, last = self.layer_windows
        return not self.whole and last not in others

    def of_each_program(self) -> Steps:
        """The steps of a model with one layer of each window, and the last one: they use all the programs, and launch few."""
        if self.whole:
            return self
        *others, last = self.layer_windows
        chosen = (*(others.index(window) for window in dict.fromkeys(others)), len(others))
        return Steps(
            self.model,
            self.cfg,
            self.params._replace(layers=tuple(self.params.layers[i] for i in chosen)),
            tuple(self.caches[i] for i in chosen),
            self.cos_sin_MH,
            self.state,
            self.compiler,
            layer_windows=(*dict.fromkeys(others), last),
        )

    def decode_logits(self, row_idx_R: Tensor) -> Tensor:
        """Feed each row's newest token; returns the logits [R, V] of what follows it."""
        h_RD, batch = self._run(
            "begin",
            (row_idx_R.shape[0],),
            partial(_begin, self.model, self.cfg, self.block_size),
            state=self.state,
            embed_VD=self.params.embed_VD,
            row_idx_R=row_idx_R,
        )
        return self._head(self._layers("decode", h_RD, batch, max_q_len=1))

    def decode(self, row_idx_R: Tensor) -> tuple[Tensor, Tensor]:
        """A whole decode step, sampler included; returns the chosen token_R, which the state now holds as well, and the
        logits [R, V] that it was chosen from."""
        if self.whole:
            return self._run_whole("decode", Steps.decode, row_idx_R=row_idx_R)
        logits_RV = self.decode_logits(row_idx_R)
        return self.sample(row_idx_R, logits_RV), logits_RV

    def prefill(self, token_T: Tensor, batch: Batch, last_R: Tensor | None = None) -> Tensor:
        """Write keys and values of T packed tokens; returns the hidden state [T, D] after the last layer, with `last_R`
        [R, D] of the tokens at these indices alone."""
        if self.whole:
            # one program for both, which leaves out no row: each takes long to compile
            h_TD = self._run_whole("prefill", Steps.prefill, token_T=token_T, batch=batch)
            return h_TD if last_R is None else h_TD.index_select(0, last_R)
        function = partial(self.model.embed, self.cfg)
        h_TD = self._run(
            "embed", (token_T.shape[0],), function, embed_VD=self.params.embed_VD, token_T=token_T
        )
        return self._layers("prefill", h_TD, batch, max_q_len=token_T.shape[0], last_R=last_R)

    def prefill_logits(self, token_T: Tensor, batch: Batch, last_R: Tensor) -> Tensor:
        """Write keys and values of T packed tokens; returns the logits [R, V] after those at `last_R`."""
        return self._head(self.prefill(token_T, batch, last_R))

    def logits_at(self, h_TD: Tensor, index_R: Tensor) -> Tensor:
        """Logits [R, V] after the tokens at `index_R` of a prefill step that returned all hidden states."""
        return self._head(h_TD.index_select(0, index_R))

    def sample(self, row_idx_R: Tensor, logits_RV: Tensor) -> Tensor:
        """The plain sampler: chooses by temperature and advances the state."""
        key = (row_idx_R.shape[0],)
        return self._run(
            "sample",
            key,
            sample_and_advance,
            state=self.state,
            row_idx_R=row_idx_R,
            logits_RV=logits_RV,
        )

    def _layers(
        self, phase: str, h_TD: Tensor, batch: Batch, max_q_len: int, last_R: Tensor | None = None
    ) -> Tensor:
        sizes = (batch.pos_T.shape[0], batch.seq_len_R.shape[0])
        last_idx = len(self.params.layers) - 1
        for layer_idx, (window, weights, cache) in enumerate(
            zip(self.layer_windows, self.params.layers, self.caches)
        ):
            keeps = last_R is not None and layer_idx == last_idx
            h_TD = self._run(
                "last_layer" if keeps else "layer",
                (phase, *sizes, f"window{window}"),
                partial(self.model.layer, self.cfg, window, max_q_len),
                w=weights,
                kv=cache,
                cos_sin_MH=self.cos_sin_MH,
                batch=batch,
                h_TD=h_TD,
                **({"keep_R": last_R} if keeps else {}),
            )
        return h_TD

    def _head(self, h_RD: Tensor) -> Tensor:
        return self._run(
            "head",
            (h_RD.shape[0],),
            partial(self.model.head, self.cfg),
            final_norm_D=self.params.final_norm_D,
            head_VD=self.params.head_VD,
            h_RD=h_RD,
        )

    def _run_whole(self, name: str, method: Callable[..., Any], **inputs: object) -> Any:
        """The program of a step as it runs without programs. All shapes in it are static, the cache's as well."""
        sizes = (tensors(tuple(inputs.values()))[0].shape[0], self.caches[0].k_CBKH.shape[0])
        params: Any = self.params
        if params.head_VD is params.embed_VD:
            params = params._replace(
                head_VD=None
            )  # a weight that is two inputs would be two weights to the compiler
        return self._run(
            name,
            sizes,
            partial(_inlined, self.model, self.cfg, self.layer_windows, method),
            state=self.state,
            params=params,
            caches=self.caches,
            cos_sin_MH=self.cos_sin_MH,
            **inputs,
        )

    def _run(
        self, name: str, key: tuple[object, ...], function: Callable[..., Any], **inputs: object
    ) -> Any:
        return self.compiler.program(name, key, function, inputs)(*inputs.values())
