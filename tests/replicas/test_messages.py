"""What crosses between processes comes back as it was."""

from __future__ import annotations

import json
import math

from nanovllm.replicas import messages
from nanovllm.sampling import RequestOutputKind, SamplingParams
from nanovllm.schedule.logprobs import Logprob
from nanovllm.schedule.outputs import Completion, Increment


def test_sampling_parameters_come_back() -> None:
    params = SamplingParams(
        temperature=0.3, top_p=0.9, seed=-(2**63), max_tokens=None, stop=["é", "\ud800x"],
        stop_token_ids=[3], logit_bias={7: -1.5}, allowed_token_ids=[7, 8], bad_words=["a b"],
        logprobs=-1,
    )  # fmt: skip
    fields = json.loads(json.dumps(messages.params_fields(params)))
    assert SamplingParams(**fields) == params
    of_front = SamplingParams(truncate_prompt_tokens=5, output_kind=RequestOutputKind.DELTA)
    assert SamplingParams(**messages.params_fields(of_front)) == SamplingParams()


def test_outputs_come_back() -> None:
    def top(value: float) -> dict[int, Logprob]:
        return {4: Logprob(value, 1, 4, None), 2: Logprob(-math.inf, 9, 2, None)}

    positions = [top(-0.1), top(1 / 3)]
    growing = Increment(5, [1, 2], "é\ud800", positions)
    done = Completion("t", [1], "error", 7, [8, 9], 16, positions, [None, top(-2.0)], "why")
    last = Increment(6, [], "", None, done)
    found = [
        messages.increment(one, [8, 9], None)
        for one in messages.outputs(messages.dump_outputs([growing, last]))
    ]
    assert found == [growing, last]
    assert found[0].logprobs is not None and found[0].logprobs[1][2].rank == 9
    assert list(found[0].logprobs[1]) == [4, 2], "the order is kept"
