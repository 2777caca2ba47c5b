"""The command line, ``unified COMMAND ...`` or ``python -m unified COMMAND ...``: its options.

Only the standard library and tables are imported here, so that ``--help`` and mistakes answer at once. What commands do is in
:mod:`unified.commands`; those that are scripts of recipes/ and eval/ are named in :mod:`unified.scripts`.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unified import commands
from unified.decoding.config import DECODING_MODES, SCHEDULES
from unified.registry import add_import_argument, import_extensions
from unified.scripts import SCRIPTS, about, run_script

if TYPE_CHECKING:
    import torch

PASSWORD = "UNIFIED_PASSWORD"  # environment variable


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
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: object, about: str) -> argparse.ArgumentParser:
        added = subparsers.add_parser(name, help=about, description=about)
        added.set_defaults(run=run)
        added.add_argument("--pipeline", required=True, help="pipeline folder or Hub name")
        added.add_argument("--lora", help="folder of a LoRA adapter")
        added.add_argument("--device", type=_device, help="such as cuda (default: cpu)")
        added.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "auto"],
                           help="of the language model (default: float32)")  # fmt: skip
        added.add_argument("--threads", type=int, help="CPU threads (default: as torch chooses)")
        return added

    generate = command("generate", commands.generate, "Generate images for prompts or classes.")
    _image_options(generate)
    generate.add_argument("--height", type=int, help="pixels (default: the model's first size)")
    generate.add_argument("--width", type=int, help="pixels")
    generate.add_argument(
        "--server", metavar="URL", help="generate on an engine's OpenAI-compatible server; --pipeline is the folder of `unified "
        f"export` then; a key that it asks for is read from {commands.API_KEY} in the environment"
    )  # fmt: skip

    inpaint = command("inpaint", commands.inpaint, "Generate the bright part of a mask again.")
    _image_options(inpaint)
    inpaint.add_argument("--image", type=Path, required=True, help="image to change")
    inpaint.add_argument(
        "--mask", type=Path, required=True, help="white or transparent where it changes, black where it stays"
    )

    caption = command("caption", commands.caption, "Write captions for images, one line each.")
    caption.add_argument("images", type=Path, nargs="+", help="image files")
    caption.add_argument("--prompt", help="how the caption begins")
    caption.add_argument("--max-new-tokens", type=int, default=32, help="default: %(default)s")
    _sampling_options(caption, "1.0", "0", "1.0")
    caption.set_defaults(temperature=1.0, top_k=0, top_p=1.0)

    chat = command("chat", commands.chat, "Texts and images in turn; reads lines, /help lists what else it takes.")
    chat.add_argument("--out", type=Path, required=True, help="folder for the images; what is there stays")
    chat.add_argument("--max-new-tokens", type=int, default=64, help="of a reply (default: %(default)s)")
    chat.add_argument("--max-images", type=int, default=1, help="in a reply (default: %(default)s)")
    _sampling_options(chat, "1.0", "0", "1.0")
    chat.set_defaults(temperature=1.0, top_k=0, top_p=1.0)

    export = command("export", commands.export, "Write a plain checkpoint with one joint table, for other engines.")
    export.add_argument("--for", dest="engine", default="vllm", choices=["vllm"], help="default: %(default)s")
    export.add_argument("--out", type=Path, required=True, help="folder to write")

    serve = command("serve", commands.serve, "Start a web page; needs the extra 'demo'.")
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
        subparsers.add_parser(name, help=about(name), add_help=False)
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
