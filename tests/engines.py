"""A tiny checkpoint with a byte-level tokenizer, shared engines on it, and transformers' answers.

Few engines use graph mode, because their programs must be compiled. All others run eagerly.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams, platforms
from nanovllm.compile.lower import eager, inductor
from nanovllm.kernels import ops
from nanovllm.kernels.code_files import BUILDING, WRITING
from nanovllm.platforms import preload
from nanovllm.schedule.outputs import FinishedOutput
from tests.conftest import save_tiny
from tests.kernels.cpu_libraries import build_all

VOCAB_SIZE = 512
NUM_TOKENS = 12  # length of answers, unless a test sets another
EOS_IDS = (3, 4)
Generate = Callable[[list[int], int], list[int]]


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: ids 0 … 4 are special, then the 256 bytes, then a few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "<unk>", "</s>", "<end>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [
        ("t", "h"),
        ("th", "e"),
        ("i", "n"),
        ("a", "n"),
        ("e", "r"),
        ("o", "n"),
        ("Ġ", "a"),
        ("Ġ", "the"),
    ]
    words = [*special, *alphabet, *("".join(pair) for pair in pairs)]
    # every id of the model has a text
    words += [f"<filler{i}>" for i in range(VOCAB_SIZE - len(words))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>",
        eos_token="</s>", additional_special_tokens=["<end>"],
    ).save_pretrained(folder)  # fmt: skip


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, VOCAB_SIZE) for _ in range(length)] for length in lengths]


def greedy(num_tokens: int = NUM_TOKENS, **changes: Any) -> SamplingParams:
    return SamplingParams(
        **{"temperature": 0, "max_tokens": num_tokens, "ignore_eos": True, **changes}
    )


def tokens(llm: LLM, prompts: list[list[int]], params: Any) -> list[list[int]]:
    """The token ids that `generate` returns for each prompt."""
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


def drain(llm: LLM) -> dict[int, FinishedOutput]:
    """Step until no request is left; returns completions by request id."""
    done: dict[int, FinishedOutput] = {}
    while llm.engine.has_unfinished:
        done.update(
            {
                output.request_id: output.completion
                for output in llm.engine.step()
                if output.completion
            }
        )
    return done


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: the models are so small that threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cpu_kernels() -> Path:
    """The folder of the built CPU kernels: building them takes a minute of a processor."""
    return build_all()


def copy_kernels(cpu_kernels: Path, store: Path) -> None:
    """Copy the built kernels into a store, without what other processes are writing meanwhile."""
    unfinished = shutil.ignore_patterns(f"{BUILDING}*", f"{WRITING}*")
    shutil.copytree(cpu_kernels, store / "cpp", ignore=unfinished, dirs_exist_ok=True)


@pytest.fixture(scope="session")
def instruction_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inductor's folder with nothing but its probes: the first compile in an empty folder tries the
    compiler ten times, for the instruction sets of this machine."""
    folder = tmp_path_factory.mktemp("inductor")
    program = "from torch._inductor import codecache, cpu_vec_isa as sets; sets.pick_vec_isa()"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    return folder


@pytest.fixture
def bare_store(cpu_kernels: Path, instruction_sets: Path, tmp_path: Path) -> Path:
    """A store of one test, without programs. It has the CPU kernels and Inductor's probes: with a
    folder that is empty, every process that a test starts would build them."""
    folder = tmp_path / "store"
    folder.mkdir(mode=0o700)
    copy_kernels(cpu_kernels, folder)
    shutil.copytree(instruction_sets, folder / "inductor")
    return folder


@pytest.fixture(scope="session")
def device() -> str:
    """The device that `device="auto"` chooses on this machine."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def compiles_by_itself(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile in this process on a GPU too: tests count its compiles and replace parts of it."""
    if device == "cuda":
        monkeypatch.setattr(type(platforms.select(device)), "compile_workers", lambda *_: 0)
        monkeypatch.setattr(preload, "DRIVERS", ())


