"""State shared by all endpoints."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from nanovllm.api.config import ServerConfig
from nanovllm.api.errors import ApiError, invalid
from nanovllm.api.fields import decoded
from nanovllm.api.http import BodyLimits, Exchange
from nanovllm.api.latencies import Latencies
from nanovllm.api.params import ParamsMaker
from nanovllm.api.prompts import PromptMaker
from nanovllm.api.salts import CacheSalts
from nanovllm.api.schemas import StreamOptions
from nanovllm.api.tools import Readings
from nanovllm.api.traces import Traces
from nanovllm.checks import InvalidValue
from nanovllm.lora_request import LoRARequest
from nanovllm.media.mm_inputs import KINDS, MMInput
from nanovllm.prompts import PROMPT
from nanovllm.serving.async_engine import AsyncEngine

Body = TypeVar("Body", bound=msgspec.Struct)
MAX_ID_CHARS = 64


class Service:
    """An engine behind HTTP, with the server's options and the names of its model."""

    def __init__(
        self,
        engine: AsyncEngine,
        config: ServerConfig,
        latencies: Sequence[Latencies] = (),
        index: int = 0,
        salts: CacheSalts | None = None,
    ) -> None:
        """latencies: of all API processes. index: of this process. salts: None for a server with a
        single API process."""
        self.latencies = latencies or [Latencies()]
        self.own_latencies = self.latencies[index]
        self.engine, self.config = engine, config
        self.salts = salts or CacheSalts(config, secrets.token_bytes())
        self.model_names = config.model_names(engine.config.model)
        self.model = self.model_names[0]
        self.bodies = BodyLimits(config.max_body_bytes, config.body_timeout)
        self.adapters: dict[str, LoRARequest] = {}  # by their names
        self.created = int(time.time())
        endpoint = config.otlp_traces_endpoint
        self.traces = None if endpoint is None else Traces(endpoint, self.model)
        self.modalities = ["text", *(kind for kind in KINDS if self._takes(kind))]
        self.params = ParamsMaker(config, engine.default_params, engine.max_model_len)
        self.prompts = PromptMaker(engine, config)
        self.readings = Readings(engine, config)

    def _takes(self, kind: str) -> bool:
        try:
            self.engine.check_media([MMInput(kind, kind, None)])
        except ValueError:
            return False
        return True

    async def body(self, exchange: Exchange, kind: type[Body]) -> Body:
        """A request's body; its model must be this server's, or an adapter. Raises ApiError."""
        data = await exchange.body(self.bodies)
        body = decoded(data, kind)
        name = getattr(body, "model", None)
        self.check_model(name)
        exchange.adapter = self.adapters.get(name or "")
        exchange.record.user = getattr(body, "user", None) or getattr(
            body, "safety_identifier", None
        )
        return body

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.model_names and name not in self.adapters:
            shown = f"{name[:MAX_ID_CHARS]!r}"
            raise ApiError(404, f"there is no model {shown}: this server has {self.model!r}",
                           param="model", code="model_not_found")  # fmt: skip

    def check_num_answers(self, num_prompts: int, n: int) -> None:
        most = max(self.config.max_prompts, self.config.max_n)
        if num_prompts * n > most:
            words = f"{num_prompts} prompts with n={n} are {num_prompts * n} answers: at most "
            raise invalid("n", f"{words}{most} per request")
        self.check_fits(num_prompts, n)

    def check_fits(self, num_prompts: int, n: int = 1) -> None:
        """Raises InvalidValue for more answers than the queue ever takes: a client would send the
        request again for ever."""
        most = self.engine.max_num_seqs + self.config.max_queue_len
        if num_prompts * n > most:
            words = (
                f"{num_prompts} prompts with n={n} are {num_prompts * n} answers: at most {most}"
            )
            raise InvalidValue(
                PROMPT if num_prompts > most else "n",
                f"{words} may run and wait (max_num_seqs + max_queue_len)",
            )


def response_id(prefix: str, given: str | None) -> str:
    """The id of a response: from the request, or a random one."""
    if given is None:
        return f"{prefix}{secrets.token_hex(16)}"
    if not 0 < len(given) <= MAX_ID_CHARS or not given.isascii() or not given.isprintable():
        words = f"request_id must have 1 … {MAX_ID_CHARS} visible ASCII characters"
        raise invalid("request_id", words)
    return f"{prefix}{given}"


def usage_options(options: StreamOptions | None) -> tuple[bool, bool]:
    """Whether the stream ends with the usage, and whether every chunk has it."""
    if options is None:
        return False, False
    is_continuous = bool(options.continuous_usage_stats)
    return bool(options.include_usage) or is_continuous, is_continuous
