"""The perplexity of a model on a text, without and with quantization by the engine.

    python scripts/perplexity.py --model DIR --quantization none fp8 int8 int4
    python scripts/perplexity.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --quantization none fp8 int8

The text is the documentation that Python carries (pydoc_data.topics), or --text FILE. It is cut
into windows of --window tokens, and every token of a window but the first counts. With --gguf
transformers, which needs accelerate for this, writes the file's real numbers to a temporary folder
first. Prints a line of JSON for each quantization.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installation

from nanovllm import LLM, SamplingParams
from nanovllm.tools import command_line


def default_text() -> str:
    from pydoc_data import topics

    return "\n".join(text for _, text in sorted(topics.topics.items()))


def real_numbers(gguf: Path, folder: Path) -> Path:
    """A checkpoint with the numbers that a GGUF file stands for."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    plain = AutoModelForCausalLM.from_config(read.config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(folder)
    return folder


def perplexity(folder: Path, quantization: str, args: argparse.Namespace) -> dict[str, Any]:
    llm = LLM(
        str(folder),
        dtype=args.dtype,
        device=args.device,
        quantization=None if quantization == "none" else quantization,
        max_model_len=args.window + 1,
        enforce_eager=True,
    )
    try:
        text = args.text.read_text(encoding="utf-8") if args.text else default_text()
        token_ids = llm.get_tokenizer().encode(text)[: args.windows * args.window]
        windows = [
            token_ids[start : start + args.window]
            for start in range(0, len(token_ids) - args.window + 1, args.window)
        ]
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        outputs = llm.generate([{"prompt_token_ids": one} for one in windows], params)
    finally:
        llm.close()
    total, num = 0.0, 0
    for window, output in zip(windows, outputs):
        assert output.prompt_logprobs is not None
        for token_id, found in zip(window[1:], output.prompt_logprobs[1:]):
            assert found is not None
            total -= found[token_id].logprob
            num += 1
    return {
        "quantization": quantization,
        "dtype": args.dtype,
        "tokens": num,
        "nats": round(total / num, 5),
        "perplexity": round(math.exp(total / num), 4),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path)
    model.add_argument("--gguf", type=Path)
    add("--quantization", nargs="+", default=["none"], metavar="NAME", help="none, or the option's")
    add("--text", type=Path)
    add("--window", type=int, default=512)
    add("--windows", type=int, default=16, help="how many at most")
    add("--dtype", default="bfloat16")
    add("--device", default="auto")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.model or real_numbers(args.gguf.resolve(), Path(temporary))
        for quantization in args.quantization:
            print(json.dumps(perplexity(folder, quantization, args)), flush=True)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