@pytest.fixture
def captured(device: str, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The steps that engines have captured since the test began."""
    platform = type(platforms.select(device))
    found: list[object] = []
    capture = platform.capture

    def counted(self: Any, step: Callable[[], None]) -> Any:
        found.append(step)
        return capture(self, step)

    monkeypatch.setattr(platform, "capture", counted)
    return found


@pytest.fixture
def lowered_ops(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of our ops in all graphs that reach the lowering, which runs them node by node."""
    found: set[str] = set()

    def lower(graph: Any, fakes: Sequence[torch.Tensor]) -> Callable[..., Sequence[torch.Tensor]]:
        found.update(name for node in graph.graph.nodes if (name := ops.op_name(node.target)))
        return eager.lower(graph, fakes)

    monkeypatch.setattr(inductor, "lower_if_worth_it", lower)
    return found


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 in fp32 with a tokenizer; generation_config.json has two end-of-sequence ids."""
    folder = save_tiny(tmp_path_factory.mktemp("checkpoint"), vocab_size=VOCAB_SIZE)
    save_tokenizer(folder)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {list(EOS_IDS)}}}')
    return folder


@pytest.fixture(scope="session")
def make_llm(checkpoint: Path, device: str) -> Callable[..., LLM]:
    """Makes an LLM on the tiny checkpoint; by default eager and with small sizes."""

    def make(**options: Any) -> LLM:
        defaults: dict[str, Any] = {
            "dtype": "float32",
            "device": device,
            "enforce_eager": True,
            "max_num_seqs": 40,
            "max_num_batched_tokens": 256,
            "max_model_len": 256,
            "kvcache_block_size": 16,
            "num_kvcache_blocks": 400,
        }
        return LLM(str(checkpoint), **{**defaults, **options})

    return make


@pytest.fixture(scope="session")
def shared_llm(make_llm: Callable[..., LLM]) -> Iterator[LLM]:
    llm = make_llm()
    yield llm
    llm.close()


@pytest.fixture(scope="session")
def shared_graph_llm(make_llm: Callable[..., LLM]) -> Iterator[LLM]:
    """Graph mode. No bucket has 2, 3, 6 or 37 rows; more requests run than the largest has rows."""
    llm = make_llm(enforce_eager=False, graph_batch_sizes=(1, 5, 16))
    yield llm
    llm.close()


def assert_all_free(llm: LLM) -> None:
    """Check that the engine holds nothing of any request."""
    scheduler = llm.engine.scheduler
    assert not llm.engine.has_unfinished and not scheduler.has_work
    assert scheduler.cache.pool.num_free == scheduler.cache.pool.num_blocks - 1
    assert sorted(scheduler._free_rows) == list(range(scheduler.max_num_seqs))
    assert not any(scheduler.cache.pool._num_refs)


def assert_one_distribution(expected: Counter[int], drawn: Counter[int]) -> None:
    """A chi-square test of two samples of equal size."""
    num = expected.total()
    likely = [token for token, count in expected.most_common() if count >= 10]
    table = [[counts[token] for token in likely] for counts in (drawn, expected)]
    table = [[*of_likely, num - sum(of_likely)] for of_likely in table]
    chi_square = sum((a - b) ** 2 / (a + b) for a, b in zip(*table) if a + b)
    # 99.9 % of samples of one distribution are below this (Wilson and Hilferty's approximation)
    freedom = len(likely)
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert freedom >= 4 and chi_square < limit


@pytest.fixture
def eager_llm(shared_llm: LLM) -> Iterator[LLM]:
    yield shared_llm
    assert_all_free(shared_llm)


@pytest.fixture
def graph_llm(shared_graph_llm: LLM) -> Iterator[LLM]:
    yield shared_graph_llm
    assert_all_free(shared_graph_llm)


@pytest.fixture(params=["eager", "graph"])
def llm(request: pytest.FixtureRequest) -> LLM:
    return request.getfixturevalue(f"{request.param}_llm")


@pytest.fixture(scope="session")
def hf_model(checkpoint: Path, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval().to(device)


@pytest.fixture(scope="session")
def hf_generate(hf_model: Any) -> Generate:
    """Greedy answers of transformers of exactly `num_tokens` tokens."""

    def generate(prompt: list[int], num_tokens: int) -> list[int]:
        ids = torch.tensor([prompt], device=hf_model.device)
        with torch.no_grad():
            out = hf_model.generate(
                ids, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        return out[0, len(prompt) :].tolist()

    return generate
