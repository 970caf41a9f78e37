"""The measurements and tests that need a GPU, each with its command and time limit.

`run_cases.py` runs them. Weights are random and have the models' real shapes, but for the cases of
a trained model (`--model`).
"""

from __future__ import annotations

from typing import NamedTuple

# Replaced in the words of a case by the folder of compiled programs, by a file for results, and by
# the trained model of --model, without which such a case is left out.
STORE, PLACE, MODEL = "{store}", "{place}", "{model}"


class Case(NamedTuple):
    """seconds: the limit, with a cold store. words: the arguments of python."""

    seconds: float
    words: tuple[str, ...]
    num_gpus: int = 1


def throughput(seconds: float, model: str, *words: str, num_gpus: int = 1) -> Case:
    """`bench.py`, on as many ranks as GPUs."""
    ranks = ("--tensor-parallel-size", str(num_gpus)) if num_gpus > 1 else ()
    source = ("bench.py", "--random-weights", model, "--compile-cache", STORE)
    return Case(seconds, (*source, *ranks, *words), num_gpus)


def script(seconds: float, name: str, *words: str, num_gpus: int = 1) -> Case:
    return Case(seconds, (f"scripts/bench/{name}.py", *words), num_gpus)


def tests(seconds: float, *words: str, num_gpus: int = 1) -> Case:
    mark = "gpus" if num_gpus > 1 else "gpu"
    return Case(seconds, ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", mark, *words),
                num_gpus)  # fmt: skip


def served(seconds: float, num: int, num_ranks: int = 1) -> Case:
    """`nanovllm serve` with so many replicas, each on so many GPUs, under a load without a rate:
    for each 10,000 requests, of which 2,048 are unfinished, four API processes and six clients."""
    words = (
        "--shape", "Qwen3-0.6B", "--cases", "rate-inf", "--store", STORE, "--output", PLACE,
        "--requests", str(10_000 * num), "--max-concurrency", str(2048 * num),
        "--api-processes", str(4 * num), "--clients", str(6 * num),
    )  # fmt: skip
    replicas = ("--data-parallel-size", str(num)) if num > 1 else ()
    ranks = ("--tensor-parallel-size", str(num_ranks)) if num_ranks > 1 else ()
    options = ("--", *replicas, *ranks) if num * num_ranks > 1 else ()
    return script(seconds, "server", *words, *options, num_gpus=num * num_ranks)


LATENCY, THREE = ("--latency", "--runs", "3"), ("--runs", "3")
INT4, FP8 = ("--quantization", "int4"), ("--quantization", "fp8")
FP8_CACHE = ("--kv-cache-dtype", "fp8")
ROWS_16, ROWS_64 = ("--bs", "16", "--first", "32"), ("--bs", "64", "--first", "96")
WHOLE, SPLIT = ("--expert-parallel", "on"), ("--expert-parallel", "off")
# One GPU of 80 GB has little room for the cache beside 64 GB of weights.
FEW = ("--first", "64", "--bs", "64", "--max-model-len", "2048")

HOT_PATH = {
    "hot-0.6b-1": throughput(90, "Qwen3-0.6B", *LATENCY),
    "hot-0.6b-256": throughput(90, "Qwen3-0.6B", *THREE),
    "hot-8b-1": throughput(90, "Qwen3-8B", *LATENCY),
    "hot-8b-256": throughput(120, "Qwen3-8B"),
    "hot-30b-1": throughput(120, "Qwen3-30B-A3B", *LATENCY),
    "hot-30b-256": throughput(150, "Qwen3-30B-A3B"),
}

PERSISTENT_TESTS = "tests/kernels/test_cuda_persistent.py", "tests/runner/test_one_kernel.py"
ENGINE_TESTS = (
    "tests/engine/test_tiny_hybrid.py", "tests/engine/test_sleep.py",
    "tests/engine/test_tiny_seeing.py",
    "tests/runner/test_tower_capture.py",
)  # fmt: skip
TESTS = {
    "tests-kernels": tests(300, "tests/kernels"),
    "tests-engine": tests(300, *ENGINE_TESTS),
    "tests-persistent": tests(300, *PERSISTENT_TESTS),
    "tests-order": tests(
        300, "tests/kernels/test_ordered.py", "tests/engine/test_determinism_gpu.py"
    ),
    "tests-pooling": tests(180, "tests/pooling/test_pooling_gpu.py"),
    "tests-speculation": tests(180, "tests/runner/test_speculation_gpu.py"),
    "tests-adapters": tests(200, "tests/engine/test_adapters.py"),
    "tests-answers": tests(120, "tests/structured/test_answers.py", "tests/tools/test_report.py"),
    "tests-ranks": tests(120, "tests/parallel/test_ranks_gpu.py", num_gpus=2),
    "tests-ranks-models": tests(240, "tests/engine/test_ranks_models.py", num_gpus=2),
    "tests-ranks-memory": tests(120, "tests/engine/test_memory_of_ranks_gpu.py", num_gpus=2),
    "tests-sums": tests(120, "tests/kernels/test_triton_all_reduce.py", num_gpus=2),
    "tests-two-answers": tests(120, "tests/structured/test_answers.py", num_gpus=2),
}

