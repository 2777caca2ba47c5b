"""What the tabs of the page share: the engine that answers, visitors' turns, and how a job is shown while it runs. Needs gradio."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from PIL import Image

from unified.config import UnifiedConfig
from unified.lora.base import base_of
from unified.serving.engine import Engine, Job
from unified.serving.remote_engine import RemoteEngine

if TYPE_CHECKING:
    from unified.serving.guard import Visitors  # which needs what comes with gradio

PROMPT_LIMIT = 300  # characters
IMAGES_LIMIT = 4
PATIENCE = 0.5  # seconds after which a page that was stopped is let go
NO_ADAPTER = "none"
NO_CLASS = -1  # to steer away from


@dataclass(frozen=True)
class Desk:
    """Where the requests of a page are answered.

    Args:
        engine: what answers.
        visitors: whose turn it is.
    """

    engine: Engine | RemoteEngine
    visitors: "Visitors"

    @property
    def pipe(self) -> Any:
        """The engine's pipeline."""
        return self.engine.pipe

    @property
    def remote(self) -> bool:
        """Whether a server's engine answers, which generates images from prompts and nothing else."""
        return isinstance(self.engine, RemoteEngine)

    @cached_property
    def config(self) -> UnifiedConfig:
        """That of the model."""
        found: UnifiedConfig = self.pipe.config if self.remote else base_of(self.pipe.model).config
        return found

    @cached_property
    def classes(self) -> list[tuple[str, int]] | None:
        """As :func:`class_choices`."""
        return class_choices(self.config)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images, pixels."""
        height, width = self.pipe.default_size
        return height, width

    @property
    def guided(self) -> bool:
        """Whether images can be generated with guidance."""
        return not isinstance(self.engine, RemoteEngine) or (self.engine.guided and not self.config.null_prompt)

    def wanted(self, subject: Any, negative: Any = None) -> dict[str, Any]:
        """What images show, as arguments of the pipeline: a prompt, or the number of a class.

        Raises:
            ValueError: if no class is chosen.
        """
        if self.classes is None:
            return {"prompt": subject, "negative_prompt": negative or None}
        if subject is None:
            raise ValueError("class: none is chosen; choose one.")
        return {"class_labels": subject, "negative_class_labels": None if negative == NO_CLASS else negative}

    def in_words(self, subject: Any) -> str:
        """A prompt, or the name of a class."""
        return subject if self.classes is None else f"class {self.classes[subject][0]}"

    @contextmanager
    def answering(self, request: Any) -> Iterator[None]:
        """The turn of a ``gradio.Request``, and its errors as the page shows them: mistakes in words, any other without detail."""
        import gradio

        try:
            with self.visitors.turn(request.client.host, request.session_hash or ""):
                yield
        except ValueError as error:
            raise gradio.Error(str(error), duration=None, print_exception=False) from error
        except Exception as error:  # gradio prints it on the server
            raise gradio.Error("server: something went wrong; its log says what.", duration=None) from error


def followed(job: Job, show: Callable[[Any], Any], parts: int = 1) -> Iterator[Any]:
    """What the page shows of a job, in ``parts`` and a status; the job is cancelled when the page is closed or stopped."""
    import gradio

    same = [gradio.skip()] * parts
    try:
        yield *same, f"Waiting: {job.ahead} before you." if job.ahead else "Working ..."
        for output in job.previews(PATIENCE):
            yield (*same, job.note or gradio.skip()) if output is None else show(output)
    except CancelledError:
        yield *same, "Stopped."
    finally:
        job.cancel()


def class_choices(config: UnifiedConfig) -> list[tuple[str, int]] | None:
    """Names and numbers of the classes of a class-conditional model, by number; None of any other model.

    A name that several classes share, and none, is told apart by the number.
    """
    if config.classes is None:
        return None
    names = config.class_names or ["class"] * config.classes
    counts = Counter(names)
    return [(name if counts[name] == 1 else f"{name} {number}", number) for number, name in enumerate(names)]


def adapter_of(lora: str) -> str | None:
    """The adapter that is chosen, by name."""
    return None if lora == NO_ADAPTER else lora


def weights_of(lora: str) -> dict[str, float]:
    """The adapter that is chosen, and its weight."""
    return {} if lora == NO_ADAPTER else {lora: 1.0}


def stored(image: Image.Image, cache: str) -> str:
    """Path of an image in gradio's cache. Gradio itself writes one again that is there, while a browser may be reading it."""
    from gradio.processing_utils import encode_pil_to_bytes, hash_bytes

    data = encode_pil_to_bytes(image, "png")
    path = Path(cache) / hash_bytes(data) / "image.png"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(uuid4().hex)
        part.write_bytes(data)
        part.replace(path)
    return str(path)


def progress_text(codes: torch.Tensor, about: str) -> str:
    """How far images ``(N, h, w)`` are, and how they were made."""
    share = float((codes >= 0).float().mean())
    return f"Done: {about}." if share == 1 else f"Generating ... {share:.0%}"


def check_request(prompt: str, negative: str, seed: float, count: float) -> None:
    """Refuse what a public page does not allow.

    Raises:
        ValueError: for texts above :data:`PROMPT_LIMIT`, more than :data:`IMAGES_LIMIT` images, or no whole seed.
    """
    for name, text in (("prompt", prompt), ("negative prompt", negative)):
        if len(text or "") > PROMPT_LIMIT:
            raise ValueError(f"{name}: {len(text)} characters, at most {PROMPT_LIMIT} are allowed here; shorten it.")
    if not 1 <= count <= IMAGES_LIMIT or count != int(count):
        raise ValueError(f"images: {count} must be a whole number from 1 to {IMAGES_LIMIT}.")
    if seed is None or not 0 <= seed < 2**63 or seed != int(seed):
        raise ValueError(f"seed: {seed} must be a whole number that is not negative.")
