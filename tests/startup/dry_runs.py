"""Dry-runs buckets of small models for an H200 without a GPU, and compiles the kernels found.

`python dry_runs.py FOLDER CASE …` prints a line of JSON for each case: its name and what was
found, or why it failed. A case is an architecture. "mixtral:2" has two resident experts in each
layer, "mixtral:int4" quantized weights, "bert:pools" makes embeddings. Of a model with experts,
half of the buckets are dry-run.

It runs in its own process: the other tests use Triton's interpreter, which replaces the compiler,
and this file replaces the device queries of torch and Triton. Each case has a fork, so everything
is imported once.

Which kernel a launch asks for is known from its first form, before the passes of Triton, LLVM and
the assembler. They take most of the time of a compile, and `tests/kernels/builds.py` runs them.
Here they run for one short kernel, and for those that it has not. The others are stored in their
first form.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from triton.backends.nvidia.compiler import CUDABackend
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from nanovllm import EngineConfig
from nanovllm.compile.lower.persistent import stored_plan
from nanovllm.compile.store import Store
from nanovllm.compile.trace import trace
from nanovllm.kernels.cuda import nvrtc
from nanovllm.kernels.triton import compile_log, packed_register
from nanovllm.kernels.triton import dry_run as triton_dry_run
from nanovllm.kernels.triton import register as triton_kernels
from nanovllm.kernels.triton import step as triton_step
from nanovllm.models.loader import Target as WeightTarget
from nanovllm.models.vision import weights as tower_weights
from nanovllm.platforms import preload
from nanovllm.platforms.cuda import TRAITS, CudaPlatform
from nanovllm.startup import resolve
from nanovllm.startup.compile_farm.builder import Builder
from scripts.bench.speculation import head_config
from tests.conftest import tiny_config
from tests.kernels.builds import TARGETS, WHOLE, Target, all_builds
from tests.kernels.compile_builds import AbsentDevice
from tests.models import gguf_cases, tower_cases

Stage = Callable[[Any, dict[str, Any]], Any]  # of a compile: from module and metadata to a module
SHORT = "advance_kernel"
DEVICE = torch.device("cuda", 0)
POOLS = "pools"  # the option of a model that pools
ADAPTERS = "adapters"  # and of one with slots for adapters
SYNTHETIC = {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.5}
DRAFTS: dict[str, dict[str, Any]] = {"ngram": {}, "eagle3": {}, "dflash": SYNTHETIC}  # by method
ORDERED = "ordered"  # of a deterministic engine
GGUF = "gguf"  # of a file whose matrices, the table of tokens too, are in Q8_0
NAMES = {"qwen3_vl": "Qwen3VLForConditionalGeneration", "mixtral": "MixtralForCausalLM",
         "qwen3": "Qwen3ForCausalLM", "bert": "BertModel"}  # fmt: skip
BUCKETS = (
    ("prefill", 256),
    ("prefill", 64),
    ("decode", 48),
    ("decode", 4),
    ("decode", 3),
    ("decode", 1),
)


class Driver(AbsentDevice):
    """Records the kernels for which a launcher is made."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.launchers: list[str] = []

    def launcher_cls(self, src: Any, metadata: Any) -> None:
        self.launchers.append(metadata.name)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Platform(CudaPlatform):
    def __init__(self) -> None:
        self.device = DEVICE
        self.traits = replace(
            TRAITS,
            supported_dtypes=(torch.bfloat16,),
            supports_fp8_cache=True,
            supports_offload=True,
            quantizations=("int4",),
        )

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        pass

    def fingerprint(self) -> dict[str, str]:
        return {}


