"""A step of the model, built from regions (`step_regions.py`).

A platform captures the whole step.

R rows | T tokens | K tokens a row | D hidden | V vocabulary | M positions | H head size
W columns of this rank's logits: V, or its part on several ranks (`columns.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from nanovllm.compile.program import Compiler
from nanovllm.compile.trace import tensors
from nanovllm.models.lora.regions import Adapted, without_slots
from nanovllm.models.model import AdapterRows, Kept, Model, Params
from nanovllm.platforms.attention import Attention
from nanovllm.runner.mm_embeds import MMEmbeds, with_given
from nanovllm.runner.persistent import PersistentSteps
from nanovllm.runner.proposer import Drafting, Fed, rows_alone, write
from nanovllm.runner.state import (
    DeviceState,
    Span,
    SpanTokens,
    choose_and_accept,
    choose_and_advance,
    decode_batch,
    grouped,
    span_batch,
)
from nanovllm.runner.step_regions import StepRegions, Table
from nanovllm.runner.vocab_parallel import drawing, gathered

ALONE = nullcontext()  # of steps without a proposer
# Rows and tokens of a verifying step at most whose tokens are rows for the layers: with more rows,
# attention has enough programs without dividing keys, and reads them once for a row's tokens.
FEW_ROWS, FEW_TOKENS = 4, 32


class Hidden(NamedTuple):
    """The hidden states [T, D] after the last layer of a span, and the index of each row's last
    token. `adapters` are those of the states, if the head has slots for them."""

    h_TD: Tensor
    last_R: Tensor
    adapters: AdapterRows | None


def _inlined(
    model: Model,
    attention: Attention,
    method: Callable[..., Any],
    state: DeviceState,
    params: Params,
    caches: tuple[Kept, ...],
    tables: tuple[Table, ...],
    *inputs: object,
) -> Any:
    """A step as one region: runs a method of `Steps` with a compiler that compiles nothing."""
    if params.head_VD is None:
        params = params._replace(head_VD=params.embed_VD)
    first, *others = (table.cos_sin_MH for table in tables)
    steps = Steps(model, attention, params, caches, first, state, Compiler(None))
    steps = replace(steps, other_tables=tuple(map(Table, others)))
    return method(steps, *inputs)


@dataclass(frozen=True, eq=False)
class Steps(StepRegions):
    """The steps of one model. Programs are built on first use; `Runner.warm_up` uses every bucket.

    With `whole` the regions of a step are inlined into one program: some compilers need this.
    `synthetic_rate` is the rate of `state.accept_and_advance`. `persistent` has decode and
    verifying steps whose layers and head are one launch. `verifies_rows`: see `Traits`.
    """

    whole: bool = False
    synthetic_rate: float | None = None
    persistent: PersistentSteps | None = None
    verifies_rows: bool = False

    @property
    def without_adapters(self) -> Steps:
        """The steps of rows without adapters, whose programs are those of a model without slots."""
        model, params = without_slots(self.model, self.params)
        state = self._own_state
        return replace(self, model=model, params=params, state=state, persistent=None)

    def of_each_program(self) -> Steps:
        """The steps of the reduced model: they use every program and launch few kernels."""
        if self.whole:
            return self
        chosen = self.model.distinct_layers
        layers = tuple(self.params.layers[layer_idx] for layer_idx in chosen)
        return replace(
            self,
            model=self.model.reduced(),
            params=self.params._replace(layers=layers),
            caches=tuple(self.caches[layer_idx] for layer_idx in chosen),
            drafting=self._reduced_drafting(),
            persistent=None,
        )

    def _reduced_drafting(self) -> Drafting | None:
        if self.drafting is None or self.drafting.steps is None:
            return self.drafting
        return self.drafting._replace(steps=self.drafting.steps.of_each_program())

    @contextmanager
    def restoring_state(self) -> Iterator[None]:
        """Restore the tokens and positions of the state after the steps in the block."""
        token_S, pos_S = self.state.token_S.clone(), self.state.pos_S.clone()
        yield
        self.state.token_S.copy_(token_S)
        self.state.pos_S.copy_(pos_S)

    # proposals --------------------------------------------------------------------------------

    def proposing(
        self, fed: Tensor | Span, max_q_len: int | None = None
    ) -> AbstractContextManager[None]:
        """Around a step of rows or of a span: draft the tokens after it, if there is a proposer.

        `max_q_len` is that of the span's layers, None for a prompt's.
        """
        return ALONE if self.drafting is None else self._proposing(self.drafting, fed, max_q_len)

    @contextmanager
    def _proposing(
        self, drafting: Drafting, given: Tensor | Span, max_q_len: int | None
    ) -> Iterator[None]:
        # before the step, which moves the rows on
        if not drafting.reads_fed:
            fed = rows_alone(given.row_idx_R if isinstance(given, Span) else given)
        elif isinstance(given, Span):
            fed = self._fed_by_span(given, max_q_len)
        else:
            fed = self._fed_by_rows(given)
        yield
        if drafting.reads_fed:
            fed = fed._replace(states_TJ=drafting.states(fed.token_T.shape[0]))
        proposer = drafting.after(max_q_len)
        write(self.state, fed.row_idx_R, proposer.propose(self.state, fed, drafting.steps))

    def _fed_by_rows(self, row_idx_R: Tensor) -> Fed:
        place = partial(decode_batch, self.block_size)
        key = (row_idx_R.shape[0],)
        token_R, batch = self._run("fed", key, place, state=self._own_state, row_idx_R=row_idx_R)
        return Fed("decode", 1, row_idx_R, token_R, batch)

    def _fed_by_span(self, span: Span, max_q_len: int | None) -> Fed:
        num_tokens, place = span.token_T.shape[0], partial(span_batch, self.block_size)
        key = (num_tokens, span.row_idx_R.shape[0])
        tokens, batch = self._run("fed", key, place, state=self._own_state, span=span)
        phase = "prefill" if max_q_len is None else "verify"
        return Fed(phase, max_q_len or num_tokens, span.row_idx_R, tokens.token_T, batch)

    def read(self, span: Span, start_R: Tensor) -> None:
        """Let the second model read tokens of rows from positions `start_R` on: steps that fed them
        ran without it."""
        assert self.drafting is not None
        pos_S = self.state.pos_S.index_copy(0, span.row_idx_R, start_R)
        behind = replace(self, state=self.state._replace(pos_S=pos_S))
        self.drafting.steps.feed(behind._fed_by_span(span, None))

    def feed(self, fed: Fed) -> Tensor:
        """Write keys and values of the tokens that another model's step has fed; returns the hidden
        states [T, D] after the last layer."""
        h_TD = self._run(
            "embed",
            (fed.token_T.shape[0],),
            partial(self.model.embed, self.model.config),
            embed_VD=self.params.embed_VD,
            token_T=fed.token_T,
        )
        batch = self._with_layer_inputs(fed.batch, h_TD, fed.token_T)
        return self._layers(fed.phase, h_TD, batch, fed.max_q_len)

    # one token for each row -------------------------------------------------------------------

    def decode_logits(self, row_idx_R: Tensor) -> Tensor:
        """Feed each row's newest token; returns the logits [R, W] of the token that follows it."""
        h_RD, batch = self.begin(row_idx_R)
        if self.persistent is not None:
            logits_RV = self.persistent.logits(self.cos_sin_MH, h_RD, batch)
            if logits_RV is not None:
                return logits_RV
        if self.model.layer_inputs is not None:
            token_R = self.state.token_S.index_select(0, row_idx_R)
            batch = self._with_layer_inputs(batch, h_RD, token_R)
        return self._head(self._layers("decode", h_RD, batch, max_q_len=1), batch.adapters)

    def decode(self, row_idx_R: Tensor) -> tuple[Tensor, Tensor]:
        """A decode step with the plain sampler; returns token_R and the logits [R, W].

        Also writes the tokens to the state.
        """
        if self.whole:
            return self._run_whole("decode", Steps.decode, row_idx_R=row_idx_R)
        logits_RW = self.decode_logits(row_idx_R)
        return self.sample(row_idx_R, logits_RW), logits_RW

    # several tokens for each row --------------------------------------------------------------

    def prefill_logits(self, span: Span, given: MMEmbeds | None = None) -> Tensor:
        """Write keys and values of a span; returns logits [R, W] after each row's last token."""
        needs_all = given is not None and self.model.adds_to_last
        needs_all = needs_all or (self.drafting is not None and self.drafting.reads_last)
        if self.whole or needs_all:
            hidden = self.hidden(span, given)
            return self.logits_at(hidden, hidden.last_R)
        h_RD, _, adapters = self._prefill(span, given, keeps_last=True)
        return self._head(h_RD, adapters)

    def hidden(self, span: Span, given: MMEmbeds | None = None) -> Hidden:
        """Write keys and values of a span; returns all its hidden states."""
        if self.whole:
            return Hidden(*self._run_whole("prefill", Steps.hidden, span=span, given=given))
        return self._prefill(span, given, keeps_last=False)

    def _prefill(self, span: Span, given: MMEmbeds | None, *, keeps_last: bool) -> Hidden:
        """`hidden`, with `keeps_last` for each row's last token alone: [R, D]."""
        h_TD, tokens, batch = self.begin_span(span, verifies=False)
        last_R = tokens.last_R if keeps_last else None
        adapters = batch.kept_adapters if keeps_last else batch.adapters
        if not isinstance(self.params.head_VD, Adapted):
            adapters = None
        if given is None:
            batch = self._with_layer_inputs(batch, h_TD, tokens.token_T)
            h_TD = self._layers("prefill", h_TD, batch, len(h_TD), last_R)
            return Hidden(h_TD, tokens.last_R, adapters)
        h_TD, rows_TH = self._of_given(
            "with_given",
            partial(with_given, self.model.embed_factor),
            h_TD,
            given=given._replace(embeds_LTD=given.embeds_LTD.narrow(0, 0, 1)),
            cos_sin_MH=self.cos_sin_MH,
        )
        steps = self
        if rows_TH is not None:  # the rotations of this step are a table with a row for each token
            assert not self.other_tables and given.row_T is not None
            batch = batch._replace(rope_pos_T=given.row_T)
            steps = replace(self, cos_sin_MH=rows_TH)
        batch = self._with_layer_inputs(batch._replace(end_T=given.end_T), h_TD, tokens.token_T)
        h_TD = steps._layers("prefill", h_TD, batch, len(span.token_T), last_R, given)
        return Hidden(h_TD, tokens.last_R, adapters)

    def logits_at(self, hidden: Hidden, index_R: Tensor) -> Tensor:
        """Logits [R, W] after the tokens at `index_R` of a span's hidden states."""
        adapters = hidden.adapters
        if adapters is not None:
            adapters = grouped(adapters.adapter_T.index_select(0, index_R))
        return self._head(hidden.h_TD.index_select(0, index_R), adapters)

    def verify_logits(self, span: Span, num: int) -> tuple[Tensor, SpanTokens]:
        """Feed up to K = `num` tokens a row, T = R · K; returns the logits [T, W] after each token,
        and the tokens."""
        each = self.verifies_rows_of(span.row_idx_R.shape[0], span.token_T.shape[0])
        h_TD, tokens, batch = self.begin_span(span, verifies=True, each=each)
        if each and self.persistent is not None:
            cos_sin_MH = self.cos_sin_MH
            logits_TV = self.persistent.logits(cos_sin_MH, h_TD, batch, has_several=True)
            if logits_TV is not None:
                return logits_TV, tokens
        batch = self._with_layer_inputs(batch, h_TD, tokens.token_T)
        call = ("decode", h_TD, batch, 1) if each else ("verify", h_TD, batch, num)
        return self._head(self._layers(*call), batch.adapters), tokens

    def verifies_rows_of(self, num_rows: int, num_tokens: int) -> bool:
        """Whether each token of a verifying step is a row for the layers, as in a decode step,
        whose attention divides the keys of a row among programs."""
        if self.whole or self.places(verifies=True).num:
            return False
        is_few = num_rows <= FEW_ROWS and num_tokens <= FEW_TOKENS
        return self.verifies_rows or (is_few and self.drafting is not None)

    def verify(self, span: Span, num: int) -> tuple[Tensor, Tensor, Tensor, SpanTokens]:
        """A decode step of up to K = `num` tokens a row with the plain sampler.

        Returns token_RK and count_R of `ops.accept`, and the two results of `verify_logits`. Also
        writes the accepted tokens to the state.
        """
        if self.whole:
            return self._run_whole("verify", partial(Steps.verify, num=num), span=span)
        logits_TW, tokens = self.verify_logits(span, num)
        token_RK, count_R = self._run(
            "accept",
            (span.row_idx_R.shape[0], num),
            drawing(self.model.config, partial(choose_and_accept, num, self.synthetic_rate)),
            state=self._own_state,
            span=span,
            tokens=tokens,
            logits_TV=logits_TW,
        )
        return token_RK, count_R, logits_TW, tokens

    # the end of a step ------------------------------------------------------------------------

    def sample(self, row_idx_R: Tensor, logits_RW: Tensor, num_R: Tensor | None = None) -> Tensor:
        """The plain sampler: choose token_R by temperature and make them the newest tokens of rows
        that have fed num_R tokens (1 without num_R)."""
        return self._run(
            "sample",
            (row_idx_R.shape[0], "one" if num_R is None else "several"),
            drawing(self.model.config, choose_and_advance),
            state=self._own_state,
            row_idx_R=row_idx_R,
            logits_RV=logits_RW,
            num_R=num_R,
        )

    def gathered(self, logits_RW: Tensor) -> Tensor:
        """The whole logits [R, V]. It runs op by op, and can be captured."""
        return gathered(self.model.config, logits_RW)

    def _run_whole(self, name: str, method: Callable[..., Any], **inputs: object) -> Any:
        """Run a step as one program. All its shapes are static, including the cache's."""
        shapes = [tensor.shape[0] for tensor in tensors(tuple(inputs.values()))]
        params: Any = self.params._replace(tower=None)
        if params.head_VD is params.embed_VD:
            # the compiler would treat a tensor that is passed twice as two weights
            params = params._replace(head_VD=None)
        return self._run(
            name,
            (*shapes, self.pages.shape_CB[0]),
            partial(_inlined, self.model, self.attention, method),
            state=self.state,
            params=params,
            caches=self.caches,
            tables=(Table(self.cos_sin_MH), *self.other_tables),
            **inputs,
        )
