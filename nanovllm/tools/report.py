"""The report on one bucket: its graphs, its kernels, and the cost of each.

Builds one layer of each kind with random weights, runs the bucket on rows of a given length, and
times every call with the arguments of the step. Reads no weights.
"""

from __future__ import annotations

import json
import platform as host
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from nanovllm.compile.lower.calls import CallList
from nanovllm.compile.program import Program
from nanovllm.compile.trace import tensors
from nanovllm.config import EngineConfig
from nanovllm.models.config import ModelConfig
from nanovllm.runner.runner import Runner
from nanovllm.runner.state import Span
from nanovllm.startup.compile_farm.builder import small_runner
from nanovllm.startup.resolve import resolve_without_weights
from nanovllm.tools import report_data
from nanovllm.tools.device_limits import Work, measure_limits
from nanovllm.tools.report_data import MeasuredCall, Padding, RegionReport, Report, Timer

Recorded = dict[str, tuple[Program, list[Tensor]]]  # programs of a step, with their inputs


def draw(
    config: EngineConfig, kind: str, size: int, context: int, trace: list[int], trace_name: str
) -> Report:
    """The report on one bucket: "decode" of `size` rows with `context` tokens each, or "prefill" of
    `size` tokens. `trace` holds batch sizes.

    Raises ValueError if the options give no such bucket, or if rows exceed max_model_len.
    """
    regions: dict[str, RegionReport] = {}

    def watch(name: str, stage: str, graph: GraphModule) -> None:
        regions.setdefault(name, RegionReport(name)).stages.append(
            report_data.stage_of(stage, graph)
        )

    resolved = resolve_without_weights(config)
    runner = small_runner(resolved, {"watch": watch})
    layout = runner.layout
    ladder = layout.decode_rows if kind == "decode" else layout.prefill_tokens
    if size not in ladder:
        raise ValueError(
            f"there is no {kind} bucket {size}: the buckets are {', '.join(map(str, ladder))}"
        )
    if not 1 <= context < layout.max_model_len:
        raise ValueError(
            f"context is {context}: "
            f"it must be at least 1 and below max_model_len ({layout.max_model_len})"
        )
    blocks_each = -(-(context + 1 if kind == "decode" else size) // layout.block_size)
    runner.allocate_cache(1 + blocks_each * (size if kind == "decode" else 1))
    runner.run_bucket(kind, size)
    recorded: Recorded = {}
    runner.compiler.observe(lambda program: partial(_record, recorded, program))
    with torch.no_grad():
        if kind == "decode":
            _decode(runner, size, context, blocks_each)
        else:
            _prefill(runner, size)
        platform = runner.platform
        seconds = report_data.timer(platform.capture, platform.synchronize)
        free_bytes = platform.cache_limit_bytes()
        limits = measure_limits(platform.device, runner.cfg.dtype, platform.synchronize, free_bytes)
        for name, (program, inputs) in recorded.items():
            regions[name].calls = _measured(runner, program, inputs, seconds)
    model = resolved.model
    programs = Counter(model.layer_programs(keeps_last=kind == "prefill"))
    for (region, layer_kind), count in programs.items():
        for name in recorded:
            if name.startswith(f"{region}_{kind}_") and name.endswith(f"_{layer_kind.name}"):
                regions[name].times = count
    return Report(
        title=f"{Path(config.model).name}, {kind} {size}",
        facts=_facts(runner, model.config, kind, context),
        limits=limits,
        regions=tuple(regions[name] for name in recorded),
        padding=_padding(kind, trace, ladder),
        trace_name=trace_name,
    )


def _padding(kind: str, batch_sizes: list[int], ladder: tuple[int, ...]) -> tuple[Padding, ...]:
    """Padding of a trace of decode batch sizes. Without a trace, every size occurs once."""
    sizes = batch_sizes if batch_sizes and kind == "decode" else range(1, ladder[-1] + 1)
    return report_data.padding_of(list(sizes), ladder)


def _record(recorded: Recorded, program: Program, *inputs: object) -> Any:
    recorded.setdefault(program.name, (program, tensors(inputs)))
    return program(*inputs)


def _measured(
    runner: Runner, program: Program, inputs: list[Tensor], seconds: Timer
) -> list[MeasuredCall]:
    pos_S, token_S = runner.state.pos_S.clone(), runner.state.token_S.clone()

    def restoring(call: Work) -> float:
        taken = seconds(call)
        # the timed call may be one that advances the rows
        runner.state.pos_S.copy_(pos_S)
        runner.state.token_S.copy_(token_S)
        return taken

    if isinstance(program.run, CallList):
        return report_data.measure(program.run, inputs, restoring)
    num_bytes = sum(tensor.nbytes for tensor in [*inputs, *program.run(*inputs)])
    return [
        MeasuredCall("generated code", "", restoring(lambda: program.run(*inputs)), num_bytes, 0)
    ]


def _decode(runner: Runner, num_rows: int, context: int, blocks_each: int) -> None:
    """Run a decode step of rows that hold `context` tokens each, every row in its own blocks."""
    state, device = runner.state, runner.platform.device
    row_R = torch.arange(num_rows, device=device)
    state.pos_S[:num_rows] = context - 1
    state.seed_S[:num_rows] = row_R
    state.sampling_SF[:num_rows, 0] = 0.6
    # rows with the same token would all go to the same experts
    token_R = row_R % runner.cfg.vocab_size
    state.token_S[:num_rows] = token_R
    blocks = 1 + torch.randperm(num_rows * blocks_each).view(num_rows, blocks_each)
    for table_SP in state.block_tables:
        table_SP[:num_rows, :blocks_each] = blocks.to(device, torch.int32)
    runner.steps.decode(row_R)
    state.pos_S[:num_rows], state.token_S[:num_rows] = context - 1, token_R


def _prefill(runner: Runner, num_tokens: int) -> None:
    """Run a prefill step of one prompt that fills the bucket."""
    layout, state, device = runner.layout, runner.state, runner.platform.device
    _, num_rows = layout.prefill_bucket(num_tokens, 1)
    num_blocks = -(-num_tokens // layout.block_size)
    state.pos_S[0] = 0
    for table_SP in state.block_tables:
        table_SP[0, :num_blocks] = torch.arange(1, num_blocks + 1)
    row_idx_R = torch.full((num_rows,), state.pad_row, device=device)
    num_tokens_R = torch.zeros_like(row_idx_R)
    row_idx_R[0], num_tokens_R[0] = 0, num_tokens
    token_T = torch.arange(num_tokens, device=device) % runner.cfg.vocab_size
    span = Span(row_idx_R, num_tokens_R, token_T)
    runner.steps.sample(row_idx_R, runner.steps.prefill_logits(span), num_tokens_R)


def _facts(runner: Runner, cfg: ModelConfig, kind: str, context: int) -> dict[str, str]:
    facts = {
        "device": runner.platform.fingerprint().get("device", host.machine()),
        "threads": str(torch.get_num_threads()) if runner.platform.traits.name == "cpu" else "",
        "dtype": str(cfg.dtype).removeprefix("torch."),
        "layers": str(cfg.num_layers),
        "context": f"{context} tokens a row" if kind == "decode" else "",
        "torch": torch.__version__,
    }
    return {name: value for name, value in facts.items() if value}


def read_trace(path: Path) -> list[int]:
    """Batch sizes from a file: a JSON list, or numbers separated by white space.

    Raises ValueError if the file holds anything else.
    """
    text = path.read_text()
    try:
        is_json = text.lstrip().startswith("[")
        sizes = json.loads(text) if is_json else [int(word) for word in text.split()]
    except ValueError as error:
        raise ValueError(f"{path} holds no batch sizes: {error}") from error
    if not sizes:
        raise ValueError(f"{path} is empty")
    for size in sizes:
        if type(size) is not int or size < 1:
            raise ValueError(f"{path} holds {size!r}, but batch sizes are at least 1")
    return list(sizes)
