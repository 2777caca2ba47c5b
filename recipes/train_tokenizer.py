"""Train a convolutional VQ image tokenizer on any source of images. Captions are not needed.

    accelerate launch recipes/train_tokenizer.py --config recipes/configs/quickstart_tokenizer.yaml [key=value ...]

The pixel error alone gives the best PSNR for little time. For images that look sharp, add ``perceptual`` and, late in the
run, a ``discriminator``. Images that do not fit into ``cache_gb`` of memory are read from their source for every batch.
Metrics go to ``log.jsonl``, as those of ``recipes/train.py``.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from omegaconf import MISSING
from torch import Tensor
from tqdm import tqdm

from unified.data.held_out import part_names
from unified.data.images import Images, open_images
from unified.data.sources import check_splits
from unified.errors import explain_errors
from unified.locks import locked
from unified.settings import check_range, did_you_mean, dump_settings, load_settings, parse_command_line
from unified.training.average import Average
from unified.training.checkpoint import (
    check_inputs,
    check_settings,
    load_checkpoint,
    remove_stale,
    save_checkpoint,
    start_checkpoint,
)
from unified.training.tracking import RunLog, read_log
from unified_tokenizers import VQGAN, AutoImageTokenizer, CosmosTokenizer, VQConfig, VQModel
from unified_tokenizers.vq_loss import PatchDiscriminator, adaptive_weight, build_perceptual, hinge_loss

CONFIGS = Path(__file__).with_name("configs")
Tokenizer = VQModel | VQGAN | CosmosTokenizer


@dataclass
class DiscriminatorSettings:
    """A patch discriminator beside the pixel error."""

    start: int = MISSING  # steps without it, in which the tokenizer learns the pixels
    weight: float = 0.5  # of the adversarial loss, on top of the adaptive weight
    channels: int = 64  # of its first layer; a multiple of 8
    layers: int = 2  # that halve the resolution: more see larger patches
    learning_rate: float = 4e-4  # of the discriminator


@dataclass
class TokenizerTraining:
    """Settings of a tokenizer run."""

    output_dir: str = MISSING  # folder for the tokenizer, its log and checkpoints
    sources: list[str] = MISSING  # images to train on; held-out metrics come from the first one
    train_split: str = "train"  # split of every source to train on
    validation_split: str = "validation"  # split of the first source that is measured
    validation: float | None = (
        None  # hold out this share of train_split, chosen by content, in place of validation_split
    )
    image_column: str = "image"  # column with the images
    image_size: int = 64  # any multiple of the stride
    cache_gb: float = 0.5  # images that take no more memory than this are decoded once and kept
    model: dict[str, Any] = field(default_factory=dict)  # fields of VQConfig
    init_from: str | None = None  # continue from a tokenizer (folder or published weights) instead of `model`
    steps: int = 1000  # optimizer steps
    batch_size: int = 32  # images per process and step
    learning_rate: float = 2e-3  # peak of a warm-up and a decay
    weight_decay: float = 0.01  # of AdamW
    l1_weight: float = 0.1  # beside the squared error; sharpens edges
    perceptual: str | None = None  # edges (gradients at three scales, needs no weights) or lpips
    perceptual_weight: float = 0.1  # of the perceptual loss
    # torchvision's vgg16 and LPIPS' linear layers: files or hf-hub:...
    lpips_weights: list[str] = field(default_factory=list)
    discriminator: DiscriminatorSettings | None = None
    ema_decay: float | None = None  # average of the weights; it is what is validated and saved
    shift: int = 6  # images are moved by up to so many pixels
    validate_every: int = 250  # steps between two measurements on held-out images
    checkpoint_every: int | None = None  # steps between two checkpoints
    keep_checkpoints: int = 2  # older ones are removed
    resume: str | None = None  # a checkpoint folder, or `latest`
    allow_changes: bool = False  # resume although the settings are not those of the checkpoint
    seed: int = 0  # of the initial weights and of what is chosen at random


def check(settings: TokenizerTraining) -> None:
    """Refuse settings that are out of range."""
    if not settings.output_dir.strip():
        raise ValueError("output_dir: empty; name the folder to write.")
    if not settings.sources:
        raise ValueError("sources: empty; name the images to train on.")
    check_range("", settings, "[1, inf)", "image_size", "steps", "batch_size", "validate_every", "checkpoint_every")
    check_range("", settings, "[1, inf)", "keep_checkpoints")
    check_range("", settings, "(0, inf)", "learning_rate")
    check_range("", settings, "[0, inf)", "cache_gb", "weight_decay", "l1_weight", "perceptual_weight", "shift")
    check_range("", settings, "(0, 1)", "ema_decay")
    check_range("", settings, "[0, 4294967295]", "seed")
    if settings.validation is not None:
        part_names(settings.train_split, settings.validation)
    for name in settings.model:
        if name not in VQConfig.__annotations__:
            raise ValueError(f"model: {name!r} is unknown{did_you_mean(name, list(VQConfig.__annotations__))}")
    adversary = settings.discriminator
    if adversary is not None:
        check_range("discriminator.", adversary, "[1, inf)", "layers")
        check_range("discriminator.", adversary, "[0, inf)", "weight")
        check_range("discriminator.", adversary, "(0, inf)", "learning_rate")
        if adversary.channels < 8 or adversary.channels % 8:
            raise ValueError(f"discriminator.channels: {adversary.channels} must be a multiple of 8.")
        if not 0 <= adversary.start < settings.steps:
            raise ValueError(f"discriminator.start: {adversary.start} lies outside the {settings.steps} steps.")


def splits_of(settings: TokenizerTraining) -> tuple[str, str]:
    """The splits to train on and to measure. Raises ValueError if they are one and the same under two names."""
    if settings.validation is not None:
        return part_names(settings.train_split, settings.validation)
    check_splits(settings.sources[0], settings.train_split, settings.validation_split, "validation_split")
    return settings.train_split, settings.validation_split


def check_size(settings: TokenizerTraining, model: Tokenizer) -> None:
    """Refuse images that the tokenizer cannot encode."""
    if settings.image_size % model.downsample:
        raise ValueError(
            f"image_size: {settings.image_size} does not divide by the tokenizer's stride {model.downsample}; use a multiple."
        )


def as_floats(pixels: Tensor) -> Tensor:
    """uint8 to floats in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def augment(images: Tensor, shift: int) -> Tensor:
    """Mirror each image with probability one half and move the batch by up to ``shift`` pixels, edges repeated."""
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    top, left = (int(value) for value in torch.randint(0, 2 * shift + 1, (2,)))
    height, width = images.shape[-2:]
    padded = F.pad(mirrored, (shift,) * 4, mode="replicate") if shift else mirrored
    return padded[:, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def held_out(model: Tokenizer, images: Images) -> dict[str, float]:
    """Mean PSNR in dB over images, share of the codebook in use and perplexity of the codes."""
    training = model.training
    model.eval()
    errors, counts = [], torch.zeros(model.codebook_size, dtype=torch.int64)
    for numbers in torch.arange(len(images)).split(64):
        batch = as_floats(images[numbers])
        codes = model.encode(batch)
        errors.append(((model.decode(codes).cpu() - batch) / 2).square().mean(dim=(1, 2, 3)))
        counts += torch.bincount(codes.flatten().cpu(), minlength=model.codebook_size)
    model.train(training)
    frequency = counts.float() / counts.sum()
    return {
        "psnr_db": float((-10 * torch.cat(errors).log10()).mean()),
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
    if not isinstance(model, Tokenizer):
        raise ValueError(
            f"init_from: {settings.init_from!r} is a {type(model).__name__}, which cannot be trained here."
        )
    return model


class Adversary:
    """The discriminator and its optimizer."""

    def __init__(self, settings: DiscriminatorSettings, accelerator: Accelerator):
        self.settings, self.accelerator = settings, accelerator
        discriminator = PatchDiscriminator(settings.channels, settings.layers)
        optimizer = torch.optim.AdamW(discriminator.parameters(), settings.learning_rate, (0.5, 0.9))
        self.discriminator, self.optimizer = accelerator.prepare(discriminator, optimizer)

    def loss(self, decoded: Tensor, reconstruction: Tensor, last_weight: Tensor) -> Tensor:
        """Adversarial loss of the tokenizer."""
        self.discriminator.requires_grad_(False)
        adversarial = -self.discriminator(decoded).mean()
        self.discriminator.requires_grad_(True)
        return self.settings.weight * adaptive_weight(reconstruction, adversarial, last_weight) * adversarial

    def update(self, decoded: Tensor, images: Tensor) -> Tensor:
        """One step of the discriminator; returns its loss."""
        loss = hinge_loss(self.discriminator(images), self.discriminator(decoded.detach()))
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings and train; one process at a time writes to an output folder."""
    settings = load_settings(TokenizerTraining, *parse_command_line(__doc__, TokenizerTraining, argv, CONFIGS))
    check(settings)
    accelerator = Accelerator()
    with locked(settings.output_dir) if accelerator.is_main_process else nullcontext():
        train(settings, accelerator)


def train(settings: TokenizerTraining, accelerator: Accelerator) -> None:
    """Train, and save the tokenizer beside its log."""
    # 1. What to continue from
    set_seed(settings.seed, device_specific=True)
    output = Path(settings.output_dir)
    checkpoint = start_checkpoint(settings.resume, output / "checkpoints")
    if checkpoint:
        check_settings(checkpoint, settings, settings.allow_changes)

    # 2. Tokenizer and losses
    model = build_model(settings)
    check_size(settings, model)
    perceptual = build_perceptual(settings.perceptual, settings.lpips_weights)
    if perceptual is not None:
        perceptual.to(accelerator.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, (0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, settings.steps, pct_start=0.1)
    accelerator.register_for_checkpointing(schedule)
    adversary = Adversary(settings.discriminator, accelerator) if settings.discriminator is not None else None
    plain = cast(Tokenizer, accelerator.unwrap_model(model))
    ema = None if settings.ema_decay is None else Average(plain, settings.ema_decay)
    if ema is not None:
        accelerator.register_for_checkpointing(ema)

    # 3. Images
    how = (settings.image_column, settings.image_size, settings.cache_gb)
    train_split, held_out_split = splits_of(settings)
    images = open_images(settings.sources, train_split, *how)
    validation = open_images(settings.sources[:1], held_out_split, *how)
    for split, opened in ((train_split, images), (held_out_split, validation)):
        accelerator.print(f"{split}: {opened.summary()}")
    inputs = {"num_processes": accelerator.num_processes, "images": len(images), "content": images.content}

    # 4. State of an earlier part of the run
    if checkpoint:
        check_inputs(checkpoint, inputs, settings.allow_changes)
    output.mkdir(parents=True, exist_ok=True)
    done = load_checkpoint(accelerator, checkpoint)[0] if checkpoint else 0
    remove_stale(accelerator, output / "checkpoints", done)
    log = RunLog(accelerator, output, resumed_at=done)
    if accelerator.is_main_process:
        (output / "training_config.yaml").write_text(dump_settings(settings))

    # 5. Steps
    model.train()
    bar = tqdm(range(done + 1, settings.steps + 1), initial=done, total=settings.steps, unit="step",
               disable=not accelerator.is_local_main_process)  # fmt: skip
    for step in bar:
        chosen = torch.randint(len(images), (settings.batch_size,))
        batch = augment(as_floats(images[chosen]), settings.shift).to(accelerator.device)
        decoded, _, commitment = model(batch)
        squared = F.mse_loss(decoded, batch)
        loss = squared + settings.l1_weight * F.l1_loss(decoded, batch)
        if perceptual is not None:
            loss = loss + settings.perceptual_weight * perceptual(decoded, batch)
        adversarial = adversary is not None and step > adversary.settings.start
        if adversary is not None and adversarial:
            loss = loss + adversary.loss(decoded, loss, accelerator.unwrap_model(model).last_weight)
        accelerator.backward(loss + commitment)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        discriminator_loss = adversary.update(decoded, batch) if adversary is not None and adversarial else None
        if ema is not None:
            ema.update()

        if step % settings.validate_every == 0 or step == settings.steps:
            error = float(squared.detach())
            if not math.isfinite(error):
                raise FloatingPointError(f"squared error is {error} at step {step}: lower learning_rate.")
            with nullcontext() if ema is None else ema.in_place():
                metrics = {"squared_error": error, **held_out(plain, validation)}
            if discriminator_loss is not None:
                metrics["discriminator_loss"] = float(discriminator_loss)
            log.write(step, **metrics)
            bar.set_postfix(psnr=f"{metrics['psnr_db']:.2f} dB", codes=f"{metrics['codes_used']:.0%}",
                            perplexity=f"{metrics['perplexity']:.0f}")  # fmt: skip
        if settings.checkpoint_every and (step % settings.checkpoint_every == 0 or step == settings.steps):
            save_checkpoint(accelerator, output / "checkpoints", step, 0, settings.keep_checkpoints, settings, inputs)

    # 6. The tokenizer
    if accelerator.is_main_process:
        with nullcontext() if ema is None else ema.in_place():
            plain.save_pretrained(output)
        if images.pixels is None:  # what cannot be read is known by now
            print(f"{settings.train_split}: {images.summary()}")
        last = read_log(output)[-1]
        print(
            f"saved {output}: held-out PSNR {last['psnr_db']:.2f} dB, {last['codes_used']:.0%} of the codes in use, "
            f"perplexity {last['perplexity']:.0f}"
        )


if __name__ == "__main__":
    explain_errors(main)
