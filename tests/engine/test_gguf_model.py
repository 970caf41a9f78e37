"""A published GGUF file answers as transformers does with the same numbers, dequantized."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.kernels.cpu import packed
from tests.gguf_model import smollm2

ROOT = Path(__file__).parents[2]
NUM_TOKENS = 20
# Reads the weights of a file, and prints by how many kB the most memory in use exceeds that before.
READ = """
import sys
from pathlib import Path

import torch

from nanovllm.models import loader, registry
from nanovllm.startup.config_file import transformers_config

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

path = Path(sys.argv[1])
hf = transformers_config(path, {})
model = registry.architecture(hf.architectures)(hf, dtype=torch.float32)
Path("/proc/self/clear_refs").write_text("5")  # the most so far is what is in use
before = memory("VmRSS:")
params = loader.load(model, path, loader.Target(torch.device("cpu")), lambda num_layers: None)
print(memory("VmHWM:") - before)
"""
PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Once upon a time, 123 dogs")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def make(path: Path) -> LLM:
    return LLM(
        str(path), device="cpu", dtype="float32", enforce_eager=True, max_model_len=128,
        max_num_seqs=4, max_num_batched_tokens=256,
    )  # fmt: skip


@pytest.fixture(scope="module")
def path() -> Path:
    return smollm2()


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    llm = make(path)
    yield llm
    llm.engine.close()


@torch.no_grad()
def test_greedy_tokens_are_those_of_transformers(path: Path, llm: LLM) -> None:
    """Each token of transformers' answers is the engine's choice after the tokens before it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    folder = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    # from_pretrained would need accelerate
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**folder)).float().eval()
    stored = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(stored, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(**folder)
    known = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        assert llm.get_tokenizer().encode(prompt) == ids[0].tolist()
        answer = model.generate(
            ids, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False
        )
        known.append((len(ids[0]), answer[0].tolist()))
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    outputs = llm.generate([ids for _, ids in known], params, use_tqdm=False)
    for (num_prompt, ids), output in zip(known, outputs, strict=True):
        assert len(ids) == num_prompt + NUM_TOKENS
        for place in range(num_prompt, len(ids)):
            found = output["prompt_logprobs"][place]
            assert max(found, key=lambda token: found[token].logprob) == ids[place], place


@pytest.mark.skipif(sys.platform != "linux", reason="the system's counts of memory are Linux's")
def test_reading_takes_little_more_memory_than_the_file(path: Path) -> None:
    command = [sys.executable, "-c", READ, str(path)]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    num_bytes = path.stat().st_size
    assert 0.9 * num_bytes < 1024 * int(found.stdout) < 1.15 * num_bytes


def check_chat(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8)
    (output,) = llm.chat(QUESTION, params, use_tqdm=False)
    assert output["text"] == "The capital of France is Paris."
    assert output["finish_reason"] == "stop"


def test_a_chat_through_the_file_s_template(llm: LLM) -> None:
    check_chat(llm)


def test_inputs_in_int8_give_nearly_the_same_logprobs(
    path: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As users run it: tests keep inputs exact elsewhere (conftest.py)."""
    ids = llm.get_tokenizer().encode(PROMPTS[1] + "    return n if n < 2 else fibonacci(n - 1)")
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)

    def logprobs(engine: LLM) -> torch.Tensor:
        (output,) = engine.generate([ids], params, use_tqdm=False)
        found = output["prompt_logprobs"]
        return torch.tensor([found[i][ids[i]].logprob for i in range(1, len(ids))])

    exact = logprobs(llm)
    monkeypatch.setenv("NANOVLLM_EXACT_INPUTS", "0")
    try:
        rounded_llm = make(path)
        rounded = logprobs(rounded_llm)
        check_chat(rounded_llm)
        rounded_llm.engine.close()
    finally:
        packed.configure(True)  # of all engines of the process
    differences = (rounded - exact).abs()
    assert 0 < differences.mean() < 0.05
