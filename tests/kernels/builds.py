"""The Triton kernels with their production constants, and the GPUs for which they must compile.

`compile_builds.py` compiles them: no GPU need be present.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

KB = 1024


class Target(NamedTuple):
    """A GPU, by Triton's names. A compile takes up to some seconds, so most GPUs get few cases."""

    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int  # that one program may use

    @property
    def has_matrix_units(self) -> bool:
        """True if Triton uses the matrix units. It does not use those of Turing."""
        return self.arch != 75

    @property
    def launches_dependent(self) -> bool:
        return self.backend == "cuda" and int(self.arch) >= 90


class Model(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str


MODELS = {
    "qwen3-0.6b": Model(16, 8, 128, 64, "bf16"),
    "qwen2-0.5b": Model(14, 2, 64, 16, "fp16"),
    "head-80": Model(32, 32, 80, 64, "fp16"),
    "head-96 group-16": Model(32, 2, 96, 64, "bf16"),
    "head-256": Model(16, 8, 256, 64, "bf16"),
    "head-256-fp32": Model(16, 8, 256, 48, "fp32"),
    "head-512": Model(16, 2, 512, 64, "bf16"),
}
GPT_OSS = Model(64, 8, 64, 64, "bf16")
GEMMA3 = Model(8, 4, 256, 64, "bf16")
TARGETS = {
    "t4": Target("cuda", 75, 32, 64 * KB),
    "a100": Target("cuda", 80, 32, 163 * KB),
    "rtx3090": Target("cuda", 86, 32, 99 * KB),
    "rtx4090": Target("cuda", 89, 32, 99 * KB),
    "h200": Target("cuda", 90, 32, 227 * KB),
    "b200": Target("cuda", 100, 32, 227 * KB),
    "rtx5090": Target("cuda", 120, 32, 99 * KB),
    "mi300": Target("hip", "gfx942", 64, 64 * KB),
}
WHOLE = "h200"  # gets every case
FAR = ("t4", "mi300")  # differ most from WHOLE: get attention in fp32, and all forms of experts
WITH_RANKS = ("a100", WHOLE)  # get the kernels of sums over ranks
# Between two GPUs of this table, with the shared memory of one of them: attention alone.
BETWEEN = ("rtx3090", "rtx5090")
# Rows of a decode step, or the most queries of a row of a prefill step, and the window.
LARGE = {"decode": (256, 0), "prefill": (8192, 0)}
SMALL = {"decode": (1, 4096), "prefill": (16, 4096)}
Sizes = dict[str, tuple[int, int]]
ONE_ROW, ROWS = {"decode": SMALL["decode"]}, {"decode": LARGE["decode"]}
FEW_TOKENS, TOKENS = {"prefill": SMALL["prefill"]}, {"prefill": LARGE["prefill"]}
WITH_SINKS = {"decode": (256, 128), "prefill": (8192, 128)}
# What GPUs other than WHOLE get. The largest heads and steps need the most shared memory.
FEW_CASES: dict[str, tuple[Sizes, ...]] = {"qwen3-0.6b": (SMALL,), "head-256": (LARGE,)}
# What WHOLE gets: every tile. That of a decode step has the most stages, thus the most shared
# memory, for one row. That of a prefill step is another for few tokens if heads have up to 128
# values of 2 bytes. The tiles of heads of 80 and 96 are those of 128: each gets half of the cases.
WHOLE_CASES: dict[str, tuple[Sizes, ...]] = {
    "qwen3-0.6b": (LARGE, SMALL),
    "qwen2-0.5b": (SMALL, TOKENS),
    "head-80": (ONE_ROW, TOKENS),
    "head-96 group-16": (ROWS, FEW_TOKENS),
    "head-256": (ONE_ROW, TOKENS),
    "head-256-fp32": (SMALL,),
    "head-512": (LARGE,),
}
# Models with an fp8 cache, for GPUs that convert fp8 in hardware; all of them for WHOLE alone.
FP8_TARGETS = ("rtx4090", WHOLE)
FP8_MODELS = {
    "qwen3-0.6b": Model(16, 8, 128, 128, "bf16"),
    "blocks-of-64": Model(32, 8, 128, 64, "bf16"),
    "qwen2-0.5b": Model(14, 2, 64, 16, "fp16"),
    "head-256": Model(16, 8, 256, 128, "bf16"),
    "fp32": Model(16, 8, 128, 128, "fp32"),
}


# The prefill tile of blocks of 64 is that of qwen3-0.6b. The largest tile and the largest heads,
# which need the most registers, get both cases of decode.
FP8_CASES: dict[str, tuple[Sizes, ...]] = {
    "qwen3-0.6b": (LARGE, ONE_ROW),
    "blocks-of-64": (ONE_ROW,),
    "qwen2-0.5b": (LARGE,),
    "head-256": (LARGE, ONE_ROW),
    "fp32": (ONE_ROW, TOKENS),
}


def fp8_cases(target: str) -> dict[str, tuple[Sizes, ...]]:
    return FP8_CASES if target == WHOLE else dict(list(FP8_CASES.items())[:1])


POINTERS = {
    "*fp32": {
        "cos_sin_ptr", "part_out_ptr", "part_lse_ptr", "part_ptr", "temperature_ptr", "best_ptr",
        "sampling_ptr", "out_temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr",
        "k_scale_ptr", "v_scale_ptr",
    },
    "*i32": {
        "table_ptr", "seq_len_ptr", "q_start_ptr", "arrived_ptr", "best_token_ptr",
        "segment_start_ptr",
        "out_table_ptr", "out_seq_len_ptr", "out_q_start_ptr", "few_token_ptr",
        "allowed_ptr", "end_ptr", "history_ptr", "past_ptr",
    },
    "*i64": {
        "pos_ptr", "slot_ptr", "seed_ptr", "token_ptr", "row_idx_ptr", "new_token_ptr",
        "out_token_ptr", "out_pos_ptr", "out_slot_ptr", "out_seed_ptr", "rope_offset_ptr",
        "num_ptr", "num_tokens_ptr", "given_ptr", "out_row_ptr", "out_num_ptr", "out_last_ptr",
        "draft_ptr", "fed_ptr", "chosen_ptr", "count_ptr", "last_ptr", "out_ahead_ptr",
        "id_ptr",
    },
}  # fmt: skip
FLOATS = {"eps", "scale_log2", "log_vocab_size", "smallest_sum", "factor"}


class Build(NamedTuple):
    name: str
    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    dtype: str = "bf16"
    out: str = ""  # type of out_ptr if it is not the dtype's
    has_fp8_cache: bool = False
    types: dict[str, str] | None = None  # of pointers that are not in POINTERS


def attention_of_models(name: str) -> Iterator[Build]:
    target, cases = TARGETS[name], WHOLE_CASES if name == WHOLE else FEW_CASES
    if name in FAR:
        cases = cases | {"head-256-fp32": (LARGE,)}
    for model_name, several in cases.items():
        for sizes in several:
            yield from attention(model_name, MODELS[model_name], target, sizes)
    if name == WHOLE:
        yield from attention("gpt-oss-20b", GPT_OSS, target, WITH_SINKS, has_sinks=True)
        yield from attention("gemma3-4b", GEMMA3, target, {"prefill": (8192, 1024)}, has_ends=True)
    if name not in FP8_TARGETS:
        return
    for model_name, several in fp8_cases(name).items():
        for sizes in several:
            model = FP8_MODELS[model_name]
            yield from attention(f"fp8 {model_name}", model, target, sizes, has_fp8_cache=True)
    yield from stores("fp8 qwen3-0.6b", FP8_MODELS["qwen3-0.6b"], has_fp8_cache=True)


def attention(
    name: str,
    model: Model,
    target: Target,
    sizes: Sizes,
    has_fp8_cache: bool = False,
    has_sinks: bool = False,
    has_ends: bool = False,
) -> Iterator[Build]:
    import triton

    from nanovllm.kernels.triton import attention_prefill as prefill
    from nanovllm.kernels.triton.attention_decode import decode_kernel
    from nanovllm.kernels.triton.decode_tiles import decode_constants, decode_tile

    num_heads, num_kv_heads, head_dim, block_size, dtype = model
    element_size = 4 if dtype == "fp32" else 2
    head_p = triton.next_power_of_2(head_dim)
    heads = (num_heads, num_kv_heads, head_dim, block_size)
    strides = {
        "Q_STRIDE_ROW": num_heads * head_dim,
        "Q_STRIDE_TOKEN": num_heads * head_dim,
        "Q_STRIDE_HEAD": head_dim,
    }
    for cache in "KV":
        strides |= {
            f"{cache}_STRIDE_HEAD": head_dim,
            f"{cache}_STRIDE_SLOT": num_kv_heads * head_dim,
        }
        strides |= {f"{cache}_STRIDE_BLOCK": block_size * num_kv_heads * head_dim, "UPCAST": False}
    strides |= {"HAS_SINKS": has_sinks, **({} if has_sinks else {"sinks_ptr": None})}
    is_fp8 = has_fp8_cache and element_size == 2
    head_bytes = head_p * (1 if is_fp8 else element_size)
    if "decode" in sizes:
        num_rows, window = sizes["decode"]
        launch = decode_tile(head_bytes, block_size, num_rows, target.shared_bytes, is_fp8)
        constants = decode_constants(*heads, num_rows, window, launch) | strides
        yield Build(
            f"{name}: decode rows {num_rows} window {window}",
            decode_kernel,
            constants,
            launch.num_warps,
            launch.num_stages,
            dtype,
            has_fp8_cache=has_fp8_cache,
        )
    if "prefill" in sizes:
        max_q_len, window = sizes["prefill"]
        launch_p = prefill.prefill_tile(
            head_p, element_size, block_size, max_q_len, target.shared_bytes
        )
        queries = max(launch_p.queries, triton.next_power_of_2(num_heads // num_kv_heads))
        constants = prefill.prefill_constants(*heads, 16, window, queries, launch_p.tile) | strides
        constants |= {"HAS_ENDS": has_ends, **({} if has_ends else {"end_ptr": None})}
        yield Build(
            f"{name}: prefill {max_q_len} window {window}",
            prefill.prefill_kernel,
            constants,
            launch_p.num_warps,
            launch_p.num_stages,
            dtype,
            has_fp8_cache=has_fp8_cache,
        )


def hopper_prefills(whole: bool) -> Iterator[Build]:
    """Long prefills on Hopper, of groups of 2 and 4 heads and blocks of several sizes."""
    if not whole:
        return
    from nanovllm.kernels.triton import attention_prefill_hopper as hopper

    for num_heads, block_size, dtype in ((16, 64, "bf16"), (32, 128, "bf16"), (8, 16, "fp16")):
        constants = hopper.hopper_constants(num_heads, 8, block_size, 16)
        constants |= {"Q_STRIDE_TOKEN": num_heads * 128, "Q_STRIDE_HEAD": 128}
        yield Build(
            f"hopper heads {num_heads} blocks of {block_size} {dtype}: prefill",
            hopper.prefill_hopper_kernel,
            constants,
            hopper.NUM_WARPS,
            dtype=dtype,
        )


def is_of_hopper(name: str) -> bool:
    return name.startswith("hopper ")


def stores(name: str, model: Model, has_fp8_cache: bool = False) -> Iterator[Build]:
    """The kernels that write into the cache."""
    import triton

    from nanovllm.kernels.triton import rope_store

    num_heads, num_kv_heads, head_dim, _, dtype = model
    heads, num_warps = rope_store.rope_store_tile(head_dim, num_heads + 2 * num_kv_heads, 256)
    shape = {"NUM_KV_HEADS": num_kv_heads, "HEAD": head_dim, "HEADS": heads}
    fused = shape | {
        "HALF_P": triton.next_power_of_2(head_dim // 2),
        "NUM_HEADS": num_heads,
        "HAS_Q_NORM": True,
        "HAS_K_NORM": True,
        "ONE_TOKEN": False,
    }
    store = shape | {"HEAD_P": triton.next_power_of_2(head_dim)}
    for kernel, constants in (
        (rope_store.qk_norm_rope_store_kernel, fused),
        (rope_store.store_kv_kernel, store),
    ):
        label = f"{name}: {kernel.__name__.removesuffix('_kernel')}"
        yield Build(label, kernel, constants, num_warps, dtype=dtype, has_fp8_cache=has_fp8_cache)


def pointwise(name: str, model: Model) -> Iterator[Build]:
    import triton

    from nanovllm.kernels.triton import layer_norm, norm_act, rope_store

    yield from stores(name, model)
    num_heads, num_kv_heads, head_dim, _, dtype = model
    heads, num_warps = rope_store.rope_store_tile(head_dim, num_heads + 2 * num_kv_heads, 256)
    rope = {
        "NUM_HEADS": num_heads,
        "HEAD": head_dim,
        "HALF_P": triton.next_power_of_2(head_dim // 2),
        "HEADS": heads,
    }
    dim = 4096
    rows, norm_warps = norm_act.norm_tile(dim)
    norm = {"DIM": dim, "DIM_P": dim, "ROWS": rows, "HAS_RESIDUAL": True}
    silu_mul = {"FFN": 12288, "PIECE": 1024}
    yield Build(f"{name}: rope", rope_store.rope_kernel, rope, num_warps, dtype=dtype)
    yield Build(f"{name}: add_rms_norm", norm_act.rms_norm_kernel, norm, norm_warps, dtype=dtype)
    plain = {"DIM": dim, "DIM_P": dim, "ROWS": rows, "WEIGHT_ROWS": 1, "HAS_BIAS": True}
    kernel = layer_norm.layer_norm_kernel
    yield Build(f"{name}: layer_norm", kernel, plain, norm_warps, dtype=dtype)
    yield Build(f"{name}: silu_mul", norm_act.silu_mul_kernel, silu_mul, 4, dtype=dtype)


def products(target: Target, whole: bool) -> Iterator[Build]:
    from tests.kernels.gemm_builds import launches

    for label, kernel, constants, num_warps in launches(
        target.shared_bytes, target.has_matrix_units, whole
    ):
        yield Build(label, kernel, constants, num_warps)


def packed(target: Target, whole: bool) -> Iterator[Build]:
    """Products with packed weights."""
    from tests.kernels.packed_builds import launches

    for name, kernel, constants, num_warps, num_stages, types in launches(
        target.shared_bytes, target.has_matrix_units, whole
    ):
        yield Build(name, kernel, constants, num_warps, num_stages, types=types)


def is_packed(name: str) -> bool:
    return name.startswith("packed ")


def steps(name: str) -> Iterator[Build]:
    """The sampler, and the kernels that compute the inputs of a decode step."""
    from nanovllm.kernels.triton import sample as triton_sample
    from nanovllm.kernels.triton import step as triton_step
    from nanovllm.kernels.triton import token_bitmask, topk_topp, zero_padding

    whole = name == WHOLE
    forms = (("best_of_span", False), ("best_of_span of a rank", True))
    for label, is_part in forms if name in WITH_RANKS else forms[:1]:
        span = {"TILE": triton_sample.TILE, "IS_PART": is_part, "HARDWARE": True}
        for has_ids in (False, True)[: 1 if is_part else 2]:
            given = {**span, "HAS_IDS": has_ids}
            label += " of some tokens" if has_ids else ""
            yield Build(label, triton_sample.best_of_span_kernel, given, 4)
    yield Build("best_of_row", triton_sample.best_of_row_kernel, {"SPANS_P": 256}, 4, out="*i64")
    for dtype in ("fp32", "bf16") if whole else ("fp32",):
        tile = {"TILE": topk_topp.TILE}
        yield Build(
            f"apply_top_k_top_p {dtype}",
            topk_topp.apply_top_k_top_p_kernel,
            tile,
            topk_topp.NUM_WARPS,
            dtype=dtype,
        )
        mask = {"TILE": token_bitmask.TILE}
        yield Build(
            f"apply_token_bitmask {dtype}",
            token_bitmask.apply_token_bitmask_kernel,
            mask,
            token_bitmask.NUM_WARPS,
            dtype=dtype,
        )
    padding = {"WIDTH": 2048, "TOKENS": zero_padding.TOKENS, "TILE": zero_padding.TILE}
    yield Build("zero_padding", zero_padding.zero_padding_kernel, padding, zero_padding.NUM_WARPS)
    inputs = {"BLOCKS": 640, "BLOCK_SIZE": 64, "PIECE": 1024}
    yield Build("decode_inputs", triton_step.decode_inputs_kernel, inputs, 4)
    # each token is compared with each row: 256 rows take the assembler some seconds
    span = inputs | {"ROWS": 256 if whole else 16, "TOKENS": triton_step.SPAN_TOKENS, "DRAFTS": 3}
    span |= {"EACH": True}
    yield Build("span_inputs", triton_step.span_inputs_kernel, span, 4)
    for has_num in (False, True):
        rows = {"ROWS": triton_step.ROWS, "HAS_NUM": has_num}
        label = "K tokens" if has_num else "1 token"
        sampling = rows | {"FIELDS": 4}
        yield Build(f"sampling_inputs {label}", triton_step.sampling_inputs_kernel, sampling, 4)
        yield Build(f"advance {label}", triton_step.advance_kernel, rows, 4)
    yield from _drafts(inputs)
    ngrams = {"POSITIONS": 40_960, "NUM": 5, "NUM_POW2": 8, "MIN_N": 2, "MAX_N": 5}
    tile = {"TILE": triton_step.NGRAM_TILE}
    for label, num_past in (("", 0), (" past", 65_536)):
        given = ngrams | tile | {"PAST": num_past}
        yield Build(f"ngram_propose{label}", triton_step.ngram_propose_kernel, given, 8)


def _drafts(inputs: dict[str, Any]) -> Iterator[Build]:
    from nanovllm.kernels.triton import drafts

    accept = {"NUM": 4, "NUM_POW2": 4, "ROWS": 256, "HAS_RATE": True}
    yield Build("accept", drafts.accept_kernel, accept, 1, out="*i64")
    tile = {"TILE": drafts.TILE}
    yield Build("next_tokens", drafts.next_tokens_kernel, tile, 4, out="*i64")
    yield Build("draft_inputs", drafts.draft_inputs_kernel, inputs | {"NUM": 8}, 4)
    norms = {"PARTS": 2, "DIM": 4096, "DIM_P": 4096}
    yield Build("rms_norm_each", drafts.rms_norm_each_kernel, norms, 8)


def mixtures(name: str) -> Iterator[Build]:
    """The kernels of experts: of one model, and of odd sizes.

    The tiles of groups alone depend on the GPU, so most GPUs get the other kernels in odd sizes.
    """
    from tests.kernels.expert_builds import clamped_launches, group_launches, other_launches

    shared_bytes, all_forms = TARGETS[name].shared_bytes, name == WHOLE or name in FAR
    model, odd = ("qwen3-30b-a3b", "bf16"), ("odd", "fp32" if name == WHOLE else "bf16")
    cases = [
        (model, group_launches(*model, shared_bytes, name == WHOLE, all_forms)),
        (odd, other_launches(odd[0], all_forms and name != WHOLE)),
    ]
    if name == WHOLE:
        cases += [
            (("gpt-oss-20b", "bf16"), clamped_launches("gpt-oss-20b", shared_bytes)),
            (model, other_launches(model[0], True)),
            (odd, group_launches(*odd, shared_bytes, False, False)),
        ]
    for (model_name, dtype), launches in cases:
        for label, kernel, constants, num_warps, num_stages, types in launches:
            yield Build(
                f"experts {model_name} {dtype}: {label}", kernel, constants, num_warps, num_stages,
                dtype, types=types,
            )  # fmt: skip


def segments(target: Target, whole: bool) -> Iterator[Build]:
    """Attention of vision towers: of long segments of Qwen3-VL-2B, or of other heads, too; and of
    models that pool: grouped heads, causal, and in a window."""
    from nanovllm.kernels.triton import varlen_attention as segment

    cases = ((16, 64, "bf16"), (16, 72, "bf16"), (8, 128, "bf16"), (8, 128, "fp32"))
    for num_heads, head_dim, dtype in cases if whole else cases[:1]:
        for max_len in (4096, 64) if whole and dtype != "fp32" else (4096,):
            tile = segment.varlen_tile(
                head_dim, 4 if dtype == "fp32" else 2, max_len, target.shared_bytes
            )
            constants = segment.varlen_constants(num_heads, head_dim, 17, tile)
            for name in "QKV":
                constants |= {
                    f"{name}_STRIDE_TOKEN": (3 if name == "V" else 1) * num_heads * head_dim
                }
                constants |= {f"{name}_STRIDE_HEAD": head_dim, "UPCAST": False}
            masks = {"": (1, -1, -1)}
            if head_dim == 128:
                masks |= {" causal": (2, -1, 0), " window": (2, 127, 0)}
            for words, (group, left, right) in masks.items():
                yield Build(
                    f"segments of {max_len} head {head_dim} {dtype}{words}",
                    segment.varlen_attention_kernel,
                    {**constants, "GROUP": group, "LEFT": left, "RIGHT": right},
                    tile.num_warps, tile.num_stages, dtype,
                )  # fmt: skip


def is_of_segments(name: str) -> bool:
    return name.startswith("segments ")


def converts_fast(build: Build) -> bool:
    """True for a kernel that is to convert fp8 values of the cache two at once, without spills."""
    return build.has_fp8_cache and build.dtype != "fp32" and ": prefill" not in build.name


def latents(target: Target, whole: bool) -> Iterator[Build]:
    """Attention over latents, and the choice from groups of experts."""
    from tests.kernels.latent_builds import launches

    for name, kernel, constants, num_warps, num_stages, dtype, types in launches(
        target.shared_bytes, target.has_matrix_units, whole
    ):
        yield Build(name, kernel, constants, num_warps, num_stages, dtype, types=types)


def is_of_latents(name: str) -> bool:
    return name.startswith("latents ")


def adapters(target: Target, whole: bool) -> Iterator[Build]:
    """The kernels of LoRA."""
    from tests.kernels.lora_builds import TYPES, launches

    for name, kernel, constants, num_warps, num_stages, dtype in launches(
        target.shared_bytes, whole
    ):
        yield Build(name, kernel, constants, num_warps, num_stages, dtype, types=TYPES)


def ordered(target: Target, whole: bool) -> Iterator[Build]:
    """The kernels of deterministic engines."""
    if not whole:
        return
    from tests.kernels.ordered_builds import TYPES, launches

    for name, kernel, constants, num_warps in launches(target.shared_bytes):
        yield Build(name, kernel, constants, num_warps, types=TYPES)
        if "decode 256 rows of 32 heads" in name:
            fp8 = f"{name}, fp8"
            yield Build(fp8, kernel, constants, num_warps, has_fp8_cache=True, types=TYPES)


def is_ordered(name: str) -> bool:
    return name.startswith("ordered ")


def sums(whole: bool) -> Iterator[Build]:
    """The kernels of small sums over ranks."""
    from tests.kernels.reduce_builds import launches

    for dtype in ("bf16", "fp32") if whole else ("bf16",):
        for name, kernel, constants, num_warps, types in launches(dtype):
            yield Build(name, kernel, constants, num_warps, dtype=dtype, types=types)


def delta_rules(target: Target, whole: bool) -> Iterator[Build]:
    """The kernels of layers with the gated delta rule."""
    from tests.kernels.delta_builds import launches, mixers

    precision = "tf32x3" if target.backend == "cuda" else "ieee"
    for dtype in ("bf16", "fp32") if whole else ("bf16",):
        takes_chunks = dtype != "fp32" and target.arch in (90, 100, "gfx942")
        # mixers compile in a second
        mixes_chunks = dtype != "fp32" and target.has_matrix_units
        for name, kernel, constants, num_warps, num_stages, types in chain(
            launches(dtype, precision, takes_chunks, whole),
            mixers(target.shared_bytes, mixes_chunks, whole),
        ):
            yield Build(
                f"{name} {dtype}", kernel, constants, num_warps, num_stages, dtype, types=types
            )


def all_builds(name: str) -> Iterator[Build]:
    target, whole = TARGETS[name], name == WHOLE
    yield from attention_of_models(name)
    for model_name in ("qwen3-0.6b", "head-80", "head-256-fp32") if whole else ("qwen3-0.6b",):
        yield from pointwise(model_name, MODELS[model_name])
    if name in BETWEEN:
        return
    yield from products(target, whole)
    yield from packed(target, whole)
    yield from segments(target, whole)
    yield from latents(target, whole)
    yield from hopper_prefills(whole)
    yield from adapters(target, whole)
    yield from ordered(target, whole)
    yield from mixtures(name)
    if name in WITH_RANKS:
        yield from sums(whole)
    yield from delta_rules(target, whole)
    yield from steps(name)
