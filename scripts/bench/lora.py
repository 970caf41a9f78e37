"""Measures what LoRA adapters cost on one GPU.

# about 200 s for the 8B shape; a cheap trial first
python scripts/bench/lora.py --shape Qwen3-0.6B --out lora-0.6B.json
python scripts/bench/lora.py --shape Qwen3-8B --out lora-8B.json

Weights and adapters are random. An engine without adapters runs first, then one with `enable_lora`:
requests without adapters, with one, with 8 and with 32 different ones; a single request; and a
request with a new adapter while others run, beside one with an adapter that is there. Each result
is a line of JSON on stdout and in the file. `share` is the rate by that of the engine without
adapters. Files of adapters are in the page cache.

--cases leaves some of that out: "single" is the single request, "batch" all requests at once,
"loading" the new adapter. Shorter answers (--max-len 300) make "batch" shorter; attention is then a
smaller part of a step, so shares are lower than with the defaults.

With --profile (about 90 s) there are no rates: the microseconds of each kernel in a decode step of
one row and of all rows, and in the steps of all prompts, without adapters and with some.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm import LLM, LoRARequest, SamplingParams
from nanovllm.cli.bench.workload import draw_requests, varied
from nanovllm.models.lora.slots import targets
from nanovllm.models.model import Model
from nanovllm.tools import command_line
from nanovllm.tools.profile import steady_rows
from nanovllm.tools.shapes import CONFIGS

STD = 0.02
CASES = ("single", "batch", "loading")
PROFILED_STEPS, PROFILED_PROMPT = 8, 512


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=sorted(CONFIGS), default="Qwen3-8B")
    add("--out", type=Path, required=True, help="results are added to this file, a line each")
    add("--layers", type=int, help="fewer layers than the shape has")
    add("--device", default="auto")
    add("--rank", type=int, default=16)
    add("--adapters", type=int, nargs="*", default=[1, 8, 32], help="how many in one batch")
    add("--num-seqs", type=int, default=256)
    add("--min-len", type=int, default=100, help="of prompts and answers")
    add("--max-len", type=int, default=1024)
    add("--single-tokens", type=int, default=512, help="of the single request's answer")
    add("--streams", type=int, default=64, help="requests that run while an adapter is loaded")
    add("--cases", nargs="+", choices=CASES, default=CASES, help="what to measure")
    add("--skip-plain", action="store_true", help="no engine without adapters: no shares")
    add("--profile", action="store_true", help="times of kernels, and no rates")
    add("--kernels", type=int, default=24, help="how many of a profile, by their times")
    return parser.parse_args()


def write_adapter(folder: Path, model: Model, rank: int) -> None:
    """A random adapter in PEFT's format for all linear layers of a model."""
    tensors = {}
    for target in targets(model):
        for source, rows in zip(target.param.sources, target.param.parts):
            name = "base_model.model." + source.removesuffix(".weight")
            depth = target.param.shape[1]
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, depth).bfloat16() / depth**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank).bfloat16() * STD
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def copies(folder: Path, num: int) -> list[LoRARequest]:
    """Adapters with the files of one."""
    found = []
    for number in range(1, num + 1):
        copy = folder.with_name(f"adapter-{number}")
        copy.mkdir()
        for file in folder.iterdir():
            os.link(file, copy / file.name)
        found.append(LoRARequest(f"adapter-{number}", number, str(copy)))
    return found


def _fill_slots(llm: LLM, adapters: Sequence[LoRARequest | None]) -> None:
    for one in filter(None, dict.fromkeys(adapters)):
        once = SamplingParams(max_tokens=1)
        llm.generate([[5]], once, use_tqdm=False, lora_request=one)


