"""Any decoder that vLLM knows, run for a prompt and for its image without the caption at once."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix

from unified_vllm.attention import TwinAttention
from unified_vllm.streams import two_streams


class UnifiedGuidedForCausalLM(nn.Module):
    """Scores of the codes with and without the caption, for :class:`unified_vllm.guidance.Guidance` to mix.

    The layers run once over the tokens of both streams; each attention layer keeps keys and values of both, so that a token takes
    twice the cache and twice the work of its unguided self.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        check_supported(vllm_config)
        config = copy.deepcopy(vllm_config.model_config.hf_config)
        about = config.unified
        self.first_code, self.size = about["first_code"], about["codebook_size"]
        self.first_null = self.first_code + self.size
        self.boi, self.bos = about["boi_token_id"], about["bos_token_id"]
        config.vocab_size = self.first_null  # rows of the tables
        self.inner: Any = init_vllm_registered_model(
            vllm_config, prefix=maybe_prefix(prefix, "inner"), hf_config=config, architectures=[about["architecture"]]
        )
        context, layers = vllm_config.compilation_config.static_forward_context, config.num_hidden_layers
        places = [
            (parent, name, child)
            for parent in self.inner.modules()
            for name, child in parent.named_children()
            if isinstance(child, Attention)
        ]
        if any(child.sliding_window is not None for _, _, child in places):
            raise ValueError(
                "model: its attention has a sliding window, which would count hidden tokens; serve it unguided."
            )
        self.attentions = [TwinAttention(child, layers, context) for _, _, child in places]
        for (parent, name, _), attention in zip(places, self.attentions, strict=True):
            setattr(parent, name, attention)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings of ids of the joint table."""
        return self.inner.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Final states ``(T, 2D)`` of both streams."""
        if input_ids is None:
            raise ValueError("prompt: embeddings given; a guided model reads ids.")
        streams = two_streams(input_ids, positions, self.first_null, self.first_code, self.boi, self.bos)
        for attention in self.attentions:
            attention.hidden = streams.hidden
        states = self.inner.model(None, streams.positions, None, self.inner.embed_input_ids(streams.ids))
        return torch.cat(states.chunk(2), dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """``(B, V)``: scores of the codes given the prompt, behind them those without its caption; text has none."""
        both = self.inner.compute_logits(torch.cat(hidden_states.chunk(2, dim=-1)))
        if both is None:  # another rank has them
            return None
        conditional, unconditional = both[:, self.first_code : self.first_null].chunk(2)
        text = both.new_full((len(conditional), self.first_code), float("-inf"))
        return torch.cat([text, conditional, unconditional], dim=-1)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Names of the parameters that were loaded."""
        return {f"inner.{name}" for name in self.inner.load_weights(weights)}


def check_supported(vllm_config: VllmConfig) -> None:
    """Raises ValueError for settings of the engine under which guidance would be wrong."""
    rotary = getattr(vllm_config.model_config.hf_config, "rope_parameters", None) or {}
    refused = {
        "compilation (use --enforce-eager)": not vllm_config.model_config.enforce_eager,
        "pipeline parallel": vllm_config.parallel_config.pipeline_parallel_size > 1,
        "speculative decoding": vllm_config.speculative_config is not None,
        "adapters (fuse them before export)": vllm_config.lora_config is not None,
        "rotary embeddings that depend on more than differences": rotary.get("rope_type") in ("dynamic", "longrope"),
        "an 8-bit cache": "8" in str(vllm_config.cache_config.cache_dtype),
    }
    for name, given in refused.items():
        if given:
            raise ValueError(
                f"guidance: it does not work with {name}; change the engine's settings, or serve unguided."
            )
