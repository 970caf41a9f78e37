"""References to files: data URLs, local paths, and permission for both."""

from __future__ import annotations

import base64
import contextlib
import os
from pathlib import Path

import pytest

from nanovllm.media import sources
from nanovllm.media.options import MediaOptions

DATA = bytes(range(256)) * 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An allowed folder with a file, beside a file that is not allowed."""
    allowed = tmp_path / "allowed"
    (allowed / "deep").mkdir(parents=True)
    (allowed / "deep" / "a b.png").write_bytes(DATA)
    (tmp_path / "secret.png").write_bytes(b"secret")
    return allowed


def local(folder: Path, **changes: int) -> MediaOptions:
    return MediaOptions(allowed_local_media_path=folder, **changes)


def refused(reference: str, options: MediaOptions, kind: str = "image") -> str:
    with pytest.raises(ValueError) as caught:
        sources.read(reference, kind, options)
    message = str(caught.value)
    assert "secret" not in message and "deep" not in message and "/tmp" not in message
    assert caught.value.__cause__ is None
    return message


def test_data_urls_are_read_without_permissions() -> None:
    text = base64.b64encode(DATA).decode()
    assert sources.read(f"data:image/png;base64,{text}", "image", MediaOptions()) == DATA
    assert sources.read(f"DATA:image/x;charset=a;base64,{text}", "image", MediaOptions()) == DATA


@pytest.mark.parametrize("num", [97, 98, 99, 1024])
def test_base64_is_read_as_clients_write_it(num: int) -> None:
    data = (bytes([251, 255]) + DATA)[:num]  # has the signs that differ between the alphabets
    text = base64.b64encode(data).decode()
    assert "+" in text and "/" in text
    lines = base64.encodebytes(data).decode()
    url_safe = base64.urlsafe_b64encode(data).decode()
    escaped = text.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    forms = [text, text.rstrip("="), lines, lines.replace("\n", "\r\n"), lines.rstrip("=\n"),
             url_safe, url_safe.rstrip("="), escaped, f" {text}\n"]  # fmt: skip
    for one in forms:
        assert sources.read(f"data:image/png;base64,{one}", "image", MediaOptions()) == data


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64,a,bc", "not base64"),
        ("data:image/png;base64,abcde", "not base64"),
        ("data:image/png;base64,ab=c", "not base64"),
        ("data:image/png;base64,ab===", "not base64"),
        ("data:image/png;base64,äöüß", "not base64"),
        ("data:image/png;base64", "must have the form"),
        ("data:image/png,abc", "must have the form"),
        ("data:,abc", "must have the form"),
        ("data:text/html;base64,YWJj", "of type 'text/html': it must be image/"),
        ("data:video/mp4;base64,YWJj", "of type 'video/mp4': it must be image/"),
    ],
)
def test_wrong_data_urls_are_refused(url: str, message: str) -> None:
    assert message in refused(url, MediaOptions())


@pytest.mark.parametrize("num", [98, 99, 100])
def test_data_urls_have_a_limit_in_bytes(num: int) -> None:
    url = f"data:image/png;base64,{base64.b64encode(bytes(num)).decode()}"
    options = MediaOptions(max_item_bytes=99)
    if num <= 99:
        assert len(sources.read(url, "image", options)) == num
    else:
        assert "more than 99 bytes" in refused(url, options)


def test_local_paths_are_refused_by_default(folder: Path) -> None:
    path = folder / "deep" / "a b.png"
    for reference in (str(path), path.as_uri()):
        assert "allowed_local_media_path is not set" in refused(reference, MediaOptions())


def test_local_paths_and_file_urls_below_the_folder_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "deep" / "a b.png"
    monkeypatch.chdir(folder)
    for reference in (str(path), path.as_uri(), "deep/a b.png", f"{folder}/deep/../deep/a b.png"):
        assert sources.read(reference, "image", local(folder)) == DATA
    (folder / "inner").symlink_to("deep")
    assert sources.read(f"{folder}/inner/a b.png", "image", local(folder)) == DATA


def test_paths_outside_are_refused_whether_they_exist_or_not(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "up").symlink_to(folder.parent)
    outside = [
        f"{folder.parent}/secret.png", f"{folder}/../secret.png", f"{folder}/link.png",
        f"{folder}/up/secret.png", "/etc/passwd", f"{folder.parent}/absent.png",
        f"{folder}secret.png", f"file://{folder.parent}/secret.png",
        f"file://localhost{folder}/../secret.png", f"file:{folder}/%2e%2e/secret.png",
    ]  # fmt: skip
    messages = {refused(one, local(folder)) for one in outside}
    assert messages == {"the path is not below allowed_local_media_path"}


def test_a_link_that_is_put_there_after_the_check_is_not_followed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = Path.resolve

    def late(self: Path, strict: bool = False) -> Path:
        found = resolve(self, strict)
        if self.name == "late" and not self.is_symlink():
            self.symlink_to(folder.parent / "secret.png")
        return found

    monkeypatch.setattr(Path, "resolve", late)
    assert "cannot be read" in refused(f"{folder}/late", local(folder))


def test_only_files_are_read(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    assert "not a file" in refused(f"{folder}/pipe", local(folder))
    assert "not a file" in refused(f"{folder}/deep", local(folder))
    assert "not a file" in refused(str(folder), local(folder))
    assert "cannot be read" in refused(f"{folder}/absent", local(folder))


def test_reading_leaves_no_file_open(folder: Path) -> None:
    before = len(os.listdir("/dev/fd"))
    for name in ("deep/a b.png", "deep", "absent", "deep/absent", "deep/a b.png/x", ""):
        with contextlib.suppress(ValueError):
            sources.read(f"{folder}/{name}", "image", local(folder))
    assert len(os.listdir("/dev/fd")) == before


def test_local_files_have_a_limit_in_bytes(folder: Path) -> None:
    path = str(folder / "deep" / "a b.png")
    assert sources.read(path, "image", local(folder, max_item_bytes=len(DATA))) == DATA
    message = refused(path, local(folder, max_item_bytes=len(DATA) - 1))
    assert message == "the local file has more than 1023 bytes"


@pytest.mark.parametrize(
    "url", ["ftp://example.com/a.png", "gopher://x/", "s3://bucket/a", "file://host/a.png"]
)
def test_other_schemes_are_refused(url: str, folder: Path) -> None:
    assert "example" not in refused(url, local(folder))


def test_remote_urls_are_refused_by_default() -> None:
    for url in ("https://example.com/a.png", "http://example.com/a.png", "HTTPS://example.com"):
        assert "allowed_media_domains is empty" in refused(url, MediaOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_image_pixels": 0}, "max_image_pixels is 0: it must be a whole number, at least 1"),
        ({"media_timeout_s": 0}, "media_timeout_s is 0"),
        ({"media_cache_bytes": -1}, "media_cache_bytes is -1: .* at least 0"),
        ({"allowed_media_domains": ("https://a",)}, "allowed_media_domains has 'https://a'"),
        ({"allowed_media_domains": ("*.example.com",)}, "allowed_media_domains has"),
        ({"allowed_local_media_path": Path("/absent/folder")}, "it must be a folder"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MediaOptions(**options)  # type: ignore[arg-type]
