"""What is checked of structured outputs before an engine sees them, and how they travel."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.replicas import messages
from nanovllm.replicas.messages import Add
from nanovllm.sampling import BeamSearchParams
from nanovllm.structured import grammar_sandbox_program, library
from nanovllm.structured.schema_check import KNOWN, checked_schema
from nanovllm.structured_params import StructuredOutputsParams
from nanovllm.tokenizer import Tokenizer

FORMS = (
    {"json": {"type": "object", "properties": {"é": {"enum": [1, None]}}}},
    {"json": '{"type": "null"}', "disable_any_whitespace": True},
    {"json_object": True, "whitespace_pattern": " "},
    {"regex": r"\d+"},
    {"choice": ["a", 'b"']},
    {"grammar": 'start: "a"', "disable_fallback": True},
)


@pytest.mark.parametrize("given", FORMS)
def test_replicas_get_the_same_parameters(given: dict[str, object]) -> None:
    params = SamplingParams(structured_outputs=given)  # type: ignore[arg-type]
    fields = messages.packed_params(params, detokenizes=True)
    add = Add([1], [0], [2], fields, incremental=False, priority=0, cache_salt=None)
    found = messages.load_request(messages.load_add(messages.dump(add)), b"").params
    assert asdict(found)["structured_outputs"] == asdict(params)["structured_outputs"]
    sources = [library.source(one.structured_outputs, 999) for one in (found, params)]  # type: ignore[arg-type]
    assert sources[0] == sources[1]


def test_the_class_and_a_dict_are_the_same() -> None:
    given = StructuredOutputsParams(regex="a+")
    params = SamplingParams(structured_outputs=given)
    assert params == SamplingParams(structured_outputs={"regex": "a+"})  # type: ignore[arg-type]
    assert params.clone() == params and params.is_structured
    with pytest.raises(TypeError, match="structured_outputs"):
        BeamSearchParams(2, 3, structured_outputs=given)  # type: ignore[call-arg]


def test_a_schema_as_text_is_measured_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    params = StructuredOutputsParams(json='{"enum": ["é"]}')
    assert library.source(params, 16).kind == "json"
    monkeypatch.setattr("nanovllm.structured_params.json.loads", None)
    with pytest.raises(ValueError, match="json has 16 bytes: at most 15 are allowed"):
        library.source(params, 15)


def test_a_missing_library_is_said_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    intake = InputProcessor("model", Tokenizer(lambda: None), 8, 8, 8, max_grammar_bytes=99)
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
    assert intake.source(params) is not None and intake.source(SamplingParams()) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"llguidance, .* pip install .*\[structured\]"):
        intake.source(params)


def test_a_model_without_a_tokenizer_refuses_them() -> None:
    intake = InputProcessor("some model", None, 8, 8, 8, max_grammar_bytes=99)
    with pytest.raises(ValueError, match="needs a tokenizer: 'some model' does not have one"):
        intake.source(SamplingParams(structured_outputs=StructuredOutputsParams(regex="a")))


def test_a_tokenizer_without_a_tokenizer_json_ends_the_request(tmp_path: Path) -> None:
    class Slow:
        all_special_ids: tuple[int, ...] = ()

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [1, 2]

        def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
            return "a" * len(token_ids)

        def convert_tokens_to_ids(self, token: str) -> None:
            return None

    llm = LLM("tiny-qwen3", device="cpu", enforce_eager=True, max_num_seqs=2, max_model_len=64)
    llm.tokenizer = Slow()
    (output,) = llm.generate(
        "a",
        SamplingParams(structured_outputs={"regex": "a"}),
        use_tqdm=False,  # type: ignore[arg-type]
    )
    assert output["finish_reason"] == "error" and "no tokenizer.json" in output["error"]


def test_annotations_are_allowed_and_formats_are_strict() -> None:
    schema = {"title": "T", "x-order": 3, "type": "string", "format": "date"}
    found = checked_schema(schema)
    assert found["x-order"] == 3 and len(found["allOf"]) == 2 and "allOf" not in schema
    assert checked_schema({"enum": [{"not": 1}], "default": {"if": 2}, "const": {"not": 3}})
    assert "not" not in KNOWN


def test_a_trial_knows_bytes_and_special_tokens() -> None:
    tokenizer = grammar_sandbox_program.new_tokenizer({3: "<|im_end|>", 700: "<tool>"})
    named = library.Source("grammar", 'start: "ü" <tool>')
    assert "error" not in grammar_sandbox_program.tried(tokenizer, named)
    assert (
        "unknown special"
        in grammar_sandbox_program.tried(tokenizer, named._replace(text="start: <x>"))["error"]
    )
