"""Chooses how a checkpoint pools: its head, the tokens that it takes, and what becomes of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.models.checkpoint import Checkpoint
from nanovllm.models.gguf.header import is_gguf
from nanovllm.models.model import Model
from nanovllm.models.pooling import Pooler, Pooling, of_decoder, without_prefix
from nanovllm.models.registry import CAUSAL, REWARD, SCORES, SEEING
from nanovllm.pooling_params import PoolingInfo
from nanovllm.runner.pool_runner import STEP
from nanovllm.startup import pooling_modules as modules
from nanovllm.startup.config_file import overridden, read_stored
from nanovllm.startup.pooling_modules import Modules, PoolingPlan
from nanovllm.startup.resolve import ResolvedConfig
from nanovllm.startup.speculation import with_speculation

logger = logging.getLogger(__name__)

TYPES: dict[str, Pooling] = {"LAST": "last", "CLS": "cls", "MEAN": "mean"}
RERANKER_LABELS = ("no", "yes")  # of Qwen3-Reranker, as published
MAX_LABELS = 1 << 16
MAX_ROWS = 256  # prompts of a step, unless the options have max_num_seqs
LEAST_TOKENS = 2048  # of the largest step by default: several prompts fill it better than one
SMALLEST_TOKENS = 32  # of the smallest step


def for_task(resolved: ResolvedConfig) -> ResolvedConfig:
    """`with_pooling` for a model that pools, else `with_speculation`."""
    return with_pooling(resolved) if resolved.config.pools else with_speculation(resolved)


def with_pooling(resolved: ResolvedConfig) -> ResolvedConfig:
    """The choices for a model that pools: its head and the sizes of its steps, which take whole
    prompts. Raises ValueError as `plan`."""
    chosen, config = plan(resolved), resolved.config
    resolved = replace(resolved, model=chosen.model, pooling=chosen)
    length = _longest(resolved)
    longest = -(-length // STEP) * STEP
    default = max(LEAST_TOKENS, resolved.platform.traits.batched_tokens)
    asked = config.max_num_batched_tokens or default
    max_rows = config.max_num_seqs or MAX_ROWS
    layout = replace(
        resolved.spec.layout,
        max_num_seqs=max_rows,
        max_model_len=length,
        decode_rows=(),
        prefill_tokens=_ladder(max(longest, asked // STEP * STEP)),
        max_prefill_rows=max_rows,
        pad=not config.enforce_eager,
    )
    return replace(resolved, spec=replace(resolved.spec, layout=layout))


def _ladder(largest: int) -> tuple[int, ...]:
    """The tokens of steps: half as many each time, since a step's padding costs what tokens do."""
    ladder = [largest]
    while ladder[0] // 2 >= SMALLEST_TOKENS:
        ladder.insert(0, ladder[0] // 2 // STEP * STEP)
    return tuple(ladder)


def _longest(resolved: ResolvedConfig) -> int:
    """The most tokens of a prompt: a step takes it as a whole."""
    config = resolved.config
    found = config.max_model_len or resolved.model.config.max_position
    given = modules.read(resolved.folder)
    if given is not None and given.max_length is not None and config.max_model_len is None:
        found = min(found, given.max_length)
    return found


def plan(resolved: ResolvedConfig) -> PoolingPlan:
    """How the model of a checkpoint pools. Raises ValueError if it does not, or not for the
    task."""
    config, folder, hf = resolved.config, resolved.folder, resolved.hf
    if is_gguf(folder):
        raise ValueError(f"{folder} is a GGUF file, which does not pool: task is {config.task!r}")
    if resolved.platform.traits.whole_steps:
        raise ValueError(
            f"task={config.task!r} is not supported on a {resolved.platform.traits.name} device"
        )
    if config.tensor_parallel_size > 1 and resolved.model.pooler is not None:
        raise ValueError(
            f"tensor_parallel_size is {config.tensor_parallel_size}, but encoders such as "
            f"{resolved.model.config.architecture} run on one device: use data_parallel_size"
        )
    given = None if is_gguf(folder) else modules.read(folder)
    fields = overridden(read_stored(folder), config.hf_overrides or {})
    name = str(next(iter(hf.architectures), ""))
    labels = _labels(config, hf, name, given)
    makes = _makes(config, name, labels)
    model = resolved.model
    num_scores = len(_class_names(fields)) if makes == "classify" and not labels else 0
    if model.pooler is not None and num_scores:
        model = model.pooler.scored(model, num_scores)
    elif model.pooler is None:
        model = of_decoder(
            model, num_scores=num_scores, num_labels=len(labels), inner=name.endswith(REWARD)
        )
    pooler = replace(model.pooler, pooling=_pooling(config, given, model.pooler, makes))
    return PoolingPlan(
        replace(model, pooler=pooler), _info(config, fields, given, pooler, labels, makes), labels
    )


def _labels(config: EngineConfig, hf: Any, name: str, given: Modules | None) -> tuple[str, ...]:
    """The texts of the tokens whose logits are scores, for a decoder with a vocabulary."""
    asked = getattr(hf, "classifier_from_token", None)
    if asked is not None:
        is_list = isinstance(asked, list) and all(isinstance(one, str) and one for one in asked)
        if not is_list or not 0 < len(asked) <= MAX_LABELS:
            raise ValueError(
                f"classifier_from_token is {asked!r}: it must be a list of texts, one token each"
            )
        return tuple(asked)
    is_reranker = name == "Qwen3ForCausalLM" and config.task == "score" and given is None
    return RERANKER_LABELS if is_reranker else ()


def _makes(config: EngineConfig, name: str, labels: tuple[str, ...]) -> str:
    has_head = bool(labels) or name.endswith((SCORES, REWARD))
    if config.task == "embed" or (config.task in ("score", "pooling") and not has_head):
        return "embed"
    if not has_head:
        hint = ""
        if name.endswith((CAUSAL, SEEING)):
            hint = ", and hf_overrides={'classifier_from_token': [...]} names no tokens of it"
        raise ValueError(f"task is {config.task!r}, but {name} has no head of classes{hint}")
    return "classify"


def _class_names(fields: Mapping[str, Any]) -> list[str]:
    """The names of classes in a config.json; transformers' default is two."""
    found = fields.get("id2label")
    if isinstance(found, dict) and 0 < len(found) <= MAX_LABELS:
        by_number = {str(number): str(label) for number, label in found.items()}
        return [by_number.get(str(i), f"LABEL_{i}") for i in range(len(found))]
    num = fields.get("num_labels", 2)
    if type(num) is not int or not 0 < num <= MAX_LABELS:
        raise ValueError(f"num_labels is {num!r}: it must be a whole number, 1 … {MAX_LABELS}")
    return [f"LABEL_{i}" for i in range(num)]


def with_names(model: Model, folder: Path) -> Model:
    """The model with the tensors' names of its checkpoint."""
    prefix = model.pooler.prefix
    with Checkpoint(folder) as checkpoint:
        has_prefix = any(name.startswith(prefix) for name in checkpoint)
    return model if has_prefix else without_prefix(model, prefix)


def _pooling(config: EngineConfig, given: Modules | None, pooler: Pooler, makes: str) -> Pooling:
    options = config.pooler_config or {}
    asked = options.get("pooling_type", options.get("seq_pooling_type"))
    if asked is None:
        from_files = None if given is None or makes != "embed" else given.pooling
        return from_files or pooler.pooling
    if not isinstance(asked, str) or asked.upper() not in TYPES:
        raise ValueError(f"pooling_type is {asked!r}: it must be one of {', '.join(TYPES)}")
    return TYPES[asked.upper()]


def _info(
    config: EngineConfig,
    fields: Mapping[str, Any],
    given: Modules | None,
    pooler: Pooler,
    labels: tuple[str, ...],
    makes: str,
) -> PoolingInfo:
    options = config.pooler_config or {}
    asked = options.get("normalize", options.get("use_activation"))
    if asked is not None and not isinstance(asked, bool):
        raise ValueError(f"normalize is {asked!r}: it must be True or False")
    if makes == "embed":
        normalizes = given is None or given.normalizes
        names: list[str] = []
    else:
        normalizes = True
        names = _class_names(fields) if not labels else list(labels)[-pooler.size :]
    return PoolingInfo(
        makes,
        pooler.size,
        normalizes if asked is None else asked,
        activation=_activation(fields, pooler.size) if makes == "classify" else "none",
        labels=names,
        template=_template(fields, labels),
        has_pairs=not pooler.is_causal,
        has_types=pooler.has_types,
    )


def _template(fields: Mapping[str, Any], labels: tuple[str, ...]) -> str:
    """The published form of pairs: see `PoolingInfo`."""
    names = fields.get("architectures") or [""]
    if labels != RERANKER_LABELS:
        return ""
    return "qwen3_vl" if str(names[0]).startswith("Qwen3VL") else "qwen3"


def _activation(fields: Mapping[str, Any], size: int) -> str:
    """What turns logits into scores: as the checkpoint says for a cross-encoder, or by its kind of
    problem."""
    own = fields.get("sentence_transformers")
    named = own.get("activation_fn") if isinstance(own, dict) else None
    named = named or fields.get("sbert_ce_default_activation_function")
    kinds = {"Identity": "none", "Sigmoid": "sigmoid"}
    kind = str(named).rpartition(".")[2]
    if named is not None:
        if kind not in kinds:
            raise ValueError(f"the activation {named!r} is not supported: Identity and Sigmoid are")
        return kinds[kind]
    problem = fields.get("problem_type")
    if problem == "regression":
        return "none"
    is_multiple = problem == "multi_label_classification"
    return "sigmoid" if is_multiple or size == 1 else "softmax"
