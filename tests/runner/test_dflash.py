"""DFlash drafts give what their formula gives: every token of a block sees the whole block."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nanovllm import LLM
from nanovllm.startup.draft_heads import DFlash
from tests.conftest import save_tiny
from tests.engines import greedy, random_prompts
from tests.engines import tokens as llm_tokens
from tests.runner.heads import Watched, Weights, make, rms, rotated, states
from tests.runner.proposers import MODES, SIZES, tokens

NUM, BLOCK, MASK, HIDDEN, HEAD, THETA, EPS = 4, 8, 500, 64, 16, 5e3, 1e-5
READ, RANK = (0, 2), 8
PROMPTS = random_prompts([19, 1, 40, 7], seed=3)
CONFIG: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "hidden_size": HIDDEN,
    "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": HEAD, "vocab_size": 512, "rms_norm_eps": EPS,
    "rope_theta": THETA, "max_position_embeddings": 256, "hidden_act": "silu",
    "block_size": BLOCK, "num_target_layers": 4, "layer_types": ["full_attention"] * 2,
    "dflash_config": {"mask_token_id": MASK, "target_layer_ids": list(READ)},
}  # fmt: skip


def weights() -> Weights:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        if len(shape) == 1:
            return torch.randn(shape, generator=generator) * 0.1 + 1
        return torch.randn(shape, generator=generator) * 0.3

    made = {"fc.weight": draw(HIDDEN, len(READ) * HIDDEN)}
    made |= {f"{name}.weight": draw(HIDDEN) for name in ("hidden_norm", "norm")}
    for i in range(2):
        layer = {
            "self_attn.q_proj": draw(64, HIDDEN), "self_attn.k_proj": draw(32, HIDDEN),
            "self_attn.v_proj": draw(32, HIDDEN), "self_attn.o_proj": draw(HIDDEN, 64),
            "self_attn.q_norm": draw(HEAD), "self_attn.k_norm": draw(HEAD),
            "input_layernorm": draw(HIDDEN), "post_attention_layernorm": draw(HIDDEN),
            "mlp.gate_proj": draw(80, HIDDEN), "mlp.up_proj": draw(80, HIDDEN),
            "mlp.down_proj": draw(HIDDEN, 80),
        }  # fmt: skip
        made |= {f"layers.{i}.{name}.weight": weight for name, weight in layer.items()}
    return made


def own_head() -> Weights:
    """A head of 70 tokens, as `speculators` writes it."""
    generator = torch.Generator().manual_seed(6)
    ids = torch.randperm(512, generator=generator)[:70].sort()[0]
    return {
        "lm_head.weight": torch.randn(70, HIDDEN, generator=generator) * 0.3,
        "d2t": ids - torch.arange(70), "t2d": torch.zeros(512, dtype=torch.bool),
    }  # fmt: skip


def save_speculators(folder: Path, **changes: Any) -> Path:
    """The draft with a head of its own, in the layout of `speculators`."""
    layer = {key: value for key, value in CONFIG.items() if key not in ("dflash_config",)}
    config = {
        "architectures": ["DFlashSpeculator"], "speculators_model_type": "dflash",
        "transformer_layer_config": layer, "draft_vocab_size": 70, "block_size": BLOCK,
        "mask_token_id": MASK, "aux_hidden_state_layer_ids": [one + 1 for one in READ],
        "sample_from_anchor": False, "sliding_window_non_causal": False,
        "projector_type": "dflash", "shift_label": False, **changes,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({**weights(), **own_head()}, folder / "model.safetensors")
    return folder


def save(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(weights(), folder / "model.safetensors")
    return folder


def markov() -> Weights:
    """What DSpark has beside `own_head`, as `speculators` writes it."""
    generator = torch.Generator().manual_seed(7)
    return {
        "markov_head.markov_w1.weight": torch.randn(512, RANK, generator=generator),
        "markov_head.markov_w2.weight": torch.randn(70, RANK, generator=generator) * 3,
        "confidence_head.proj.weight": torch.randn(1, HIDDEN + RANK, generator=generator),
        "confidence_head.proj.bias": torch.zeros(1),
    }


def save_dspark(folder: Path, **changes: Any) -> Path:
    """The layout of `speculators`; without a field the newest token's output is a draft."""
    fields = {"speculators_model_type": "dspark", "markov_rank": RANK, **changes}
    save_speculators(folder, **fields)
    config = json.loads((folder / "config.json").read_text())
    if "sample_from_anchor" not in changes:
        del config["sample_from_anchor"]
    (folder / "config.json").write_text(json.dumps(config))
    save_file({**weights(), **own_head(), **markov()}, folder / "model.safetensors")
    return folder


