"""What npugraph_ex makes of the engine's steps: captures, code, and its place in a process."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.compile.lower import npugraph_ex
from tests.npu.host import Host
from tests.npu.test_cache import run as run_process

NUM_LAYERS = 2
SIZES: dict[str, Any] = {
    "max_num_seqs": 3,
    "graph_batch_sizes": (2, 3),
    "num_kvcache_blocks": 7,
    "max_model_len": 256,
    "max_num_batched_tokens": 16,
    "npu_graph_mode": "npugraph_ex",
}


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The code of every program that npugraph_ex makes from now on."""
    found: list[str] = []
    original = npugraph_ex.generate

    def generate(*args: Any) -> str:
        found.append(original(*args))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(npugraph_ex, "generate", generate)
        yield found


class Started(NamedTuple):
    llm: LLM
    codes: list[str]  # of the start; those of later steps follow
    num_codes: int  # of the start
    counters: dict[str, int]  # npugraph_ex's own, at the end of the start
    counting: dict[str, int]  # the same, with what follows


@pytest.fixture(scope="module")
def started(host: Host, shallow: str) -> Iterator[Started]:
    from torch._dynamo.utils import counters

    counting = counters["npugraph_ex"]
    counting.clear()
    with recorded() as codes:
        llm = LLM(shallow, device="npu", **SIZES)
        yield Started(llm, codes, len(codes), dict(counting), counting)
    llm.close()


def test_each_decode_bucket_is_captured_once(started: Started, host: Host) -> None:
    """Steps of changing rows and lengths capture nothing, copy no input, and lower nothing."""
    llm, codes, _, at_start, counters = started
    num_codes_before = len(codes)
    assert set(at_start.values()) == {1} and len(at_start) == 2
    assert all(name.startswith("captured_") for name in at_start)
    before = Counter(counters)
    host.seen.clear()
    params = [
        SamplingParams(temperature=0.0, max_tokens=num, ignore_eos=True) for num in (30, 12, 5, 7)
    ]
    prompts = [list(range(5, 5 + length)) for length in (1, 19, 3, 2)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [len(output["token_ids"]) for output in outputs] == [30, 12, 5, 7]
    assert Counter(counters) == before
    assert "aten::_foreach_copy_" not in host.seen
    assert len(codes) == num_codes_before


def test_decode_programs_write_in_place_and_take_lengths(started: Started) -> None:
    """The other programs run op by op, without a capture."""
    codes = started.codes[: started.num_codes]
    decode = [code for code in codes if "actual_seq_lengths_kv" in code]
    assert len(decode) == 2 and len(codes) > 3
    for code, num_rows in zip(sorted(decode, key=len), (2, 3)):
        assert 'compile_configs["force_eager"] = False' in code
        forward = code[: code.index("compile_configs")]
        assert forward.count("npu_scatter_nd_update_.default(") == 2 * NUM_LAYERS
        assert forward.count("aten.index_copy_.default(") == 2  # tokens and positions of the state
        for copy in (
            "npu_scatter_nd_update.default(",
            "aten.copy_.default(",
            "aten.clone.default(",
        ):
            assert copy not in forward, copy
        lengths = set(re.findall(r"'actual_seq_lengths_kv': \[([^]]*)\]", forward))
        assert len(lengths) == 1 and len(lengths.pop().split(",")) == num_rows
        (weights,) = re.findall(r"parameter_user_inputs=\[([^]]*)\]", code)
        assert len(weights.split(",")) == 3 + 8 * NUM_LAYERS
        assert (
            len(re.findall(r"updated_param_name=\['actual_seq_lengths_kv'\]", code)) == NUM_LAYERS
        )
    for code in codes:
        if code not in decode:
            assert 'compile_configs["force_eager"] = True' in code


def test_a_graph_may_be_freed_while_another_is_captured(host: Host) -> None:
    """Garbage collection frees the graphs of a closed engine at any time."""
    from torch_npu import npu

    earlier, later = npu.NPUGraph(), npu.NPUGraph()
    with npu.graph(earlier):
        pass
    with npu.graph(later):
        earlier.reset()


def test_options_reach_npugraph_ex(shallow: str) -> None:
    options = {"remove_noop_ops": False}
    sizes = {**SIZES, "graph_batch_sizes": (3,)}
    with recorded() as codes:
        LLM(shallow, device="npu", **sizes, npu_graph_options=options).close()
    assert codes and all('compile_configs["remove_noop_ops"] = False' in code for code in codes)


def test_all_captures_share_a_memory_pool(started: Started) -> None:
    decode = [
        code for code in started.codes[: started.num_codes] if "actual_seq_lengths_kv" in code
    ]
    pools = {line for code in decode for line in re.findall(r"^    pool=(.*),$", code, re.M)}
    assert len(pools) == 1 and pools != {"None"}, pools


SCRIPT = """
import json, signal
from nanovllm import LLM, SamplingParams
sizes = json.loads({sizes!r})
found = []
for mode in ("npugraph_ex", "ascend_ir"):
    llm = LLM({model!r}, device="npu", **{{**sizes, "npu_graph_mode": mode}})
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    found.append([out["token_ids"] for out in llm.generate([[5, 6, 7]], params, use_tqdm=False)])
    llm.close()
is_own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
print(json.dumps({{"tokens": found, "interrupts": is_own}}))
"""


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory, shallow: str) -> dict[str, Any]:
    """A process with two engines, first in this mode."""
    sizes = json.dumps({**SIZES, "graph_batch_sizes": (3,)})
    out = run_process(
        ["-c", SCRIPT.format(sizes=sizes, model=shallow)],
        NANOVLLM_CACHE=str(tmp_path_factory.mktemp("store")),
    )
    return json.loads(out.splitlines()[-1])


def test_an_engine_in_another_mode_can_follow(process: dict[str, Any]) -> None:
    first, second = process["tokens"]
    assert first == second


def test_ctrl_c_still_raises_keyboard_interrupt(process: dict[str, Any]) -> None:
    """torchair and npugraph_ex replace the handler when they are imported."""
    assert process["interrupts"]
