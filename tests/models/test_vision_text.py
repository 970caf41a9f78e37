"""Text models of vision checkpoints: embeddings and positions of images are given, by transformers.

Logits and greedy tokens are compared with those of transformers' whole model.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from nanovllm import LLM, SamplingParams
from nanovllm.engine.request import MediaPrompt
from nanovllm.runner.encoders import MMItem
from nanovllm.schedule.request import MMSpan
from tests.models.tower_cases import BUDGETS

IMAGE, VIDEO, START = 90, 91, 92
TEXT: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}  # fmt: skip
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START}
NUM_TOKENS = 9
# images of a prompt as (height, width) in patches; 0 stands for a piece of text
PROMPTS: dict[str, list[Any]] = {
    "first": [(8, 12), 0],
    "middle": [0, (8, 4), 0],
    "last": [0, (2, 14)],
    "adjacent": [0, (4, 4), (6, 2), 0, (2, 2)],
    "text": [0],
}


def qwen2_5() -> Any:
    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                       "mrope_section": [2, 3, 3]}}  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 16,
    }  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **TOKENS)
    )


QWEN3_TEXT = TEXT | {
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
}
QWEN3_VISION = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
    "out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2],
}  # fmt: skip


def qwen3() -> Any:
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=QWEN3_TEXT, vision_config=QWEN3_VISION, **TOKENS)
    )


def qwen3_moe() -> Any:
    """The second layer is dense; features are added after sparse layers and after this one."""
    text = QWEN3_TEXT | {
        "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    }  # fmt: skip
    return Qwen3VLMoeForConditionalGeneration(
        Qwen3VLMoeConfig(text_config=text, vision_config=QWEN3_VISION, **TOKENS)
    )


NAMES = (
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
)
MODELS = {"qwen2_5": qwen2_5, "qwen3": qwen3, "qwen3_moe": qwen3_moe}


@pytest.fixture(scope="module", params=MODELS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' model, and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    return saved(request.param, folder), folder


def saved(name: str, folder: Path) -> Any:
    """transformers' model with random weights, saved in a folder."""
    torch.manual_seed(0)
    hf = MODELS[name]().eval()
    for parameter_name, param in hf.named_parameters():
        if param.dim() > 1:
            torch.nn.init.normal_(param, std=0.1 if "visual" in parameter_name else 0.2)
    # of equal tokens the first is chosen, so no answer has an image's token
    hf.lm_head.weight.data[80:] = hf.lm_head.weight.data[0]
    hf.save_pretrained(folder)
    return hf


class Given:
    """A prompt with images, and what transformers makes of it."""

    def __init__(self, hf: Any, parts: list[Any], seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        ids: list[int] = []
        grids, self.starts = [], []
        for part in parts:
            if part == 0:
                ids += torch.randint(0, 80, (7,), generator=draw).tolist()
                continue
            ids.append(START)
            self.starts.append(len(ids))
            ids += [IMAGE] * (part[0] * part[1] // 4)
            grids.append([1, *part])
        self.ids, self.inputs = ids, {"input_ids": torch.tensor([ids])}
        self.embeddings: list[tuple[int, torch.Tensor]] = []
        self.images: list[tuple[MMSpan, MMItem]] = []
        self.positions = None
        if not grids:
            return
        grid = torch.tensor(grids)
        width = hf.model.visual.patch_embed.proj.weight[0].numel()
        pixels = torch.randn(int(grid.prod(1).sum()), width, generator=draw)
        kinds = (self.inputs["input_ids"] == IMAGE).int()
        self.inputs |= {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}
        with torch.no_grad():
            found = hf.model.get_image_features(pixels, grid, return_dict=True)
        sizes = (grid.prod(1) // 4).tolist()
        features = [torch.cat(list(found.pooler_output))]
        for one in getattr(found, "deepstack_features", None) or ():
            # of all images in transformers 5.17, and one for each image later
            features.append(one if isinstance(one, torch.Tensor) else torch.cat(list(one)))
        embeds = torch.cat(features, dim=1).split(sizes)
        self.embeddings = list(zip(self.starts, embeds))
        patches = pixels.split(grid.prod(1).tolist())
        for start, size, one, shape in zip(self.starts, sizes, patches, grids):
            digest = hashlib.sha256(one.numpy().tobytes() + str(shape).encode()).digest()
            image = MMItem(one, (shape[0], shape[1], shape[2]))
            self.images.append((MMSpan(start, size, digest), image))
        rope = hf.model.get_rope_index(
            self.inputs["input_ids"], mm_token_type_ids=kinds, image_grid_thw=grid
        )[0]
        self.positions = rope[:, 0].numpy().astype(np.int64)

    def expected(self, hf: Any) -> tuple[list[int], list[torch.Tensor]]:
        """Greedy tokens, and the log-probabilities of each of them.

        The whole sequence is fed each time: `generate` keeps positions of earlier prompts.
        """
        inputs, tokens, logprobs = dict(self.inputs), [], []
        for _ in range(NUM_TOKENS):
            hf.model.rope_deltas = None
            with torch.no_grad():
                logits = hf(**inputs, use_cache=False).logits[0, -1]
            tokens.append(int(logits.argmax()))
            logprobs.append(logits.log_softmax(-1))
            added = torch.tensor([tokens[-1:]])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], added], dim=1)
            if "mm_token_type_ids" in inputs:
                kinds = inputs["mm_token_type_ids"]
                inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(added).int()], 1)
        return tokens, logprobs


