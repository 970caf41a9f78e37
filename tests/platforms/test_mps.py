"""The MPS platform without an Apple GPU: its policy on CPU tensors, with every op in plain torch.

The tests show which operators are called, that torch declares MPS kernels for all of them, that no
float64 tensor is made, and that the tokens equal those of the CPU platform. They cannot show what
Metal computes.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanovllm import LLM, SamplingParams, platforms
from nanovllm.kernels import ops, reference
from nanovllm.platforms import mps
from nanovllm.platforms.mps import MpsPlatform

# Operators with an MPS kernel in torch's native_functions.yaml, or composed of such operators:
# views, factories, and composites whose parts are in this list. In int64 the backend has indices
# and the products, shifts and masks of the sampler's hash.
SUPPORTED = frozenset(
    """
    __and__.Scalar __rshift__.Scalar __xor__.Scalar __xor__.Tensor _index_put_impl_
    _local_scalar_dense _log_softmax _softmax _to_copy _unsafe_view add.Tensor addmm any.dim arange
    arange.start arange.start_step argmax bitwise_and.Scalar clamp bitwise_and.Tensor
    bitwise_and_.Tensor bitwise_not bitwise_or.Tensor bitwise_xor.Scalar bitwise_xor.Tensor bmm cat
    clone copy_ cos cumsum detach div.Tensor embedding empty.memory_format eq.Scalar expand
    fill_.Tensor floor_divide full gather ge.Scalar ge.Tensor gt.Scalar index.Tensor index_copy
    index_copy_ index_add_ index_put index_put_ index_select isnan le.Tensor lift_fresh log
    lt.Tensor masked_fill.Scalar masked_fill_.Scalar mean.dim mm mul.Tensor nan_to_num
    nan_to_num.out ne.Scalar neg ones_like permute pow.Scalar pow.Tensor_Scalar reciprocal
    remainder.Scalar remainder.Tensor rsqrt scalar_tensor scatter_.src select.int
    set_.source_Storage silu sin slice.Tensor sort.stable split.Tensor split_with_sizes squeeze.dim
    sub.Tensor t topk transpose.int unbind.int unsqueeze view view.dtype where.self zeros zeros_like
    fill_.Scalar lt.Scalar sum.dim_IntList gt.Tensor new_full scatter_add_ __rshift__.Tensor alias
""".split()  # noqa: SIM905
)
# Calls of a composite kernel below the level at which operators are recorded.
CALLS = {
    "embedding": ["index_select"],
    "index_put": ["_index_put_impl_"],
    "index_put_": ["_index_put_impl_"],
    "nan_to_num": ["nan_to_num.out"],
    "remainder.Scalar": ["remainder.Tensor"],
}
OPTIONS: dict[str, Any] = {
    "dtype": "float32", "max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 64,
    "kvcache_block_size": 16,
}  # fmt: skip
PROMPTS = [[5, 6, 7], list(range(100, 119)), list(range(200, 299))]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
WISHES = SamplingParams(
    temperature=0.7, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.1,
    frequency_penalty=0.1, min_tokens=3, max_tokens=5, logprobs=2, prompt_logprobs=1, seed=3,
)  # fmt: skip


class PlainTorch(TorchDispatchMode):
    """Run our ops by their plain meaning, as without kernels; record the operators of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()
        self.ours: set[str] = set()
        self.float64: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            if name := ops.op_name(func):
                self.ours.add(name)
                meaning: Any = reference.meaning(name)
                return meaning(*args, **kwargs)
            if (parts := func.decompose(*args, **kwargs)) is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        name = str(func).removeprefix("aten.").removesuffix(".default")
        self.called.add(name)
        if any(
            isinstance(leaf, torch.Tensor) and leaf.dtype is torch.float64
            for leaf in tree_leaves(out)
        ):
            self.float64.add(name)
        return out


@pytest.fixture
def on_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlainTorch]:
    """Makes device="mps" the MPS platform on CPU tensors, without our CPU kernels."""
    monkeypatch.setattr(platforms, "select", lambda device, **_: MpsPlatform(torch.device("cpu")))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with PlainTorch() as mode:
        yield mode
    torch.set_num_threads(num_threads)


def greedy(llm: LLM) -> list[tuple[list[int], int]]:
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    return [(output["token_ids"], output["num_cached_tokens"]) for output in outputs]


