"""vLLM's offline examples, with the import changed: the same calls give answers here."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm import (
    LLM,
    EngineArgs,
    EngineConfig,
    LLMEngine,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    TextPrompt,
    TokensPrompt,
)
from tests.engines import assert_all_free

SMALL: dict[str, Any] = {"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 8}
PROMPTS = ["The word", "Sort 9 2 7.", "Reverse"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM(model="tiny-qwen3", dtype="float", block_size=16, disable_log_stats=True, **SMALL)
    yield llm
    llm.close()


@pytest.fixture
def engine(llm: LLM) -> Iterator[LLMEngine]:
    yield llm.llm_engine
    assert_all_free(llm)


# the examples -------------------------------------------------------------------------------------


def test_basic(llm: LLM) -> None:
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=1)
    outputs = llm.generate(PROMPTS, params)
    for prompt, output in zip(PROMPTS, outputs):
        assert output.prompt == prompt
        assert output.outputs[0].text == llm.get_tokenizer().decode(
            output.outputs[0].token_ids, skip_special_tokens=True
        )


def test_chat(llm: LLM) -> None:
    params = llm.get_default_sampling_params()
    params.max_tokens, params.temperature = 20, 0
    conversation = [
        {"role": "system", "content": "You answer."},
        {"role": "user", "content": "What is 37 + 45?"},
    ]
    outputs = llm.chat(conversation, params, use_tqdm=False)
    assert "82" in outputs[0].outputs[0].text and "37 + 45" in outputs[0].prompt
    several = llm.chat([conversation] * 3, sampling_params=params, use_tqdm=True)
    assert [output.outputs[0].text for output in several] == [outputs[0].outputs[0].text] * 3
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (output,) = llm.chat(conversation, params, use_tqdm=False, chat_template=template)
    assert output.prompt == "You answer.What is 37 + 45?"


def test_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=3, prompt_logprobs=2)
    (output,) = llm.generate(["What is"], params)
    for token_id, found in zip(output.outputs[0].token_ids, output.outputs[0].logprobs):
        best = max(found.values(), key=lambda one: one.logprob)
        assert best.rank == 1 and found[token_id] is best
        assert best.decoded_token == llm.get_tokenizer().decode([token_id])
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) > 1
    assert output.outputs[0].cumulative_logprob <= 0


def test_prefix_caching(llm: LLM) -> None:
    shared = "The following questions are asked in an exam about arithmetic and words. "
    prompts = [shared + prompt for prompt in PROMPTS]
    params = SamplingParams(temperature=0.0, max_tokens=5)
    llm.reset_prefix_cache()
    first = llm.generate(prompts[0], params)
    again = llm.generate(prompts, params)
    assert first[0].outputs[0].text == again[0].outputs[0].text
    assert first[0].num_cached_tokens == 0 and all(one.num_cached_tokens >= 16 for one in again)


def test_token_prompts_and_dicts(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5)
    ids = llm.get_tokenizer().encode("Sort 9")
    forms: list[Any] = [
        {"prompt_token_ids": ids}, TokensPrompt(prompt_token_ids=ids), TextPrompt(prompt="Sort 9"),
        {"prompt": "Sort 9"}, np.array(ids), torch.tensor(ids),
    ]  # fmt: skip
    texts = [llm.generate(form, params)[0].outputs[0].text for form in forms]
    texts += [one.outputs[0].text for one in llm.generate(forms, params)]
    texts += [llm.generate(prompt_token_ids=ids, sampling_params=params)[0].outputs[0].text]
    assert len(set(texts)) == 1


def run(engine: LLMEngine, requests: list[tuple[str, SamplingParams]]) -> list[RequestOutput]:
    """The loop of vLLM's example: a request is added before each step while there are any."""
    outputs: list[RequestOutput] = []
    waiting, number = list(requests), 0
    while waiting or engine.has_unfinished_requests():
        if waiting:
            prompt, params = waiting.pop(0)
            engine.add_request(str(number), prompt, params)
            number += 1
        outputs += engine.step()
    return outputs


def assert_close(found: Any, expected: Any) -> None:
    """Log-probabilities by token are equal, but for what another batch rounds differently."""
    assert len(found or ()) == len(expected or ())
    for one, other in zip(found or (), expected or ()):
        assert one == other or one == pytest.approx(other, abs=1e-4)


