"""The store returns what was saved or nothing: no damaged files, no folders of other users."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nanovllm.cli import main as cli
from nanovllm.compile import store
from nanovllm.compile.keys import Key
from nanovllm.compile.lower import calls
from nanovllm.compile.program import Compiler, CompileRequired
from nanovllm.compile.store import Artifact, Store
from nanovllm.kernels import code_files

KEY = Key({"torch": "2.13", "input x": "float32[3]"})
ARTIFACT = Artifact("add_3", "calls", b"content", "tensor", dict(KEY.ingredients))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


class Both(NamedTuple):
    double: Tensor
    nested: tuple[Tensor, None]


def region(x: Tensor) -> Both:
    return Both(x * 2, (x + 1, None))


def compiler(folder: Path, **options: Any) -> Compiler:
    return Compiler(
        calls.lower, store=Store(folder), ingredients={"torch": "2.13", "device": "a"}, **options
    )


def run(made: Compiler, size: int = 3) -> Both:
    result: Both = made.program("double", (size,), region, {"x": torch.ones(size)})(
        torch.full((size,), 5.0)
    )
    return result


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


# Finding again ------------------------------------------------------------------------------------


def test_what_is_saved_is_found_by_an_equal_key_only(folder: Path) -> None:
    Store(folder).save(KEY, ARTIFACT)
    assert Store(folder).find(Key(dict(reversed(KEY.ingredients.items())))) == ARTIFACT
    assert Store(folder).find(Key({**KEY.ingredients, "torch": "2.12"})) is None


def test_a_second_compiler_builds_nothing_and_nests_alike(folder: Path) -> None:
    first = compiler(folder)
    expected = run(first)
    second = compiler(folder)
    found = run(second)
    assert (first.num_compiled, first.num_loaded) == (1, 0)
    assert (second.num_compiled, second.num_loaded) == (0, 1)
    assert isinstance(found, Both) and found.nested[1] is None
    assert torch.equal(found.double, expected.double) and torch.equal(
        found.nested[0], expected.nested[0]
    )


@pytest.mark.parametrize("change", [{"torch": "2.11"}, {"device": "b"}, {"new": "1"}])
def test_another_version_or_device_is_built_anew(folder: Path, change: dict[str, str]) -> None:
    run(compiler(folder))
    other = compiler(folder)
    other.ingredients = {**other.ingredients, **change}
    run(other)
    assert (other.num_compiled, other.num_loaded) == (1, 0)


def test_programs_with_the_same_code_share_it(folder: Path) -> None:
    made = compiler(folder)
    for size in (3, 4, 5):
        run(made, size)
    assert (
        len(list((folder / "entries").iterdir())) == 3
        and len(list((folder / "objects").iterdir())) == 1
    )


def test_a_stored_program_may_come_late_but_nothing_may_be_built(folder: Path) -> None:
    run(compiler(folder), 4)
    late = compiler(folder, strict=True)
    late.seal()
    assert run(late, 4).double.tolist() == [10.0] * 4
    with pytest.raises(RuntimeError, match="compiled after warm-up"):
        run(late, 5)


# Damage -------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, empty, Path.unlink])
@pytest.mark.parametrize("part", ["entries", "objects"])
def test_what_is_damaged_is_built_again_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, part: str, damage: Callable[[Path], None]
) -> None:
    expected = run(compiler(folder))
    damage(only(folder / part))
    again = compiler(folder)
    logging.getLogger("nanovllm").propagate = True
    with caplog.at_level(logging.WARNING):
        assert torch.equal(run(again).double, expected.double)
    assert again.num_compiled == 1
    assert ("making it again" in caplog.text) == (not (damage is Path.unlink and part == "entries"))
    third = compiler(folder)  # the damaged entry was also replaced
    run(third)
    assert third.num_loaded == 1


def test_whole_files_with_foreign_content_are_built_again(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("nanovllm").propagate = True
    made = compiler(folder)
    run(made)
    key = Key(dict(next(iter(Store(folder).entries())).ingredients))
    found = Store(folder).find(key)
    assert found is not None
    for strange in (
        {"kind": "exe"},
        {"content": b"[]"},
        {"result": ["os:system", []]},
        {"result": ["builtins:tuple", 3]},
    ):
        Store(folder).save(key, replace(found, **strange))
        again = compiler(folder)
        with caplog.at_level(logging.WARNING):
            run(again)
        assert again.num_compiled == 1 and "cannot be used" in caplog.text
        caplog.clear()


# Whose folder it is -------------------------------------------------------------------------------


def test_the_folder_is_for_its_owner_alone(folder: Path) -> None:
    previous = os.umask(0)
    try:
        Store(folder).save(KEY, ARTIFACT)
    finally:
        os.umask(previous)
    for path in (folder, *folder.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize("part", [".", *store.SUBFOLDERS])
@pytest.mark.parametrize("mode", [0o770, 0o777, 0o702])
def test_a_folder_that_others_can_write_is_refused(folder: Path, part: str, mode: int) -> None:
    Store(folder)
    (folder / part).chmod(mode)
    with pytest.raises(ValueError, match=rf"its mode is {mode:o}: .*chmod 700"):
        Store(folder)


@pytest.mark.parametrize("part", ["entries", "objects"])
def test_a_file_that_others_may_write_is_built_again_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    run(compiler(folder))
    only(folder / part).chmod(0o620)
    again = compiler(folder)
    logging.getLogger("nanovllm").propagate = True
    with caplog.at_level(logging.WARNING):
        run(again)
    assert again.num_compiled == 1 and "its mode is 620" in caplog.text
    assert only(folder / part).stat().st_mode & 0o777 == 0o600


def test_a_folder_of_somebody_else_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(folder)
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(ValueError, match=f"user {me} owns it .* must belong to user {me + 1}"):
        Store(folder)


def test_where_users_have_no_numbers_nothing_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(folder)
    monkeypatch.delattr(os, "getuid")
    folder.chmod(0o777)
    Store(folder)


def test_a_full_disk_is_said_once_and_leaves_nothing_half_written(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logging.getLogger("nanovllm").propagate = True
    made = compiler(folder)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(code_files.os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        for size in (3, 4):
            assert run(made, size).double.tolist() == [10.0] * size
    assert (
        caplog.text.count("compiled programs are not saved: [Errno 28] No space left on device")
        == 1
    )
    assert not [path for path in folder.rglob("*") if path.is_file()]


# Requiring ----------------------------------------------------------------------------------------


def test_required_programs_that_are_missing_are_all_listed_with_what_differs(folder: Path) -> None:
    run(compiler(folder), 4)
    strict = compiler(folder, require=True)
    strict.ingredients = {**strict.ingredients, "torch": "2.11"}
    # the regions run in place of the missing programs
    assert run(strict, 4).double.tolist() == run(strict, 5).double.tolist()[:4]
    with pytest.raises(CompileRequired) as caught:
        strict.seal()
    message = str(caught.value)
    assert message.startswith(f"2 program(s) are not in {folder}")
    assert "double_4: torch: 2.11 is wanted, 2.13 is stored" in message
    assert (
        "double_5: this bucket is missing; nearest is double_4: torch: 2.11 is wanted, "
        "2.13 is stored; input x: " in message
    )
    assert strict.num_compiled == 0


def test_an_empty_store_says_so(folder: Path) -> None:
    strict = compiler(folder, require=True)
    run(strict)
    with pytest.raises(
        CompileRequired, match="double_3: the store holds no program of this region"
    ):
        strict.seal()


# Looking after it ---------------------------------------------------------------------------------


def fill(folder: Path) -> None:
    for i in range(3):
        Store(folder).save(
            Key({"i": str(i)}), replace(ARTIFACT, content=bytes([i]) * 1000, name=f"add_{i}")
        )
        os.utime(folder / "entries" / Key({"i": str(i)}).digest, (time.time() - 100 + i,) * 2)
    kernel = folder / "triton" / "HASH"
    kernel.mkdir()
    (kernel / "kernel.cubin").write_bytes(b"binary")
    (kernel / "__grp__kernel.json").write_text("{}")
    store.seal_kernels(folder)


def test_list_and_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(folder)
    assert cli.run("cache", ["list", str(folder)]) == 0
    assert "3 entries (3 calls), 3 objects, 1 Triton kernels" in capsys.readouterr().out
    assert cli.run("cache", ["verify", str(folder)]) == 0
    flip(next((folder / "objects").iterdir()))
    truncate(next((folder / "entries").iterdir()))
    flip(folder / "triton" / "HASH" / "kernel.cubin")
    assert cli.run("cache", ["verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "is damaged" in out and "kernel HASH is damaged" in out


def test_prune_drops_what_was_not_used_for_longest(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(folder)
    assert Store(folder).find(Key({"i": "0"})) is not None  # used just now
    sizes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert cli.run("cache", ["prune", str(folder), "--max-bytes", str(sizes - 900)]) == 0
    assert sorted(entry.name for entry in Store(folder).entries()) == ["add_0", "add_2"]
    assert len(list((folder / "objects").iterdir())) == 2
    assert cli.run("cache", ["prune", str(folder), "--max-bytes", "0"]) == 0
    assert not [path for path in folder.rglob("*") if path.is_file()]
    assert "0 are left" in capsys.readouterr().out


def test_prune_drops_what_killed_processes_left_behind(folder: Path) -> None:
    fill(folder)
    (folder / "triton" / "UNFINISHED").mkdir()
    folders = [folder / "cpp" / ".building-x", folder / "triton" / "UNFINISHED" / "tmp.pid_7_x"]
    files = [folder / "entries" / ".writing-x", folder / "triton" / "HASH" / ".writing-x"]
    left_behind = [*files, *(one / "deep" / "file" for one in folders)]

    def leave() -> None:
        for path in left_behind:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"12345")

    leave()
    assert store.prune(folder, 1 << 30) == 0
    assert all(path.exists() for path in left_behind), "their processes may still be alive"
    for path in (*files, *folders):
        os.utime(path, (time.time() - 4000,) * 2)
    assert store.prune(folder, 1 << 30) == 5 * len(left_behind)
    assert not any(path.exists() for path in (*files, *folders))
    assert store.num_kernels(folder) == 1 and len(list(Store(folder).entries())) == 3


@pytest.mark.parametrize(
    "arguments, message",
    [(["prune"], "use --max-bytes with prune"),
     (["list", "--max-bytes", "1"], "use --max-bytes with prune"),
     (["prune", "--max-bytes", "much"], "'much' is not a size"), (["drop"], "invalid choice")],
)  # fmt: skip
def test_bad_arguments_are_named(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Store(folder)
    with pytest.raises((SystemExit, ValueError)) as refused:
        cli.run("cache", [arguments[0], str(folder), *arguments[1:]])
    assert message in f"{refused.value}{capsys.readouterr().err}"


def test_a_folder_that_is_no_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} is not a store"):
        cli.run("cache", ["list", str(tmp_path)])
    Store(tmp_path / "s").folder.chmod(0o777)
    with pytest.raises(ValueError, match="chmod 700"):
        cli.run("cache", ["list", str(tmp_path / "s")])


def test_kernels_of_somebody_else_are_dropped(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(folder)
    assert store.drop_damaged_kernels(folder) == 0
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    assert store.drop_damaged_kernels(folder) == 1


def test_damaged_kernels_are_dropped_and_unsealed_ones_left(folder: Path) -> None:
    fill(folder)
    kernel = folder / "triton" / "HASH"
    assert store.drop_damaged_kernels(folder) == 0 and store.num_kernels(folder) == 1
    seal = json.loads((kernel / store.KERNEL_SEAL).read_text())
    assert set(seal) == {"kernel.cubin", "__grp__kernel.json"}
    truncate(kernel / "kernel.cubin")
    assert store.drop_damaged_kernels(folder) == 1 and store.num_kernels(folder) == 0
    (kernel / "__grp__kernel.json").write_text("{}")
    assert store.drop_damaged_kernels(folder) == 0


def test_a_kernel_is_read_again_only_once_it_has_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(folder)
    read: list[bytes] = []
    monkeypatch.setattr(
        store, "digest", lambda content: (read.append(content), code_files.digest(content))[1]
    )
    assert store.drop_damaged_kernels(folder) == 0 and len(read) == 2
    assert store.drop_damaged_kernels(folder) == 0 and len(read) == 2
    cubin = folder / "triton" / "HASH" / "kernel.cubin"
    stat = cubin.stat()
    cubin.write_bytes(bytes(stat.st_size))
    os.utime(cubin, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the time of change stays new
    assert store.drop_damaged_kernels(folder) == 1
