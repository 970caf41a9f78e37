"""Trains a LoRA adapter with PEFT, and asks the engine with it: a check with a real adapter.

    pip install peft
    python scripts/train_adapter.py --out /tmp/pirate

The adapter makes the embedded model repeat the results of sums and differences as a pirate: to
"What is 37 + 45?" it answers "37 + 45 = 82. Arr, 82 it be!" A minute on one CPU core is enough.
Then the engine answers held-out questions with the adapter, and the same questions without it in
the same batches. Prints a line of JSON: the shares of answers that are exactly as trained, of the
adapter and of the model alone, and of right answers of the model alone.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tiny import tasks
from tiny.tasks import Task
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installation

from nanovllm import LLM, LoRARequest, SamplingParams, hub
from nanovllm.tools import command_line

KINDS = ("add", "subtract")
IGNORED = -100  # the label of a token without a loss, as in torch


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the folder of the adapter")
    add("--model", default="tiny-qwen3")
    add("--device", default="auto", help="of the engine; training runs on a CPU")
    add("--seconds", type=float, default=60.0, help="of training")
    add("--batch", type=int, default=16, help="questions of a step")
    add("--rank", type=int, default=16)
    add("--learning-rate", type=float, default=3e-3)
    add("--num-eval", type=int, default=400, help="held-out questions")
    return parser.parse_args()


def trained_answer(task: Task) -> str:
    return f"{task.answer} Arr, {task.expected[0]} it be!"


def examples(seed: int) -> Iterator[Task]:
    """Sums and differences of the training side."""
    return (one for one in tasks.training_examples(seed) if one.kind in KINDS and not one.history)


def batch_of(chosen: list[Task], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Ids [R, T] and labels [R, T]: only answers have a loss."""
    rows = []
    for task in chosen:
        prompt = tokenizer.apply_chat_template(
            task.messages, tokenize=False, add_generation_prompt=True
        )
        asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer(trained_answer(task), add_special_tokens=False)["input_ids"]
        rows.append((asked, [*answer, tokenizer.eos_token_id]))
    width = max(len(asked) + len(answer) for asked, answer in rows)
    id_RT = torch.full((len(rows), width), tokenizer.eos_token_id)
    label_RT = torch.full((len(rows), width), IGNORED)
    for id_T, label_T, (asked, answer) in zip(id_RT, label_RT, rows):
        num = len(asked) + len(answer)
        id_T[:num] = torch.tensor(asked + answer)
        label_T[len(asked) : num] = torch.tensor(answer)
    return id_RT, label_RT


def train(args: argparse.Namespace, folder: Path) -> int:
    """Train and save an adapter; returns the number of steps."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    questions, begun, num_steps = examples(0), time.perf_counter(), 0
    while (spent := (time.perf_counter() - begun) / args.seconds) < 1:
        id_RT, label_RT = batch_of(list(islice(questions, args.batch)), tokenizer)
        rate = args.learning_rate * min(1.0, 20 * spent + 0.01) * (1 - spent)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(input_ids=id_RT, labels=label_RT).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        num_steps += 1
        if num_steps % 50 == 1:
            print(f"step {num_steps}: loss {loss.item():.4f}", file=sys.stderr, flush=True)
    model.save_pretrained(args.out)
    return num_steps


def evaluate(args: argparse.Namespace, model: str) -> dict[str, float]:
    """Shares of right answers: every second row of each batch has the adapter."""
    rng = random.Random(1)
    chosen = [tasks.held_out_task(rng, KINDS[i % 2]) for i in range(args.num_eval)]
    adapter = LoRARequest("pirate", 1, str(args.out))
    options = {"enable_lora": True, "max_loras": 1, "max_lora_rank": args.rank}
    llm = LLM(model, device=args.device, max_model_len=512, **options)
    greedy = SamplingParams(temperature=0, max_tokens=64)
    messages = [one.messages for one in chosen for _ in range(2)]
    given = [adapter, None] * len(chosen)
    outputs = llm.chat(messages, greedy, use_tqdm=False, lora_request=given)
    llm.close()
    texts = [one["text"].strip() for one in outputs]
    pairs = list(zip(chosen, texts[::2], texts[1::2]))
    counts = {
        "adapter_as_trained": sum(own == trained_answer(task) for task, own, _ in pairs),
        "model_as_trained": sum(plain == trained_answer(task) for task, _, plain in pairs),
        "model": sum(tasks.is_correct(task, plain) for task, _, plain in pairs),
    }
    return {name: round(count / len(chosen), 4) for name, count in counts.items()}


def main() -> None:
    args = parse_args()
    folder = Path(hub.resolve(args.model))
    num_steps = train(args, folder)
    print(json.dumps({"steps": num_steps, **evaluate(args, args.model)}))


if __name__ == "__main__":
    sys.exit(command_line.run(main))
