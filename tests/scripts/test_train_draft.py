"""A head that the script trains for some seconds drafts for its model; its loss is that of use."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

# scripts are run as files, and import each other as such
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import train_draft
from draft import block, collect, prompt_words, prompts, training
from draft.collect import Counts, Examples, Target, Text
from draft.head import Batch, Head, batch_of, drafted_tokens, numbers_of, save
from tiny import tasks

from nanovllm.models.config import ModelConfig
from nanovllm.startup.draft_heads import DFlash
from tests.conftest import save_tiny
from tests.engines import greedy
from tests.runner.heads import Watched, drafted, make, states
from tests.runner.proposers import MODES, tokens

HIDDEN, VOCAB = 48, 90


def made_target() -> Target:
    config = ModelConfig(
        architecture="", vocab_size=VOCAB, hidden_size=HIDDEN, ffn_size=80, num_layers=3,
        num_heads=4, num_kv_heads=2, head_dim=16, norm_eps=1e-5, max_position=64,
        inv_freq=(1.0,) * 8, rope_scale=1.0, tied_embeddings=True,
    )  # fmt: skip
    return Target(
        config, torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN), torch.ones(HIDDEN)
    )


def made_examples(texts: list[Text], choices: list[Tensor], num_states: int) -> Examples:
    """Texts with random states."""
    num, token_N = sum(map(len, choices)), torch.tensor([one for text in texts for one in text[0]])
    firsts = [0, *accumulate(len(text.token_T) for text in texts)][:-1]
    states_NJ, last_ND = torch.randn(num, num_states * HIDDEN), torch.randn(num, HIDDEN)
    likely_NP = torch.cat(choices)[:, None]
    return Examples(texts, firsts, token_N, states_NJ, last_ND, likely_NP, torch.ones(num, 1))


def test_a_head_that_is_trained_for_seconds_is_accepted(tmp_path: Path) -> None:
    file, out = tmp_path / "prompts", tmp_path / "head"
    found = islice(tasks.training_examples(5), 110)
    texts = [" ".join(task.messages[0]["content"].split()) for task in found]
    file.write_text("\n".join(texts))
    args = train_draft.parse_args(
        ["--model", "tiny-qwen3", "--out", str(out), "--prompts", str(file), "--steps", "90",
         "--num-tokens", "32", "--max-model-len", "128", "--num-speculative-tokens", "2",
         "--draft-vocab-size", "300", "--learning-rate", "2e-3", "--device", "cpu"]
    )  # fmt: skip
    result = train_draft.run(args)
    assert result["accept_length"] > 1.6 and result["steps"] > 20
    first, second = result["accepted_per_position"]
    assert first > 0.4 and second > 0.1
    config = json.loads((out / "config.json").read_text())
    assert config["draft_vocab_size"] == 300


def test_the_rounds_of_training_are_the_passes_of_use(tmp_path: Path) -> None:
    """The tokens that the last entry gives in each round are those that the saved head drafts."""
    torch.manual_seed(1)
    target, num = made_target(), 3
    target_X = torch.arange(0, VOCAB, 2)
    head = Head(target, target_X)
    save(head, target, target_X, (0, 1, 2), tmp_path)
    tokens = torch.randint(0, VOCAB, (14,)).tolist()
    states_TJ = torch.randn(len(tokens) - 1, 3 * HIDDEN)

    def layer(token_T: torch.Tensor, state_TD: torch.Tensor) -> torch.Tensor:
        embeds = torch.nn.functional.embedding(token_T, target.embed_VD)
        return head.midlayer(embeds.unsqueeze(0), state_TD.unsqueeze(0), [])[0]

    def choose(out_D: torch.Tensor) -> int:
        return int(target_X[head.lm_head(head.norm(out_D)).argmax()])

    with torch.no_grad():
        plain = drafted(tokens, num, head.fc(states_TJ), layer, choose, lambda out_TD: out_TD)
        # the same entries and the drafted ones, whose states come from the rounds before
        token_T = torch.tensor([*tokens[1:], *plain[:-1]])
        padded_TJ = torch.cat((states_TJ, torch.full((num - 1, 3 * HIDDEN), 9.0)))
        label_T1 = torch.full((len(token_T), 1), -100)
        label_T1[-num:, 0] = torch.tensor(plain) // 2
        last_TD = torch.zeros(len(token_T), HIDDEN)
        parts = (token_T, padded_TJ, last_TD, label_T1, torch.ones_like(label_T1))
        batch = Batch(*(one.unsqueeze(0) for one in parts))
        for number in range(num):
            # of the labels, only that of this round's chain counts
            own_T1, place = torch.full_like(label_T1, -100), len(tokens) - 2 + number
            own_T1[place] = label_T1[place]
            _, shares = head.loss(batch._replace(likely_BTP=own_T1.unsqueeze(0)), num)
            assert shares[number] == 1.0


def test_a_saved_block_drafts_what_it_gives_in_training(tmp_path: Path) -> None:
    """The engine's drafts after each token are those of blocks at all its places at once."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    folder = save_tiny(tmp_path / "model", vocab_size=VOCAB, num_hidden_layers=3)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    table = hf.get_input_embeddings().weight.detach()
    config = replace(made_target().config, hidden_size=64, num_layers=3, head_dim=32, norm_eps=1e-6)
    target, num, layers = Target(config, table, table, torch.ones(64)), 3, (0, 2)
    made = block.Block(target, 2, len(layers))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    block.save(made, target, layers, num, tmp_path / "draft")
    watched = Watched(DFlash(num, str(tmp_path / "draft")))
    engine = make(folder, watched, num, **MODES["eager"])
    prompt = torch.randint(0, VOCAB, (19,)).tolist()
    (answer,) = tokens(engine, [prompt], greedy(12))
    engine.close()
    text = prompt + answer
    seen = {pos: drafted for pos, drafted in watched.seen if len(prompt) <= pos < len(text)}
    states_TJ = torch.cat(states(hf, text, layers), -1)
    place_BN = torch.tensor([sorted(seen)])
    with torch.no_grad():
        logits_BNKV = made(torch.tensor([text]), states_TJ.unsqueeze(0), place_BN, num)
    assert logits_BNKV.argmax(-1)[0].tolist() == [seen[pos] for pos in sorted(seen)]
    assert len(seen) > 3


