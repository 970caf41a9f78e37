"""nano-vllm's scripts: the calls of its example and its benchmark, unchanged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams
from tests.conftest import save_tiny
from tests.engines import greedy, random_prompts, save_tokenizer, tokens

ROOT = Path(__file__).parents[2]
EXAMPLE = """
import os
from nanovllm import LLM, SamplingParams
from transformers import AutoTokenizer

path = os.path.expanduser("~/huggingface/Qwen3-0.6B/")
tokenizer = AutoTokenizer.from_pretrained(path)
llm = LLM(path, enforce_eager=True, tensor_parallel_size=1)
sampling_params = SamplingParams(temperature=0.6, max_tokens=256)
prompts = [
    tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    for prompt in ["introduce yourself", "list all prime numbers within 100"]
]
outputs = llm.generate(prompts, sampling_params)
for prompt, output in zip(prompts, outputs):
    print(f"Prompt: {prompt!r}")
    print(f"Completion: {output['text']!r}")
"""
BENCH = """
import os
import time
from random import randint, seed
from nanovllm import LLM, SamplingParams

seed(0)
path = os.path.expanduser("~/huggingface/Qwen3-0.6B/")
llm = LLM(path, enforce_eager=False, max_model_len=4096)
prompt_token_ids = [[randint(0, 10000) for _ in range(randint(10, 30))] for _ in range(8)]
sampling_params = [
    SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=randint(10, 30)) for _ in range(8)
]
llm.generate(["Benchmark: "], SamplingParams())
t = time.time()
llm.generate(prompt_token_ids, sampling_params, use_tqdm=False)
t = time.time() - t
total_tokens = sum(sp.max_tokens for sp in sampling_params)
print(f"Total: {total_tokens}tok, Time: {t:.2f}s, Throughput: {total_tokens / t:.2f}tok/s")
"""
MODULES = """
from nanovllm.sampling_params import SamplingParams
from nanovllm.engine.llm_engine import LLMEngine
import nanovllm
assert SamplingParams is nanovllm.SamplingParams and LLMEngine is nanovllm.LLM
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with a small checkpoint where nano-vllm's scripts look for one."""
    home = tmp_path_factory.mktemp("home")
    folder = home / "huggingface" / "Qwen3-0.6B"
    save_tiny(folder, vocab_size=10_016, num_hidden_layers=1)
    save_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    template = "{% for m in messages %}<s>{{ m.content }}{% endfor %}"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return home


@pytest.mark.parametrize(
    ("script", "expected"), [(EXAMPLE, "Completion: "), (BENCH, "Throughput: "), (MODULES, "")]
)
def test_scripts_run_unchanged(home: Path, script: str, expected: str) -> None:
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    if script == BENCH:  # the checkpoint has 512 positions
        assert "max_model_len" in done.stderr and "4096" in done.stderr


def test_requests_stepped_by_hand(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    prompts = random_prompts([9, 5, 30], seed=110)
    expected = tokens(llm, prompts, greedy(6))
    llm.reset_prefix_cache()
    for prompt in prompts:
        llm.add_request(prompt, greedy(6))
    found: dict[int, list[int]] = {}
    counts = []
    while not llm.is_finished():
        outputs, num_tokens = llm.step()
        found.update(outputs)
        counts.append(num_tokens)
    assert [found[key] for key in sorted(found)] == expected
    assert counts[0] == 44 and counts[1:6] == [-3] * 5
    # other calls in between take their own outputs
    llm.add_request(prompts[0], greedy(6))
    assert tokens(llm, prompts, greedy(6)) == expected
    while not llm.is_finished():
        outputs, _ = llm.step()
    assert [ids for _, ids in outputs] == expected[:1]
    llm.exit()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("x", SamplingParams(), use_tqdm=False)
