"""The results of `server.py` as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# requests a second; all at once for those of the offline workload
LOADS = {"offline": float("inf"), "rate-20": 20.0, "rate-50": 50.0, "rate-inf": float("inf")}


def add_share(cases: dict[str, Any]) -> None:
    """Add the server's part of the offline throughput, once both are known."""
    offline, alone = cases.get("offline", {}), cases.get("throughput", {})
    if "output_throughput" in offline and "tokens_per_second" in alone:
        offline["share_of_throughput"] = offline["output_throughput"] / alone["tokens_per_second"]


def line(name: str, found: dict[str, Any]) -> str:
    """A case in one line."""
    if "error" in found:
        return f"{name:11} FAILED: {found['error']}"
    if name in LOADS:
        times = "; ".join(
            f"{title} p50 {found[f'p50_{key}_ms']:,.2f} p99 {found[f'p99_{key}_ms']:,.2f} ms"
            for title, key in (("first token", "ttft"), ("between tokens", "itl"))
        )
        rates = f"{found['output_throughput']:10,.0f} tok/s"
        if (steady := found.get("steady_output_throughput")) is not None:
            rates += f", {steady:,.0f} between its beginning and end"
        return f"{name:11} {rates}; {times}{_busiest(found.get('processes', ()))}"
    return f"{name:11} {SENTENCES[name](found)}"


def _busiest(processes: Sequence[dict[str, Any]]) -> str:
    """The greatest share of a core of the main threads of each kind of processes."""
    shares: dict[str, float] = {}
    for one in processes:
        shares[one["process"]] = max(one["busiest"], shares.get(one["process"], 0.0))
    return "".join(f"; {kind} {share:.0%} busy" for kind, share in shares.items())


def _start_sentence(found: dict[str, Any]) -> str:
    def several(name: str) -> str:
        values = found[name]
        return f"{found[f'{name}_median']:.2f} s ({min(values):.2f} to {max(values):.2f})"

    text = f"empty store {found['empty_store_s']:.2f} s, full {several('full_store_s')}"
    return text + (f", with bytecode {several('bytecode_s')}" if "bytecode_s" in found else "")


SENTENCES: dict[str, Callable[[dict[str, Any]], str]] = {
    "start": _start_sentence,
    "ends": lambda found: "; ".join(
        f"{name}: status {one['exit_status']} after {one['seconds']:.2f} s, nothing is left"
        for name, one in found.items()
    ),
    "throughput": lambda found: f"{found['tokens_per_second']:10,.0f} tok/s",
    "structured": lambda found: ", ".join(
        f"{name} {value:,.0f} tok/s" for name, value in found["tokens_per_second"].items()
    ),
}
