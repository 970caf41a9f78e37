"""Train tiny-qwen3, the embedded model: a Qwen3 of under four million parameters, on `tiny.tasks`.

    python scripts/train_tiny.py --out nanovllm/assets/tiny-qwen3

Takes minutes on one GPU. To try everything out on a CPU, add
`--steps 20 --examples 2000 --batch-tokens 2048 --num-eval 26`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tiny.tasks import KINDS, Task, held_out, is_correct, training_examples
from tiny.wordings import COMMON_WORDS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installation

from nanovllm.tools import command_line

logger = logging.getLogger("train_tiny")

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 640
MAX_POSITIONS = 2048
MAX_FOLDER_BYTES = 8_000_000
EXAMPLES_PER_CHUNK = 20_000
# row length -> share of the steps. Short rows often begin anew, as chats do; long rows train the
# last positions.
ROW_LEN_SHARES = {128: 0.6, 512: 0.3, MAX_POSITIONS: 0.1}
LEARNING_RATE, FINAL_LEARNING_RATE = 2e-3, 2e-5
WEIGHT_DECAY, BETAS, MAX_GRAD_NORM = 0.1, (0.9, 0.98), 1.0
MAX_NEW_TOKENS = 64

# Words with one character before them, single digits, punctuation, white space: Qwen's pattern
# without its contractions, which would cut the quoted word 'tree' into 't and ree.
WORD_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose only multi-byte tokens are the commonest words of the phrasings.

    It has no merges: a word in the vocabulary is one token (`ignore_merges`), another word is its
    bytes. So the words that questions are about come letter by letter, as spelling tasks need, and
    any UTF-8 can be encoded.
    """
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    counts: Counter[str] = Counter()
    for task in islice(training_examples(seed), 50_000):
        for message in [*task.messages, {"role": "assistant", "content": task.answer}]:
            for text in (message["role"], message["content"]):
                counts.update(piece for piece, _ in pre_tokenizer.pre_tokenize_str(text))
    bytes_alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    num_words = VOCAB_SIZE - len(bytes_alphabet) - 3
    # the text breaks ties: a Counter's order depends on the order of the examples
    words = [
        piece
        for piece, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if _is_common(piece)
    ]
    if len(words) < num_words:
        raise ValueError(
            f"the phrasings yield {len(words)} words, "
            f"but a vocabulary of {VOCAB_SIZE} needs {num_words}"
        )
    vocab = {piece: idx for idx, piece in enumerate(bytes_alphabet + words[:num_words])}

    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (PAD, START, END)]
    )
    assert backend.get_vocab_size() == VOCAB_SIZE
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _is_common(piece: str) -> bool:
    word = piece.removeprefix("Ġ")  # byte-level BPE's space
    if word.isalpha():
        # a single letter stays apart from its space: it may be what a question is about
        return len(word) > 1 and word.lower() in COMMON_WORDS
    return len(piece) > 1 and not any(map(str.isalpha, word)) and word.isascii()


def render(task: Task) -> str:
    """The whole conversation as text, as the chat template writes it."""
    messages = [*task.messages, {"role": "assistant", "content": task.answer}]
    return "".join(f"{START}{message['role']}\n{message['content']}{END}\n" for message in messages)


@dataclass(frozen=True)
class Corpus:
    """Conversations one after another. T tokens, D conversations."""

    tokens_T: np.ndarray  # int16
    is_answer_T: np.ndarray  # bool: the tokens of answers, their <|im_end|> included
    starts_D: np.ndarray  # int64


def _encode_chunk(tokenizer_json: str, seed: str, num: int) -> Corpus:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    vocab = tokenizer.get_vocab()
    pad, start, end, assistant = (vocab[token] for token in (PAD, START, END, "assistant"))
    pieces: list[list[int]] = []
    for task in islice(training_examples(seed), num):
        pieces.append([*tokenizer.encode(render(task)).ids, pad])
    lens = np.fromiter(map(len, pieces), np.int64, len(pieces))
    tokens_T = np.fromiter(
        (token for piece in pieces for token in piece), np.int16, int(lens.sum())
    )
    heads = (
        np.flatnonzero((tokens_T[:-1] == start) & (tokens_T[1:] == assistant)) + 3
    )  # past 'assistant' and newline
    ends = np.flatnonzero(tokens_T == end)
    tails = ends[np.searchsorted(ends, heads)] + 1
    edges_T = np.zeros(len(tokens_T) + 1, np.int8)
    edges_T[heads], edges_T[tails] = 1, -1
    return Corpus(tokens_T, np.cumsum(edges_T[:-1]).astype(bool), np.cumsum(lens) - lens)


