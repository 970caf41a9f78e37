"""The server's options, checked before anything loads."""

from __future__ import annotations

import hmac
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from os import PathLike, fspath
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nanovllm.checks import Rule, check_fields, one_of, refuse_unknown, whole
from nanovllm.config import EngineConfig
from nanovllm.models.lora.peft_config import PeftConfig
from nanovllm.parsers import reasoning, tools

# load balancers have no API key
ALWAYS_OPEN = ("/health", "/ready")


LOG_LEVELS = ("trace", "debug", "info", "warning", "error", "critical")
ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+|")
HOST_NAME = re.compile(r"\*|[A-Za-z0-9._-]+")


def _are_texts(values: Sequence[str]) -> bool:
    return all(values)


def _is_module(text: str) -> bool:
    name, _, path = text.partition("=")
    return bool(name and path)


def _is_host(name: str) -> bool:
    """Whether it is "*", a name or an address (IPv6 also in brackets), without a port."""
    if HOST_NAME.fullmatch(name):
        return True
    try:
        return bool(IPv6Address(name.removeprefix("[").removesuffix("]")))
    except ValueError:
        return False


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


_SECONDS: Rule = ("a number of seconds above 0", lambda value: 0 < value < math.inf)

# Allowed values of options, beyond their types. None is also allowed where it is the default.
ALLOWED: dict[str, Rule] = {
    "host": ("a name or an address", bool),
    "port": ("a whole number, 0 … 65535", lambda value: 0 <= value <= 65535),
    "api_key": (
        "a list of keys of visible ASCII characters",
        lambda keys: all(key and key.isascii() and key.isprintable() for key in keys),
    ),
    "open_paths": (
        "a list of paths that begin with '/'",
        lambda paths: all(path.startswith("/") for path in paths),
    ),
    "served_model_name": ("a list of names", _are_texts),
    "lora_modules": ("a list of NAME=FOLDER", lambda values: all(map(_is_module, values))),
    "allowed_lora_path": ("a folder", lambda path: Path(path).expanduser().is_dir()),
    "tool_call_parser": one_of("auto", "none", *tools.PARSERS),
    "reasoning_parser": one_of("auto", "none", *reasoning.PARSERS),
    "allowed_hosts": (
        "a list of names or addresses without ports, or '*'",
        lambda hosts: all(map(_is_host, hosts)),
    ),
    "allowed_origins": ("a list of origins, such as 'https://example.org'", _are_texts),
    "root_path": (
        "a path that begins with '/' and does not end with it",
        lambda path: ROOT_PATH.fullmatch(path) is not None,
    ),
    "uvicorn_log_level": one_of(*LOG_LEVELS),
    "api_processes": whole(1, 1024),
    "otlp_traces_endpoint": ("a URL of http or https", _is_url),
    "drain_timeout": ("a number of seconds, at least 0", lambda value: 0 <= value < math.inf),
    "header_timeout": _SECONDS,
    "body_timeout": _SECONDS,
    "send_timeout": _SECONDS,
    "keep_alive_timeout": _SECONDS,
} | {
    name: whole(1)
    for name in (
        "max_body_bytes", "max_header_bytes", "max_connections", "max_queue_len",
        "max_prompts", "max_inputs", "max_prompt_chars", "max_n", "max_messages",
    )
} | {
    name: whole(0)
    for name in (
        "max_logprobs", "max_prompt_logprobs", "max_answer_logprobs", "max_stop_strings",
        "max_stop_chars", "max_tools", "max_bias",
    )
}  # fmt: skip


