"""The training loop: next-patch stages, one optimizer step after the other."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

from peft import PeftModel
from tqdm import tqdm

from unified.data.batches import loader
from unified.locks import locked
from unified.lora.base import base_of
from unified.lora.saving import save_lora
from unified.pipeline.pipeline import UnifiedPipeline
from unified.prediction.arrange import Batch
from unified.training.background import Background
from unified.training.card import run_card
from unified.training.checkpoint import save_checkpoint
from unified.training.config import TrainConfig
from unified.training.interrupt import catch_signals
from unified.training.setup import Run, adapter_sampling_of, make_accelerator, set_up
from unified.training.step import check_skipped, kept_on_failure, train_step
from unified.training.tensor_parallel import data_rank, whole
from unified.training.throughput import batch_flops, peak_flops
from unified.training.tracking import LossMeter, check_trackers

Measure = Callable[[UnifiedPipeline], dict[str, float]]


def train(config: TrainConfig, measure: Measure | None = None) -> Path:
    """Run a training from scratch, a full fine-tune or a LoRA run, as configured.

    ``measure`` turns a pipeline into metrics for the log, every ``evaluation.every`` steps of the stage p = 1 and at the
    end; it is called on every process.

    Writes ``log.jsonl``, ``checkpoints/`` and ``samples/`` on the way, and at the end ``pipeline/``, or ``lora/`` if an
    adapter was trained. Returns that last folder. SIGTERM and Ctrl-C end it after a step, with a checkpoint.

    Raises:
        ValueError: naming the setting that is wrong, before the first step.
        FloatingPointError: if a loss or a gradient is not finite; the batches are kept.
        OSError: if a checkpoint cannot be written; the next step, or the end, of a run that writes them beside the training.
        SystemExit: after a signal.
    """
    check_trackers(config.track_with)
    accelerator = make_accelerator(config)
    with locked(config.output_dir) if accelerator.is_main_process else nullcontext():
        run = set_up(config, accelerator)
        beside = Background(accelerator) if config.asynchronous_checkpoints else nullcontext()
        with catch_signals(accelerator) as stopped, beside as background:
            train_steps(run, measure, stopped, background)
        return save(run)


def train_steps(
    run: Run, measure: Measure | None, stopped: Callable[[], bool], background: Background | None = None
) -> None:
    """Go on to the last step, or until ``stopped``: then a checkpoint is saved, and the program ends.

    Args:
        run: from :func:`unified.training.setup.set_up`.
        measure: as for :func:`train`.
        stopped: asked after every step.
        background: writes checkpoints; None writes each before the next step.
    """
    config, accelerator, accumulation, skipped = run.config, run.accelerator, run.config.gradient_accumulation_steps, 0
    meter, losses = Meter(run), dict[str, float]()
    on_gpu, workers = accelerator.device.type == "cuda", config.data.num_workers
    workers = (4 if on_gpu else 0) if workers is None else workers
    stream = iter(loader(run.data.batches, run.step * accumulation, workers, pin_memory=on_gpu))
    run.model.train()
    for step in range(run.step, config.steps):
        patch_size = run.schedule.patch_size(step, config.steps)
        rate = config.optimizer.learning_rate * run.schedule.lr_multiplier(step, config.steps)
        batches = list(islice(stream, accumulation))
        with kept_on_failure(accelerator, batches, run.output, step, patch_size=patch_size, learning_rate=rate):
            run.positions += train_step(
                accelerator,
                run.model,
                run.optimizers,
                batches,
                rate,
                config,
                meter.losses,
                run.objectives,
                step * accumulation,
            )
            skipped = skipped + 1 if accelerator.optimizer_step_was_skipped else 0
            check_skipped(skipped)
        run.update_average(step)
        run.step = step + 1
        meter.count(batches, patch_size=patch_size, learning_rate=rate)
        if run.step % config.log_every == 0:
            meter.write(losses)
        if _due(run, config.validate_every):
            with run.averaged():
                losses = {name: check(run.current(), accelerator.device) for name, check in run.data.checks.items()}
            run.log.write(run.step, positions=run.positions, **losses)
        fine = run.schedule.stage(step, config.steps).patch_size == 1
        if fine and _due(run, config.sample.every):
            with run.averaged():
                run.log.samples(run.step, run.pipeline(), config.sample)
            run.model.train()
        if fine and measure is not None and config.evaluation is not None and _due(run, config.evaluation.every):
            with run.averaged():
                run.log.write(run.step, **measure(run.pipeline()))
            run.model.train()
        if background is not None:
            background.check()
        interrupted = stopped() and run.step < config.steps
        if interrupted or _due(run, config.checkpoint_every):
            folder, keep = run.output / "checkpoints", config.keep_checkpoints
            save_checkpoint(accelerator, folder, run.step, run.positions, keep, config, run.inputs, background)
        if interrupted and background is not None:
            background.wait()
        if interrupted:
            accelerator.print(f"stopped after step {run.step} with a checkpoint; resume=latest goes on from there")
            raise SystemExit(130)
    meter.close()


def _due(run: Run, every: int | None) -> bool:
    """Whether something is due at this step: every so many steps, and at the end."""
    return every is not None and (run.step % every == 0 or run.step == run.config.steps)


class Meter:
    """What is logged every ``log_every`` steps: mean losses, learning rate and speed; also shown in the progress bar.

    Speed is that of all processes: images, and tokens (positions of the backbone) per second; ``mfu`` is that of the main one.
    """

    def __init__(self, run: Run):
        self.run, self.losses, self.since = run, LossMeter(run.accelerator), time.monotonic()
        self.processes = data_rank(run.accelerator)[1]
        self.images, self.flops, self.positions = 0, 0.0, run.positions
        self.peak = peak_flops(run.accelerator, run.config.peak_flops)
        if self.peak is None:
            run.accelerator.print("no MFU is logged: the peak of this device is not known; peak_flops=... sets it")
        hidden = not run.accelerator.is_local_main_process
        self.bar = tqdm(total=run.config.steps, initial=run.step, unit="step", disable=hidden)
        self.now: dict[str, float] = {}

    def count(self, batches: Sequence[Batch], patch_size: int, learning_rate: float) -> None:
        """A step is done, with these batches on this process."""
        self.images += sum(batch.counts.images for batch in batches) * self.processes
        model = self.run.current()
        for batch in batches if self.peak is not None else ():
            for each in (batch, *batch.further.values()):
                flops = batch_flops(base_of(model).config, each, frozen=isinstance(model, PeftModel))
                self.flops += flops * self.processes / self.run.accelerator.num_processes
        self.now = {"patch_size": patch_size, "lr": learning_rate}
        self.bar.update()

    def write(self, validation: dict[str, float]) -> None:
        """Write the means since the last time to the log; ``validation`` is shown beside them."""
        seconds, means = time.monotonic() - self.since, self.losses.means()
        positions = self.run.positions - self.positions
        speed = {"images_per_second": self.images / seconds, "tokens_per_second": positions / seconds}
        shown = {"img_s": f"{self.images / seconds:.0f}", "tok_s": f"{positions / seconds:.0f}"}
        if self.peak is not None:  # each process has counted its own batches
            speed["mfu"] = self.flops / seconds / self.peak
            shown["mfu"] = f"{speed['mfu']:.1%}"
        self.run.log.write(self.run.step, **means, **self.now, positions=self.run.positions, **speed)
        shown |= {name: f"{value:.3f}" for name, value in {**means, **validation}.items()}
        self.bar.set_postfix(p=self.now["patch_size"], **shown)
        self.images, self.flops, self.positions, self.since = 0, 0.0, self.run.positions, time.monotonic()

    def close(self) -> None:
        """Finish the progress bar."""
        self.bar.close()


def save(run: Run) -> Path:
    """Write the trained pipeline or adapter with its card; returns its folder."""
    accelerator, model, fingerprint = run.accelerator, run.current(), run.image_tokenizer.fingerprint
    part = "lora" if isinstance(model, PeftModel) else "pipeline"
    folder = run.output / part
    with run.averaged():
        # Gathers what is cut over processes, so all of them take part. The compiler adds to the names.
        gathered = accelerator.get_state_dict(run.model)
        state = {name.replace("_orig_mod.", ""): whole(tensor) for name, tensor in gathered.items()}
        if accelerator.is_main_process:
            card = run_card(run.config, part, fingerprint, base_of(model).config)
            if isinstance(model, PeftModel):
                save_lora(model, folder, state, card, adapter_sampling_of(run.objectives))
            else:
                run.pipeline().save_pretrained(folder, state_dict=state, card=card)
            accelerator.print(f"saved {folder}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder
