"""Setting a run up: model, tokenizers, data, optimizers, checkpoint, logs."""

import json
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin, set_seed
from peft import PeftModel
from torch import nn
from torch.optim import Optimizer

from unified.config import UnifiedConfig
from unified.lora.adapters import attach_lora
from unified.lora.base import base_of
from unified.lora.switching import adapter_state
from unified.model.family import check_family, check_packing
from unified.model.modeling import UnifiedForCausalLM
from unified.model.prefix import BOI, EOI, NO_TEXT
from unified.model.quantization import quantization
from unified.model.retrofit import add_vision, change_prediction
from unified.model.vision import VisionEncoder
from unified.pipeline.arguments import as_prompts, check_room, check_vision_encoder
from unified.pipeline.classes import as_classes
from unified.pipeline.folder import PIPELINE_FILE, load_vision, read_description
from unified.pipeline.pipeline import UnifiedPipeline
from unified.prediction.plan import Prediction
from unified.prediction.schedule import PatchSchedule
from unified.settings import dump_settings, refuse_other
from unified.training.average import Average
from unified.training.card import run_card
from unified.training.checkpoint import (
    check_inputs,
    check_settings,
    load_checkpoint,
    remove_stale,
    start_checkpoint,
)
from unified.training.config import TrainConfig
from unified.training.data import TrainingData, open_data
from unified.training.inputs import add_grids, check_grids, describe_inputs
from unified.training.objectives.base import Objective
from unified.training.optimizer import build_optimizers
from unified.training.sharding import check_modules, check_sharding, configure_deepspeed
from unified.training.sources import Context
from unified.training.tensor_parallel import already_cut, cut_decoder, is_tensor_parallel
from unified.training.tracking import RunLog, start_trackers
from unified_tokenizers import AutoImageTokenizer, ImageTokenizer, TextTokenizer, load_text_tokenizer

BASE_FILE = "made_from.json"
# Class-conditional models read no text, and few models read images by a vision encoder.
Parts = tuple[UnifiedForCausalLM, ImageTokenizer, TextTokenizer | None, VisionEncoder | None]


