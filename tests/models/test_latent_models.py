"""Models with latent attention and grouped experts give transformers' logits, however steps are
cut, on ranks, from quantized checkpoints and in whole engines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm import LLM
from nanovllm.models import loader
from nanovllm.models.latent import FirstOrder, KeysFirst
from nanovllm.models.layer_state import PagedLatent
from nanovllm.models.loader import Target
from nanovllm.models.model import LatentCache
from nanovllm.schedule.request import Request
from tests.engines import greedy, tokens
from tests.models import test_shards
from tests.models.harness import (
    BF16,
    check_bf16,
    engine_logits,
    load,
    max_difference,
    sequences,
    transformers_logits,
    transformers_model,
)
from tests.models.latent_cases import BY_NAME, CASES, LENGTHS, VOCAB_SIZE, Case
from tests.models.routes import edit, stacked
from tests.models.test_quantized_checkpoints import BY_NAME as KINDS
from tests.models.test_quantized_checkpoints import check, check_ranks, model_of, pack

TOLERANCE = 1e-4
NAMES = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM")
FEW_ROWS: dict[str, Any] = {
    "max_num_seqs": 2,
    "graph_batch_sizes": [2],
    "max_num_batched_tokens": 64,
}
# of graphs: a dense and a sparse layer, and a sparse layer alone
GRAPHS: dict[str, dict[str, Any]] = {
    "v2-lite": {"num_hidden_layers": 2},
    "v3": {"num_hidden_layers": 1, "first_k_dense_replace": 0},
    "glm": {"num_hidden_layers": 1, "mlp_layer_types": ["sparse"]},
}


@pytest.mark.shows("eager", "GPU", architectures=NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager_logits_are_those_of_transformers(case: Case, device: str, tmp_path: Path) -> None:
    """Prompts beside each other and in chunks: the rest of one follows cached tokens."""
    folder, known = case.save(tmp_path), sequences(VOCAB_SIZE, *LENGTHS)
    runner = load(folder, device, enforce_eager=True)
    assert all(isinstance(one, LatentCache) for one in runner.steps.caches)
    expected = transformers_logits(folder, known, device)
    assert max_difference(engine_logits(runner, known), expected) <= TOLERANCE


def test_short_steps_are_absorbed_and_give_the_same(device: str, tmp_path: Path) -> None:
    """Steps of other sizes, batches without padding, other blocks, and stacked experts."""
    folder, known = BY_NAME["v3"].save(tmp_path), sequences(VOCAB_SIZE, *LENGTHS)
    expected = transformers_logits(folder, known, device)
    edit(folder, stacked)
    for sizes in (
        {"max_num_batched_tokens": 16},
        {"max_num_batched_tokens": 48, "kvcache_block_size": 32, "pad_batches": False},
    ):
        runner = load(folder, device, enforce_eager=True, **sizes)
        assert max_difference(engine_logits(runner, known), expected) <= TOLERANCE


@pytest.mark.shows("graph", "GPU", architectures=NAMES)
@pytest.mark.parametrize("name", GRAPHS)
def test_graph_logits_are_those_of_transformers(name: str, device: str, tmp_path: Path) -> None:
    folder = BY_NAME[name].save(tmp_path, **GRAPHS[name])
    known = sequences(VOCAB_SIZE, (19, 23), (70, 73))
    runner = load(folder, device, **FEW_ROWS)
    assert runner.compiler.lowering is not None
    expected = transformers_logits(folder, known, device)
    assert max_difference(engine_logits(runner, known), expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["v2-lite", "v3"])
def test_bf16_agrees_up_to_rounding(name: str, device: str, tmp_path: Path) -> None:
    """Of experts all are chosen: rounding would change a choice between almost equal scores."""
    everyone = {"num_experts_per_tok": 12, "n_group": 1, "topk_group": 1}
    folder = BY_NAME[name].save(tmp_path, **BF16, **everyone)
    known = sequences(VOCAB_SIZE, *LENGTHS)
    check_bf16(folder, device, known, enforce_eager=True)


@pytest.mark.shows("ranks", architectures=NAMES)
@pytest.mark.parametrize(
    ("name", "size", "changes"),
    [
        ("v2-lite", 2, {"expert_parallel": True}),
        ("moonlight", 4, {"expert_parallel": False}),
        ("v2", 4, {}),
        ("v3", 2, {"expert_parallel": False}),
        ("glm", 2, {}),
    ],
)
def test_ranks_give_the_logits_of_one(
    name: str, size: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    test_shards.check(BY_NAME[name].save(tmp_path / "m"), size, VOCAB_SIZE, **changes)


# what is read ----------------------------------------------------------------------------------


def test_layers_that_predict_further_tokens_are_not_read(tmp_path: Path) -> None:
    """And others are refused."""
    folder = BY_NAME["v3"].save(tmp_path)
    known = sequences(VOCAB_SIZE, (19, 23))
    expected = engine_logits(load(folder, "cpu", enforce_eager=True), known)

    def predicting(layer_idx: int) -> Any:
        def change(weights: dict[str, Tensor]) -> None:
            weights[f"model.layers.{layer_idx}.eh_proj.weight"] = torch.full((4, 4), torch.nan)
            weights[f"model.layers.{layer_idx}.embed_tokens.weight"] = torch.zeros(3)

        return change

    edit(folder, predicting(3))  # num_nextn_predict_layers is 1
    found = engine_logits(load(folder, "cpu", enforce_eager=True), known)
    assert max_difference(found, expected) == 0
    edit(folder, predicting(4))
    with pytest.raises(ValueError, match=r"does not have, e.g. model.layers.4"):
        load(folder, "cpu", enforce_eager=True)


@pytest.mark.parametrize("kind", ["fp8 blocks", "awq"])
def test_quantized_checkpoints_alone_and_on_two_ranks(kind: str, tmp_path: Path) -> None:
    """The heads' matrices are dequantized when they are read; all bytes are counted."""
    sizes = {
        "hidden_size": 64, "q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 24,
        "moe_intermediate_size": 32, "intermediate_size": 64,
    }  # fmt: skip
    changes = {} if kind == "fp8 blocks" else sizes
    folder = pack(KINDS[kind], BY_NAME["v3"].save(tmp_path, **changes))
    params = check(folder, VOCAB_SIZE)
    assert isinstance(params.layers[0].kv_up_XL, Tensor)
    assert not isinstance(params.layers[0].first_ED, Tensor)
    check_ranks(folder, 2, VOCAB_SIZE)
    model, target = model_of(folder, 1), Target(torch.device("cpu"))
    for loaded in (loader.load(model, folder, target, int), loader.random(model, target, 0, int)):
        unique = {one.data_ptr(): one.nbytes for one in leaves(loaded)}
        assert model.param_bytes == sum(unique.values())


def leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for one in tree for leaf in leaves(one)] if isinstance(tree, tuple) else []


def test_the_option_fp8_rounds_all_but_the_heads_matrices(tmp_path: Path) -> None:
    folder, known = BY_NAME["v2-lite"].save(tmp_path), sequences(VOCAB_SIZE, (19, 23))
    runner = load(folder, "cpu", enforce_eager=True, quantization="fp8")
    plain = transformers_logits(folder, known, "cpu")[0]
    found = engine_logits(runner, known)[0]
    assert 1e-4 < (found - plain).abs().mean() / plain.std() < 0.3
    assert isinstance(runner.params.layers[0].kv_up_XL, Tensor)


def test_routers_are_in_fp32(tmp_path: Path) -> None:
    runner = load(BY_NAME["v3"].save(tmp_path), "cpu", dtype="bfloat16", enforce_eager=True)
    layer = runner.params.layers[1]
    assert layer.router_ED.dtype is layer.router_bias_E.dtype is torch.float32
    assert layer.mlp_norm_D.dtype is torch.bfloat16


def test_the_orders_of_rows_are_those_of_the_ops() -> None:
    heads = FirstOrder(6, 4)  # two heads of 2 + 4 rows, and an entry of 3 + 4
    assert heads.order((12, 7)).tolist() == [
        *(0, 1, 2, 4, 3, 5), *(6, 7, 8, 10, 9, 11), *(12, 13, 14, 15, 17, 16, 18),
    ]  # fmt: skip
    latent = FirstOrder(0, 4)
    assert latent.order((3, 6)).tolist() == [0, 1, 2, 3, 4, 5, 7, 6, 8]
    assert KeysFirst(2, 1).order((6,)).tolist() == [0, 1, 3, 4, 2, 5]


# whole engines ---------------------------------------------------------------------------------