def dspark_drafts(hf: Any, known: Sequence[int], num: int, from_anchor: bool) -> list[int]:
    """What `save_dspark` gives after `known` tokens."""
    own, w = own_head(), markov()
    outputs = block_outputs(hf, known, num - from_anchor)[0 if from_anchor else 1 :]
    found, before = [], known[-1]
    for logits in outputs @ own["lm_head.weight"].T:
        added = w["markov_head.markov_w2.weight"] @ w["markov_head.markov_w1.weight"][before]
        best = int((logits + added).argmax())
        before = best + int(own["d2t"][best])
        found.append(before)
    return found


def expected_drafts(
    hf: Any, known: Sequence[int], num: int, own: Weights | None = None
) -> list[int]:
    """What the draft gives after `known` tokens, computed as a whole."""
    head = hf.get_output_embeddings().weight.detach() if own is None else own["lm_head.weight"]
    best = (block_outputs(hf, known, num)[1:] @ head.T).argmax(-1)
    return (best if own is None else best + own["d2t"][best]).tolist()


def block_outputs(hf: Any, known: Sequence[int], num: int) -> torch.Tensor:
    """The normalised outputs of the newest of `known` tokens and of `num` mask tokens."""
    w, table = weights(), hf.get_input_embeddings().weight.detach()
    joined = torch.cat(states(hf, known[:-1], READ), -1)
    context = rms(joined @ w["fc.weight"].T, w["hidden_norm.weight"], EPS)
    h = table[[known[-1]] + [MASK] * num]

    def heads(x: Tensor, name: str, norm: str | None) -> Tensor:
        found = (x @ w[f"{name}_proj.weight"].T).view(len(x), -1, HEAD)
        return found if norm is None else rms(found, w[f"{norm}.weight"], EPS)

    for i in range(2):
        one, attn = f"layers.{i}.", f"layers.{i}.self_attn."
        x = rms(h, w[f"{one}input_layernorm.weight"], EPS)
        both = torch.cat((context, x))
        q = heads(x, attn + "q", attn + "q_norm")
        padding = torch.zeros(len(context), *q.shape[1:])
        q = rotated(torch.cat((padding, q)), THETA)[len(context) :]
        k = rotated(heads(both, attn + "k", attn + "k_norm"), THETA).repeat_interleave(2, 1)
        v = heads(both, attn + "v", None).repeat_interleave(2, 1)
        scores = torch.einsum("tnh,snh->nts", q, k) * HEAD**-0.5
        o = torch.einsum("nts,snh->tnh", scores.softmax(-1), v).flatten(1)
        h = h + o @ w[f"{attn}o_proj.weight"].T
        x = rms(h, w[f"{one}post_attention_layernorm.weight"], EPS)
        gate, up = (x @ w[f"{one}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        h = h + (torch.nn.functional.silu(gate) * up) @ w[f"{one}mlp.down_proj.weight"].T
    return rms(h, w["norm.weight"], EPS)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    return save_tiny(folder, "qwen3", vocab_size=512, hidden_size=HIDDEN, num_hidden_layers=4)


@pytest.mark.parametrize("layout", ["dflash", "speculators"])
def test_a_block_is_what_its_formula_gives(layout: str, target: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    own = own_head() if layout == "speculators" else None
    folder = (save if own is None else save_speculators)(tmp_path / "draft")
    hf = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    watched = Watched(DFlash(NUM, str(folder)))
    engine = make(target, watched, NUM, **MODES["eager"])
    for prompt in PROMPTS:
        watched.seen.clear()
        (answer,) = tokens(engine, [prompt], greedy(15))
        sequence = prompt + answer
        checked = [one for one in watched.seen if one[0] < len(sequence)]
        assert len(checked) > 4
        for pos, drafted in checked:
            assert drafted == expected_drafts(hf, sequence[: pos + 1], NUM, own), f"after {pos}"
    engine.close()


@pytest.mark.parametrize("from_anchor", [True, False])
def test_a_block_whose_tokens_add_logits_is_what_its_formula_gives(
    from_anchor: bool, target: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    changes = {} if from_anchor else {"sample_from_anchor": False}
    folder = save_dspark(tmp_path / "draft", **changes)
    hf = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    watched = Watched(DFlash(NUM, str(folder)))
    engine = make(target, watched, NUM, **MODES["eager"])
    differing = 0
    for prompt in PROMPTS[:2]:
        watched.seen.clear()
        (answer,) = tokens(engine, [prompt], greedy(15))
        sequence = prompt + answer
        checked = [one for one in watched.seen if one[0] < len(sequence)]
        assert len(checked) > 4
        for pos, drafted in checked:
            known = sequence[: pos + 1]
            assert drafted == dspark_drafts(hf, known, NUM, from_anchor), f"after {pos}"
            differing += drafted != expected_drafts(hf, known, NUM, own_head())
    assert differing > 4
    engine.close()


@pytest.mark.usefixtures("lowered_ops")
@pytest.mark.parametrize("saved", [save, save_dspark])
def test_captured_steps_with_blocks_give_the_same_answers_and_drafts(
    saved: Callable[[Path], Path], target: Path, tmp_path: Path
) -> None:
    """Their graphs run node by node here. Beyond the end of a request a draft has no cache block,
    and depends on the padding."""
    llm = LLM(str(target), **SIZES, **MODES["eager"])
    expected = llm_tokens(llm, PROMPTS, greedy(15))
    llm.close()
    folder, seen = str(saved(tmp_path / "draft")), []
    for options in (MODES["eager"], {"graph_batch_sizes": (6,)}):
        watched = Watched(DFlash(NUM, folder))
        engine = make(target, watched, NUM, **options)
        watched.seen.clear()
        assert tokens(engine, PROMPTS, greedy(15)) == expected
        whole = []
        for prompt in PROMPTS[::3]:
            watched.seen.clear()
            tokens(engine, [prompt], greedy(15))
            last = len(prompt) + 15 - 1 - NUM
            whole.append([one for one in watched.seen if one[0] <= last])
        seen.append(whole)
        engine.close()
    assert seen[0] == seen[1] and all(seen[0])


def test_the_longest_sequence_ends_as_without_drafts(target: Path, tmp_path: Path) -> None:
    (prompt,) = random_prompts([245], seed=8)
    found = []
    for options in ({}, {"speculative_config": {
        "method": "dflash", "model": str(save(tmp_path / "draft")), "num_speculative_tokens": 7,
    }}):  # fmt: skip
        llm = LLM(str(target), **SIZES, **options, **MODES["eager"])
        found.append(llm_tokens(llm, [prompt], greedy(100)))
        llm.close()
    assert found[0] == found[1] and len(found[0][0]) == 11


INNER = CONFIG["dflash_config"]
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "another": ({"dflash_config": None}, "dflash_config is None: it must be an object"),
    "type": ({"model_type": "llama"}, "model_type 'llama' of a DFlash draft is not supported"),
    "second version": ({"dflash_config": {**INNER, "selector_rank": 8}}, "selector_rank of a DF"),
    "scaled": ({"output_multiplier": 0.5}, "output_multiplier of a DFlash draft is 0.5"),
    "windows": ({"layer_types": ["sliding_attention"] * 2}, "all must be full_attention"),
    "mask": ({"dflash_config": {**INNER, "mask_token_id": 512}}, "mask_token_id is 512: .* below"),
    "no layers": ({"dflash_config": {**INNER, "target_layer_ids": []}}, "up to 32 layers, from 0"),
    "beyond": (
        {"dflash_config": {**INNER, "target_layer_ids": [0, 4]}}, r"they must be 0 … 3",
    ),
    "width": ({"hidden_size": 32}, "has 32 numbers in a hidden state, the model has 64"),
    "vocabulary": ({"vocab_size": 501}, "has 501 tokens in its vocabulary, the model has 512"),
    "short": ({"block_size": 4}, "blocks of 4 has at most 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_configs_of_other_drafts_are_refused(name: str, target: Path, tmp_path: Path) -> None:
    changes, message = CHANGES[name]
    folder = save(tmp_path / "draft", **changes)
    with pytest.raises(ValueError, match=message):
        make(target, DFlash(NUM, str(folder)), NUM, **MODES["eager"])


SPECULATORS: dict[str, tuple[dict[str, Any], str]] = {
    "another": ({"speculators_model_type": "eagle3"}, "speculators_model_type 'eagle3' is not"),
    "gated": (
        {"speculators_model_type": "dspark", "markov_head_type": "gated"},
        "markov_head_type 'gated' is not supported",
    ),
    "rank": ({"markov_rank": "8"}, "markov_rank is '8': it must be at least 0"),
    "domino": ({"projector_type": "domino"}, "projector_type of a DFlash draft is 'domino'"),
    "anchor": ({"sample_from_anchor": 1}, "sample_from_anchor is 1: it must be true or false"),
    "embeddings": ({"aux_hidden_state_layer_ids": [0, 3]}, "must be layers, from 1 on"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECULATORS)
def test_other_drafts_of_speculators_are_refused(name: str, target: Path, tmp_path: Path) -> None:
    changes, message = SPECULATORS[name]
    folder = save_speculators(tmp_path / "draft", **changes)
    with pytest.raises(ValueError, match=message):
        make(target, DFlash(NUM, str(folder)), NUM, **MODES["eager"])
