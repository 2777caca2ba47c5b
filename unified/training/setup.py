"""From a configuration to the parts of a run: tokenizers, model, data."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
from accelerate import Accelerator, PartialState
from peft import PeftModel

from unified.config import UnifiedConfig
from unified.data.code_cache import CACHE_FILE, encode_source, is_codes_cache, load_codes
from unified.data.crops import Views
from unified.data.sources import SkipReport
from unified.lora.adapters import attach_lora
from unified.model.modeling import UnifiedForCausalLM
from unified.pipeline.pipeline import UnifiedPipeline
from unified.settings import refuse_other
from unified.training.card import run_card
from unified.training.config import DataConfig, TrainConfig
from unified_tokenizers import AutoImageTokenizer, ImageTokenizer, TextTokenizer, load_text_tokenizer

BASE_FILE = "made_from.json"
Parts = tuple[UnifiedForCausalLM, ImageTokenizer, TextTokenizer]


def build_parts(config: TrainConfig) -> Parts:
    """Model, image tokenizer and text tokenizer."""
    source = config.model
    if source.pipeline:
        folder = Path(source.pipeline)
        if not (folder / "model").is_dir():
            raise ValueError(f"model.pipeline: {source.pipeline!r} is not a pipeline folder.")
        image_tokenizer = AutoImageTokenizer.from_pretrained(folder / "image_tokenizer")
        text_tokenizer = load_text_tokenizer(folder / "text_tokenizer")
        model = UnifiedForCausalLM.from_pretrained(folder / "model", **source.options)
        model.name_or_path = source.pipeline  # what the adapter names as its base
        if model.config.text_tokenizer_fingerprint is None:
            model.config.text_tokenizer_fingerprint = text_tokenizer.fingerprint
    else:
        image_tokenizer = AutoImageTokenizer.from_pretrained(str(source.image_tokenizer))
        text_tokenizer = load_text_tokenizer(str(source.text_tokenizer or source.backbone), source.boi, source.eoi)
        model = _new_model(config, image_tokenizer, text_tokenizer)
    if source.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model, image_tokenizer, text_tokenizer


def adapt(
    config: TrainConfig, model: UnifiedForCausalLM, image_tokenizer: ImageTokenizer, text_tokenizer: TextTokenizer
) -> UnifiedForCausalLM | PeftModel:
    """The model with a fresh adapter if the run trains one.

    An adapter is loaded into its base: where that is no pipeline yet, ``<output_dir>/base`` keeps it as one.

    Raises:
        ValueError: if the base that is kept already was made from something else.
    """
    if config.lora is None:
        model.config.new_image_tables = False  # they are about to be trained
        return model
    if not config.model.pipeline:
        model.name_or_path = str(Path(config.output_dir) / "base")
        if PartialState().is_main_process:
            _keep_base(config, UnifiedPipeline(model, image_tokenizer, text_tokenizer))
    s = config.lora
    return attach_lora(
        model,
        s.rank,
        s.alpha,
        s.dropout,
        s.target_modules,
        s.train_image_tables,
        s.modality,
        use_rslora=s.use_rslora,
        use_dora=s.use_dora,
    )


def _keep_base(config: TrainConfig, pipeline: UnifiedPipeline) -> None:
    """Write ``<output_dir>/base`` beside and rename it, or compare with what is there."""
    source = {name: value for name, value in asdict(config.model).items() if name != "gradient_checkpointing"}
    origin = {**source, "image_tokenizer": pipeline.image_tokenizer.fingerprint, "seed": config.seed}
    folder = Path(config.output_dir) / "base"
    if folder.is_dir():
        record = folder / BASE_FILE
        refuse_other("output_dir", folder, json.loads(record.read_text()) if record.is_file() else {}, origin)
        return
    partial = folder.with_name(".partial-base")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial, card=run_card(config, "base", pipeline.image_tokenizer.fingerprint))
    (partial / BASE_FILE).write_text(json.dumps(origin, indent=2))
    partial.rename(folder)


def _new_model(
    config: TrainConfig, image_tokenizer: ImageTokenizer, text_tokenizer: TextTokenizer
) -> UnifiedForCausalLM:
    shared: dict[str, Any] = {
        "codebook_size": image_tokenizer.codebook_size,
        "boi_token_id": text_tokenizer.boi_token_id,
        "eoi_token_id": text_tokenizer.eoi_token_id,
        "image_tokenizer_fingerprint": image_tokenizer.fingerprint,
        "text_tokenizer_fingerprint": text_tokenizer.fingerprint,
        **config.model.options,
    }
    if config.model.backbone:
        shared |= {"image_init": config.model.image_init, "head_init": config.model.head_init}
        if config.model.image_init == "codebook":
            shared["codebook"] = image_tokenizer.codebook_vectors()
        return UnifiedForCausalLM.from_backbone(config.model.backbone, **shared)
    architecture = {
        **(config.model.architecture or {}),
        "vocab_size": text_tokenizer.vocab_size,
        "bos_token_id": text_tokenizer.bos_token_id,
        "eos_token_id": text_tokenizer.eos_token_id,
        "pad_token_id": text_tokenizer.pad_token_id,
    }
    return UnifiedForCausalLM(UnifiedConfig(text_config=architecture, **shared))


def open_codes(
    accelerator: Accelerator, config: TrainConfig, tokenizer: ImageTokenizer
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Training and validation rows as codes; a source of images is encoded once into ``<output_dir>/codes``."""
    data = config.data
    if data.train is None:
        raise ValueError("data.train: missing; name the images or their codes.")
    output = Path(config.output_dir)
    train_path = as_cache(accelerator, data, data.train, data.train_split, tokenizer, output / "codes")
    train = load_codes(train_path, data.train_split, tokenizer.fingerprint)
    if data.max_samples is not None:
        train = train.select(range(min(data.max_samples, len(train))))
    if config.validate_every is None:
        return train, None
    if data.validation is None and is_codes_cache(data.train):
        validation_path: str | Path = data.train
    else:
        source = data.validation or data.train
        validation_path = as_cache(
            accelerator, data, source, data.validation_split, tokenizer, output / "codes-validation", learned=False
        )
    return train, load_codes(validation_path, data.validation_split, tokenizer.fingerprint)