def test_the_policy_gives_the_cpus_tokens_with_supported_operators(
    tiny_qwen3: Path, request: pytest.FixtureRequest
) -> None:
    """Covers warm-up, prefill, prefill after a cached prefix, decode and the filtered sampler."""
    cpu = LLM(str(tiny_qwen3), device="cpu", enforce_eager=True, **OPTIONS)
    expected, expected_cached = greedy(cpu), greedy(cpu)
    drawn = cpu.generate(PROMPTS, WISHES, use_tqdm=False)
    mode: PlainTorch = request.getfixturevalue("on_cpu_tensors")
    llm = LLM(str(tiny_qwen3), device="mps", **OPTIONS)
    runner = llm.engine.runner
    assert runner.platform.traits.name == "mps" and runner.compiler.lowering is None
    assert greedy(llm) == expected
    assert greedy(llm) == expected_cached and expected_cached[-1][1] >= 96
    found = llm.generate(PROMPTS, WISHES, use_tqdm=False)
    assert [output["token_ids"] for output in found] == [output["token_ids"] for output in drawn]
    assert mode.ours >= {
        "paged_attention",
        "rope",
        "store_kv",
        "rms_norm",
        "linear",
        "sample",
        "decode_inputs",
        "advance",
    }
    assert not any("attention" in name for name in mode.called)
    assert mode.called - SUPPORTED == set()
    assert {"bmm", "_softmax", "index_copy_", "mm"} <= mode.called  # the recording is not empty
    assert mode.float64 == set()


def test_masks_give_the_cpus_tokens_with_supported_operators(
    request: pytest.FixtureRequest,
) -> None:
    given: Any = {"regex": "([0-9]-[a-f]+;){3}"}
    asked = [SamplingParams(max_tokens=12, seed=1, structured_outputs=given), GREEDY]
    prompts = [[65, 66, 67], [68, 69]]
    cpu = LLM("tiny-qwen3", device="cpu", enforce_eager=True, **OPTIONS)
    expected = [one["token_ids"] for one in cpu.generate(prompts, asked, use_tqdm=False)]
    mode: PlainTorch = request.getfixturevalue("on_cpu_tensors")
    llm = LLM("tiny-qwen3", device="mps", **OPTIONS)
    found = llm.generate(prompts, asked, use_tqdm=False)
    assert [one["token_ids"] for one in found] == expected
    assert "apply_token_bitmask" in mode.ours and mode.called - SUPPORTED == set()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.usefixtures("on_cpu_tensors")
def test_half_precision_runs(tiny_qwen3: Path, dtype: str) -> None:
    llm = LLM(str(tiny_qwen3), device="mps", **{**OPTIONS, "dtype": dtype})
    assert llm.engine.runner.params.embed_VD.dtype is getattr(torch, dtype)
    assert all(len(tokens) == 12 for tokens, _ in greedy(llm))


def test_torch_declares_mps_kernels_for_all_supported_operators() -> None:
    yaml, torchgen = pytest.importorskip("yaml"), importlib.util.find_spec("torchgen")
    assert torchgen is not None and torchgen.submodule_search_locations
    folder = Path(torchgen.submodule_search_locations[0]) / "packaged" / "ATen" / "native"
    declared = {
        entry["func"].partition("(")[0]: entry
        for entry in yaml.safe_load((folder / "native_functions.yaml").read_text())
    }
    for name in sorted(SUPPORTED):
        for part in CALLS.get(name, [name]):
            assert has_mps_kernel(declared, part), f"{name}: {declared.get(part)}"
    # operators without a kernel are recognized
    assert not has_mps_kernel(declared, "_scaled_dot_product_flash_attention_for_cpu")
    assert not has_mps_kernel(declared, "_thnn_fused_gru_cell")


def has_mps_kernel(declared: dict[str, Any], name: str) -> bool:
    """True for an MPS kernel, an MPS kernel of the out= form, or a composite for every device."""
    entry = declared[name]
    keys = {key.strip() for names in entry.get("dispatch", {}) for key in names.split(",")}
    if "MPS" in keys or any(key.startswith("Composite") for key in keys):
        return True
    if delegate := entry.get("structured_delegate"):
        return has_mps_kernel(declared, delegate)
    return "dispatch" not in entry  # composite by default


# Cache size ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_cpu_tensors")
def test_the_cache_has_1024_blocks_unless_told(tiny_qwen3: Path) -> None:
    llm = LLM(str(tiny_qwen3), device="mps", **OPTIONS)
    assert llm.engine.runner.steps.caches[0].k_CBKH.shape[0] == 1024
    llm = LLM(str(tiny_qwen3), device="mps", num_kvcache_blocks=40, **OPTIONS)
    assert llm.engine.runner.steps.caches[0].k_CBKH.shape[0] == 40


