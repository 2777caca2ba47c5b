"""A trained model with another way to predict images or to read them, to be fine-tuned in full or by an adapter."""

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from unified.model.modeling import UnifiedForCausalLM
from unified.model.vision import VisionProjector
from unified.prediction.plan import Prediction


def change_prediction(model: UnifiedForCausalLM, prediction: Mapping[str, Any]) -> UnifiedForCausalLM:
    """A model of another order or merge around the same backbone, with the same image embedding and image head.

    Queries, merges and the join of sources start untrained; the join as a mean. Both models hold the same modules: train one of
    them in full, and the other is no longer what it was; train an adapter of one, and unload it, and both are as before.

    Args:
        model: a trained model, without adapters.
        prediction: as ``UnifiedConfig.prediction``.

    Raises:
        ValueError: for a prediction that is unknown, or that the backbone does not allow.
    """
    Prediction.from_mapping(prediction)  # checks it
    config = copy.deepcopy(model.config)
    config.prediction = dict(prediction)
    decoder = model.backbone.base_model
    wrapped = decoder.rotary_emb
    decoder.rotary_emb = wrapped.rotary
    try:
        changed = UnifiedForCausalLM(config, model.backbone)
    except Exception:
        decoder.rotary_emb = wrapped  # a change that is refused leaves the model as it was
        raise
    for name in ("image_embed", "image_head", "condition", "image_projection", "vision_projector"):
        setattr(changed, name, getattr(model, name))
    changed.retrofitted_from = describe_prediction(model.prediction)
    for name in new_modules(changed):
        getattr(changed, name).to(device=model.device, dtype=model.dtype)
    changed.generation_config, changed.name_or_path = model.generation_config, model.name_or_path
    return changed.train(model.training)


def add_vision(model: UnifiedForCausalLM, vision: dict[str, Any]) -> None:
    """Give a model an untrained projector for a vision encoder; ``vision`` is the encoder's ``description``."""
    width = model.config.text_config.hidden_size
    projector = VisionProjector(vision["width"], width).to(device=model.device, dtype=model.dtype)
    model.vision_projector = projector.apply(model._init_weights).train(model.training)
    model.config.vision, model.config.new_image_tables = vision, True


def new_modules(model: UnifiedForCausalLM) -> list[str]:
    """Names of the image modules of a model that the one it was made from lacks; none for a model that was not changed."""
    if model.retrofitted_from is None:
        return []
    shared = ("image_embed", "image_head", "image_projection", "vision_projector")
    return [name for name in model.image_modules() if name not in shared]


def describe_prediction(prediction: Prediction) -> dict[str, Any]:
    """A way of prediction as adapters note it: all fields but the frame, for JSON."""
    return {name: value for name, value in asdict(prediction).items() if name != "frame"}


def as_setting(description: Mapping[str, Any]) -> dict[str, Any]:
    """``UnifiedConfig.prediction`` from what :func:`describe_prediction` gives. Raises ValueError for anything else."""
    merge = description.get("merge")
    if (
        set(description) != {"order", "size", "merge"}
        or not isinstance(merge, Mapping)
        or set(merge) != {"kind", "side", "chained"}
    ):
        raise ValueError(f"prediction: {description!r} needs order, size and a merge with kind, side and chained.")
    names = {"merge": "kind", "window": "side", "chained": "chained"}
    return {name: description[name] for name in ("order", "size")} | {name: merge[old] for name, old in names.items()}
