"""What the commands of ``unified`` do with a pipeline: generate, inpaint, caption, chat, export and serve.

Each takes what :mod:`unified.cli` has parsed, checks it, and imports the rest, so that mistakes answer before a model is loaded.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from unified.decoding.config import Sampling, check_decoding
from unified.pipeline.options import GenerationOptions, check_whole

if TYPE_CHECKING:
    from unified.pipeline.pipeline import UnifiedPipeline
    from unified.serving.remote import RemotePipeline

API_KEY = "UNIFIED_API_KEY"  # environment variable


def _load(args: argparse.Namespace) -> "UnifiedPipeline":
    from unified.pipeline.pipeline import UnifiedPipeline

    _set_threads(args)
    pipe = UnifiedPipeline.from_pretrained(args.pipeline, torch_dtype=args.dtype or "float32")
    if hasattr(args, "decoding"):  # before adapters are loaded and a decoder is made
        decoding = GenerationOptions(decoding=args.decoding).filled(pipe.sampling).decoding
        check_decoding(str(decoding), pipe.model.config)
    pipe.to(args.device or "cpu")
    for name, folder in getattr(args, "rewards", {}).items():
        pipe.load_lora_weights(folder, name)
    if args.lora:
        pipe.load_lora_weights(args.lora)
    if getattr(args, "int8", False) or getattr(args, "compile", False):
        pipe.enable_fast_decoding(compile=args.compile, int8=args.int8)
    return pipe


def _remote(args: argparse.Namespace, **options: Any) -> "RemotePipeline":
    """The engine at ``--server``, with the key in the environment; images are decoded here."""
    from unified.serving.remote import RemotePipeline

    _set_threads(args)
    return RemotePipeline(args.pipeline, args.server, api_key=os.environ.get(API_KEY), **options)


def _set_threads(args: argparse.Namespace) -> None:
    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)


def _check_threads(args: argparse.Namespace) -> None:
    if args.threads is not None:
        check_whole("threads", args.threads, most=4096)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of :class:`GenerationOptions` that a command has."""
    return {each.name: getattr(args, each.name) for each in fields(GenerationOptions) if hasattr(args, each.name)}


def _image_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a pipeline's method, checked before the model is loaded, and the folder for its images."""
    _check_threads(args)
    args.rewards = {re.sub(r"[^\w-]+", "_", "_".join(Path(name).parts[-2:])): name for name, _ in args.steer or ()}
    if len(args.rewards) < len(args.steer or ()):
        raise ValueError(f"steer: {[name for name, _ in args.steer]} are called alike; give each adapter once.")
    args.steer = {name: dict(args.steer)[folder] for name, folder in args.rewards.items()} or None
    given = _options(args)
    options = GenerationOptions.from_mapping(given)
    from unified.pipeline.arguments import as_prompts, check_unicode, seeded

    prompts = None if args.prompt is None else as_prompts(args.prompt)
    check_unicode(args.negative_prompt or "", "negative_prompt")
    args.out.mkdir(parents=True, exist_ok=True)
    generators = seeded(args.seed, len(prompts or args.class_labels) * options.num_images_per_prompt)
    wanted = {"prompt": prompts, "negative_prompt": args.negative_prompt, "generator": generators}
    for name in ("class_labels", "negative_class_labels"):
        if getattr(args, name) is not None:
            wanted[name] = getattr(args, name)
    return {**given, **wanted}


def _save(pipe: "UnifiedPipeline | None", images: Any, args: argparse.Namespace, edit: str | None = None) -> None:
    """Write ``NNN-caption.png`` or ``NNN-class.png``, with what they were made with; numbers follow those in the folder."""
    from unified.pipeline.metadata import describe_images, write_png

    labels = args.prompt or [f"class {label}" for label in args.class_labels]
    prompts = [label for label in labels for _ in range(args.num_images_per_prompt)]
    seeds = [args.seed + i for i in range(len(prompts))]
    if pipe is not None:
        describe_images(pipe, images, prompts, seeds, _options(args), args.negative_prompt, edit)
    numbers = _free_numbers(args.out)
    for index, image in enumerate(images):
        with _new_file(args.out, prompts[index], numbers) as file:
            write_png(image, file)
            print(file.name)


def _free_numbers(folder: Path) -> Iterator[int]:
    """Numbers behind those of the files in a folder."""
    taken = [int(found[0]) for file in folder.iterdir() if (found := re.match(r"\d+(?=-)", file.name))]
    return count(max(taken, default=-1) + 1)


def _new_file(folder: Path, prompt: str, numbers: Iterator[int]) -> BinaryIO:
    """Open a file that did not exist, whoever else writes to the folder."""
    label = "".join(c if c.isalnum() else "-" for c in prompt)[:60]
    for number in numbers:
        try:
            return (folder / f"{number:03d}-{label}.png").open("xb")
        except FileExistsError:
            continue
    raise AssertionError("numbers: they came to an end.")


