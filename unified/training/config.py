"""The settings of a training run, as dataclasses filled from YAML and ``key=value`` overrides.

The rules of a class stand below its fields, in ``check``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from unified.config import UnifiedConfig, language_config
from unified.data.held_out import part_names
from unified.lora.modality_gate import check_modality
from unified.model.init import EMBED_KINDS, HEAD_KINDS
from unified.model.quantization import BITS, check_quantization
from unified.pipeline.options import GenerationOptions, check_defaults
from unified.prediction.plan import Prediction
from unified.prediction.schedule import PatchSchedule
from unified.registry import import_modules
from unified.settings import check_choice, check_range, did_you_mean, load_settings
from unified.training.objectives.base import Objective
from unified.training.objectives.table import build_objectives

KINDS = ("image", "text", "interleaved", "pairs", "chat")
ATTENTION = ("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3")
# Fields of UnifiedConfig that come from the tokenizers and the backbone, so that `model.options` cannot set them.
_DERIVED = {
    "text_config", "codebook_size", "boi_token_id", "eoi_token_id", "image_tokenizer_fingerprint",
    "text_tokenizer_fingerprint", "new_image_tables", "prediction", "patch_sizes",
}  # fmt: skip


@dataclass
class SourceConfig:
    """One of several sources that are mixed by weight."""

    path: str = MISSING  # a codes cache, or any source of `unified.data.sources.load_source`; images are encoded once
    kind: str = "image"  # image: captioned images; text: plain texts; interleaved: lists of both; pairs: of images, for dpo; chat
    weight: float = 1.0  # share of the training rows, relative to the weights of the other sources
    split: str = "train"  # split to train on
    validation_split: str | None = None  # measured every validate_every steps, as `<kind>_validation_loss`
    validation: float | None = None  # hold out this share of `split`, chosen by content, in place of a validation_split
    image_column: str = "image"  # column with the images
    caption_column: str = "caption"  # column with their captions
    caption: str | None = None  # one caption for all images, in place of the column
    class_column: str = "label"  # column with the classes, for a class-conditional model
    text_column: str = "text"  # column with the plain texts
    segments_column: str = "segments"  # column with the interleaved rows: lists of {text, image}, one of them null
    messages_column: str = "messages"  # of chat: column with the conversations, lists of {role, content}
    images_column: str = "images"  # of chat: column with the lists of their images
    chosen_column: str = "chosen"  # of pairs: column with the images that are preferred
    rejected_column: str = "rejected"  # of pairs: column with the others
    max_length: int = 512  # tokens that a text, an interleaved row or a conversation is cut to
    captioning: float | None = None  # for images; default: that of `data`
    caption_dropout: float | None = None  # for images, with captions or classes; default: that of `data`

    def check(self) -> None:
        """Raises ValueError for a field that is out of range or does not go with the kind."""
        name = f"data.sources[{self.path}]."
        check_choice(f"{name}kind", self.kind, KINDS)
        check_range(name, self, "(0, inf)", "weight")
        check_range(name, self, "[2, inf)", "max_length")
        check_range(name, self, "[0, 1]", "captioning", "caption_dropout")
        if self.validation is not None:
            part_names(self.split, self.validation)
            if self.validation_split is not None:
                raise ValueError(
                    f"{name}validation: a share, and validation_split is {self.validation_split!r}; leave one out."
                )
        for option in ("captioning", "caption_dropout"):
            if getattr(self, option) is not None and self.kind != "image":
                raise ValueError(f"{name}{option}: for images only, not for {self.kind}; leave it out.")

    @property
    def name(self) -> str:
        """What logs call it."""
        return f"{self.kind} {self.path!r}"

    def with_splits(self) -> "SourceConfig":
        """The same with the splits that a share of ``validation`` makes of ``split``."""
        if self.validation is None:
            return self
        rest, held_out = part_names(self.split, self.validation)
        return replace(self, split=rest, validation_split=held_out)


@dataclass
class DataConfig:
    """What to train on: either ``train``, or several ``sources`` that are mixed by weight."""

    train: str | None = None  # a codes cache, or captioned images, which are encoded once into `<output_dir>/codes`
    sources: list[SourceConfig] = field(default_factory=list)  # several sources in place of `train`
    validation: str | float | None = None  # other data, or a share of `train` to hold out by content, such as 0.1
    train_split: str = "train"  # split of `train` to train on
    validation_split: str = "validation"  # split that validation losses are measured on
    image_column: str = "image"  # column with the images
    caption_column: str = "caption"  # column with their captions
    caption: str | None = None  # one caption for all images of `train`, in place of the column
    class_column: str = "label"  # column with the classes, for a class-conditional model; it needs no captions
    image_size: int = 64  # side in pixels of images that the run encodes
    crops: int | None = None  # number of random crops of every image that the run encodes; default: the centre
    flips: bool = False  # also encode every image mirrored
    streaming: bool = False  # read rows as they come instead of downloading the source first
    storage_options: dict[str, Any] = field(
        default_factory=dict
    )  # of fsspec, for remote files; no secrets, they are saved
    max_samples: int | None = None  # use only the first rows of the training split
    one_view: bool = False  # an epoch has one of the crops of every image, chosen at random, in place of all
    caption_dropout: float = 0.1  # share of empty captions, or of unconditional classes, for classifier-free guidance
    code_noise: float = 0.0  # input codes are replaced at random, at a rate sampled from [0, code_noise] for each image
    train_on_captions: bool = False  # captions in front of images are in the loss too
    captioning: float = 0.0  # share of rows with the image first, whose caption alone is in the loss
    pack: int | None = None  # pack the sequences of a batch into rows of at most this many tokens
    bucket: bool = False  # batches of one code grid each, for codes of several aspect ratios; leftovers share batches
    num_workers: int | None = None  # processes that prepare batches; 0: the training itself; null: 4 on a GPU, else 0

    def check(self) -> None:
        """Raises ValueError for a field that is out of range or contradicts another."""
        if bool(self.train) == bool(self.sources):
            raise ValueError(f"data: set exactly one of train and sources, got {'both' if self.train else 'none'}.")
        check_range("data.", self, "[0, 1]", "caption_dropout", "code_noise", "captioning")
        check_range("data.", self, "[1, inf)", "image_size", "crops", "max_samples")
        check_range("data.", self, "[2, inf)", "pack")
        check_range("data.", self, "[0, inf)", "num_workers")
        if isinstance(self.validation, float):
            part_names(self.train_split, self.validation)
            if self.validation_split != DataConfig.validation_split:
                raise ValueError(
                    f"data.validation: a share, and data.validation_split is {self.validation_split!r}; leave one out."
                )
        for source in self.sources:
            source.check()
        if self.bucket and self.one_view:
            raise ValueError("data.bucket: not possible with data.one_view; leave one of them out.")
        if self.sources and self.bucket:
            raise ValueError(
                "data.bucket: batches of several sources hold several lengths anyway; use data.pack instead."
            )
        if self.sources and (self.validation or self.max_samples is not None or self.caption):
            raise ValueError("data: validation, max_samples and caption are for train; sources have their own keys.")

    def reads(self, source: SourceConfig) -> bool:
        """Whether rows of a source have images that are read and not in the loss."""
        captioning = self.captioning if source.captioning is None else source.captioning
        return source.kind == "chat" or (source.kind == "image" and captioning > 0)


@dataclass
class ModelConfig:
    """Where the model comes from: exactly one of ``pipeline``, ``backbone`` and ``architecture``."""

    pipeline: str | None = None  # continue from a pipeline folder
    backbone: str | None = None  # attach image tables to a pretrained language model
    architecture: dict[str, Any] | None = None  # a new backbone: `model_type` and fields of its transformers config
    image_tokenizer: str | None = None  # folder, published weights or Hub name; a pipeline brings its own
    text_tokenizer: str | None = None  # default: that of the backbone or the pipeline
    boi: str | None = None  # token that opens an image, for a pretrained text tokenizer
    eoi: str | None = None  # token that closes an image
    image_init: str | None = (
        None  # text (on a backbone by default), normal (else), or codebook (similar codes start alike)
    )
    head_init: str = "normal"  # likewise normal, text, zero (a loss of ln K) or tied-like (rows of the image embedding)
    options: dict[str, Any] = field(  # fields of UnifiedConfig: positions, loss weights, ...;
        default_factory=dict  # vision: {encoder: FOLDER or Hub name, layer: -2, pool: 1} reads images by its features
    )
    gradient_checkpointing: bool = False  # less memory for activations, about a third more time
    gradient_checkpointing_layers: int = 1  # with it, one layer in so many: more memory and less time again
    attention: str | None = None  # while training: flex_attention, flash_attention_2, eager, ...; default: sdpa
    dtype: str = (
        "float32"  # or bfloat16, of the frozen base of an adapter: half of its memory; the adapter is in float32
    )
    quantization: str | None = None  # 4bit or 8bit, of the frozen base of an adapter; needs bitsandbytes and a pipeline

    def check(self) -> None:
        """Raises ValueError for a field that is unknown, missing, or contradicts another."""
        given = [name for name in ("pipeline", "backbone", "architecture") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"model: set exactly one of pipeline, backbone and architecture, got {given or 'none'}.")
        if not self.pipeline and not self.image_tokenizer:
            raise ValueError("model.image_tokenizer: missing; a new model needs the folder of its tokenizer.")
        condition = self.options.get("conditioning")
        kind = condition.get("kind", "none") if isinstance(condition, dict) else condition
        if kind is None and self.architecture and not self.text_tokenizer:
            raise ValueError("model.text_tokenizer: missing; a new model needs the folder of its tokenizer.")
        if kind is not None and kind != "class":
            raise ValueError(f"model.options.conditioning: kind {kind!r} cannot be trained here; use class.")
        if self.pipeline and "conditioning" in self.options:
            raise ValueError("model.options.conditioning: a pipeline has its own; leave it out.")
        if kind is not None and (not self.architecture or self.text_tokenizer):
            raise ValueError(
                "model.options.conditioning: a class-conditional model reads no text; it needs a model.architecture and no "
                "model.text_tokenizer."
            )
        if self.boi is not None and self.boi == self.eoi:
            raise ValueError(f"model.boi, model.eoi: both are {self.boi!r}; use two different tokens.")
        for name, kinds, default in (("image_init", EMBED_KINDS, None), ("head_init", HEAD_KINDS, "normal")):
            kind = getattr(self, name)
            if kind == default:
                continue
            check_choice(f"model.{name}", kind, kinds)
            if self.pipeline:
                raise ValueError(f"model.{name}: {kind!r}, but a pipeline has its image tables; leave it out.")
        if self.attention is not None:
            check_choice("model.attention", self.attention, ATTENTION)
        check_range("model.", self, "[1, inf)", "gradient_checkpointing_layers")
        if self.gradient_checkpointing_layers > 1 and not self.gradient_checkpointing:
            raise ValueError(
                "model.gradient_checkpointing_layers: without gradient_checkpointing there is none; set that to true too."
            )
        check_choice("model.dtype", self.dtype, ("float32", "bfloat16"))
        if self.architecture and self.dtype != "float32":
            raise ValueError(
                f"model.dtype: {self.dtype!r} is for a frozen base, and a new model is trained; leave it out."
            )
        if self.quantization is not None:
            check_choice("model.quantization", self.quantization, tuple(BITS))
            if not self.pipeline:
                raise ValueError(
                    "model.quantization: for the pipeline of an adapter; save the model as one, name it there."
                )
            check_quantization("model.quantization")
        self._check_options()
        if self.architecture:
            self._check_architecture(self.architecture)

    def _check_options(self) -> None:
        known = [name for name in UnifiedConfig.__annotations__ if name not in _DERIVED]
        for name in self.options:
            if name not in known:
                raise ValueError(f"model.options: {name!r} is unknown or not free{did_you_mean(name, known)}")
        try:
            UnifiedConfig(**self.options)
        except ValueError as error:
            raise ValueError(f"model.options: {' '.join(str(error).split())}") from error

    @staticmethod
    def _check_architecture(architecture: dict[str, Any]) -> None:
        config = language_config(architecture, "model.architecture")
        known = vars(type(config)())
        for name in architecture:  # the class keeps what it does not know, and translates older names
            if name in vars(config) and name not in known:
                raise ValueError(
                    f"model.architecture: {type(config).__name__} has no field {name!r}{did_you_mean(name, list(known))}"
                )


@dataclass
class LoraSettings:
    """Train an adapter instead of the model; see ``unified.lora.adapters.attach_lora``."""

    rank: int = 16  # rank of the update
    alpha: int | None = None  # the update is scaled by alpha / rank; default: the rank
    dropout: float = 0.0  # on the input of the adapter
    target_modules: list[str] | None = None  # names of linear layers; null: those of attention and MLP
    train_image_tables: bool | None = (
        None  # copies of the image tables in the adapter; null: if the base's are untrained
    )
    modality: str = "all"  # text or image: act on positions of that modality only
    use_rslora: bool = False  # scale by alpha / sqrt(rank), arXiv 2312.03732
    use_dora: bool = False  # magnitude and direction apart, arXiv 2402.09353

    def check(self) -> None:
        """Raises ValueError for a field that is out of range or contradicts another."""
        check_range("lora.", self, "[1, inf)", "rank", "alpha")
        check_range("lora.", self, "[0, 1)", "dropout")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("lora.target_modules: empty; name the linear layers that get an update.")
        check_modality(self.modality, self.use_dora)


@dataclass
class ScheduleConfig:
    """Stages of next-patch prediction: the fields of ``PatchSchedule``, or ``levels`` for the paper's stages."""

    levels: int | None = None  # 2: patch sizes 2 and 1; 3: 4, 2 and 1; ...
    ratio: float = 0.5  # with levels: every boundary lies at this share of the next one
    patch_sizes: list[int] = field(default_factory=lambda: [2, 1])  # strictly decreasing to 1
    shares: list[float] = field(default_factory=lambda: [0.5, 0.5])  # share of the steps for each patch size
    restart: bool = True  # restart the learning rate in every stage, or run one schedule over all of them
    warmup: float = 0.05  # share of a schedule spent on linear warm-up
    decay: float = 0.2  # share of a schedule spent on linear decay
    final: float = 0.1  # share of the learning rate that is left at the end of the decay
    mixed: float = 0.0  # share of every stage's steps that use the coarser patch sizes again

    def build(self) -> PatchSchedule:
        """The schedule. Raises ValueError for a field that is out of range or contradicts another."""
        try:
            if self.levels is not None:
                options = {name: getattr(self, name) for name in ("restart", "warmup", "decay", "final", "mixed")}
                return PatchSchedule.from_levels(self.levels, self.ratio, **options)
            return PatchSchedule(
                tuple(self.patch_sizes),
                tuple(self.shares),
                self.restart,
                self.warmup,
                self.decay,
                self.final,
                self.mixed,
            )
        except ValueError as error:
            raise ValueError(f"schedule.{error}") from error


