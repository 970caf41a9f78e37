"""The stored config and tokenizer equal those of transformers, or nothing is stored."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from nanovllm.compile.store import Store
from nanovllm.models import qwen3, registry
from nanovllm.startup import checkpoint_cache as readings
from nanovllm.startup import config_file
from nanovllm.startup.checkpoint_cache import StoredConfig, read_config, read_tokenizer
from nanovllm.startup.generation_config import eos_token_ids
from nanovllm.tokenizer import Decoding, Tokenizer

EMBEDDED = Path(readings.__file__).parents[1] / "assets" / "tiny-qwen3"
EXPERTS: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 3,
}  # fmt: skip
CONFIGS: list[PretrainedConfig] = [
    LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        dtype="bfloat16",
    ),
    MistralConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, sliding_window=7),
    Qwen2Config(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        max_window_layers=2,
        dtype="float16",
    ),
    Qwen3Config(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        eos_token_id=[3, 4],
    ),
    MixtralConfig(**EXPERTS, num_local_experts=4, sliding_window=7),
    Qwen2MoeConfig(**EXPERTS, num_experts=5, norm_topk_prob=True, decoder_sparse_step=2),
    Qwen3MoeConfig(**EXPERTS, num_experts=6, mlp_only_layers=[1, 3]),
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def checkpoint(folder: Path, config: PretrainedConfig) -> Path:
    name = type(config).__name__.replace("Config", "ForCausalLM")
    config.architectures = [name]
    config.save_pretrained(folder)
    return folder


def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("transformers is asked")

    monkeypatch.setattr(config_file, "transformers_config", refuse)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_a_kept_config_gives_the_same_model(
    config: PretrainedConfig, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path, config)
    first = read_config(folder, store)
    assert not isinstance(first, StoredConfig)
    without_transformers(monkeypatch)
    again = read_config(folder, store)
    assert isinstance(again, StoredConfig)
    architecture = registry.architecture(again.architectures)
    for max_model_len in (None, 40):
        read = [
            architecture(hf, dtype=torch.float32, max_model_len=max_model_len)
            for hf in (first, again)
        ]
        assert read[0] == read[1]
    assert first.dtype == again.dtype and first.dtype in (None, torch.bfloat16, torch.float16)
    assert eos_token_ids(folder, first) == eos_token_ids(folder, again)


def test_reading_a_config_writes_no_docstrings(tmp_path: Path) -> None:
    """Runs in its own process, which has not imported the class yet."""
    code = """if True:
        import sys
        from pathlib import Path
        from transformers import AutoConfig
        from nanovllm.startup import checkpoint_cache as readings
        module = sys.modules["transformers.utils.auto_docstring"]
        module.auto_class_docstring = write = lambda cls, **_: sys.exit("a docstring")
        assert readings.read_config(Path(sys.argv[1]), None).vocab_size > 0
        assert module.auto_class_docstring is write
        del module.auto_class_docstring  # as where transformers has no such function
        readings.read_config(Path(sys.argv[1]), None)
        """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(
        [sys.executable, "-c", code, str(EMBEDDED)], env=environment, timeout=100, check=True
    )


def test_a_changed_config_is_read_anew(tmp_path: Path, store: Store) -> None:
    read_config(checkpoint(tmp_path, CONFIGS[0]), store)
    changed = json.loads((tmp_path / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    again = read_config(tmp_path, store)
    assert not isinstance(again, StoredConfig) and again.rms_norm_eps == 0.5


def test_a_config_that_modelopt_s_file_completes_is_read_anew(tmp_path: Path, store: Store) -> None:
    assert not hasattr(read_config(checkpoint(tmp_path, CONFIGS[0]), store), "quantization_config")
    content = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    for is_kept in (False, True):
        found = read_config(tmp_path, store)
        assert isinstance(found, StoredConfig) == is_kept
        assert found.quantization_config == {**content, "quant_method": "modelopt"}


def test_overrides_have_a_kept_config_of_their_own(tmp_path: Path, store: Store) -> None:
    folder = checkpoint(tmp_path, CONFIGS[3])
    for kept in (False, True):
        for overrides in (None, {"rms_norm_eps": 0.5}, {"rms_norm_eps": 0.25}):
            hf = read_config(folder, store, overrides)
            assert isinstance(hf, StoredConfig) == kept
            assert hf.rms_norm_eps == (overrides or {"rms_norm_eps": 1e-6})["rms_norm_eps"]


def test_a_config_with_a_value_that_json_changes_is_not_kept(tmp_path: Path, store: Store) -> None:
    folder = checkpoint(tmp_path, CONFIGS[3])
    config = json.loads((folder / "config.json").read_text())
    config["per_layer_config"] = {"0": {"rms_norm_eps": 0.5}}
    (folder / "config.json").write_text(json.dumps(config))
    for _ in range(2):
        with pytest.raises(ValueError, match="per_layer_config is not supported"):
            qwen3.model(read_config(folder, store), dtype=torch.float32)


def test_a_rope_type_with_code_of_its_own_is_not_kept(tmp_path: Path, store: Store) -> None:
    scaled = LlamaConfig(
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    )
    folder = checkpoint(tmp_path, scaled)
    for _ in range(2):
        assert not isinstance(read_config(folder, store), StoredConfig)


def is_quick(tokenizer: Tokenizer | None) -> bool:
    assert tokenizer is not None
    return tokenizer._quick is not None


def test_a_kept_tokenizer_is_the_same_to_encode_and_decode(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_tokenizer(EMBEDDED, store)
    assert first is not None
    full = first.full
    with monkeypatch.context() as patch:
        without_transformers(patch)
        kept = read_tokenizer(EMBEDDED, store)
        assert kept is not None and is_quick(kept) and kept.eos_id == first.eos_id is not None
        for text in (
            *readings.PROBES,
            "What is 17 + 25?",
            "<|im_start|>user\nUpper case: abc<|im_end|>",
        ):
            ids = kept.encode(text)
            assert ids == full.encode(text)
            for skip in (False, True):
                expected = full.decode(ids, skip_special_tokens=skip)
                assert kept.decode(ids, Decoding(skip)) == expected


def test_users_get_the_real_tokenizer_at_every_start(store: Store) -> None:
    for _ in range(2):
        tokenizer = read_tokenizer(EMBEDDED, store)
        assert tokenizer is not None
        assert tokenizer.for_reading is not None and is_quick(tokenizer)
        full = tokenizer.full
        assert full is tokenizer.for_reading and not is_quick(tokenizer)
        assert isinstance(full, transformers.PreTrainedTokenizerBase) and full is tokenizer.full
        assert full("Hi")["input_ids"] == full.encode("Hi", add_special_tokens=False)
        assert len(full) > 0 and isinstance(full.decode(7), str)
        assert pickle.loads(pickle.dumps(full)).encode("Hi") == full.encode("Hi")
        full.chat_template = "changed"
        assert tokenizer.full.chat_template == "changed"
        # what users change counts
        full.add_tokens(["Hello, world"])
        assert tokenizer.encode("Hello, world") == full.encode("Hello, world")
        assert len(tokenizer.encode("Hello, world")) == 1


def test_a_changed_tokenizer_is_read_anew_and_none_stays_none(tmp_path: Path, store: Store) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, tmp_path)
    read_tokenizer(tmp_path, store)
    num_before = len(list(store.entries()))
    assert is_quick(read_tokenizer(tmp_path, store))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {
        "clean_up_tokenization_spaces": True
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for _ in range(2):  # transformers edits this tokenizer's text, so it is not stored
        assert not is_quick(read_tokenizer(tmp_path, store))
    assert len(list(store.entries())) == num_before
    empty = checkpoint(tmp_path / "empty", CONFIGS[0])
    assert read_tokenizer(empty, store) is None


def test_a_tokenizer_that_does_more_than_its_library_is_not_kept() -> None:
    full = transformers.AutoTokenizer.from_pretrained(EMBEDDED)
    assert readings._description(full)

    class Louder:
        backend_tokenizer = full.backend_tokenizer

        def encode(self, text: str) -> list[int]:
            return list(full.encode(text.upper()))

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return str(full.decode(ids, skip_special_tokens=skip_special_tokens))

    assert readings._description(Louder()) is None
