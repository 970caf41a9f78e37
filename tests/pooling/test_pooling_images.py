"""Models that pool and see: vectors of prompts with images are those of transformers."""

from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from nanovllm import LLM, EngineConfig, PoolingParams, pairs
from nanovllm.compile.lower import eager, inductor
from nanovllm.media import decoders
from nanovllm.pooling_outputs import PoolingFailed
from nanovllm.pooling_params import PoolingInfo
from nanovllm.startup.compile_farm import builder
from nanovllm.startup.pooling import _template, for_task
from nanovllm.startup.resolve import resolve_without_weights
from tests.api.engine_server import MODEL, Served, through_http
from tests.engine.seeing import FILM, PICTURE, TEXT, Seeing, make
from tests.engine.test_images import data_url, pictures
from tests.media.vision_cases import picture, without_torchvision
from tests.models import gemma_images
from tests.models.test_gemma3_images import GRID, NUM_TOKENS, images, made, patches
from tests.models.tower_cases import BUDGETS
from tests.pooling.pooling_cases import assert_near, embeddings, pooling_llm, save_decoder, unit

__all__ = ["without_torchvision"]

# prompts with the sizes of their images, as (width, height)
PROMPTS: tuple[tuple[str, list[tuple[int, int]]], ...] = (
    (f"{PICTURE}what is it?", [(60, 85)]),
    ("only text", []),
    (f"the {PICTURE} and {PICTURE} in", [(131, 77), (90, 40)]),
    (f"the end{PICTURE}", [(1, 1)]),
)
URL = data_url(picture(60, 85))


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    return make("Qwen3VLProcessor", tmp_path_factory.mktemp("seeing"))


def seeing_llm(seeing: Seeing, task: str = "embed", **options: Any) -> LLM:
    tuning = {"vision_patch_budgets": BUDGETS[:1]}  # larger images run op by op
    return pooling_llm(seeing.folder, task, tuning=tuning, **options)


@pytest.fixture(scope="module")
def llm(seeing: Seeing) -> Iterator[LLM]:
    llm = seeing_llm(seeing)
    yield llm
    llm.close()


def asked(text: str, sizes: list[tuple[int, int]]) -> Any:
    return {"prompt": text, "multi_modal_data": {"image": pictures(sizes)}} if sizes else text


ASKED = [asked(*one) for one in PROMPTS]


@torch.no_grad()
def states(seeing: Seeing, text: str, **media: Any) -> Tensor:
    """transformers' last hidden states [T, D] of a prompt."""
    inputs = seeing.case.theirs(text=[text], return_tensors="pt", **media)
    seeing.hf.model.rope_deltas = None  # it keeps those of earlier prompts
    found: Tensor = seeing.hf.model(**inputs).last_hidden_state[0]
    return found


def wanted(seeing: Seeing) -> list[Tensor]:
    media = ({"images": pictures(sizes)} if sizes else {} for _, sizes in PROMPTS)
    return [unit(states(seeing, text, **one)[-1]) for (text, _), one in zip(PROMPTS, media)]


def test_embeddings_of_images_are_those_of_transformers(seeing: Seeing, llm: LLM) -> None:
    assert_near(embeddings(llm, ASKED), wanted(seeing))


def test_images_of_qwen2_5_are_pooled(tmp_path: Path) -> None:
    seeing = make("Qwen2_5_VLProcessor", tmp_path)
    llm = seeing_llm(seeing)
    assert_near(embeddings(llm, ASKED), wanted(seeing))
    llm.close()


def test_features_may_follow_the_last_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TEXT, "num_hidden_layers", 2)
    seeing = make("Qwen3VLProcessor", tmp_path)
    llm = seeing_llm(seeing)
    assert llm.engine.runner.model.adds_to_last  # type: ignore[attr-defined]
    assert_near(embeddings(llm, ASKED), wanted(seeing))
    llm.close()


def test_the_model_alone_has_its_own_names(seeing: Seeing, tmp_path: Path) -> None:
    for path in seeing.folder.iterdir():
        if not path.name.endswith(".safetensors"):
            shutil.copy(path, tmp_path)
    seeing.hf.model.save_pretrained(tmp_path)  # architectures: Qwen3VLModel
    llm = pooling_llm(tmp_path)
    assert_near(embeddings(llm, ASKED), wanted(seeing))
    llm.close()


def test_workers_build_every_bucket(seeing: Seeing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "lower_if_worth_it", eager.lower)
    options = {
        "task": "embed", "device": "cpu", "max_model_len": 32, "max_num_batched_tokens": 32,
        "tuning": {"vision_patch_budgets": BUDGETS[:1]}, "dtype": "float32",
    }  # fmt: skip
    config = EngineConfig.from_options(str(seeing.folder), options)
    resolved = for_task(resolve_without_weights(config))
    buckets = resolved.spec.layout.buckets
    assert buckets == [("prefill", 32), ("vision", 64)]
    runner = builder.small_pool_runner(resolved)
    for bucket in buckets:
        runner.run_bucket(*bucket)
    num = runner.compiler.num_compiled
    runner.warm_up(str)
    assert runner.compiler.num_compiled == num > 0