@dataclass
class PredictionConfig:
    """How images are predicted: the order of their codes, and how codes enter. With ``model.pipeline``, the new way of it."""

    order: str = "raster"  # or rows, rows_at_once, diagonals, regions, cells, spread, locality, random
    size: int = 0  # cells a side, regions a side or passes, for orders that take a number; 0 for the order's default
    merge: str = "one"  # or channel: windows of codes share a position, also in sampling (Token-Shuffle)
    window: int | None = None  # side of the windows of channel; default 2
    chained: bool = False  # whether each code of a window is predicted from those before it there too

    def build(self) -> dict[str, Any]:
        """The value of ``UnifiedConfig.prediction``. Raises ValueError for a field that is unknown or out of range."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        Prediction.from_mapping(given)
        return given


@dataclass
class SamplingConfig:
    """Sampling defaults that the trained pipeline is saved with; null: those of ``model.pipeline``, or the usual ones."""

    guidance_scale: float | None = None  # 1 switches guidance off
    temperature: float | None = None  # below 1 sharpens
    top_k: int | None = None  # keep the k most likely codes; 0 keeps all
    top_p: float | None = None  # keep the most likely codes up to this probability
    guidance_schedule: str | None = None  # constant, linear or cosine
    decoding: str | None = None  # plain, jacobi, sjd, gsd
    group_temperature: float | None = None  # below 1 where a pass samples several cells

    def given(self) -> dict[str, Any]:
        """Those that are set. Raises ValueError for one that is out of its range."""
        return check_defaults(vars(self))


@dataclass
class OptimizerConfig:
    """Optimizer, clipping and average of the weights."""

    name: str = "adamw"  # or muon, for the matrices of the decoder's layers: fewer steps, each slightly slower
    learning_rate: float = 3e-4  # peak of the schedule
    weight_decay: float = 0.05  # of matrices; vectors have none
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # decay rates of AdamW's two moments
    gradient_clip: float = 1.0  # norm that gradients are scaled down to; .inf for none
    gradient_limit: float | None = None  # stop if the norm before clipping exceeds this; NaN and infinity always stop
    ema_decay: float | None = None  # average of the weights; starts again at every change of patch size

    def check(self) -> None:
        """Raises ValueError for a field that is out of range."""
        check_choice("optimizer.name", self.name, ("adamw", "muon"))
        check_range("optimizer.", self, "(0, inf)", "learning_rate", "gradient_limit")
        check_range("optimizer.", self, "(0, inf]", "gradient_clip")
        check_range("optimizer.", self, "[0, inf)", "weight_decay")
        check_range("optimizer.", self, "[0, 1)", "betas")
        if len(self.betas) != 2:
            raise ValueError(f"optimizer.betas: {self.betas} must be two numbers, such as [0.9, 0.95].")
        check_range("optimizer.", self, "(0, 1)", "ema_decay")


@dataclass
class SampleConfig:
    """Images sampled while training, from stage p = 1 on."""

    every: int | None = None  # steps between two sheets of samples
    prompts: list[str] = field(default_factory=list)  # one image each
    class_labels: list[Any] = field(default_factory=list)  # in place of prompts, for a class-conditional model
    guidance_scale: float | None = None  # 1 switches guidance off; null: as `sampling`
    seed: int = 0  # image i uses seed + i

    def check(self) -> None:
        """Raises ValueError for a field that is missing or out of range."""
        check_range("sample.", self, "[1, inf)", "every")
        check_range("sample.", self, "[0, inf)", "seed")
        GenerationOptions(guidance_scale=self.guidance_scale)
        if self.every and not self.prompts and not self.class_labels:
            raise ValueError("sample.prompts: empty; name what to generate, or leave out sample.every.")
        if self.prompts and self.class_labels:
            raise ValueError("sample.class_labels: a model reads prompts or classes; leave one of them out.")


@dataclass
class EvaluationConfig:
    """Metrics of generated images while training, from stage p = 1 on; needs the `eval` extra."""

    every: int = MISSING  # steps between two measurements
    data: str = MISSING  # captioned images to compare with
    split: str = "train"  # split of `data`
    clip: str = MISSING  # CLIP folder, or its name on the Hub
    extractor: str = "efficientnet-lite0"  # network whose features are compared
    metrics: list[str] = field(default_factory=lambda: ["fd", "kd", "clip"])  # as in eval/evaluate.py
    num_images: int = 64  # images to generate
    guidance_scale: float | None = None  # 1 switches guidance off; null: as `sampling`
    temperature: float | None = None  # below 1 sharpens; null: as `sampling`
    seed: int = 0  # of the choice of captions and of the images

    def check(self) -> None:
        """Raises ValueError for a field that is out of range."""
        check_range("evaluation.", self, "[1, inf)", "every", "num_images")
        check_range("evaluation.", self, "[0, inf)", "seed")
        GenerationOptions(guidance_scale=self.guidance_scale, temperature=self.temperature)


@dataclass
class TrainConfig:
    """A whole training run."""

    output_dir: str = MISSING  # folder for logs, checkpoints and the trained model
    steps: int = MISSING  # optimizer steps over all stages
    batch_size: int = 32  # rows per process and micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    processes: int | None = None  # refuse to run in another number of processes
    mixed_precision: str | None = None  # "no", bf16, fp16; default: that of accelerate launch
    seed: int = 0  # of the initial weights, the order of the data and dropout
    log_every: int = 10  # steps between two records of the training losses
    peak_flops: float | None = None  # FLOP/s of one device at its best, which `mfu` in the log is a share of
    validate_every: int | None = None  # steps between two measurements of the validation losses
    checkpoint_every: int | None = None  # steps between two checkpoints; a multiple of log_every
    keep_checkpoints: int = 2  # older ones are removed
    asynchronous_checkpoints: bool = False  # written beside the training, from a copy in CPU memory
    resume: str | None = None  # a checkpoint folder, or `latest`
    allow_changes: bool = False  # resume although the settings are not those of the checkpoint
    track_with: list[str] = field(
        default_factory=lambda: ["tensorboard"]
    )  # also wandb, trackio, mlflow, ...; [] for none
    project: str = "unified"  # name under which trackers file the run
    imports: list[str] = field(default_factory=list)  # modules, or files .py, that register extensions; they are run
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraSettings | None = None
    prediction: PredictionConfig | None = None  # default: raster order, or that of model.pipeline
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    objectives: list[dict[str, Any]] = field(
        default_factory=lambda: [{"name": "likelihood", "weight": 1.0}]
    )  # losses that are summed, each a name, a weight and its settings (see unified/training/objectives)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluation: EvaluationConfig | None = None

    def check(self) -> None:
        """Raises ValueError for a field, here or in a part, that is out of range or contradicts another."""
        if not self.output_dir.strip():
            raise ValueError("output_dir: empty; name the folder to write.")
        check_range("", self, "[1, inf)", "steps", "batch_size", "gradient_accumulation_steps", "processes")
        check_range("", self, "[1, inf)", "log_every", "validate_every", "checkpoint_every", "keep_checkpoints")
        check_range("", self, "(0, inf)", "peak_flops")
        check_range("", self, "[0, 4294967295]", "seed")  # what numpy takes
        if self.mixed_precision not in (None, "no", "bf16", "fp16"):
            raise ValueError(
                f"mixed_precision: {self.mixed_precision!r} is unknown; use bf16, fp16 or 'no' (in quotes: a bare no is false)."
            )
        for part in (self.model, self.data, self.lora, self.optimizer, self.sample, self.evaluation):
            if part is not None:
                part.check()
        if self.prediction is not None:
            self.prediction.build()
        for objective in self.build_objectives():
            if objective.needs_adapter and self.lora is None:
                raise ValueError(
                    f"objectives: {objective.name} compares the model with itself without its adapter; set lora, such as "
                    "lora.rank=16."
                )
            objective.check(self)
        if self.sampling.given() and self.lora is not None and self.model.pipeline:
            raise ValueError(
                "sampling: an adapter is sampled as its pipeline is; leave it out, or set pipe.sampling there."
            )
        if self.model.options.get("vision") and not any(self.data.reads(source) for source in self.all_sources()):
            raise ValueError(
                "model.options.vision: no row of the data has an image that is read; set data.captioning, or name a source of kind "
                "chat, or leave it out."
            )
        for name in ("dtype", "quantization"):
            if getattr(self.model, name) not in (None, "float32") and self.lora is None:
                raise ValueError(
                    f"model.{name}: {getattr(self.model, name)!r} is for the frozen base of an adapter; set lora, or leave it "
                    "out (mixed_precision=bf16 computes in bfloat16)."
                )
        if self.model.attention not in (None, "sdpa", "eager") and (self.sample.every or self.evaluation):
            raise ValueError(
                f"model.attention: images are not sampled with {self.model.attention!r}; use sdpa, or leave out sample.every and "
                "evaluation."
            )
        self.patch_schedule().stages(self.steps)
        if self.checkpoint_every and self.checkpoint_every % self.log_every:
            # A logged loss is a mean over log_every steps; a resumed run starts its mean at the checkpoint.
            raise ValueError(
                f"checkpoint_every: {self.checkpoint_every} is not a multiple of log_every {self.log_every}."
            )
        if (
            self.data.sources
            and self.validate_every
            and not any(s.validation_split or s.validation for s in self.data.sources)
        ):
            raise ValueError("validate_every: none of data.sources has a validation_split or a validation; name one.")

    def all_sources(self) -> list[SourceConfig]:
        """What the run trains on; ``data.train`` and the keys beside it are the only source.

        A share to hold out is named by the splits of its source (see :mod:`unified.data.held_out`).
        """
        data = self.data
        share = data.validation if isinstance(data.validation, float) else None
        only = SourceConfig(
            path=str(data.train), split=data.train_split, validation_split=None if share else data.validation_split,
            validation=share, image_column=data.image_column, caption_column=data.caption_column, caption=data.caption,
            class_column=data.class_column,
        )  # fmt: skip
        return [source.with_splits() for source in data.sources or [only]]

    def build_objectives(self) -> list[Objective]:
        """The objectives of the run. Raises ValueError for a name or a key that is unknown, or a value that does not fit."""
        return build_objectives(self.objectives)

    def patch_schedule(self) -> PatchSchedule:
        """The schedule of patch sizes. Raises ValueError for fields that contradict each other."""
        return self.schedule.build()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a run's YAML file and ``key=value`` overrides.

    Raises:
        ValueError: as :func:`unified.settings.load_settings`, or for fields that are out of range or contradict each other.
    """
    config = load_settings(TrainConfig, path, overrides)
    import_modules(config.imports, "imports")
    config.check()
    return config
