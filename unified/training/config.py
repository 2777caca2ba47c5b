"""Everything that a training run can be told, as dataclasses filled from YAML and ``key=value`` overrides."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from unified.model.init import EMBED_KINDS, HEAD_KINDS
from unified.prediction.schedule import PatchSchedule
from unified.settings import load_settings

KINDS = ("image", "text", "interleaved")


@dataclass
class SourceConfig:
    """One of several sources that are mixed by weight."""

    path: str = MISSING  # a codes cache, or any source of `unified.data.sources.load_source`; images are encoded once
    kind: str = "image"  # image: captioned images; text: plain texts; interleaved: lists of texts and images
    weight: float = 1.0  # its share of the rows that are learned, relative to the weights of the other sources
    split: str = "train"
    validation_split: str | None = None  # measured every validate_every steps, as `<kind>_validation_loss`
    image_column: str = "image"
    caption_column: str = "caption"
    caption: str | None = None  # one caption for all images, in place of the column
    text_column: str = "text"
    segments_column: str = "segments"  # every row a list of {text, image}, one of them null
    max_length: int = 512  # tokens that a text or an interleaved row is cut to
    captioning: float | None = None  # for images; default: that of `data`
    caption_dropout: float | None = None  # for images; default: that of `data`


@dataclass
class DataConfig:
    """What to train on.

    ``train`` is a codes cache, or any captioned source, which is then encoded once into ``<output_dir>/codes``. In its
    place ``sources`` lists several sources (fields of ``SourceConfig``) that are mixed by weight.
    """

    train: str | None = None
    sources: list[SourceConfig] = field(default_factory=list)
    validation: str | None = None  # default: the validation split of `train`
    train_split: str = "train"
    validation_split: str = "validation"
    image_column: str = "image"
    caption_column: str = "caption"
    caption: str | None = None  # one caption for all images of `train`, in place of the column
    image_size: int = 64
    crops: int | None = None  # so many random crops of every image that the run encodes, instead of the centre
    flips: bool = False  # also encode every image mirrored
    streaming: bool = False
    storage_options: dict[str, Any] = field(default_factory=dict)  # of fsspec, for files elsewhere; keep secrets out
    max_samples: int | None = None  # use only the first rows of the training split
    caption_dropout: float = 0.1  # share of empty captions, for classifier-free guidance
    code_noise: float = 0.0  # input codes are replaced at random, at a rate sampled from [0, code_noise] for each image
    train_on_captions: bool = False  # also learn the captions as text
    captioning: float = 0.0  # share of rows laid out image first, whose caption is learned and not the image
    pack: int | None = None  # put the sequences of a batch together into rows of at most so many tokens
    bucket: bool = False  # batches of one code grid each, for codes of several aspect ratios; leftovers share batches
    num_workers: int = 0


@dataclass
class ModelConfig:
    """Where the model comes from: exactly one of ``pipeline``, ``backbone`` and ``architecture``."""

    pipeline: str | None = None  # continue from a pipeline folder
    backbone: str | None = None  # attach image tables to a pretrained language model
    architecture: dict[str, Any] | None = None  # a backbone from scratch: fields of its transformers config
    image_tokenizer: str | None = None
    text_tokenizer: str | None = None
    boi: str | None = None  # tokens that frame an image, for a pretrained text tokenizer
    eoi: str | None = None
    image_init: str = "text"  # image tables on a backbone: like its text, normal, or codebook (similar codes alike)
    head_init: str = "normal"  # likewise normal, text, zero (a loss of ln K) or tied-like (rows of the image embedding)
    options: dict[str, Any] = field(default_factory=dict)  # fields of UnifiedConfig: positions, loss weights, ...
    gradient_checkpointing: bool = False


@dataclass
class LoraSettings:
    """Train an adapter instead of the model; see ``unified.lora.adapters.attach_lora``."""

    rank: int = 16
    alpha: int | None = None
    dropout: float = 0.0
    target_modules: list[str] | None = None  # names of linear layers; null: those of attention and MLP
    train_image_tables: bool | None = (
        None  # copies of the image tables in the adapter; null: if the base's are untrained
    )
    modality: str = "all"  # text or image: act on positions of that modality only
    use_rslora: bool = False
    use_dora: bool = False


@dataclass
class ScheduleConfig:
    """Fields of ``PatchSchedule``; ``levels`` and ``ratio`` give the paper's stages instead of explicit ones."""

    levels: int | None = None  # 2: patch sizes 2 and 1; 3: 4, 2 and 1; ...
    ratio: float = 0.5  # with levels: every boundary lies at this share of the next one
    patch_sizes: list[int] = field(default_factory=lambda: [2, 1])
    shares: list[float] = field(default_factory=lambda: [0.5, 0.5])
    restart: bool = True
    warmup: float = 0.05
    decay: float = 0.2
    final: float = 0.1
    mixed: float = 0.0


