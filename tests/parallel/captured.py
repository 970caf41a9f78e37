"""Collectives within a captured CUDA graph, as every rank of a test runs them."""

from __future__ import annotations

import torch

from nanovllm.parallel.group import Group


def captured_sums(group: Group, num: int) -> list[list[float]]:
    """What three replays of one graph give: sums of `num` numbers, then a gathered first number.

    The numbers of replay i are those of `inputs`.
    """
    with torch.cuda.device(group.device):
        x = torch.zeros(num, device=group.device)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            group.all_reduce(x.clone())
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            total = group.all_reduce(x * 1)
            first = group.all_gather(x[:1])
        found = []
        for i in range(3):
            x.copy_(inputs(group.rank, i, num))
            graph.replay()
            found.append([*total.tolist(), *first.flatten().tolist()])
        del graph  # before the group ends
        torch.cuda.synchronize()
    return found


def inputs(rank: int, i: int, num: int) -> torch.Tensor:
    return torch.arange(num) * (rank + 1.0) + i
