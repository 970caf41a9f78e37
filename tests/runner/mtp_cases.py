"""Small random checkpoints with a layer that proposes tokens, and what it drafts by transformers'
layer of the same kind, which computes everything again each time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import save_tiny
from tests.models.hybrid_cases import EXPERTS, HYBRID
from tests.models.latent_cases import BY_NAME, biased
from tests.runner.heads import Weights, drafted, rms, states

FULL, LINEAR = "full_attention", "linear_attention"
QWEN: dict[str, Any] = {
    **HYBRID, "vocab_size": 99, "hidden_size": 56, "max_position_embeddings": 256,
    "pad_token_id": None, "layer_types": [LINEAR, FULL, FULL], "num_hidden_layers": 3,
}  # fmt: skip
GLM: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 56, "moe_intermediate_size": 24, "num_hidden_layers": 3,
    "n_routed_experts": 12, "num_experts_per_tok": 3, "n_shared_experts": 1, "n_group": 4,
    "topk_group": 2, "first_k_dense_replace": 1, "use_qk_norm": True, "tie_word_embeddings": False,
    "max_position_embeddings": 256, "pad_token_id": None, "partial_rotary_factor": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class MtpCase:
    """A checkpoint whose last layer becomes the one that proposes."""

    model_type: str

    def __str__(self) -> str:
        return self.model_type

    @property
    def is_qwen(self) -> bool:
        return self.model_type.startswith("qwen")

    @property
    def prefix(self) -> str:
        return "mtp." if self.is_qwen else "model.layers.2."

    def save(self, folder: Path) -> tuple[Path, Any]:
        """The checkpoint, and transformers' model with the layer as its third."""
        from transformers import AutoModelForCausalLM

        folder.mkdir()
        if self.model_type == "deepseek_v3":
            BY_NAME["v3"].save(folder)
        elif self.is_qwen:
            fields = QWEN | EXPERTS if "moe" in self.model_type else QWEN
            save_tiny(folder, self.model_type, **fields)
        else:
            save_tiny(folder, self.model_type, **GLM)
        path = folder / "model.safetensors"
        weights = load_file(path)
        biased(weights)
        save_file(weights, path, metadata={"format": "pt"})
        hf = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        own, new = "model.layers.2.", "mtp.layers.0." if self.is_qwen else "model.layers.2."
        weights = {
            new + name.removeprefix(own) if name.startswith(own) else name: weight
            for name, weight in weights.items()
        }
        save_file({**weights, **self.beside()}, path, metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config |= {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
        if self.is_qwen:
            config["layer_types"] = config["layer_types"][:2]
        if "mlp_layer_types" in config:
            config["mlp_layer_types"] = config["mlp_layer_types"][:2]
        (folder / "config.json").write_text(json.dumps(config))
        return folder, hf

    def beside(self) -> Weights:
        """The weights beside the layer."""
        generator = torch.Generator().manual_seed(6)
        mean = 0.0 if self.is_qwen else 1.0
        names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm", "fc")
        if not self.is_qwen:
            names = ("enorm", "hnorm", "shared_head.norm", "eh_proj")
        *norms, join = (f"{self.prefix}{name}.weight" for name in names)
        made = {name: torch.randn(56, generator=generator) * 0.1 + mean for name in norms}
        return {**made, join: torch.randn(56, 112, generator=generator) * 0.2}

    def drafts(self, hf: Any, tokens: Sequence[int], num: int) -> list[int]:
        """What the layer drafts after tokens."""
        embed_norm, state_norm, final_norm, join = self.beside().values()
        one, eps = (1.0 if self.is_qwen else 0.0), hf.config.rms_norm_eps
        decoder = hf.model

        def normed(h: Tensor, weight: Tensor) -> Tensor:
            return rms(h, weight + one, eps)

        def layer(token_T: Tensor, state_TD: Tensor) -> Tensor:
            embeds = normed(decoder.embed_tokens(token_T), embed_norm)
            x_1TD = (torch.cat((embeds, normed(state_TD, state_norm)), -1) @ join.T).unsqueeze(0)
            position = torch.arange(len(token_T)).unsqueeze(0)
            mask = torch.full((len(token_T), len(token_T)), -torch.inf).triu(1)[None, None]
            rope = decoder.rotary_emb(x_1TD, position)
            return decoder.layers[2](
                x_1TD, position_embeddings=rope, attention_mask=mask, position_ids=position
            )[0].reshape(len(token_T), -1)

        def again(out_TD: Tensor) -> Tensor:
            return normed(out_TD, final_norm)

        def choose(out_D: Tensor) -> int:
            return int(hf.lm_head(again(out_D)).argmax())

        (last_TD,) = states(hf, tokens[:-1], [1])
        with torch.no_grad():
            return drafted(tokens, num, decoder.norm(last_TD), layer, choose, again)


CASES = tuple(map(MtpCase, ("deepseek_v3", "glm4_moe", "qwen3_5_text", "qwen3_5_moe_text")))
