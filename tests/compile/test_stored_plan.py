"""Plans of the persistent step in the store: what comes back, and what reads the regions again."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.cli import main as cli
from nanovllm.compile.key import Key
from nanovllm.compile.lower import eager
from nanovllm.compile.lower.persistent import plan as plans
from nanovllm.compile.lower.persistent import stored_plan
from nanovllm.compile.lower.persistent.plan import Plan, Unfit
from nanovllm.compile.program import Compiler
from nanovllm.compile.store import Entry, Store
from nanovllm.kernels.cuda.persistent import CodeFormat, Experts
from nanovllm.models.model import VARYING, LayerCache
from nanovllm.platforms.attention import Attention
from nanovllm.runner.persistent import plan_of
from tests.compile.persistent_cases import (
    FP8_BLOCKS,
    FP8_EXPERTS,
    FP8_ROWS,
    INT4,
    QWEN2,
    SMALL,
    SMALL_EXPERTS,
    Case,
    Shape,
    case,
)
from tests.compile.test_store import empty, flip, truncate

ROOT = Path(__file__).parents[2]
WARM = """
import sys
from pathlib import Path
from tests.compile.test_stored_plan import compiler
from tests.compile.persistent_cases import case
print(case((40,), compiler=compiler(Path(sys.argv[1]))).plan.num_rows)
print([name for name in ("sympy", "torch._dynamo", "torch._inductor") if name in sys.modules])
"""


def compiler(folder: Path, **options: Any) -> Compiler:
    options = {"lowering": eager.lower, "ingredients": {"torch": "2.13"}, **options}
    return Compiler(store=Store(folder), varying=VARYING, **options)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A region for each that is traced to read a plan."""
    found: list[object] = []
    trace = plans.trace

    def counted(region: Any, *args: Any, **options: Any) -> Any:
        found.append(region)
        return trace(region, *args, **options)

    monkeypatch.setattr(plans, "trace", counted)
    return found


def entries(folder: Path) -> list[Entry]:
    return list(Store(folder).entries())


def planned(one: Case, made: Compiler, **parts: Any) -> Plan:
    return plan_of(one.parts._replace(compiler=made, **parts), one.given.h_RD, one.batch)


# Its form -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [SMALL, SMALL_EXPERTS, QWEN2, FP8_BLOCKS, FP8_ROWS, FP8_EXPERTS, INT4]
)
def test_a_plan_is_what_was_dumped(shape: Shape) -> None:
    plan = case((40, 7), shape).plan
    if plan.codes is not None:
        plan = plan._replace(codes=plan.codes._replace(has_head=True))
    found = stored_plan.load(stored_plan.dump(plan))
    assert isinstance(found, Plan) and found == plan
    for own, other in zip(found, plan, strict=True):
        assert type(own) is type(other)
    assert found.layer_bytes == plan.layer_bytes and found.has_bias == plan.has_bias


def test_a_reason_is_what_was_dumped() -> None:
    found = stored_plan.load(stored_plan.dump(Unfit("a layer has a bias")))
    assert isinstance(found, Unfit) and str(found) == "a layer has a bias"


def without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


@pytest.mark.parametrize(
    "change",
    [lambda _: [], lambda _: {}, lambda _: None, lambda values: without(values, "keeps"),
     lambda values: {**values, "new": 1}, lambda values: {**values, "unfit": "why"},
     lambda values: {**values, "experts": [16, 4, 64, True]},
     lambda values: {**values, "codes": without(values["codes"], "block")},
     lambda values: {**values, "codes": {**values["codes"], "scale": "torch.int8"}}],
)  # fmt: skip
def test_other_content_is_refused(change: Callable[[Any], Any]) -> None:
    plan = Plan(
        1, 64, 2, 1, 64, 64, 1, 1e-6, 0.1, {"qkv": "w"}, {"head": "w"},
        experts=Experts(16, 4, 64, True), codes=CodeFormat(8, torch.float32),
    )  # fmt: skip
    values = json.loads(stored_plan.dump(plan))
    assert stored_plan.load(json.dumps(values).encode()) == plan
    with pytest.raises(ValueError, match=r"other fields than|scales are in 'torch\.int8'"):
        stored_plan.load(json.dumps(change(values)).encode())


# In the store -------------------------------------------------------------------------------------


def test_a_second_start_reads_no_region(store: Path, reads: list[object]) -> None:
    first, second = compiler(store), compiler(store)
    expected = case((40, 7), SMALL_EXPERTS, compiler=first).plan
    assert len(reads) == 2  # a layer, the head
    assert case((33, 12), SMALL_EXPERTS, compiler=second).plan == expected
    assert len(reads) == 2
    (entry,) = entries(store)
    assert (entry.name, entry.kind) == ("plan_2", "plan")
    # it is no program
    assert (first.num_compiled, first.num_loaded, second.num_loaded) == (0, 0, 0)


