"""Generate images for the prompts of a benchmark in the folders that its own evaluator reads, and score them by CLIP.

    python eval/generate_prompts.py --pipeline DIR --prompts evaluation_metadata.jsonl --samples 4 --out runs/geneval
    python eval/generate_prompts.py --pipeline DIR --prompts PartiPrompts.tsv --clip ViT-L-14/openai --out runs/parti

GenEval's file (`.jsonl`) gives `images/NNNNN/samples/NNNNN.png` with `metadata.jsonl`, for its `evaluate_images.py`;
PartiPrompts (`.tsv`) and plain lists (`.txt`) give `images/NNN.png`. Metrics are in `metrics.json`, by task or
category. Run again, it keeps images that are there; `accelerate launch` shares the work.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from unified.errors import explain_errors
from unified.files import write_json, write_text
from unified.registry import add_import_argument, import_extensions
from unified_eval.clip import (
    Clip,
    caption_rows,
    clip_extractor,
    clip_recipe,
    clip_text_features,
    load_clip,
)
from unified_eval.command_line import (
    add_generation_arguments,
    check_counts,
    check_folder,
    check_sampling,
    plain_settings,
    sampling_of,
)
from unified_eval.evaluation_report import shown
from unified_eval.extraction import extract_features, process_state
from unified_eval.files import content_hash
from unified_eval.generation import generate_images, geneval_name, load_system
from unified_eval.metrics import readable_places
from unified_eval.prompts import Prompt, read_prompts
from unified_eval.recipe_cards import add_recipe_argument, check_resolution, parse_with_recipe, recipe_note
from unified_eval.results import Results
from unified_eval.shapes import add_records, check_size, read_claims, scene_records


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = import_extensions(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_import_argument(parser)
    parser.add_argument("--pipeline", required=True, help="pipeline folder, or its name on the Hub")
    parser.add_argument("--lora", help="LoRA adapter folder to load into it")
    parser.add_argument("--prompts", required=True, help="GenEval's .jsonl, PartiPrompts' .tsv, or .txt")
    parser.add_argument("--max-prompts", type=int, help="use the first this many only (default: all)")
    parser.add_argument("--samples", type=int, default=1, help="images a prompt; GenEval's own: 4 (default: 1)")
    parser.add_argument("--clip", help="also score by this CLIP: folder, 'architecture/tag' or 'hf-hub:owner/name'")
    parser.add_argument("--shapes", action="store_true", help="also check claims about shapes (.jsonl of shapes only)")
    add_generation_arguments(parser)
    add_recipe_argument(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    return parse_with_recipe(parser, argv)


def add_clip_scores(
    results: Results,
    prompts: Sequence[Prompt],
    images: Sequence[Image.Image],
    clip: Clip,
    batch_size: int = 64,
    cache: Path | None = None,
) -> None:
    """Add the CLIP score of all prompts and of each tag, without prompts that are too long for the CLIP.

    Args:
        results: the results to add them to.
        prompts: N prompts.
        images: as many images for each prompt, those of one prompt adjacent.
        clip: the CLIP.
        batch_size: images per forward pass.
        cache: folder of cached features.
    """
    texts = [prompt.text for prompt in prompts]
    place = readable_places(clip, texts, results)
    if not place:
        return
    each = len(images) // len(prompts)
    kept = [number for number in range(len(images)) if number // each in place]
    owners, chosen = [number // each for number in kept], [images[number] for number in kept]
    base = clip_recipe(clip)
    vectors = extract_features(clip_extractor(clip, base), chosen, batch_size, cache, progress=True)
    text_features = clip_text_features(clip, [texts[owner] for owner in place])
    own = 100 * caption_rows(torch.from_numpy(vectors), text_features, [place[owner] for owner in owners])["own"]
    recipe = {"formula": "100 * mean(cos), unclamped", **base}
    for tag in [None, *sorted({prompts[owner].tag for owner in place})]:
        mask = np.array([tag in (None, prompts[owner].tag) for owner in owners])
        name = "clip_score" if tag is None else f"clip_score_{tag}"
        label = f"CLIP score ({clip.name}), {tag or 'all prompts'}"
        results.add_mean(name, own[mask], label, np.array(owners)[mask].tolist(), **recipe)


def main(argv: Sequence[str] | None = None) -> None:
    """Generate, score and write."""
    # 1. Read and check everything before an image is generated.
    args = parse_arguments(argv)
    check_counts(args, "samples", "batch_size", *([] if args.max_prompts is None else ["max_prompts"]))
    check_sampling(args)
    check_folder("out", args.out)
    prompts = read_prompts(args.prompts)[: args.max_prompts]
    if args.shapes and not args.prompts.endswith(".jsonl"):
        raise ValueError("--shapes needs the claims of a .jsonl file.")
    if args.clip and len(prompts) < 2:
        raise ValueError(f"--clip: {len(prompts)} prompt; a score needs 2 or more.")
    claims = [read_claims(prompt.metadata["include"]) for prompt in prompts] if args.shapes else []
    clip = load_clip(args.clip) if args.clip else None
    pipeline, identity = load_system(args.pipeline, args.lora)
    check_resolution(args.recipe, pipeline.default_size)
    if args.shapes:
        check_size(*pipeline.default_size)

    # 2. Generate.
    sampling = sampling_of(args, pipeline.sampling)
    is_geneval = args.prompts.endswith(".jsonl")
    images, times = generate_images(
        pipeline.to(args.device), [prompt.text for prompt in prompts], args.out / "images", args.samples, args.seed,
        args.batch_size, sampling, identity, progress=True,
        **({"file_name": geneval_name(args.samples)} if is_geneval else {}),
    )  # fmt: skip

    # 3. Measure.
    results = Results([str(number) for number in range(len(prompts))], seed=args.seed)
    results.notes += recipe_note(args.recipe)
    if clip is not None:
        clip.model.to(args.device)
        add_clip_scores(results, prompts, images, clip, args.batch_size, args.out / "features")
    if args.shapes:
        owners = [number for number in range(len(prompts)) for _ in range(args.samples)]
        tags, texts = [prompts[owner].tag for owner in owners], [prompts[owner].text for owner in owners]
        add_records(results, list(scene_records(images, [claims[owner] for owner in owners], tags, texts)))

    # 4. Write.
    if not process_state().is_main_process:
        return
    if is_geneval:
        for number, prompt in enumerate(prompts):
            line = json.dumps(prompt.metadata, ensure_ascii=False)
            write_text(args.out / "images" / f"{number:05d}" / "metadata.jsonl", line)
    run = {**plain_settings(args), **sampling, **identity, **times, "prompt_file_sha256": content_hash(args.prompts)}
    write_json(args.out / "metrics.json", {**results.result(), "run": run})
    for value in results.values.values():
        print(f"{value.recipe['label']:<62} {shown(value.number, value.interval)}")
    for note in results.notes:
        print(f"note: {note}")
    print(f"{len(images)} images for {len(prompts)} prompts: {args.out / 'images'}")


if __name__ == "__main__":
    explain_errors(main)
