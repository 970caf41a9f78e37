"""Tokenizers of GGUF files encode as those that they were made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from nanovllm import LLM, gguf_tokenizer
from nanovllm.config import EngineConfig
from nanovllm.models.gguf.header import GgufError
from nanovllm.startup.checkpoint_cache import PROBES, read_tokenizer
from nanovllm.startup.config_file import transformers_config
from nanovllm.startup.generation_config import eos_token_ids, generation_config
from nanovllm.startup.store_folder import open_store
from nanovllm.tokenizer import has_tokenizer, load_full
from tests.conftest import save_tiny
from tests.engines import save_tokenizer
from tests.models.gguf_cases import add_byte_level, write

TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
Write = Callable[[gguf.GGUFWriter], None]


def only_tokenizer(path: Path, tokenizer: Write) -> Path:
    """A file without tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    tokenizer(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_byte_level_tokens_are_those_of_the_original(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    original = load_full(tmp_path)
    path = only_tokenizer(
        tmp_path / "a.gguf", lambda writer: add_byte_level(writer, tmp_path, "gpt-2", TEMPLATE)
    )
    found = gguf_tokenizer.load(path)
    for text in (*PROBES, "<s>the<end></s>", "<pad><unk> an in the"):
        ids = original.encode(text)
        assert found.encode(text) == ids
        for skip in (False, True):
            assert found.decode(ids, skip_special_tokens=skip) == original.decode(
                ids, skip_special_tokens=skip
            )
    assert found.eos_token_id == original.eos_token_id
    messages = [{"role": "user", "content": "in"}]
    assert found.apply_chat_template(messages, tokenize=False) == "<s>in</s>"


@pytest.mark.parametrize(
    "pre, parts",
    [
        ("gpt-2", ["it", "'s", " 1234", "!!", " ", " x"]),
        ("smollm", ["it", "'s", " ", "1", "2", "3", "4", "!!", " ", " x"]),
        ("llama-bpe", ["it", "'s", " ", "123", "4", "!!", " ", " x"]),
        ("qwen2", ["it", "'s", " ", "1", "2", "3", "4", "!!", " ", " x"]),
        ("tekken", ["it", "'s", " ", "1", "2", "3", "4", "!!", " ", " x"]),
        ("qwen35", ["it", "'s", " ", "1", "2", "3", "4", "!!", " ", " x"]),
        ("glm4", ["it", "'s", " ", "123", "4", "!!", " ", " x"]),
        ("deepseek-v3", ["it", "'s", " ", "123", "4", "!!", " ", " x"]),
        ("gpt-4o", ["it's", " ", "123", "4", "!!", " ", " x"]),
    ],
)
def test_texts_are_split_as_the_name_says(pre: str, parts: list[str], tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    path = only_tokenizer(tmp_path / "a.gguf", lambda writer: add_byte_level(writer, tmp_path, pre))
    backend = gguf_tokenizer.load(path).backend_tokenizer
    found = [one for one, _ in backend.pre_tokenizer.pre_tokenize_str("it's 1234!!  x")]
    assert found == [part.replace(" ", "Ġ") for part in parts]
    has_bos = pre in ("llama-bpe", "tekken")
    assert backend.encode("x").ids[0] == (1 if has_bos else backend.token_to_id("x"))


WORDS = ["▁", "h", "e", "l", "o", "w", "r", "d", "he", "ll", "hell", "hello", "▁hello", "▁w", "or",
         "▁wor", "ld", "▁world", "1", "2"]  # fmt: skip


def add_sentence_piece(writer: gguf.GGUFWriter, *, has_prefix: bool = True) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(WORDS)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(WORDS))])
    writer.add_token_types(kinds)
    for name, number in (("bos", 1), ("eos", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_space_prefix(has_prefix)


@pytest.mark.parametrize("has_prefix", [True, False])
def test_sentence_piece_tokens_follow_from_scores(has_prefix: bool, tmp_path: Path) -> None:
    path = only_tokenizer(
        tmp_path / "a.gguf", lambda writer: add_sentence_piece(writer, has_prefix=has_prefix)
    )
    found = gguf_tokenizer.load(path)
    first = ["▁hello"] if has_prefix else ["hello"]
    texts = [*first, "▁world", "1", "▁", "2", "<0xC3>", "<0xA9>"]
    assert found.convert_ids_to_tokens(found.encode("hello world1 2é")) == ["<s>", *texts]
    for text in ("hello world1 2é", " hello", "日本語 hello", "hello  world"):
        assert found.decode(found.encode(text), skip_special_tokens=True) == text
    assert found.encode("</s>")[-1] == 2


def test_merges_of_the_file_are_used_in_gemma_4(tmp_path: Path) -> None:
    """The merges that follow from scores, without those of one word."""
    vocab = {word: i for i, word in enumerate(WORDS)}
    merges = gguf_tokenizer.merges_of(vocab, [-float(i) for i in range(len(WORDS))])

    def add(writer: gguf.GGUFWriter) -> None:
        add_sentence_piece(writer, has_prefix=False)
        del writer.kv_data[0]["tokenizer.ggml.model"]
        writer.add_tokenizer_model("gemma4")
        writer.add_token_merges([" ".join(one) for one in merges if "".join(one) != "▁world"])

    found = gguf_tokenizer.load(only_tokenizer(tmp_path / "a.gguf", add))
    assert found.convert_ids_to_tokens(found.encode("hello world"))[1:] == ["hello", "▁wor", "ld"]


def test_merges_of_equal_scores_keep_the_order_of_parts() -> None:
    vocab = {"a": 0, "b": 1, "ab": 2, "ba": 3, "aba": 4}
    found = gguf_tokenizer.merges_of(vocab, [0.0, 0.0, -1.0, -1.0, -0.5])
    assert found == [("a", "ba"), ("ab", "a"), ("a", "b"), ("b", "a")]


def without(*keys: str) -> Callable[[gguf.GGUFWriter], None]:
    def change(writer: gguf.GGUFWriter) -> None:
        add_sentence_piece(writer)
        for key in keys:
            del writer.kv_data[0][f"tokenizer.ggml.{key}"]

    return change


def as_model(name: str, **more: Any) -> Callable[[gguf.GGUFWriter], None]:
    def change(writer: gguf.GGUFWriter) -> None:
        without("model")(writer)
        writer.add_tokenizer_model(name)
        if "pre" in more:
            writer.add_tokenizer_pre(more["pre"])
        if "merges" in more:
            writer.add_token_merges(more["merges"])

    return change


@pytest.mark.parametrize(
    "tokenizer, message",
    [
        (as_model("t5"), "tokenizer.ggml.model is 't5', which is not supported: only 'gpt2', "),
        (as_model("gpt2", pre="x"), "tokenizer.ggml.pre is 'x', which is not supported: only gpt"),
        (as_model("gpt2", pre="gpt-2", merges=["ab"]), "'ab' is not a merge of two tokens"),
        (as_model("gpt2", pre="gpt-2", merges=["z z"]), "the tokenizer cannot be read"),
        (without("scores"), "it has 279 tokens, but 0 scores"),
        (lambda writer: (add_sentence_piece(writer), writer.add_pad_token_id(999)),
         "padding_token_id is 999, but there are 279 tokens"),
    ],
)  # fmt: skip
def test_tokenizers_that_cannot_be_read_are_refused(
    tokenizer: Write, message: str, tmp_path: Path
) -> None:
    path = only_tokenizer(tmp_path / "a.gguf", tokenizer)
    with pytest.raises(GgufError, match=message):
        gguf_tokenizer.load(path)


def test_an_engine_chats_with_a_file_s_tokenizer_from_the_store_too(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    saved = save_tiny(tmp_path, "llama", num_hidden_layers=1)
    path = write(
        saved, tokenizer=lambda writer: add_byte_level(writer, tmp_path, "gpt-2", TEMPLATE)
    ).path
    assert has_tokenizer(path)
    hf = transformers_config(path, {})
    assert eos_token_ids(path, hf) == {3, 4} and generation_config(path) == {}
    llm = LLM(str(path), device="cpu", enforce_eager=True, max_model_len=64, num_kvcache_blocks=8)
    (output,) = llm.chat([{"role": "user", "content": "in the"}], use_tqdm=False)
    assert output["prompt_token_ids"] == load_full(tmp_path).encode("<s>in the</s>")
    store = open_store(EngineConfig(str(path)))
    again = read_tokenizer(path, store)
    assert again is not None and again._full is None  # the store's copy
    assert again.encode("in the") == load_full(tmp_path).encode("in the")
