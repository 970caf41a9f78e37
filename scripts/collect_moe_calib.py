"""Collect calibration data: the inputs of a model's experts while it answers prompts.

    python scripts/collect_moe_calib.py --model-path ./Mixtral-8x7B-v0.1 --out calib.safetensors \\
        --num-prompts 1000 --cap-per-group 4096

The engine runs the model eagerly and without compressed experts. For each layer and expert it
keeps a uniform sample of the inputs, prompts and answers alike. The file is the input of
distill_experts_activation_aware.py. Prompts like those in production make the best calibration
data: name a file of them with --prompts.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installation

from compress import arguments, calibration
from compress.calibration import Recorder
from compress.prompts import Conversation, conversations
from compress.source import open_source

from nanovllm import LLM, SamplingParams
from nanovllm.tools import command_line

MIN_RANDOM_LEN, MAX_RANDOM_LEN = 8, 64  # of prompts for a model without a tokenizer


def answer(llm: LLM, prompts: list[Conversation], params: SamplingParams, seed: int) -> None:
    """Generate answers, in the model's chat format if it has one."""
    if llm.tokenizer is None:
        print("the model has no tokenizer: prompts are random tokens", file=sys.stderr)
        rng = random.Random(seed)
        ids = range(llm.engine.runner.cfg.vocab_size)
        lens = [rng.randint(MIN_RANDOM_LEN, MAX_RANDOM_LEN) for _ in prompts]
        llm.generate([rng.choices(ids, k=one) for one in lens], params)
    elif llm.tokenizer.chat_template is None:
        llm.generate([conversation[-1]["content"] for conversation in prompts], params)
    else:
        llm.chat(prompts, params)


def collect(
    model: str,
    prompts: list[Conversation],
    params: SamplingParams,
    cap: int,
    seed: int = 0,
    **options: Any,
) -> Recorder:
    """Generate answers on an engine with `options`, and record the inputs of its experts."""
    # without padding, whose tokens are not inputs
    llm = LLM(model, enforce_eager=True, pad_batches=False, seed=seed, **options)
    with Recorder(llm.engine.runner.params, cap, seed) as recorder:
        answer(llm, prompts, params, seed)
    llm.close()
    return recorder


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True, help="a folder, or an embedded model")
    parser.add_argument("--out", type=Path, required=True, help="the file to write: *.safetensors")
    parser.add_argument(
        "--cap-per-group", type=int, default=4096, help="most inputs of a layer's expert to keep"
    )
    parser.add_argument("--num-prompts", type=int, default=1000)
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument(
        "--prompts",
        help="a file with one prompt per line, or 'tasks', which the embedded models are trained "
        "on; default: 'tasks' for an embedded model, else general prompts that come with this "
        "script",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--expert-offload", type=int, help="resident experts of each layer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    arguments.check_positive(parser, args, "cap_per_group", "num_prompts", "max_new_tokens")
    return args


def main() -> None:
    args = parse_args()
    os.environ["NANOVLLM_DISABLE_SVD"] = "1"
    source = open_source(args.model_path)
    calibration.check_target(args.out)  # before the hours that collecting can take
    groups = collect(
        args.model_path,
        conversations(args.model_path, args.prompts, args.num_prompts),
        SamplingParams(temperature=args.temperature, max_tokens=args.max_new_tokens),
        args.cap_per_group,
        args.seed,
        device=args.device,
        dtype=args.dtype,
        expert_offload=args.expert_offload,
    ).groups
    calibration.save(
        args.out, source, groups, num_prompts=args.num_prompts, temperature=args.temperature,
        seed=args.seed,
    )  # fmt: skip
    num_kept = [len(group.inputs().weight_N) for group in groups.values()]
    num_groups = len(source.sparse_layers) * source.moe.num_experts
    print(
        f"{args.out}: {sum(num_kept)} inputs of {len(groups)} experts, {min(num_kept)} to "
        f"{max(num_kept)} each; {num_groups - len(groups)} experts got none"
    )


if __name__ == "__main__":
    sys.exit(command_line.run(main))
