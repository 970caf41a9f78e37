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
DECLARE = """
import sys

import torch

from nanovllm.models.formats import gguf
from nanovllm.models.formats.format import Extent

for name in ("Q4_0", "Q4_1", "Q8_0", "Q6_K"):
    gguf.of_type(name).empty(Extent((8, 256), torch.float32), "meta")
print("sympy" in sys.modules)
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
    """Each token of the engine's answers is transformers' choice after the tokens before it."""
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
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params, use_tqdm=False), strict=True):
        ids = tokenizer(prompt)["input_ids"]
        assert output["prompt_token_ids"] == ids
        answer = output["token_ids"]
        logits = model(torch.tensor([ids + answer])).logits[0]
        assert len(answer) == NUM_TOKENS
        assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == answer


@pytest.mark.skipif(sys.platform != "linux", reason="the system's counts of memory are Linux's")
def test_reading_takes_little_more_memory_than_the_file(path: Path) -> None:
    command = [sys.executable, "-c", READ, str(path)]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    num_bytes = path.stat().st_size
    assert 0.9 * num_bytes < 1024 * int(found.stdout) < 1.15 * num_bytes


def test_weights_are_declared_without_sympy() -> None:
    """Its modules take 40 MB, and half a second of a start."""
    command = [sys.executable, "-c", DECLARE]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout == "False\n"


def test_a_chat_through_the_file_s_template(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8)
    (output,) = llm.chat(QUESTION, params, use_tqdm=False)
    assert output["text"] == "The capital of France is Paris."
    assert output["finish_reason"] == "stop"


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
        (output,) = rounded_llm.generate([PROMPTS[0]], params, use_tqdm=False)
        code_OC = rounded_llm.engine.runner.params.layers[0].gate_up_GD.code_OC
        rows = packed.Weight(
            torch.zeros(16, 288, dtype=torch.uint8), torch.ones(16, 18), None, None, 4, 32
        )
        assert (code_OC.dim() == 4) == packed.prefers_interleaved(rows, 576)
        rounded_llm.engine.close()
    finally:
        packed.configure(True)  # of all engines of the process
    assert 0 < (rounded - exact).abs().mean() < 0.1
    assert output["text"] == " Paris"