def test_a_second_process_imports_no_tracer(store: Path) -> None:
    case((40,), compiler=compiler(store))
    done = subprocess.run(
        [sys.executable, "-c", WARM, str(store)],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["1", "[]"], done.stderr


@pytest.mark.parametrize(
    "lens, shape, changed",
    [((40, 7), SMALL, {}), ((40,), SMALL._replace(ffn=192), {}),
     ((40,), SMALL._replace(vocab=128), {}), ((40,), SMALL, {"norm_eps": 1e-5}), ((40,), QWEN2, {}),
     ((40,), FP8_ROWS, {}), ((40,), FP8_ROWS._replace(stored=FP8_BLOCKS.stored, ffn=128), {})],
)  # fmt: skip
def test_other_rows_shapes_and_configs_are_read_anew(
    store: Path, reads: list[object], lens: tuple[int, ...], shape: Shape, changed: dict[str, Any]
) -> None:
    case((40,), compiler=compiler(store))
    other = case(lens, shape, compiler=compiler(store), **changed).plan
    assert len(reads) == 4 and len(entries(store)) == 2
    assert case(lens, shape, compiler=compiler(store), **changed).plan == other
    assert len(reads) == 4


def test_other_ingredients_are_read_anew(store: Path, reads: list[object]) -> None:
    case((40,), compiler=compiler(store))
    case((40,), compiler=compiler(store, ingredients={"torch": "2.12"}))
    assert len(reads) == 4 and len(entries(store)) == 2


def test_layers_and_blocks_of_any_number_have_one_plan(store: Path, reads: list[object]) -> None:
    """So workers, which have a reduced model and a small cache, may read it."""
    first = case((40,), compiler=compiler(store))
    other = case((40,), SMALL._replace(layers=5), compiler=compiler(store))
    assert (first.plan.num_layers, other.plan.num_layers) == (2, 5)
    assert other.plan == first.plan._replace(num_layers=5)
    caches = tuple(
        LayerCache(*(one.new_zeros(99, *one.shape[1:]) for one in cache[:2]))
        for cache in first.parts.caches
    )
    plan = planned(first, compiler(store), caches=caches)
    assert plan == first.plan._replace(keeps=False) and len(reads) == 2


def test_why_there_is_no_plan_is_kept(store: Path, reads: list[object]) -> None:
    one = case((40,))
    reads.clear()
    for _ in range(2):
        with pytest.raises(Unfit, match="is where the kernel has our own attention"):
            planned(one, compiler(store), attention=Attention.all_by("sdpa"))
    assert len(reads) == 2


def test_eager_compilers_and_those_without_a_store_keep_nothing(
    store: Path, reads: list[object]
) -> None:
    one = case((40,))
    reads.clear()
    for made in (compiler(store, lowering=None), Compiler(eager.lower)):
        assert planned(one, made) == one.plan._replace(keeps=False)
    assert len(reads) == 4 and entries(store) == []


def test_a_plan_is_not_missing_where_programs_are_required(
    store: Path, reads: list[object]
) -> None:
    """Reading it compiles nothing."""
    for _ in range(2):
        strict = compiler(store, require=True)
        case((40,), compiler=strict)
        strict.seal()
    assert len(reads) == 2 and len(entries(store)) == 1


# Damage, and care ---------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["entries", "objects"])
@pytest.mark.parametrize("damage", [truncate, flip, empty])
def test_a_damaged_plan_is_read_again_with_a_warning(
    store: Path, reads: list[object], caplog: pytest.LogCaptureFixture, part: str,
    damage: Callable[[Path], None],
) -> None:  # fmt: skip
    expected = case((40,), compiler=compiler(store)).plan
    (path,) = (store / part).iterdir()
    damage(path)
    logging.getLogger("nanovllm").propagate = True
    for _ in range(2):
        assert case((40,), compiler=compiler(store)).plan == expected
    assert len(reads) == 4 and caplog.text.count("making it again") == 1


@pytest.mark.parametrize(
    "strange", [{"kind": "calls"}, {"content": b"{}"}, {"content": b"\xff"}, {"content": b""}]
)
def test_a_whole_artifact_with_other_content_is_read_again(
    store: Path, reads: list[object], caplog: pytest.LogCaptureFixture, strange: dict[str, Any]
) -> None:
    expected = case((40,), compiler=compiler(store)).plan
    (entry,) = entries(store)
    key = Key(dict(entry.ingredients))
    found = Store(store).find(key)
    assert found is not None
    Store(store).save(key, replace(found, **strange))
    logging.getLogger("nanovllm").propagate = True
    assert case((40,), compiler=compiler(store)).plan == expected
    assert len(reads) == 4 and "what is stored as plan_1 cannot be used" in caplog.text


def test_plans_are_listed_verified_and_pruned(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case((40,), compiler=compiler(store))
    assert cli.run("cache", ["list", str(store)]) == 0
    out = capsys.readouterr().out
    assert "1 entries (1 plan), 1 objects" in out and out.split()[1] == "plan"
    assert cli.run("cache", ["verify", str(store)]) == 0
    assert cli.run("cache", ["prune", str(store), "--max-bytes", "0"]) == 0
    assert entries(store) == [] and not any((store / "objects").iterdir())
