"""Compressed experts beside a checkpoint: the engine uses them, or refuses them by name."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# scripts are run as files, and import each other as such
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import decompose_experts
from compress.source import open_source

from nanovllm import LLM
from nanovllm.config import EngineConfig
from nanovllm.models.checkpoint import CheckpointError
from nanovllm.models.experts.compressed import Compressed
from nanovllm.models.experts.stacked import Stacked
from nanovllm.startup import load as startup
from tests.conftest import save_tiny
from tests.engines import greedy, tokens
from tests.models.harness import engine_logits, load, max_difference, sequences, transformers_logits

TOLERANCE, VOCAB_SIZE, RANK = 1e-4, 128, 19
LENGTHS = ((1, 6), (19, 24), (70, 75))
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 48, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_hidden_layers": 3,
}  # fmt: skip
FIELDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 40},
    # its middle layer is dense
    "qwen3_moe": {
        "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
        "norm_topk_prob": False, "mlp_only_layers": [1],
    },
    # with an expert that all tokens share
    "qwen2_moe": {
        "num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 56,
        "shared_expert_intermediate_size": 32,
    },
}  # fmt: skip


def save(folder: Path, architecture: str = "mixtral") -> Path:
    return save_tiny(folder, architecture, **SIZES, **FIELDS[architecture])


def compress(folder: Path, rank: int = RANK, dtype: str = "float32") -> Path:
    """Compress the experts of a checkpoint beside it."""
    source, device = open_source(str(folder)), torch.device("cpu")
    with torch.inference_mode():
        decompose_experts.run(source, folder / "svd_experts", rank, dtype, device)
    return folder


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Let `edit` change the values of metadata.json, or the tensors of a file."""
    if path.suffix == ".json":
        values = json.loads(path.read_text())
        edit(values)
        path.write_text(json.dumps(values))
    else:
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)


def product(folder: Path, layer_idx: int, expert: int, kind: str) -> Tensor:
    """The matrix [outputs, inputs] that the files of compressed experts stand for."""
    bases = load_file(folder / "svd_experts" / "U_matrices.safetensors")
    name = f"layer_{layer_idx}_expert_{expert}.safetensors"
    own = load_file(folder / "svd_experts" / "V_experts" / name)
    return (bases[f"layer_{layer_idx}_{kind}_U"] @ own[f"{kind}_V"]).t()


