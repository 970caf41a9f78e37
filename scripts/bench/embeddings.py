"""Measures models that pool: offline, over HTTP, and one short text. Writes JSON.

    python scripts/bench/embeddings.py --output embeddings.json
    python scripts/bench/embeddings.py --cases offline step -- --max-num-batched-tokens 16384
    # small, on a CPU
    python scripts/bench/embeddings.py --shapes BGE-small --texts 64 --output e.json -- --device cpu

Weights are random. The tokenizer is trained on `docs/`, and texts are pieces of it of exactly
--tokens tokens, so that tokenizing costs about as much as for published models. Cases:

start    seconds of a start with an empty store, and again with a full one
step     seconds of the largest step alone, TFLOP/s of it, and what the host takes for it
offline  `llm.embed` of texts, and of their token ids: tokens per second
http     a server, and client processes that send texts: floats and base64, in batches and alone
one      one text of 128 tokens over HTTP, one after another: p50 and p99 in ms
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installation

from nanovllm.tools import command_line
from nanovllm.tools.shapes import CONFIGS
from scripts.bench.server_process import NAME, Limit, Server

ROOT = Path(__file__).resolve().parents[2]
BERT: dict[str, Any] = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu",
    "max_position_embeddings": 512, "type_vocab_size": 2, "vocab_size": 30522,
    "layer_norm_eps": 1e-12, "pad_token_id": 0, "dtype": "float32",
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-Embedding-0.6B": {**CONFIGS["Qwen3-0.6B"], "max_position_embeddings": 32768},
    "BGE-small": {**BERT, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12,
                  "num_attention_heads": 12},
    "BGE-large": {**BERT, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                  "num_attention_heads": 16},
}  # fmt: skip
CASES = ("start", "step", "offline", "http", "one")
VOCAB_SIZE = 16_000
ONE_TOKENS, ONE_REQUESTS = 128, 200
CLIENTS, THREADS = 4, 16
SECONDS = 240.0


def arguments(given: list[str]) -> argparse.Namespace:
    """Words after "--" are options of the engine."""
    split = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["Qwen3-Embedding-0.6B"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--texts", type=int, default=4096, help="texts of a measurement")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a text")
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 1], help="texts a request")
    parser.add_argument("--max-model-len", type=int, default=None, help="default: that of texts")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(given[:split])
    args.words = given[split + 1 :]
    return args


# texts -------------------------------------------------------------------------------------------


def write_model(folder: Path, config: dict[str, Any]) -> Any:
    """A config.json, and a tokenizer that is trained on our documents; returns that."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, show_progress=False, special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(documents(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)
    return tokenizer


def documents() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]


def make_texts(tokenizer: Any, num: int, num_tokens: int) -> list[str]:
    """Different texts of exactly so many tokens."""
    rng, ids = random.Random(0), tokenizer.encode("\n".join(documents())).ids
    found: list[str] = []
    while len(found) < num:
        begin = rng.randrange(len(ids) - num_tokens)
        text = tokenizer.decode(ids[begin : begin + num_tokens])
        if len(tokenizer.encode(text).ids) == num_tokens:
            found.append(text)
    return found


# an engine in this process -----------------------------------------------------------------------


def engine_options(words: Sequence[str]) -> dict[str, Any]:
    """Options as on the command line, for `LLM`."""
    options: dict[str, Any] = {}
    for name, value in zip(words[::2], words[1::2], strict=True):
        options[name.removeprefix("--").replace("-", "_")] = (
            json.loads(value) if value[:1] in "0123456789{[" else value
        )
    return options


