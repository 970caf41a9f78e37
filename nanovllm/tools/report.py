"""Fills the picture of a bucket (`nanovllm.tools.report_data`): builds one layer of each sort with random weights, runs the
bucket on rows of a given length, and times every call with the arguments that it has there.

python -m nanovllm.tools.report_data --model tiny-qwen3 --bs 4 -o report.html
"""

from __future__ import annotations

import argparse
import json
import platform as host
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from nanovllm import log, platforms
from nanovllm.compile import buckets
from nanovllm.compile.lower.calls import CallList
from nanovllm.compile.program import Program
from nanovllm.compile.trace import tensors
from nanovllm.config import EngineConfig
from nanovllm.models.config import ModelConfig
from nanovllm.runner.runner import Runner
from nanovllm.runner.state import Span
from nanovllm.startup.choose import choose_without_weights
from nanovllm.startup.compile_farm.builder import small_runner
from nanovllm.tools import report_data as report
from nanovllm.tools import report_page
from nanovllm.tools.report_data import Call, Padding, Region, Report


def draw(
    config: EngineConfig,
    kind: str,
    size: int,
    context: int,
    batch_sizes: list[int],
    trace_name: str,
) -> Report:
    """The picture of one bucket: "decode" of `size` rows that hold `context` tokens each, or "prefill" of `size` tokens.

    Raises ValueError for a bucket that the options do not have, or rows longer than max_model_len.
    """
    regions: dict[str, Region] = {}

    def watch(name: str, stage: str, graph: GraphModule) -> None:
        regions.setdefault(name, Region(name)).stages.append(report.stage_of(stage, graph))

    choice = choose_without_weights(config)
    runner = small_runner(choice, {"watch": watch})
    layout = runner.layout
    ladder = layout.decode_rows if kind == "decode" else layout.prefill_tokens
    if size not in ladder:
        raise ValueError(
            f"{kind} bucket {size} is not there: the buckets are {', '.join(map(str, ladder))}"
        )
    if not 1 <= context < layout.max_model_len:
        raise ValueError(
            f"context is {context}: it must be at least 1 and below max_model_len ({layout.max_model_len})"
        )
    blocks_each = -(-(context + 1 if kind == "decode" else size) // layout.block_size)
    runner.allocate_cache(1 + blocks_each * (size if kind == "decode" else 1))
    runner.run_bucket(kind, size)
    recorded: dict[str, tuple[Program, list[Tensor]]] = {}
    runner.compiler.observe(lambda program: partial(_record, recorded, program))
    with torch.no_grad():
        step = (
            partial(_decode, runner, size, context, blocks_each)
            if kind == "decode"
            else partial(_prefill, runner, size)
        )
        step()
        seconds = report.timer(runner.platform.capture, runner.platform.synchronize)
        limits = report.measure_limits(runner.platform.device, runner.cfg.dtype, seconds)
        for name, (program, inputs) in recorded.items():
            regions[name].calls = _measured(runner, program, inputs, seconds)
            is_list = isinstance(program.run, CallList)
            regions[name].lowering = "calls" if is_list else "Inductor"
    model = choice.model
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
        padding=_padding(kind, batch_sizes, ladder),
        trace_name=trace_name,
    )


def _padding(kind: str, batch_sizes: list[int], ladder: tuple[int, ...]) -> tuple[Padding, ...]:
    """Batch sizes are rows of decode steps; without a trace every size occurs once."""
    sizes = batch_sizes if batch_sizes and kind == "decode" else range(1, ladder[-1] + 1)
    return report.padding_of(list(sizes), ladder)


def _record(
    recorded: dict[str, tuple[Program, list[Tensor]]], program: Program, *inputs: object
) -> Any:
    recorded.setdefault(program.name, (program, tensors(inputs)))
    return program(*inputs)


