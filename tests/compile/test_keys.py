"""A key changes if something that can change a program changes, and only then."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nanovllm import platforms
from nanovllm.compile import keys
from nanovllm.compile.keys import Key, describe, narrowed, program_key, source_digest
from nanovllm.models import dense, model
from nanovllm.models.config import ModelConfig
from nanovllm.models.layer_state import PagedKV
from nanovllm.models.model import LayerCall, LayerKind, Model
from nanovllm.startup import artifacts

CFG = ModelConfig(
    architecture="Qwen3ForCausalLM", vocab_size=512, hidden_size=64, ffn_size=128, num_layers=2,
    num_heads=4, num_kv_heads=2, head_dim=32, norm_eps=1e-6, max_position=512, inv_freq=(1.0,) * 16,
    rope_scale=1.0, tied_embeddings=True,
)  # fmt: skip
COMMON = {"torch": "2.11", "passes": "a b", "platform device": "sm_90", "source kernels": "0"}


def region(cfg: ModelConfig, window: int, x: Tensor, cache: Tensor) -> Tensor:
    return x * cfg.norm_eps + cache[0, 0] + window


def other_region(cfg: ModelConfig, window: int, x: Tensor, cache: Tensor) -> Tensor:
    return x


def key(
    function: Callable[..., Any] = region,
    cfg: ModelConfig = CFG,
    window: int = 0,
    x: Tensor | None = None,
    num_blocks: int = 7,
    **changes: str,
) -> str:
    common = {**COMMON, **changes}
    inputs = {"x": torch.ones(3, 4) if x is None else x, "cache_CBKH": torch.ones(num_blocks, 4)}
    return program_key(
        partial(function, cfg, window), inputs, varying=("CBKH",), common=common
    ).digest


@pytest.mark.parametrize(
    "change",
    [
        {"function": other_region},
        {"window": 4096},
        {"x": torch.ones(4, 4)},
        {"x": torch.ones(3, 4, dtype=torch.bfloat16)},
        {"x": torch.ones(4, 3).t()},
        {"x": torch.ones(3, 4, device="meta")},
        *({"cfg": replace(CFG, **{name: value})} for name, value in
          {"num_heads": 8, "num_kv_heads": 4, "head_dim": 64, "norm_eps": 1e-5,
           "dtype": torch.bfloat16}.items()),
        *({name: "another"} for name in COMMON),
        {"a new ingredient": "1"},
    ],
    ids=lambda change: next(iter(change)),  # the values may contain addresses
)  # fmt: skip
def test_a_changed_ingredient_is_another_key(change: dict[str, Any]) -> None:
    assert key(**change) != key()


IRRELEVANT = {
    "architecture": "LlamaForCausalLM", "num_layers": 1, "inv_freq": (2.0,) * 16, "rope_scale": 2.0,
    "max_position": 9, "tied_embeddings": False, "qk_norm": True, "qkv_bias": True,
    "out_bias": True, "mlp_bias": True, "hidden_size": 9, "ffn_size": 9,
    "rope_axes": (1,) * 16, "num_deepstack": 3, "sees_ahead": True, "other_ropes": ((2.0,) * 16,),
}  # fmt: skip


def test_fields_that_no_region_reads_and_sizes_that_vary_are_in_no_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sizes and biases of the model are in the key as the shapes of inputs."""
    assert set(IRRELEVANT) | set(ModelConfig.GRAPH_FIELDS) == {
        field.name for field in fields(ModelConfig)
    }
    for name, value in IRRELEVANT.items():
        assert key(cfg=replace(CFG, **{name: value})) == key(), name
    assert key(num_blocks=99) == key()
    for name in (
        "HOME",
        "PATH",
        "TMPDIR",
        "NANOVLLM_CACHE",
        "TORCHINDUCTOR_CACHE_DIR",
        "SOME_NOISE",
    ):
        monkeypatch.setenv(name, "/elsewhere")
    assert key() == key()
    assert Key({"a": "1", "b": "2"}).digest == Key({"b": "2", "a": "1"}).digest


def test_a_region_that_reads_a_field_outside_its_key_fails_when_traced() -> None:
    def reads_layers(cfg: ModelConfig, x: Tensor) -> Tensor:
        return x * cfg.num_layers

    with pytest.raises(
        AttributeError, match=r"ModelConfig\.num_layers, which is not in its GRAPH_FIELDS"
    ):
        narrowed(partial(reads_layers, CFG))(torch.ones(2))
    qkv = narrowed(partial(lambda cfg, x: cfg.qkv_size, CFG))(torch.ones(2))
    assert qkv == CFG.qkv_size  # a property that is computed from fields in the key