GPTQ_8B, AWQ_8B, FP8_8B = "Qwen3-8B-GPTQ-Int4", "Qwen3-8B-AWQ", "Qwen3-8B-FP8"
GPTQ_30B, FP8_30B = "Qwen3-30B-A3B-GPTQ-Int4", "Qwen3-30B-A3B-FP8"
QUANTIZED = {
    "int4-1": throughput(90, GPTQ_8B, *LATENCY),
    "int4-16": throughput(90, GPTQ_8B, *ROWS_16),
    "int4-64": throughput(90, GPTQ_8B, *ROWS_64),
    "int4-256": throughput(120, GPTQ_8B),
    "awq-1": throughput(90, AWQ_8B, *LATENCY),
    "awq-256": throughput(120, AWQ_8B),
    "bf16-16": throughput(90, "Qwen3-8B", *ROWS_16),
    "bf16-64": throughput(90, "Qwen3-8B", *ROWS_64),
    "fp8-1": throughput(90, FP8_8B, *LATENCY),
    "fp8-256": throughput(120, FP8_8B),
    "fp8-cache-256": throughput(120, FP8_8B, *FP8_CACHE),
    "30b-int4-1": throughput(120, GPTQ_30B, *LATENCY),
    "30b-int4-16": throughput(120, GPTQ_30B, *ROWS_16),
    "30b-int4-256": throughput(150, GPTQ_30B),
    "30b-fp8-1": throughput(120, FP8_30B, *LATENCY),
    "30b-fp8-16": throughput(120, FP8_30B, *ROWS_16),
    "30b-fp8-256": throughput(150, FP8_30B),
    # rounded as they are loaded
    "rounded-int4-1": throughput(90, "Qwen3-8B", *INT4, *LATENCY),
    "rounded-fp8-256": throughput(120, "Qwen3-8B", *FP8),
    "rounded-30b-int4-1": throughput(150, "Qwen3-30B-A3B", *INT4, *LATENCY),
    "packed-8b": script(150, "packed_tiles", "--models", "8b", "--out", PLACE),
}

ARCHITECTURES = {
    "gpt-oss-1": throughput(120, "gpt-oss-20b", *LATENCY),
    "gpt-oss-16": throughput(120, "gpt-oss-20b", *ROWS_16),
    "gpt-oss-256": throughput(150, "gpt-oss-20b"),
    "expert-tiles": script(250, "expert_tiles", "--out", PLACE),
    "gemma-4-1": throughput(120, "Gemma-4-26B-A4B", *LATENCY),
    "gemma-4-256": throughput(150, "Gemma-4-26B-A4B"),
    "qwen3.5-1": throughput(120, "Qwen3.5-35B-A3B", *LATENCY),
    # all 40 layers have no room for the states of 256 rows on a GPU of 80 GB
    "qwen3.5-256": throughput(150, "Qwen3.5-35B-A3B", "--layers", "20"),
    "deepseek-1": throughput(120, "DeepSeek-V2-Lite", *LATENCY),
    "deepseek-256": throughput(150, "DeepSeek-V2-Lite"),
    # 63.2 GB of weights, and states of 49 MB a row: 256 rows have no room on a GPU of 80 GB
    "nemotron-3-1": throughput(150, "Nemotron-3-Nano-30B-A3B", *LATENCY),
    "nemotron-3-64": throughput(150, "Nemotron-3-Nano-30B-A3B", *FEW),
    "long-gpt-oss": script(120, "long_context", "--shape", "gpt-oss-20b", "--out", PLACE),
    "long-qwen3.5": script(
        150, "long_context", "--shape", "Qwen3.5-35B-A3B", "--layers", "20", "--out", PLACE
    ),
}

# The trained models of `nanovllm/assets`; {place} is a folder here.
TINY_HYBRID = "--arch qwen3_5 --minutes 4 --examples 1000000"
TRAINING = {
    "tiny-hybrid": Case(400, ("scripts/train_tiny.py", *TINY_HYBRID.split(), "--out", PLACE))
}

# A small model, as SmolLM2-135M-Instruct: an EAGLE-3 head that is trained on 20,000 of its answers
# for 216 s, most of them to prompts of its own, and what it gains at batch 1. Drafts of random
# weights are accepted at random elsewhere.
GAIN = "--num 3 5 --train-minutes 3.6 --turns 3 --tokens 256"
TRAINED = (
    "--layers 14 26 29 --draft-vocab-size 8192 --batch 64 --num-prompts 6000 --own-prompts 14000 "
    "--num-tokens 192 --temperature 0.7 --max-model-len 512 --max-num-seqs 512 "
    "--num-speculative-tokens 3"
)
OF_A_MODEL = {
    "trained-head": script(
        540, "draft_gain", "--model", MODEL, "--out", PLACE, *GAIN.split(), "--", *TRAINED.split()
    )
}

