"""Draw the prompts of a benchmark in the layout that its own evaluator reads, and score them by CLIP.

    python eval/draw_prompts.py --pipeline DIR --prompts evaluation_metadata.jsonl --samples 4 --out runs/geneval
    python eval/draw_prompts.py --pipeline DIR --prompts PartiPrompts.tsv --clip ViT-L-14/openai --out runs/parti

GenEval's file (`.jsonl`) gives `pictures/NNNNN/samples/NNNNN.png` with `metadata.jsonl`, for its `evaluate_images.py`;
PartiPrompts (`.tsv`) and plain lists (`.txt`) give `pictures/NNN.png`. Metrics are in `metrics.json`, by task or
category. Run again, it keeps images that are there; `accelerate launch` shares the work.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unified import UnifiedPipeline
from unified_eval.clip import Clip, caption_rows, clip_extractor, clip_recipe, clip_text_features, load_clip
from unified_eval.drawing import content_hash, draw_images, geneval_name
from unified_eval.evaluation_report import shown
from unified_eval.extraction import extract_features, process_state
from unified_eval.measures import Measures
from unified_eval.prompts import Prompt, read_prompts
from unified_eval.shapes import scene_records, summarise_records


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="pipeline folder, or its name on the Hub")
    parser.add_argument("--lora", help="LoRA adapter folder to load into it")
    parser.add_argument("--prompts", required=True, help="GenEval's .jsonl, PartiPrompts' .tsv, or .txt")
    parser.add_argument("--max-prompts", type=int, help="draw the first this many only (default: all)")
    parser.add_argument("--samples", type=int, default=1, help="pictures a prompt; GenEval's own: 4 (default: 1)")
    parser.add_argument("--clip", help="also score by this CLIP: folder, 'architecture/tag' or 'hf-hub:owner/name'")
    parser.add_argument("--shapes", action="store_true", help="also check claims about shapes (.jsonl of shapes only)")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="classifier-free guidance (default: 3)")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature (default: 1)")
    parser.add_argument("--top-k", type=int, default=0, help="codes kept for sampling, 0 for all (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="probability mass kept for sampling (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="picture i gets seed + i (default: 0)")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures sampled at once (default: 64)")
    parser.add_argument("--device", default="cpu", help="device of the networks (default: cpu)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    if args.shapes and not args.prompts.endswith(".jsonl"):
        parser.error("--shapes needs the claims of a .jsonl file")
    return args


def score(prompts: list[Prompt], images: list[Any], clip: Clip, args: argparse.Namespace) -> Measures:
    """CLIP score over all prompts and by tag, with intervals over prompts."""
    texts = [prompt.text for prompt in prompts]
    numbers = [str(number) for number in range(len(prompts))]
    measures = Measures(numbers, seed=args.seed)
    vectors = extract_features(clip_extractor(clip), images, args.batch_size, args.out / "features", progress=True)
    owners = np.repeat(np.arange(len(prompts)), args.samples)
    own = 100 * caption_rows(torch.from_numpy(vectors), clip_text_features(clip, texts), owners.tolist())["own"]
    recipe = {"formula": "100 * mean(cos), unclamped", **clip_recipe(clip)}
    for tag in [None, *sorted({prompt.tag for prompt in prompts})]:
        mask = np.array([tag in (None, prompts[owner].tag) for owner in owners])
        name = "clip_score" if tag is None else f"clip_score_{tag}"
        label = f"CLIP score ({clip.name}), {tag or 'all prompts'}"
        measures.add_mean(name, own[mask], label, owners[mask].tolist(), **recipe)
    return measures


def main() -> None:
    """Draw, score and write."""
    args = parse_arguments()
    prompts = read_prompts(args.prompts)[: args.max_prompts]
    pipeline = UnifiedPipeline.from_pretrained(args.pipeline)
    identity = {"pipeline_sha256": content_hash(args.pipeline)}
    if args.lora:
        pipeline.load_lora_weights(args.lora)
        identity["lora_sha256"] = content_hash(args.lora)
    sampling = {key: getattr(args, key) for key in ("guidance_scale", "temperature", "top_k", "top_p")}
    layout = {"file_name": geneval_name(args.samples)} if args.prompts.endswith(".jsonl") else {}
    images, times = draw_images(
        pipeline.to(args.device), [prompt.text for prompt in prompts], args.out / "pictures", args.samples, args.seed,
        args.batch_size, sampling, identity, progress=True, **layout,
    )  # fmt: skip
    result: dict[str, Any] = {"figures": {}, "intervals": {}, "recipes": {}}
    if args.clip:
        clip = load_clip(args.clip)
        clip.model.to(args.device)
        result = score(prompts, images, clip, args).result()
    if args.shapes:
        owners = [prompt for prompt in prompts for _ in range(args.samples)]
        claims, tags, texts = zip(*((p.metadata["include"], p.tag, p.text) for p in owners), strict=True)
        summary = summarise_records(list(scene_records(images, claims, tags, texts)), args.seed)
        result |= {key: result[key] | part for key, part in summary.items()}
    if not process_state().is_main_process:
        return
    if layout:
        for number, prompt in enumerate(prompts):
            line = json.dumps(prompt.metadata, ensure_ascii=False)
            (args.out / "pictures" / f"{number:05d}" / "metadata.jsonl").write_text(line, encoding="utf-8")
    run = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    result["run"] = {**run, **identity, **times, "prompt_file_sha256": content_hash(args.prompts)}
    text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
    (args.out / "metrics.json").write_text(text + "\n", encoding="utf-8")
    for name, value in result["figures"].items():
        print(f"{result['recipes'][name]['label']:<62} {shown(value, result['intervals'].get(name))}")
    print(f"{len(images)} images for {len(prompts)} prompts: {args.out / 'images'}")


if __name__ == "__main__":
    main()
