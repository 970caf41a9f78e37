"""Answer a few chat prompts with an embedded model, or with any supported checkpoint.

python example.py
python example.py --model Qwen/Qwen3-0.6B --prompt "Introduce yourself."
python example.py --model Qwen/Qwen3-VL-2B-Instruct --image photo.jpg --prompt "What is this?"

Without arguments it asks the embedded text model, and then shows a picture that it draws to the
embedded model that sees (this needs Pillow: the extra "vision").
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import Any

from nanovllm import LLM, SamplingParams
from nanovllm.hub import EMBEDDED, SEEING
from nanovllm.tools import command_line

TEXT_MODEL = "tiny-qwen3"
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


def draw_picture() -> Any:
    """96 × 64 pixels: a red circle and a blue square, below them nothing, a circle, a triangle."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (96, 64), (245, 245, 245))
    pen = ImageDraw.Draw(image)
    pen.ellipse((4, 4, 28, 28), fill=(220, 30, 30))
    pen.rectangle((37, 5, 59, 27), fill=(40, 70, 220))
    pen.ellipse((36, 36, 60, 60), fill=(30, 160, 50))
    pen.polygon([(80, 36), (92, 60), (68, 60)], fill=(250, 140, 20))
    return image


def read_picture(path: str) -> Any:
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
    """Ask a model all prompts at once, with a picture if there is one, and print its answers."""
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
            print('\nPictures need Pillow: pip install "nanovllm[vision]"')
            return
        if picture is None:
            print("\nA picture: a red circle and a blue square, below them a green circle in the")
            print("middle and an orange triangle on the right.")
            picture = draw_picture()
        show(args, SEEING, args.prompt or ABOUT_PICTURE, picture)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
