"""The unified model: embed, group image spans, run any decoder backbone, score each position over its own vocabulary."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from unified.config import UnifiedConfig
from unified.model.backbone import load_language_model, load_whole
from unified.model.family import check_family
from unified.model.image_head import ImageHead, patch_losses
from unified.model.init import initialize_image_tables
from unified.model.prefix import build_condition
from unified.model.rotary import GridRotary
from unified.prediction.npp import group_embeddings, group_targets
from unified.prediction.slots import SlotPlan, plan_slots, running_index
from unified.sequence import IGNORE

LOGIT_SCALES = ("logits_scaling", "logit_scale", "final_logit_softcapping")  # of Granite, Cohere and Gemma


@dataclass
class UnifiedOutput(CausalLMOutputWithPast):
    """Output of :class:`UnifiedForCausalLM`.

    Attributes:
        loss: weighted mean over all learned positions, in nats.
        text_loss, image_loss: plain means over the positions whose target is text, or an image patch; None without any.
        logits: ``(B, S, V_text)``, only without labels.
        image_logits: ``(B, S, K)``, only without labels and with ``image_grids``.
    """

    text_loss: Tensor | None = None
    image_loss: Tensor | None = None
    image_logits: Tensor | None = None


class UnifiedForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder language model with a second embedding table and a second head for image codes."""

    config: UnifiedConfig
    config_class = UnifiedConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: UnifiedConfig, backbone: Any = None):
        """Build a model; ``backbone`` is a causal language model of ``text_config`` to be taken over as it is."""
        super().__init__(config)
        if config.text_config is None:
            raise ValueError("text_config: missing; give the backbone's configuration or use from_backbone.")
        if backbone is None:
            backbone = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False)
        else:
            for module in backbone.modules():
                module._is_hf_initialized = True  # or post_init samples its weights again
        self.backbone: Any = backbone
        width = self.backbone.config.hidden_size
        self.image_embed = nn.Embedding(config.codebook_size, width)
        self.image_head = ImageHead(width, config.codebook_size)
        self.condition = None if config.conditioning is None else build_condition(config.conditioning, width)
        self.modality_gate: Any = None  # of unified.lora, while an adapter is loaded that acts on one modality only
        self._wrap_rotary()
        self.post_init()

    def _wrap_rotary(self) -> None:
        decoder = self.backbone.base_model
        if not isinstance(getattr(decoder, "rotary_emb", None), nn.Module):
            raise ValueError(
                f"text_config: {type(decoder).__name__} has no rotary_emb module at its top; choose a decoder with rotary "
                "embeddings such as Llama, Qwen, Mistral or Gemma."
            )
        decoder.rotary_emb = GridRotary(decoder.rotary_emb, llamagen=self.config.positions == "llamagen")

    @classmethod
    def from_backbone(
        cls,
        pretrained_model_name_or_path: str,
        codebook_size: int,
        boi_token_id: int,
        eoi_token_id: int,
        dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
        image_init: str = "text",
        head_init: str = "normal",
        codebook: Tensor | None = None,
        **config: Any,
    ) -> "UnifiedForCausalLM":
        """Attach image tables to a pretrained decoder; its text logits stay what they were.

        Args:
            pretrained_model_name_or_path: folder or Hub name of any ``AutoModelForCausalLM``; see
                :func:`unified.model.backbone.load_language_model`.
            codebook_size: number of image codes K.
            boi_token_id, eoi_token_id: ids of the backbone's vocabulary (unused or reserved ones) that frame an image.
            dtype: dtype of the weights; float32 by default.
            attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``, as in ``from_pretrained``.
            image_init, head_init, codebook: how the tables start, see :func:`unified.model.init.initialize_image_tables`.
            config: further fields of :class:`UnifiedConfig`.

        Raises:
            ValueError: if the checkpoint is not whole, or its family does not work here; see
                :func:`unified.model.family.check_family`.
        """
        backbone = load_language_model(pretrained_model_name_or_path, dtype or torch.float32, attn_implementation)
        tables = {"codebook_size": codebook_size, "boi_token_id": boi_token_id, "eoi_token_id": eoi_token_id}
        model = cls.around(backbone, **{"new_image_tables": True, **tables, **config})
        text = backbone.config
        initialize_image_tables(
            model.image_embed.weight, model.image_head.weight,
            backbone.get_input_embeddings(), backbone.get_output_embeddings().weight,
            text.vocab_size, getattr(text, "initializer_range", 0.02), image_init, head_init, codebook,
        )  # fmt: skip
        return model

    @classmethod
    def around(cls, backbone: Any, **config: Any) -> "UnifiedForCausalLM":
        """Build a model around a loaded language model, which is used as it is; the image tables are still to be written.

        Args:
            backbone: a causal language model of transformers.
            config: all fields of :class:`UnifiedConfig` but ``text_config``.

        Raises:
            ValueError: if the family does not work here; see :func:`unified.model.family.check_family`.
        """
        attention = backbone.config._attn_implementation  # a config that takes in another one resets it there
        unified = UnifiedConfig(text_config=backbone.config, **config)
        unified._attn_implementation = attention
        model = cls(unified, backbone)
        for part in (model.image_embed, model.image_head, model.condition):
            if part is not None:  # the backbone has its dtype, and keeps rotary frequencies in float32
                part.to(dtype=backbone.dtype)
        model.generation_config = backbone.generation_config
        check_family(backbone, model.text_logits, unified.positions)
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does, but never with random numbers in place of absent tensors.

        Raises:
            ValueError: as :func:`unified.model.backbone.load_whole`.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = load_whole(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)
        return (model, info) if wants_info else model

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's text embedding."""
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The backbone's text head."""
        return self.backbone.get_output_embeddings()

    def embed(self, input_ids: Tensor, plan: SlotPlan, patch_size: int) -> Tensor:
        """Slot embeddings ``(B, S, D)`` of ids ``(B, T)``: text rows as they are, image spans grouped."""
        flat = input_ids.reshape(-1)
        text = self.get_input_embeddings()(flat[plan.text_tokens])
        embeds = text.new_zeros(plan.batch_size * plan.length, text.shape[-1])
        embeds = embeds.index_copy(0, plan.text_positions, text)
        for group in plan.spans:
            codes = flat[group.tokens] - self.config.vocabulary.text_vocab_size
            patches = group_embeddings(self.image_embed(codes), group.grid, patch_size)
            embeds = embeds.index_copy(
                0, group.slots.reshape(-1), patches.reshape(-1, patches.shape[-1]).to(embeds.dtype)
            )
        return embeds.reshape(plan.batch_size, plan.length, -1)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., V_text)`` through the backbone's own head."""
        logits, config = self.get_output_embeddings()(hidden), self.config.text_config
        divisor, factor, cap = (getattr(config, name, None) for name in LOGIT_SCALES)
        if divisor is not None:
            logits = logits / divisor
        if factor is not None:
            logits = logits * factor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def run_backbone(
        self, embeds: Tensor, coordinates: Tensor | None, image_positions: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Run the backbone on ``(B, S, D)`` embeddings with explicit rotary coordinates ``(B, S, 2)``.

        ``image_positions``, True on image patches, broadcasts to ``(B, S)``; adapters of one kind of positions need it.
        """
        decoder = self.backbone.base_model
        if self.modality_gate is not None:
            kwargs["image_positions"] = image_positions
        decoder.rotary_emb.coordinates = coordinates
        try:
            return decoder(inputs_embeds=embeds, **kwargs)
        finally:
            decoder.rotary_emb.coordinates = None

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        image_grids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        patch_size: int = 1,
        position_ids: Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        condition: Tensor | None = None,
        **kwargs: Any,
    ) -> UnifiedOutput:
        """Losses with ``labels``, logits without.

        Args:
            input_ids: ``(B, T)``; text ids below ``V_text``, image code c as ``V_text + c``.
            labels: ``(B, T)``, -100 where nothing is learned. A patch is learned if all of its codes are labelled.
            image_grids: ``(N, 2)``, the (h, w) of every image span in order of appearance.
            attention_mask: ``(B, T)``, 0 on padding.
            document_ids: ``(B, T)`` for packed rows, -1 on padding: no attention, position or loss across documents.
            patch_size: side p of the patches that image spans are grouped into.
            position_ids, cache, use_cache, logits_to_keep: as in transformers, for text generation.
            condition: ``(B,)`` classes or ``(B, P, F)`` features, for models with ``conditioning``; its embeddings take the
                place of the first positions (see :mod:`unified.model.prefix`).

        Raises:
            ValueError: if spans and grids disagree, ``patch_size`` does not divide a grid, or a condition is missing or
                not expected.
        """
        if cache is not None and image_grids is not None:
            raise ValueError("cache: cached decoding of image spans goes through unified.decoding.")
        plan = plan_slots(input_ids, image_grids, attention_mask, document_ids, patch_size, self.config)
        embeds = self._with_condition(self.embed(input_ids, plan, patch_size), condition, plan, patch_size)
        attention = str(self.backbone.config._attn_implementation)
        if plan.documents is not None and attention.startswith("flash") and len(input_ids) > 1:
            raise ValueError(f"document_ids: {attention} keeps documents apart in a batch of one row only; use sdpa.")
        # Packed rows are told apart by restarting position ids, which needs the mask argument to be empty.
        mask = None if plan.documents is not None else attention_mask if cache is not None else plan.attention_mask
        index = running_index(plan) if position_ids is None and cache is None else position_ids
        coordinates, image_positions = plan.coordinates, None if self.modality_gate is None else plan.image_positions()
        if labels is not None and plan.length > 1:  # the last position predicts nothing
            embeds = embeds[:, :-1].contiguous()
            mask, index, coordinates, image_positions = (
                None if each is None else each[:, :-1] for each in (mask, index, coordinates, image_positions)
            )
        outputs = self.run_backbone(
            embeds,
            coordinates,
            image_positions,
            attention_mask=mask,
            position_ids=index,
            cache=cache,
            use_cache=bool(use_cache) and labels is None,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if labels is not None:
            return self._losses(hidden, labels, plan, patch_size)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        kept = hidden[:, keep]
        return UnifiedOutput(
            logits=self.text_logits(kept),
            image_logits=None if image_grids is None else self.image_head(kept),
            cache=outputs.cache,
        )

    def _with_condition(self, embeds: Tensor, condition: Tensor | None, plan: SlotPlan, patch_size: int) -> Tensor:
        if (condition is None) != (self.condition is None):
            needed = "missing; the model samples after one" if condition is None else "given, but the model takes none"
            raise ValueError(f"condition: {needed} (conditioning {self.config.conditioning}).")
        if self.condition is None or condition is None:
            return embeds
        length = self.condition.length
        if plan.documents is not None or (patch_size > 1 and length > 1 and plan.attention_mask is not None):
            raise ValueError("condition: not possible in packed rows, nor with masked features and patch_size above 1.")
        return torch.cat([self.condition(condition).to(embeds.dtype), embeds[:, length:]], dim=1)

    def _losses(self, hidden: Tensor, labels: Tensor, plan: SlotPlan, patch_size: int) -> UnifiedOutput:
        """Score position i + 1 from the hidden state of position i, each over the vocabulary of its target.

        ``hidden`` is ``(B, S - 1, D)``.
        """
        flat_hidden = hidden.reshape(-1, hidden.shape[-1])

        def before(positions: Tensor) -> Tensor:
            return flat_hidden[positions - 1 - positions // plan.length]

        flat_labels, predicted = labels.reshape(-1), plan.predicted().reshape(-1)
        text_targets = flat_labels[plan.text_tokens]
        learned = (text_targets != IGNORE) & predicted[plan.text_positions]
        text = F.cross_entropy(
            self.text_logits(before(plan.text_positions[learned])).float(), text_targets[learned], reduction="none"
        )
        states, targets = [], []
        for group in plan.spans:
            patches = group_targets(flat_labels[group.tokens], group.grid, patch_size)
            learned = (patches != IGNORE).all(dim=-1) & predicted[group.slots]
            states.append(before(group.slots[learned]))
            targets.append(patches[learned] - self.config.vocabulary.text_vocab_size)
        image, count = text.new_zeros(()), 0
        if states:
            image, count = patch_losses(self.image_head, torch.cat(states), torch.cat(targets)), sum(map(len, states))
        elif self.training:  # zeros for both image tables: DDP waits for a gradient of every weight
            none = flat_labels[:0]
            image = patch_losses(self.image_head, flat_hidden[:0], none[:, None]) + self.image_embed(none).sum()
        per_patch = patch_size**2 if self.config.loss_normalization == "token" else 1
        text_weight, image_weight = self.config.text_loss_weight, self.config.image_loss_weight * per_patch
        weight = text_weight * text.numel() + image_weight * count
        if weight == 0:
            raise ValueError(
                "labels: no position of the batch is learned; label at least one token (-100 means not learned)."
            )
        return UnifiedOutput(
            loss=(text_weight * text.sum() + image_weight * image) / weight,
            text_loss=text.mean() if text.numel() else None,
            image_loss=image / count if count else None,
        )


AutoConfig.register("unified", UnifiedConfig)
AutoModel.register(UnifiedConfig, UnifiedForCausalLM)
AutoModelForCausalLM.register(UnifiedConfig, UnifiedForCausalLM)