def test_streaming_with_the_engine(llm: LLM, engine: LLMEngine) -> None:
    requests = [
        ("A robot may", SamplingParams(temperature=0.0, logprobs=1, prompt_logprobs=1)),
        ("To be or", SamplingParams(temperature=0.8, top_k=5, presence_penalty=0.2, seed=3)),
        (
            "What is",
            SamplingParams(n=2, temperature=0.8, top_p=0.95, frequency_penalty=0.1, seed=4),
        ),
    ]
    outputs = run(engine, requests)
    finished = {output.request_id: output for output in outputs if output.finished}
    assert sorted(finished) == ["0", "1", "2"]
    expected = llm.generate([prompt for prompt, _ in requests], [one for _, one in requests])
    for number, output in enumerate(expected):
        found = finished[str(number)]
        assert found.prompt == requests[number][0] == output.prompt
        if requests[number][1].n == 1:  # the others have seeds of their own
            assert [a.text for a in found.outputs] == [a.text for a in output.outputs]
            assert_close(found.outputs[0].logprobs, output.outputs[0].logprobs)
        assert [a.index for a in found.outputs] == [a.index for a in output.outputs]
        assert_close(found.prompt_logprobs, output.prompt_logprobs)
        texts = [one.outputs[-1].text for one in outputs if one.request_id == str(number)]
        assert len(texts) > 2 and all(b.startswith(a) for a, b in pairwise(texts))


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_kinds_of_output(engine: LLMEngine, kind: RequestOutputKind) -> None:
    params = SamplingParams(
        temperature=0.7, seed=5, max_tokens=6, ignore_eos=True, logprobs=1, n=2, output_kind=kind
    )
    outputs = run(engine, [("The word", params)])
    if kind is RequestOutputKind.FINAL_ONLY:
        assert len(outputs) == 1 and outputs[0].finished
        return
    answers = [[one for o in outputs for one in o.outputs if one.index == i] for i in range(2)]
    for several in answers:
        assert [bool(one.finish_reason) for one in several[-1:]] == [True]
        if kind is RequestOutputKind.DELTA:
            assert sum(len(one.token_ids) for one in several) == 6
            assert sum(len(one.logprobs) for one in several) == 6
        else:
            assert len(several[-1].token_ids) == len(several[-1].logprobs) == 6


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_generate_between_steps_loses_no_output(llm: LLM, kind: RequestOutputKind) -> None:
    """`generate` runs the requests of `llm_engine` along, several steps at once."""
    params = SamplingParams(
        temperature=0.0, max_tokens=9, ignore_eos=True, logprobs=1, output_kind=kind
    )
    expected = llm.generate("The word", params)[0].outputs[0]
    llm.llm_engine.add_request("a", "The word", params)
    llm.llm_engine.step()
    llm.generate("Another", SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
    text, token_ids = "", []
    num_logprobs = 0
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            (answer,) = output.outputs
            if kind is not RequestOutputKind.DELTA:
                text, token_ids, num_logprobs = "", [], 0
            text, token_ids = text + answer.text, token_ids + answer.token_ids
            num_logprobs += len(answer.logprobs)
            if kind is RequestOutputKind.CUMULATIVE:
                assert token_ids == expected.token_ids[: len(token_ids)]
    # the first step's output, if it had one, is not read here
    assert expected.token_ids[-len(token_ids) :] == token_ids and expected.text.endswith(text)
    assert len(token_ids) == num_logprobs >= 8


def test_requests_are_aborted_and_refused_by_name(llm: LLM, engine: LLMEngine) -> None:
    params = SamplingParams(max_tokens=50)
    engine.add_request("a", "The", params)
    engine.add_request("b", "The", params, priority=-1)
    assert engine.get_num_unfinished_requests() == 2
    with pytest.raises(ValueError, match="request_id 'a' is in use"):
        engine.add_request("a", "The", params)
    with pytest.raises(ValueError, match="request_id is 5: it must be text"):
        engine.add_request(5, "The", params)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.add_request("c", [], params)
    engine.step()
    engine.abort_request(["a", "unknown"])
    assert {one.request_id for one in engine.step()} <= {"b"}
    engine.abort_request("b")
    assert not engine.has_unfinished_requests() and engine.step() == []
    assert {metric.name for metric in engine.get_metrics()} >= {"nanovllm:num_requests_running"}


# options ------------------------------------------------------------------------------------------


def test_engine_args_from_the_command_line() -> None:
    parser = EngineArgs.add_cli_args(argparse.ArgumentParser())
    parser.add_argument("--mine", type=int)
    words = "--model some/model --mine 3 --max-model-len 64 --enforce-eager --block-size 32 "
    words += "--graph-batch-sizes 1 2 --load-format dummy --gpu-memory-utilization 0.5 "
    words += '--npu-graph-options {"a":1} --no-enable-prefix-caching'
    args = EngineArgs.from_cli_args(parser.parse_args(words.split()))
    assert dataclasses.asdict(args) == dataclasses.asdict(
        EngineConfig(
            "some/model", max_model_len=64, enforce_eager=True, kvcache_block_size=32,
            graph_batch_sizes=(1, 2), random_weights=True, gpu_memory_utilization=0.5,
            tuning={"npu_graph_options": {"a": 1}}, enable_prefix_caching=False,
        )
    )  # fmt: skip
    assert EngineArgs.from_cli_args(parser.parse_args([])).model == "tiny-qwen3"


def test_an_engine_from_arguments(tmp_path: Path) -> None:
    args = EngineArgs(model="tiny-qwen3", dtype=torch.float32, load_format="auto", **SMALL)
    engine = LLMEngine.from_engine_args(args)
    (output,) = (
        one
        for one in run(engine, [("What is", SamplingParams(temperature=0, max_tokens=3))])
        if one.finished
    )
    engine.engine.close()
    llm = LLM(**dataclasses.asdict(args))
    assert llm.generate("What is", SamplingParams(temperature=0, max_tokens=3))[0].outputs[
        0
    ].text == (output.outputs[0].text)
    llm.close()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"block_size": 32}, {"kvcache_block_size": 32}),
        ({"num_gpu_blocks_override": 9}, {"num_kvcache_blocks": 9}),
        ({"cudagraph_capture_sizes": [1, 2]}, {"graph_batch_sizes": (1, 2)}),
        (
            {"enable_expert_parallel": True, "tensor_parallel_size": 2},
            {"expert_parallel": True, "tensor_parallel_size": 2},
        ),
        ({"enable_expert_parallel": False}, {"expert_parallel": False}),
        ({"mamba_ssm_cache_dtype": "bfloat16"}, {"state_dtype": "bfloat16"}),
        ({"load_format": "dummy"}, {"random_weights": True}),
        ({"load_format": "safetensors"}, {}),
        ({"dtype": "half"}, {"dtype": "float16"}),
        ({"dtype": "float"}, {"dtype": "float32"}),
        ({"dtype": torch.bfloat16}, {"dtype": "bfloat16"}),
        ({"kv_cache_dtype": "fp8_e4m3"}, {"kv_cache_dtype": "fp8"}),
        ({"seed": None, "enforce_eager": None}, {}),
        ({"trust_remote_code": False, "enable_chunked_prefill": True, "swap_space": 4}, {}),
        ({"pipeline_parallel_size": 1, "task": "generate", "tokenizer_mode": "auto"}, {}),
        ({"trust_remote_code": True}, {}),
        ({"swap_space": 4.0, "cpu_offload_gb": 0.0}, {}),
        ({"max_num_seqs": np.int64(4)}, {"max_num_seqs": 4}),
    ],
    ids=str,
)
def test_options_under_vllms_names(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    assert EngineConfig.from_options("m", theirs) == EngineConfig("m", **ours)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kv_cache_dtype": ["fp8"]}, "kv_cache_dtype is .*: it must be one of"),
        ({"trust_remote_code": 1}, "trust_remote_code is 1: only False is supported"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2: only 1 is supported"),
        ({"enable_chunked_prefill": False}, "enable_chunked_prefill is False: only True"),
        ({"load_format": "pt"}, "load_format is 'pt': use one of auto, safetensors, dummy"),
        ({"block_size": 32, "kvcache_block_size": 16}, "are the same option: use one of them"),
        ({"lora_dtype": "float32"}, "lora_dtype is 'float32': only 'auto' is supported"),
        ({"max_loras": 4}, "max_loras=4 needs enable_lora=True: there are no adapters"),
    ],
)
def test_other_values_are_refused_by_name(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        EngineConfig.from_options("m", options)


@pytest.mark.parametrize(
    ("options", "task"),
    [
        ({"runner": "pooling"}, "pooling"),
        ({"runner": "pooling", "convert": "embed"}, "embed"),
        ({"task": "embed", "runner": "auto"}, "embed"),
        ({"task": None, "convert": "none"}, "generate"),
        ({"runner": "generate"}, "generate"),
    ],
)
def test_vllms_options_of_pooling_choose_the_task(options: dict[str, Any], task: str) -> None:
    assert EngineConfig.from_options("m", options).task == task


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="task is 'generate', runner 'pooling'"):
        EngineConfig.from_options("m", {"task": "generate", "runner": "pooling"})
    with pytest.raises(ValueError, match="convert is 'x': it must be one of auto, none, embed"):
        EngineConfig.from_options("m", {"convert": "x"})
    given = {"pooling_type": "MEAN"}
    config = EngineConfig.from_options("m", {"task": "embed", "override_pooler_config": given})
    assert config.pooler_config == given
    with pytest.raises(ValueError, match="pooler_config needs a task that pools"):
        EngineConfig.from_options("m", {"pooler_config": given})
    with pytest.raises(ValueError, match="task='embed' does not go with enable_lora=True"):
        EngineConfig.from_options("m", {"task": "embed", "enable_lora": True})
