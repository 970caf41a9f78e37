"""What crosses between processes comes back as it was."""

from __future__ import annotations

import math
from dataclasses import replace

from nanovllm.engine.request import EngineRequest
from nanovllm.lora_request import LoRARequest
from nanovllm.replicas import messages
from nanovllm.replicas.messages import Add, Outputs, RowTokens
from nanovllm.sampling import RequestOutputKind, SamplingParams
from nanovllm.schedule.logprobs import Logprob
from nanovllm.schedule.outputs import FinishedOutput, OutputDelta


def crossed(params: SamplingParams, *, detokenizes: bool = True) -> SamplingParams:
    fields = messages.packed_params(params, detokenizes=detokenizes)
    payload = messages.dump(Add([1], [2], [3], fields, False, 0, None))
    return messages.load_request(messages.load_add(payload), b"").params


def test_sampling_parameters_come_back() -> None:
    params = SamplingParams(
        temperature=0.3, top_p=0.9, max_tokens=None, stop=["é", "\ud800x"],
        stop_token_ids=[3], logit_bias={7: -1.5}, allowed_token_ids=[7, 8], bad_words=["a b"],
        logprobs=-1,
    )  # fmt: skip
    assert crossed(params) == params
    params.stop = None
    assert crossed(params, detokenizes=False) == params
    of_client = SamplingParams(
        truncate_prompt_tokens=5, output_kind=RequestOutputKind.DELTA, n=3, seed=-(2**63)
    )
    assert crossed(of_client) == SamplingParams(), "a message has a seed for each answer"


def test_an_adapter_comes_back_and_makes_other_digests() -> None:
    a, b = LoRARequest("a", 1, "/a"), LoRARequest("b", 2, "/b")

    def crossed_with(adapter: LoRARequest | None, salt: str | None = None) -> EngineRequest:
        fields = messages.packed_params(SamplingParams(), detokenizes=True)
        add = Add([1], [2], [3] * 16, fields, False, 0, salt, adapter=adapter)
        return messages.load_request(messages.load_add(messages.dump(add)), b"")

    found = [crossed_with(*one) for one in ((None,), (a,), (b,), (a, "s"), (None, "s"))]
    assert [one.adapter for one in found] == [None, a, b, a, None]
    assert len({one.block_digests(16)[0] for one in found}) == 5


def test_outputs_come_back() -> None:
    def top(value: float) -> dict[int, Logprob]:
        return {4: Logprob(value, 1, 4, None), 2: Logprob(-math.inf, 9, 2, None)}

    positions = [top(-0.1), top(1 / 3)]
    growing = OutputDelta(5, [1, 2], "é\ud800", positions)
    done = FinishedOutput(
        "t", [1], "error", 7, [8, 9], 16, positions, [None, top(-2.0)], "why \ud800"
    )
    rows = [messages.row(1, growing, incremental=True),
            messages.row(2, OutputDelta(6, [], "", None, done), incremental=False)]  # fmt: skip
    payload = messages.dump(Outputs([], [], rows))
    first, last = messages.load_outputs(payload).rows
    assert (first.token_ids, messages.text_of(first)) == ([1, 2], "é\ud800")
    found = messages.logprobs(first.logprobs, None)
    assert found == positions and found[1][2].rank == 9
    assert list(found[1]) == [4, 2], "the order is kept"
    assert last.done is not None
    whole = messages.completion(last.done, last, [8, 9], None)
    assert whole == replace(done, error="why ?")


def test_a_row_grows_without_a_copy_of_what_it_has() -> None:
    row = RowTokens(7, [1], [[(1, -0.5, 1)]], None, bytearray(b"a"))
    had = row.token_ids, row.logprobs, row.text
    row.extend(RowTokens(7, [2], [[(2, -1.5, 1)]], None, bytearray("ä".encode())))
    assert (row.token_ids, messages.text_of(row)) == ([1, 2], "aä")
    assert row.logprobs == [[(1, -0.5, 1)], [(2, -1.5, 1)]]
    assert row.token_ids is had[0] and row.logprobs is had[1] and row.text is had[2]
