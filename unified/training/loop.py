"""The training loop: next-patch stages, one optimizer step after the other."""

import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed
from peft import PeftModel
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from unified.data.batches import loader
from unified.lora.adapters import base_of, save_lora
from unified.model.modeling import UnifiedForCausalLM
from unified.model_card import run_card
from unified.pipeline.arguments import as_prompts, check_room, code_grid
from unified.pipeline.options import GenerationOptions
from unified.pipeline.pipeline import UnifiedPipeline
from unified.settings import dump_settings
from unified.training.checkpoint import (
    check_inputs,
    check_settings,
    leave_out_frozen,
    load_checkpoint,
    remove_stale,
    save_checkpoint,
    start_checkpoint,
)
from unified.training.config import TrainConfig
from unified.training.inputs import check_grids, describe_inputs, learn_grids
from unified.training.open_data import open_data
from unified.training.optimizer import build_optimizers
from unified.training.setup import adapt, build_parts
from unified.training.sharding import check_sharding, configure_deepspeed
from unified.training.step import check_skipped, kept_on_failure, train_step
from unified.training.tracking import LossMeter, RunLog, check_trackers, start_trackers
from unified_tokenizers import ImageTokenizer, TextTokenizer

Measure = Callable[[UnifiedPipeline], dict[str, float]]


def train(config: TrainConfig, measure: Measure | None = None) -> Path:
    """Run a training from scratch, a full fine-tune or a LoRA run, as configured.

    ``measure`` turns a pipeline into metrics for the log, every ``evaluation.every`` steps of the stage p = 1 and at the
    end; it is called on every process.

    Writes ``log.jsonl``, ``checkpoints/`` and ``samples/`` on the way, and at the end ``pipeline/``, or ``lora/`` if an
    adapter was trained. Returns that last folder.
    """
    output = Path(config.output_dir)
    check_trackers(config.track_with)
    accelerator = Accelerator(
        # As a plugin, because `accelerate launch` sets the number for DeepSpeed (to "auto"), and its environment would win.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
        mixed_precision=config.mixed_precision,
        log_with=config.track_with or None,
        project_dir=output,
    )
    if config.processes not in (None, accelerator.num_processes):
        raise ValueError(
            f"processes: {config.processes} wanted, {accelerator.num_processes} started. `accelerate launch --cpu` starts "
            "one whatever it is told; on CPUs use `torchrun --nproc_per_node N`, with ACCELERATE_USE_CPU=true set."
        )
    check_sharding(accelerator, config)
    checkpoint = start_checkpoint(config.resume, output / "checkpoints")
    if checkpoint:
        check_settings(checkpoint, config, config.allow_changes)
    set_seed(config.seed)
    output.mkdir(parents=True, exist_ok=True)

    base, image_tokenizer, text_tokenizer = build_parts(config)
    if isinstance(image_tokenizer, nn.Module):
        image_tokenizer.to(accelerator.device)
    model_config = base.config
    data = open_data(accelerator, config, image_tokenizer, text_tokenizer, model_config)
    run_card(config, "pipeline", image_tokenizer.fingerprint)  # fails here rather than after the training
    accumulation = config.gradient_accumulation_steps

    schedule = config.patch_schedule()
    check_grids(data.grids, schedule.patch_sizes)
    learn_grids(model_config, data.grids, fixed=config.lora is not None and config.model.pipeline is not None)
    model: UnifiedForCausalLM | PeftModel = adapt(config, base, image_tokenizer, text_tokenizer)
    if config.sample.every and model_config.image_grids:  # fails here rather than after the coarse stages
        options = GenerationOptions(guidance_scale=config.sample.guidance_scale)
        grid = code_grid(model_config, image_tokenizer.downsample, options.height, options.width)
        check_room(as_prompts(config.sample.prompts), text_tokenizer, model_config, grid, "sample.prompts")
    inputs = describe_inputs(data.rows, model, accelerator, text_tokenizer)
    if checkpoint:
        check_inputs(checkpoint, inputs, config.allow_changes)
    if config.lora is not None:
        leave_out_frozen(accelerator)
    configure_deepspeed(accelerator, config)
    model, *optimizers = accelerator.prepare(model, *build_optimizers(model, config.optimizer))
    ema = _average_of(accelerator.unwrap_model(model), config.optimizer.ema_decay)
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    step, positions = load_checkpoint(accelerator, checkpoint) if checkpoint else (0, 0)
    remove_stale(accelerator, output / "checkpoints", step)
    if accelerator.is_main_process:
        (output / "config.yaml").write_text(dump_settings(config))
    start_trackers(accelerator, config, step)
    log = RunLog(accelerator, output, resumed_at=step)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    processes = accelerator.num_processes
    accelerator.print(f"{trainable / 1e6:.2f} M trainable parameters, {data.summary}, {processes} process(es)")
    for stage in schedule.stages(config.steps):
        accelerator.print(f"  p = {stage.patch_size}: steps {stage.start} to {stage.end}")

    def current() -> UnifiedForCausalLM | PeftModel:
        return cast(UnifiedForCausalLM, ema.module) if ema is not None else accelerator.unwrap_model(model)

    def validate() -> None:
        losses.update({name: check(current(), accelerator.device) for name, check in data.checks.items()})
        log.write(step, positions=positions, **losses)

    model.train()
    losses: dict[str, float] = {}
    meter, since, images, skipped = LossMeter(accelerator), time.monotonic(), 0, 0
    bar = tqdm(total=config.steps, initial=step, unit="step", disable=not accelerator.is_local_main_process)
    stream = iter(loader(data.batches, step * accumulation, config.data.num_workers))
    while step < config.steps:
        stage, patch_size = schedule.stage(step, config.steps), schedule.patch_size(step, config.steps)
        rate = config.optimizer.learning_rate * schedule.lr_multiplier(step, config.steps)
        parts = list(islice(stream, accumulation))
        images += sum(len(part["image_grids"]) for part in parts) * processes
        with kept_on_failure(accelerator, parts, output, step, patch_size=patch_size, learning_rate=rate):
            positions += train_step(
                accelerator, model, model_config, optimizers, parts, patch_size, rate, config, meter
            )
            skipped = skipped + 1 if accelerator.optimizer_step_was_skipped else 0
            check_skipped(skipped)

        step += 1
        bar.update()
        if ema is not None:
            if step - 1 == stage.start:
                ema.n_averaged.zero_()  # the average of a coarse stage would linger: start from this stage's weights
            ema.update_parameters(accelerator.unwrap_model(model))
        if step % config.log_every == 0:
            seconds, since = time.monotonic() - since, time.monotonic()
            means = meter.means()
            log.write(
                step,
                **means,
                patch_size=patch_size,
                lr=rate,
                positions=positions,
                images_per_second=images / seconds,
            )
            bar.set_postfix(
                p=patch_size,
                img_s=f"{images / seconds:.0f}",
                **{k: f"{v:.3f}" for k, v in {**means, **losses}.items()},
            )
            images = 0
        last = step == config.steps
        if config.validate_every and (step % config.validate_every == 0 or last):
            validate()
        if config.sample.every and (step % config.sample.every == 0 or last) and stage.patch_size == 1:
            log.pictures(step, _pipeline(current(), image_tokenizer, text_tokenizer), config.sample)
            model.train()
        due = config.evaluation is not None and (step % config.evaluation.every == 0 or last) and stage.patch_size == 1
        if measure is not None and due:
            log.write(step, **measure(_pipeline(current(), image_tokenizer, text_tokenizer)))
            model.train()
        if config.checkpoint_every and (step % config.checkpoint_every == 0 or last):
            save_checkpoint(
                accelerator, output / "checkpoints", step, positions, config.keep_checkpoints, config, inputs
            )
    bar.close()
    # Gathers what is cut over processes, so all of them take part.
    state = accelerator.get_state_dict(model) if ema is None else None
    folder = _save(accelerator, current(), state, image_tokenizer, text_tokenizer, config)
    accelerator.end_training()
    return folder


