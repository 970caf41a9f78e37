"""A plan as the store keeps it: a start that finds it does not trace.

It is JSON, and so is the reason why there is no plan.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from nanovllm.compile.lower.persistent.plan import Plan, Unfit
from nanovllm.kernels.cuda import persistent
from nanovllm.kernels.cuda.persistent import CodeFormat, Experts

KIND = "plan"  # of artifacts
SCALES = {str(dtype): dtype for dtype in persistent.SCALES}

Fields = TypeVar("Fields", Plan, Experts, CodeFormat)


def dump(found: Plan | Unfit) -> bytes:
    if isinstance(found, Unfit):
        return json.dumps({"unfit": str(found)}).encode()
    values = found._asdict()
    if found.experts is not None:
        values["experts"] = found.experts._asdict()
    if found.codes is not None:
        values["codes"] = {**found.codes._asdict(), "scale": str(found.codes.scale)}
    return json.dumps(values).encode()


def load(content: bytes) -> Plan | Unfit:
    """What was dumped. Raises ValueError for anything else."""
    values = json.loads(content)
    if isinstance(values, dict) and set(values) == {"unfit"}:
        return Unfit(values["unfit"])
    plan = _filled(Plan, values)
    experts: Any = plan.experts  # as JSON still
    codes: Any = plan.codes
    if experts is not None:
        plan = plan._replace(experts=_filled(Experts, experts))
    if codes is not None:
        codes = _filled(CodeFormat, codes)
        if codes.scale not in SCALES:
            raise ValueError(f"scales are in {codes.scale!r}")
        plan = plan._replace(codes=codes._replace(scale=SCALES[codes.scale]))
    return plan


def _filled(form: type[Fields], values: Any) -> Fields:
    if not isinstance(values, dict) or set(values) != set(form._fields):
        raise ValueError(f"it has other fields than {form.__name__}")
    return form(**values)
