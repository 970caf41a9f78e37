"""Pairs in a published form that are cut: the document loses its end, the form around it stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from nanovllm.pairs import pair_prompt
from nanovllm.pooling_params import PoolingInfo
from nanovllm.tokenizer import Tokenizer, load_full
from tests.engines import save_tokenizer

DOCUMENT = "d" * 99  # a token for each character


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return load_full(folder)


@pytest.fixture(scope="module", params=["nothing around", "special tokens around"])
def tokenizer(request: pytest.FixtureRequest, full: Any) -> Tokenizer:
    quick = copy.deepcopy(full.backend_tokenizer)
    if request.param == "special tokens around":
        ends = [("<s>", 1), ("</s>", 3)]
        quick.post_processor = TemplateProcessing("<s> $A </s>", None, ends)
    return Tokenizer(lambda: full, quick=quick)


@pytest.fixture(params=["qwen3", "qwen3_vl"])
def info(request: pytest.FixtureRequest) -> PoolingInfo:
    return PoolingInfo("classify", 1, template=request.param)


def cut_ids(
    info: PoolingInfo, tokenizer: Tokenizer, first: str, second: str, limit: int
) -> list[int]:
    found = pair_prompt(info, tokenizer, first, second, limit=limit)
    return found.token_ids or tokenizer.encode_first(str(found.text), limit)  # as its callers do


def whole(info: PoolingInfo, document: str) -> str:
    return str(pair_prompt(info, None, "q", document).text)


@pytest.mark.parametrize("num_cut", [0, 1, 50, 98])
def test_the_form_around_a_cut_document_stays(
    info: PoolingInfo, tokenizer: Tokenizer, num_cut: int
) -> None:
    wanted = tokenizer.encode(whole(info, DOCUMENT[num_cut:]))
    assert cut_ids(info, tokenizer, "q", DOCUMENT, len(wanted)) == wanted


def test_the_form_stays_in_a_prompt_that_is_written_already(
    info: PoolingInfo, tokenizer: Tokenizer
) -> None:
    start, end = whole(info, DOCUMENT).split(DOCUMENT)
    wanted = tokenizer.encode(whole(info, "dd"))
    assert cut_ids(info, tokenizer, start, DOCUMENT + end, len(wanted)) == wanted


def test_a_limit_that_leaves_no_document_is_refused(
    info: PoolingInfo, tokenizer: Tokenizer
) -> None:
    num = len(tokenizer.encode(whole(info, "d"))) - 1
    for limit in (num, 9, 1):
        message = f"take {num} tokens: with at most {limit} none is left for the document"
        with pytest.raises(ValueError, match=message):
            pair_prompt(info, tokenizer, "q", DOCUMENT, limit=limit)


def test_a_pair_without_a_limit_is_whole(info: PoolingInfo, tokenizer: Tokenizer) -> None:
    assert pair_prompt(info, tokenizer, "q", DOCUMENT).text == whole(info, DOCUMENT)
