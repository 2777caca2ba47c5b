"""The command line: ``unified generate|caption|inpaint|serve`` or ``python -m unified ...``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError

from unified.pipeline.arguments import DECODING, GUIDANCE_SCALE, check_whole
from unified.pipeline.pipeline import UnifiedPipeline
from unified_tokenizers.images import as_rgb


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what a user got wrong is one line on stderr and exit code 2."""
    args = build_parser().parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError, SafetensorError, Image.DecompressionBombError) as error:
        print(f"unified {args.command}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):  # of a failed compilation
            raise
        reason = " ".join(str(error).splitlines()[:2])
        print(f"unified {args.command}: compile: {reason}; needs a C++ compiler, or leave it out.", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="unified", description="Pictures from text, text from images.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: object, about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about)
        added.set_defaults(run=run)
        added.add_argument("--pipeline", required=True, help="pipeline folder or Hub name")
        added.add_argument("--lora", help="folder of a LoRA adapter")
        added.add_argument("--device", type=_device, default="cpu", help="such as cuda (default: %(default)s)")
        added.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"],
                           help="of the language model (default: %(default)s)")  # fmt: skip
        added.add_argument("--threads", type=int, help="CPU threads (default: as torch chooses)")
        return added

    generate = command("generate", _generate, "Draw images for prompts.")
    _drawing_options(generate)
    generate.add_argument("--height", type=int, help="pixels (default: the model's first size)")
    generate.add_argument("--width", type=int, help="pixels")

    inpaint = command("inpaint", _inpaint, "Redraw the bright part of a mask.")
    _drawing_options(inpaint)
    inpaint.add_argument("--image", type=Path, required=True, help="picture to change")
    inpaint.add_argument("--mask", type=Path, required=True, help="white where it is redrawn, black where it stays")

    caption = command("caption", _caption, "Write captions for images, one line each.")
    caption.add_argument("images", type=Path, nargs="+", help="pictures")
    caption.add_argument("--prompt", help="how the caption begins")
    caption.add_argument("--max-new-tokens", type=int, default=32, help="default: %(default)s")
    _sampling_options(caption)

    serve = command("serve", _serve, "Start a web page; needs the extra 'demo'.")
    serve.add_argument("--loras", type=Path, nargs="*", default=[], help="folders of LoRA adapters to choose from")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    serve.add_argument("--queue", type=int, default=8, help="requests that may wait (default: %(default)s)")
    serve.add_argument(
        "--max-rows",
        type=int,
        default=8,
        help="rows generated together; a guided image takes two (default: %(default)s)",
    )
    return parser


def _device(name: str) -> torch.device:
    """A device that is there; argparse reports the error."""
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used: {str(error).splitlines()[0]}") from error


def _seed(text: str) -> int:
    """A seed with room for those of many images behind it; argparse reports the error."""
    if not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1 sharpens (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k most likely; 0 keeps all")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the most likely up to this probability")
    parser.add_argument("--seed", type=_seed, default=0, help="picture i uses seed + i (default: %(default)s)")


def _drawing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", required=True, nargs="+", help="one caption or several")
    parser.add_argument("--out", type=Path, required=True, help="folder for the images")
    parser.add_argument("--num-images-per-prompt", type=int, default=1)
    parser.add_argument("--negative-prompt", help="what to steer away from (default: the empty caption)")
    parser.add_argument(
        "--guidance-scale", type=float, default=GUIDANCE_SCALE, help="1 switches guidance off (default: %(default)s)"
    )
    parser.add_argument("--guidance-schedule", default="constant", choices=["constant", "linear", "cosine"])
    parser.add_argument("--decoding", default="plain", choices=DECODING)
    parser.add_argument("--int8", action="store_true", help="8-bit weights: faster on a CPU, not exact")
    parser.add_argument("--compile", action="store_true", help="torch.compile; on an x86 CPU no faster than without")
    _sampling_options(parser)


def _load(args: argparse.Namespace) -> UnifiedPipeline:
    if args.threads is not None:
        check_whole("threads", args.threads)
        torch.set_num_threads(args.threads)
    pipe = UnifiedPipeline.from_pretrained(args.pipeline, torch_dtype=getattr(torch, args.dtype)).to(args.device)
    if args.lora:
        pipe.load_lora_weights(args.lora)
    if getattr(args, "int8", False) or getattr(args, "compile", False):
        pipe.enable_fast_decoding(compile=args.compile, int8=args.int8)
    return pipe


def _seeds(first: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def _drawing(args: argparse.Namespace) -> dict[str, Any]:
    names = ("prompt", "negative_prompt", "num_images_per_prompt", "guidance_scale", "guidance_schedule", "decoding",
             "temperature", "top_k", "top_p")  # fmt: skip
    count = len(args.prompt) * max(args.num_images_per_prompt, 1)
    return {**{name: getattr(args, name) for name in names}, "generator": _seeds(args.seed, count)}


def _save(images: Any, args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        prompt = args.prompt[index // args.num_images_per_prompt]
        name = f"{index:03d}-{''.join(c if c.isalnum() else '-' for c in prompt)[:60]}.png"
        image.save(args.out / name)
        print(args.out / name)


def _generate(args: argparse.Namespace) -> None:
    _save(_load(args)(height=args.height, width=args.width, **_drawing(args)).images, args)


def _inpaint(args: argparse.Namespace) -> None:
    with Image.open(args.image) as image, Image.open(args.mask) as mask:
        output = _load(args).inpaint(image=as_rgb(image), mask_image=mask.convert("L"), **_drawing(args))
    _save(output.images, args)


def _caption(args: argparse.Namespace) -> None:
    images = []
    for path in args.images:
        with Image.open(path) as image:
            images.append(as_rgb(image))
    options = {name: getattr(args, name) for name in ("prompt", "max_new_tokens", "temperature", "top_k", "top_p")}
    for text in _load(args).caption(images, generator=_seeds(args.seed, len(images)), **options):
        print(" ".join(text.split()))


def _serve(args: argparse.Namespace) -> None:
    from unified.serving.web import serve  # gradio is an extra

    chosen, args.lora = args.lora, None  # loaded by name, with the others
    serve(_load(args), args.loras, chosen, args.host, args.port, args.max_rows, args.queue)
