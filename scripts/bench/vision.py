"""Times requests with one picture each, on random weights in the shapes of published models.

    python scripts/bench/vision.py --shape Qwen3-VL-2B --num-seqs 64 --size 1024
    python scripts/bench/vision.py --shape Qwen2.5-VL-3B --num-seqs 64 --size 1024

All requests are queued at once; every picture is another JPEG file. Prints a line of JSON: tokens
per second over all answers, the time from the start to each request's first token, and the time in
which the engine only waited for pictures. `--tiny` shrinks the architecture, to try this out on a
CPU.
"""

from __future__ import annotations

import argparse
import base64
import copy
import io
import json
import shutil
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm import LLM, SamplingParams
from nanovllm.hub import SEEING, resolve
from nanovllm.media.pictures import pillow
from nanovllm.tools import command_line
from nanovllm.tools.shapes import VISION_CONFIGS
from scripts.bench.engines import engine_of, versions

TEXT = "Describe the picture."
PROMPT = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{text}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
PROCESSORS: dict[str, dict[str, Any]] = {
    "qwen3_vl": {
        "processor_class": "Qwen3VLProcessor",
        "patch_size": 16,
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    "qwen2_5_vl": {
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": 14,
        "size": {"shortest_edge": 3136, "longest_edge": 12845056},
    },
}
TINY_TEXT: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
TINY_VISION: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 256,
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=tuple(VISION_CONFIGS), default="Qwen3-VL-2B")
    add("--num-seqs", type=int, default=64, help="requests, with one picture each")
    add("--size", type=int, default=1024, help="pixels of a picture's side")
    add("--prompt-len", type=int, help="tokens of a prompt without a picture")
    add("--output-len", type=int, default=128, help="tokens of an answer")
    add("--text-only", action="store_true", help="prompts without pictures")
    add(
        "--text-model",
        action="store_true",
        help="the same without a vision encoder, as a text model",
    )
    add("--runs", type=int, default=2, help="measurements with one loaded model")
    add("--media-workers", type=int, help="threads that prepare pictures")
    add("--max-model-len", type=int, default=4096)
    add("--device", default="auto")
    add("--enforce-eager", action="store_true")
    add("--tiny", action="store_true", help="small layers")
    add("--out", type=Path, metavar="FILE", help="append the line of JSON to this file")
    args = parser.parse_args()
    for name in ("num_seqs", "size", "prompt_len", "output_len", "runs"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}: at least 1")
    args.text_only |= args.text_model
    if args.text_only != (args.prompt_len is not None):
        parser.error("--text-only and --text-model need --prompt-len, which only these options use")
    return args


def write_checkpoint(folder: Path, shape: str, tiny: bool) -> None:
    """A config.json, the processor's files, and the embedded model's tokenizer with its ids."""
    config = copy.deepcopy(VISION_CONFIGS[shape])
    if tiny:
        config["text_config"] |= TINY_TEXT
        config["vision_config"] |= TINY_VISION
    source = resolve(SEEING)
    own = json.loads((source / "config.json").read_text())
    config |= {name: value for name, value in own.items() if name.endswith("_token_id")}
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.dumps(PROCESSORS[config["model_type"]])
    (folder / "preprocessor_config.json").write_text(settings)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)


