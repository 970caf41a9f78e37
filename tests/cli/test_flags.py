"""Flags are made from the fields, types and docstring of a class of options."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import pytest

from nanovllm.api.config import ServerConfig
from nanovllm.cli import serve
from nanovllm.cli.engine_options import add_engine_options, engine_config, engine_options
from nanovllm.config import EngineConfig
from nanovllm.flags import Parser, add_flags, documented, given
from nanovllm.option_names import ONE_VALUE, SAME_MEANING
from nanovllm.sampling import SamplingParams


@dataclass(frozen=True)
class Options:
    """Options of a test, 50 % of them numbers.

    first: a text: with a colon,
        and a second line of 100 %.
    low, high: two numbers.

    Not about an option: this.
    switch: on or off.
    """

    first: str = "a"
    low: int = 1
    high: float | None = None
    switch: bool = True
    negative: bool = False
    names: Sequence[str] = ()
    sizes: Sequence[int] | None = None
    table: Mapping[str, int] | None = None
    both: int | str | None = None
    three: bool | str = "auto"
    folder: str | PathLike[str] | None = None


def parser(options: type = Options) -> Parser:
    made = Parser(prog="tool")
    add_flags(made, options)
    return made


def read(*words: str) -> dict[str, Any]:
    return given(parser().parse_args(list(words)), Options)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {}),
        ("--first x=1", {"first": "x=1"}),
        ("--low 3 --high inf", {"low": 3, "high": float("inf")}),
        ("--no-switch --negative", {"switch": False, "negative": True}),
        ("--names a b", {"names": ["a", "b"]}),
        ("--sizes 1 19 --low=2", {"sizes": [1, 19], "low": 2}),
        ("--sizes", {"sizes": []}),
        ('--table {"a":1}', {"table": {"a": 1}}),
        ("--low 2k", {"low": 2000}),
        ("--low 2K", {"low": 2048}),
        ("--low 2.5k", {"low": 2500}),
        ("--low 3m --sizes 1k 1G", {"low": 3_000_000, "sizes": [1000, 1 << 30]}),
        ("--table a=1", {"table": {"a": 1}}),
        ("--table a=1,b=0.5,c=x=y", {"table": {"a": 1, "b": 0.5, "c": "x=y"}}),
        ("--both 5", {"both": 5}),
        ("--both 5GiB", {"both": "5GiB"}),
        ("--three", {"three": True}),
        ("--no-three", {"three": False}),
        ("--three auto", {"three": "auto"}),
        ("--three off", {"three": False}),
        ("--folder /x_y", {"folder": "/x_y"}),
    ],
)
def test_a_flag_reads_a_value_of_its_annotated_type(words: str, expected: dict[str, Any]) -> None:
    found = read(*words.split())
    assert found == expected
    assert list(map(type, found.values())) == list(map(type, expected.values()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lwo 3", "tool: error: unknown option --lwo: did you mean --low?"),
        ("--no_swich", "unknown option --no_swich: did you mean --no-switch?"),
        ("--zzz=3", "unknown option --zzz: see tool --help"),
        ("--fir x", "unknown option --fir: did you mean --first?"),
        ("--low x", "argument --low: 'x' is not a whole number, such as 4096, 4k (4000)"),
        ("--low 1.5", "argument --low: '1.5' is not a whole number"),
        ("--low 1.0005k", "argument --low: '1.0005k' is not a whole number"),
        ("--low 2.5K", "argument --low: '2.5K' is not a whole number"),
        ("--table a=1,b", "argument --table: 'a=1,b' is not JSON"),
        ("--table {", "argument --table: '{' is not JSON: Expecting property name"),
        ("--names", "argument --names: expected at least one argument"),
        ("--no-three auto", "--no-three takes no value"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_name(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        read(*words.split())
    err = capsys.readouterr().err
    assert ended.value.code == 2 and message in err and err.count("\n") == 1


def test_underscores_are_hyphens_in_names_and_stay_in_values() -> None:
    made = Parser()
    made.add_argument("--long-name")
    made.add_argument("rest", nargs="*")
    for words in (["--long_name", "a_b"], ["--long_name=a_b"], ["--long-name", "a_b"]):
        assert made.parse_args(words).long_name == "a_b"
    assert made.parse_args(["--", "--long_name"]).rest == ["--long_name"]
    assert made.parse_args(["--no such option"]).rest == ["--no such option"]


def test_help_is_the_text_of_the_docstring() -> None:
    texts = documented(Options)
    assert texts == {
        "first": "a text: with a colon, and a second line of 100 %.",
        "low": "two numbers.",
        "high": "two numbers.",
        "switch": "on or off.",
    }
    shown = " ".join(parser().format_help().split())
    assert "a second line of 100 %. (default: a)" in shown and "on or off. (default: yes)" in shown


@pytest.mark.parametrize("options", [EngineConfig, ServerConfig])
def test_every_option_is_a_flag_with_help(options: type) -> None:
    texts = documented(options)
    made = Parser()
    add_flags(made, options)
    for field in fields(options):
        assert texts.get(field.name), f"{options.__name__}'s docstring lacks {field.name}"
        flag = f"--{field.name.replace('_', '-')}"
        assert made._option_string_actions[flag].dest == field.name


def test_sampling_parameters_of_a_terminal_are_documented() -> None:
    from nanovllm.cli.chat_backend import SAMPLING

    assert set(SAMPLING) <= documented(SamplingParams).keys()


# options of an engine -----------------------------------------------------------------------------


def engine_args(*words: str) -> argparse.Namespace:
    made = Parser(prog="tool")
    add_engine_options(made, positional=True)
    return made.parse_args(list(words))


def test_the_model_is_the_first_word_or_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert engine_options(engine_args()) == ("tiny-qwen3", {})
    for words in (["a/b"], ["--model", "a/b"], ["a/b", "--model", "a/b"]):
        assert engine_options(engine_args(*words)) == ("a/b", {})
    with pytest.raises(SystemExit):
        engine_args("a/b", "--model", "c")
    assert "MODEL is 'a/b' and 'c': use one of them" in capsys.readouterr().err


def test_flags_give_the_config_that_options_give() -> None:
    words = """--max_model_len 64 --enforce-eager --graph-batch-sizes 1 19 --max-stall-ms inf
        --hf-overrides {"a":{"b":1}} --expert-parallel off --allowed-media-domains a.b c.d
        --no-enable-prefix-caching --compile-cache /x --limit-mm-per-prompt {"image":3}
        --speculative-config {"model":"a/b","num_speculative_tokens":4}"""
    assert engine_config(engine_args("m/n", *words.split())) == EngineConfig(
        "m/n", max_model_len=64, enforce_eager=True, graph_batch_sizes=[1, 19],
        max_stall_ms=float("inf"), hf_overrides={"a": {"b": 1}}, expert_parallel=False,
        allowed_media_domains=["a.b", "c.d"], enable_prefix_caching=False, compile_cache="/x",
        limit_mm_per_prompt={"image": 3},
        speculative_config={"model": "a/b", "num_speculative_tokens": 4},
    )  # fmt: skip


def test_values_are_checked_as_those_of_llm() -> None:
    with pytest.raises(ValueError, match="max_model_len is 1: it must be a whole number"):
        engine_config(engine_args("--max-model-len", "1"))


def test_vllm_s_names_are_understood() -> None:
    words = "--block-size 32 --num-gpu-blocks-override 9 --cudagraph-capture-sizes 1 2"
    words += " --load-format dummy --dtype half --max-logprobs 20 --no-trust-remote-code"
    words += " --swap-space 4 --served-model-name None --scheduling-policy priority"
    found = engine_config(engine_args("m/n", *words.split()))
    assert found == EngineConfig(
        "m/n", kvcache_block_size=32, num_kvcache_blocks=9, graph_batch_sizes=[1, 2],
        random_weights=True, dtype="float16",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--pipeline-parallel-size 2", "pipeline_parallel_size is 2: only 1 is supported"),
        ("--swap-space 3", "swap_space is 3: only 4 is supported"),
        ("--block-size 32 --kvcache-block-size 64", "are the same option: use one of them"),
    ],
)
def test_what_vllm_has_and_we_do_not_is_refused_by_name(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine_config(engine_args(*words.split()))


def test_code_of_a_checkpoint_is_not_run_and_a_warning_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert engine_config(engine_args("m/n", "--no-trust-remote-code")) == EngineConfig("m/n")
    assert not caplog.messages
    assert engine_config(engine_args("m/n", "--trust-remote-code")) == EngineConfig("m/n")
    assert caplog.messages == [
        "trust_remote_code=True has no effect: code in checkpoints is never run. Checkpoints "
        "that need theirs are refused"
    ]


# a file of options --------------------------------------------------------------------------------


FILE = """
# comments are allowed
model: m/n
max-model-len: 2k
max_num_seqs: 5
enforce-eager: true
enable-prefix-caching: false
graph-batch-sizes: [1, 19]
limit-mm-per-prompt: {image: 2}
seed: null
expert-parallel: auto
port: 99
served-model-name: [a, b]
enable-auto-tool-choice: false
"""


def serve_args(*words: str) -> argparse.Namespace:
    made = Parser(prog="tool")
    serve.add_arguments(made)
    return made.parse_args(list(words))


def test_options_may_be_in_a_file_and_those_of_the_command_line_count(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(FILE)
    expected: dict[str, Any] = {
        "max_model_len": 2000, "max_num_seqs": 5, "enforce_eager": True,
        "enable_prefix_caching": False, "graph_batch_sizes": [1, 19], "expert_parallel": "auto",
        "limit_mm_per_prompt": {"image": 2},
    }  # fmt: skip
    for words in (["--config", str(path)], [f"--config={path}"]):
        args = serve_args(*words)
        assert engine_options(args, skip=serve.OF_SERVER) == ("m/n", expected)
        assert given(args, ServerConfig) == {"port": 99, "served_model_name": ["a", "b"]}
        assert args.enable_auto_tool_choice is False
    expected |= {"max_num_seqs": 7, "enable_prefix_caching": True}
    for model in (["o/p"], ["--model", "o/p"], ["o/p", "--model", "o/p"]):
        words = [*model, "--config", str(path), "--max-num-seqs", "7", "--enable-prefix-caching"]
        assert engine_options(serve_args(*words), skip=serve.OF_SERVER) == ("o/p", expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-modl-len: 3", "unknown option max-modl-len: did you mean --max-model-len?"),
        ("config: x.yaml", "unknown option config"),
        ("port: a", "argument --port: 'a' is not a whole number"),
        ("port: [1, 2]", "argument --port: it takes one value, not 2"),
        ("port: true", "argument --port: True is not a value"),
        ("enforce-eager: 3", "argument --enforce-eager/--no-enforce-eager: it must be true or"),
        ("[a]", "has no options: it must be an object"),
        ("a: [", "is not YAML: while parsing"),
        (None, "No such file"),
    ],
)
def test_mistakes_in_a_file_are_one_line(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "options.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        serve_args("--config", str(path))
    err = capsys.readouterr().err
    assert ended.value.code == 2 and message in err and str(path) in err and err.count("\n") == 1


# a command line for `vllm serve` ------------------------------------------------------------------


def test_flags_of_vllm_serve() -> None:
    words = "m/n -tp 2 -dp 3 -q int8 -asc 4 --disable-log-requests --root-path /a/b --port 1"
    words += " --uvicorn-log-level info --reasoning-parser qwen3 --tool-call-parser hermes"
    words += ' --default-chat-template-kwargs {"enable_thinking":false} --enable-auto-tool-choice'
    words += " --limit-mm-per-prompt image=2 --max-model-len 2k --host 0.0.0.0 --api-key k"
    words += " --served-model-name a --ssl-certfile c --ssl-keyfile d --allowed-origins *"
    words += " --chat-template {{messages}} --enable-lora --max-loras 2 --lora-modules a=b c=d"
    args = serve_args(*words.split())
    assert engine_config(args, skip=serve.OF_SERVER) == EngineConfig(
        "m/n", tensor_parallel_size=2, data_parallel_size=3, quantization="int8",
        limit_mm_per_prompt={"image": 2}, max_model_len=2000, chat_template="{{messages}}",
        enable_lora=True, max_loras=2,
    )  # fmt: skip
    assert ServerConfig(**given(args, ServerConfig)) == ServerConfig(
        api_processes=4, access_log=False, root_path="/a/b", uvicorn_log_level="info", port=1,
        reasoning_parser="qwen3", tool_call_parser="hermes", host="0.0.0.0", api_key=["k"],
        default_chat_template_kwargs={"enable_thinking": False}, served_model_name=["a"],
        ssl_certfile="c", ssl_keyfile="d", allowed_origins=["*"], lora_modules=["a=b", "c=d"],
    )  # fmt: skip
    assert serve_args("--api-server-count", "5", "--enable-log-requests").access_log is True
    assert serve_args("--disable-uvicorn-access-log").access_log is False


@pytest.mark.parametrize(
    "flag",
    [
        "--data-parallel-rank", "--data-parallel-address",
        "--data-parallel-size-local", "--decode-context-parallel-size", "--middleware",
        "--allowed-methods", "--allowed-headers", "--allow-credentials", "--ssl-ca-certs",
        "--ssl-cert-reqs", "--response-role", "--max-log-len", "--tool-parser-plugin",
        "--chat-template-content-format", "--enable-prompt-embeds", "--enable-eplb", "--nnodes",
        "--enable-request-id-headers", "--guided-decoding-backend", "--log-config-file",
        "--max-num-scheduled-tokens", "--kv-events-config", "--logprobs-mode", "--nccl-port",
        "--mm-processor-cache-gb", "--return-tokens-as-token-ids", "--enable-log-outputs",
    ],
)  # fmt: skip
def test_a_flag_that_means_something_else_is_not_suggested(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        serve_args(flag, "x")
    assert capsys.readouterr().err == f"tool: error: unknown option {flag}: see tool --help\n"


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--max-modl-len", "--max-model-len"), ("--maxmodel-len", "--max-model-len"),
        ("--tensor-paralel-size", "--tensor-parallel-size"), ("--api-keys", "--api-key"),
        ("--gpu-memory", "--gpu-memory-utilization"), ("--prot", "--port"),
        ("--served-model-names", "--served-model-name"), ("--dytpe", "--dtype"),
    ],
)  # fmt: skip
def test_a_mistyped_flag_is_suggested(
    flag: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        serve_args(flag, "x")
    assert f"unknown option {flag}: did you mean {meant}?" in capsys.readouterr().err


def test_every_name_of_vllm_that_is_known_is_a_flag() -> None:
    made = Parser()
    add_engine_options(made)
    for name in (*SAME_MEANING, *ONE_VALUE, "load_format"):
        assert f"--{name.replace('_', '-')}" in made._option_string_actions