def reconstructed(folder: Path, target: Path) -> Path:
    """A checkpoint with the products in the place of the experts, and nothing compressed."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("svd_experts"))
    kinds = {"w1": "w1", "w3": "w3", "w2": "w2", "gate_proj": "w1", "up_proj": "w3",
             "down_proj": "w2"}  # fmt: skip

    def edit(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if ".experts." in name:
                _, _, layer_idx, *_, expert, matrix, _ = name.split(".")
                found = product(folder, int(layer_idx), int(expert), kinds[matrix])
                assert found.shape == tensor.shape
                tensors[name] = found.contiguous()

    change(target / "model.safetensors", edit)
    return target


@pytest.fixture(scope="module", params=FIELDS)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def compressed(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(save(tmp_path_factory.mktemp(architecture) / "model", architecture))


@pytest.fixture(scope="module")
def _mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(save(tmp_path_factory.mktemp("mixtral") / "model"))


@pytest.fixture
def folder(_mixtral: Path, tmp_path: Path) -> Path:
    """A compressed Mixtral for one test to change."""
    return Path(shutil.copytree(_mixtral, tmp_path / "model"))


@pytest.fixture(params=["eager", "graph"])
def is_eager(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "eager")


def test_logits_are_those_of_transformers_with_the_products(
    compressed: Path, tmp_path: Path, device: str, is_eager: bool
) -> None:
    known = sequences(VOCAB_SIZE, *LENGTHS)
    expected = transformers_logits(reconstructed(compressed, tmp_path / "products"), known, device)
    runner = load(compressed, device, enforce_eager=is_eager, graph_batch_sizes=[4])
    assert max_difference(engine_logits(runner, known), expected) < TOLERANCE
    forms = [type(layer.experts) for layer in runner.params.layers if hasattr(layer, "experts")]
    assert forms and set(forms) == {Compressed}


def test_the_products_change_the_logits(compressed: Path, tmp_path: Path, device: str) -> None:
    """So that the test above compares something."""
    known = sequences(VOCAB_SIZE, *LENGTHS)
    products = transformers_logits(reconstructed(compressed, tmp_path / "products"), known, device)
    whole = transformers_logits(compressed, known, device)
    assert max_difference(products, whole) > 0.1


def test_with_all_principal_components_nothing_is_lost(tmp_path: Path, device: str) -> None:
    """qwen2_moe's experts here are wider than the hidden size, Mixtral's are narrower."""
    known = sequences(VOCAB_SIZE, *LENGTHS)
    square = {**FIELDS["mixtral"], "intermediate_size": SIZES["hidden_size"]}
    folder = save_tiny(tmp_path, "mixtral", **SIZES, **square)
    expected = transformers_logits(folder, known, device)
    runner = load(compress(folder, SIZES["hidden_size"]), device, enforce_eager=True)
    assert max_difference(engine_logits(runner, known), expected) < TOLERANCE


def test_the_experts_of_the_checkpoint_are_not_needed(folder: Path, device: str) -> None:
    known = sequences(VOCAB_SIZE, *LENGTHS)
    before = engine_logits(load(folder, device, enforce_eager=True), known)

    def remove(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]

    change(folder / "model.safetensors", remove)
    after = engine_logits(load(folder, device, enforce_eager=True), known)
    assert max_difference(before, after) == 0


def test_other_tensors_that_are_left_over_are_still_refused(folder: Path) -> None:
    extra = "model.layers.0.block_sparse_moe.experts.5.w1.weight"
    change(folder / "model.safetensors", lambda tensors: tensors.update({extra: torch.ones(2)}))
    with pytest.raises(CheckpointError, match=f"does not have, e.g. {extra}"):
        load(folder, "cpu", enforce_eager=True)


def test_the_log_names_the_folder_and_a_variable_turns_it_off(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known = sequences(VOCAB_SIZE, *LENGTHS)
    folder = save(tmp_path)
    expected = engine_logits(load(folder, device, enforce_eager=True), known)
    line = f"compressed experts of rank {RANK} are used from {folder / 'svd_experts'}"
    with caplog.at_level(logging.INFO):
        load(compress(folder), device, enforce_eager=True)
    assert line in caplog.text
    caplog.clear()
    monkeypatch.setenv("NANOVLLM_DISABLE_SVD", "1")
    with caplog.at_level(logging.INFO):
        runner = load(folder, device, enforce_eager=True)
    assert "compressed" not in caplog.text
    assert isinstance(runner.params.layers[0].experts, Stacked)
    assert max_difference(engine_logits(runner, known), expected) == 0


def test_random_weights_are_whole(folder: Path, device: str) -> None:
    runner = load(folder, device, enforce_eager=True, random_weights=True)
    assert isinstance(runner.params.layers[0].experts, Stacked)


def test_less_memory_is_used_and_reported(compressed: Path, device: str) -> None:
    config = EngineConfig.from_options(
        str(compressed), {"device": device, "dtype": "float32", "enforce_eager": True}
    )
    loaded = startup.load(config)
    whole = open_source(str(compressed)).model.param_bytes
    assert loaded.memory.weights_bytes == loaded.model.param_bytes < whole


def test_shorter_requests_keep_the_compressed_experts(folder: Path, device: str) -> None:
    """A cache smaller than the longest request makes another model, for another rotary table."""
    options = {"max_model_len": None, "num_kvcache_blocks": 4, "enforce_eager": True}
    runner = load(folder, device, **options)
    assert runner.layout.max_model_len == 48
    assert runner.model.config.moe is not None and runner.model.config.moe.compression is not None


def test_they_are_not_offloaded(folder: Path, device: str) -> None:
    with pytest.raises(ValueError, match="expert_offload is 2, but the experts beside"):
        load(folder, device, enforce_eager=True, expert_offload=2)


def test_they_come_back_after_sleep(folder: Path, device: str) -> None:
    llm = LLM(
        str(folder), device=device, dtype="float32", enforce_eager=True, enable_sleep_mode=True,
        max_num_seqs=2, num_kvcache_blocks=9, max_model_len=64, skip_tokenizer_init=True,
    )  # fmt: skip
    before = tokens(llm, [[5, 7, 99]], greedy())
    llm.sleep(level=2)
    llm.wake_up()
    assert tokens(llm, [[5, 7, 99]], greedy()) == before
    llm.close()


def test_a_model_without_experts_does_not_ignore_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = save_tiny(tmp_path / "dense", "qwen3")
    shutil.copytree(folder / "svd_experts", dense / "svd_experts")
    message = f"{dense / 'svd_experts'} holds compressed experts, but Qwen3ForCausalLM has no"
    with pytest.raises(CheckpointError, match=message):
        load(dense, "cpu", enforce_eager=True)
    monkeypatch.setenv("NANOVLLM_DISABLE_SVD", "1")
    load(dense, "cpu", enforce_eager=True)


EXPERT = "V_experts/layer_2_expert_3.safetensors"


def remove(folder: Path, name: str) -> None:
    (folder / "svd_experts" / name).unlink()


def add(folder: Path, name: str) -> None:
    (folder / "svd_experts" / name).write_bytes(b"")


def with_infinity(*shape: int) -> Tensor:
    matrix = torch.zeros(shape)
    matrix[0, 1], matrix[1, 0] = math.inf, -math.inf
    return matrix


def test_files_of_other_programs_and_of_an_interrupted_end_are_left_alone(folder: Path) -> None:
    for name in (".gitattributes", "V_experts/.DS_Store", "progress.json"):
        add(folder, name)
    load(folder, "cpu", enforce_eager=True)


def update(folder: Path, name: str, **values: object) -> None:
    change(folder / "svd_experts" / name, lambda found: found.update(values))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: remove(f, "metadata.json"), r"metadata.json is missing: .* not complete"),
        (lambda f: remove(f, "U_matrices.safetensors"), "U_matrices.safetensors is missing"),
        (lambda f: remove(f, EXPERT), "layer_2_expert_3.safetensors is missing"),
        (
            lambda f: change(f / "svd_experts" / EXPERT, lambda found: found.pop("w2_V")),
            "layer_2_expert_3.safetensors: tensor w2_V cannot be read",
        ),
        (
            lambda f: update(f, EXPERT, w1_V=torch.zeros(RANK + 1, 40)),
            rf"w1_V has shape \[{RANK + 1}, 40\], but rank {RANK} and the config ask for "
            rf"\[{RANK}, 40\]",
        ),
        (
            lambda f: update(f, "metadata.json", rank=RANK - 1),
            rf"w1_U has shape \[48, {RANK}\], but rank {RANK - 1}",
        ),
        (
            lambda f: update(f, EXPERT, w1_V=torch.full((RANK, 40), math.nan)),
            "layer_2_expert_3.safetensors: tensor w1_V holds NaN or infinity",
        ),
        (
            lambda f: update(f, "U_matrices.safetensors", layer_1_w3_U=with_infinity(48, RANK)),
            "U_matrices.safetensors: tensor layer_1_w3_U holds NaN or infinity",
        ),
        (
            lambda f: add(f, "V_experts/layer_3_expert_0.safetensors"),
            "V_experts/layer_3_expert_0.safetensors is not a file of the compressed experts",
        ),
        (
            lambda f: add(f, "V_experts/layer_0_expert_5.safetensors"),
            "V_experts/layer_0_expert_5.safetensors is not a file of the compressed experts",
        ),
        (lambda f: add(f, "U_matrices.bin"), "U_matrices.bin is not a file of the compressed"),
        (lambda f: update(f, "metadata.json", rank=0), "rank is 0: it must be a positive"),
        (lambda f: update(f, "metadata.json", rank="8"), "rank is '8': it must be a positive"),
        (
            lambda f: update(f, "metadata.json", dtype="bfloat16"),
            "tensor layer_0_w1_U is float32, but the metadata has dtype bfloat16",
        ),
        (lambda f: update(f, "metadata.json", rank=10**15), "rank is 1.*: it must be at most 40"),
        (lambda f: update(f, "metadata.json", dtype=["float32"]), "dtype is .'float32'.: it must"),
        (
            lambda f: (f / "svd_experts/metadata.json").write_text("[" * 10**6),
            "not readable: RecursionError",
        ),
        (lambda f: (f / "svd_experts/metadata.json").write_text("[]"), "not readable: TypeError"),
        (lambda f: update(f, "metadata.json", dtype="int8"), "dtype is 'int8': it must be one of"),
        (
            lambda f: update(f, EXPERT, w3_V=torch.zeros(RANK, 40, dtype=torch.float16)),
            "w3_V is float16, but the metadata has dtype float32",
        ),
        (
            lambda f: update(f, "metadata.json", architecture="Qwen3MoeForCausalLM"),
            "architecture is 'Qwen3MoeForCausalLM', but the checkpoint has 'MixtralForCausalLM'",
        ),
        (
            lambda f: update(f, "metadata.json", num_experts=4),
            "num_experts is 4, but the checkpoint has 5",
        ),
        (lambda f: (f / "svd_experts/metadata.json").write_text("{"), "not readable: JSONDecode"),
        (lambda f: (f / "svd_experts/metadata.json").write_text("{}"), "not readable: KeyError"),
        (
            lambda f: (f / "svd_experts" / EXPERT).write_bytes(b"x"),
            "layer_2_expert_3.safetensors: tensor w1_V cannot be read",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(
    harm: Callable[[Path], object], message: str, folder: Path
) -> None:
    harm(folder)
    with pytest.raises(CheckpointError, match=message) as raised:
        load(folder, "cpu", enforce_eager=True)
    assert str(folder / "svd_experts") in str(raised.value)
