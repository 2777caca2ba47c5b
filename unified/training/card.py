"""The model card of a run: what its weights were made from, collected from settings, data and log."""

from pathlib import Path

from unified.config import UnifiedConfig
from unified.data.code_cache import description_of, is_codes_cache
from unified.data.sources import terms_of
from unified.model_card import Origin, model_card
from unified.settings import dump_settings
from unified.training.config import TrainConfig
from unified.training.tracking import read_log


def run_card(
    config: TrainConfig, part: str, image_tokenizer_fingerprint: str, model_config: UnifiedConfig | None = None
) -> str:
    """Text of the ``README.md`` of what a run writes.

    Args:
        config: settings of the run; its ``output_dir`` holds the log, and the codes of images that the run encoded.
        part: ``pipeline``, ``lora``, or ``base``, which has neither data nor metrics.
        image_tokenizer_fingerprint: of the tokenizer whose codes the model was trained on.
        model_config: of the model, which may be class-conditional.
    """
    output = Path(config.output_dir)
    base = config.model.pipeline or str(output / "base")
    origin = config.model.pipeline or config.model.backbone
    origins: list[Origin] = [(f"Weights: `{origin}`", terms_of(origin))] if origin else []
    vision = None if model_config is None else model_config.vision
    if vision is not None and part != "lora":  # its weights are part of the folder
        origins.append((f"Vision encoder: `{vision['encoder']}`", terms_of(vision["encoder"])))
    log = []
    if part != "base":
        origins += _data(config)
        log = read_log(output)
    classes = None if model_config is None else model_config.classes
    settings = dump_settings(config)
    return model_card(part, output / part, base, origins, log, image_tokenizer_fingerprint, settings, classes)


def _data(config: TrainConfig) -> list[Origin]:
    """The training data, source by source."""
    data, output, sources = config.data, Path(config.output_dir), config.all_sources()
    if data.train:
        return [_codes("Images", data.train, output / "codes", sources[0].split, data.max_samples)]
    kinds = {"image": "Images", "interleaved": "Texts with images", "pairs": "Pairs of images", "chat": "Conversations"}
    return [
        (f"Texts: `{source.path}`", terms_of(source.path))
        if source.kind == "text"
        else _codes(kinds[source.kind], source.path, output / f"codes-{number}", source.split)
        for number, source in enumerate(sources)
    ]


def _codes(what: str, source: str, encoded: Path, split: str, max_samples: int | None = None) -> Origin:
    """``source`` is a codes cache, or was encoded into ``encoded``."""
    folder = Path(source) if is_codes_cache(source) else encoded
    codes = description_of(folder)
    used = min(codes["rows"][split]["used"], max_samples or float("inf"))
    terms = codes if "license" in codes else terms_of(codes["source"])  # a cache of an earlier version has none
    return f"{what}: `{codes['source']}`, {used} for training", terms
