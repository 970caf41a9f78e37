"""Times the preparation of images: ours and transformers', in threads and in processes.

    python scripts/bench/media.py [--size 1024] [--images 32] [--workers 1 2 4] [--out media.json]

All images differ, so no cache is used. Times are milliseconds per image over the whole batch, the
best of --repeats. In processes, the patches come back through the pipe of Python's
concurrent.futures. transformers' processor starts from decoded pixels; ours from JPEG files, and
from pixels as well.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.media import patches, pictures, settings
from nanovllm.tools import command_line

# Qwen3-VL's
FIELDS: dict[str, Any] = {
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    "patch_size": 16,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
SETTINGS = settings.image_settings(FIELDS)
MAX_PIXELS = 1 << 26


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", type=int, default=1024, help="pixels of a side")
    add("--images", type=int, default=32)
    add("--workers", type=int, nargs="+", default=[1, 2])
    add("--repeats", type=int, default=3)
    add("--out", type=Path)
    return parser.parse_args()


def from_pixels(pixels: pictures.Pixels) -> Any:
    height, width = patches.image_size(*pixels.shape[:2], SETTINGS)
    resized = patches.resized(pixels, height, width, SETTINGS.resample)
    return patches.image_patches(resized, SETTINGS)


def from_file(data: bytes) -> Any:
    return from_pixels(pictures.decode(data, MAX_PIXELS))


def by_transformers(pixels: pictures.Pixels) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(**FIELDS)([pixels], return_tensors="np")["pixel_values"]


def timed(pool: Executor, work: Callable[[Any], Any], items: Sequence[Any], repeats: int) -> float:
    """Milliseconds per item, the best of some rounds after one to warm up."""
    list(pool.map(work, items))
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        for result in pool.map(work, items):
            assert result.dtype == np.float32
        best = min(best, time.perf_counter() - begin)
    return best / len(items) * 1e3


def main() -> None:
    args = arguments()
    rng = np.random.default_rng(0)
    # a side that must be resized: photos rarely have the size of a grid
    side = args.size + 8
    small = rng.integers(0, 256, (args.images, side // 8, side // 8, 3), dtype=np.uint8)
    pixels = [patches.resized(one, side, side, SETTINGS.resample) for one in small]
    files = []
    for one in pixels:
        file = io.BytesIO()
        pictures.pillow().fromarray(one).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    cases: dict[str, tuple[Callable[[Any], Any], Sequence[Any]]] = {
        "JPEG files": (from_file, files),
        "pixels": (from_pixels, pixels),
        "pixels, transformers": (by_transformers, pixels),
    }
    spawn = multiprocessing.get_context("spawn")
    results = []
    for workers in args.workers:
        pools = {
            "threads": ThreadPoolExecutor(workers),
            "processes": ProcessPoolExecutor(workers, mp_context=spawn),
        }
        for kind, pool in pools.items():
            with pool:
                for name, (work, items) in cases.items():
                    ms = timed(pool, work, items, args.repeats)
                    results.append({"case": name, "kind": kind, "workers": workers, "ms": ms})
                    print(f"{name:22} {workers} {kind:10} {ms:7.1f} ms an image", flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
