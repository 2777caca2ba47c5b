"""Losses step by step against the official code of next-patch prediction (arXiv 2412.15321), by hand:

    python tests/npp_curve.py --npp PATH_OF_THE_CHECKOUT

A checkout of the paper's repository gives the model, the loss, the optimizer and its learning rates; here is `unified.training`
with a converted copy of the same weights, on the same codes in the same order, at p = 2 and then p = 1. Needs einops and
torchvision, as their code does. Fails if a loss differs by more than 1e-4 before and after the switch of p.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from unified_evaluation.benchmark_peers import import_checkout, take_whole_codes

from unified import UnifiedPipeline
from unified.convert import llamagen_from_weights
from unified.data.code_cache import CACHE_FILE
from unified.training.config import load_config
from unified.training.loop import train_steps
from unified.training.setup import Run, make_accelerator, set_up
from unified.training.tracking import read_log
from unified_tokenizers import VQConfig, VQModel

GRID, CODES, CLASSES, HEADS, IMAGES = 16, 64, 10, 4, 256
EPOCH = 10  # steps of one, by which their learning rate goes
TOLERANCE = 1e-4


def official(folder: str) -> tuple[Any, Any]:
    """Their modules of the model and of the training, with the two changes that a CPU and equal data need.

    Raises:
        ValueError: if the folder is not such a checkout.
    """
    _, gpt, training = import_checkout(
        folder, "npp", "utils.patchify", "autoregressive.models.gpt", "autoregressive.train.train_c2i"
    )
    take_whole_codes(gpt)
    gpt.LabelEmbedder.token_drop = lambda self, labels, force_drop_ids=None: labels  # ours were dropped before
    return gpt, training


def write_codes(folder: Path, fingerprint: str) -> None:
    """Labelled rows: half of the codes are those of the class, the others are random."""
    rng = np.random.default_rng(0)
    labels = rng.integers(CLASSES, size=IMAGES)
    usual, noise = (rng.integers(CODES, size=(count, GRID**2)) for count in (CLASSES, IMAGES))
    codes = np.where(rng.random(noise.shape) < 0.5, usual[labels], noise).astype(np.int32)
    rows = {"codes": list(codes), "height": [GRID] * IMAGES, "width": [GRID] * IMAGES, "label": labels}
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows)).save_to_disk(folder)
    made = {
        "tokenizer_fingerprint": fingerprint, "codebook_size": CODES, "downsample": 4, "kind": "labelled", "source": "random codes",
        "rows": {"train": {"used": IMAGES, "skipped": {}}},
    }  # fmt: skip
    (folder / CACHE_FILE).write_text(json.dumps(made))


def start(folder: Path, peer: Any, args: argparse.Namespace) -> Run:
    """Our run from their weights."""
    tokenizer = VQModel(
        VQConfig(channels=8, encoder_blocks=1, decoder_blocks=1, codebook_size=CODES, code_dim=4)
    ).eval()
    write_codes(folder / "codes", tokenizer.fingerprint)
    model = llamagen_from_weights(
        peer.state_dict(), "their weights", HEADS, [(GRID, GRID)], image_tokenizer_fingerprint=tokenizer.fingerprint
    )
    model.config.dropout = args.dropout
    UnifiedPipeline(model, tokenizer).save_pretrained(folder / "start")
    (folder / "run.yaml").write_text(f"""
output_dir: {folder}/run
steps: {2 * args.epochs * EPOCH}
batch_size: 8
log_every: 1
track_with: []
data: {{train: {folder}/codes, caption_dropout: 0.1}}
model: {{pipeline: {folder}/start}}
schedule: {{patch_sizes: [2, 1], shares: [0.5, 0.5], warmup: {args.warmup_epochs / args.epochs}, decay: 0.2, final: 0.1}}
optimizer: {{learning_rate: {args.learning_rate}, betas: [0.9, 0.95], weight_decay: 0.05, gradient_clip: 1.0}}
""")
    config = load_config(folder / "run.yaml")
    run, steps = set_up(config, make_accelerator(config)), count()

    def seed(module: nn.Module, inputs: Any) -> None:
        torch.manual_seed(next(steps))  # equal masks of dropout

    run.model.register_forward_pre_hook(seed)
    return run


def their_losses(
    gpt: Any, training: Any, peer: Any, run: Run, args: argparse.Namespace
) -> Iterator[tuple[float, float]]:
    """Loss and learning rate of each of their steps, on the batches of our run."""
    rate, ends = args.learning_rate, [args.epochs, 2 * args.epochs]
    optimizer = training.creat_optimizer(peer, 0.05, rate, (0.9, 0.95), argparse.Namespace(info=lambda text: None))
    scheduler = training.create_scheduler(optimizer, ends[1], EPOCH, ends, args.warmup_epochs, 0.2, rate, 0.1 * rate)
    first = run.current().config.vocabulary.text_vocab_size
    peer.train()
    for step in range(run.config.steps):
        sequences = run.data.batches.sequences(step)
        codes = torch.stack([sequence.input_ids[1:] for sequence in sequences]) - first
        classes = torch.tensor([sequence.condition for sequence in sequences])
        p = run.schedule.patch_size(step, run.config.steps)
        angles = gpt.precompute_freqs_cis_2d(GRID // p, args.width // HEADS, 10000, 1)
        torch.manual_seed(step)
        loss = peer(idx=codes, cond_idx=classes, targets=codes, p=p, patch_size=p * p, freqs_cis=angles)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        yield float(loss.detach()), optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)


def main() -> None:
    """Train both, print where they are farthest apart in each stage, and fail if that is too far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npp", required=True, help="checkout of the official repository")
    parser.add_argument(
        "--epochs", type=int, default=25, help=f"of {EPOCH} steps, in each stage (default: %(default)s)"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument(
        "--warmup-epochs", type=int, default=0, help="theirs comes a step later than ours (default: none)"
    )
    parser.add_argument("--width", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--dropout", type=float, default=0.1, help="with equal masks (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    gpt, training = official(args.npp)
    torch.manual_seed(0)
    peer = gpt.Transformer(
        gpt.ModelArgs(dim=args.width, n_layer=2, n_head=HEADS, vocab_size=CODES, num_classes=CLASSES, block_size=GRID**2,
                      token_dropout_p=args.dropout, resid_dropout_p=args.dropout, ffn_dropout_p=args.dropout)
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = start(Path(folder), peer, args)
        train_steps(run, None, lambda: False)
        ours = [record for record in read_log(run.output) if "image_loss" in record]
        theirs = list(their_losses(gpt, training, peer, run, args))
    failed = False
    for p in (2, 1):
        steps = [step for step, record in enumerate(ours) if record["patch_size"] == p]
        losses = np.array([[ours[step]["image_loss"], theirs[step][0]] for step in steps])
        rates = np.array([[ours[step]["lr"], theirs[step][1]] for step in steps])
        apart, away = np.abs(losses[:, 0] - losses[:, 1]), np.abs(rates[:, 0] - rates[:, 1]).max()
        print(f"p = {p}: {len(steps)} steps, loss {losses[0, 0]:.4f} to {losses[-1, 0]:.4f}; largest difference of the losses "
              f"{apart.max():.2e} (step {steps[int(apart.argmax())]}), of the learning rates {away:.2e}")  # fmt: skip
        failed = failed or len(steps) != args.epochs * EPOCH or not apart.max() < TOLERANCE
    if failed:
        raise SystemExit(f"the losses differ by more than {TOLERANCE}")


if __name__ == "__main__":
    main()
