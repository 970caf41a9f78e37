"""docs/architectures.md says what the tests declare, and names every architecture."""

from __future__ import annotations

import pytest

from nanovllm.models import registry
from tests import architectures
from tests.architectures import ARCHITECTURES, PAGE, page


def test_the_page_of_architectures_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.architectures"


def test_every_architecture_is_in_the_table() -> None:
    assert set(ARCHITECTURES) == set(registry.ARCHITECTURES)


@pytest.mark.parametrize("claim", ["eager", "graph", "ranks"])
def test_every_architecture_has_a_test(claim: str) -> None:
    """Of several names of one architecture, one of them has."""
    found = architectures.declared()
    tested = {registry.ARCHITECTURES[name] for name, shown in found if shown == claim}
    assert [name for name, own in registry.ARCHITECTURES.items() if own not in tested] == []


@pytest.mark.parametrize(
    ("claims", "names", "message"),
    [
        (("eagre",), ("Qwen3ForCausalLM",), "shows 'eagre' of 'Qwen3ForCausalLM'"),
        (("eager",), ("Qwen9ForCausalLM",), "shows 'eager' of 'Qwen9ForCausalLM'"),
        (("GPU",), ("Qwen3ForCausalLM",), "shows what a GPU does, but does not use one"),
    ],
)
def test_a_wrong_declaration_is_an_error(
    claims: tuple[str, ...], names: tuple[str, ...], message: str
) -> None:
    class Module:
        @staticmethod
        @pytest.mark.shows(*claims, architectures=names)
        def test_something() -> None: ...

    with pytest.raises(ValueError, match=message):
        list(architectures._marked(Module))
