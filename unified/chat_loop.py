"""``unified chat``: lines in, texts and images out, in turn."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from unified.decoding.config import Sampling
from unified.errors import MENDABLE
from unified.lora.adapters import base_of
from unified.pipeline.chat import check_sizes
from unified_tokenizers.images import read_image

if TYPE_CHECKING:
    from unified.pipeline.pipeline import UnifiedPipeline

HELP = """A line is a message; the model answers with text, images or both.
  /generate CAPTION  an image of a caption, whatever the model would answer
  /show FILE         give the model an image; say something about it in the next line
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
    messages: list[Any] = []
    print(HELP)
    for line in lines:
        command, _, rest = line.strip().partition(" ")
        before = list(messages)
        try:
            if not command:
                continue
            if command == "/quit":
                return
            if command == "/new":
                messages = []
            elif command == "/show":
                image = read_image(Path(rest.strip()).expanduser())
                check_sizes([image], base_of(pipe.model).config, pipe.image_tokenizer.downsample)
                messages.append(image)
            elif command == "/generate":
                made = pipe(rest.strip(), generator=generator).images[0]
                assert isinstance(made, Image.Image)
                messages += [rest.strip(), made]
                print(save(made, rest.strip()))
            elif command.startswith("/"):
                print(HELP)
            else:
                messages.append(line.strip())
                shown = Shown()
                reply = pipe.chat(
                    messages, max_new_tokens, max_images, text_sampling, generator=generator, callback_on_text=shown
                )
                shown.end()
                for message in reply:
                    if isinstance(message, Image.Image):
                        print(save(message, line.strip()))
                messages += reply
        except MENDABLE as error:
            messages = before
            print(f"unified chat: {' '.join(str(error).split())}")


class Shown:
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