@dataclass(frozen=True)
class ServerConfig:
    """Options of `nanovllm serve`, in addition to the engine's.

    host, port: the address to listen on. Port 0 picks a free port.
    api_key: the valid API keys. A request needs one of them in the header `Authorization: Bearer
        KEY` or `x-api-key: KEY`. If the list is empty, no key is needed. Other users of the machine
        can see command-line arguments: prefer `api_key_file` or the variable NANOVLLM_API_KEY
        (keys separated by commas), which is used if neither option is set.
    api_key_file: a file with more valid keys, one per line; only its owner may have access to it.
    share_cache_between_keys: share cached prefixes and media between API keys. The holder of one
        key can then probe for the beginnings of other keys' prompts. If off, each key has a
        separate cache.
    open_paths: paths that need no API key, such as "/metrics" or "/" (the page). /health and
        /ready never need one.
    ssl_certfile, ssl_keyfile: PEM files of a certificate and its key. If they are set, the server
        accepts only TLS.
    served_model_name: the model's names in requests. Responses use the first one. The default is
        the Hub id, or the last part of the folder's path.
    lora_modules: adapters that requests name as their model, each NAME=FOLDER. They need the
        engine's option enable_lora: see docs/lora.md.
    allowed_lora_path: the folder from which POST /v1/load_lora_adapter loads adapters. None: that
        and POST /v1/unload_lora_adapter are refused. It needs one API process.
    allowed_hosts: names and addresses, without ports, that the Host header of requests may have,
        besides localhost, loopback addresses and `host`. Requests with others get 421, except for
        /health and /ready. "*" allows any. Empty: no others if bound to loopback, else any.
    allowed_origins: origins of web pages whose scripts may read responses (CORS). "*" allows all.
    root_path: the path under which a proxy exposes this server, such as "/models/a". Requests may
        come with or without it.
    default_chat_template_kwargs: default variables of the chat template, such as
        {"enable_thinking": false}. Requests override them.
    tool_call_parser: the parser of tool calls, such as "hermes". "auto" picks one from the chat
        template. "none" refuses requests with tools, unless tool_choice is "none", "required" or a
        named tool.
    reasoning_parser: the parser of reasoning, which responses return as reasoning and
        reasoning_content. "auto" picks one from the chat template. "none" leaves the reasoning in
        the content.
    special_tokens_as_text: encode special tokens in the contents of users and tools, and in names,
        as plain text, so that a request cannot forge turns. If off, they are special tokens.
    drain_timeout: the seconds that running requests get to finish after SIGTERM.
    api_processes: the number of processes that serve HTTP. None: one for each replica
        (`data_parallel_size`), or a single one with `allowed_lora_path`.
    access_log: log every request: its id, status, tokens and times. Requests for /health, /ready,
        /metrics and the page are logged only if they fail.
    log_prompts: include prompts in the access log.
    uvicorn_log_level: the log level of the HTTP server: "trace", "debug", "info", "warning",
        "error" or "critical".
    otlp_traces_endpoint: the URL of a collector that receives one span per request by OTLP over
        HTTP, such as "http://127.0.0.1:4318/v1/traces".
    max_body_bytes: the maximum size of a request body. The bodies that an API process is receiving
        have at most 32 times as many bytes together; more are refused with 503.
    max_header_bytes: the maximum size of the request line and the headers together.
    max_connections: the maximum number of connections per API process, also those whose TLS
        handshake is not complete. A new one then replaces the longest idle one; if none is idle, it
        is refused with 503, or closed before the TLS handshake.
    max_queue_len: the maximum number of answers that wait for the engine. More are refused with
        429; a request whose answers do not fit into an empty queue, with 400.
    max_prompts: the maximum number of prompts in a request.
    max_inputs: the maximum number of texts in a request for embeddings, classes or scores.
    max_prompt_chars: the maximum length of a prompt as text, with tools and variables of the chat
        template. None: 64 characters per token of `max_model_len`.
    max_messages: the maximum number of messages in a conversation, of parts or calls in a message,
        and of items in the input of a response.
    max_n: the maximum number of answers per prompt.
    max_logprobs: the maximum number of top log-probabilities per position.
    max_prompt_logprobs: the maximum number of log-probabilities of prompts in a response: the
        tokens of all prompts, times prompt_logprobs + 1, times n.
    max_answer_logprobs: the maximum number of log-probabilities of a request's answers, if it asks
        for several: the tokens that each may have by max_tokens and max_model_len, times
        logprobs + 1, times n, for all prompts. One takes some 200 bytes of memory.
    max_stop_strings, max_stop_chars: the maximum number of stop strings, and of their characters.
    max_bias: the maximum number of entries in logit_bias, allowed_token_ids, stop_token_ids or
        bad_words.
    max_tools: the maximum number of tools in a request.
    header_timeout: the seconds within which a connection must complete the TLS handshake, if there
        is one, and send a request's headers.
    body_timeout: the seconds within which it must then send the body.
    send_timeout: the seconds after which a client that reads nothing is disconnected.
    keep_alive_timeout: the seconds that an idle connection stays open between requests.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: Sequence[str] = field(default=(), repr=False)
    api_key_file: str | PathLike[str] | None = None
    share_cache_between_keys: bool = False
    open_paths: Sequence[str] = ()
    ssl_certfile: str | PathLike[str] | None = None
    ssl_keyfile: str | PathLike[str] | None = None
    served_model_name: Sequence[str] = ()
    lora_modules: Sequence[str] = ()
    allowed_lora_path: str | PathLike[str] | None = None
    allowed_hosts: Sequence[str] = ()
    allowed_origins: Sequence[str] = ()
    root_path: str = ""
    default_chat_template_kwargs: Mapping[str, object] | None = None
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    special_tokens_as_text: bool = True
    drain_timeout: float = 30.0
    api_processes: int | None = None
    access_log: bool = True
    log_prompts: bool = False
    uvicorn_log_level: str = "error"
    otlp_traces_endpoint: str | None = None
    max_body_bytes: int = 32 << 20
    max_header_bytes: int = 32 << 10
    max_connections: int = 4096
    max_queue_len: int = 4096
    max_prompts: int = 256
    max_inputs: int = 2048
    max_prompt_chars: int | None = None
    max_messages: int = 4096
    max_n: int = 128
    max_logprobs: int = 20
    max_prompt_logprobs: int = 1 << 20
    max_answer_logprobs: int = 1 << 22
    max_stop_strings: int = 16
    max_stop_chars: int = 4096
    max_bias: int = 1024
    max_tools: int = 128
    header_timeout: float = 10.0
    body_timeout: float = 60.0
    send_timeout: float = 60.0
    keep_alive_timeout: float = 75.0

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> ServerConfig:
        """The config for these options. Raises TypeError for an unknown option."""
        refuse_unknown(cls, options)
        return cls(**options)

    def __post_init__(self) -> None:
        check_fields(self, ALLOWED, secrets=("api_key",))
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("ssl_certfile and ssl_keyfile must be given together")
        if self.allowed_lora_path is not None and (self.api_processes or 1) > 1:
            raise ValueError(
                f"allowed_lora_path does not go with api_processes={self.api_processes}: the other "
                "processes would not know what one has loaded"
            )
        if len(self.adapter_paths) < len(self.lora_modules):
            raise ValueError("lora_modules has two adapters of one name")

    def num_api_processes(self, num_replicas: int) -> int:
        """The number of processes that serve HTTP in front of so many replicas."""
        if self.api_processes is not None:
            return self.api_processes
        return 1 if self.allowed_lora_path is not None else num_replicas

    @property
    def adapter_paths(self) -> dict[str, str]:
        """The folders of `lora_modules` by their names."""
        return {name: path for name, _, path in (one.partition("=") for one in self.lora_modules)}

    def check_engine(self, engine: EngineConfig) -> None:
        """Raises ValueError for options that the engine's do not go with, and for adapters whose
        files cannot be used with any model."""
        for name in ("lora_modules", "allowed_lora_path"):
            if getattr(self, name) and not engine.enable_lora:
                raise ValueError(f"{name} needs enable_lora=True: the engine takes no adapters")
        for name, path in self.adapter_paths.items():
            if name in self.model_names(engine.model):
                raise ValueError(f"lora_modules has {name!r}, which is a name of the model")
            try:
                PeftConfig.checked(Path(path), engine.max_lora_rank)
            except ValueError as error:
                raise ValueError(f"lora_modules has {name!r}: {error}") from error

    def model_names(self, model: str) -> tuple[str, ...]:
        """The model's names, without the path of its folder."""
        if self.served_model_name:
            return tuple(self.served_model_name)
        return (Path(model).resolve().name if Path(model).is_dir() else fspath(model),)

    def allows(self, key: str) -> bool:
        """Whether a key is valid. Takes equal time for all wrong keys of equal length."""
        given = key.encode("utf-8", "surrogateescape")
        found = [hmac.compare_digest(given, one.encode()) for one in self.api_key]
        return any(found)
