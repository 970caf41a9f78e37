"""The work of a replica: its engine takes requests from a channel and sends outputs to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

from nanovllm import hub
from nanovllm.checks import InvalidValue
from nanovllm.engine.engine import Engine
from nanovllm.engine.media_intake import MediaPrompt
from nanovllm.parallel.channel import Channel, Message
from nanovllm.parallel.serve import ANSWER, ASKS
from nanovllm.prompts import Prompt
from nanovllm.replicas import attached, messages
from nanovllm.replicas.messages import Addition, Facts
from nanovllm.sampling import SamplingParams
from nanovllm.schedule.outputs import Completion, Increment
from nanovllm.startup.ranks import checkpoint_digest


def facts_of(engine: Engine) -> Facts:
    """What others must know of an engine."""
    pool, config = engine.scheduler.pool, engine.config
    weights = not config.random_weights
    folder = hub.resolve(config.model, weights=weights, revision=config.revision)
    return Facts(
        checkpoint=checkpoint_digest(folder),
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        vocab_size=engine.model_config.vocab_size,
        hidden_size=engine.model_config.hidden_size,
        num_added=engine.model_config.num_added,
        has_axes=bool(engine.model_config.rope_axes),
        has_towers=bool(engine.runner.towers.by_name),
        media_scale=engine.media_scale,
        block_size=pool.block_size,
        num_blocks=pool.num_blocks,
        eos_ids=sorted(engine.eos_ids),
        default_params=messages.params_fields(engine.default_params),
    )


class Loop:
    """Steps an engine while it has requests, and reads messages between two steps."""

    def __init__(self, engine: Engine, channel: Channel) -> None:
        self._engine, self._channel = engine, channel
        # ids of unfinished requests, from the front's to the engine's and back
        self._ids: dict[int, int] = {}
        self._front_ids: dict[int, int] = {}
        self._handlers: dict[str, Callable[[bytes], bytes | None]] = {
            messages.GO: lambda payload: None,
            messages.ADD: self._add,
            messages.ABORT: self._abort,
            messages.FORGET: lambda payload: engine.forget_prefixes(),
            messages.PREPARE_GRAMMARS: lambda payload: engine.prepare_grammars(),
            messages.METRICS: lambda payload: messages.dump_metrics(engine.metrics.read()),
        }

    def run(self) -> NoReturn:
        """Raises ChannelClosed once the front closes, and the errors of a step."""
        engine = self._engine
        self._channel.send(messages.READY, messages.dump(facts_of(engine)))
        while True:
            for message in self._channel.pending(wait=not engine.has_unfinished):
                self._handle(message)
            if engine.has_unfinished:
                self._step()

    def _step(self) -> None:
        found = [
            replace(one, request_id=self._front_ids[one.request_id]) for one in self._engine.step()
        ]
        for one in found:
            if one.finished:
                del self._front_ids[self._ids.pop(one.request_id)]
        if found:
            self._channel.send(messages.OUTPUTS, messages.dump_outputs(found))

    def _handle(self, message: Message) -> None:
        name, _, number = message[0].partition(ASKS)
        answer = self._handlers[name](message[1])
        if number:
            self._channel.send(ANSWER + number, answer or b"")

    def _add(self, payload: bytes) -> None:
        """Queue a request. What the front cannot know, such as full memory, ends it alone."""
        message, beside = attached.load(payload)
        given = Addition(**json.loads(message))
        prompt: Prompt | MediaPrompt = Prompt(None, given.prompt_ids, given.cache_salt)
        positions = beside.positions
        if beside.images:
            images = list(beside.images)
            prompt = MediaPrompt(given.prompt_ids, positions, images, given.cache_salt)
            positions = None
        try:
            of_engine = self._engine.add_request(
                prompt,
                SamplingParams(**given.params),
                incremental=given.incremental,
                embeddings=beside.embeddings,
                positions=positions,
                priority=given.priority,
            )
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            field = error.field if isinstance(error, InvalidValue) else None
            done = Completion("", [], "error", None, given.prompt_ids, 0, None, None, text, field)
            last = Increment(given.request_id, [], "", None, done)
            self._channel.send(messages.OUTPUTS, messages.dump_outputs([last]))
            return
        self._ids[given.request_id] = of_engine
        self._front_ids[of_engine] = given.request_id

    def _abort(self, payload: bytes) -> None:
        """Drop requests. Some may have ended while the message was on its way."""
        ids, reason = json.loads(payload)
        of_engine = [self._ids.pop(one) for one in ids if one in self._ids]
        for one in of_engine:
            self._engine.abort(one, reason)
        self._engine.take(of_engine)  # the front does not listen
        for one in of_engine:
            del self._front_ids[one]