def test_order_and_company_change_only_rounding(llm: LLM) -> None:
    together = embeddings(llm, ASKED[::-1])[::-1]
    assert_near([embeddings(llm, [one])[0] for one in ASKED], together, atol=1e-5)


def test_programs_give_the_same(seeing: Seeing, monkeypatch: pytest.MonkeyPatch) -> None:
    """The traced programs of steps with images and without, run node by node."""
    monkeypatch.setattr(inductor, "lower_if_worth_it", eager.lower)
    llm = seeing_llm(seeing, enforce_eager=False, max_model_len=48, max_num_batched_tokens=48)
    engine: Any = llm.engine
    assert {(num, has_given) for num, _, has_given in engine.runner._steps} == {
        (48, False), (48, True)
    }  # fmt: skip
    assert_near(embeddings(llm, ASKED), wanted(seeing))
    assert_near(embeddings(llm, ASKED[1:2]), wanted(seeing)[1:2])
    llm.close()


def test_a_video_is_pooled(seeing: Seeing, llm: LLM, without_torchvision: None) -> None:
    frames, text = [picture(70, 50, seed=i) for i in range(4)], f"see {FILM}!"
    found = embeddings(llm, {"prompt": text, "multi_modal_data": {"video": [frames]}})
    assert_near(found, [unit(states(seeing, text, videos=[frames])[-1])])


def test_means_are_of_all_tokens(seeing: Seeing) -> None:
    llm = seeing_llm(seeing, pooler_config={"pooling_type": "MEAN"})
    text, sizes = PROMPTS[2]
    mean = states(seeing, text, images=pictures(sizes)).mean(0)
    assert_near(embeddings(llm, ASKED[2:3]), [unit(mean)])
    llm.close()