def test_what_has_no_stable_description_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot be part of a key"):
        describe(partial(region, CFG, object()))
    kept = PagedKV(2, 16, 16, window=9)
    bound = describe(partial(dense.layer, CFG, LayerCall("sdpa", LayerKind("window9", kept), 1)))
    assert bound[0] == "nanovllm.models.dense:layer"
    kind = {"name": "window9", "keeps": asdict(kept), "sparse": False, "has_sinks": False}
    assert bound[2:] == [["sdpa", kind, 1, False]]


def test_a_model_counts_by_its_regions_its_kinds_and_what_regions_read_of_its_config() -> None:
    model = dense.dense_model(CFG, (0, 9))
    described = describe(model)
    assert set(described) == set(Model.GRAPH_FIELDS)
    assert set(described["config"]) == set(ModelConfig.GRAPH_FIELDS)
    for same in (
        replace(model, kv_scales=None),
        replace(model, config=replace(CFG, max_position=9)),
    ):
        assert describe(same) == described
    for other in (
        replace(model, layer_kinds=model.layer_kinds[::-1]),
        replace(model, head=other_region),
        replace(model, layer_ropes=(1, 0)),
        replace(model, embed_factor=2.0),
        replace(model, config=replace(CFG, norm_eps=1e-5)),
    ):
        assert describe(other) != described

    def reads(name: str) -> Any:
        return narrowed(partial(lambda model: eval(f"model.{name}"), model))()

    programs = [("layer", model.layer_kinds[0]), ("last_layer", model.layer_kinds[1])]
    assert reads("layer_programs(keeps_last=True)") == tuple(programs)
    assert reads("config.head_dim") == 32 and reads("embed") is dense.embed
    for name, owner in (
        ("kv_scales", "Model"),
        ("config.max_position", "ModelConfig"),
        ("declared", "Model"),
    ):
        with pytest.raises(AttributeError, match=rf"a region reads {owner}\."):
            reads(name)


class One(NamedTuple):
    values_OD: Tensor


class Another(NamedTuple):
    values_OD: Tensor


def test_the_class_of_a_weight_is_in_the_key() -> None:
    """It has the product: two formats may store tensors of the same names and shapes."""

    def digest(weight: object) -> str:
        inputs = {"w": (weight, None, 3)}
        return program_key(other_region, inputs, varying=(), common=COMMON).digest

    assert digest(One(torch.ones(2))) != digest(Another(torch.ones(2)))
    assert digest(One(torch.ones(2))) == digest(One(torch.zeros(2)))


def test_differences_name_versions_before_shapes() -> None:
    wanted = Key({"torch": "2.13", "input x": "float32[3]", "same": "1"})
    lines = wanted.differences(
        {"torch": "2.11", "input x": "float32[4]", "same": "1", "extra": "9"}
    )
    assert lines[0].startswith("extra: nothing is wanted") and lines[-1].startswith(
        "input x: float32[3] is wanted"
    )
    assert "torch: 2.13 is wanted, 2.11 is stored" in lines


# Sources ------------------------------------------------------------------------------------------


def test_sources_count_by_name_and_content_only(tmp_path: Path) -> None:
    first, second = tmp_path / "here", tmp_path / "there" / "deeper"
    for folder in (first, second):
        folder.mkdir(parents=True)
        (folder / "a.py").write_text("x = 1\n")
    digest = source_digest(first.glob("*.py"), first)
    os.utime(second / "a.py", (1, 1))
    assert source_digest(second.glob("*.py"), second) == digest
    (second / "a.py").write_text("x = 2\n")
    assert source_digest(second.glob("*.py"), second) != digest
    shutil.move(first / "a.py", first / "b.py")
    assert source_digest(first.glob("*.py"), first) != digest


def changes(
    sources: Callable[[], dict[str, str]], file: str, folder: Path, patch: pytest.MonkeyPatch
) -> bool:
    """Whether an edit of a file of compile/ changes these ingredients."""
    copy = folder / "compile"
    shutil.copytree(keys.ROOT, copy)
    patch.setattr(keys, "ROOT", copy)
    before = sources()
    with (copy / file).open("a") as opened:
        opened.write("# changed\n")
    return sources() != before


