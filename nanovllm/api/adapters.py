"""Adapters under names of their own: `lora_modules`, and those that requests load and unload."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

from nanovllm.api.config import ServerConfig
from nanovllm.api.errors import ApiError, invalid
from nanovllm.api.http import Exchange
from nanovllm.api.schemas import LoadAdapterBody, UnloadAdapterBody
from nanovllm.api.service import Service
from nanovllm.checks import InvalidValue
from nanovllm.lora_request import LoRARequest

OFF = "loading adapters is off: the server needs the options enable_lora and allowed_lora_path"
NOT_FOUND = 404
FORBIDDEN = 403
_numbers = count(1)  # no two adapters of an engine have one


def numbered(name: str, path: Path | str) -> LoRARequest:
    """An adapter that is new to the engine."""
    return LoRARequest(name, next(_numbers), str(path))


async def load_configured(service: Service) -> None:
    """Load the adapters of the options, before the first request. Raises ValueError."""
    for name, path in service.config.adapter_paths.items():
        request = numbered(name, path)
        await service.engine.add_lora(request)
        service.adapters[name] = request


async def load(service: Service, exchange: Exchange) -> None:
    """POST /v1/load_lora_adapter."""
    _check_allowed(service)
    body = await service.body(exchange, LoadAdapterBody)
    name = body.lora_name
    if not name:
        raise invalid("lora_name", "lora_name is empty")
    if name in service.model_names or name in service.adapters:
        raise invalid("lora_name", f"there is a model {name!r} already: unload it first")
    request = numbered(name, _folder(service.config, body.lora_path))
    service.adapters[name] = request  # now, so that a second request does not load it, too
    try:
        await service.engine.add_lora(request)
    except BaseException as error:
        del service.adapters[name]
        if isinstance(error, InvalidValue):
            raise invalid("lora_path", str(error)) from None
        raise
    await exchange.json(_done(name, "loaded"))


async def unload(service: Service, exchange: Exchange) -> None:
    """POST /v1/unload_lora_adapter."""
    _check_allowed(service)
    body = await service.body(exchange, UnloadAdapterBody)
    name = body.lora_name
    request = service.adapters.get(name)
    if request is None or body.lora_int_id not in (None, request.lora_int_id):
        words = f"there is no adapter {name[:64]!r}"
        raise ApiError(NOT_FOUND, words, param="lora_name", code="model_not_found")
    try:
        await service.engine.remove_lora(request.lora_int_id)
    except InvalidValue as error:
        raise invalid("lora_name", str(error)) from None
    service.adapters.pop(name, None)
    await exchange.json(_done(name, "unloaded"))


def _check_allowed(service: Service) -> None:
    if service.config.allowed_lora_path is None or not service.engine.config.enable_lora:
        raise ApiError(FORBIDDEN, OFF, code="forbidden")


def _folder(config: ServerConfig, given: str) -> Path:
    """The folder of an adapter, below the allowed one; a relative path begins there."""
    assert config.allowed_lora_path is not None
    allowed = Path(config.allowed_lora_path).expanduser().resolve()
    try:
        folder = (allowed / given).resolve()
    except (OSError, ValueError):
        folder = Path("/")
    if not folder.is_relative_to(allowed) or not folder.is_dir():
        # the same words, so that a request cannot find out which files there are elsewhere
        raise invalid("lora_path", "lora_path is not a folder below allowed_lora_path")
    return folder


def _done(name: str, what: str) -> dict[str, Any]:
    return {"object": "lora_adapter", "id": name, "status": what}
