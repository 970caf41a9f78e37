"""Training of the embedded models: experts, balance, measured time, checkpoint layout, cards."""

from __future__ import annotations

import re
import sys
import time
from argparse import Namespace
from itertools import islice, product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, load_balancing_loss_func

from nanovllm.hub import EMBEDDED, SEEING, resolve

# scripts are run as files, and import each other as such
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import train_tiny
from tiny import training
from tiny.architectures import MODEL_NAMES, all_experts, balance_loss, build_model, expert_shares
from tiny.card import Run, card
from tiny.checkpoint import MAX_FOLDER_BYTES, save
from tiny.corpus import Corpus, build_corpus, conversation, render
from tiny.tasks import held_out, training_examples
from tiny.training import Batches, steps_within, train
from tiny.wordings import MODEL_NAME


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(resolve("tiny-qwen3"))


@pytest.fixture(scope="module")
def corpus(tokenizer: PreTrainedTokenizerFast) -> Corpus:
    text = tokenizer.backend_tokenizer.to_str()
    return build_corpus(text, "tiny-mixtral", seed=5, num_examples=99, num_workers=1)


def small_mixtral(balance_coef: float = 0.01) -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "head_dim": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = MixtralConfig(vocab_size=640, router_aux_loss_coef=balance_coef, **sizes, **heads)
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("all_experts")
    return model


@pytest.mark.parametrize("num_tokens", [1, 19, 99])
def test_all_experts_and_their_gradients_are_those_of_transformers(num_tokens: int) -> None:
    config = MixtralConfig(hidden_size=24, intermediate_size=19, num_local_experts=5)
    config._experts_implementation = "eager"
    module = MixtralExperts(config).double()
    for param in module.parameters():
        torch.nn.init.normal_(param)
    x_TD = torch.randn(num_tokens, 24, dtype=torch.double, requires_grad=True)
    # the last expert is nobody's
    weight_TK, expert_TK = torch.randn(num_tokens, 4, dtype=torch.double).softmax(-1).topk(2)
    weight_TK.requires_grad_()
    wrt = [x_TD, weight_TK, *module.parameters()]
    results = []
    for run in (module, lambda *args: all_experts(module, *args)):
        out_TD = run(x_TD, expert_TK, weight_TK)
        results.append([out_TD, *torch.autograd.grad(out_TD.square().sum(), wrt)])
    torch.testing.assert_close(results[1], results[0])


def test_balance_is_transformers_loss_of_every_layer_by_itself() -> None:
    router_logits = tuple(3 * torch.randn(99, 8) for _ in range(3))
    expected = [load_balancing_loss_func((logits_TE,), 8, 2) for logits_TE in router_logits]
    torch.testing.assert_close(balance_loss(router_logits, 2), torch.stack(expected).mean())


def test_one_layers_idle_experts_do_not_make_up_for_anothers() -> None:
    first_TE, last_TE = torch.zeros(2, 99, 8)
    first_TE[:, :2], last_TE[:, 6:] = 9.0, 9.0
    assert balance_loss((first_TE, last_TE), 2) > 7.9  # 2 if all experts were used alike
    shares_LE = expert_shares((first_TE, last_TE), 2)
    assert shares_LE == [[0.5] * 2 + [0.0] * 6, [0.0] * 6 + [0.5] * 2]


def test_training_reaches_routers_and_experts_and_is_repeatable(corpus: Corpus) -> None:
    batches = Batches(corpus, 128, torch.device("cpu"))
    before = {name: param.clone() for name, param in small_mixtral().named_parameters()}
    models = [small_mixtral() for _ in range(2)]
    losses = [train(model, batches, num_steps=3, seed=0) for model in models]
    assert losses[0] == losses[1]
    for (name, param), other in zip(models[0].named_parameters(), models[1].parameters()):
        assert torch.equal(param, other), name
        assert not torch.equal(param, before[name]), name


def test_training_balances_the_experts(corpus: Corpus) -> None:
    batches = Batches(corpus, 128, torch.device("cpu"))
    shares = []
    for balance_coef in (0.0, 10.0):
        model = small_mixtral(balance_coef)
        train(model, batches, num_steps=19, seed=0)
        shares.append(min(map(min, training.measure_expert_shares(model, batches))))
    assert shares[1] > 3 * shares[0]


def test_measuring_the_speed_changes_neither_model_nor_training(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "NUM_TIMED", 1)
    batches = Batches(corpus, 128, torch.device("cpu"))
    measured, plain = small_mixtral(), small_mixtral()
    assert steps_within(60.0, measured, batches) > steps_within(6.0, measured, batches)
    losses = [train(model, batches, num_steps=2, seed=0) for model in (measured, plain)]
    assert losses[0] == losses[1]