def as_cache(
    accelerator: Accelerator,
    data: DataConfig,
    source: str,
    split: str,
    tokenizer: ImageTokenizer,
    out: Path,
    learned: bool = True,
) -> str | Path:
    """``source`` if it is a codes cache, else ``out`` with its captioned images, encoded once by all processes.

    Random crops and mirrored images are for rows that are ``learned``.
    """
    if is_codes_cache(source):
        if learned and (data.crops is not None or data.flips or data.caption is not None):
            raise ValueError(f"data: {source!r} holds codes already; crops, flips and caption are for images.")
        return source
    size = ((data.image_size, data.image_size),)
    views = Views(size)
    if learned:
        views = Views(size, "center" if data.crops is None else "random", data.crops or 1, flips=data.flips)

    def encode() -> dict[str, SkipReport]:
        return encode_source(
            tokenizer, source, out, (split,), data.image_size, data.image_column, data.caption_column,
            streaming=data.streaming, views=views, process=PartialState(), caption=data.caption,
            storage_options=data.storage_options or None,
        )  # fmt: skip

    wanted = {
        "source": source, "image_size": data.image_size, "columns": [data.image_column, data.caption_column],
        "views": {**asdict(views), "sizes": [list(s) for s in size]}, "caption": data.caption,
    }  # fmt: skip
    return encode_once(accelerator, out, wanted, encode)


def encode_once(
    accelerator: Accelerator, out: Path, wanted: dict[str, Any], encode: Callable[[], dict[str, SkipReport]]
) -> Path:
    """Encode into ``out`` unless an earlier run did. Raises ValueError if that one's codes are not what is ``wanted``."""
    if is_codes_cache(out):
        refuse_other("data", out, json.loads((out / CACHE_FILE).read_text()), wanted)
        return out
    for split, report in encode().items():
        accelerator.print(f"{wanted['source']} ({split}): {report.summary()}")
    return out