@dataclass
class Run:
    """A run that is ready to go on after ``step`` steps; ``positions`` is the cost so far."""

    config: TrainConfig
    accelerator: Accelerator
    model: nn.Module
    optimizers: list[Optimizer]
    average: Average | None
    image_tokenizer: ImageTokenizer
    text_tokenizer: TextTokenizer | None
    data: TrainingData
    schedule: PatchSchedule
    inputs: dict[str, Any]
    log: RunLog
    step: int
    positions: int
    sampling: dict[str, Any]
    objectives: list[Objective]
    vision_encoder: VisionEncoder | None = None

    @property
    def output(self) -> Path:
        """Folder of the run."""
        return Path(self.config.output_dir)

    def current(self) -> UnifiedForCausalLM | PeftModel:
        """The model, without what wraps it for training."""
        return cast(UnifiedForCausalLM | PeftModel, plain(self.accelerator, self.model))

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model holds the weights that are measured and saved: the average if there is one."""
        return nullcontext() if self.average is None else self.average.in_place()

    def pipeline(self) -> UnifiedPipeline:
        """The current model as a pipeline, in evaluation mode."""
        pipeline = UnifiedPipeline(
            base_of(self.current()), self.image_tokenizer, self.text_tokenizer, self.sampling, self.vision_encoder
        )
        pipeline.model.eval()
        return pipeline

    def update_average(self, step: int) -> None:
        """Take the weights after ``step`` into the average, which starts again with every stage: it would keep those of
        the coarse stage before.
        """
        if self.average is not None:
            if step == self.schedule.stage(step, self.config.steps).start:
                self.average.restart()
            self.average.update()


def set_up(config: TrainConfig, accelerator: Accelerator) -> Run:
    """Build everything that a run needs; whatever is wrong shows here, before the first step.

    Raises:
        ValueError: naming the setting.
    """
    # 1. Processes, and the checkpoint to resume
    output = Path(config.output_dir)
    check_sharding(accelerator, config)
    checkpoint = start_checkpoint(config.resume, output / "checkpoints")
    if checkpoint:
        check_settings(checkpoint, config, config.allow_changes)
    set_seed(config.seed)
    output.mkdir(parents=True, exist_ok=True)

    # 2. Model, tokenizers and data
    base, image_tokenizer, text_tokenizer, vision = build_parts(config)
    for part in (image_tokenizer, vision):
        if isinstance(part, nn.Module):
            part.to(accelerator.device)
    data = open_data(Context(accelerator, config, image_tokenizer, text_tokenizer, base.config, vision))
    run_card(config, "pipeline", image_tokenizer.fingerprint, base.config)  # fails here rather than after the training
    schedule = config.patch_schedule()
    check_grids(data.grids, schedule.patch_sizes, Prediction.of(base.config))
    add_grids(base.config, data.grids, fixed=config.lora is not None and config.model.pipeline is not None)
    if config.model.pipeline is None and base.config.patch_sizes is None:
        base.config.patch_sizes = []  # a model that begins here
    base.config.add_patch_sizes(schedule.patch_sizes)
    check_samples(config, base.config, text_tokenizer)
    model: nn.Module = adapt(config, base, image_tokenizer, text_tokenizer, vision)
    inputs = describe_inputs(data.rows, model, accelerator, text_tokenizer)
    if checkpoint:
        check_inputs(checkpoint, inputs, config.allow_changes)

    # 3. Optimizers, average, and what the checkpoint holds of them
    configure_deepspeed(accelerator, config)
    if is_tensor_parallel(accelerator):
        cut_decoder(base_of(cast(UnifiedForCausalLM | PeftModel, model)), accelerator)
    objectives = config.build_objectives()
    modules = {o.name: m for o in objectives if (m := o.build(model, image_tokenizer)) is not None}
    check_modules(accelerator, modules)
    optimizers = build_optimizers(model, config.optimizer, *modules.values())
    with already_cut(accelerator):
        model, *prepared = accelerator.prepare(model, *modules.values(), *optimizers)
    optimizers = prepared[len(modules) :]
    for objective in objectives:
        if objective.name in modules:
            objective.module = prepared[list(modules).index(objective.name)]
    decay = config.optimizer.ema_decay
    average = None if decay is None else Average(plain(accelerator, model), decay)
    if average is not None:
        accelerator.register_for_checkpointing(average)
    step, positions = load_checkpoint(accelerator, checkpoint) if checkpoint else (0, 0)
    if step > config.steps:
        raise ValueError(
            f"resume: {str(checkpoint)!r} comes after step {step}, the run ends with steps={config.steps}; raise it."
        )
    remove_stale(accelerator, output / "checkpoints", step)

    # 4. Logs
    if accelerator.is_main_process:
        (output / "config.yaml").write_text(dump_settings(config))
    start_trackers(accelerator, config, step)
    log = RunLog(accelerator, output, resumed_at=step)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    accelerator.print(f"{trainable / 1e6:.2f} M trainable parameters, {accelerator.num_processes} process(es)")
    accelerator.print(data.summary)
    for stage in schedule.stages(config.steps):
        accelerator.print(f"  p = {stage.patch_size}: steps {stage.start} to {stage.end}")
    return Run(config, accelerator, model, optimizers, average, image_tokenizer, text_tokenizer, data, schedule, inputs,
               log, step, positions, {**sampling_of(config), **adapter_sampling_of(objectives)}, objectives,
               vision)  # fmt: skip


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate's view of the processes. Raises ValueError if there are more or fewer than ``processes``."""
    accelerator = Accelerator(
        # As a plugin, because `accelerate launch` sets the number for DeepSpeed (to "auto"), and its environment would win.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
        mixed_precision=config.mixed_precision,
        log_with=config.track_with or None,
        project_dir=Path(config.output_dir),
    )
    if config.processes not in (None, accelerator.num_processes):
        raise ValueError(
            f"processes: {config.processes} wanted, {accelerator.num_processes} started. `accelerate launch --cpu` starts "
            "one whatever its options say; on CPUs use `torchrun --nproc_per_node N`, with ACCELERATE_USE_CPU=true set."
        )
    return accelerator


