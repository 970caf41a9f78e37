"""A user's mistake raises an error with the value and the limit, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams, platforms
from nanovllm.platforms.base import MemoryBudget
from nanovllm.runner import allocation
from tests.engines import VOCAB_SIZE, Generate, assert_all_free, random_prompts

GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
ROOT = Path(__file__).parents[2]


def option_error(make_llm: Callable[..., LLM], match: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=match):
        make_llm(**options)


# prompts ------------------------------------------------------------------------------------------

BAD_PROMPTS: list[tuple[Any, str]] = [
    ([], "prompt is empty"),
    ("", "prompt is empty"),
    ([7] * 256, "has 256 tokens.*max_model_len 256.*at most 255"),
    ([7] * 100_000, "has 100000 tokens"),
    ([5, VOCAB_SIZE], f"{VOCAB_SIZE} is outside the vocabulary.*0 … {VOCAB_SIZE - 1}"),
    ([5, 2**70], f"{2**70} is outside the vocabulary"),
    ([5, -1], "-1 is outside the vocabulary"),
    ([5, True], "True is outside the vocabulary"),
    ([5, "6"], "'6' is outside the vocabulary"),
    ([5, 6.0], "6.0 is outside the vocabulary"),
    ([5, None], "None is outside the vocabulary"),
    (5, "prompt is 5: it must be text or a list of token ids"),
    (None, "prompt is None"),
]


@pytest.mark.parametrize(("prompt", "match"), BAD_PROMPTS, ids=lambda value: str(value)[:24])
def test_bad_prompt_is_refused_and_leaves_nothing(
    eager_llm: LLM, hf_generate: Generate, prompt: Any, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        eager_llm.engine.add_request(prompt, GREEDY)
    assert_all_free(eager_llm)
    (good, other) = random_prompts([5, 19], seed=3)
    with pytest.raises(ValueError, match=match):
        eager_llm.generate([good, prompt, other], GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match=match):
        list(eager_llm.stream([good, prompt, other], GREEDY))
    assert_all_free(eager_llm)
    outputs = eager_llm.generate([good, other], GREEDY, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == [
        hf_generate(good, 5),
        hf_generate(other, 5),
    ]


def test_one_bad_request_among_many_with_n(eager_llm: LLM) -> None:
    params = [SamplingParams(n=3), SamplingParams(n=2, bad_words=["\ud83d"])]
    with pytest.raises(ValueError, match="bad_words has"):
        eager_llm.generate([[5], [6]], params, use_tqdm=False)
    assert_all_free(eager_llm)


def test_seeds_of_n_answers_go_on_after_the_largest(eager_llm: LLM) -> None:
    def tokens_of(n: int, seed: int) -> list[list[int]]:
        params = SamplingParams(n=n, seed=seed, max_tokens=5)
        (output,) = eager_llm.generate([[5]], params, use_tqdm=False)
        return [one["token_ids"] for one in output["outputs"]]

    assert tokens_of(2, 2**63 - 1) == tokens_of(1, 2**63 - 1) + tokens_of(1, -(2**63))


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ([GREEDY], "1 sampling params for 2 prompts"),
        ([GREEDY] * 3, "3 sampling params for 2 prompts"),
        ({"temperature": 0, "top_p": 1}, "sampling_params holds 'temperature'"),
        ([GREEDY, {"temperature": 0}], "sampling_params holds {'temperature': 0}"),
    ],
)
def test_sampling_params_that_do_not_fit_the_prompts(
    eager_llm: LLM, params: Any, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        eager_llm.generate([[5], [6]], params, use_tqdm=False)


def test_no_prompts_no_answers(eager_llm: LLM) -> None:
    assert (
        eager_llm.generate([], GREEDY, use_tqdm=False) == []
        and list(eager_llm.stream([], GREEDY)) == []
    )


def test_text_needs_a_tokenizer(
    make_llm: Callable[..., LLM], checkpoint: Path, tmp_path: Path, device: str
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, tmp_path)
    llm = LLM(
        str(tmp_path), enforce_eager=True, device=device, max_model_len=64, num_kvcache_blocks=20
    )
    with pytest.raises(ValueError, match="has no tokenizer: give token ids"):
        llm.generate("text", use_tqdm=False)
    with pytest.raises(ValueError, match=r"stop=\['x'\] needs a tokenizer"):
        llm.generate([[5]], SamplingParams(stop="x"), use_tqdm=False)
    with pytest.raises(ValueError, match="has no chat template"):
        llm.chat([{"role": "user", "content": "x"}], use_tqdm=False)
    (output,) = llm.generate([[5]], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
    assert output["text"] == "" and len(output["token_ids"]) == 3
    assert [
        piece["text"] for piece in llm.stream([[5]], SamplingParams(max_tokens=2, ignore_eos=True))
    ] == ["", ""]
    assert_all_free(llm)


# options ------------------------------------------------------------------------------------------


def test_unknown_option_is_a_type_error(make_llm: Callable[..., LLM]) -> None:
    with pytest.raises(
        TypeError, match="unknown option gpu_memory_utilisation; the options are model, dtype"
    ):
        make_llm(gpu_memory_utilisation=0.5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": "int8"}, "dtype is 'int8': it must be one of auto, float32"),
        ({"device": "tpu"}, "device 'tpu' is not supported: use one of auto, cuda, npu, mps, cpu"),
        ({"device": "cuda:x"}, "device 'cuda:x' is not supported"),
        ({"device": "cuda:99"}, "no CUDA device|'cuda:99' is not available"),
        (
            {"max_model_len": 401, "num_kvcache_blocks": 9},
            r"max_model_len is 401, but the cache holds 128 tokens \(8 blocks of 16\)",
        ),
        (
            {"max_num_batched_tokens": 15},
            "max_num_batched_tokens is 15: it must be a whole number, at least 16",
        ),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0: it must be a whole number"),
    ],
    ids=str,
)
def test_bad_options(make_llm: Callable[..., LLM], options: dict[str, Any], match: str) -> None:
    option_error(make_llm, match, **options)


def test_fp16_is_refused_where_the_device_does_not_compute_in_it(
    make_llm: Callable[..., LLM],
) -> None:
    match = "float16 is not supported on this cpu device: use one of float32, bfloat16"
    option_error(make_llm, match, dtype="float16", device="cpu")


@pytest.mark.parametrize("num_blocks", [0, 1])
def test_not_enough_memory_for_a_block(
    make_llm: Callable[..., LLM], device: str, monkeypatch: pytest.MonkeyPatch, num_blocks: int
) -> None:
    platform = type(platforms.select(device))
    bytes_per_block = 2 * 2 * 2 * 32 * 4 * 16
    budget = MemoryBudget(num_blocks * bytes_per_block + 25, scratch_bytes=20)
    monkeypatch.setattr(platform, "memory_budget", lambda *_: budget)
    option_error(
        make_llm,
        rf"memory for {num_blocks} cache block.*at least 2 are needed: "
        r"raise gpu_memory_utilization \(0.9\)",
        num_kvcache_blocks=None,
    )


def test_not_enough_memory_for_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model with recurrent layers: the error has the rows, what they take, and what to do."""

    def full(kept: object, num: int, *rest: object) -> None:
        raise torch.OutOfMemoryError(f"{num} states")

    monkeypatch.setattr(allocation, "_states", full)
    match = r"states of 3 rows \(max_num_seqs\) take \d\.\d\d GiB.*lower max_num_seqs"
    refused("tiny-qwen3.5", match, device="cpu", max_num_seqs=3)