@pytest.mark.parametrize(
    "file, counts",
    [("trace.py", True), ("program.py", True), ("passes/replace_ops.py", True),
     ("lower/calls.py", True), ("passes/new.py", True), ("lower/new.py", True),
     ("lower/persistent/plan.py", False), ("lower/persistent/schedule.py", False),
     ("buckets.py", False), ("keys.py", False), ("store.py", False), ("new.py", False)],
)  # fmt: skip
def test_sources_of_what_makes_programs_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, counts: bool
) -> None:
    assert changes(keys.own_sources, file, tmp_path, monkeypatch) == counts


@pytest.mark.parametrize(
    ("file", "counts"),
    [("plan.py", True), ("graph_reader.py", True), ("stored_plan.py", True), ("step.py", False)],
)
def test_sources_of_plans_count_for_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, counts: bool
) -> None:
    path = f"lower/persistent/{file}"
    assert changes(keys.plan_sources, path, tmp_path, monkeypatch) == counts


def test_files_that_make_programs_import_no_others_but_keys_and_store() -> None:
    patterns = (*keys.MAKING, *keys.PLANNING)
    making = [path for pattern in patterns for path in keys.ROOT.glob(pattern)]
    imported = {
        name.replace(".", "/") + ".py"
        for path in making
        for name in re.findall(r"^\s*from nanovllm\.compile\.(\S+) import", path.read_text(), re.M)
    }
    others = imported - {path.relative_to(keys.ROOT).as_posix() for path in making}
    assert "trace.py" in imported and others <= {"key.py", "keys.py", "store.py", "lower.py"}


def test_the_platform_and_its_passes_are_ingredients(monkeypatch: pytest.MonkeyPatch) -> None:
    platform: Any = platforms.select("cpu")
    model = dense.dense_model(CFG)

    def ingredients(*passes: str) -> dict[str, str]:
        return artifacts.common_ingredients(platform, passes, model)

    before = ingredients("a", "b")
    assert ingredients("a", "b") == before
    assert ingredients("b", "a") != before
    assert {
        "torch",
        "python",
        "platform cpu",
        "source models",
        "source nanovllm.models.dense",
        "source steps",
        "source platform",
    } <= set(before)
    monkeypatch.setattr(platform, "fingerprint", lambda: {"cpu": "avx9"})
    assert ingredients("a", "b") != before
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert ingredients("a", "b")["torch"] == "9.9"
    paths = [
        text for text in before.values() if str(Path.home()) in text or str(Path.cwd()) in text
    ]
    assert not paths


@pytest.mark.parametrize(
    "file, counts",
    [("model.py", True), ("region_inputs.py", True), ("config.py", True),
     ("formats/int8.py", True), ("formats/new.py", True),
     ("loader.py", False), ("rope.py", False), ("kv_scales.py", False), ("qwen3.py", False)],
)  # fmt: skip
def test_sources_of_regions_count_and_no_others_of_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, counts: bool
) -> None:
    copy = tmp_path / "models"
    shutil.copytree(Path(model.__file__).parent, copy)
    monkeypatch.setattr(model, "__file__", str(copy / "model.py"))
    platform: Any = platforms.select("cpu")
    before = artifacts.common_ingredients(platform, [], dense.dense_model(CFG))
    with (copy / file).open("a") as opened:
        opened.write("# changed\n")
    after = artifacts.common_ingredients(platform, [], dense.dense_model(CFG))
    assert (after != before) == counts
    another = replace(dense.dense_model(CFG), head=other_region)  # of this file
    sources = artifacts.common_ingredients(platform, [], another)
    assert set(sources) - set(after) == {f"source {__name__}"}


def test_architectures_whose_regions_a_region_calls_count() -> None:
    """Hunyuan's sparse layers have the attention of its dense ones, and the experts of all."""
    from nanovllm.models import hunyuan_v1_moe

    plain = dense.dense_model(CFG)
    found = artifacts.region_modules(replace(plain, layer=hunyuan_v1_moe.layer))
    used = ("hunyuan_v1_moe", "hunyuan_v1_dense", "moe", "dense")
    assert found == {f"nanovllm.models.{name}" for name in used}
    assert artifacts.region_modules(plain) == {"nanovllm.models.dense"}