def plain(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """A prepared model without what wraps it for several processes, for precision and for the compiler."""
    return cast(nn.Module, accelerator.unwrap_model(model, keep_torch_compile=False))


def check_samples(config: TrainConfig, model_config: UnifiedConfig, text_tokenizer: TextTokenizer | None) -> None:
    """Raises ValueError if what ``sample`` names cannot be sampled, which would show after the coarse stages only."""
    if not config.sample.every or not model_config.image_grids:
        return
    if text_tokenizer is None:
        as_classes(model_config, config.sample.class_labels, "sample.class_labels")
        return
    if config.sample.class_labels:
        raise ValueError("sample.class_labels: the model has no classes; give sample.prompts.")
    height, width = model_config.image_grids[0]
    check_room(as_prompts(config.sample.prompts), text_tokenizer, model_config, (height, width), "sample.prompts")


def sampling_of(config: TrainConfig) -> dict[str, Any]:
    """The sampling defaults of what is trained: those of the pipeline that it goes on from, and the settings' own."""
    folder = config.model.pipeline
    inherited = (
        read_description(Path(folder))["sampling"] if folder and (Path(folder) / PIPELINE_FILE).is_file() else {}
    )
    return {**inherited, **config.sampling.given()}


def adapter_sampling_of(objectives: Iterable[Objective]) -> dict[str, Any]:
    """The sampling defaults that an adapter is saved with: those of what it was trained for."""
    return {name: value for objective in objectives for name, value in objective.sampling.items()}


def build_parts(config: TrainConfig) -> Parts:
    """Model, image tokenizer, text tokenizer and vision encoder."""
    source, dtype = config.model, getattr(torch, config.model.dtype)
    vision = open_vision(source.options["vision"]) if source.options.get("vision") else None
    if source.pipeline:
        folder = Path(source.pipeline)
        if not (folder / "model").is_dir():
            raise ValueError(f"model.pipeline: {source.pipeline!r} is not a pipeline folder.")
        image_tokenizer = AutoImageTokenizer.from_pretrained(folder / "image_tokenizer")
        packed = (
            {} if source.quantization is None else {"quantization_config": quantization(source.quantization, dtype)}
        )
        options = {name: value for name, value in source.options.items() if name != "vision"}
        model = UnifiedForCausalLM.from_pretrained(folder / "model", dtype=dtype, **packed, **options)
        if model.config.vision is not None and "vision" in source.options:
            raise ValueError("model.options.vision: a pipeline has its own; leave it out.")
        if model.config.vision is not None:
            vision = load_vision(folder, model.config)
            check_vision_encoder(model.config, vision)
        elif vision is not None:
            add_vision(model, vision.description)
        text_tokenizer = None if model.config.classes else load_text_tokenizer(folder / "text_tokenizer")
        current = replace(Prediction.of(model.config), frame=None)
        if config.prediction is not None and current != Prediction.from_mapping(config.prediction.build()):
            model = change_prediction(model, config.prediction.build())
        model.name_or_path = source.pipeline  # what the adapter names as its base
        if model.config.text_tokenizer_fingerprint is None and text_tokenizer is not None:
            model.config.text_tokenizer_fingerprint = text_tokenizer.fingerprint
    else:
        image_tokenizer = AutoImageTokenizer.from_pretrained(str(source.image_tokenizer))
        if source.options.get("conditioning"):
            text_tokenizer = None
        else:
            text_tokenizer = load_text_tokenizer(str(source.text_tokenizer or source.backbone), source.boi, source.eoi)
        model = _new_model(config, image_tokenizer, text_tokenizer, vision)
    if config.data.pack is not None and model.condition is None:
        check_packing(model.backbone)
    if source.attention is not None:
        try:
            model.set_attn_implementation(source.attention)
        except ImportError as error:
            raise ValueError(f"model.attention: {source.attention} cannot be used ({error}); use sdpa.") from error
    if source.gradient_checkpointing:
        model.activation_checkpointing_enable(every_n_layers=source.gradient_checkpointing_layers)
    return model, image_tokenizer, text_tokenizer, vision


def open_vision(settings: dict[str, Any]) -> VisionEncoder:
    """The vision encoder of ``model.options.vision``. Raises ValueError if it is missing, or another one than described."""
    field = "model.options.vision"
    layer, pool = (settings.get(name, default) for name, default in (("layer", -2), ("pool", 1)))
    vision = VisionEncoder(settings["encoder"], layer, pool, f"{field}.encoder")
    for name, expected in settings.items():
        actual = vision.description[name]
        if actual != expected:
            raise ValueError(f"{field}.{name}: {expected!r}, but {settings['encoder']!r} has {actual!r}; leave it out.")
    return vision


def adapt(
    config: TrainConfig,
    model: UnifiedForCausalLM,
    image_tokenizer: ImageTokenizer,
    text_tokenizer: TextTokenizer | None,
    vision: VisionEncoder | None = None,
) -> UnifiedForCausalLM | PeftModel:
    """The model with a fresh adapter if the run trains one.

    An adapter is loaded into its base: where that is no pipeline yet, ``<output_dir>/base`` keeps it as one. One that learns
    another order is loaded into ``model.pipeline``, too.

    Raises:
        ValueError: if the base that is kept already was made from something else, or an objective compares a model of another
            order with itself without the adapter.
    """
    if config.lora is None:
        model.config.new_image_tables = False  # they are about to be trained
        return model
    reads = bool(config.model.options.get("vision"))
    if reads and model.retrofitted_from is not None:
        raise ValueError(
            "model.options.vision, prediction: an adapter cannot bring both along; train one of them first, in full, or fuse it."
        )
    if not config.model.pipeline or (reads and model.config.new_image_tables):
        model.name_or_path = str(Path(config.output_dir) / "base")
        if PartialState().is_main_process:
            _keep_base(config, UnifiedPipeline(model, image_tokenizer, text_tokenizer, sampling_of(config), vision))
    for objective in config.build_objectives():
        if objective.needs_adapter and model.retrofitted_from is not None:
            raise ValueError(
                f"objectives: {objective.name} compares the model with itself without its adapter, which has not learned the order "
                f"{model.prediction.order!r}; train that first, in full or by likelihood, and fuse it."
            )
    s = config.lora
    adapted = attach_lora(
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
    adapter_state(adapted).objectives["default"] = [objective.name for objective in config.build_objectives()]
    return adapted


def _keep_base(config: TrainConfig, pipeline: UnifiedPipeline) -> None:
    """Write ``<output_dir>/base`` beside and rename it, or compare with what is there."""
    how = ("gradient_checkpointing", "gradient_checkpointing_layers", "attention")  # not what
    source = {name: value for name, value in asdict(config.model).items() if name not in how}
    origin = {**source, "image_tokenizer": pipeline.image_tokenizer.fingerprint, "seed": config.seed}
    if config.prediction is not None:
        origin["prediction"] = config.prediction.build()
    folder = Path(config.output_dir) / "base"
    if folder.is_dir():
        record = folder / BASE_FILE
        refuse_other("output_dir", folder, json.loads(record.read_text()) if record.is_file() else {}, origin)
        return
    partial = folder.with_name(".partial-base")
    shutil.rmtree(partial, ignore_errors=True)
    card = run_card(config, "base", pipeline.image_tokenizer.fingerprint, base_of(pipeline.model).config)
    pipeline.save_pretrained(partial, card=card)
    (partial / BASE_FILE).write_text(json.dumps(origin, indent=2))
    partial.rename(folder)


def _new_model(
    config: TrainConfig,
    image_tokenizer: ImageTokenizer,
    text_tokenizer: TextTokenizer | None,
    vision: VisionEncoder | None,
) -> UnifiedForCausalLM:
    shared: dict[str, Any] = {
        "codebook_size": image_tokenizer.codebook_size,
        "boi_token_id": BOI if text_tokenizer is None else text_tokenizer.boi_token_id,
        "eoi_token_id": EOI if text_tokenizer is None else text_tokenizer.eoi_token_id,
        "image_tokenizer_fingerprint": image_tokenizer.fingerprint,
        "text_tokenizer_fingerprint": None if text_tokenizer is None else text_tokenizer.fingerprint,
        "prediction": None if config.prediction is None else config.prediction.build(),
        **config.model.options,
        **({} if vision is None else {"vision": vision.description}),
    }
    image_init, head_init = config.model.image_init, config.model.head_init
    codebook = image_tokenizer.codebook_vectors() if image_init == "codebook" else None
    if config.model.backbone:
        tables: dict[str, Any] = {"image_init": image_init or "text", "head_init": head_init, "codebook": codebook}
        dtype = getattr(torch, config.model.dtype)
        return UnifiedForCausalLM.from_backbone(config.model.backbone, dtype=dtype, **tables, **shared)
    text = NO_TEXT
    if text_tokenizer is not None:
        names = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
        text = {name: getattr(text_tokenizer, name) for name in names}
    architecture = {**(config.model.architecture or {}), **text}
    model = UnifiedForCausalLM(UnifiedConfig(text_config=architecture, **shared))
    check_family(model.backbone, model.text_logits, model.config.positions)
    if image_init is not None or head_init != "normal":
        model.start_image_tables(image_init or "normal", head_init, codebook)
    return model
