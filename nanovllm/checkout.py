"""Explains how to repair a checkout without the package's symlinks. setup.py runs this file too."""

from __future__ import annotations

from pathlib import Path

LINKS = ("compile", "kernels")  # to the folders of these names beside the package


def problem() -> str:
    """Why this copy of the package cannot work, and how to repair it; "" if nothing is wrong.

    git on Windows and some archives turn a symlink into a text file.
    """
    package = Path(__file__).parent
    broken = [name for name in LINKS if not (package / name).is_dir()]
    if not broken:
        return ""
    names = " and ".join(f"nanovllm/{name}" for name in broken)
    links = " nanovllm/".join(LINKS)
    return (
        f"{names} in {package.parent} must be links to the folders of these names beside nanovllm, "
        "but this copy was made without symlinks. In a git clone, run: "
        f"git config core.symlinks true && git checkout-index --force nanovllm/{links} "
        "(on Windows this needs developer mode or an administrator). Without git, replace each of "
        "them with a copy of its folder."
    )
