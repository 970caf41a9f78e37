"""Starts the other ranks of an engine; `rank_process` is the program of each of them."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm import env
from nanovllm.checks import to_options
from nanovllm.models.gguf.header import is_gguf, read

if TYPE_CHECKING:
    from nanovllm.parallel.group import Group
    from nanovllm.parallel.ranks import WorkerGroup
    from nanovllm.runner.pool_runner import PoolRunner
    from nanovllm.runner.runner import Runner
    from nanovllm.startup.resolve import ResolvedConfig

PROGRAM = "nanovllm.startup.rank_process"


class TPWorkerGroup:
    """The first rank's handle of the other ranks. Make it with `start`."""

    def __init__(self, resolved: ResolvedConfig, ranks: WorkerGroup) -> None:
        self._size, self._platform = resolved.shard.size, resolved.platform
        self.ranks = ranks
        self._group: Group | None = None

    def connect(self) -> Group:
        """The group of all ranks, once all of them have read their weights."""
        from nanovllm.parallel.group import Group

        ranks = self.ranks
        group = Group(
            0,
            self._size,
            self._platform.device,
            ranks.folder,
            ranks.check,
            self._platform.connect_peers,
        )
        self._group = group
        ranks.call_on_failure(lambda error: group.abort())
        return group

    def make_runner(self, *args: Any, **kwargs: Any) -> Runner:
        from nanovllm.runner.tp_driver import TPDriver

        return TPDriver(*args, followers=self, **kwargs)

    def make_pool_runner(self, *args: Any, **kwargs: Any) -> PoolRunner:
        from nanovllm.runner.pool_driver import PoolDriver

        return PoolDriver(*args, followers=self, **kwargs)

    def close(self) -> None:
        """End the other ranks and their processes."""
        self.ranks.close()
        if self._group is not None:
            self._group.close()


def start(resolved: ResolvedConfig) -> TPWorkerGroup:
    """Start the other ranks, which then read their parts of the weights.

    Raises ValueError for more ranks than devices. `TPWorkerGroup.connect` raises RankFailed, also
    for a rank that finds another checkpoint.
    """
    from nanovllm.parallel.ranks import WorkerGroup

    config, size, traits = resolved.config, resolved.shard.size, resolved.platform.traits
    if traits.max_ranks is not None and size > traits.max_ranks:
        raise ValueError(
            f"tensor_parallel_size is {size}, but this machine has {traits.max_ranks} "
            f"{traits.name} device(s) for it"
        )
    setup = {
        "options": to_options(config),
        "checkpoint": checkpoint_digest(resolved.folder),
        "environments": [
            resolved.platform.rank_environment(rank, env.for_children()) for rank in range(size)
        ],
    }
    resolved.platform.share_cores(size)
    return TPWorkerGroup(resolved, WorkerGroup.start(setup, size, PROGRAM))


def checkpoint_digest(folder: Path) -> str:
    """A digest of config.json, and of the names and sizes of the files with weights; that of the
    headers of a GGUF file, which have the sizes of tensors."""
    if is_gguf(folder):
        return read(folder).digest
    total = sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        total.update(f"{path.name}\0{path.stat().st_size}\n".encode())
    return total.hexdigest()
