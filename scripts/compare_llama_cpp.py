"""Greedy tokens of a GGUF model: the engine's on a CPU, and those of llama.cpp.

    python scripts/compare_llama_cpp.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf

Needs the packages gguf and llama-cpp-python. Both engines round the inputs of products with packed
weights to int8, and rounding differs in the last bits, so four runs are compared: each engine as it
is, and each with the file's real numbers in fp32 and inputs as they are (llama.cpp with a copy of
the file in F32). A line of JSON for each pair of runs has the number of prompts with equal tokens,
the mean difference of the tokens' log-probabilities as long as tokens are equal, and where others
first differ: the place, and by how much each run prefers its own token to the other's, in
log-probability. Fails if the engines differ without rounding, except where both prefer by at most
--limit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installation

from nanovllm import LLM, SamplingParams, extras
from nanovllm.tools import command_line
from scripts.llama_cpp_model import LlamaCpp, Logits, Token, library

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, 123 dogs",
    "Water boils at a temperature of",
    "The three primary colors are",
    "In 1969, the first human",
    "import numpy as np\n\ndef softmax(x):",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: What is the largest planet in the solar system?\nA:",
    "A recipe for pancakes:\n1.",
    "The quick brown fox",
    "SELECT name, age FROM users WHERE",
    "Photosynthesis is the process by which",
    "She opened the door and saw",
    "The difference between a list and a tuple in Python is",
    "2 + 2 = 4\n3 + 3 = 6\n4 + 4 =",
    "La capitale de l'Italie est",
    "To be, or not to be,",
    "The mitochondria is",
    "Five reasons to learn to play the piano:\n",
)
NUM_KEPT = 20  # of the log-probabilities of a place


class Run(NamedTuple):
    """The token ids of each answer, and the log-probabilities of the best tokens at each place."""

    answers: list[list[int]]
    best: list[list[dict[int, float]]]


def of_engine(path: Path, prompts: list[list[int]], args: argparse.Namespace, exact: bool) -> Run:
    os.environ["NANOVLLM_EXACT_INPUTS"] = str(int(exact))
    llm = engine(path, args)
    params = SamplingParams(
        temperature=0, max_tokens=args.tokens, ignore_eos=True, logprobs=NUM_KEPT
    )
    outputs = llm.generate([{"prompt_token_ids": one} for one in prompts], params)
    llm.close()
    best = [
        [{i: found.logprob for i, found in place.items()} for place in output["logprobs"]]
        for output in outputs
    ]
    return Run([output["token_ids"] for output in outputs], best)


def engine(path: Path, args: argparse.Namespace) -> LLM:
    return LLM(
        str(path), device="cpu", dtype="float32", enforce_eager=True, max_model_len=args.context
    )


def of_llama_cpp(
    path: Path, prompts: list[list[int]], args: argparse.Namespace, exact: bool
) -> Run:
    run = Run([], [])
    with LlamaCpp(path, args.threads, args.context, exact=exact) as model:
        for prompt in prompts:
            model.clear()
            tokens = [Token(one, i, wants=i == len(prompt) - 1) for i, one in enumerate(prompt)]
            answer: list[int] = []
            best: list[dict[int, float]] = []
            while len(answer) < args.tokens:
                best.append(best_of(model.logits(tokens)[0]))
                answer.append(next(iter(best[-1])))
                tokens = [Token(answer[-1], tokens[-1].place + 1)]
            run.answers.append(answer)
            run.best.append(best)
    return run


def best_of(logits_V: Logits) -> dict[int, float]:
    """The best tokens and their log-probabilities, the best one first."""
    wide_V = logits_V.astype(np.float64)
    logprob_V = wide_V - np.logaddexp.reduce(wide_V)
    return {int(i): float(logprob_V[i]) for i in np.argsort(-wide_V, kind="stable")[:NUM_KEPT]}


def differences(name: str, one: Run, other: Run) -> dict[str, Any]:
    """Where the answers of two runs first differ. A token that is not among the best counts as the
    last of them."""
    places, margins, changes = [], [], []
    for prompt, (own, others) in enumerate(zip(one.answers, other.answers, strict=True)):
        place = next((i for i, (a, b) in enumerate(zip(own, others)) if a != b), None)
        both = zip(own[:place], one.best[prompt], other.best[prompt])
        changes += [abs(mine[token] - theirs[token]) for token, mine, theirs in both]
        if place is None:
            continue
        found = []
        for run, mine, theirs in ((one, own, others), (other, others, own)):
            best = run.best[prompt][place]
            found.append(round(best[mine[place]] - best.get(theirs[place], min(best.values())), 5))
        places.append({"prompt": prompt, "place": place, "margins": found})
        margins.append(max(found))
    return {
        "runs": name,
        "equal": len(one.answers) - len(places),
        "of": len(one.answers),
        "mean_difference": round(sum(changes) / max(1, len(changes)), 5),
        "largest_margin": max(margins, default=0.0),
        "differences": places,
    }


def write_real(path: Path, target: Path) -> None:
    """A copy of a GGUF file with all numbers in fp32. Raises ValueError without the package."""
    try:
        from gguf import GGUFReader, GGUFWriter
        from gguf.quants import dequantize
    except ImportError:
        raise ValueError(f"this needs the package gguf: {extras.install('gguf')}") from None
    reader = GGUFReader(path)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in (
            "general.architecture",
            "general.file_type",
        ):
            kind, *element = field.types
            writer.add_key_value(name, field.contents(), kind, element[-1] if element else None)
    for tensor in reader.tensors:
        real = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, real)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prompt_ids(path: Path, args: argparse.Namespace) -> list[list[int]]:
    """The tokens of the prompts. Raises ValueError if the engines have different ones."""
    llm = engine(path, args)
    ours = [list(llm.get_tokenizer().encode(one)) for one in PROMPTS[: args.num]]
    llm.close()
    with LlamaCpp(path, args.threads, args.context) as model:
        for text, own in zip(PROMPTS, ours):
            if (found := model.tokenize(text)) != own:
                raise ValueError(f"{text!r} has the tokens {own} here, {found} in llama.cpp")
    return ours


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--gguf", type=Path, required=True)
    add("--num", type=int, default=len(PROMPTS), help=f"of prompts, at most {len(PROMPTS)}")
    add("--tokens", type=int, default=64, help="of each answer")
    add("--threads", type=int, default=torch.get_num_threads(), help="of llama.cpp")
    add("--limit", type=float, default=1e-2)
    args = parser.parse_args()
    args.context = args.tokens + 64
    if not 0 < args.num <= len(PROMPTS):
        parser.error(f"--num must be 1 to {len(PROMPTS)}")
    return args


def main() -> int:
    args = arguments()
    library()
    with tempfile.TemporaryDirectory() as folder:
        real = Path(folder) / "real.gguf"
        write_real(args.gguf, real)
        prompts = prompt_ids(args.gguf, args)
        theirs = of_llama_cpp(args.gguf, prompts, args, exact=False)
        theirs_real = of_llama_cpp(real, prompts, args, exact=True)
    ours = of_engine(args.gguf, prompts, args, exact=False)
    ours_real = of_engine(args.gguf, prompts, args, exact=True)
    without_rounding = differences("engine and llama.cpp, exact inputs", ours_real, theirs_real)
    print(json.dumps(without_rounding))
    print(json.dumps(differences("engine and llama.cpp, inputs in int8", ours, theirs)))
    print(json.dumps(differences("engine, int8 and exact inputs", ours, ours_real)))
    print(json.dumps(differences("llama.cpp, int8 and exact inputs", theirs, theirs_real)))
    return int(without_rounding["largest_margin"] > args.limit)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