class Bench:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.config = dict(CONFIGS[args.shape])
        if args.layers:
            self.config["num_hidden_layers"] = args.layers
        (folder / "config.json").write_text(json.dumps(self.config))
        lengths = (args.min_len, args.max_len)
        self.work = draw_requests(args.num_seqs, lengths, self.config["vocab_size"])
        self.rates: dict[str, float] = {}  # of the engine without adapters
        self.num_runs = 0

    def load(self, **options: Any) -> LLM:
        begun = time.perf_counter()
        llm = LLM(
            str(self.folder),
            random_weights=True,
            device=self.args.device,
            max_num_seqs=self.args.num_seqs,
            max_model_len=max(4096, 2 * self.args.max_len),
            **options,
        )
        seconds = round(time.perf_counter() - begun, 1)
        device = llm.engine.runner.platform.describe()
        self.note("load", load_s=seconds, device=device, **llm.engine.memory.as_dict())
        return llm

    def note(self, case: str, **fields: Any) -> None:
        line = json.dumps({"case": case, "shape": self.args.shape, **fields})
        print(line, flush=True)
        with self.args.out.open("a", encoding="utf-8") as out:
            out.write(line + "\n")

    def throughput(self, llm: LLM, case: str, adapters: Sequence[LoRARequest]) -> None:
        prompts, lengths = self.work
        given = [adapters[i % len(adapters)] if adapters else None for i in range(len(prompts))]
        self._rate(llm, f"{len(prompts)} requests", case, (prompts, lengths, given))

    def single(self, llm: LLM, case: str, adapter: LoRARequest | None) -> None:
        prompts = [self.work[0][0][:128]]
        self._rate(llm, "1 request", case, (prompts, [self.args.single_tokens], [adapter]))

    def _rate(self, llm: LLM, load: str, case: str, work: tuple[Any, Any, Any]) -> None:
        prompts, lengths, given = work
        _fill_slots(llm, given)
        self.num_runs += 1
        prompts = varied(prompts, self.num_runs, self.config["vocab_size"])
        params = [SamplingParams(ignore_eos=True, max_tokens=num) for num in lengths]
        begun = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False, lora_request=given)
        seconds = time.perf_counter() - begun
        rate = sum(lengths) / seconds
        self.rates.setdefault(load, rate) if case == "plain" else None
        plain = self.rates.get(load)
        share = None if plain is None else round(rate / plain, 4)
        self.note(case, load=load, seconds=round(seconds, 3), tokens_s=round(rate, 1), share=share)

    def profile(self, llm: LLM, case: str, num_rows: int, adapters: Sequence[LoRARequest]) -> None:
        """The times of kernels in the steps of prompts, and in decode steps of all rows."""
        engine, params = llm.engine, SamplingParams(ignore_eos=True, max_tokens=64)
        vocab = self.config["vocab_size"]
        _fill_slots(llm, adapters)
        with profile(activities=[ProfilerActivity.CUDA]):  # the first start takes seconds
            engine.runner.platform.synchronize()
        for i in range(num_rows):
            prompt = [(7 * i + 13 * j + 5 * self.num_runs) % vocab for j in range(PROFILED_PROMPT)]
            adapter = adapters[i % len(adapters)] if adapters else None
            engine.add_request(prompt, params, incremental=False, lora_request=adapter)
        self.num_runs += 1
        num_steps = 0
        with profile(activities=[ProfilerActivity.CUDA]) as of_prompts:
            while not steady_rows(engine, PROFILED_STEPS):
                engine.step()
                num_steps += 1
            engine.runner.platform.synchronize()
        self._note_kernels(f"{case}: prompts", of_prompts, 1, rows=num_rows, steps=num_steps)
        with profile(activities=[ProfilerActivity.CUDA]) as of_steps:
            begun = time.perf_counter()
            for _ in range(PROFILED_STEPS):
                engine.step()
            engine.runner.platform.synchronize()
            wall = (time.perf_counter() - begun) / PROFILED_STEPS
        wall_us = round(1e6 * wall, 1)
        self._note_kernels(case, of_steps, PROFILED_STEPS, rows=num_rows, wall_us=wall_us)
        while engine.has_unfinished:
            engine.step()

    def _note_kernels(self, case: str, found: profile, unit: int, **fields: Any) -> None:
        """Write [microseconds, launches, name] of kernels, by `unit` steps. The times of kernels
        that wait for earlier ones contain the wait, so their sum may exceed the step's."""
        times = [
            (one.self_device_time_total / unit, one.count / unit, one.key[:70])
            for one in found.key_averages()
        ]
        times = sorted(filter(lambda one: one[0] > 0, times), reverse=True)
        lora = sum(time for time, _, name in times if "lora" in name)
        kernels = [(round(time, 1), round(num, 1), name) for time, num, name in times]
        total = round(sum(one[0] for one in times), 1)
        kernels = kernels[: self.args.kernels]
        self.note(case, **fields, us=total, lora_us=round(lora, 1), kernels=kernels)

    def loading(self, llm: LLM, there: LoRARequest, new: LoRARequest) -> None:
        """The longest gap between two tokens of streams, and the time until a request's first one:
        without an adapter, with one that is in a slot, and with one that is not in memory."""
        self._gaps(llm, None)
        for case, adapter in (("no adapter", None), ("in a slot", there), ("new", new)):
            self.note(f"one more request: {case}", **self._gaps(llm, adapter))

    def _gaps(self, llm: LLM, adapter: LoRARequest | None) -> dict[str, float]:
        engine, args = llm.engine, self.args
        params = SamplingParams(ignore_eos=True, max_tokens=400)
        streams = {engine.add_request([7 + i] * 16, params) for i in range(args.streams)}
        asked, extra, first, read = 0.0, -1, math.inf, math.inf
        last, gaps = time.perf_counter(), []
        for step_idx in range(10**6):
            if step_idx == 150:
                asked = time.perf_counter()
                once = SamplingParams(ignore_eos=True, max_tokens=8)
                extra = engine.add_request([9] * 16, once, lora_request=adapter)
            outputs = engine.step()
            now = time.perf_counter()
            if asked and read is math.inf and adapter is not None:
                read = now if engine.adapters.is_ready(adapter.lora_int_id) else read
            if any(one.request_id in streams for one in outputs):
                gaps.append(now - last)
                last = now
            if first is math.inf and any(one.request_id == extra for one in outputs):
                first = now
            if not engine.has_unfinished:
                break
        gaps = gaps[100:-10]  # the streams have begun, and none has ended
        return {
            "longest_gap_ms": round(1e3 * max(gaps), 2),
            "median_gap_ms": round(1e3 * sorted(gaps)[len(gaps) // 2], 2),
            "first_token_ms": round(1e3 * (first - asked), 1),
            "in_host_memory_ms": round(1e3 * (read - asked), 1) if read is not math.inf else 0.0,
        }


def main() -> None:
    args = arguments()
    with TemporaryDirectory(prefix="lora-") as folder:
        bench = Bench(args, Path(folder))
        if not (args.skip_plain or args.profile or tuple(args.cases) == ("loading",)):
            llm = bench.load()
            if "single" in args.cases:
                bench.single(llm, "plain", None)
            if "batch" in args.cases:
                bench.throughput(llm, "plain", ())
            llm.close()
            del llm
            gc.collect()
        most = max(args.adapters, default=1)
        llm = bench.load(
            enable_lora=True, max_loras=most, max_lora_rank=args.rank, max_cpu_loras=most + 1
        )
        begun = time.perf_counter()
        write_adapter(bench.folder / "adapter", llm.engine.runner.model, args.rank)
        adapters = copies(bench.folder / "adapter", most + 1)
        bench.note("write", seconds=round(time.perf_counter() - begun, 1))
        (_profile if args.profile else _rates)(bench, llm, adapters)
        llm.close()


def _rates(bench: Bench, llm: LLM, adapters: Sequence[LoRARequest]) -> None:
    cases = bench.args.cases
    if "single" in cases:
        bench.single(llm, "unused", None)
        bench.single(llm, "1 adapter", adapters[0])
    if "batch" in cases:
        bench.throughput(llm, "unused", ())
        for num in bench.args.adapters:
            bench.throughput(llm, f"{num} adapters", adapters[:num])
    if "loading" in cases:
        bench.loading(llm, adapters[0], adapters[-1])


def _profile(bench: Bench, llm: LLM, adapters: Sequence[LoRARequest]) -> None:
    for num_rows in (1, bench.args.num_seqs):
        for num in (0, *bench.args.adapters):
            if num <= num_rows:
                bench.profile(llm, f"{num} adapters", num_rows, adapters[:num])


if __name__ == "__main__":
    sys.exit(command_line.run(main))
