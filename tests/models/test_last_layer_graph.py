"""After attention, the last layer of a prefill step computes only the kept tokens, correctly."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from nanovllm.compile.lower import calls
from nanovllm.compile.trace import tensors, trace
from nanovllm.kernels import ops
from nanovllm.kernels.triton import common as triton_common
from nanovllm.models import loader as weights
from nanovllm.models.config import ModelConfig
from nanovllm.models.dense import dense_model
from nanovllm.models.model import Batch, LayerCache, LayerCall
from nanovllm.models.rope import rotary_table
from nanovllm.platforms.base import Platform
from nanovllm.platforms.cpu import CpuPlatform
from nanovllm.platforms.cuda import CudaPlatform
from nanovllm.tools.costs import cost

NUM_TOKENS, NUM_ROWS, BLOCK_SIZE = 989, 5, 16
LENGTHS = [700, 1, 19, 99]  # the fifth row and the last tokens are padding
KEPT = [699, 700, 719, 818, 0]


def layer_config(*, biased: bool, qk_norm: bool) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=32, hidden_size=64, ffn_size=96, num_layers=1,
        num_heads=4, num_kv_heads=2, head_dim=16, norm_eps=1e-6, max_position=1024,
        inv_freq=(1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005), rope_scale=1.0,
        tied_embeddings=True, qk_norm=qk_norm, qkv_bias=biased, out_bias=biased, mlp_bias=biased,
    )  # fmt: skip


def last_layer(cfg: ModelConfig) -> tuple[Any, dict[str, object]]:
    """The region and its inputs: prompts of LENGTHS tokens in own blocks, padding on block 0."""
    model = dense_model(cfg)
    drawn = weights.random(model, weights.Target(torch.device("cpu")), 0, int).layers[0]
    layer = type(drawn)(
        *(weight if weight is None else torch.randn(weight.shape) * 0.3 for weight in drawn)
    )
    table_RP = torch.zeros(NUM_ROWS, 64, dtype=torch.int32)
    pos, slot, first_block = [], [], 1
    for row, length in enumerate(LENGTHS):
        num_blocks = -(-length // BLOCK_SIZE)
        table_RP[row, :num_blocks] = torch.arange(first_block, first_block + num_blocks)
        pos += range(length)
        slot += range(first_block * BLOCK_SIZE, first_block * BLOCK_SIZE + length)
        first_block += num_blocks
    num_padding = NUM_TOKENS - len(pos)
    lengths_R = torch.tensor([*LENGTHS, 0], dtype=torch.int32)
    batch = Batch(
        rope_pos_T=torch.tensor(pos + [0] * num_padding),
        slot_T=torch.tensor(slot + [0] * num_padding),
        block_table_RP=table_RP,
        seq_len_R=lengths_R,
        q_start_S=torch.cat((torch.zeros(1), lengths_R.cumsum(0))).int(),
        keep_R=torch.tensor(KEPT),
    )
    h_TD = torch.randn(NUM_TOKENS, cfg.hidden_size)
    # equal, as in the engine: several threads write all of it to one slot
    h_TD[-num_padding:] = h_TD[-1]
    cache = torch.randn(2, first_block, BLOCK_SIZE, cfg.num_kv_heads, cfg.head_dim)
    inputs: dict[str, object] = {
        "w": layer,
        "kv": LayerCache(cache[0].clone(), cache[1].clone()),
        "cos_sin_MH": rotary_table(cfg.inv_freq, cfg.rope_scale, 1024, torch.device("cpu")),
        "batch": batch,
        "h_TD": h_TD,
    }
    return partial(model.layer, cfg, LayerCall("", model.layer_kinds[0], NUM_TOKENS)), inputs


def gpu(monkeypatch: pytest.MonkeyPatch) -> Platform:
    """A CUDA platform without a GPU, which it does not need to name its passes."""
    monkeypatch.setattr(triton_common, "has_matrix_units", lambda device: True)
    platform = object.__new__(CudaPlatform)
    platform.device = torch.device("cuda")
    return platform


def names(graph: GraphModule) -> list[str]:
    """Names of all calls except views, in order."""
    targets: list[Any] = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    targets = [
        target
        for target in targets
        if isinstance(target, torch._ops.OpOverload) and not target.is_view
    ]
    return [target._schema.name.partition("::")[2] for target in targets]


def copies(inputs: dict[str, object]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors(tuple(inputs.values()))]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_after_attention_every_call_has_the_kept_rows_alone(
    name: str, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = CpuPlatform() if name == "cpu" else gpu(monkeypatch)
    region, inputs = last_layer(layer_config(biased=biased, qk_norm=not biased))
    graph, fakes, result = trace(region, inputs)
    assert isinstance(result, Tensor) and result.shape == (NUM_ROWS, 64)
    products = [node for node in graph.graph.nodes if node.target is ops.linear]
    assert [node.meta["val"].shape[0] for node in products] == [NUM_TOKENS] + [NUM_ROWS] * 3
    for _, one in platform.passes(fuse=True):
        graph = one(graph, fakes)
    graph.graph.lint()
    assert calls.is_enough(graph), "no compiler is needed"
    made = [node for node in graph.graph.nodes if node.op == "call_function"]
    start = next(idx for idx, node in enumerate(made) if node.target is ops.paged_attention)
    picked = [node.args[0] for node in made if node.target is torch.ops.aten.index_select.default]
    assert len(picked) == 2
    computed = [
        value
        for node in made[start + 1 :]
        if isinstance(node.target, torch._ops.OpOverload) and not node.target.is_view
        for value in tensors(node.meta["val"])
    ]
    assert {value.shape[0] for value in computed} == {NUM_ROWS}
    if name == "cuda":
        product = "addmm" if biased else "mm"
        assert names(graph)[:4] == ["rms_norm", product, "qk_norm_rope_store", "paged_attention"]
        assert names(graph)[4:] == ["index_select"] * 2 + ["fused_linear"] * 3, (
            "the residuals are taken in"
        )
    # the values equal those of the layer that keeps all tokens
    batch = inputs["batch"]
    assert isinstance(batch, Batch)
    keeping_all = {**inputs, "batch": batch._replace(keep_R=None)}
    all_inputs, own_inputs = copies(keeping_all), copies(inputs)
    (expected_TD,) = trace(region, keeping_all)[0](*all_inputs)
    (found_RD,) = graph(*own_inputs)
    torch.testing.assert_close(found_RD, expected_TD[KEPT], atol=1e-4, rtol=1e-4)
    del own_inputs[-2]  # keep_R
    # both write the same to the cache, and to nothing else
    for found, wanted in zip(own_inputs, all_inputs):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_without_fused_products_the_sum_is_added_onto_where_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_common, "has_matrix_units", lambda device: False)  # as on Turing
    platform = object.__new__(CudaPlatform)
    platform.device = torch.device("cuda")
    region, inputs = last_layer(layer_config(biased=False, qk_norm=True))
    graph, fakes, _ = trace(region, inputs)
    for _, one in platform.passes(fuse=True):
        graph = one(graph, fakes)
    assert names(graph)[4:] == ["index_select"] * 2 + [
        "mm",
        "add_rms_norm",
        "mm",
        "silu_mul",
        "linear_",
    ]
    (found_RD,) = graph(*copies(inputs))
    torch.testing.assert_close(found_RD, region(*inputs.values()), atol=1e-4, rtol=1e-4)


def test_picking_rows_costs_the_rows_that_are_picked() -> None:
    index_select = torch.ops.aten.index_select.default
    assert cost(
        index_select, [torch.ones(1000, 8), 0, torch.zeros(3).long()], {}, torch.ones(3, 8)
    ) == (2 * 96, 0)