def make_up_device() -> None:
    target = TARGETS[WHOLE]
    properties = SimpleNamespace(
        name="a made-up device",
        major=9,
        minor=0,
        multi_processor_count=132,
        shared_memory_per_block_optin=target.shared_bytes,
        total_memory=1 << 30,
    )
    driver.set_active(Driver(target))  # type: ignore[arg-type]
    torch.cuda.get_device_properties = lambda device=None: properties  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # type: ignore[assignment]
    resolve.select_platform = lambda config: Platform()

    def empty_tower(tower: Any, target: WeightTarget, seed: int) -> Any:
        dtype, device = tower.config.dtype, target.device
        return tower.build(lambda param: torch.empty(param.shape, dtype=dtype, device=device))

    tower_weights.random = empty_tower


def shorten_compiles() -> None:
    """Store the first form of kernels that the tests of kernels compile, except for SHORT."""
    known = {build.kernel.__name__ for build in all_builds(WHOLE)} - {SHORT}
    whole = CUDABackend.add_stages

    def add_stages(self: Any, stages: dict[str, Stage], options: Any, language: Any) -> None:
        whole(self, stages, options, language)
        first = next(iter(stages.values()))  # Gluon begins later than Triton

        def begin(source: Any, metadata: dict[str, Any]) -> Any:
            module = first(source, metadata)
            if (name := module.get_entry_func_name()) in known:
                metadata |= {"name": name, "shared": 0}
            return module

        def unless_known(stage: str, make: Stage, module: Any, metadata: dict[str, Any]) -> Any:
            if metadata.get("name") not in known:
                return make(module, metadata)
            return str(module).encode() if stage == "cubin" else module

        for stage, make in list(stages.items()):
            stages[stage] = begin if make is first else partial(unless_known, stage, make)

    CUDABackend.add_stages = add_stages


def real(value: Any) -> Any:
    """A tensor with memory and the layout of the fake tensor `value`; other values unchanged.

    A descriptor gets one of a tensor with memory.
    """
    if isinstance(value, TensorDescriptor):
        return dataclasses.replace(value, base=real(value.base))
    if not isinstance(value, Tensor):
        return value
    size = value.untyped_storage().nbytes() // value.element_size()
    whole = torch.empty(size, dtype=value.dtype)
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())


def save_config(folder: Path, name: str) -> Path:
    """A checkpoint without weights: none are read here."""
    if name in tower_cases.TOWERS:
        config = tower_cases.config(name)
        text = config.text_config
        # long prefills with heads of 128 have a kernel with descriptors
        text.head_dim, text.hidden_size, text.num_hidden_layers = 128, 256, 5
        text.dtype = torch.bfloat16
        text.rope_parameters["mrope_section"] = [32, 16, 16]
        config.vision_config.out_hidden_size = text.hidden_size
    else:
        is_dense = name == "qwen3"
        layers = {"num_hidden_layers": 8} if is_dense else {}  # a head reads several
        config = tiny_config(name, head_dim=128 if is_dense else 64, dtype="bfloat16", **layers)
    config.architectures = [NAMES[name]]
    config.save_pretrained(folder)
    return folder


