"""MiniCPM gives the logits of its published formulas: transformers has no classes of it.

Factors: Hu et al. 2024, https://arxiv.org/abs/2404.06395, appendix A.1. Rotation: Ding et al. 2024,
https://arxiv.org/abs/2402.13753; the factor on cosines and sines is that of its authors' code.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from nanovllm import LLM
from nanovllm.config import EngineConfig
from nanovllm.startup.resolve import resolve_without_weights
from tests.conftest import save_tiny
from tests.engines import drain, greedy
from tests.models import test_shards
from tests.models.harness import engine_logits, load, max_difference, sequences

VOCAB_SIZE, LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 99, 3, 4, 2, 16, 64
ORIGINAL_LEN, POSITIONS, THETA, EPS = 64, 256, 10000.0, 1e-3
SHORT = [1.0 + 0.01 * i for i in range(HEAD_DIM // 2)]
LONG = [1.5 + 0.1 * i for i in range(HEAD_DIM // 2)]
FIELDS = {
    "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16,
    "rope_theta": THETA, "rope_scaling": {
        "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG,
        "original_max_position_embeddings": ORIGINAL_LEN,
    },
}  # fmt: skip
GRAPHS = {"max_num_seqs": 2, "graph_batch_sizes": [2], "max_num_batched_tokens": 64}


def save(folder: Path, *, tied: bool = True, **changes: Any) -> Path:
    """A checkpoint as its authors write it: with a model type that transformers does not know."""
    save_tiny(
        folder, "llama", vocab_size=VOCAB_SIZE, hidden_size=HIDDEN, num_hidden_layers=LAYERS,
        head_dim=HEAD_DIM, max_position_embeddings=POSITIONS, rms_norm_eps=EPS,
        tie_word_embeddings=tied,
    )  # fmt: skip
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    if tied:
        del config["tie_word_embeddings"]  # it is the default
    names = {"model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"]}
    path.write_text(json.dumps({**config, **names, **FIELDS, **changes}))
    return folder


def rotated(x_TNH: Tensor, max_len: int) -> Tensor:
    """LongRoPE: the factors of long sequences if any sequence may be longer than the original."""
    factors = torch.tensor(LONG if max_len > ORIGINAL_LEN else SHORT)
    growth = math.log(POSITIONS / ORIGINAL_LEN) / math.log(ORIGINAL_LEN)
    theta = THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM) / factors
    angle_T1h = torch.outer(torch.arange(len(x_TNH)).float(), theta).unsqueeze(1)
    cos, sin = angle_T1h.cos() * math.sqrt(1 + growth), angle_T1h.sin() * math.sqrt(1 + growth)
    left, right = x_TNH.chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


def expected_logits(folder: Path, token_ids: list[int], max_len: int) -> Tensor:
    """The whole sequence at once, in plain torch on the checkpoint's tensors."""
    stored, length = load_file(folder / "model.safetensors"), len(token_ids)
    table = stored["model.embed_tokens.weight"]
    of_layer = 1.4 / math.sqrt(LAYERS)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    h = table[token_ids] * 12
    for idx in range(LAYERS):
        w = {
            name.removeprefix(f"model.layers.{idx}.").removesuffix(".weight"): weight
            for name, weight in stored.items()
        }
        x = rms_norm(h, (HIDDEN,), w["input_layernorm"], EPS)
        q, k, v = (linear(x, w[f"self_attn.{c}_proj"]).view(length, -1, HEAD_DIM) for c in "qkv")
        q, k = rotated(q, max_len), rotated(k, max_len)
        k, v = (one.repeat_interleave(HEADS // KV_HEADS, 1) for one in (k, v))
        scores = torch.einsum("qnh,knh->nqk", q, k) / math.sqrt(HEAD_DIM)
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        o = torch.einsum("nqk,knh->qnh", weights, v).flatten(1)
        h = h + linear(o, w["self_attn.o_proj"]) * of_layer
        x = rms_norm(h, (HIDDEN,), w["post_attention_layernorm"], EPS)
        inner = silu(linear(x, w["mlp.gate_proj"])) * linear(x, w["mlp.up_proj"])
        h = h + linear(inner, w["mlp.down_proj"]) * of_layer
    x = rms_norm(h, (HIDDEN,), stored["model.norm.weight"], EPS) / (HIDDEN / 16)
    return linear(x, stored.get("lm_head.weight", table))


@pytest.mark.shows("eager", "graph", "GPU", architectures=["MiniCPMForCausalLM"])
@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize(
    ("tied", "max_len", "lengths"),
    [(True, ORIGINAL_LEN, ((1, 6), (50, 64))), (False, 128, ((66, 70), (99, 103)))],
    ids=["short-tied", "long-untied"],
)
def test_logits_are_those_of_the_formulas(
    tied: bool, max_len: int, lengths: Any, mode: str, device: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"enforce_eager": True} if mode == "eager" else GRAPHS
    folder, known = save(tmp_path, tied=tied), sequences(VOCAB_SIZE, *lengths)
    runner = load(folder, device, max_model_len=max_len, **options)
    expected = [expected_logits(folder, one.token_ids, max_len) for one in known]
    assert max_difference(engine_logits(runner, known), expected) <= 1e-4
    wrong = [logits * 1.01 for logits in expected]
    assert max_difference(engine_logits(runner, known), wrong) > 1e-4


@pytest.mark.shows("ranks", architectures=["MiniCPMForCausalLM"])
def test_ranks_give_the_logits_of_one(tmp_path: Path) -> None:
    test_shards.check(save(tmp_path / "m"), 2, VOCAB_SIZE)


def test_given_embeddings_are_rows_of_the_checkpoint_s_table(tmp_path: Path) -> None:
    folder = save(tmp_path)
    table_VD = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    llm = LLM(
        str(folder), device="cpu", dtype="float32", enforce_eager=True, max_num_seqs=2,
        max_model_len=ORIGINAL_LEN, kvcache_block_size=16, num_kvcache_blocks=17,
        skip_tokenizer_init=True,
    )  # fmt: skip
    prompt, answers = sequences(VOCAB_SIZE, (19, 19))[0].token_ids, []
    for ids, given in ((prompt, []), ([0] * 19, [(0, table_VD[prompt])]), ([0] * 19, [])):
        request = llm.engine.add_request(ids, greedy(12), incremental=False, embeddings=given)
        answers.append(drain(llm)[request].token_ids)
    assert answers[0] == answers[1] != answers[2]


SPARSE = {"sparse_config": {"kernel_size": 32, "dense_len": 48}}


def longest(folder: Path, max_model_len: int | None) -> int:
    options = {"device": "cpu", "dtype": "float32", "max_model_len": max_model_len}
    config = EngineConfig.from_options(str(folder), options)
    return resolve_without_weights(config).spec.layout.max_model_len


def test_sparse_attention_is_refused_from_the_length_on_where_it_sets_in(tmp_path: Path) -> None:
    folder = save(tmp_path, **SPARSE)
    assert longest(folder, 47) == longest(folder, None) == 47
    message = r"max_model_len is 48, but the sparse attention \(InfLLM v2\) of .* at most 47"
    with pytest.raises(ValueError, match=message):
        longest(folder, 48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_depth": 0}, "scale_depth is 0.*: it must be a number above 0"),
        ({"scale_emb": None}, "scale_emb is None: it must be a number above 0"),
        ({"num_experts": 8}, "num_experts 8 is not supported by MiniCPM"),
        ({"hidden_act": "fatrelu"}, "hidden_act 'fatrelu' is not supported"),
    ],
    ids=str,
)
def test_what_is_not_built_is_refused_by_name(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        longest(save(tmp_path, **change), None)
