"""Rehearse buckets of a small model for an H200 without a GPU, and compile the kernels found.

`python rehearsal.py FOLDER ARCHITECTURE` prints JSON. With a third argument, each layer has so many
resident experts. Of a model with experts, half of the buckets are rehearsed.

It runs in its own process: the other tests use Triton's interpreter, which replaces the compiler,
and this file replaces the device queries of torch and Triton.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from nanovllm import EngineConfig
from nanovllm.kernels.triton import build as triton_build
from nanovllm.kernels.triton import register as triton_kernels
from nanovllm.kernels.triton import rehearsal as triton_rehearsal
from nanovllm.kernels.triton import step as triton_step
from nanovllm.models import loader as weights
from nanovllm.models.vision import weights as tower_weights
from nanovllm.platforms.cuda import TRAITS, CudaPlatform
from nanovllm.startup import choose
from nanovllm.startup.compile_farm.builder import Builder
from tests.conftest import save_tiny
from tests.kernels.builds import TARGETS, AbsentDevice, Target
from tests.models import tower_cases

DEVICE = torch.device("cuda", 0)
NAMES = {"qwen3_vl": "Qwen3VLForConditionalGeneration"}
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
        )

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        pass

    def fingerprint(self) -> dict[str, str]:
        return {}


def make_up_device() -> None:
    target = TARGETS["h200"]
    properties = SimpleNamespace(
        multi_processor_count=132,
        shared_memory_per_block_optin=target.shared_bytes,
        total_memory=1 << 30,
    )
    driver.set_active(Driver(target))  # type: ignore[arg-type]
    torch.cuda.get_device_properties = lambda device=None: properties  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # type: ignore[assignment]
    choose.select_platform = lambda config: Platform()

    def empty(model: Any, target: weights.Target, seed: int, progress: Any, how: str) -> Any:
        # without a generator, which would need the device
        def make(param: Any) -> Tensor:
            return torch.empty(param.shape, dtype=model.config.dtype, device=target.device)

        return weights.build(model, make, progress, how, target.place)

    def empty_tower(tower: Any, target: weights.Target, seed: int) -> Any:
        dtype, device = tower.config.dtype, target.device
        return tower.build(lambda param: torch.empty(param.shape, dtype=dtype, device=device))

    weights.random = empty  # type: ignore[assignment]
    tower_weights.random = empty_tower


def real(value: Any) -> Any:
    """A tensor with memory and the layout of the fake tensor `value`; other values unchanged."""
    if not isinstance(value, Tensor):
        return value
    size = value.untyped_storage().nbytes() // value.element_size()
    whole = torch.empty(size, dtype=value.dtype)
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())


def save_seeing(folder: Path, name: str) -> Path:
    """The config of a model with a vision tower; no weights are read here."""
    config = tower_cases.config(name)
    config.architectures = [NAMES[name]]
    text = config.text_config
    text.head_dim, text.hidden_size, text.num_hidden_layers = 64, 256, 5
    text.dtype = torch.bfloat16
    text.rope_parameters["mrope_section"] = [16, 8, 8]
    config.vision_config.out_hidden_size = text.hidden_size
    config.save_pretrained(folder)
    return folder


def main(folder: Path, architecture: str, num_resident: int | None = None) -> dict[str, Any]:
    make_up_device()
    triton_build.watch()
    triton_kernels.register()
    triton_step.register()
    launches: list[tuple[str, Any, dict[str, Any]]] = []
    request = triton_rehearsal._request

    def seen(kernel: Any, arguments: dict[str, Any]) -> str:
        found = request(kernel, arguments)
        launches.append((found, kernel, arguments))
        return found

    triton_rehearsal._request = seen
    if architecture in tower_cases.TOWERS:
        model = save_seeing(folder / "model", architecture)
    else:
        model = save_tiny(folder / "model", architecture, dtype="bfloat16", head_dim=64)
    config = EngineConfig(
        str(model), dtype="bfloat16", max_model_len=512, max_num_batched_tokens=256,
        max_num_seqs=48, graph_batch_sizes=[1, 3, 4, 48], compile_cache=folder / "store",
        expert_offload=num_resident,
    )  # fmt: skip
    builder = Builder(config, Platform())
    # of offloaded experts, prefill streams and the smaller decode buckets fetch
    buckets = BUCKETS if architecture in tower_cases.TOWERS else (BUCKETS[1], *BUCKETS[-2:])
    answers = [builder.do("rehearse", bucket) for bucket in buckets]
    lengths = {name: length for answer in answers for name, length in answer["kernels"].items()}
    requests = sorted(lengths)
    compiled_before = len(triton_build.compiled())
    other = Builder(config, Platform())  # like another process: it has seen no launch
    for one in requests:
        other.do("compile", one)
    compiled = len(triton_build.compiled())
    # launches on tensors with memory find their kernels
    for kernel in {id(kernel): kernel for _, kernel, _ in launches}.values():
        kernel.device_caches.clear()
    for _, kernel, arguments in launches:
        kernel.run(
            grid=(1,), warmup=True, **{name: real(value) for name, value in arguments.items()}
        )
    return {
        "numbers": [answer["numbers"][:3] for answer in answers],
        "problems": [answer["problem"] for answer in answers],
        "programs": len(list((folder / "store" / "entries").iterdir())),
        "requests": len(requests),
        "longest": json.loads(max(lengths, key=lengths.__getitem__))["name"],
        "names": sorted({json.loads(one)["name"] for one in requests}),
        "files": sorted({path.suffix for path in (folder / "store" / "triton").glob("*/*")}),
        "launches": len(launches),
        "launchers": len(driver.active.launchers),
        "compiled_before": compiled_before,
        "compiled": compiled,
        "compiled_after_launches": len(triton_build.compiled()),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))))
