"""``unified chat``: lines in, texts and images out, in turn."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from unified.decoding.config import Sampling
from unified.errors import MENDABLE
from unified.lora.base import base_of
from unified.pipeline.chat import fit_image, message
from unified_tokenizers.images import read_image

if TYPE_CHECKING:
    from unified.pipeline.pipeline import UnifiedPipeline

Message = dict[str, Any]
HELP = """A line is a message; the model answers with text, images or both.
  /generate CAPTION  an image of a caption, whatever the model would answer
  /show FILE         give the model an image; ask about it in the next line
  /new               forget the conversation
  /quit              end"""


def chat_loop(
    pipe: "UnifiedPipeline",
    lines: Iterable[str],
    save: Callable[[Image.Image, str], Path],
    max_new_tokens: int,
    max_images: int,
    text_sampling: Sampling,
    generator: torch.Generator,
) -> None:
    """Answer lines until they end or one says ``/quit``. A line that cannot be answered says why and is forgotten.

    The conversation has roles for a model that was trained on such; any other one reads texts and images one after the other.

    Args:
        pipe: a pipeline that reads text.
        lines: what the user writes.
        save: writes an image that was generated for a prompt, and returns the file.
        max_new_tokens, max_images, text_sampling, generator: as in :meth:`UnifiedPipeline.chat`.

    Raises:
        ValueError: if the model reads no text.
    """
    if pipe.text_tokenizer is None:
        raise ValueError("pipeline: a model of classes reads no text; use `unified generate --class`.")
    pipe.set_progress_bar_config(disable=True)
    config, stride = base_of(pipe.model).config, pipe.image_tokenizer.downsample
    messages: list[Message] = []
    shown: list[Image.Image] = []  # images of the turn that the next line is
    print(HELP)
    for line in lines:
        command, _, rest = line.strip().partition(" ")
        before, shown_before = list(messages), list(shown)
        try:
            if not command:
                continue
            if command == "/quit":
                return
            if command == "/new":
                messages, shown = [], []
            elif command == "/show":
                shown.append(fit_image(read_image(Path(rest.strip()).expanduser()), config, stride))
            elif command == "/generate":
                made = pipe(rest.strip(), generator=generator).images[0]
                assert isinstance(made, Image.Image)
                messages += [message("user", *shown, rest.strip()), message("assistant", made)]
                shown = []
                print(save(made, rest.strip()))
            elif command.startswith("/"):
                print(HELP)
            else:
                messages.append(message("user", *shown, line.strip()))
                shown, written = [], Written()
                given = messages if config.chat_template is not None else without_roles(messages)
                reply = pipe.chat(
                    given, max_new_tokens, max_images, text_sampling, generator=generator, callback_on_text=written
                )
                written.end()
                for part in reply:
                    if isinstance(part, Image.Image):
                        print(save(part, line.strip()))
                messages += [message("assistant", *reply)] if reply else []
        except MENDABLE as error:
            messages, shown = before, shown_before
            print(f"unified chat: {' '.join(str(error).split())}")


def without_roles(messages: Iterable[Message]) -> list[str | Image.Image]:
    """Texts and images one after the other."""
    return [part[part["type"]] for each in messages for part in each["content"]]


class Written:
    """Prints a text as it grows; a text that does not go on from the one before begins a line."""

    def __init__(self) -> None:
        self.text = ""

    def __call__(self, text: str) -> None:
        """Print what is new. A character that is not whole yet waits."""
        text = text.removesuffix("\N{REPLACEMENT CHARACTER}")
        if not text.startswith(self.text):
            self.end()
        print(text[len(self.text) :], end="", flush=True)
        self.text = text

    def end(self) -> None:
        """End the line, if there is one."""
        if self.text:
            print()
        self.text = ""
