"""The command line: ``unified COMMAND ...`` or ``python -m unified COMMAND ...``.

Only the standard library and tables are imported here, so that ``--help`` and mistakes answer at once; commands import the
rest. The commands that are scripts of recipes/ and eval/ are named in :mod:`unified.commands`.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from unified.commands import SCRIPTS, about, run_script
from unified.decoding.config import DECODING_MODES, SCHEDULES, Sampling, check_decoding
from unified.pipeline.options import GenerationOptions, check_whole
from unified.registry import add_import_argument, import_extensions

if TYPE_CHECKING:
    import torch

    from unified.pipeline.pipeline import UnifiedPipeline

PASSWORD = "UNIFIED_PASSWORD"  # environment variables
API_KEY = "UNIFIED_API_KEY"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what a user got wrong is one line on stderr and exit code 2."""
    command = ""
    try:
        given = import_extensions(arguments)
        command = given[0] if given else ""
        if command in SCRIPTS:
            run_script(command, given[1:])
            return 0
        args = build_parser().parse_args(given)
        args.run(args)
    except Exception as error:
        reason = user_error(error)
        if reason is None:
            raise
        print(f"unified {command}".rstrip() + f": {reason}", file=sys.stderr)
        return 2
    return 0


def user_error(error: Exception) -> str | None:
    """One line for an error that a user can mend, None for any other."""
    from unified.errors import MENDABLE

    if isinstance(error, MENDABLE):
        return " ".join(str(error).splitlines())
    if isinstance(error, RuntimeError) and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"compile: {' '.join(str(error).splitlines()[:2])}; needs a C++ compiler, or leave it out."
    return None


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="unified", description="Images from text, text from images.")
    add_import_argument(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: object, about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about)
        added.set_defaults(run=run)
        added.add_argument("--pipeline", required=True, help="pipeline folder or Hub name")
        added.add_argument("--lora", help="folder of a LoRA adapter")
        added.add_argument("--device", type=_device, help="such as cuda (default: cpu)")
        added.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "auto"],
                           help="of the language model (default: float32)")  # fmt: skip
        added.add_argument("--threads", type=int, help="CPU threads (default: as torch chooses)")
        return added

    generate = command("generate", _generate, "Generate images for prompts or classes.")
    _image_options(generate)
    generate.add_argument("--height", type=int, help="pixels (default: the model's first size)")
    generate.add_argument("--width", type=int, help="pixels")
    generate.add_argument(
        "--server", metavar="URL", help="generate on an engine's OpenAI-compatible server; --pipeline is the folder of `unified "
        f"export` then; a key that it asks for is read from {API_KEY} in the environment"
    )  # fmt: skip

    inpaint = command("inpaint", _inpaint, "Generate the bright part of a mask again.")
    _image_options(inpaint)
    inpaint.add_argument("--image", type=Path, required=True, help="image to change")
    inpaint.add_argument(
        "--mask", type=Path, required=True, help="white or transparent where it changes, black where it stays"
    )

    caption = command("caption", _caption, "Write captions for images, one line each.")
    caption.add_argument("images", type=Path, nargs="+", help="image files")
    caption.add_argument("--prompt", help="how the caption begins")
    caption.add_argument("--max-new-tokens", type=int, default=32, help="default: %(default)s")
    _sampling_options(caption, "1.0", "0", "1.0")
    caption.set_defaults(temperature=1.0, top_k=0, top_p=1.0)

    chat = command("chat", _chat, "Texts and images in turn; reads lines, /help lists what else it takes.")
    chat.add_argument("--out", type=Path, required=True, help="folder for the images; what is there stays")
    chat.add_argument("--max-new-tokens", type=int, default=64, help="of a reply (default: %(default)s)")
    chat.add_argument("--max-images", type=int, default=1, help="in a reply (default: %(default)s)")
    _sampling_options(chat, "1.0", "0", "1.0")
    chat.set_defaults(temperature=1.0, top_k=0, top_p=1.0)

    export = command("export", _export, "Write a plain checkpoint with one joint table, for other engines.")
    export.add_argument("--for", dest="engine", default="vllm", choices=["vllm"], help="default: %(default)s")
    export.add_argument("--out", type=Path, required=True, help="folder to write")

    serve = command("serve", _serve, "Start a web page; needs the extra 'demo'.")
    serve.add_argument("--loras", type=Path, nargs="*", default=[], help="folders of LoRA adapters to choose from")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=int, default=7860, help="0 takes a free one (default: %(default)s)")
    serve.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="also answer requests for this host, such as a proxy's; *.example.com stands for all below, '*' for all there "
        "are; may be repeated (answered anyway: localhost and --host; at 0.0.0.0 the machine's names and all addresses)",
    )
    serve.add_argument(
        "--password",
        default=os.environ.get(PASSWORD),
        help=f"asked for before the page is shown, with any user name; also in the environment as {PASSWORD}, which other "
        "users of the machine cannot see (default: none)",
    )
    serve.add_argument("--queue", type=int, default=8, help="requests that may wait (default: %(default)s)")
    serve.add_argument(
        "--per-client",
        type=int,
        default=4,
        help="requests of one address that are answered or wait; a proxy on this machine names its clients in "
        "X-Forwarded-For (default: %(default)s)",
    )
    serve.add_argument(
        "--max-rows",
        type=int,
        default=8,
        help="rows generated together; a guided image takes two; with --server images that it is asked for at once "
        "(default: %(default)s)",
    )
    serve.add_argument("--server", metavar="URL", help="as for `unified generate`: the page's engine is that server's")
    for name in SCRIPTS:  # for the list of commands; they parse their own options
        commands.add_parser(name, help=about(name), add_help=False)
    return parser