SCHEDULES = "--rows 1 16 64 256 --tokens 20 --schedules 1000 --skip-plain"
FEATURES = {
    "lora-8b": script(240, "lora", "--shape", "Qwen3-8B", "--out", PLACE),
    "lora-loading": script(
        120, "lora", "--shape", "Qwen3-8B", "--cases", "loading", "--out", PLACE
    ),
    "lora-tiles": script(120, "lora_tiles", "--out", PLACE),
    "embeddings": script(180, "embeddings", "--texts", "2048", "--output", PLACE),
    "speculation": script(300, "speculation", "--shape", "Qwen3-8B", "--out", PLACE),
    "speculation-useless": script(
        150,
        "speculation",
        "--shape",
        "Qwen3-0.6B",
        "--cases",
        "plain",
        "ngram-useless",
        "--out",
        PLACE,
    ),
    "deterministic-0.6b": script(90, "deterministic", "--shape", "Qwen3-0.6B", "--out", PLACE),
    "deterministic-8b": script(120, "deterministic", "--shape", "Qwen3-8B", "--out", PLACE),
    "deterministic-30b": script(200, "deterministic", "--shape", "Qwen3-30B-A3B", "--out", PLACE),
    "ordered-tiles": script(
        170, "ordered_tiles", "--only", "products", "--rows", "2048", "256", "16", "--out", PLACE
    ),
    "schedules": script(240, "deterministic", *SCHEDULES.split(), "--out", PLACE),
    "mixers": script(
        240, "bench_kernels", "--only", "mixer", "--variants", "--processes", "4", "--out", PLACE
    ),
    "persistent": script(150, "persistent_step", "--models", "0.6b", "--out", PLACE),
    "persistent-soak": script(200, "persistent_soak", "--out", PLACE),
}

TWO_GPUS = {
    "8b-two": throughput(120, "Qwen3-8B", *LATENCY, num_gpus=2),
    "8b-one": throughput(120, "Qwen3-8B", *LATENCY),
    "32b-two": throughput(240, "Qwen3-32B", num_gpus=2),
    "32b-two-few": throughput(150, "Qwen3-32B", *FEW, num_gpus=2),
    "32b-one-few": throughput(200, "Qwen3-32B", *FEW),
    "30b-two-split": throughput(180, "Qwen3-30B-A3B", *SPLIT, num_gpus=2),
    "30b-two-whole": throughput(180, "Qwen3-30B-A3B", *WHOLE, num_gpus=2),
    "30b-one": throughput(180, "Qwen3-30B-A3B"),
    "30b-two-split-1": throughput(120, "Qwen3-30B-A3B", *SPLIT, *LATENCY, num_gpus=2),
    "30b-two-whole-1": throughput(120, "Qwen3-30B-A3B", *WHOLE, *LATENCY, num_gpus=2),
    "replicas": script(
        180, "replicas", "--random-weights", "Qwen3-0.6B", "--replicas", "1", "2", num_gpus=2
    ),
    "replicas-1024": script(
        180,
        "replicas",
        "--random-weights",
        "Qwen3-0.6B",
        "--replicas",
        "1",
        "2",
        "--num-seqs",
        "1024",
        "--min-len",
        "128",
        "--max-len",
        "128",
        "--runs",
        "2",
        num_gpus=2,
    ),
    "served-one": served(180, 1),
    "served-two": served(180, 2),
    "ranks-profile": script(
        150, "ranks_profile", "--random-weights", "Qwen3-8B", "--rows", "1", "64", "256", num_gpus=2
    ),
    "sums": script(120, "collectives", "--ranks", "2", num_gpus=2),
    "loading": script(
        180, "load_speed", "--shape", "Qwen3-8B", "--ranks", "2", "--runs", "2", num_gpus=2
    ),
}

FOUR_GPUS = {
    "tests-four": tests(
        400,
        "tests/kernels/test_triton_all_reduce.py",
        "tests/engine/test_ranks_models.py",
        "tests/parallel/test_ranks_gpu.py",
        num_gpus=4,
    ),
    "8b-four": throughput(120, "Qwen3-8B", *LATENCY, num_gpus=4),
    "32b-one": throughput(240, "Qwen3-32B"),  # of 80 GB: see 32b-one-few
    "32b-four": throughput(240, "Qwen3-32B", num_gpus=4),
    "32b-four-few": throughput(150, "Qwen3-32B", *FEW, num_gpus=4),
    "30b-four-split": throughput(180, "Qwen3-30B-A3B", *SPLIT, num_gpus=4),
    "30b-four-whole": throughput(180, "Qwen3-30B-A3B", *WHOLE, num_gpus=4),
    "replicas-four": script(
        240, "replicas", "--random-weights", "Qwen3-0.6B", "--replicas", "1", "4", num_gpus=4
    ),
    "served-four": served(240, 4),
    "served-two-of-two": served(240, 2, num_ranks=2),
    "sums-four": script(120, "collectives", "--ranks", "4", num_gpus=4),
}

CASES: dict[str, Case] = {
    **HOT_PATH, **TESTS, **QUANTIZED, **ARCHITECTURES, **TRAINING, **OF_A_MODEL, **FEATURES,
    **TWO_GPUS, **FOUR_GPUS,
}  # fmt: skip
