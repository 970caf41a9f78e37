"""Collect calibration data: what the experts of a model get while it answers prompts.

    python scripts/collect_moe_calib.py --model-path ./Mixtral-8x7B-v0.1 --out calib.safetensors \\
        --num-prompts 400 --cap-per-group 2048

The engine runs the model eagerly and without compressed experts. For each layer and expert it
keeps a uniform sample of the inputs, prompts and answers alike. The file is what
distill_experts_activation_aware.py needs. Prompts like those that the model will get make the best
calibration data: name a file of them with --prompts.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installation

from compress import calibration, prompts
from compress.calibration import Recorder
from compress.source import Source, open_source

from nanovllm import LLM, SamplingParams
from nanovllm.tools import command_line

MIN_RANDOM_LEN, MAX_RANDOM_LEN = 8, 64  # of prompts for a model without a tokenizer


def collect(args: argparse.Namespace, source: Source) -> Recorder:
    """Answer the prompts under a recorder."""
    os.environ["NANOVLLM_DISABLE_SVD"] = "1"
    llm = LLM(
        args.model_path, device=args.device, dtype=args.dtype, enforce_eager=True,
        pad_batches=False, seed=args.seed,
    )  # fmt: skip
    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_new_tokens)
    given = prompts.conversations(args.model_path, args.prompts, args.num_prompts)
    with Recorder(llm.engine.runner.params, args.cap_per_group, args.seed) as recorder:
        if llm.tokenizer is None:
            rng = random.Random(args.seed)
            ids = range(source.model.config.vocab_size)
            lens = [rng.randint(MIN_RANDOM_LEN, MAX_RANDOM_LEN) for _ in given]
            print("the model has no tokenizer: prompts are random tokens", file=sys.stderr)
            llm.generate([rng.choices(ids, k=one) for one in lens], params)
        elif llm.tokenizer.chat_template is None:
            llm.generate(prompts.last_contents(given), params)
        else:
            llm.chat(given, params)
    llm.close()
    return recorder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True, help="a folder, or an embedded model")
    parser.add_argument("--out", type=Path, required=True, help="the file to write: *.safetensors")
    parser.add_argument(
        "--cap-per-group", type=int, default=1024, help="most inputs of a layer's expert to keep"
    )
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument(
        "--prompts",
        help="a file with one prompt in a line, or 'tasks', what the embedded models are trained "
        "on; default: 'tasks' for an embedded model, else general prompts that come with this "
        "script",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in ("cap_per_group", "num_prompts", "max_new_tokens"):
        if getattr(args, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1"
            )
    source = open_source(args.model_path)
    groups = collect(args, source).groups
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
