"""The settings of a training run, as dataclasses filled from YAML and ``key=value`` overrides.

The rules of a class stand below its fields, in ``check``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from unified.pipeline.options import GenerationOptions, check_defaults
from unified.prediction.schedule import PatchSchedule
from unified.registry import import_modules
from unified.settings import check_choice, check_range, load_settings
from unified.training.data_config import DataConfig, SourceConfig
from unified.training.model_config import LoraSettings, ModelConfig, PredictionConfig
from unified.training.objectives.base import Objective
from unified.training.objectives.table import build_objectives


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
