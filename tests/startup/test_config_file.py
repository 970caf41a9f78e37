"""config.json with the user's overrides: what they change, and how a mistake is reported."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, EngineConfig, SamplingParams
from nanovllm.startup.compile_farm.worker_handle import worker_command
from nanovllm.startup.config_file import overridden, transformers_config
from nanovllm.startup.generation_config import eos_token_ids
from tests.conftest import save_tiny
from tests.models.harness import engine_logits, load, max_difference, sequences, transformers_logits

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "sliding_window": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny", max_position_embeddings=64)


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# hf_overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_overrides_are_as_if_they_were_in_the_file(name: str, folder: Path) -> None:
    known = sequences(512, (99, 103), (201, 256))
    overrides = {name: YARN, "rms_norm_eps": 0.01}
    options: dict[str, Any] = {"enforce_eager": True, "max_model_len": 256}
    found = engine_logits(load(folder, "cpu", hf_overrides=overrides, **options), known)
    theta = json.loads((folder / "config.json").read_text())["rope_parameters"]["rope_theta"]
    rewrite(folder, rope_parameters={"rope_theta": theta, **YARN}, rms_norm_eps=0.01)
    assert max_difference(found, transformers_logits(folder, known, "cpu")) <= 1e-4


def test_the_call_of_qwen3_s_model_card_reaches_131072_positions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = str(save_tiny(tmp_path, max_position_embeddings=40960))
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    llm = LLM(
        model, hf_overrides={"rope_scaling": scaling}, max_model_len=131072, device="cpu",
        enforce_eager=True, max_num_seqs=1, num_kvcache_blocks=1 + 131072 // 32,
    )  # fmt: skip
    assert llm.engine.max_model_len == 131072
    assert "lowered" not in caplog.text
    (output,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert len(output["token_ids"]) == 3


def test_overrides_hold_at_the_second_start(folder: Path, device: str, tmp_path: Path) -> None:
    """The second start finds the config in the store."""
    options: dict[str, Any] = {
        "hf_overrides": {"rms_norm_eps": 0.01, "rope_theta": 50.0}, "enforce_eager": True,
        "max_num_seqs": 1, "num_kvcache_blocks": 9, "kvcache_block_size": 16, "device": device,
        "compile_cache": tmp_path / "store",
    }  # fmt: skip
    first, again = LLM(str(folder), **options), LLM(str(folder), **options)
    plain = LLM(str(folder), **{**options, "hf_overrides": None})
    models = [llm.engine.runner.model for llm in (first, again, plain)]
    assert models[0] == models[1] != models[2]
    assert models[1].config.norm_eps == 0.01
    assert models[1].config.inv_freq != models[2].config.inv_freq


def test_workers_get_the_overrides() -> None:
    config = EngineConfig("tiny-qwen3", hf_overrides={"rope_scaling": YARN})
    assert EngineConfig(**json.loads(worker_command(config)[-1])) == config


@pytest.mark.parametrize(
    ("stored", "overrides", "expected"),
    [
        ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 4}}, {"a": 1, "b": {"c": 4, "d": 3}}),
        ({"rope_parameters": {"rope_theta": 5}}, {"rope_theta": 7},
         {"rope_parameters": {"rope_theta": 7}}),
        ({"rope_theta": 5, "rope_scaling": None}, {"rope_scaling": {"type": "linear", "factor": 2}},
         {"rope_parameters": {"rope_theta": 5, "rope_type": "linear", "factor": 2}}),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_parameters": {"factor": 3}},
         {"rope_parameters": {"rope_type": "linear", "factor": 3}}),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, {"rope_scaling": None},
         {"rope_parameters": {"rope_type": "default", "factor": 2}}),
        ({"original_max_position_embeddings": 4},
         {"rope_scaling": {"original_max_position_embeddings": 8}},
         {"rope_parameters": {"original_max_position_embeddings": 8}}),
        ({"torch_dtype": "float16"}, {"dtype": "float32"}, {"dtype": "float32"}),
        ({"dtype": "float16"}, {"torch_dtype": "float32"}, {"dtype": "float32"}),
    ],
    ids=str,
)  # fmt: skip
def test_an_override_meets_what_it_replaces_under_any_name(
    stored: dict[str, Any], overrides: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert overridden(stored, overrides) == expected


LINEAR = {"rope_type": "linear", "factor": 8.0}
FLAT_GEMMA3 = ("gemma3_text", "Gemma3ForCausalLM", {
    "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": LINEAR})  # fmt: skip
FLAT_OLMO3 = ("olmo3", "Olmo3ForCausalLM", {"rope_theta": 5e5, "rope_scaling": YARN})
NESTED_GEMMA3 = ("gemma3_text", "Gemma3ForCausalLM", {"rope_parameters": {
    "full_attention": {"rope_theta": 1e6, **LINEAR},
    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}})  # fmt: skip


@pytest.mark.parametrize(
    ("stored", "overrides", "full", "sliding"),
    [
        (FLAT_GEMMA3, {}, {}, {}),
        (FLAT_OLMO3, {}, {}, {}),
        (NESTED_GEMMA3, {}, {}, {}),
        (FLAT_GEMMA3, {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"factor": 2.0}, {}),
        (FLAT_GEMMA3, {"rope_theta": 2e6, "rope_local_base_freq": 5.0},
         {"rope_theta": 2e6}, {"rope_theta": 5.0}),
        (FLAT_GEMMA3, {"rope_parameters": {"sliding_attention": {"rope_theta": 5.0}}},
         {}, {"rope_theta": 5.0}),
        (FLAT_OLMO3, {"rope_parameters": {"full_attention": {"factor": 2.0}}}, {"factor": 2.0}, {}),
        (NESTED_GEMMA3, {"rope_theta": 2e6}, {"rope_theta": 2e6}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_overrides_of_a_model_with_ropes_per_layer_type(
    stored: tuple[str, str, dict[str, Any]], overrides: dict[str, Any], full: dict[str, Any],
    sliding: dict[str, Any], tmp_path: Path,
) -> None:  # fmt: skip
    """Other fields leave the rope parameters as they are, and those merge by layer type."""
    model_type, architecture, rope = stored
    folder = save_tiny(tmp_path / "tiny", model_type, **SMALL)
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"architectures": [architecture], **rope}
    if "rope_parameters" not in rope:
        del fields["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(fields))
    plain = transformers_config(folder, {})
    found = transformers_config(folder, {"max_position_embeddings": 512, **overrides})
    assert found.max_position_embeddings == 512
    types = (("full_attention", full), ("sliding_attention", sliding))
    assert found.rope_parameters == {
        name: plain.rope_parameters[name] | changes for name, changes in types
    }
    runner = load(
        folder, "cpu", enforce_eager=True, hf_overrides=overrides or {"rms_norm_eps": 0.1}
    )
    assert len(runner.model.config.other_ropes) == 1


def test_rope_overrides_per_layer_type_that_cannot_be_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny", "gemma3_text", **SMALL)
    huge = {"rope_theta": 1 << 70}
    for name in ("rope_parameters", "rope_scaling"):
        for value, message in (([1], f"{name} .* it must be a dict"), (huge, "at most")):
            with pytest.raises(ValueError, match=message):
                transformers_config(folder, {name: value})


def test_an_override_that_the_config_has_no_field_for_is_refused(folder: Path) -> None:
    message = (
        "hf_overrides has 'rope_theata', which is not a field of Qwen3Config: use one of .*rope"
    )
    with pytest.raises(ValueError, match=message):
        transformers_config(folder / "config.json", {"rope_theata": 5.0})


@pytest.mark.parametrize("value", [[("a", 1)], "{}", {"dtype": torch.float16}, {"a": {1, 2}}])
def test_overrides_that_are_no_json_object_are_refused(
    value: Any, make_llm: Callable[..., LLM]
) -> None:
    with pytest.raises(ValueError, match=r"hf_overrides is .*: it must be a dict of fields"):
        make_llm(hf_overrides=value)


# max_model_len -----------------------------------------------------------------------------------


def test_a_length_beyond_the_limit_is_lowered_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    runner = load(folder, "cpu", enforce_eager=True, max_model_len=6416)
    assert runner.layout.max_model_len == 64
    assert "max_model_len is lowered from 6416 to 64, the longest sequence" in caplog.text
    hint = caplog.text.partition("hf_overrides=")[2].splitlines()[0]
    longer = load(folder, "cpu", enforce_eager=True, max_model_len=6416, hf_overrides=eval(hint))
    assert longer.layout.max_model_len == 6416


# mistakes ----------------------------------------------------------------------------------------


def problem(folder: Path) -> str:
    """The message of the error, which is one line and names the file."""
    with pytest.raises(ValueError) as caught:
        transformers_config(folder / "config.json", {})
    message = str(caught.value)
    assert "\n" not in message and str(folder / "config.json") in message
    return message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is not JSON"),
        ("{'a': 1}", "is not JSON"),
        ("\xff", "is not JSON"),
        ("[]", "holds []: it must be an object"),
        ("null", "holds None: it must be an object"),
        ("{}", "architectures is None: it must be a list of names"),
        ('{"architectures": "Qwen3ForCausalLM"}', "architectures is 'Qwen3ForCausalLM': it must"),
        ('{"architectures": ["ElectraModel"]}', "architecture ['ElectraModel'] is not supported"),
        ('{"architectures": ["Own"], "auto_map": {}}', "its own code (auto_map) is not run"),
        ('{"architectures": ["Qwen3ForCausalLM"]}', "model_type is None, which transformers does"),
        (
            '{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen99"}',
            "model_type is 'qwen99', which transformers does not support",
        ),
    ],
)
def test_a_file_that_is_no_config_is_named(content: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    assert expected in problem(tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"eos_token_id": [2, None]}, "eos_token_id"),
        ({"hidden_size": "x"}, "hidden_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor"),
        ({"rope_parameters": [1]}, "rope_parameters"),
    ],
)
def test_a_value_that_transformers_refuses_is_named(
    changes: dict[str, Any], expected: str, folder: Path
) -> None:
    rewrite(folder, **changes)
    reason = problem(folder).partition("transformers refuses the config: ")[2]
    assert expected in reason


@pytest.mark.parametrize("value", [[2, None], "2", [2.0], True, [-1]])
def test_eos_ids_that_are_no_ids_are_named_with_their_file(value: Any, folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": value}))
    hf = transformers_config(folder / "config.json", {})
    with pytest.raises(ValueError) as caught:
        eos_token_ids(folder, hf)
    assert f"{path}: eos_token_id is {value!r}: it must be a token id" in str(caught.value)


def test_a_generation_config_that_is_no_json_is_named(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    hf = transformers_config(folder / "config.json", {})
    with pytest.raises(ValueError, match=r"generation_config\.json is not JSON"):
        eos_token_ids(folder, hf)
