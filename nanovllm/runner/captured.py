"""The steps of one bucket: static inputs and outputs, and the launches between them, recorded where the device can.

A step reads and writes the same memory each time, so a recorded one needs no host between its launches: that is most of
what a decode step or a short prompt would otherwise wait for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nanovllm.models.dense import Batch
from nanovllm.platforms.base import Platform, Replay
from nanovllm.runner.inputs import PrefillArrays
from nanovllm.runner.steps import Steps

Record = Callable[[Callable[[], None]], Replay]


class DecodeStep:
    """R rows of the state, each fed its newest token; recorded with the plain sampler, and with another or none when first
    asked for."""

    def __init__(self, steps: Steps, platform: Platform, record: Record, num_rows: int) -> None:
        device = platform.device
        self.row_idx_R = torch.full(
            (num_rows,), steps.state.pad_row, dtype=torch.int64, device=device
        )
        self.token_R = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.rows: list[int] = []  # what row_idx_R holds
        self._steps, self._record = steps, record
        self._logits_RV: Tensor | None = None
        self._logits: Replay | None = None
        self._filtered: Replay | None = None
        # The first run lies outside the record: Triton loads or compiles, cuBLAS picks its workspace.
        self._launch(steps.of_each_program())
        self.replay = record(self.launch)

    def logits(self) -> Tensor:
        """Everything but the sampler; its programs are those of the whole step.

        Where that is one program, it runs as it is, and what its sampler has advanced is put back.
        """
        if self._steps.whole:
            state = self._steps.state
            token_S, pos_S = state.token_S.clone(), state.pos_S.clone()
            self.replay()
            state.token_S.copy_(token_S)
            state.pos_S.copy_(pos_S)
        else:
            if self._logits is None:
                self._logits = self._record(self._without_sampler)
            self._logits()
        assert self._logits_RV is not None
        return self._logits_RV

    def filtered(self, choose: Callable[[Tensor, Tensor], Tensor]) -> None:
        """The whole step, in which `choose`, given row_idx_R and the logits, chooses and advances the state."""

        def launch() -> None:
            self.token_R.copy_(choose(self.row_idx_R, self._steps.decode_logits(self.row_idx_R)))

        if self._filtered is not None:
            self._filtered()
        else:
            launch()  # outside the record, as above
            self._filtered = self._record(launch)

    def launch(self) -> None:
        """The whole step, op by op."""
        self._launch(self._steps)

    def _launch(self, steps: Steps) -> None:
        token_R, logits_RV = steps.decode(self.row_idx_R)
        self.token_R.copy_(token_R)
        if steps.whole:
            self._logits_RV = logits_RV

    def _without_sampler(self) -> None:
        self._logits_RV = self._steps.decode_logits(self.row_idx_R)


class PrefillStep:
    """T packed tokens of at most R requests: keys and values written, and the next token of each request chosen."""

    def __init__(
        self, steps: Steps, platform: Platform, num_tokens: int, num_rows: int, blocks_per_row: int
    ) -> None:
        def static(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=platform.device)

        self.token_T, self.token_R = static(num_tokens), static(num_rows)
        self.batch = Batch(
            pos_T=static(num_tokens),
            slot_T=static(num_tokens),
            block_table_RP=static(num_rows, blocks_per_row, dtype=torch.int32),
            seq_len_R=static(num_rows, dtype=torch.int32),
            q_start_S=static(num_rows + 1, dtype=torch.int32),
        )
        self.sample_row_R, self.last_R = static(num_rows), static(num_rows)
        self._steps, self._platform = steps, platform
        self.replay: Replay = self.launch

    def record(self, record: Record) -> None:
        """Have `replay` repeat the launches. The inputs that are there are run, so they must be safe to run."""
        self._launch(self._steps.of_each_program())
        self.replay = record(self.launch)

    def fill(self, arrays: PrefillArrays) -> None:
        """Copy a step's inputs to where it reads them, without waiting."""
        for target, values in (
            (self.token_T, arrays.token_T),
            (self.batch.pos_T, arrays.pos_T),
            (self.batch.slot_T, arrays.slot_T),
            (self.batch.block_table_RP, arrays.block_table_RP),
            (self.batch.seq_len_R, arrays.seq_len_R),
            (self.batch.q_start_S, arrays.q_start_S),
            (self.sample_row_R, arrays.sample_row_R),
            (self.last_R, arrays.last_R),
        ):
            self._platform.write(target, values)

    def launch(self) -> None:
        """The whole step, op by op."""
        self._launch(self._steps)

    def _launch(self, steps: Steps) -> None:
        logits_RV = steps.prefill_logits(self.token_T, self.batch, self.last_R)
        self.token_R.copy_(steps.sample(self.sample_row_R, logits_RV))

    def logits(self) -> Tensor:
        """The step without the sampler, op by op: the logits [R, V] after each row's last token."""
        return self._steps.prefill_logits(self.token_T, self.batch, self.last_R)

    def hidden(self) -> Tensor:
        """The step without head and sampler, op by op: the hidden state [T, D] of all tokens after the last layer."""
        return self._steps.prefill(self.token_T, self.batch)

    def build_hidden(self) -> None:
        """Run `hidden` where `launch` does not use all its programs: none may be left to build for the first who asks."""
        if self._steps.last_layer_is_alone:
            self.hidden()