@dataclass
class OptimizerConfig:
    """Optimizer and clipping."""

    name: str = "adamw"  # or muon, for the matrices of the decoder's layers: fewer steps, each a little dearer
    learning_rate: float = 3e-4
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    gradient_clip: float = 1.0  # norm that gradients are scaled down to; .inf for none
    gradient_limit: float | None = None  # stop if the norm before clipping exceeds this; NaN and infinity always stop
    ema_decay: float | None = None  # average of the weights; starts again at every change of patch size


@dataclass
class SampleConfig:
    """Pictures sampled while training, from stage p = 1 on."""

    every: int | None = None
    prompts: list[str] = field(default_factory=list)
    guidance_scale: float = 3.0
    seed: int = 0


@dataclass
class EvaluationConfig:
    """Metrics of generated images while training, from stage p = 1 on; needs the `eval` extra."""

    every: int = MISSING
    data: str = MISSING  # captioned images to compare with
    split: str = "train"
    clip: str = MISSING  # CLIP folder, or its name on the Hub
    extractor: str = "efficientnet-lite0"
    metrics: list[str] = field(default_factory=lambda: ["fd", "kd", "clip"])
    num_images: int = 64
    guidance_scale: float = 3.0
    temperature: float = 1.0
    seed: int = 0


@dataclass
class TrainConfig:
    """A whole training run."""

    output_dir: str = MISSING
    steps: int = MISSING
    batch_size: int = 32  # per process
    gradient_accumulation_steps: int = 1
    processes: int | None = None  # refuse to run in another number of processes than this
    mixed_precision: str | None = None  # no, bf16, fp16; default: what accelerate launch says
    seed: int = 0
    log_every: int = 10
    validate_every: int | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    resume: str | None = None  # a checkpoint folder, or `latest`
    allow_changes: bool = False  # resume although the settings are not those of the checkpoint
    track_with: list[str] = field(
        default_factory=lambda: ["tensorboard"]
    )  # also wandb, trackio, mlflow, ...; [] for none
    project: str = "unified"  # name under which trackers file the run
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraSettings | None = None
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluation: EvaluationConfig | None = None

    def patch_schedule(self) -> PatchSchedule:
        """The schedule object; raises ValueError on inconsistent fields."""
        s = self.schedule
        if s.levels is not None:
            options = {name: getattr(s, name) for name in ("restart", "warmup", "decay", "final", "mixed")}
            return PatchSchedule.from_levels(s.levels, s.ratio, **options)
        return PatchSchedule(tuple(s.patch_sizes), tuple(s.shares), s.restart, s.warmup, s.decay, s.final, s.mixed)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a run's YAML file and ``key=value`` overrides.

    Raises:
        ValueError: as :func:`unified.settings.load_settings`, or for fields that contradict each other.
    """
    config = load_settings(TrainConfig, path, overrides)
    _check(config)
    return config


def _check(config: TrainConfig) -> None:
    sources = [name for name in ("pipeline", "backbone", "architecture") if getattr(config.model, name)]
    if len(sources) != 1:
        raise ValueError(f"model: set exactly one of pipeline, backbone and architecture, got {sources or 'none'}.")
    if not config.model.pipeline:
        for name in ("image_tokenizer", "text_tokenizer"):
            if not getattr(config.model, name) and not (name == "text_tokenizer" and config.model.backbone):
                raise ValueError(f"model.{name}: missing; a new model needs the folder of its tokenizer.")
    for name, kinds in (("image_init", EMBED_KINDS), ("head_init", HEAD_KINDS)):
        kind, default = getattr(config.model, name), getattr(ModelConfig, name)
        if kind not in kinds:
            raise ValueError(f"model.{name}: {kind!r} is unknown; use one of {kinds}.")
        if kind != default and not config.model.backbone:
            raise ValueError(f"model.{name}: {kind!r} is for image tables on a model.backbone; leave it out.")
    _check_data(config.data, config.validate_every)
    if config.optimizer.name not in ("adamw", "muon"):
        raise ValueError(f"optimizer.name: {config.optimizer.name!r} is unknown; use adamw or muon.")
    if config.sample.every and not config.sample.prompts:
        raise ValueError("sample.prompts: empty; name what to generate, or leave out sample.every.")
    if not config.optimizer.gradient_clip > 0:
        raise ValueError(
            f"optimizer.gradient_clip: {config.optimizer.gradient_clip} must be above 0; .inf switches clipping off."
        )
    for name in ("steps", "batch_size", "gradient_accumulation_steps", "log_every", "keep_checkpoints"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: {getattr(config, name)} must be at least 1.")
    if config.checkpoint_every and config.checkpoint_every % config.log_every:
        # A logged loss is a mean over log_every steps; a resumed run starts its mean at the checkpoint.
        raise ValueError(
            f"checkpoint_every: {config.checkpoint_every} is not a multiple of log_every {config.log_every}."
        )
    config.patch_schedule().stages(config.steps)


def _check_data(data: DataConfig, validate_every: int | None) -> None:
    if bool(data.train) == bool(data.sources):
        raise ValueError(f"data: set exactly one of train and sources, got {'both' if data.train else 'none'}.")
    for name in ("caption_dropout", "code_noise", "captioning"):
        if not 0 <= getattr(data, name) <= 1:
            raise ValueError(f"data.{name}: {getattr(data, name)} must lie in [0, 1].")
    if data.crops is not None and data.crops < 1:
        raise ValueError(f"data.crops: {data.crops} must be at least 1; leave it out for the centre.")
    if data.pack is not None and data.pack < 2:
        raise ValueError(f"data.pack: {data.pack} must be at least 2 tokens.")
    for source in data.sources:
        if source.kind not in KINDS:
            raise ValueError(f"data.sources: kind {source.kind!r} of {source.path!r} is unknown; use one of {KINDS}.")
        if not source.weight > 0:
            raise ValueError(
                f"data.sources: weight {source.weight} of {source.path!r} must be above 0; leave out what is not to be learned."
            )
        if source.max_length < 2:
            raise ValueError(f"data.sources: max_length {source.max_length} of {source.path!r} must be at least 2.")
        for name in ("caption_dropout", "captioning"):
            value = getattr(source, name)
            if value is not None and (source.kind != "image" or not 0 <= value <= 1):
                raise ValueError(
                    f"data.sources: {name} {value} of {source.path!r} is for images, and must lie in [0, 1]."
                )
    if data.sources and data.bucket:
        raise ValueError("data.bucket: batches of several sources hold several lengths anyway; use data.pack instead.")
    if data.sources and (data.validation or data.max_samples is not None or data.caption):
        raise ValueError("data: validation, max_samples and caption belong to train; sources have keys of their own.")
    if data.sources and validate_every and not any(source.validation_split for source in data.sources):
        raise ValueError("validate_every: none of data.sources has a validation_split; name one.")
