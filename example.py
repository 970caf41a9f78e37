"""Answer a few chat prompts with an embedded model, or with any supported checkpoint.

python example.py
python example.py --model Qwen/Qwen3-0.6B --prompt "Introduce yourself."
"""

from __future__ import annotations

import argparse
import sys

from nanovllm import LLM, SamplingParams
from nanovllm.hub import EMBEDDED
from nanovllm.tools import command_line

EMBEDDED_MODEL = [
    "What is 37 + 45?",
    "Sort 9 2 7.",
    "Reverse the word lamp.",
    "Count from 3 to 9.",
    "What is the capital of France?",
    "Who are you?",
]
ANY_MODEL = ["Introduce yourself in one sentence.", "List the prime numbers below 50."]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-qwen3", help="embedded model, folder or Hub id")
    parser.add_argument("--prompt", action="append", help="your own question; repeat for more")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--enforce-eager", action="store_true", help="no graphs, no compilation")
    args = parser.parse_args()

    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
    llm = LLM(
        args.model,
        device=args.device,
        max_model_len=args.max_model_len,
        enforce_eager=args.enforce_eager,
    )
    prompts = args.prompt or (EMBEDDED_MODEL if args.model in EMBEDDED else ANY_MODEL)
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    for prompt, output in zip(prompts, llm.chat(conversations, params)):
        print(f"\n> {prompt}\n{output['text'].strip()}")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