def _device(name: str) -> "torch.device":
    """An available device; argparse reports the error."""
    import torch

    try:
        zero = torch.zeros((), device=name)
        zero.item()  # not on `meta`, which computes nothing
        return zero.device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used: {str(error).splitlines()[0]}") from error


def _seed(text: str) -> int:
    """A seed with room for those of many images behind it; argparse reports the error."""
    if not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def _weighted(text: str) -> tuple[str, float]:
    """A name and its weight; argparse reports the error."""
    name, _, weight = text.rpartition("=")
    try:
        return name, float(weight) if name else float("")
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=WEIGHT, such as runs/colours/lora=0.5") from error


def _class_label(text: str) -> int | str:
    """A number in digits, else a name."""
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _sampling_options(parser: argparse.ArgumentParser, *defaults: str) -> None:
    temperature, top_k, top_p = defaults or ["the pipeline's"] * 3
    parser.add_argument("--temperature", type=float, help=f"below 1 sharpens (default: {temperature})")
    parser.add_argument("--top-k", type=int, help=f"keep the k most likely; 0 keeps all (default: {top_k})")
    parser.add_argument("--top-p", type=float, help=f"keep the most likely up to this probability (default: {top_p})")
    parser.add_argument("--seed", type=_seed, default=0, help="image i uses seed + i (default: %(default)s)")


