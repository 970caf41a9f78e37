"""RoBERTa and XLM-RoBERTa: BERT without the types of tokens, whose positions begin after the
padding's."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.models.bert import bert_model
from nanovllm.models.config import require_type
from nanovllm.models.model import Model

NAME, XLM = "RobertaModel", "XLMRobertaModel"


def model(hf: Any, *, dtype: torch.dtype, max_model_len: int | None = None) -> Model:
    """The model of transformers' `RobertaConfig` or `XLMRobertaConfig`."""
    require_type(hf, NAME, "roberta", "xlm-roberta")
    name = NAME if hf.model_type == "roberta" else XLM
    head = ("classifier.dense", "classifier.out_proj")
    first = hf.pad_token_id + 1
    return bert_model(hf, name, "roberta.", head, dtype, max_model_len, first)