def generate(args: argparse.Namespace) -> None:
    """Generate images and write them to a folder."""
    arguments = _image_arguments(args)
    if args.server is not None:
        _save(None, _from_server(args), args)
        return
    pipe = _load(args)
    _save(pipe, pipe(**arguments).images, args)


def _from_server(args: argparse.Namespace) -> Any:
    _check_server(
        args, "lora", "device", "dtype", "int8", "compile", "negative_prompt", "class_labels", "negative_class_labels"
    )
    with _remote(args) as remote:
        return remote(args.prompt, GenerationOptions.from_mapping(_options(args)), args.seed).images


def _check_server(args: argparse.Namespace, *names: str) -> None:
    """Raises ValueError for options that another engine's server does not have."""
    for name in names:
        if getattr(args, name):
            raise ValueError(f"{name}: it cannot be chosen for a server; leave it out, or leave out --server.")


def inpaint(args: argparse.Namespace) -> None:
    """Generate a part of an image again."""
    from unified_tokenizers.images import read_image

    arguments = _image_arguments(args)
    arguments |= {"image": read_image(args.image), "mask_image": read_image(args.mask)}
    pipe = _load(args)
    _save(pipe, pipe.inpaint(**arguments).images, args, "inpaint")


def caption(args: argparse.Namespace) -> None:
    """Print a caption of each image."""
    from unified.pipeline.arguments import check_prompt, seeded
    from unified_tokenizers.images import read_image

    _check_threads(args)
    check_whole("max_new_tokens", args.max_new_tokens)
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    if args.prompt is not None:
        check_prompt(args.prompt)
    images = [read_image(path) for path in args.images]
    texts = _load(args).caption(
        images, prompt=args.prompt, max_new_tokens=args.max_new_tokens, temperature=sampling.temperature,
        top_k=sampling.top_k, top_p=sampling.top_p, generator=seeded(args.seed, len(images)),
    )  # fmt: skip
    for text in texts:
        print(" ".join(text.split()))


def chat(args: argparse.Namespace) -> None:
    """Read lines and reply, until they end."""
    from unified.chat_loop import chat_loop
    from unified.pipeline.arguments import seeded

    _check_threads(args)
    check_whole("max_new_tokens", args.max_new_tokens)
    check_whole("max_images", args.max_images, least=0)
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    args.out.mkdir(parents=True, exist_ok=True)

    def save(image: Any, prompt: str) -> Path:
        with _new_file(args.out, prompt, _free_numbers(args.out)) as file:
            image.save(file, format="PNG")
            return Path(file.name)

    pipe = _load(args)
    (generator,) = seeded(args.seed, 1)
    chat_loop(pipe, sys.stdin, save, args.max_new_tokens, args.max_images, sampling, generator)


def export(args: argparse.Namespace) -> None:
    """Write a pipeline for another engine, an adapter merged into its weights."""
    from tempfile import TemporaryDirectory

    from unified.pipeline.pipeline import UnifiedPipeline
    from unified.serving.export import export_pipeline

    _check_threads(args)
    pipe = _load(args)
    with TemporaryDirectory() as folder:
        if args.lora:  # into the weights
            pipe.fuse_lora()
            pipe.save_pretrained(folder)
            pipe = UnifiedPipeline.from_pretrained(folder, torch_dtype=pipe.dtype)
        export_pipeline(pipe, args.out)
    print(args.out)


def serve(args: argparse.Namespace) -> None:
    """Serve the page until it is stopped."""
    _check_threads(args)
    check_whole("port", args.port, least=0, most=65535)
    check_whole("max_rows", args.max_rows, least=2)
    check_whole("queue", args.queue)
    check_whole("per_client", args.per_client)
    if args.password == "":
        raise ValueError("password: it is empty; give one, or leave it out to let everybody in.")
    from unified.serving.address import answered_hosts, free_port

    answered_hosts(args.host, args.allow_host)
    port = free_port(args.host, args.port)
    from unified.serving.page import check_installed
    from unified.serving.web import serve as serve_pipeline
    from unified.serving.web import serve_remote

    check_installed()
    if args.server is not None:
        _check_server(args, "lora", "loras", "device", "dtype")
        with _remote(args, concurrency=args.max_rows) as remote:
            serve_remote(
                remote, args.queue, args.per_client, host=args.host, server_port=port, allow_hosts=args.allow_host,
                password=args.password,
            )  # fmt: skip
        return
    chosen, args.lora = args.lora, None  # loaded by name, with the others
    serve_pipeline(
        _load(args), args.loras, chosen, args.max_rows, args.queue, args.per_client,
        host=args.host, server_port=port, allow_hosts=args.allow_host, password=args.password,
    )  # fmt: skip