def _image_options(parser: argparse.ArgumentParser) -> None:
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--prompt", nargs="+", help="one caption or several")
    wanted.add_argument(
        "--class", dest="class_labels", type=_class_label, action="append", metavar="CLASS",
        help="number or name of a class, for a class-conditional model; may be repeated",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder for the images; what is there stays")
    parser.add_argument("--num-images-per-prompt", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--negative-prompt", help="what to steer away from (default: the pipeline's, else the empty caption)"
    )
    parser.add_argument(
        "--negative-class", dest="negative_class_labels", type=_class_label, metavar="CLASS",
        help="class to steer away from (default: the unconditional one)",
    )  # fmt: skip
    parser.add_argument("--guidance-scale", type=float, help="1 switches guidance off (default: the pipeline's)")
    parser.add_argument("--guidance-schedule", choices=SCHEDULES, help="default: the pipeline's")
    parser.add_argument(
        "--group-temperature", type=float,
        help="multiplies the temperature where a pass samples several cells, which agree more often below 1 (default: the "
        "pipeline's)",
    )  # fmt: skip
    modes = "; ".join(f"{name}: {mode.about}" for name, mode in DECODING_MODES.items())
    parser.add_argument("--decoding", choices=DECODING_MODES, help=f"{modes} (default: the pipeline's)")
    parser.add_argument(
        "--steer", type=_weighted, action="append", metavar="NAME=WEIGHT",
        help="folder or Hub name of a reward adapter (objective genarm) and how much it steers; below 0 steers away; may be "
        "repeated",
    )  # fmt: skip
    fast = parser.add_mutually_exclusive_group()
    fast.add_argument("--int8", action="store_true", help="8-bit weights: faster on a CPU, not exact")
    fast.add_argument("--compile", action="store_true", help="torch.compile; on an x86 CPU no faster than without")
    _sampling_options(parser)


def _load(args: argparse.Namespace) -> "UnifiedPipeline":
    import torch

    from unified.pipeline.pipeline import UnifiedPipeline

    if args.threads is not None:
        torch.set_num_threads(args.threads)
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


def _check_threads(args: argparse.Namespace) -> None:
    if args.threads is not None:
        check_whole("threads", args.threads, most=4096)


def _image_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a pipeline's method, checked before the model is loaded, and the folder for its images."""
    _check_threads(args)
    args.rewards = {re.sub(r"[^\w-]+", "_", "_".join(Path(name).parts[-2:])): name for name, _ in args.steer or ()}
    if len(args.rewards) < len(args.steer or ()):
        raise ValueError(f"steer: {[name for name, _ in args.steer]} are called alike; give each adapter once.")
    args.steer = {name: dict(args.steer)[folder] for name, folder in args.rewards.items()} or None
    given = {each.name: getattr(args, each.name) for each in fields(GenerationOptions) if hasattr(args, each.name)}
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

    options = {each.name: getattr(args, each.name) for each in fields(GenerationOptions) if hasattr(args, each.name)}
    labels = args.prompt or [f"class {label}" for label in args.class_labels]
    prompts = [label for label in labels for _ in range(args.num_images_per_prompt)]
    seeds = [args.seed + i for i in range(len(prompts))]
    if pipe is not None:
        describe_images(pipe, images, prompts, seeds, options, args.negative_prompt, edit)
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


def _generate(args: argparse.Namespace) -> None:
    arguments = _image_arguments(args)
    if args.server is not None:
        _save(None, _from_server(args, arguments), args)
        return
    pipe = _load(args)
    _save(pipe, pipe(**arguments).images, args)


def _from_server(args: argparse.Namespace, arguments: dict[str, Any]) -> Any:
    _check_server(
        args, "lora", "device", "dtype", "int8", "compile", "negative_prompt", "class_labels", "negative_class_labels"
    )
    import torch

    from unified.serving.remote import RemotePipeline

    if args.threads is not None:  # images are decoded here
        torch.set_num_threads(args.threads)
    options = {each.name: arguments[each.name] for each in fields(GenerationOptions) if each.name in arguments}
    with RemotePipeline(args.pipeline, args.server, api_key=os.environ.get(API_KEY)) as remote:
        return remote(args.prompt, GenerationOptions.from_mapping(options), args.seed).images


def _check_server(args: argparse.Namespace, *names: str) -> None:
    """Raises ValueError for options that another engine's server does not have."""
    for name in names:
        if getattr(args, name):
            raise ValueError(f"{name}: it cannot be chosen for a server; leave it out, or leave out --server.")


def _inpaint(args: argparse.Namespace) -> None:
    from unified_tokenizers.images import read_image

    arguments = _image_arguments(args)
    arguments |= {"image": read_image(args.image), "mask_image": read_image(args.mask)}
    pipe = _load(args)
    _save(pipe, pipe.inpaint(**arguments).images, args, "inpaint")


def _caption(args: argparse.Namespace) -> None:
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


def _chat(args: argparse.Namespace) -> None:
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


def _export(args: argparse.Namespace) -> None:
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


def _serve(args: argparse.Namespace) -> None:
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
    from unified.serving.web import serve, serve_remote

    check_installed()
    if args.server is not None:
        _check_server(args, "lora", "loras", "device", "dtype")
        import torch

        from unified.serving.remote import RemotePipeline

        if args.threads is not None:  # images are decoded here
            torch.set_num_threads(args.threads)
        key = os.environ.get(API_KEY)
        with RemotePipeline(args.pipeline, args.server, concurrency=args.max_rows, api_key=key) as remote:
            serve_remote(
                remote, args.queue, args.per_client, host=args.host, server_port=port, allow_hosts=args.allow_host,
                password=args.password,
            )  # fmt: skip
        return
    chosen, args.lora = args.lora, None  # loaded by name, with the others
    serve(
        _load(args), args.loras, chosen, args.max_rows, args.queue, args.per_client,
        host=args.host, server_port=port, allow_hosts=args.allow_host, password=args.password,
    )  # fmt: skip