def save_head(folder: Path, method: str, model: Path) -> str:
    """A random head for the model of a folder, as `scripts/bench/speculation.py` makes it."""
    config = json.loads((model / "config.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(head_config(config, method)))
    return str(folder)


def model_of(folder: Path, option: str) -> Path:
    """The checkpoint of a case. A GGUF file has weights: its header has their types."""
    if option != GGUF:
        return folder / "model"
    config = AutoConfig.from_pretrained(folder / "model")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    return gguf_cases.write(folder / "model", lambda name: "Q8_0").path


def options_of(option: str, folder: Path) -> dict[str, Any]:
    if option.isdigit():
        return {"expert_offload": int(option)}
    if option in DRAFTS:
        drafts = {"method": option, "num_speculative_tokens": 3, **DRAFTS[option]}
        if option != "ngram":
            drafts["model"] = save_head(folder / "head", option, folder / "model")
        return {"speculative_config": drafts, "random_weights": True}
    named: dict[str, dict[str, Any]] = {"": {}, GGUF: {}, POOLS: {"task": "embed"}}
    named |= {ADAPTERS: {"enable_lora": True}, ORDERED: {"deterministic": True}}
    return named.get(option, {"quantization": option})


def dry_run(folder: Path, architecture: str, option: str = "") -> dict[str, Any]:
    make_up_device()
    shorten_compiles()
    compile_log.watch()
    triton_kernels.register()
    triton_step.register()
    packed_register.register()
    nvrtc.configure(folder / "cuda")
    launches: list[tuple[str, Any, dict[str, Any]]] = []
    request = triton_dry_run._request

    def seen(kernel: Any, arguments: dict[str, Any]) -> str:
        found = request(kernel, arguments)
        launches.append((found, kernel, arguments))
        return found

    triton_dry_run._request = seen
    config = EngineConfig(
        str(model_of(folder, option)), dtype="bfloat16", max_model_len=512, max_num_seqs=48,
        max_num_batched_tokens=256, graph_batch_sizes=[1, 3, 4, 48], compile_cache=folder / "store",
        **options_of(option, folder),
    )  # fmt: skip
    builder = Builder(config, Platform())
    # of offloaded experts, prefill streams and the smaller decode buckets fetch
    buckets = BUCKETS if architecture in tower_cases.TOWERS else (BUCKETS[1], *BUCKETS[-2:])
    buckets = BUCKETS[:1] if option == POOLS else buckets
    answers = [builder.do("dry_run", bucket) for bucket in buckets]
    lengths = {name: length for answer in answers for name, length in answer["kernels"].items()}
    requests = sorted(lengths)
    compiled_before = len(compile_log.compiled())
    other = Builder(config, Platform())  # like another process: it has seen no launch
    for one in requests:
        other.do("compile", one)
    compiled = len(compile_log.compiled())
    # launches on tensors with memory find their kernels
    for kernel in {id(kernel): kernel for _, kernel, _ in launches}.values():
        kernel.device_caches.clear()
    for _, kernel, arguments in launches:
        kernel.run(
            grid=(1,), warmup=True, **{name: real(value) for name, value in arguments.items()}
        )
    binaries = (folder / "store" / "triton").glob("*/*.cubin")
    return {
        "numbers": [answer["numbers"][:3] for answer in answers],
        "problems": [answer["problem"] for answer in answers],
        "plans": [
            json.loads((folder / "store" / "objects" / entry.object).read_bytes())
            for entry in Store(folder / "store").entries()
            if entry.kind == stored_plan.KIND
        ],
        "requests": len(requests),
        "longest": _name(max(lengths, key=lengths.__getitem__)),
        "names": sorted(set(map(_name, requests))),
        "in_cuda": len(list((folder / "cuda").glob("*.cubin"))),
        "files": sorted({path.suffix for path in (folder / "store" / "triton").glob("*/*")}),
        "assembled": sorted({path.stem for path in binaries if is_assembled(path)}),
        "launches": len(launches),
        "launchers": len(driver.active.launchers),
        "compiled_before": compiled_before,
        "compiled": compiled,
        "compiled_after_launches": len(compile_log.compiled()),
    }


def _name(request: str) -> str:
    asked = json.loads(request)
    return asked.get("name") or f"{asked['source']}.cu"


def is_assembled(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x7fELF")


def found_or_why_not(folder: Path, architecture: str, *options: str) -> dict[str, Any] | str:
    try:
        return dry_run(folder, architecture, *options)
    except Exception:
        return traceback.format_exc()


def main(folder: Path, cases: list[str]) -> None:
    preload.import_compilers()
    trace(lambda x: x + 1, {"x": torch.zeros(2, 2)}, varying=("x",))
    calls: list[tuple[Any, ...]] = []
    for case in cases:
        architecture, *option = case.split(":")
        calls.append((folder / case, architecture, *option))
        save_config(folder / case / "model", architecture)
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for case, call in zip(cases, calls):
            print(json.dumps([case, pool.apply(found_or_why_not, call)]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