def answers(
    llm: LLM, prompts: list[Given], num_tokens: int = NUM_TOKENS, *, encodes: bool = False
) -> list[Any]:
    """The completions. `encodes`: the engine computes the embeddings of images from patches."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=99)
    ids = []
    for one in prompts:
        add: Any = llm.engine.add_request
        if encodes:
            given = MediaPrompt(one.ids, one.positions, one.images)
            ids.append(add(given, params, incremental=False))
            continue
        given = {"embeddings": one.embeddings, "positions": one.positions}
        ids.append(add(one.ids, params, incremental=False, **given))
    found: dict[int, Any] = {}
    while len(found) < len(ids):
        llm.engine.advance()
        for output in llm.engine.take():
            found[output.request_id] = output.completion
    return [found[one] for one in ids]


def engine(folder: Path, **options: Any) -> LLM:
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 512, "max_model_len": 128}
    return LLM(
        str(folder), dtype="float32", graph_batch_sizes=[8], kvcache_block_size=16,
        skip_tokenizer_init=True,
        **{"device": "cpu", "vision_patch_budgets": BUDGETS, **sizes, **options},
    )  # fmt: skip


def test_prompts_share_blocks_where_images_and_positions_are_the_same(both: Any) -> None:
    hf, folder = both
    parts = [0, (8, 12), 0, (6, 6), 0]
    prompt, other = Given(hf, parts, 3), Given(hf, parts, 3)
    start, embeds = other.embeddings[1]
    other.embeddings[1] = start, embeds + 0.5
    turned = Given(hf, parts, 3)
    assert turned.positions is not None
    turned.positions[:, 40:] += 2
    llm = engine(folder, enforce_eager=True)
    try:
        first, again, changed, moved = (
            answers(llm, [one])[0] for one in (prompt, prompt, other, turned)
        )
    finally:
        llm.close()
    assert again.token_ids == first.token_ids
    assert again.num_cached_tokens == len(prompt.ids) // 16 * 16
    # the second image begins at token 40, in the third block
    assert changed.num_cached_tokens == moved.num_cached_tokens == 32
    assert changed.logprobs[0] != first.logprobs[0] != moved.logprobs[0]


def test_a_preempted_prompt_with_images_goes_on_as_before(both: Any) -> None:
    hf, folder = both
    prompts = [Given(hf, [0, (8, 12), 0], seed) for seed in range(4)]
    large, small = engine(folder), engine(folder, num_kvcache_blocks=12)
    try:
        expected = [one.token_ids for one in answers(large, prompts, 40)]
        found = [one.token_ids for one in answers(small, prompts, 40)]
        preempted = [one for one in small.get_metrics() if "preempt" in one.name]
    finally:
        large.close()
        small.close()
    assert found == expected
    assert preempted[0].value > 0


@pytest.mark.shows("eager", "graph", "GPU", architectures=NAMES)
@pytest.mark.parametrize("enforce_eager", [True, False])
@pytest.mark.parametrize("chunk", [512, 16])
def test_logits_and_tokens_are_those_of_transformers(
    both: Any, device: str, enforce_eager: bool, chunk: int
) -> None:
    hf, folder = both
    options = {"device": device, "max_num_batched_tokens": chunk}
    llm = engine(folder, enforce_eager=enforce_eager, **options)
    prompts = [Given(hf, parts, seed) for seed, parts in enumerate(PROMPTS.values())]
    try:
        for prompt, done in zip(prompts, answers(llm, prompts)):
            tokens, logprobs = prompt.expected(hf)
            assert done.token_ids == tokens
            for wanted, got in zip(logprobs, done.logprobs):
                actual = torch.tensor([got[i].logprob for i in range(99)])
                torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-4)
    finally:
        llm.close()


@pytest.mark.shows("images", "GPU", architectures=NAMES)
@pytest.mark.parametrize("enforce_eager", [True, False])
def test_the_engine_encodes_images(both: Any, device: str, enforce_eager: bool) -> None:
    hf, folder = both
    prompts = [Given(hf, parts, seed) for seed, parts in enumerate(PROMPTS.values())]
    options = {"device": device, "max_num_batched_tokens": 16}
    llm = engine(folder, enforce_eager=enforce_eager, **options)
    try:
        for prompt, done in zip(prompts, answers(llm, prompts, encodes=True)):
            tokens, logprobs = prompt.expected(hf)
            assert done.token_ids == tokens
            for wanted, got in zip(logprobs, done.logprobs):
                actual = torch.tensor([got[i].logprob for i in range(99)])
                torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-4)
        assert not llm.engine._held.items  # type: ignore[union-attr]
    finally:
        llm.close()
