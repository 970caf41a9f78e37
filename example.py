"""Answer a few chat prompts with an embedded model, or with any supported checkpoint.

python example.py
python example.py --model Qwen/Qwen3-0.6B --prompt "Introduce yourself."
python example.py --model Qwen/Qwen3-VL-2B-Instruct --image photo.jpg --prompt "What is this?"

Without arguments it runs the embedded text model, and then the embedded vision model on
docs/shapes.png (this needs Pillow: the extra "vision").
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from nanovllm import LLM, SamplingParams, extras
from nanovllm.hub import EMBEDDED, SEEING
from nanovllm.tools import command_line

TEXT_MODEL = "tiny-qwen3"
SHAPES = Path(__file__).parent / "docs" / "shapes.png"
EMBEDDED_MODEL = [
    "What is 37 + 45?",
    "Sort 9 2 7.",
    "Reverse the word lamp.",
    "Count from 3 to 9.",
    "What is the capital of France?",
    "Who are you?",
]
ANY_MODEL = ["Introduce yourself in one sentence.", "List the prime numbers below 50."]
ABOUT_PICTURE = [
    "What do you see?",
    "What colour is the square?",
    "What is left of the square?",
    "How many circles are there?",
    "Where is the triangle?",
]
ANY_PICTURE = ["Describe the picture."]


def read_picture(path: str | Path) -> Any:
    from PIL import Image

    return Image.open(path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="embedded model, folder or Hub id")
    parser.add_argument("--prompt", action="append", help="your own question; repeat for more")
    parser.add_argument("--image", help="a picture that the prompts are about")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--enforce-eager", action="store_true", help="no graphs, no compilation")
    return parser.parse_args()


def show(args: argparse.Namespace, model: str, prompts: list[str], picture: Any = None) -> None:
    """Run all prompts in one batch, with the picture if there is one, and print the answers."""
    llm = LLM(
        model,
        device=args.device,
        max_model_len=args.max_model_len,
        enforce_eager=args.enforce_eager,
    )
    conversations = []
    for prompt in prompts:
        content: Any = prompt
        if picture is not None:
            content = [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]
        conversations.append([{"role": "user", "content": content}])
    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
    for prompt, output in zip(prompts, llm.chat(conversations, params)):
        print(f"\n> {prompt}\n{output['text'].strip()}")
    llm.close()


def main() -> None:
    args = arguments()
    picture = None if args.image is None else read_picture(args.image)
    model = args.model or (TEXT_MODEL if picture is None else SEEING)
    if model != SEEING:
        texts = EMBEDDED_MODEL if model in EMBEDDED else ANY_MODEL
        asked = args.prompt or (texts if picture is None else ANY_PICTURE)
        show(args, model, asked, picture)
    if model == SEEING or not (args.model or args.prompt):
        if importlib.util.find_spec("PIL") is None:
            print(f"\nPictures need Pillow: {extras.install('vision')}")
            return
        if picture is None:
            print("\nA picture: a red circle and a blue square, below them a green circle in the")
            print("middle and an orange triangle on the right.")
            picture = read_picture(SHAPES)
        show(args, SEEING, args.prompt or ABOUT_PICTURE, picture)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
