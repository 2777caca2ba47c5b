"""Parts that the command lines of the evaluation share."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unified.pipeline import options
from unified.pipeline.options import GenerationOptions

SAMPLING = ("guidance_scale", "temperature", "top_k", "top_p")  # those that a command line takes


def device(name: str) -> str:
    """The name of an available device, as a type of argparse."""
    try:
        torch.zeros((), device=name).item()  # not on `meta`, which computes nothing
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return name


def add_generation_arguments(parser: Any) -> None:
    """Add the options of generation, among them :data:`SAMPLING`, to a parser or a group of it."""
    usual = "(default: the pipeline's)"
    parser.add_argument("--guidance-scale", type=float, help=f"classifier-free guidance {usual}")
    parser.add_argument("--temperature", type=float, help=f"sampling temperature {usual}")
    parser.add_argument("--top-k", type=int, help=f"codes kept for sampling, 0 for all {usual}")
    parser.add_argument("--top-p", type=float, help=f"probability mass kept for sampling {usual}")
    parser.add_argument("--seed", type=int, default=0, help="image i has the seed SEED + i (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images at once (default: %(default)s)")
    parser.add_argument("--device", type=device, default="cpu", help="device of all networks (default: %(default)s)")


def sampling_of(args: argparse.Namespace, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """All options that a code is sampled with: those given, else a pipeline's defaults, so that results say what they were."""
    given = GenerationOptions(**{name: getattr(args, name) for name in SAMPLING}).filled(defaults)
    return {name: getattr(given, name) for name in options.SAMPLING}


def add_column_arguments(parser: Any) -> None:
    """Add the names of the columns of a source to a parser or a group of it."""
    parser.add_argument("--image-column", default="image", help="column of the images (default: %(default)s)")
    parser.add_argument("--caption-column", default="caption", help="column of the captions (default: %(default)s)")


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Raise ValueError if an argument is below 1."""
    for name in names:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: {getattr(args, name)} is below 1.")


def check_sampling(args: argparse.Namespace) -> None:
    """Raise ValueError if an option of generation is out of its range."""
    GenerationOptions(**{name: getattr(args, name) for name in SAMPLING})
    if args.seed < 0:
        raise ValueError(f"--seed: {args.seed} is below 0.")


def check_folder(field: str, folder: Path | None) -> None:
    """Raise ValueError if a folder to write is, or lies in, a file."""
    for place in () if folder is None else (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"{field}: {str(place)!r} is a file; choose another folder.")


def plain_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Parsed arguments as JSON can hold them."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
