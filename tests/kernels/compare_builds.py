"""Compares the code of the Triton kernels of two revisions, for every case of `builds.py`.

    python -m tests.kernels.compare_builds write FOLDER [TARGET …]    # in a checkout of each
    python -m tests.kernels.compare_builds show FOLDER OTHER_FOLDER

`write` compiles the cases for the targets, or for all of them, and keeps their PTX or AMD assembly
without comments, line numbers and the kernels' names. `show` prints for each target how many cases
are equal, and those that are not. Cases are compared in their order, so they may be renamed. Both
checkouts must have the same cases. No GPU is needed; all targets take minutes on two cores.
"""

from __future__ import annotations

import gc
import multiprocessing
import re
import sys
from pathlib import Path

from tests.kernels import builds, compile_builds

# Lines that depend on the sources' text alone: comments, line numbers, labels of debug information.
_DROPPED = re.compile(
    r"\s*(//|;|\.loc\b|\.file\b|\.ident\b|\$L__tmp\d+:|\.Ltmp\d+:|\.Lfunc_\w+\d+:|$)"
)


def stripped(text: str, kernel: str) -> str:
    """Assembly without what a change of names, comments or line numbers changes."""
    lines = re.sub(rf"\b{re.escape(kernel)}", "KERNEL", text).splitlines()
    return "\n".join(re.sub(r"\s*//.*$", "", line) for line in lines if not _DROPPED.match(line))


def write(folder: Path, name: str) -> None:
    """Compile the cases of a target into files `NUMBER KERNEL.txt` whose first line is the case."""
    from triton import knobs
    from triton.runtime import driver

    target = builds.TARGETS[name]
    driver.set_active(compile_builds.AbsentDevice(target))  # type: ignore[arg-type]
    knobs.compilation.disable_line_info = True
    (folder / name).mkdir(parents=True)
    for number, build in enumerate(builds.all_builds(name)):
        compiled = compile_builds.compile_build(build, target)
        kernel = build.kernel.__name__
        text = stripped(compiled.asm.get("ptx") or compiled.asm["amdgcn"], kernel)
        path = folder / name / f"{number:03} {kernel}.txt"
        path.write_text(f"{build.name}\n{text}\n", encoding="utf-8")


def cases(folder: Path) -> list[tuple[str, str]]:
    """(case, code) of a target."""
    texts = (path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt")))
    return [(case, code) for case, _, code in (text.partition("\n") for text in texts)]


def show(folder: Path, other: Path) -> None:
    """Print the numbers of equal cases, and the names of the others."""
    for path in sorted(folder.iterdir()):
        ours, theirs = cases(path), cases(other / path.name)
        if len(ours) != len(theirs):
            raise ValueError(f"{path.name} has {len(ours)} cases, and {len(theirs)} in {other}")
        differ = [ours[i][0] for i in range(len(ours)) if ours[i][1] != theirs[i][1]]
        print(f"{path.name}: {len(ours) - len(differ)} of {len(ours)} are equal")
        for case in differ:
            print(f"  differs: {case}")


def main(command: str, folder: str, *rest: str) -> None:
    if command == "show":
        show(Path(folder), Path(rest[0]))
        return
    names = rest or tuple(builds.TARGETS)
    for name in names:
        assert list(builds.all_builds(name))  # imports all kernels before the forks
    gc.freeze()
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        pool.starmap(write, [(Path(folder), name) for name in names], chunksize=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