def _measured(
    runner: Runner,
    program: Program,
    inputs: list[Tensor],
    seconds: Callable[[Callable[[], object]], float],
) -> list[Call]:
    pos_S, token_S = runner.state.pos_S.clone(), runner.state.token_S.clone()

    def restoring(call: Callable[[], object]) -> float:
        taken = seconds(call)
        # a call that advances rows has done so many times
        runner.state.pos_S.copy_(pos_S)
        runner.state.token_S.copy_(token_S)
        return taken

    if isinstance(program.run, CallList):
        return report.measure(program.run, inputs, restoring)
    num_bytes = sum(tensor.nbytes for tensor in [*inputs, *program.run(*inputs)])
    return [Call("generated code", "", restoring(lambda: program.run(*inputs)), num_bytes, 0)]


def _decode(runner: Runner, num_rows: int, context: int, blocks_each: int) -> None:
    """A decode step of rows that hold `context` tokens each, in blocks of their own."""
    state, device = runner.state, runner.platform.device
    row_R = torch.arange(num_rows, device=device)
    state.pos_S[:num_rows] = context - 1
    state.seed_S[:num_rows] = row_R
    state.sampling_SF[:num_rows, 0] = 0.6
    blocks = 1 + torch.randperm(num_rows * blocks_each).view(num_rows, blocks_each)
    state.block_table_SP[:num_rows, :blocks_each] = blocks.to(device, torch.int32)
    runner.steps.decode(row_R)
    state.pos_S[:num_rows] = context - 1


def _prefill(runner: Runner, num_tokens: int) -> None:
    """A prefill step of one prompt that fills the bucket."""
    layout, state, device = runner.layout, runner.state, runner.platform.device
    _, num_rows = layout.prefill_bucket(num_tokens, 1)
    num_blocks = -(-num_tokens // layout.block_size)
    state.pos_S[0] = 0
    state.block_table_SP[0, :num_blocks] = torch.arange(1, num_blocks + 1)
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
    """Batch sizes from a file: a JSON list, or numbers between white space. Raises ValueError for anything else."""
    text = path.read_text()
    try:
        sizes = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [int(word) for word in text.split()]
        )
    except ValueError as error:
        raise ValueError(f"{path} holds no batch sizes: {error}") from error
    strange = [
        size for size in sizes if isinstance(size, bool) or not isinstance(size, int) or size < 1
    ]
    if strange or not sizes:
        raise ValueError(
            f"{path} holds {strange[0]!r}, but batch sizes are at least 1"
            if strange
            else f"{path} is empty"
        )
    return list(sizes)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="nanovllm.tools.report_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", required=True, help="embedded model, folder or Hub id; no weights are read"
    )
    bucket = parser.add_mutually_exclusive_group(required=True)
    bucket.add_argument("--bs", type=int, help="rows of a decode bucket")
    bucket.add_argument("--tokens", type=int, help="tokens of a prefill bucket")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"))
    parser.add_argument(
        "--context", type=int, default=512, help="tokens that each row of a decode step holds"
    )
    parser.add_argument(
        "--trace", type=Path, help="a file of batch sizes, for the waste by padding"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kvcache_block_size"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    args = parser.parse_args(arguments)
    log.configure()
    try:
        sizes = read_trace(args.trace) if args.trace else []
        options = {
            name: getattr(args, name)
            for name in ("device", "dtype", "max_model_len", "max_num_batched_tokens")
        }
        traits = platforms.select(args.device).traits
        wanted = args.max_num_seqs or max(args.bs or 1, traits.num_seqs)
        if args.bs is not None:
            ladder = buckets.decode_ladder(None, wanted, traits.decode_rows)
            options["graph_batch_sizes"] = sorted({*ladder, args.bs})
        config = EngineConfig(
            args.model, max_num_seqs=wanted, kvcache_block_size=args.kvcache_block_size, **options
        )
        kind, size = ("decode", args.bs) if args.bs is not None else ("prefill", args.tokens)
        made = draw(
            config,
            kind,
            size,
            args.context,
            sizes,
            args.trace.name if args.trace else "every size once",
        )
        args.output.write_text(report_page.page(made), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {made.title}, {len(made.regions)} regions")
    return 0