def test_training_a_block_lowers_its_loss() -> None:
    torch.manual_seed(1)
    target = made_target()
    token_T = torch.randint(0, VOCAB, (30,))
    given = [Text(token_T.tolist(), 9), Text([1, 2], 1)]
    texts = block.texts_of(made_examples(given, [token_T.roll(-1), token_T[:2]], 2), [0, 1])
    assert texts.choice_BT[0].tolist() == [-100] * 8 + token_T.roll(-1)[8:].tolist()
    made = block.Block(target, 1, 2)
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss, shares = made.loss(texts, 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2 and len(shares) == 3


def test_labels_are_the_models_choices_in_answers() -> None:
    choice_T = torch.tensor([4, 6, 8, 10, 12])
    texts = [Text([7], 1), Text([1, 2, 3, 4, 5], 3), Text([1, 2, 3], 1)]
    examples = made_examples(texts, [choice_T[:1], choice_T, choice_T[:3]], 3)
    batch = batch_of(examples, [1, 2], numbers_of(torch.tensor([6, 8, 12]), 20))
    assert batch.token_BT.tolist() == [[2, 3, 4, 5], [2, 3, 3, 3]]
    assert batch.likely_BTP[..., 0].tolist() == [[-100, 1, -100, 2], [0, 1, -100, -100]]
    assert batch.last_BTD[0].equal(examples.last_ND[2:6])
    assert batch.states_BTJ[1, :2].equal(examples.states_NJ[6:8])
    assert drafted_tokens(examples.likely_NP[:, 0], 3, 20).tolist() == [4, 6, 8]


def test_states_of_texts_that_share_steps_are_those_of_each_text(tmp_path: Path) -> None:
    """Also of a text that two steps read, and after a padded step."""
    from transformers import AutoModelForCausalLM

    folder = save_tiny(tmp_path / "model", vocab_size=VOCAB, num_hidden_layers=3)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(2)
    texts = [Text(torch.randint(4, VOCAB, (num,)).tolist(), 2) for num in (5, 9, 3, 30, 4)]
    options = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "max_num_seqs": 3,
               "max_num_batched_tokens": 16}  # fmt: skip
    found, target = collect.examples(str(folder), texts, (0, 1), options, torch.device("cpu"))
    assert found.firsts == [0, 5, 14, 17, 47] and len(found.token_N) == 51
    for text, first in zip(texts, found.firsts):
        place = slice(first, first + len(text.token_T))
        expected = torch.cat(states(hf, text.token_T, (0, 1)), -1)
        torch.testing.assert_close(found.states_NJ[place], expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            chance_TV = hf(torch.tensor([text.token_T])).logits[0].softmax(-1)
        assert found.likely_NP[place, 0].tolist() == chance_TV.argmax(-1).tolist()
        torch.testing.assert_close(found.chance_NP[place, 0], chance_TV.max(-1).values)
    assert target.embed_VD.shape == (VOCAB, 64)


@pytest.mark.filterwarnings("error")  # norms in a slower form
@pytest.mark.parametrize("method", ["eagle3", "dflash"])
def test_half_precision_hardly_changes_the_loss(method: str) -> None:
    torch.manual_seed(1)
    token_T, target = torch.randint(0, VOCAB, (20,)), made_target()
    examples = made_examples([Text(token_T.tolist(), 4)], [token_T.roll(-1)], 3)
    target_X = torch.arange(0, VOCAB, 2)
    made: Any = Head(target, target_X) if method == "eagle3" else block.Block(target, 1, 3)
    number_V = numbers_of(target_X, VOCAB)
    batch: Any = batch_of(examples, [0], number_V)
    batch = batch if method == "eagle3" else block.texts_of(examples, [0])
    torch.manual_seed(2)
    exact = made.loss(batch, 3)[0]
    torch.manual_seed(2)  # of the places of blocks
    with torch.autocast("cpu", torch.bfloat16):
        found = made.loss(batch, 3)[0]
    found.backward()
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, exact, rtol=2e-2, atol=0)