def test_conversations_are_prompts(llm: LLM) -> None:
    parts = [{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": "it"}]
    talk = [{"role": "user", "content": parts}]
    texts = [f"user: {PICTURE}it; ", f"user: {PICTURE}it; assistant: "]
    same = [{"prompt": one, "multi_modal_data": {"image": URL}} for one in texts]
    assert_near(embeddings(llm, talk), embeddings(llm, same[:1]), atol=1e-6)
    found = embeddings(llm, ["a", talk], chat_options={"add_generation_prompt": True})
    assert_near(found, embeddings(llm, ["a", same[1]]), atol=1e-6)
    with pytest.raises(ValueError, match="no prompt is a list of messages"):
        llm.embed("a", chat_options={"add_generation_prompt": True}, use_tqdm=False)


def test_too_little_memory_for_a_decoder_ends_the_call(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_all(fd: int, data: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/path")

    prompt = {"prompt": PICTURE, "multi_modal_data": {"image": data_url(picture(61, 86))}}
    with monkeypatch.context() as patched:
        patched.setattr(decoders, "write_all", write_all)
        with pytest.raises(PoolingFailed, match="the media has failed: No space left on device"):
            llm.embed([prompt], use_tqdm=False)
    assert len(embeddings(llm, [prompt])) == 1


def test_what_cannot_be_read_ends_the_call(llm: LLM) -> None:
    bad = {"prompt": PICTURE, "multi_modal_data": {"image": "data:image/png;base64,AAAA"}}
    with pytest.raises(PoolingFailed, match="image 1: the data are not a picture"):
        llm.embed([ASKED[0], bad], use_tqdm=False)
    refused = {
        "placeholders": {"prompt": "a", "multi_modal_data": {"image": picture(9, 9)}},
        "longer|128": {**ASKED[0], "prompt": "x" * 125 + PICTURE},
    }
    for words, prompt in refused.items():
        with pytest.raises((ValueError, PoolingFailed), match=words):
            llm.embed([ASKED[1], prompt], use_tqdm=False)
    with pytest.raises(ValueError, match="a prompt with image 1 cannot be truncated"):
        llm.embed(ASKED, truncate_prompt_tokens=-1, use_tqdm=False)
    engine: Any = llm.engine
    assert not engine.has_unfinished and not engine._held.items and not len(engine._media)
    assert_near(embeddings(llm, ASKED[:1]), embeddings(llm, ASKED[:2])[:1], atol=1e-5)


def test_aborted_images_leave_nothing(llm: LLM) -> None:
    engine: Any = llm.engine
    engine.abort(engine.add_request(ASKED[0], PoolingParams()))
    (done,) = (one.completion for one in engine.step())
    assert done.finish_reason == "abort" and not engine.has_unfinished and not engine._held.items


def test_tokens_score_prompts_with_images(seeing: Seeing) -> None:
    llm = seeing_llm(seeing, "classify", hf_overrides={"classifier_from_token": ["a", "b"]})
    assert llm.engine.tokenizer is not None
    ids = [llm.engine.tokenizer.encode(one)[0] for one in "ab"]
    found = llm.classify(ASKED, use_tqdm=False)
    for (text, sizes), one in zip(PROMPTS, found, strict=True):
        last = states(seeing, text, **({"images": pictures(sizes)} if sizes else {}))[-1]
        both = seeing.hf.lm_head(last)[ids].softmax(-1).detach()
        assert one.outputs.probs == pytest.approx([float(both[1])], abs=1e-4)
    llm.close()


def test_pairs_are_texts(llm: LLM) -> None:
    for data in (ASKED[0], [ASKED[0]]):
        with pytest.raises(ValueError, match="data_2 has a prompt: it must be a text"):
            llm.score("a", data, use_tqdm=False)


def test_the_prompt_of_the_reranker_that_sees_is_the_published_one(seeing: Seeing) -> None:
    labels: dict[str, Any] = {"hf_overrides": {
        "architectures": ["Qwen3VLForSequenceClassification"], "classifier_from_token": ["a", "b"]
    }}  # fmt: skip
    llm = seeing_llm(seeing, "score", **labels)
    assert llm.engine.info.pooling is not None and llm.engine.info.pooling.size == 1
    llm.close()
    template = _template({"architectures": labels["hf_overrides"]["architectures"]}, ("no", "yes"))
    info = PoolingInfo("classify", 1, template=template)
    assert pairs.pair_prompt(info, None, "q", "d", "i").text == (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query "
        'and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        "<|im_start|>user\n<Instruct>: i<Query>:q\n<Document>:d<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_images_of_gemma_are_pooled(tmp_path: Path) -> None:
    """Their tokens see the whole image."""
    hf = made(tmp_path)
    llm = pooling_llm(tmp_path, skip_tokenizer_init=True)
    engine: Any = llm.engine
    expected, order = [], []
    for seed, parts in enumerate(gemma_images.PROMPTS):
        ids, starts = gemma_images.prompt_of(parts, NUM_TOKENS, seed)
        pixels = images(len(starts), seed)
        media: Any = [(patches(one), GRID) for one in pixels]
        prompt = gemma_images.media_prompt(ids, starts, NUM_TOKENS, media)
        order.append(engine.add_request(prompt, PoolingParams()))
        types = torch.tensor([[int(one == gemma_images.IMAGE) for one in ids]])
        more = {"pixel_values": pixels, "token_type_ids": types} if starts else {}
        with torch.no_grad():
            out = hf.model(input_ids=torch.tensor([ids]), **more).last_hidden_state[0, -1]
        expected.append(unit(out))
    done: dict[int, Any] = {}
    while len(done) < len(order):
        done |= {one.request_id: one.completion.pooled for one in engine.step()}
    assert_near([torch.from_numpy(done[one]) for one in order], expected)
    llm.close()


def content(*urls: str, text: str = "it") -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]}


def posted(llm: LLM, path: str, *bodies: dict[str, Any]) -> list[httpx.Response]:
    async def work(served: Served) -> list[httpx.Response]:
        sent = (served.http.post(path, json={"model": MODEL, **body}) for body in bodies)
        return list(await asyncio.gather(*sent))

    return through_http(llm, work)


def test_a_server_embeds_messages_with_images(llm: LLM) -> None:
    prompt = {"prompt": f"user: {PICTURE}it; ", "multi_modal_data": {"image": URL}}
    same = embeddings(llm, [prompt, "user: it; "])
    for path, key in (("/v1/embeddings", "embedding"), ("/pooling", "data")):
        answers = posted(llm, path, content(URL), content())
        assert [one.status_code for one in answers] == [200, 200], answers[0].text
        found = [torch.tensor(one.json()["data"][0][key]) for one in answers]
        assert_near(found, same, atol=1e-5)
    assert answers[0].json()["usage"]["prompt_tokens"] > answers[1].json()["usage"]["prompt_tokens"]


def test_a_server_applies_the_rules_of_media(llm: LLM) -> None:
    words = {
        "file:///etc/hostname": "allowed_local_media_path",
        "http://127.0.0.1/a.png": "allowed_media_domains",
        "data:image/png;base64,AAAA": "the data are not a picture",
    }
    answers = posted(
        llm, "/v1/embeddings", *map(content, words), {**content(URL), "truncate_prompt_tokens": 5}
    )
    for answer, wanted in zip(answers, [*words.values(), "cannot be truncated"], strict=True):
        assert answer.status_code == 400 and wanted in answer.json()["error"]["message"], answer


def test_a_model_that_does_not_see_refuses_images(tmp_path: Path) -> None:
    save_decoder(tmp_path)
    template = tmp_path / "template.jinja"
    template.write_text("{% for one in messages %}{{ one.content }}{% endfor %}")
    llm = pooling_llm(tmp_path, chat_template=str(template))
    with pytest.raises(ValueError, match=r"the prompt has image 1, but .* accepts text only"):
        llm.embed(ASKED, use_tqdm=False)
    (answer,) = posted(llm, "/v1/embeddings", content(URL))
    assert answer.status_code == 400 and "accepts text only" in answer.json()["error"]["message"]
    llm.close()
