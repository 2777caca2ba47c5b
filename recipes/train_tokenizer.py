"""Train a convolutional VQ image tokenizer on any source of pictures.

accelerate launch recipes/train_tokenizer.py --config recipes/configs/quickstart_tokenizer.yaml [key=value ...]
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from omegaconf import MISSING
from torch import Tensor
from tqdm import tqdm

from unified.data import SkipReport, captioned_images, fit_square, load_source
from unified.settings import load_settings, parse_command_line
from unified_tokenizers import VQConfig, VQModel
from unified_tokenizers.images import to_tensor


@dataclass
class TokenizerTraining:
    """Settings of a tokenizer run."""

    output_dir: str = MISSING
    sources: list[str] = MISSING  # pictures to learn from; held-out figures come from the first one
    train_split: str = "train"
    validation_split: str = "validation"
    image_column: str = "image"
    caption_column: str = "caption"
    image_size: int = 64
    model: dict[str, Any] = field(default_factory=dict)  # fields of VQConfig
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    l1_weight: float = 0.1  # beside the squared error; sharpens edges
    shift: int = 6  # pictures are moved by up to so many pixels
    validate_every: int = 250
    seed: int = 0


def load_pictures(settings: TokenizerTraining, source: str, split: str, accelerator: Accelerator) -> Tensor:
    """All usable pictures of a split as uint8-exact floats ``(N, 3, H, W)`` in [-1, 1]."""
    report = SkipReport()
    rows = captioned_images(load_source(source, split), report, settings.image_column, settings.caption_column)
    pictures = to_tensor([fit_square(row.image, settings.image_size) for row in rows])
    accelerator.print(f"{source} ({split}): {report.summary()}")
    return pictures


def augment(images: Tensor, shift: int) -> Tensor:
    """Mirror each picture with probability one half and move the batch by up to ``shift`` pixels, edges repeated."""
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    top, left = (int(value) for value in torch.randint(0, 2 * shift + 1, (2,)))
    height, width = images.shape[-2:]
    padded = F.pad(mirrored, (shift,) * 4, mode="replicate") if shift else mirrored
    return padded[:, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def held_out(model: VQModel, pictures: Tensor) -> dict[str, float]:
    """Mean PSNR in dB over pictures, share of the codebook in use and perplexity of the codes."""
    model.eval()
    codes = torch.cat([model.encode(batch) for batch in pictures.split(64)])
    decoded = torch.cat([model.decode(batch).cpu() for batch in codes.split(64)])
    model.train()
    error = ((decoded - pictures) / 2).square().mean(dim=(1, 2, 3))
    frequency = torch.bincount(codes.flatten(), minlength=model.codebook_size).float() / codes.numel()
    return {
        "psnr_db": float((-10 * error.log10()).mean()),
        "codes_used": float((frequency > 0).float().mean()),
        "perplexity": float(torch.special.entr(frequency).sum().exp()),
    }


def main() -> None:
    """Read the settings, train, save the tokenizer and its log."""
    settings = load_settings(TokenizerTraining, *parse_command_line(__doc__, TokenizerTraining))
    accelerator = Accelerator()
    set_seed(settings.seed, device_specific=True)
    train = torch.cat([load_pictures(settings, s, settings.train_split, accelerator) for s in settings.sources])
    validation = load_pictures(settings, settings.sources[0], settings.validation_split, accelerator)

    model = VQModel(VQConfig(**settings.model)).to(memory_format=torch.channels_last)  # type: ignore[call-arg]
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, (0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, settings.steps, pct_start=0.1)
    output = Path(settings.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    log = []
    model.train()
    bar = tqdm(range(1, settings.steps + 1), unit="step", disable=not accelerator.is_local_main_process)
    for step in bar:
        batch = train[torch.randint(len(train), (settings.batch_size,))]
        images = augment(batch, settings.shift).to(accelerator.device)
        decoded, _, commitment = model(images)
        squared = F.mse_loss(decoded, images)
        accelerator.backward(squared + settings.l1_weight * F.l1_loss(decoded, images) + commitment)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % settings.validate_every == 0 or step == settings.steps:
            figures = {
                "step": step,
                "squared_error": float(squared),
                **held_out(accelerator.unwrap_model(model), validation),
            }
            log.append(figures)
            bar.set_postfix(psnr=f"{figures['psnr_db']:.2f} dB", codes=f"{figures['codes_used']:.0%}")
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(output)
        (output / "training_log.json").write_text(json.dumps(log, indent=2))
        print(
            f"saved {output}: held-out PSNR {log[-1]['psnr_db']:.2f} dB, {log[-1]['codes_used']:.0%} of the codes in use"
        )


if __name__ == "__main__":
    main()
