"""Who else may replace a folder of compiled code: the folders above it, groups, links."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanovllm.kernels import code_files, private_files

ME = os.getuid()


CACHES = (private_files.is_own_group, private_files._outside, code_files.temporary_folder)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(private_files, "_accepted", set())
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


def with_mode(folder: Path, mode: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(mode)
    return folder


@pytest.mark.parametrize("umask", [0, 0o002, 0o777])
def test_missing_folders_are_private_whatever_the_umask_is(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        private_files.make_private(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "a/b", "a/b/c")]
    assert modes == [0o700] * 3


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o773])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_folder_that_others_can_replace_is_refused(tmp_path: Path, mode: int, depth: int) -> None:
    parent = with_mode(tmp_path / "shared", mode)
    folder = parent.joinpath(*"abc"[:depth])
    expected = rf"{folder} is .* may replace it: user {ME} owns {parent} .* mode is {mode:o} \("
    with pytest.raises(private_files.UnsafeParent, match=expected + rf"use chmod go-w {parent}"):
        private_files.make_private(folder)
    parent.chmod(0o755)
    private_files.make_private(folder)


def test_a_sticky_folder_may_be_above(tmp_path: Path) -> None:
    private_files.make_private(with_mode(tmp_path / "shared", 0o1777) / "a")


def test_the_folder_above_must_not_be_another_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it is sticky: its owner may rename what is in it."""
    for mode in (0o755, 0o1777):
        parent = with_mode(tmp_path / f"{mode:o}", mode)
        (parent / "a").mkdir(mode=0o700)
        monkeypatch.setattr(private_files, "_trusted", lambda: (ME + 1,))
        with pytest.raises(private_files.UnsafeParent, match=f"user {ME} owns /.*another folder"):
            private_files.refuse_shared_parents(parent / "a")
        monkeypatch.undo()
        private_files.make_private(parent / "a")


def test_links_on_the_way_are_followed_as_the_system_does(tmp_path: Path) -> None:
    shared, own = with_mode(tmp_path / "shared", 0o777), with_mode(tmp_path / "own", 0o700)
    (own / "link").symlink_to("../shared/inner")
    (shared / "inner").mkdir(mode=0o700)
    (shared / "back").symlink_to(own)
    with pytest.raises(private_files.UnsafeParent, match=str(shared)):
        private_files.make_private(own / "link" / "a")
    with pytest.raises(private_files.UnsafeParent, match=str(shared)):
        private_files.make_private(shared / "back" / "a")
    with pytest.raises(private_files.UnsafeParent, match=str(shared)):
        private_files.make_private(own / "link" / ".." / "inner")
    (own / "loop").symlink_to("loop")
    with pytest.raises(OSError):
        private_files.refuse_shared_parents(own / "loop" / "a")
    (own / "fine").symlink_to(own)
    private_files.make_private(own / "fine" / "a")


@pytest.mark.parametrize(
    ("group", "primary", "members", "others", "is_own"),
    [
        ("ann", 7, [], [], True),
        ("ann", 7, ["ann"], [], True),
        ("ann", 7, ["ann", "bob"], [], False),
        ("ann", 7, [], [7], False),  # bob's primary group, too
        ("users", 7, [], [], False),  # its members may be listed nowhere
        ("ann", 8, [], [], False),
    ],
)
def test_a_group_of_the_users_own_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str, primary: int,
    members: list[str], others: list[int], is_own: bool,
) -> None:  # fmt: skip
    """As in home folders of Debian and Red Hat with mode 775 or 770."""
    ann = SimpleNamespace(pw_name="ann", pw_uid=ME, pw_gid=primary)
    everybody = [ann, *(SimpleNamespace(pw_name="bob", pw_uid=ME + 1, pw_gid=n) for n in others)]
    monkeypatch.setattr(pwd, "getpwuid", lambda _: ann)
    monkeypatch.setattr(pwd, "getpwall", lambda: everybody)
    monkeypatch.setattr(grp, "getgrgid", lambda _: SimpleNamespace(gr_name=group, gr_mem=members))
    assert private_files.is_own_group(7) is is_own
    monkeypatch.setattr(private_files, "is_own_group", lambda _: is_own)
    folder = with_mode(tmp_path / "home", 0o775) / ".cache" / "nanovllm"
    if is_own:
        private_files.make_private(folder)
        monkeypatch.setattr(os, "listxattr", lambda _: ["system.posix_acl_access"])
    with pytest.raises(private_files.UnsafeParent, match="mode is 775"):
        private_files.make_private(folder)


def test_what_is_read_is_what_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that takes the name between the check and the reading is not read."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.write_bytes(b"ours")
    theirs.write_bytes(b"theirs")
    ours.chmod(0o600)
    real = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        if theirs.exists():
            theirs.replace(ours)
        return real(descriptor)

    monkeypatch.setattr(os, "fstat", fstat)
    assert private_files.read_private(ours) == b"ours"
    assert ours.read_bytes() == b"theirs" and not theirs.exists()


def test_a_file_of_others_is_not_read(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"x")
    link.symlink_to(file)
    file.chmod(0o600)
    with pytest.raises(OSError):
        private_files.read_private(link)
    file.chmod(0o620)
    with pytest.raises(private_files.UnsafePath, match="its mode is 620"):
        private_files.read_private(file)


def test_temporary_files_go_where_others_cannot_replace_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Or, where there is no such place, to the usual one, with a warning: an engine starts."""
    shared, own = with_mode(tmp_path / "shared", 0o777), with_mode(tmp_path / "own", 0o700)
    monkeypatch.setattr(code_files.tempfile, "tempdir", str(shared))
    for others, expected in (((str(own),), own), ((), shared)):
        monkeypatch.setattr(code_files, "_OTHER_TEMPORARY", others)
        code_files.temporary_folder.cache_clear()
        assert not caplog.records
        found = code_files.temporary_folder()
        assert found.parent == expected and found.stat().st_mode & 0o777 == 0o700
        private_files.make_private(found / "cpp")
    assert f"user {ME} owns {shared}" in caplog.text
    with pytest.raises(private_files.UnsafeParent):
        private_files.make_private(with_mode(tmp_path / "third", 0o777) / "a")


def test_in_a_namespace_the_users_outside_are_trusted_if_nobody_inside_can_be_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = {"/proc/sys/kernel/overflowuid": "65534\n"}
    monkeypatch.setattr(Path, "read_text", lambda path: texts[str(path)])
    for ids, expected in (
        ("0 0 4294967295\n", ()),  # no namespace
        ("1000 1000 1\n", (65534,)),
        ("0 1000 1\n1 100000 65536\n", ()),  # a process inside can be 65534
    ):
        texts["/proc/self/uid_map"] = ids
        private_files._outside.cache_clear()
        assert private_files._outside() == expected


def test_a_link_of_another_user_in_a_sticky_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = with_mode(tmp_path / "shared", 0o1777)
    link = shared / "link"
    link.symlink_to(with_mode(tmp_path / "target", 0o700))
    private_files.make_private(link / "a")
    real = Path.lstat

    def lstat(path: Path) -> os.stat_result:
        fields = list(real(path))
        fields[4] = ME + 1 if path == link else fields[4]
        return os.stat_result(fields)

    monkeypatch.setattr(Path, "lstat", lstat)
    with pytest.raises(private_files.UnsafeParent, match=f"user {ME + 1} owns {link}"):
        private_files.make_private(link / "a")
