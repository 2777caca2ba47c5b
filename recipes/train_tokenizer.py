"""Train a convolutional VQ image tokenizer on any source of images.

    accelerate launch recipes/train_tokenizer.py --config recipes/configs/quickstart_tokenizer.yaml [key=value ...]

The pixel error alone gives the best PSNR for little time. For images that look sharp, add ``perceptual`` and, late in the
run, a ``discriminator``.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from omegaconf import MISSING
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from unified.data.sources import SkipReport, captioned_images, fit_square, load_source
from unified.errors import explain_errors
from unified.files import write_text
from unified.settings import dump_settings, load_settings, parse_command_line
from unified.training.checkpoint import (
    check_inputs,
    check_settings,
    load_checkpoint,
    remove_stale,
    save_checkpoint,
    start_checkpoint,
)
from unified_tokenizers import VQGAN, AutoImageTokenizer, VQConfig, VQModel
from unified_tokenizers.images import to_tensor, to_uint8
from unified_tokenizers.vq_loss import PatchDiscriminator, adaptive_weight, build_perceptual, hinge_loss

Tokenizer = VQModel | VQGAN


@dataclass
class DiscriminatorSettings:
    """A patch discriminator beside the pixel error."""

    start: int = MISSING  # the first step with it; give the tokenizer time to learn pixels first
    weight: float = 0.5  # of the adversarial loss, on top of the adaptive weight
    channels: int = 64
    layers: int = 2
    learning_rate: float = 4e-4


@dataclass
class TokenizerTraining:
    """Settings of a tokenizer run."""

    output_dir: str = MISSING
    sources: list[str] = MISSING  # images to learn from; held-out metrics come from the first one
    train_split: str = "train"
    validation_split: str = "validation"
    image_column: str = "image"
    caption_column: str = "caption"
    image_size: int = 64  # any multiple of the stride
    model: dict[str, Any] = field(default_factory=dict)  # fields of VQConfig
    init_from: str | None = None  # continue from a tokenizer (folder or published weights) instead of `model`
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    l1_weight: float = 0.1  # beside the squared error; sharpens edges
    perceptual: str | None = None  # edges (gradients at three scales, needs no weights) or lpips
    perceptual_weight: float = 0.1
    lpips_weights: list[str] = field(
        default_factory=list
    )  # torchvision's vgg16 and LPIPS' linear layers: files or hf-hub:...
    discriminator: DiscriminatorSettings | None = None
    ema_decay: float | None = None  # average of the weights; it is what is validated and saved
    shift: int = 6  # images are moved by up to so many pixels
    validate_every: int = 250
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    resume: str | None = None  # a checkpoint folder, or `latest`
    allow_changes: bool = False  # resume although the settings are not those of the checkpoint
    seed: int = 0


def check(settings: TokenizerTraining, model: Tokenizer) -> None:
    """Refuse settings that contradict each other."""
    if settings.image_size % model.downsample:
        raise ValueError(
            f"image_size: {settings.image_size} does not divide by the tokenizer's stride {model.downsample}; use a multiple."
        )
    if settings.ema_decay is not None and not 0 < settings.ema_decay < 1:
        raise ValueError(f"ema_decay: {settings.ema_decay} must lie in (0, 1).")
    if settings.discriminator is not None and not 0 <= settings.discriminator.start < settings.steps:
        raise ValueError(
            f"discriminator.start: {settings.discriminator.start} lies outside the {settings.steps} steps."
        )


def load_images(settings: TokenizerTraining, source: str, split: str, accelerator: Accelerator) -> Tensor:
    """All usable images of a split, ``(N, 3, H, W)`` uint8."""
    report = SkipReport()
    rows = captioned_images(load_source(source, split), report, settings.image_column, settings.caption_column)
    pictures = [to_uint8(to_tensor([fit_square(row.image, settings.image_size)])) for row in rows]
    accelerator.print(f"{source} ({split}): {report.summary()}")
    if not pictures:
        raise ValueError(f"sources: no usable image in split {split!r} of {source!r}.")
    return torch.cat(pictures)


def as_floats(pictures: Tensor) -> Tensor:
    """uint8 to floats in [-1, 1]."""
    return pictures.float() / 127.5 - 1.0


def augment(images: Tensor, shift: int) -> Tensor:
    """Mirror each image with probability one half and move the batch by up to ``shift`` pixels, edges repeated."""
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    top, left = (int(value) for value in torch.randint(0, 2 * shift + 1, (2,)))
    height, width = images.shape[-2:]
    padded = F.pad(mirrored, (shift,) * 4, mode="replicate") if shift else mirrored
    return padded[:, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def held_out(model: Tokenizer, pictures: Tensor) -> dict[str, float]:
    """Mean PSNR in dB over uint8 images, share of the codebook in use and perplexity of the codes."""
    training = model.training
    model.eval()
    codes = torch.cat([model.encode(as_floats(batch)) for batch in pictures.split(64)])
    decoded = torch.cat([model.decode(batch).cpu() for batch in codes.split(64)])
    model.train(training)
    error = ((decoded - as_floats(pictures)) / 2).square().mean(dim=(1, 2, 3))
    frequency = torch.bincount(codes.flatten(), minlength=model.codebook_size).float() / codes.numel()
    return {
        "psnr_db": float((-10 * error.log10()).mean()),
        "codes_used": float((frequency > 0).float().mean()),
        "perplexity": float(torch.special.entr(frequency).sum().exp()),
    }


def build_model(settings: TokenizerTraining) -> Tokenizer:
    """A new tokenizer, or the one to continue from."""
    if settings.init_from is None:
        return VQModel(VQConfig(**settings.model)).to(memory_format=torch.channels_last)  # type: ignore[call-arg]
    if settings.model:
        raise ValueError("model: given together with init_from, which brings its own architecture; leave one out.")
    model = AutoImageTokenizer.from_pretrained(settings.init_from)
    if not isinstance(model, VQModel | VQGAN):
        raise ValueError(
            f"init_from: {settings.init_from!r} is a {type(model).__name__}, which cannot be trained here."
        )
    return model


class Adversary:
    """The discriminator and its optimizer."""

    def __init__(self, settings: DiscriminatorSettings, accelerator: Accelerator):
        self.settings, self.accelerator = settings, accelerator
        judge = PatchDiscriminator(settings.channels, settings.layers)
        optimizer = torch.optim.AdamW(judge.parameters(), settings.learning_rate, (0.5, 0.9))
        self.judge, self.optimizer = accelerator.prepare(judge, optimizer)

    def loss(self, decoded: Tensor, reconstruction: Tensor, last_weight: Tensor) -> Tensor:
        """What the tokenizer pays for being found out."""
        self.judge.requires_grad_(False)
        adversarial = -self.judge(decoded).mean()
        self.judge.requires_grad_(True)
        return self.settings.weight * adaptive_weight(reconstruction, adversarial, last_weight) * adversarial

    def learn(self, decoded: Tensor, images: Tensor) -> Tensor:
        """One step of the discriminator; returns its loss."""
        loss = hinge_loss(self.judge(images), self.judge(decoded.detach()))
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def main() -> None:
    """Read the settings, train, save the tokenizer and its log."""
    settings = load_settings(TokenizerTraining, *parse_command_line(__doc__, TokenizerTraining))
    accelerator = Accelerator()
    set_seed(settings.seed, device_specific=True)
    output = Path(settings.output_dir)
    checkpoint = start_checkpoint(settings.resume, output / "checkpoints")
    if checkpoint:
        check_settings(checkpoint, settings, settings.allow_changes)
    train = torch.cat([load_images(settings, s, settings.train_split, accelerator) for s in settings.sources])
    validation = load_images(settings, settings.sources[0], settings.validation_split, accelerator)

    inputs = {"num_processes": accelerator.num_processes, "pictures": len(train)}
    if checkpoint:
        check_inputs(checkpoint, inputs, settings.allow_changes)

    model = build_model(settings)
    check(settings, model)
    perceptual = build_perceptual(settings.perceptual, settings.lpips_weights)
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, (0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, settings.steps, pct_start=0.1)
    accelerator.register_for_checkpointing(schedule)
    adversary = Adversary(settings.discriminator, accelerator) if settings.discriminator is not None else None
    ema = average_of(accelerator.unwrap_model(model), settings.ema_decay)
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    if perceptual is not None:
        perceptual.to(accelerator.device)
    output.mkdir(parents=True, exist_ok=True)
    done = load_checkpoint(accelerator, checkpoint)[0] if checkpoint else 0
    remove_stale(accelerator, output / "checkpoints", done)
    log = [record for record in read_log(output) if record["step"] <= done] if done else []
    if accelerator.is_main_process:
        (output / "training_config.yaml").write_text(dump_settings(settings))

    def current() -> Tokenizer:
        return cast(Tokenizer, ema.module if ema is not None else accelerator.unwrap_model(model))

    model.train()
    bar = tqdm(range(done + 1, settings.steps + 1), initial=done, total=settings.steps, unit="step",
               disable=not accelerator.is_local_main_process)  # fmt: skip
    for step in bar:
        batch = as_floats(train[torch.randint(len(train), (settings.batch_size,))])
        images = augment(batch, settings.shift).to(accelerator.device)
        decoded, _, commitment = model(images)
        squared = F.mse_loss(decoded, images)
        loss = squared + settings.l1_weight * F.l1_loss(decoded, images)
        if perceptual is not None:
            loss = loss + settings.perceptual_weight * perceptual(decoded, images)
        judged = adversary is not None and step > adversary.settings.start
        if adversary is not None and judged:
            loss = loss + adversary.loss(decoded, loss, accelerator.unwrap_model(model).last_weight)
        accelerator.backward(loss + commitment)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        judge_loss = adversary.learn(decoded, images) if adversary is not None and judged else None
        if ema is not None:
            ema.update_parameters(accelerator.unwrap_model(model))
        if step % settings.validate_every == 0 or step == settings.steps:
            error = float(squared.detach())
            if not math.isfinite(error):
                raise FloatingPointError(f"squared error is {error} at step {step}: lower learning_rate.")
            figures = {"step": step, "squared_error": error, **held_out(current(), validation)}
            if judge_loss is not None:
                figures["discriminator_loss"] = float(judge_loss)
            log.append(figures)
            if accelerator.is_main_process:
                write_text(output / "training_log.json", json.dumps(log, indent=2))
            bar.set_postfix(psnr=f"{figures['psnr_db']:.2f} dB", codes=f"{figures['codes_used']:.0%}",
                            perplexity=f"{figures['perplexity']:.0f}")  # fmt: skip
        if settings.checkpoint_every and (step % settings.checkpoint_every == 0 or step == settings.steps):
            save_checkpoint(accelerator, output / "checkpoints", step, 0, settings.keep_checkpoints, settings, inputs)
    if accelerator.is_main_process:
        current().save_pretrained(output)
        write_text(output / "training_log.json", json.dumps(log, indent=2))
        last = log[-1]
        print(
            f"saved {output}: held-out PSNR {last['psnr_db']:.2f} dB, {last['codes_used']:.0%} of the codes in use, "
            f"perplexity {last['perplexity']:.0f}"
        )


def average_of(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """A running average of the weights; buffers, such as the codebook, are those of the model."""
    if decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).eval()


def read_log(output: Path) -> list[dict[str, Any]]:
    """The records of an earlier part of this run."""
    file = output / "training_log.json"
    return json.loads(file.read_text()) if file.is_file() else []


if __name__ == "__main__":
    explain_errors(main)
