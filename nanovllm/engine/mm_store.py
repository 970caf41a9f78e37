"""The multimodal inputs of unfinished requests, for the encoders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from nanovllm.runner.embeddings import Embeddings
from nanovllm.runner.encoders import MMItem
from nanovllm.runner.encoding_ranks import Encoding
from nanovllm.schedule.plan import EmbeddingSpan
from nanovllm.schedule.request import MMSpan


class AnyRunner(Encoding, Protocol):
    """The runner of a model that generates or pools."""

    @property
    def embeddings(self) -> Embeddings: ...


class WithContents(Protocol):
    """A request."""

    @property
    def contents(self) -> Sequence[MMSpan]: ...


class MMStore:
    """Keeps media in host memory, keyed by content: requests with equal media share them."""

    def __init__(self, runner: AnyRunner) -> None:
        self._runner = runner
        self.items: dict[str, MMItem] = {}

    def hold(self, media: Mapping[str, MMItem]) -> None:
        """Keep the media of a prompt, keyed by content."""
        self.items.update(media)

    def encode(self, spans: Iterable[EmbeddingSpan]) -> None:
        """Encode the media of a step that have no embeddings yet."""
        keys = dict.fromkeys(one.key for one in spans)
        missing = [key for key in keys if key not in self._runner.embeddings]
        if missing:
            self._runner.encode({key: self.items[key] for key in missing})

    def release(self, request: WithContents, others: Iterable[WithContents]) -> None:
        """Drop a request's media and embeddings unless another request uses them."""
        if not request.contents:
            return
        in_use = {one.key for other in others for one in other.contents}
        ended = {one.key for one in request.contents} - in_use
        self._runner.drop_embeddings(ended)
        for key in ended:
            self.items.pop(key, None)
