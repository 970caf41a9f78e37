"""Builds the part of flash-attn 2.8.3 that paged attention of this engine calls, for one GPU.

    pip download --no-deps --no-build-isolation --no-binary=:all: flash-attn==2.8.3
    tar xzf flash_attn-2.8.3.tar.gz
    python scripts/bench/build_flash_attn.py flash_attn-2.8.3 --to site [--jobs 16]

A whole build takes an hour. This one leaves out the backward pass, heads other than 64 and 128
(smaller heads run as the next larger), attention without pages, appended keys, alibi and logit
caps. It is for measurements and for tests/kernels/test_flash_attn_real.py.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.tools import command_line

HEADS = (64, 128)
FLAGS = ("ALIBI", "SOFTCAP", "DROPOUT", "BACKWARD")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("--to", type=Path, required=True, help="a folder for PYTHONPATH")
    parser.add_argument("--jobs", default="16")
    parser.add_argument("--arch", default="90")
    args = parser.parse_args()
    code = args.source / "csrc" / "flash_attn"
    patch(code)
    args.to.mkdir(parents=True, exist_ok=True)
    build(args.source, args.to, args.jobs, args.arch)
    shutil.copytree(args.source / "flash_attn", args.to / "flash_attn", dirs_exist_ok=True)


def patch(code: Path) -> None:
    """Remove everything from the dispatch whose instantiations are not built."""
    replace(
        code / "flash_api.cpp",
        r"if \(params\.num_splits <= 1 && !force_split_kernel\) \{.*?\} else \{(.*?)\}\n",
        r'TORCH_CHECK(params.num_splits > 1 || force_split_kernel, "not built");\1\n',
    )
    replace(
        code / "flash_api.cpp",
        r"(void run_mha_bwd\(Flash_bwd_params &params, cudaStream_t stream\) \{).*?\n\}\n",
        r'\1 TORCH_CHECK(false, "not built"); }\n',
    )
    switch = "".join(
        f"{'else ' if index else ''}if (HEADDIM <= {head}) {{ constexpr static int kHeadDim = "
        f"{head}; return __VA_ARGS__(); }} "
        for index, head in enumerate(HEADS)
    )
    replace(
        code / "src" / "static_switch.h",
        r"#define HEADDIM_SWITCH.*",
        rf"#define HEADDIM_SWITCH(HEADDIM, ...) [&] {{ {switch}}}()\n",
    )
    replace(
        code / "src" / "flash_fwd_launch_template.h",
        r"BOOL_SWITCH\(params\.knew_ptr != nullptr, Append_KV, \[&\] \{",
        "ALIBI_SWITCH(false, Append_KV, [&] {",
    )


def replace(path: Path, pattern: str, text: str) -> None:
    """Replace the only match. A second run finds the new text and changes nothing."""
    old = path.read_text()
    new, count = re.subn(pattern, text, old, flags=re.DOTALL)
    if count != 1:
        sys.exit(f"{path}: {count} matches of {pattern}")
    path.write_text(new)


def build(source: Path, to: Path, jobs: str, arch: str) -> None:
    os.environ["MAX_JOBS"] = jobs
    os.environ["TORCH_CUDA_ARCH_LIST"] = f"{arch[:-1]}.{arch[-1]}"
    from torch.utils.cpp_extension import load

    code = source / "csrc" / "flash_attn"
    kernels = [
        code / "src" / f"flash_fwd_split_hdim{head}_{dtype}_{causal}sm80.cu"
        for head in HEADS
        for dtype in ("bf16", "fp16")
        for causal in ("causal_", "")
    ]
    flags = [f"-DFLASHATTENTION_DISABLE_{flag}" for flag in FLAGS]
    options = [
        "-O3", "--use_fast_math", "--expt-relaxed-constexpr",
        "--expt-extended-lambda", "-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__",
        "-U__CUDA_NO_HALF2_OPERATORS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    ]  # fmt: skip
    load(
        name="flash_attn_2_cuda",
        sources=[str(code / "flash_api.cpp"), *map(str, kernels)],
        extra_cflags=["-O3", *flags],
        extra_cuda_cflags=options + flags,
        extra_include_paths=[
            str(code), str(code / "src"), str(source / "csrc" / "cutlass" / "include")
        ],
        build_directory=str(to),
        verbose=True,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(command_line.run(main))