@pytest.mark.usefixtures("on_cpu_tensors")
def test_a_small_device_gets_fewer_blocks(
    tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block_bytes = 2 * 2 * 2 * 32 * 4 * 16  # keys and values, layers, heads, head size, fp32, tokens
    monkeypatch.setattr(MpsPlatform, "cache_limit_bytes", lambda self: 100 * block_bytes)
    llm = LLM(str(tiny_qwen3), device="mps", gpu_memory_utilization=0.5, **OPTIONS)
    assert llm.engine.runner.steps.caches[0].k_CBKH.shape[0] == 50
    monkeypatch.setattr(MpsPlatform, "cache_limit_bytes", lambda self: block_bytes)
    with pytest.raises(ValueError, match=r"there is memory for 1 cache block\(s\)"):
        LLM(str(tiny_qwen3), device="mps", gpu_memory_utilization=1.0, **OPTIONS)


@pytest.mark.usefixtures("on_cpu_tensors")
def test_an_impossible_cache_is_refused_with_the_limit(tiny_qwen3: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"num_kvcache_blocks is 1000000000, .* GiB, but cpu has .* at most \d+ blocks of 16",
    ):
        LLM(str(tiny_qwen3), device="mps", num_kvcache_blocks=10**9, **OPTIONS)


def test_a_cpu_refuses_an_impossible_cache_as_well(tiny_qwen3: Path) -> None:
    with pytest.raises(
        ValueError, match=r"num_kvcache_blocks is 1000000000, .* at most \d+ blocks"
    ):
        LLM(str(tiny_qwen3), device="cpu", enforce_eager=True, num_kvcache_blocks=10**9, **OPTIONS)


def test_leaving_out_fusion_is_refused_where_nothing_is_fused(
    on_cpu_tensors: PlainTorch, tiny_qwen3: Path
) -> None:
    with pytest.raises(ValueError, match=r"fuse=False .* every step runs eagerly"):
        LLM(str(tiny_qwen3), device="mps", fuse=False, **OPTIONS)


# Refusals, choices and messages -------------------------------------------------------------------


def test_mps_on_a_machine_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: False)
    with pytest.raises(
        ValueError,
        match=r"device 'mps' is not available: .* without MPS support .* "
        "use device='cpu' or 'auto'",
    ):
        platforms.select("mps")
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch finds no MPS device"):
        platforms.select("mps")
    with pytest.raises(ValueError, match="device 'mps:1' is not supported"):
        platforms.select("mps:1")


@pytest.mark.parametrize(
    ("has_cuda", "has_mps", "chosen"),
    [(0, 0, "cpu"), (0, 1, "mps"), (1, 1, "cuda"), (1, 0, "cuda")],
)
def test_auto_takes_cuda_then_mps_then_cpu(
    monkeypatch: pytest.MonkeyPatch, has_cuda: int, has_mps: int, chosen: str
) -> None:
    from nanovllm.platforms import cuda

    class Cuda:
        traits = cuda.TRAITS

        def __init__(self, index: int) -> None:
            pass

    monkeypatch.setattr(cuda, "CudaPlatform", Cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(has_cuda))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: has_cuda)
    monkeypatch.setattr(mps, "problem", lambda index: None if has_mps else "there is none")
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: True)
    assert platforms.select("auto").traits.name == chosen


def test_bf16_needs_a_macos_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_new in (True, False):
        monkeypatch.setattr(
            torch.backends.mps, "is_macos_or_newer", lambda *version, is_new=is_new: is_new
        )
        assert (torch.bfloat16 in MpsPlatform().traits.supported_dtypes) == is_new


@pytest.mark.usefixtures("on_cpu_tensors")
def test_int8_weights_and_stored_programs_are_refused(tiny_qwen3: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantization 'int8' is not supported on a mps device"):
        LLM(str(tiny_qwen3), device="mps", quantization="int8", **OPTIONS)
    (tmp_path / "entries").mkdir(mode=0o700)
    tmp_path.chmod(0o700)
    with pytest.raises(RuntimeError, match="'require', but graphs are not lowered on mps"):
        LLM(
            str(tiny_qwen3),
            device="mps",
            compile_cache=tmp_path,
            compile_cache_mode="require",
            **OPTIONS,
        )


@pytest.mark.usefixtures("on_cpu_tensors")
def test_the_debug_log_shows_shapes_and_the_path_taken(
    tiny_qwen3: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "nanovllm"):
        greedy(LLM(str(tiny_qwen3), device="mps", **OPTIONS))
    assert "attention as matmul and softmax" in caplog.text
    assert "layer_decode_1_1_window0 runs eagerly: " in caplog.text
    assert (
        "h_TD [1, 64] float32 cpu" in caplog.text
        and "k_CBKH [1024, 16, 2, 32] float32" in caplog.text
    )
