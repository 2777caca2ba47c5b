"""The unified model: embed text and codes, run any decoder backbone, score each position over its own vocabulary."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin

import unified.model.chameleon  # noqa: F401  # registers a backbone
from unified.config import UnifiedConfig
from unified.model.backbone import load_language_model
from unified.model.dropout import add_dropout
from unified.model.factored import FactoredEmbedding, FactoredHead, fill_factors
from unified.model.family import check_family
from unified.model.image_head import ImageHead, ImageProjection
from unified.model.image_modules import SourceJoin, WindowChain, WindowMerge, WindowSplit, initialize_image_module
from unified.model.init import initialize_image_tables
from unified.model.losses import score_targets, target_codes, target_states
from unified.model.masks import NoCache, check_no_window, masked_arguments
from unified.model.output import UnifiedOutput
from unified.model.prefix import build_condition
from unified.model.rotary import GridRotary
from unified.model.vision import build_projector, enter_features
from unified.prediction.npp import mean_embedding
from unified.prediction.plan import Prediction
from unified_tokenizers.checkpoint import WholeModel

LOGIT_SCALES = ("logits_scaling", "logit_scale", "final_logit_softcapping")  # of Granite, Cohere and Gemma


class UnifiedForCausalLM(WholeModel, GenerationMixin):
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
            try:
                backbone = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False)
            except (KeyError, TypeError, AttributeError, ArithmeticError) as error:  # values that no check has foreseen
                raise ValueError(
                    f"text_config: a {config.text_config.model_type!r} model cannot be built from these values ({error!r})."
                ) from error
        else:
            for module in backbone.modules():
                module._is_hf_initialized = True  # or post_init samples its weights again
        self.backbone: Any = backbone
        width = self.backbone.config.hidden_size
        prediction = Prediction.of(config)
        side, sources = prediction.merge.side, prediction.way.most_sources
        if prediction.frame is not None:
            prediction.frame.check(config.text_config.vocab_size)
        hidden, factors = config.image_projection, config.image_factors
        self.image_projection = None if hidden is None else ImageProjection(width, hidden)
        scored = width if hidden is None else hidden + 1  # what the head reads
        self.image_embed: Any
        self.image_head: Any
        if factors is None:
            self.image_embed = nn.Embedding(config.codebook_size, width)
            self.image_head = ImageHead(scored, config.codebook_size)
        else:
            self.image_embed = FactoredEmbedding((factors[0], factors[1]), width)
            self.image_head = FactoredHead((factors[0], factors[1]), scored)
        self.image_query = nn.Embedding(1, width) if prediction.has_queries else None
        self.image_merge = WindowMerge(width, side) if side > 1 else None
        self.image_split = WindowSplit(width, side) if side > 1 else None
        self.image_chain = WindowChain(width, side) if prediction.merge.chained else None
        self.image_join = SourceJoin(width, sources) if sources > 1 else None
        self.condition = None if config.conditioning is None else build_condition(config.conditioning, width)
        self.vision_projector = None if config.vision is None else build_projector(config.vision, width)
        # Of unified.model.retrofit: how the model predicted images before.
        self.retrofitted_from: dict[str, Any] | None = None
        self.modality_gate: Any = None  # of unified.lora, while an adapter is loaded that acts on one modality only
        self._wrap_rotary()
        if config.dropout:
            add_dropout(self.backbone, config.dropout)
        if prediction.has_queries:
            check_no_window(self.backbone.config)
        self.post_init()

    @property
    def prediction(self) -> Prediction:
        """How the model predicts images."""
        return Prediction.of(self.config)

    def _init_weights(self, module: nn.Module) -> None:
        if not initialize_image_module(module):
            super()._init_weights(module)

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
        model.start_image_tables(image_init, head_init, codebook)
        return model

    def start_image_tables(self, image_init: str, head_init: str, codebook: Tensor | None = None) -> None:
        """Write the first weights of the image tables, see :func:`unified.model.init.initialize_image_tables`.

        Raises:
            ValueError: as that function, or for a kind that needs a row for each code, of a model with ``image_factors``.
        """
        text, factors = self.backbone.config, self.config.image_factors
        if factors is not None and (image_init == "codebook" or head_init == "tied-like"):
            raise ValueError(
                f"image_init, head_init: {image_init!r} and {head_init!r} with image_factors, whose tables have no row for a code; "
                "use text or normal, and normal, text or zero."
            )
        if factors is None:
            rows = (self.image_embed.weight, self.image_head.weight)
        else:
            rows = (torch.empty(sum(factors), text.hidden_size), torch.empty(sum(factors), text.hidden_size))
        initialize_image_tables(
            rows[0], rows[1], self.get_input_embeddings(), self.backbone.get_output_embeddings().weight,
            text.vocab_size, getattr(text, "initializer_range", 0.02), image_init, head_init, codebook,
        )  # fmt: skip
        if factors is not None:
            fill_factors(self.image_embed, self.image_head, *rows)

    @classmethod
    def around(cls, backbone: Any, **config: Any) -> "UnifiedForCausalLM":
        """Build a model around a loaded language model, which is used as it is; the image tables are still to be written.

        Args:
            backbone: a causal language model of transformers.
            config: all fields of :class:`UnifiedConfig` but ``text_config``.

        Raises:
            ValueError: if the family does not work here; see :func:`unified.model.family.check_family`.
        """
        unknown = sorted(config.keys() - UnifiedConfig.__annotations__.keys())
        if unknown:
            raise ValueError(f"config: {unknown} are no fields of UnifiedConfig; leave them out.")
        attention = backbone.config._attn_implementation  # a config that takes in another one resets it there
        unified = UnifiedConfig(text_config=backbone.config, **config)
        unified._attn_implementation = attention
        model = cls(unified, backbone)
        for part in (*model.image_modules().values(), model.condition):
            if part is not None:  # the backbone has its dtype, and keeps rotary frequencies in float32
                part.to(dtype=backbone.dtype)
        model.generation_config = backbone.generation_config
        check_family(backbone, model.text_logits, unified.positions)
        return model

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's text embedding."""
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The backbone's text head."""
        return self.backbone.get_output_embeddings()

    def image_modules(self) -> dict[str, nn.Module]:
        """The modules that the model has for images beside the backbone, by name."""
        names = (
            "image_embed",
            "image_head",
            "image_projection",
            "image_query",
            "image_merge",
            "image_split",
            "image_chain",
            "image_join",
            "vision_projector",
        )
        return {name: module for name in names if (module := getattr(self, name)) is not None}

    def embed(
        self,
        input_ids: Tensor,
        image_inputs: Tensor | None = None,
        query_inputs: Tensor | None = None,
        merge: str = "mean",
    ) -> Tensor:
        """Embeddings ``(B, S, D)`` of ids ``(B, S)`` or ``(B, S, P)``: text ids, merged codes, and queries.

        ``image_inputs`` and ``query_inputs`` are flat indices of the positions that codes enter, and of queries; B * S
        stands for none. ``merge`` is ``mean`` or ``channel``.
        """
        ids = input_ids if input_ids.ndim == 3 else input_ids[..., None]
        flat, vocab_size = ids.flatten(0, 1), self.config.text_config.vocab_size
        text = flat[:, 0]
        if image_inputs is None or not len(image_inputs):
            try:
                return self.get_input_embeddings()(text).view(*ids.shape[:2], -1)
            except IndexError as error:  # on a CPU
                raise ValueError(
                    f"input_ids: ids beyond the {vocab_size} of the text vocabulary; image codes come with image_inputs and "
                    "positions, which unified.prediction.arrange makes."
                ) from error
        # One row more, for the indices that stand for none.
        text = F.pad(text.masked_fill((text >= vocab_size) | (text < 0), 0), (0, 1))
        codes = F.pad(flat, (0, 0, 0, 1), value=vocab_size)[image_inputs] - vocab_size
        embeds = self.get_input_embeddings()(text)
        embeds = embeds.index_copy(0, image_inputs, self.embed_codes(codes, merge).to(embeds.dtype))
        if query_inputs is not None:
            assert self.image_query is not None
            query = self.image_query(torch.zeros_like(query_inputs)).to(embeds.dtype)
            embeds = embeds.index_copy(0, query_inputs, query)
        return embeds[:-1].view(*ids.shape[:2], -1)

    def embed_codes(self, codes: Tensor, merge: str = "mean") -> Tensor:
        """Codes ``(N, P)`` that enter one position each, to ``(N, D)``."""
        if merge == "channel":
            assert self.image_merge is not None
            return self.image_merge(self.image_embed(codes))
        return mean_embedding(self.image_embed, codes)

    def image_states(self, hidden: Tensor, missing: Tensor | None = None, merge: str = "mean") -> Tensor:
        """What the image head scores, ``(N, P, D)``, of the final states ``(N, m, D)`` of N cells' sources.

        D is the width of the hidden layer and one more, for a model with ``image_projection``.

        P is 1, or with ``channel`` merges the number of codes of a cell. ``missing (N, m)`` is True for sources that a cell
        does not have. Where codes are chained, :meth:`chained_states` makes of these states what the head scores.
        """
        if self.image_join is None:
            states = hidden[:, 0]
        else:
            assert missing is not None
            states = self.image_join(hidden, missing)
        if merge == "channel":
            assert self.image_split is not None
            states = self.image_split(states)
            if self.image_chain is not None:
                return states
        else:
            states = states[:, None]
        return states if self.image_projection is None else self.image_projection(states)

    def chained_states(self, states: Tensor, codes: Tensor, place: int | None = None) -> Tensor:
        """What the image head scores where the codes of a cell are chained: ``(..., P, D)``, or ``(..., D)`` at one place.

        ``states (..., P, D)`` are those of :meth:`image_states`, ``codes (..., P)`` the cell's; what stands at ``place`` and
        behind it is not read.
        """
        assert self.image_chain is not None
        states = self.image_chain(states, self.image_embed(codes.clamp_min(0)), place)
        return states if self.image_projection is None else self.image_projection(states)

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

        ``image_positions``, True on image patches, broadcasts to ``(B, S)``; adapters of one modality need it.
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
        positions: Tensor | None = None,
        image_inputs: Tensor | None = None,
        text_targets: Tensor | None = None,
        image_targets: Tensor | None = None,
        image_sources: Tensor | None = None,
        query_inputs: Tensor | None = None,
        steps: Tensor | None = None,
        merge: str = "mean",
        document_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        condition: Tensor | None = None,
        features: Tensor | None = None,
        feature_inputs: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        return_image_states: bool = False,
        return_log_probs: bool = False,
        **kwargs: Any,
    ) -> UnifiedOutput:
        """Losses with ``labels``, logits without. Batches with images come from :mod:`unified.prediction.arrange`.

        Args:
            input_ids: ``(B, S)``, text ids below ``V_text``, image code c as ``V_text + c``; ``(B, S, P)`` where windows of
                codes enter, -100 in unused columns.
            labels: as ``input_ids``, the ids to be predicted for each position; -100 where there are none.
            positions: ``(B, S, 2)`` rotary coordinates; None for the running index.
            image_inputs, text_targets, image_targets: flat indices of the positions that codes enter, and of the
                supervised positions; B * S stands for none. Without them all is text.
            image_sources: ``(N, m)`` flat indices of the positions that predict each of ``image_targets``; B * S stands for
                none. None: the position before.
            query_inputs: flat indices of positions that no code enters and that predict one.
            steps: ``(B, S, 2)``: position i sees j if ``steps[j, 0] <= steps[i, 1]``, and itself. None: all before it.
            merge: ``channel`` where windows enter by the learned merge of the model.
            document_ids: ``(B, S)`` for packed rows, -1 on padding: no attention across documents.
            attention_mask: ``(B, S)``, 0 on padding; padding on the right needs none.
            position_ids, cache, use_cache, logits_to_keep: as in transformers, for text generation.
            condition: ``(B,)`` classes or ``(B, P, F)`` features, for models with ``conditioning``; its embeddings take the
                place of the first positions (see :mod:`unified.model.prefix`).
            features, feature_inputs: ``(n, F)`` of images that are read, and the flat indices ``(n,)`` of the positions that they
                enter, for models with ``vision``.
            num_items_in_batch: what the summed loss is divided by; default: the weight of the batch's own targets.
            return_image_states: with labels, in place of losses what the image head scores for each of ``image_targets``.
            return_log_probs: also the log-probability of every supervised code, of which the image loss is made then.

        Raises:
            ValueError: if nothing is supervised, or a condition is missing or not expected.
        """
        if (condition is None) != (self.condition is None):
            needed = "missing; the model samples after one" if condition is None else "given, but the model takes none"
            raise ValueError(f"condition: {needed} (conditioning {self.config.conditioning}).")
        if condition is not None and document_ids is not None:
            raise ValueError("condition: not possible in packed rows; leave data.pack out.")
        embeds = self.embed(input_ids, image_inputs, query_inputs, merge)
        if self.condition is not None:
            embeds = torch.cat([self.condition(condition).to(embeds.dtype), embeds[:, self.condition.length :]], dim=1)
        if features is not None and feature_inputs is not None:
            embeds = enter_features(self.vision_projector, embeds, features, feature_inputs)
        image_positions = None
        if self.modality_gate is not None:
            image_positions = self._image_positions(embeds, image_inputs, query_inputs)
        if labels is not None and embeds.shape[1] > 1:  # the last position predicts nothing
            embeds = embeds[:, :-1].contiguous()
            positions, image_positions, steps, document_ids, attention_mask, position_ids = (
                None if each is None else each[:, :-1]
                for each in (positions, image_positions, steps, document_ids, attention_mask, position_ids)
            )
        if self.config.dropout:
            embeds = F.dropout(embeds, self.config.dropout, self.training)
        arguments: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids, "cache": cache}
        config = self.backbone.base_model.config
        if document_ids is not None or steps is not None:
            arguments |= masked_arguments(config, embeds.dtype, steps, document_ids)
        elif labels is not None and cache is None and attention_mask is None and NoCache.fits(config):
            arguments["cache"] = None if self.backbone.is_activation_checkpointing else NoCache()
        use_cache = bool(use_cache) and labels is None
        outputs = self.run_backbone(embeds, positions, image_positions, use_cache=use_cache, **arguments, **kwargs)
        if labels is not None:
            hidden = outputs.last_hidden_state
            if return_image_states:
                assert image_targets is not None
                codes = target_codes(labels, image_targets, self.config.text_config.vocab_size)
                found = target_states(self, hidden, labels.shape[1], image_targets, image_sources, merge, codes)
                return UnifiedOutput(image_states=found)
            output = score_targets(
                self, hidden, labels, text_targets, image_targets, image_sources, query_inputs, merge, num_items_in_batch,
                return_log_probs,
            )  # fmt: skip
            output.hidden_states = outputs.hidden_states
            return output
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        kept = outputs.last_hidden_state[:, keep]
        image_logits = None
        if image_inputs is not None and self.image_join is None and self.image_split is None:
            image_logits = self.image_head(self.image_states(kept.flatten(0, 1)[:, None])).view(*kept.shape[:2], -1)
        return UnifiedOutput(logits=self.text_logits(kept), image_logits=image_logits, cache=outputs.cache)

    def _image_positions(self, embeds: Tensor, *inputs: Tensor | None) -> Tensor:
        """``(B, S)``, True on positions that codes enter, and on queries."""
        found = torch.zeros(embeds.shape[0] * embeds.shape[1] + 1, dtype=torch.bool, device=embeds.device)
        for each in inputs:
            if each is not None:
                found = found.index_fill(0, each, True)
        return found[:-1].view(embeds.shape[:2])


AutoConfig.register("unified", UnifiedConfig)
AutoModel.register(UnifiedConfig, UnifiedForCausalLM)
AutoModelForCausalLM.register(UnifiedConfig, UnifiedForCausalLM)
