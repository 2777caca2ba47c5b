"""Make pairs of images for preference training: a pipeline's own images, ranked by a reward.

    python recipes/prepare_pairs.py --pipeline runs/shapes/model/pipeline --prompts runs/shapes/data --num-prompts 512 \\
        --reward unified_eval.rewards:shapes_correct --out runs/shapes/pairs

Samples several images of every caption, with the sampling settings of the pipeline. The best one of a caption and its worst one
are a pair, so are the second best and the second worst, as long as their rewards differ. Any function of images and prompts is
a reward, as in recipes/grpo.py; several are added up. Writes the codes of all pairs as they were sampled (a source of kind `pairs`
for recipes/train.py, see configs/dpo_shapes.yaml), `pairs.jsonl` with captions and rewards, `pairs.png` with the first pairs to
look at, and `summary.json`.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from unified.data import load_source
from unified.data.pairs import save_pairs
from unified.data.rows import different_captions
from unified.errors import explain_errors
from unified.files import write_json
from unified.training.rewards import Rewards, RewardSettings
from unified_eval.generation import load_system, stream_images
from unified_eval.sheets import captioned_grid, in_rows
from unified_tokenizers.images import to_pil


def ranked_pairs(rewards: Sequence[float], most: int) -> list[tuple[int, int]]:
    """Numbers of the better and the worse image of each pair of one caption: best with worst, second with second.

    Args:
        rewards: one for each image of the caption.
        most: pairs at most.

    >>> ranked_pairs([0.0, 1.0, 0.5, 0.5], 2)
    [(1, 0)]
    """
    order = sorted(range(len(rewards)), key=lambda number: rewards[number], reverse=True)
    pairs = list(zip(order, reversed(order), strict=True))[: min(most, len(order) // 2)]
    return [(better, worse) for better, worse in pairs if rewards[better] > rewards[worse]]


def choose_prompts(source: str, split: str, column: str, count: int, seed: int) -> list[str]:
    """Different captions of a source, at random. Raises ValueError if it has fewer."""
    texts = different_captions(load_source(source, split), column)
    if len(texts) < count:
        raise ValueError(
            f"num_prompts: {count}, but {source!r} has {len(texts)} different captions; take at most these."
        )
    return [texts[number] for number in np.random.default_rng(seed).choice(len(texts), count, replace=False)]


def make_pairs(args: argparse.Namespace) -> dict[str, Any]:
    """Sample, reward and pair the images; returns what ``summary.json`` holds.

    Raises:
        ValueError: for a folder that exists, a source, pipeline or reward that does not fit, or if no caption has two images of
            different reward.
    """
    out = Path(args.out)
    if out.exists():
        raise ValueError(f"out: {args.out!r} exists; choose another folder, or remove it.")
    rewards = Rewards([RewardSettings(path) for path in args.reward])
    texts = choose_prompts(args.prompts, args.split, args.caption_column, args.num_prompts, args.seed)
    pipeline, identity = load_system(args.pipeline, args.lora)
    each = args.images_per_prompt
    prompts = [text for text in texts for _ in range(each)]
    seeds = np.random.default_rng((args.seed, 1)).integers(2**62, size=len(prompts)).tolist()
    wanted = {"guidance_scale": args.guidance_scale, "temperature": args.temperature}
    sampling = {name: value for name, value in wanted.items() if value is not None}
    stream: Iterator[Any] = stream_images(pipeline, prompts, seeds, args.batch_size, **sampling, output_type="codes")
    codes = iter(tqdm(stream, total=len(prompts), desc="images", unit="image", smoothing=0.02))

    lines: list[dict[str, Any]] = []
    pairs: list[tuple[str, np.ndarray, np.ndarray]] = []
    shown: list[Image.Image] = []
    found: list[float] = []
    for text in texts:
        sampled = torch.stack([next(codes) for _ in range(each)])
        images = to_pil(pipeline.image_tokenizer.decode(sampled))
        values = rewards(images, [text] * each)[0].tolist()
        found += values
        for better, worse in ranked_pairs(values, args.pairs_per_prompt):
            lines.append({"caption": text, "chosen_reward": values[better], "rejected_reward": values[worse]})
            pairs.append((text, sampled[better].cpu().numpy(), sampled[worse].cpu().numpy()))
            shown += [images[better], images[worse]] if len(shown) < 32 else []
    if not pairs:
        raise ValueError(
            f"reward: {args.reward} gives all images of a caption the same; sample more of each, or take another reward."
        )
    save_pairs(pipeline.image_tokenizer, out, pairs, args.pipeline)
    names = [f"{role}: {line['caption']}" for line in lines for role in ("chosen", "rejected")][: len(shown)]
    captioned_grid(in_rows(shown, 8), in_rows(names, 8)).save(out / "pairs.png")
    (out / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        "pairs": len(lines), "prompts": len(texts), "images_per_prompt": each, "mean_reward": float(np.mean(found)),
        "captions_with_a_pair": len({line["caption"] for line in lines}), "rewards": list(args.reward),
        "sampling": sampling, "seed": args.seed, **identity,
    }  # fmt: skip
    write_json(out / "summary.json", summary)
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and make the pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="folder or Hub name of the pipeline that samples")
    parser.add_argument("--lora", help="folder of an adapter that it samples with")
    parser.add_argument("--prompts", required=True, help="captioned source whose captions are used")
    parser.add_argument("--split", default="train", help="of the source (default: %(default)s)")
    parser.add_argument("--caption-column", default="caption", help="of the source (default: %(default)s)")
    parser.add_argument("--num-prompts", type=int, default=512, help="different captions (default: %(default)s)")
    parser.add_argument("--images-per-prompt", type=int, default=8, help="images of each (default: %(default)s)")
    parser.add_argument("--pairs-per-prompt", type=int, default=1, help="at most (default: %(default)s)")
    parser.add_argument(
        "--reward", nargs="+", required=True, metavar="MODULE:FUNCTION", help="functions of images and prompts"
    )
    parser.add_argument("--guidance-scale", type=float, help="(default: that of the pipeline)")
    parser.add_argument("--temperature", type=float, help="(default: that of the pipeline)")
    parser.add_argument("--batch-size", type=int, default=64, help="images at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of captions and images (default: %(default)s)")
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args(argv)
    for name, least in (("num_prompts", 1), ("images_per_prompt", 2), ("pairs_per_prompt", 1), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"{name}: {getattr(args, name)} must be at least {least}.")
    summary = make_pairs(args)
    made = f"{summary['pairs']} pairs of {summary['captions_with_a_pair']} captions"
    print(f"{made}, mean reward {summary['mean_reward']:.3f}: {args.out}")


if __name__ == "__main__":
    explain_errors(main)