def layer_flops(config: dict[str, Any], num_tokens: int) -> float:
    """Of all layers for one token of a text of `num_tokens`, with causal attention halved."""
    hidden, ffn, heads = (
        config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    head = config.get("head_dim", hidden // heads)
    kv = config.get("num_key_value_heads", heads)
    is_causal = "head_dim" in config
    params = hidden * head * (2 * heads + 2 * kv) + hidden * ffn * (3 if is_causal else 2)
    attention = 4 * heads * head * num_tokens / (2 if is_causal else 1)
    return float(config["num_hidden_layers"] * (2 * params + attention))


def best_of(run: Callable[[], object], times: int = 3) -> float:
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def in_process(
    args: argparse.Namespace, folder: Path, config: dict[str, Any], texts: list[str], tokenizer: Any
) -> dict[str, Any]:
    from nanovllm import LLM
    from nanovllm.runner.pool_runner import PoolRunner, PoolSequence

    found: dict[str, Any] = {}
    options = engine_options(args.words) | {
        "task": "embed", "random_weights": True, "max_model_len": args.max_model_len,
        "compile_cache": folder.parent / "store",
    }  # fmt: skip
    begun = time.perf_counter()
    llm = LLM(str(folder), **options)
    found["start_s"] = {"first": time.perf_counter() - begun}
    if "start" in args.cases:
        llm.close()
        begun = time.perf_counter()
        llm = LLM(str(folder), **options)
        found["start_s"]["again"] = time.perf_counter() - begun
    ids = [one.ids for one in tokenizer.encode_batch(texts)]
    runner = llm.engine.runner
    assert isinstance(runner, PoolRunner)
    found["layout"] = {"tokens": runner.layout.prefill_tokens, "captured": runner.captures}
    if "step" in args.cases:
        num = min(runner.layout.prefill_tokens[-1] // args.tokens, runner.layout.max_num_seqs)
        sequences = [PoolSequence(one) for one in ids[:num]]
        step = runner._step(num * args.tokens, num)

        def run(num_steps: int = 10) -> None:
            for _ in range(num_steps):
                step.replay()
            runner.platform.synchronize()

        run(2)
        seconds = best_of(run) / 10
        flops = layer_flops(config, args.tokens) * num * args.tokens
        fill = best_of(lambda: step.fill(sequences))
        found["step"] = {
            "tokens": num * args.tokens, "ms": 1e3 * seconds, "tflops": flops / seconds / 1e12,
            "tokens_per_s": num * args.tokens / seconds, "host_fill_ms": 1e3 * fill,
        }  # fmt: skip
    if "offline" in args.cases:
        found["offline"] = {}
        for name, prompts in (
            ("ids", [{"prompt_token_ids": one} for one in ids]),
            ("texts", texts),
        ):
            llm.embed(prompts[:64], use_tqdm=False)
            cpu = time.process_time()
            seconds = best_of(lambda p=prompts: llm.embed(p, use_tqdm=False), 2)
            cpu = (time.process_time() - cpu) / 2
            found["offline"][name] = {
                "tokens_per_s": len(prompts) * args.tokens / seconds,
                "host_ms_per_text": 1e3 * cpu / len(prompts),
            }
    begun = time.perf_counter()
    tokenizer.encode_batch(texts[:256])
    both = time.perf_counter() - begun
    begun = time.perf_counter()
    for text in texts[:64]:
        tokenizer.encode(text)
    found["tokenizer_ms_per_text"] = {
        "alone": (time.perf_counter() - begun) * 1e3 / 64, "batch": both * 1e3 / 256
    }  # fmt: skip
    llm.close()
    return found


# over HTTP ---------------------------------------------------------------------------------------


def post(connection: http.client.HTTPConnection, body: bytes) -> bytes:
    connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {content[:300]!r}")
    return content


def client(address: tuple[str, int], bodies: list[bytes], started: Any, done: Any) -> None:
    """A process: THREADS connections take requests in turn. Reports the seconds of each."""
    waiting, seconds, lock = iter(bodies), [], threading.Lock()
    started.wait()

    def work() -> None:
        connection = http.client.HTTPConnection(*address, timeout=SECONDS)
        while True:
            with lock:
                body = next(waiting, None)
            if body is None:
                return
            begun = time.perf_counter()
            post(connection, body)
            seconds.append(time.perf_counter() - begun)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.put(seconds)


def request_body(texts: Sequence[str], encoding: str) -> bytes:
    return json.dumps(
        {"model": NAME, "input": list(texts), "encoding_format": encoding}, ensure_ascii=False
    ).encode()


def load(address: tuple[str, int], bodies: list[bytes]) -> tuple[float, list[float]]:
    """The seconds of all requests by CLIENTS processes, and of each."""
    context = multiprocessing.get_context("spawn")
    started, done = context.Barrier(CLIENTS + 1), context.Queue()
    clients = [
        context.Process(target=client, args=(address, bodies[i::CLIENTS], started, done))
        for i in range(CLIENTS)
    ]
    for one in clients:
        one.start()
    started.wait(60)
    begun = time.perf_counter()
    each = [second for _ in clients for second in done.get(timeout=SECONDS)]
    taken = time.perf_counter() - begun
    for one in clients:
        one.join()
    if len(each) != len(bodies):
        raise RuntimeError(f"{len(each)} of {len(bodies)} requests were answered")
    return taken, each


def percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {"p50_ms": 1e3 * statistics.median(ordered),
            "p99_ms": 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]}  # fmt: skip


def over_http(
    args: argparse.Namespace, folder: Path, texts: list[str], short: list[str]
) -> dict[str, Any]:
    limit, log = Limit(SECONDS), folder.parent / "server.log"
    words = [
        str(folder), "--task", "embed", "--random-weights", "--served-model-name", NAME,
        "--compile-cache", str(folder.parent / "store"), *args.words,
    ]  # fmt: skip
    if args.max_model_len is not None:
        words += ["--max-model-len", str(args.max_model_len)]
    server = Server(words, dict(os.environ), log)
    found: dict[str, Any] = {}
    try:
        server.wait(limit)
        found["start_s"] = time.monotonic() - server.begun
        host, port = server.url.removeprefix("http://").rsplit(":", 1)
        address = host, int(port)
        if "one" in args.cases:
            connection = http.client.HTTPConnection(*address, timeout=SECONDS)
            seconds = []
            for text in short:
                begun = time.perf_counter()
                post(connection, request_body([text], "float"))
                seconds.append(time.perf_counter() - begun)
            found["one"] = percentiles(seconds[20:])
            found["one"]["first_ms"] = 1e3 * seconds[0]
        for batch in args.batches if "http" in args.cases else ():
            for encoding in ("float", "base64"):
                bodies = [
                    request_body(texts[i : i + batch], encoding)
                    for i in range(0, len(texts), batch)
                ]
                load(address, bodies[: 4 * CLIENTS])
                before = cpu_seconds(server)
                taken, each = load(address, bodies)
                after = cpu_seconds(server)
                found[f"http_{batch}_{encoding}"] = {
                    "tokens_per_s": len(texts) * args.tokens / taken,
                    **percentiles(each),
                    "cpu_ms_per_text": {
                        name: 1e3 * (after[name] - before.get(name, 0.0)) / len(texts)
                        for name in after
                    },
                }
    finally:
        if server.process.poll() is None:
            server.end(server.process.pid, signal.SIGTERM)
        server.close()
    return found


def cpu_seconds(server: Server) -> dict[str, float]:
    """The processor time of each of the server's processes."""
    ticks, found = os.sysconf("SC_CLK_TCK"), {}
    for pid in server.pids():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except OSError:
            continue
        name = next((word for word in words if word.startswith("nanovllm.")), "server")
        found[f"{name} {pid}"] = (int(fields[11]) + int(fields[12])) / ticks
    return found


def measured(args: argparse.Namespace, shape: str, folder: Path) -> dict[str, Any]:
    config = SHAPES[shape]
    args.max_model_len = args.max_model_len or args.tokens
    tokenizer = write_model(folder / "model", config)
    texts = make_texts(tokenizer, args.texts, args.tokens)
    short = make_texts(tokenizer, ONE_REQUESTS, min(ONE_TOKENS, args.tokens))
    found: dict[str, Any] = {}
    if {"start", "step", "offline"} & set(args.cases):
        found = in_process(args, folder / "model", config, texts, tokenizer)
    if {"http", "one"} & set(args.cases):
        found["server"] = over_http(args, folder / "model", texts, short)
    return found


def main(given: list[str]) -> None:
    args = arguments(given)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    found: dict[str, Any] = {"cpus": os.cpu_count(), "words": args.words}
    for shape in args.shapes:
        with tempfile.TemporaryDirectory(prefix="nanovllm-") as folder:
            found[shape] = measured(args, shape, Path(folder))
        print(json.dumps({shape: found[shape]}, indent=1), flush=True)
        args.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    # the server has its own session, so nothing else would end it
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(command_line.run(partial(main, sys.argv[1:])))
