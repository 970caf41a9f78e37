"""Times sleep and wake_up, and checks that greedy answers stay the same.

# random weights
python scripts/bench/sleep.py --shape Qwen3-0.6B
# the embedded model
python scripts/bench/sleep.py --device cpu
# dropped weights are read from this checkpoint
python scripts/bench/sleep.py --model DIR

Prints one line of JSON per level: medians and all times in seconds, and the additional free bytes
of the device while the engine sleeps. Level 1 moves the weights to the host, level 2 drops them.
The first sleep also allocates pinned memory. On a CPU the bytes are those of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanovllm import LLM, SamplingParams
from nanovllm.platforms.base import Platform
from nanovllm.tools import command_line
from nanovllm.tools.shapes import CONFIGS


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--shape", choices=sorted(CONFIGS), help="random weights of this shape")
    source.add_argument("--model", default="tiny-qwen3", help="embedded model, folder or Hub id")
    add = parser.add_argument
    add("--device", default="auto")
    add("--levels", type=int, nargs="+", default=[1, 2])
    add("--runs", type=int, default=3)
    add("--max-model-len", type=int, default=2048)
    add("--num-kvcache-blocks", type=int, help="default: all that gpu_memory_utilization allows")
    add("--gpu-memory-utilization", type=float, default=0.9)
    add("--enforce-eager", action="store_true", help="no graphs")
    return parser.parse_args()


def held_bytes(platform: Platform) -> int:
    """Memory in use: the device's, or this process's where the device is the host."""
    if platform.device.type != "cpu":
        return platform.used_bytes()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def answers(llm: LLM) -> list[list[int]]:
    rng, size = random.Random(0), llm.engine.model_config.vocab_size
    prompts = [[rng.randrange(5, size) for _ in range(length)] for length in (19, 99, 500)]
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    llm.reset_prefix_cache()  # a prompt with a cached prefix would run in another bucket
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


def measure(llm: LLM, level: int, num_runs: int) -> dict[str, Any]:
    platform, memory = llm.engine.runner.platform, llm.engine.memory
    seconds: dict[str, list[float]] = {"sleep": [], "wake_up": [], "first_answers": []}
    freed, same, expected = [], True, answers(llm)

    def timed(name: str, call: Any) -> Any:
        platform.synchronize()
        begun = time.perf_counter()
        result = call()
        platform.synchronize()
        seconds[name].append(round(time.perf_counter() - begun, 4))
        return result

    num_compiled = llm.engine.runner.compiler.num_compiled
    for _ in range(num_runs):
        awake = held_bytes(platform)
        timed("sleep", lambda: llm.sleep(level))
        freed.append(awake - held_bytes(platform))
        timed("wake_up", llm.wake_up)
        same &= timed("first_answers", lambda: answers(llm)) == expected
    return {
        "level": level,
        **{f"{name}_s": round(statistics.median(values), 4) for name, values in seconds.items()},
        "freed_bytes": min(freed),
        "weights_bytes": memory.weights_bytes,
        "cache_bytes": memory.cache_bytes,
        "same_tokens": same,
        "compiled_after": llm.engine.runner.compiler.num_compiled - num_compiled,
        "all_seconds": seconds,
    }


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="sleep-") as folder:
        if args.shape is not None:
            (Path(folder) / "config.json").write_text(json.dumps(CONFIGS[args.shape]))
        llm = LLM(
            args.model if args.shape is None else folder,
            device=args.device,
            enforce_eager=args.enforce_eager,
            max_model_len=args.max_model_len,
            num_kvcache_blocks=args.num_kvcache_blocks,
            gpu_memory_utilization=args.gpu_memory_utilization,
            random_weights=args.shape is not None,
            enable_sleep_mode=True,
        )
        runner = llm.engine.runner
        about = {
            "model": args.shape or args.model,
            "device": runner.platform.describe(),
            "dtype": str(runner.cfg.dtype).removeprefix("torch."),
            "mode": "eager" if runner.compiler.lowering is None else "graph",
            "torch": torch.__version__,
        }
        for level in args.levels:
            print(json.dumps({**about, **measure(llm, level, args.runs)}), flush=True)
        llm.close()


if __name__ == "__main__":
    sys.exit(command_line.run(main))
