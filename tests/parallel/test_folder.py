"""Private folders go with their processes, or when the next one is made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from nanovllm.parallel.folder import PrivateFolder

ROOT = Path(__file__).parents[2]
CODE = """if True:
    import sys, time
    from pathlib import Path
    from nanovllm.parallel.folder import PrivateFolder
    folder = PrivateFolder(Path(sys.argv[1]))
    (folder.path / "file").write_text("x")
    print(folder.path, flush=True)
    time.sleep(100)
    """


def test_the_folder_of_a_killed_process_is_removed_with_the_next_start(tmp_path: Path) -> None:
    for name in ("nanovllm-0", "nanovllm-cache", "another"):  # none of these folders
        (tmp_path / name).mkdir()
    (tmp_path / "nanovllm-link").symlink_to(tmp_path / "another")
    (tmp_path / "another" / ".in-use").touch()
    others = set(tmp_path.iterdir())
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, str(tmp_path)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    theirs = Path(process.stdout.readline().strip())
    first = PrivateFolder(tmp_path)
    assert theirs.is_dir(), "its process runs"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert theirs.is_dir()
    second = PrivateFolder(tmp_path)
    assert set(tmp_path.iterdir()) == {*others, first.path, second.path}
    first.remove()
    second.remove()
    assert set(tmp_path.iterdir()) == others