def test_prompts_are_set_apart_with_all_their_answers() -> None:
    parts = training.parts_of(100, 2, 3)
    assert parts.apart == [49, 99, 149, 199] and parts.held_out == [200, 201, 202]
    assert sorted(parts.trained + parts.apart) == list(range(200))


def test_a_pass_has_each_text_once_with_others_of_its_length() -> None:
    lengths = [(7 * one) % 40 + 1 for one in range(40)]
    order = torch.Generator().manual_seed(0)
    given = training.batches(range(40), lengths, 4, order)
    passes = [[next(given) for _ in range(10)] for _ in range(2)]
    for one in passes:
        assert sorted(number for batch in one for number in batch) == list(range(40))
        assert all(len({(lengths[number] - 1) // 4 for number in batch}) == 1 for batch in one)
    assert passes[0] != passes[1]


def test_the_default_layers_are_those_of_eagle3() -> None:
    assert train_draft.read_layers(30) == (1, 14, 26)
    assert train_draft.read_layers(6) == (1, 3, 5)


def test_held_out_prompts_are_not_trained_on(tmp_path: Path) -> None:
    given, held_out = prompts.training(None), prompts.held_out(None)
    assert len(given) == len(set(given)) > 5000 and len(prompts.training(None, 300)) == 300
    assert sorted(held_out) == ["chat", "code", "prose"]
    subjects = [*prompt_words.SUBJECTS, *prompt_words.TASKS]
    forms = [*prompt_words.PROSE, *prompt_words.CODE, *prompt_words.CHAT]
    assert len({*subjects, *forms}) == len(subjects) + len(forms)
    assert all(form.count("{}") == 1 and "{}" not in form.format("") for form in forms)
    begins = {" ".join(form.split()[:4]) for form in forms if form.split("{}")[0].count(" ") > 3}
    for one in [one for some in held_out.values() for one in some]:
        assert not any(re.search(rf"\b{subject}\b", one) for subject in subjects)
        assert not any(one.startswith(begin) for begin in begins)
    file = tmp_path / "few"
    file.write_text("\n\n".join(map(str, range(20))))
    assert prompts.held_out(file) == {"file": ["9", "19"]}
    assert len(prompts.training(file)) == 18 and "9" not in prompts.training(file)
    file.write_text("a\n\nb\n")
    with pytest.raises(ValueError, match="few has 2 prompts: it must have at least 10"):
        prompts.read(file)


def test_accept_lengths_are_means_over_steps() -> None:
    counts = Counts(6, (4, 2, 2)).since(Counts(2, (1, 0, 1)))
    assert train_draft.accept_lengths(counts) == {
        "accepted_per_position": [0.75, 0.5, 0.25], "accept_length": 2.5, "steps": 4
    }  # fmt: skip