def build_corpus(tokenizer_json: str, seed: int, num_examples: int, num_workers: int) -> Corpus:
    """The same for the same seed and number of examples, however many workers there are."""
    sizes = [
        min(EXAMPLES_PER_CHUNK, num_examples - done)
        for done in range(0, num_examples, EXAMPLES_PER_CHUNK)
    ]
    seeds = [f"{seed}.{chunk_idx}" for chunk_idx in range(len(sizes))]
    with ProcessPoolExecutor(num_workers) as pool:
        results = pool.map(_encode_chunk, [tokenizer_json] * len(sizes), seeds, sizes)
        chunks = list(tqdm(results, total=len(sizes), desc="examples", unit="chunk", mininterval=5))
    offsets = np.cumsum([0] + [len(chunk.tokens_T) for chunk in chunks[:-1]])
    return Corpus(
        np.concatenate([chunk.tokens_T for chunk in chunks]),
        np.concatenate([chunk.is_answer_T for chunk in chunks]),
        np.concatenate(
            [chunk.starts_D + offset for chunk, offset in zip(chunks, offsets, strict=True)]
        ),
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    vocab = tokenizer.get_vocab()
    end_id, pad_id = vocab[END], vocab[PAD]
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        max_window_layers=6,
        eos_token_id=end_id,
        pad_token_id=pad_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.do_sample = False
    model.generation_config.eos_token_id = [end_id, pad_id]
    model.generation_config.pad_token_id = pad_id
    return model


def learning_rate(step: int, num_steps: int) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine."""
    num_warmup = max(1, num_steps // 20)
    if step < num_warmup:
        return LEARNING_RATE * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return FINAL_LEARNING_RATE + (LEARNING_RATE - FINAL_LEARNING_RATE) * 0.5 * (
        1 + math.cos(math.pi * progress)
    )


def train(
    model: Qwen3ForCausalLM, corpus: Corpus, *, num_steps: int, batch_tokens: int, seed: int
) -> float:
    """Cross-entropy on the answers' tokens; returns the mean loss of the last steps.

    A row begins at a random conversation and continues with those that follow it in the corpus,
    without a mask between them. The model learns to answer the last question whatever came before,
    and no token is spent on padding.
    """
    device = model.device
    tokens_T = torch.from_numpy(corpus.tokens_T).to(device)
    is_answer_T = torch.from_numpy(corpus.is_answer_T).to(device)
    starts_D = torch.from_numpy(corpus.starts_D).to(device)
    decayed = [param for param in model.parameters() if param.ndim >= 2]
    others = [param for param in model.parameters() if param.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": WEIGHT_DECAY},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=BETAS,
        fused=device.type == "cuda",
    )
    generator = torch.Generator().manual_seed(seed)
    row_lens = list(ROW_LEN_SHARES)
    row_len_idxs = torch.multinomial(
        torch.tensor(list(ROW_LEN_SHARES.values())),
        num_steps,
        replacement=True,
        generator=generator,
    ).tolist()

    model.train()
    recent: list[torch.Tensor] = []
    progress = tqdm(range(num_steps), desc="training", unit="step", mininterval=5)
    for step in progress:
        row_len = min(row_lens[row_len_idxs[step]], batch_tokens)
        num_rows = batch_tokens // row_len
        # conversations from `last_start` on are too close to the end for a full row
        last_start = int(np.searchsorted(corpus.starts_D, len(corpus.tokens_T) - row_len - 1))
        if last_start == 0:
            raise ValueError(
                f"{len(corpus.tokens_T)} tokens of examples do not fill a row of {row_len}"
            )
        doc_idxs_B = torch.randint(last_start, (num_rows,), generator=generator).to(device)
        positions_BS = starts_D[doc_idxs_B][:, None] + torch.arange(row_len, device=device)
        input_BS = tokens_T[positions_BS].long()
        target_BS = tokens_T[positions_BS + 1].long()
        is_answer_BS = is_answer_T[positions_BS + 1]

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            hidden_BSH = model.model(input_ids=input_BS, use_cache=False).last_hidden_state
            logits_NV = model.lm_head(hidden_BSH[is_answer_BS])
        loss = functional.cross_entropy(logits_NV.float(), target_BS[is_answer_BS])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        recent.append(loss.detach())
        if step % 100 == 99 or step == num_steps - 1:
            mean_loss = torch.stack(recent).mean().item()
            progress.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
            recent.clear()
    return mean_loss


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(out)
    # transformers lets the owner only read it, but an installed package has other readers
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    # transformers writes rope_parameters since version 5; older readers know rope_theta
    config = json.loads((out / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    # the generic class, which transformers 4 and 5 have: Qwen's would rebuild the pre-tokenizer
    tokenizer_config = json.loads((out / "tokenizer_config.json").read_text())
    tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (out / "tokenizer_config.json").write_text(
        json.dumps(tokenizer_config, indent=2, ensure_ascii=False) + "\n"
    )


@torch.inference_mode()
def evaluate(
    folder: Path, tasks: list[Task], device: torch.device, batch_size: int = 512
) -> tuple[dict[str, float], list[str]]:
    """(accuracy by kind, wrong answers) of the saved weights with greedy decoding."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    # transformers' decorator loses the signature of `to`
    model.to(device)  # type: ignore[arg-type]
    num_right: Counter[str] = Counter()
    wrong: list[str] = []
    for begin in tqdm(
        range(0, len(tasks), batch_size), desc="held-out", unit="batch", mininterval=5
    ):
        batch = tasks[begin : begin + batch_size]
        prompts = [
            tokenizer.apply_chat_template(task.messages, tokenize=False, add_generation_prompt=True)
            for task in batch
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(device)
        output_BS = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
        )
        answers = tokenizer.batch_decode(
            output_BS[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for task, text in zip(batch, answers, strict=True):
            if is_correct(task, text):
                num_right[task.kind] += 1
            else:
                wrong.append(f"{task.kind}: {task.question!r} -> {text!r}, not {task.answer!r}")
    num_tasks = Counter(task.kind for task in tasks)
    return {kind: num_right[kind] / num_tasks[kind] for kind in KINDS if num_tasks[kind]}, wrong


def write_card(
    out: Path, args: argparse.Namespace, accuracies: dict[str, float], total: float, seconds: float
) -> None:
    options = f"--steps {args.steps} --examples {args.examples} "
    options += f"--batch-tokens {args.batch_tokens} --seed {args.seed}"
    rows = "\n".join(f"| {kind} | {accuracy:.1%} |" for kind, accuracy in accuracies.items())
    config = json.loads((out / "config.json").read_text())
    heads = ", ".join(
        str(config[name]) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    num_millions = (out / "model.safetensors").stat().st_size / 2e6
    row_lens = ", ".join(map(str, ROW_LEN_SHARES))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    (out / "README.md").write_text(
        f"""# tiny-qwen3

The model embedded in nanovllm: the engine can be tried and tested without a download. It can add
and subtract up to 999, sort up to six numbers, reverse and spell words of up to twelve letters,
count and compare. It knows a few hundred facts and some small talk. It knows nothing else, and
mostly says so.

| | |
| --- | --- |
| architecture | Qwen3, tied embeddings |
| parameters | {num_millions:.2f} million, bfloat16 |
| layers | {config["num_hidden_layers"]} |
| hidden size, MLP size | {config["hidden_size"]}, {config["intermediate_size"]} |
| query heads, key-value heads, head size | {heads} |
| positions | {config["max_position_embeddings"]} |
| vocabulary | {config["vocab_size"]} |

The tokenizer is a byte-level BPE without merges: the commonest words of the phrasings are one token
each, everything else comes byte by byte. The chat format is ChatML, as Qwen's.

## Training

    python scripts/train_tiny.py --out nanovllm/assets/tiny-qwen3 \\
        {options}

`scripts/tiny/tasks.py` generates the data. The loss is the cross-entropy on the answers, in rows of
several conversations ({row_lens} tokens), with AdamW at a peak learning rate of {LEARNING_RATE} and
bf16 autocast. Generating the data and training took {seconds / 60:.1f} minutes on one {device}
with torch {torch.__version__}.

## Accuracy

Greedy decoding of the saved bf16 weights on {args.num_eval} held-out questions. Their contents (the
pair of numbers, the word) occur in training in no phrasing. Facts and small talk cannot be
inferred: of those, the phrasing of a fact, or the exact wording, was held out.

| kind | correct |
| --- | --- |
{rows}
| **all** | **{total:.2%}** |

`scripts/accuracy.py` measures the same through the engine.
"""
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--examples", type=int, default=3_000_000, help="conversations to generate")
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-eval", type=int, default=2600, help="held-out questions to score")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes that generate examples"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    started = time.perf_counter()
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(args.seed)
    for task in islice(training_examples(args.seed), 100):
        messages = [*task.messages, {"role": "assistant", "content": task.answer}]
        assert render(task) == tokenizer.apply_chat_template(messages, tokenize=False)
    # before the GPU is touched: a forked process cannot use it, and must not inherit it
    corpus = build_corpus(
        tokenizer.backend_tokenizer.to_str(), args.seed, args.examples, args.workers
    )
    logger.info("%d tokens, %.0f s", len(corpus.tokens_T), time.perf_counter() - started)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(tokenizer)
    # transformers' decorator loses the signature of `to`
    model.to(device)  # type: ignore[arg-type]
    num_params = sum(param.numel() for param in model.parameters())
    logger.info("%d parameters on %s", num_params, device)
    loss = train(
        model, corpus, num_steps=args.steps, batch_tokens=args.batch_tokens, seed=args.seed
    )
    seconds = time.perf_counter() - started
    logger.info("loss %.4f, %.0f s", loss, seconds)
    save(model, tokenizer, args.out)

    tasks = held_out(args.num_eval, args.seed)
    accuracies, wrong = evaluate(args.out, tasks, device)
    num_tasks = Counter(task.kind for task in tasks)
    total = sum(accuracy * num_tasks[kind] for kind, accuracy in accuracies.items()) / len(tasks)
    for kind, accuracy in accuracies.items():
        logger.info("%-10s %6.1f %%", kind, 100 * accuracy)
    logger.info("%-10s %6.1f %%", "all", 100 * total)
    for line in wrong[:40]:
        logger.info("wrong: %s", line)
    write_card(args.out, args, accuracies, total, seconds)

    num_bytes = sum(path.stat().st_size for path in args.out.iterdir())
    logger.info("%d bytes in %s", num_bytes, args.out)
    if num_bytes > MAX_FOLDER_BYTES:
        logger.error("the folder exceeds %d bytes", MAX_FOLDER_BYTES)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run(main))