def make(folder: Path, **options: Any) -> LLM:
    sizes: dict[str, Any] = {
        "max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64,
        "kvcache_block_size": 16, "num_kvcache_blocks": 65, "graph_batch_sizes": [4],
        "enforce_eager": True, "dtype": "float32", "skip_tokenizer_init": True, **options,
    }  # fmt: skip
    return LLM(str(folder), **sizes)


def expected_tokens(folder: Path, prompts: list[list[int]], num: int, device: str) -> Any:
    model, found = transformers_model(folder, device), []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(num):
            with torch.no_grad():
                logits = model(torch.tensor([ids], device=device)).logits
            ids.append(int(logits[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    return found


def test_answers_survive_batches_preemption_prefixes_proposals_and_sleep(
    device: str, tmp_path: Path
) -> None:
    folder = BY_NAME["v2-lite"].save(tmp_path, num_hidden_layers=2)
    prompts = [one.token_ids for one in sequences(VOCAB_SIZE, *((n, n) for n in (130, 70, 1, 33)))]
    expected = expected_tokens(folder, prompts, 40, device)
    llm = make(folder, device=device, draft_lengths=[3], enable_sleep_mode=True)
    assert tokens(llm, prompts, greedy(40)) == expected
    assert tokens(llm, prompts, greedy(40)) == expected
    assert llm.engine.metrics.num_cached_tokens >= 128 + 64 + 32
    by_prompt = {tuple(prompt): answer for prompt, answer in zip(prompts, expected)}

    def propose(request: Request) -> list[int]:
        known = len(request.output_ids)
        right = by_prompt[tuple(request.prompt_ids)][known : known + 3]
        return right if known % 2 else [(token + 1) % VOCAB_SIZE for token in right]

    llm.engine.propose = propose
    assert tokens(llm, prompts, greedy(40)) == expected
    llm.engine.propose = None
    for level in (1, 2):
        llm.sleep(level)
        llm.wake_up()
        assert tokens(llm, prompts[:2], greedy(40)) == expected[:2]
    llm.close()
    small = make(folder, device=device, num_kvcache_blocks=17)
    assert tokens(small, prompts, greedy(40)) == expected
    assert small.engine.scheduler.num_preemptions
    small.close()


def test_experts_on_the_host_give_the_same_logits(tmp_path: Path) -> None:
    folder, known = BY_NAME["v3"].save(tmp_path), sequences(VOCAB_SIZE, *LENGTHS[:3])
    expected = transformers_logits(folder, known, "cpu")
    runner = load(folder, "cpu", enforce_eager=True, expert_offload=5)
    assert runner.host_bytes
    assert max_difference(engine_logits(runner, known), expected) <= TOLERANCE


@pytest.mark.parametrize("size", [1, 2])
def test_a_token_takes_one_latent_on_every_rank(size: int, tmp_path: Path) -> None:
    model = model_of(BY_NAME["v3"].save(tmp_path), size)
    assert set(model.kept) == {PagedLatent(40, 8)}
    assert model.page_groups.token_bytes(torch.bfloat16) == 3 * (40 + 8) * 2


# what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, "DeepseekV3ForCausalLM has no bound for its keys"),
        ({"attention_backend": "sdpa"}, "'sdpa', which does not read a cache of latents"),
        ({"quantization": "int8"}, "'int8' is not supported for a model with experts"),
    ],
    ids=str,
)
def test_options_that_do_not_read_latents_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = BY_NAME["v3"].save(tmp_path, num_hidden_layers=1)
    with pytest.raises(ValueError, match=message):
        load(folder, "cpu", enforce_eager=True, **options)


def test_a_kimi_k2_is_read_as_a_deepseek_v3(tmp_path: Path) -> None:
    case = replace(BY_NAME["v3"], changes={"n_group": 1, "topk_group": 1, "num_hidden_layers": 2})
    folder, known = case.save(tmp_path), sequences(VOCAB_SIZE, (19, 23))
    expected = transformers_logits(folder, known, "cpu")
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {
        "model_type": "kimi_k2", "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "moe_layer_freq": 1, "ep_size": 1, "seq_aux": True, "aux_loss_alpha": 0.001,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    }  # fmt: skip
    path.write_text(json.dumps(config))
    found = engine_logits(load(folder, "cpu", enforce_eager=True), known)
    assert max_difference(found, expected) <= TOLERANCE
