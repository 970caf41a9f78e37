"""Saves a trained model, and measures the saved model's accuracy with transformers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from tiny import tasks as text_tasks
from tiny import tool_tasks
from tiny.architectures import TinyModel
from tiny.tasks import Task
from tiny.tool_tasks import is_correct
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

MAX_FOLDER_BYTES = 8_000_000
MAX_NEW_TOKENS = 192  # two calls are the longest answers
KINDS = (*text_tasks.KINDS, *tool_tasks.KINDS)


def save(model: TinyModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(out)
    # transformers makes it readable only for the owner, but an installed package has other readers
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    # transformers writes rope_parameters since version 5; older versions read rope_theta
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
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
        trust_remote_code=False,
        experts_implementation="eager",  # transformers' own loop over experts
    ).eval()
    # transformers' decorator loses the signature of `to`
    model.to(device)  # type: ignore[arg-type]
    num_right: Counter[str] = Counter()
    wrong: list[str] = []
    for begin in tqdm(
        range(0, len(tasks), batch_size), desc="held-out", unit="batch", mininterval=5
    ):
        batch = tasks[begin : begin + batch_size]
        prompts = [
            tokenizer.apply_chat_template(
                task.messages, tools=list(task.tools), tokenize=False, add_generation_prompt=True
            )
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
