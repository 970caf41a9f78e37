"""Packaging. `compile/` and `kernels/` are folders beside `nanovllm/`, which links to them."""

import configparser
import re
import runpy
import sys
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
# Without the links, packages would be missing from what is installed.
problem = runpy.run_path(str(HERE / "nanovllm" / "checkout.py"))["problem"]()
if problem:
    sys.exit(f"error: {problem}")


def repository() -> str:
    """The address of the repository that this checkout was cloned from; "" if there is none."""
    config = configparser.ConfigParser(strict=False)
    config.read(HERE / ".git" / "config")
    url = config.get('remote "origin"', "url", fallback="").removesuffix(".git")
    url = re.sub(r"^(?:ssh://)?git@([^:/]+)[:/]", r"https://\1/", url)
    return url if url.startswith("https://") and "@" not in url else ""


def long_description(url: str) -> str:
    """README.md with absolute links, as pages of packages need them."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    if not url:
        return re.sub(r"!\[[^]]*\]\([^)]*\)\n*", "", text)
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\g<1>{url}/raw/HEAD/", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:|#)", rf"\g<1>{url}/blob/HEAD/", text)


URL = repository()
setup(
    name="nanovllm",
    version="0.1.0",
    description="A compiler-centric, graph-mode inference engine for large language models",
    long_description=long_description(URL),
    long_description_content_type="text/markdown",
    license_expression="MIT",
    license_files=["LICENSE"],
    keywords="LLM inference, graph compiler, OpenAI-compatible server, CUDA graphs, Ascend NPU",
    project_urls={
        "Source": URL,
        "Documentation": f"{URL}/blob/HEAD/docs/README.md",
        "Issues": f"{URL}/issues",
    }
    if URL
    else {},
    python_requires=">=3.10",
    classifiers=[
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=[
        "nanovllm",
        "nanovllm.api",
        "nanovllm.api.page",
        "nanovllm.batch",
        "nanovllm.cli",
        "nanovllm.cli.bench",
        "nanovllm.compat",
        "nanovllm.compile",
        "nanovllm.compile.lower",
        "nanovllm.compile.lower.persistent",
        "nanovllm.compile.passes",
        "nanovllm.engine",
        "nanovllm.kernels",
        "nanovllm.kernels.cpu",
        "nanovllm.kernels.cuda",
        "nanovllm.kernels.npu",
        "nanovllm.kernels.reference",
        "nanovllm.kernels.schemas",
        "nanovllm.kernels.triton",
        "nanovllm.media",
        "nanovllm.models",
        "nanovllm.models.audio",
        "nanovllm.models.experts",
        "nanovllm.models.formats",
        "nanovllm.models.gguf",
        "nanovllm.models.lora",
        "nanovllm.models.vision",
        "nanovllm.parallel",
        "nanovllm.parsers",
        "nanovllm.platforms",
        "nanovllm.pooling",
        "nanovllm.replicas",
        "nanovllm.runner",
        "nanovllm.schedule",
        "nanovllm.serving",
        "nanovllm.startup",
        "nanovllm.startup.compile_farm",
        "nanovllm.structured",
        "nanovllm.tools",
    ],
    entry_points={"console_scripts": ["nanovllm = nanovllm.cli.main:entry"]},
    package_data={
        "nanovllm": ["assets/*/*", "py.typed"],
        "nanovllm.kernels": ["cpu/*.cpp", "cpu/*.h", "cuda/*.cu", "cuda/*.cuh"],
        "nanovllm.api.page": ["*.css", "*.html", "*.js", "*.svg"],
        "nanovllm.tools": ["*.css", "*.js"],
    },
    install_requires=[
        "torch>=2.11",
        "transformers>=5.10",
        "safetensors>=0.5",
        "huggingface_hub>=1.0",
        "jinja2>=3.1.6",
        "msgspec>=0.19",
        "numpy>=1.26",
        "tqdm>=4.66.3",
    ],
    extras_require={
        "audio": ["av>=17.1"],
        # For Hopper. Other GPUs build flash-attn from source: docs/gpus.md has the commands.
        "flash-attn": [
            "fa3-fwd>=0.0.3; platform_system == 'Linux' and platform_machine == 'x86_64'"
        ],
        "gguf": ["gguf>=0.19"],
        "ray": ["ray>=2.56"],
        "serve": [
            "httptools>=0.6",
            "llguidance>=1.9",
            "prometheus_client>=0.22",
            "starlette>=1.3.1",
            "uvicorn>=0.34",
            "uvloop>=0.21",
        ],
        "traces": ["opentelemetry-sdk>=1.30", "opentelemetry-exporter-otlp-proto-http>=1.30"],
        "structured": ["llguidance>=1.9"],
        "triton": ["triton>=3.6; platform_system == 'Linux'"],
        "video": ["av>=17.1", "pillow>=12.3"],
        "vision": ["pillow>=12.3"],
        "test": [
            "anthropic>=2.0",
            "gguf>=0.19",
            # compiles CUDA C++ for GPUs that are not there; torch for CUDA has it
            "nvidia-cuda-nvrtc>=13; platform_system == 'Linux'",
            "triton>=3.6; platform_system == 'Linux'",
            "av>=17.1",
            "pillow>=12.3",
            "compressed-tensors>=0.19",
            "httptools>=0.6",
            "httpx>=0.28",
            "hypothesis>=6.100",
            "jsonschema>=4.20",
            "openai>=2.0",
            "prometheus_client>=0.22",
            "schemathesis>=4.0",
            "starlette>=1.3.1",
            "uvicorn>=0.34",
            "uvloop>=0.21",
            "opentelemetry-exporter-otlp-proto-http>=1.30",
            "opentelemetry-sdk>=1.30",
            "playwright>=1.50",
            "llguidance>=1.9",
            "pytest>=9.0.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ray>=2.56",
            "ruff>=0.9",
            "mypy>=1.14",
            "types-tqdm",
            "setuptools>=78.1.1",
            "wheel>=0.46.2",
        ],
    },
)