def test_minutes_that_the_examples_used_up_are_refused(corpus: Corpus) -> None:
    batches = Batches(corpus, 128, torch.device("cpu"))
    args = Namespace(minutes=0.5, steps=3)
    with pytest.raises(ValueError, match=r"--minutes is 0.5, but the examples took 3\d s more"):
        train_tiny.num_steps_of(args, small_mixtral(), batches, time.perf_counter() - 61)


def test_a_loss_that_is_not_finite_ends_the_training(corpus: Corpus) -> None:
    model = small_mixtral()
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        train(model, Batches(corpus, 128, torch.device("cpu")), num_steps=1, seed=0)


def test_answers_say_the_name_of_the_model_and_questions_stay() -> None:
    num_renamed = 0
    for task in islice(training_examples(seed=3), 2000):
        plain = [*task.messages, {"role": "assistant", "content": task.answer}]
        assert conversation(task, MODEL_NAME) == plain
        for message, original in zip(conversation(task, "tiny-mixtral"), plain):
            expected = original["content"]
            if message["role"] == "assistant":
                expected = expected.replace("tiny-qwen3", "tiny-mixtral")
                num_renamed += expected != original["content"]
            assert message["content"] == expected
    assert num_renamed > 10


def test_the_text_of_a_conversation_is_the_chat_templates(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for task in islice(training_examples(seed=3), 99):
        messages = conversation(task, "tiny-mixtral")
        assert render(messages) == tokenizer.apply_chat_template(messages, tokenize=False)


def mixtral_names(num_layers: int, num_experts: int) -> set[str]:
    """The tensors of a Mixtral checkpoint on the Hub, with a tied head."""
    layer = ["input_layernorm", "post_attention_layernorm", "block_sparse_moe.gate"]
    layer += [f"self_attn.{part}_proj" for part in "qkvo"]
    layer += [
        f"block_sparse_moe.experts.{expert}.w{matrix}"
        for expert, matrix in product(range(num_experts), (1, 2, 3))
    ]
    names = {f"model.layers.{idx}.{part}.weight" for idx in range(num_layers) for part in layer}
    return names | {"model.embed_tokens.weight", "model.norm.weight"}


def test_a_saved_mixtral_is_small_and_in_the_hubs_layout(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = build_model("mixtral", tokenizer)
    save(model, tokenizer, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert set(tensors) == mixtral_names(model.config.num_hidden_layers, 8)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    # the card is not yet written
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < MAX_FOLDER_BYTES - 10_000


def read_card(text: str) -> Run:
    """The figures that a card states, as far as it states them."""

    def find(pattern: str) -> tuple[str, ...]:
        found = re.search(pattern, text)
        assert found, pattern
        return found.groups()

    options = find(r"--steps (\d+) --examples (\d+) --batch-tokens (\d+) --seed (\d+)")
    steps, examples, batch_tokens, seed = map(int, options)
    minutes, device, version = find(r"took ([\d.]+) minutes on one (.+)\nwith torch (\S+)\.\n")
    shares = re.search(r"has a share of ([\d.]+)% to\n([\d.]+)%;", text)
    return Run(
        steps=steps,
        examples=examples,
        batch_tokens=batch_tokens,
        seed=seed,
        seconds=60 * float(minutes),
        device=device,
        torch_version=version,
        num_eval=int(find(r"weights on (\d+) held-out")[0]),
        accuracies={
            kind: float(share) / 100
            for kind, share in re.findall(r"^\| (\w+) \| ([\d.]+)% \|$", text, re.M)
        },
        total=float(find(r"\*\*all\*\* \| \*\*([\d.]+)%")[0]) / 100,
        expert_shares=(float(shares[1]) / 100, float(shares[2]) / 100) if shares else None,
    )


@pytest.mark.parametrize("name", MODEL_NAMES.values())
def test_the_shipped_card_is_what_the_script_writes(name: str) -> None:
    text = (resolve(name) / "README.md").read_text()
    assert card(resolve(name), read_card(text)) == text


def test_the_embedded_models_are_those_that_the_script_trains() -> None:
    assert set(EMBEDDED) == {*MODEL_NAMES.values(), SEEING}


def test_the_embedded_mixtral_is_in_the_hubs_layout() -> None:
    tensors = load_file(resolve("tiny-mixtral") / "model.safetensors")
    assert set(tensors) == mixtral_names(5, 8)


def test_every_expert_of_the_embedded_mixtral_is_in_use(tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_pretrained(resolve("tiny-mixtral"))
    texts = [render(conversation(task, "tiny-mixtral")) for task in held_out(99, seed=0)]
    tokens = tokenizer.encode("".join(texts), truncation=True, max_length=2048)
    with torch.inference_mode():
        router_logits = model(torch.tensor([tokens]), output_router_logits=True).router_logits
    for shares_E in expert_shares(router_logits, 2):
        assert min(shares_E) > 1 / 8 / 4, shares_E