def _average_of(model: nn.Module, decay: float | None) -> AveragedModel | None:
    if decay is None:
        return None
    if isinstance(model, PeftModel):
        raise ValueError("optimizer.ema_decay: not available with lora; leave it out.")
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


def _pipeline(model: UnifiedForCausalLM | PeftModel, *tokenizers: object) -> UnifiedPipeline:
    pipeline = UnifiedPipeline(base_of(model), *tokenizers)  # type: ignore[arg-type]
    pipeline.model.eval()
    return pipeline


def _save(
    accelerator: Accelerator,
    model: UnifiedForCausalLM | PeftModel,
    state_dict: dict[str, torch.Tensor] | None,
    image_tokenizer: ImageTokenizer,
    text_tokenizer: TextTokenizer,
    config: TrainConfig,
) -> Path:
    part = "lora" if isinstance(model, PeftModel) else "pipeline"
    folder = Path(config.output_dir) / part
    if accelerator.is_main_process:
        card = run_card(config, part, image_tokenizer.fingerprint)
        if isinstance(model, PeftModel):
            save_lora(model, folder, state_dict, card)
        else:
            _pipeline(model, image_tokenizer, text_tokenizer).save_pretrained(folder, state_dict, card)
        accelerator.print(f"saved {folder}")
    accelerator.wait_for_everyone()
    return folder