def write_text_checkpoint(folder: Path, shape: str, tiny: bool) -> None:
    """The config.json of the text model that a shape has, and the embedded model's tokenizer."""
    config = copy.deepcopy(VISION_CONFIGS[shape])["text_config"] | (TINY_TEXT if tiny else {})
    del config["rope_scaling"]  # names the axes of images
    config["model_type"] = config["model_type"].removesuffix("_vl_text").replace("2_5", "2")
    config["architectures"] = [f"{config['model_type'].capitalize()}ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve(SEEING) / name, folder)


def jpeg_urls(num: int, size: int, seed: int) -> list[str]:
    """Data URLs of pictures of soft random colours."""
    rng, urls = np.random.default_rng(seed), []
    for _ in range(num):
        small = rng.integers(0, 256, (size // 8 + 1, size // 8 + 1, 3), dtype=np.uint8)
        file = io.BytesIO()
        pillow().fromarray(small).resize((size, size)).save(file, "JPEG", quality=90)
        urls.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
    return urls


def prompts_of(llm: LLM, args: argparse.Namespace, seed: int, num_tokens: int) -> list[Any]:
    """Prompts with a picture each or, with --text-only, with `num_tokens` other tokens."""
    if args.text_only:
        rng = np.random.default_rng(seed)
        return [rng.integers(0, 400, num_tokens).tolist() for _ in range(args.num_seqs)]
    text = PROMPT.format(text=TEXT)
    urls = jpeg_urls(args.num_seqs, args.size, seed)
    return [{"prompt": text, "multi_modal_data": {"image": url}} for url in urls]


def measure(llm: LLM, prompts: list[Any], output_len: int) -> dict[str, Any]:
    """Seconds, times to first tokens and the wait for pictures of one run over all prompts."""
    engine = engine_of(llm)
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    waited, begun = engine.metrics.media_wait_seconds, time.perf_counter()
    for prompt in prompts:
        engine.add_request(prompt, params)
    first: dict[int, float] = {}
    num_output = 0
    while engine.has_unfinished:
        for output in engine.step():
            first.setdefault(output.request_id, time.perf_counter() - begun)
            if (done := output.completion) is not None:
                if done.error is not None:
                    raise ValueError(done.error)
                num_output += len(done.token_ids)
    seconds = time.perf_counter() - begun
    waited = engine.metrics.media_wait_seconds - waited
    times = sorted(first.values())
    return {
        "seconds": round(seconds, 4),
        "output_tokens": num_output,
        "tokens_per_second": round(num_output / seconds, 1),
        "first_token_seconds": {
            "first": round(times[0], 4),
            "median": round(times[len(times) // 2], 4),
            "last": round(times[-1], 4),
        },
        "media_wait_seconds": round(waited, 4),
        "media_wait_share": round(waited / seconds, 4),
    }


def num_prompt_tokens(llm: LLM, size: int) -> int:
    """The tokens of a prompt with one picture; also warms up the remaining paths."""
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    prompt = {
        "prompt": PROMPT.format(text=TEXT),
        "multi_modal_data": {"image": jpeg_urls(1, size, 99)[0]},
    }
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    return len(output.prompt_token_ids)


def main() -> None:
    args = arguments()
    options: dict[str, Any] = {}
    if args.media_workers is not None:
        options["media_limits"] = {"num_media_workers": args.media_workers}
    with TemporaryDirectory() as folder:
        write = write_text_checkpoint if args.text_model else write_checkpoint
        write(Path(folder), args.shape, args.tiny)
        begun = time.perf_counter()
        llm = LLM(
            folder,
            device=args.device,
            random_weights=True,
            max_num_seqs=args.num_seqs,
            max_model_len=args.max_model_len,
            enforce_eager=args.enforce_eager,
            enable_prefix_caching=False,
            **options,
        )
        load_seconds = time.perf_counter() - begun
        num_tokens = args.prompt_len or num_prompt_tokens(llm, args.size)
        runs = [
            measure(llm, prompts_of(llm, args, seed, num_tokens), args.output_len)
            for seed in range(args.runs)
        ]
        llm.close()
    line = json.dumps(
        {
            "shape": args.shape,
            "tiny": args.tiny,
            "num_seqs": args.num_seqs,
            "size": args.size,
            "pictures": not args.text_only,
            "text_model": args.text_model,
            "prompt_tokens": num_tokens * args.num_seqs,
            "load_seconds": round(load_seconds, 2),
            "runs": runs,
            "versions": versions(),
        }
    )
    print(line)
    if args.out:
        with args.out.open("a", encoding="utf-8") as out:
            out.write(line + "\n")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
