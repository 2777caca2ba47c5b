"""A trained model with another way to predict images or to read them, to be fine-tuned."""

import copy
from typing import Any

from unified.model.modeling import UnifiedForCausalLM
from unified.model.vision import VisionProjector
from unified.prediction.plan import Prediction


def change_prediction(model: UnifiedForCausalLM, prediction: dict[str, Any]) -> UnifiedForCausalLM:
    """A model of another order or merge around the same backbone, with the same image embedding and image head.

    Queries, merges and the join of sources start untrained; the join as a mean. The model that is given must not be used any
    more.

    Args:
        model: a trained model, without adapters.
        prediction: as ``UnifiedConfig.prediction``.

    Raises:
        ValueError: for a prediction that is unknown, or that the backbone does not allow.
    """
    Prediction.from_mapping(prediction)  # checks it
    config = copy.deepcopy(model.config)
    config.prediction, config.new_image_tables = prediction, True
    decoder = model.backbone.base_model
    wrapped = decoder.rotary_emb
    decoder.rotary_emb = wrapped.rotary
    try:
        changed = UnifiedForCausalLM(config, model.backbone)
    except Exception:
        decoder.rotary_emb = wrapped  # a change that is refused leaves the model as it was
        raise
    changed.image_embed.load_state_dict(model.image_embed.state_dict())
    changed.image_head.load_state_dict(model.image_head.state_dict())
    changed.condition, changed.image_projection = model.condition, model.image_projection
    changed.vision_projector = model.vision_projector
    for part in changed.image_modules().values():
        part.to(device=model.device, dtype=model.dtype)
    changed.generation_config = model.generation_config
    return changed.train(model.training)


def add_vision(model: UnifiedForCausalLM, vision: dict[str, Any]) -> None:
    """Give a model an untrained projector for a vision encoder; ``vision`` is the encoder's ``description``."""
    width = model.config.text_config.hidden_size
    projector = VisionProjector(vision["width"], width).to(device=model.device, dtype=model.dtype)
    model.vision_projector = projector.apply(model._init_weights).train(model.training)
    model.config.vision, model.config.new_image_tables = vision, True