# checkpoints --------------------------------------------------------------------------------------


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint for a test to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def refused(
    folder: Path | str, match: str, error: type[Exception] = ValueError, **options: Any
) -> None:
    with pytest.raises(error, match=match):
        LLM(str(folder), enforce_eager=True, **options)


@pytest.mark.parametrize(
    "path", ["no-such-folder", "/no/such/folder", "./a/b/c", "a b/c", "../x/y"]
)
def test_a_path_that_is_neither_folder_nor_hub_id(path: str) -> None:
    refused(path, f"model '{re.escape(path)}' is neither an embedded model")


def test_a_hub_id_that_is_not_there() -> None:
    refused(
        "no-such-owner-7f3a/no-such-model",
        "no-such-owner-7f3a/no-such-model' is not a local folder and",
    )


def test_a_file_is_no_checkpoint(checkpoint: Path) -> None:
    refused(checkpoint / "config.json", "is neither an embedded model .*, nor a folder")


def test_a_folder_without_config(broken: Path) -> None:
    (broken / "config.json").unlink()
    refused(broken, "is not a checkpoint: the folder has no config.json")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_unknown_architecture_of_a_known_family(broken: Path) -> None:
    change_config(broken, architectures=["Qwen3ForTokenClassification"])
    refused(
        broken, r"architecture \['Qwen3ForTokenClassification'\] is not supported: use one of Llama"
    )


