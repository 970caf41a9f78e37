"""How many processes compile while this one reads weights."""

from __future__ import annotations

from nanovllm.models.config import ModelConfig
from nanovllm.models.lora.slots import slots_bytes
from nanovllm.startup.artifacts import is_ready
from nanovllm.startup.offload import device_bytes
from nanovllm.startup.resolve import ResolvedConfig, workers_may_help


def num_workers(resolved: ResolvedConfig) -> int:
    """0 without graphs, if compiling is fast on this device, or if an earlier start has compiled
    everything."""
    may_help = workers_may_help(resolved.config, resolved.store)
    if not may_help or resolved.platform.lowering()[0] is None:
        return 0
    cfg, spec, model = resolved.model.config, resolved.spec, resolved.model
    token_size = _mlp_size(cfg) + 8 * cfg.hidden_size + 3 * cfg.qkv_size
    scratch_bytes = spec.layout.prefill_tokens[-1] * token_size * cfg.dtype.itemsize
    params_bytes = model.reduced().param_bytes + slots_bytes(model.reduced())
    # Inductor draws a table once more to time the look-up; and the device's context
    table_bytes = cfg.vocab_size * cfg.hidden_size * cfg.dtype.itemsize
    worker_bytes = params_bytes + scratch_bytes + table_bytes + (3 << 29)
    own_bytes = device_bytes(model, spec.offload)
    count = resolved.platform.compile_workers(worker_bytes, own_bytes)
    return 0 if count < 2 or is_ready(resolved) else count


def _mlp_size(cfg: ModelConfig) -> int:
    """Numbers that a token takes in the MLP of a layer: several values of its inner width, and the
    result of each of its experts."""
    if cfg.moe is None:
        return 4 * cfg.ffn_size
    of_experts = cfg.moe.top_k * (4 * cfg.moe.expert_size + cfg.hidden_size)
    return max(4 * cfg.ffn_size, of_experts + 4 * cfg.moe.shared_size)
