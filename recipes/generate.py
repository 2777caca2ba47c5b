"""Draw pictures for prompts with a trained pipeline.

python recipes/generate.py --pipeline runs/quickstart/pipeline --prompt "red apple" "penguin" --out pictures
"""

import argparse
from pathlib import Path

import torch

from unified import UnifiedPipeline


def main() -> None:
    """Parse the command line, generate, save one PNG per picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="pipeline folder or Hub name")
    parser.add_argument("--prompt", required=True, nargs="+", help="one caption or several")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--lora", help="folder of a LoRA adapter")
    parser.add_argument("--num-images-per-prompt", type=int, default=1)
    parser.add_argument("--negative-prompt", help="what to steer away from (default: the empty caption)")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="classifier-free guidance; 1 switches it off")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0, help="keep the k most likely codes; 0 keeps all")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the most likely codes up to this probability")
    parser.add_argument("--seed", type=int, default=0, help="picture i uses seed + i")
    args = parser.parse_args()

    pipe = UnifiedPipeline.from_pretrained(args.pipeline)
    if args.lora:
        pipe.load_lora_weights(args.lora)
    count = len(args.prompt) * args.num_images_per_prompt
    images = pipe(
        args.prompt,
        negative_prompt=args.negative_prompt,
        num_images_per_prompt=args.num_images_per_prompt,
        guidance_scale=args.guidance_scale,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        generator=[torch.Generator().manual_seed(args.seed + i) for i in range(count)],
    ).images
    args.out.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        prompt = args.prompt[index // args.num_images_per_prompt]
        name = f"{index:03d}-{''.join(c if c.isalnum() else '-' for c in prompt)[:60]}.png"
        image.save(args.out / name)
        print(args.out / name)


if __name__ == "__main__":
    main()