def test_a_model_that_pools_without_a_task(broken: Path) -> None:
    change_config(broken, architectures=["Qwen3ForSequenceClassification"])
    refused(broken, "does not generate text: set task='embed', 'classify' or 'score'")


def test_an_unknown_family(broken: Path) -> None:
    change_config(broken, model_type="frobnicator", architectures=["FrobnicatorForCausalLM"])
    refused(broken, "architecture \['FrobnicatorForCausalLM'\] is not supported")


def test_a_config_that_is_no_json(broken: Path) -> None:
    (broken / "config.json").write_text('{"model_type": ')
    refused(broken, "config.json", (ValueError, OSError))  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_damaged_safetensors(broken: Path, damage: str) -> None:
    path = broken / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(
        {"truncated": data[: len(data) // 2], "header": b"\xff" * 64 + data[64:], "empty": b""}[
            damage
        ]
    )
    refused(broken, "model.safetensors: damaged")


def test_no_safetensors_at_all(broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    refused(broken, "no .safetensors file")


def test_weights_that_do_not_fit_the_config(broken: Path) -> None:
    change_config(broken, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    refused(broken, r"model.layers.2.* is missing")
    change_config(broken, num_hidden_layers=1, layer_types=["full_attention"])
    refused(broken, r"tensor\(s\) that .* does not have, e.g. model.layers.1")
    change_config(
        broken, num_hidden_layers=2, layer_types=["full_attention"] * 2, intermediate_size=96
    )
    refused(broken, r"has shape \[128, 64\], but the config asks for \[96, 64\]")


def test_random_weights_need_the_config_only(broken: Path, device: str) -> None:
    (broken / "model.safetensors").unlink()
    options: dict[str, Any] = {
        "max_model_len": 64,
        "num_kvcache_blocks": 10,
        "device": device,
        "enforce_eager": True,
    }
    answers = []
    for seed in (0, 0, 1):
        llm = LLM(str(broken), random_weights=True, seed=seed, **options)
        # logprobs too: random models with different weights may all repeat their last token
        output = llm.generate([[5, 6, 7]], replace(GREEDY, logprobs=3), use_tqdm=False)[0]
        answers.append((output["token_ids"], output["logprobs"]))
    assert answers[0] == answers[1] != answers[2]


# a machine without a compiler ---------------------------------------------------------------------

SCRIPT = """
import json, sys
from nanovllm import LLM, SamplingParams
options = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 2, "num_kvcache_blocks": 20}
llm = LLM(sys.argv[1], device="cpu", **options)
prompts = json.loads(sys.argv[2])
params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
outputs = llm.generate(prompts, params, use_tqdm=False)
print(json.dumps([output["token_ids"] for output in outputs]))
"""


def test_without_a_cpp_compiler_it_runs_eagerly_and_says_so_in_one_line(
    checkpoint: Path, hf_generate: Generate, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # the folder's name must not contain the words below: libraries print paths that they get
    folder = tmp_path_factory.mktemp("empty")
    environment = {
        **os.environ,
        "PATH": str(folder),
        "CXX": str(folder / "no-such-program"),
        "NANOVLLM_CACHE": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("NANOVLLM_LOG_LEVEL", None)
    prompts = random_prompts([5, 19], seed=9)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(checkpoint), json.dumps(prompts)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [hf_generate(prompt, 5) for prompt in prompts], done.stderr
    # torch and Triton print messages of their own; ours is one warning of one line with a reason
    lines = re.split(r"[\r\n]+", done.stderr)
    (warning,) = [idx for idx, line in enumerate(lines) if re.search(r"\bW nanovllm\.", line)]
    assert re.search(
        r"graph mode lacks its C\+\+ kernels, running eagerly: \w+: .*no C\+\+ compiler is found",
        lines[warning],
    ), done.stderr
    assert "running eagerly" not in "".join(lines[:warning] + lines[warning + 1 :]), done.stderr
    assert not re.search(r'File ".*nanovllm/', done.stderr), "a traceback through our code"
