"""A request of continuous batching, and where it stands: the row that it takes, the image that is being generated."""

from dataclasses import dataclass, field

import torch

from unified.decoding.config import Sampling
from unified.decoding.decoder import Decoder
from unified.decoding.passes import image_passes
from unified.decoding.prefill import Prompt
from unified.decoding.sampling import PositionNoise
from unified.prediction.merge import Grid
from unified.sequence import ImageSegment, Segment, TextSegment


@dataclass(eq=False)
class Request:
    """What to continue, and how far.

    Args:
        prompt: the row; if it ends with ``<boi>`` an image comes first, else text.
        grid: code grid of its images.
        generator: seeds its text; an image is the one that :func:`unified.decoding.iterate_codes` samples with it.
        image_sampling, text_sampling: how codes and text tokens are sampled.
        negative: the unconditional row, ending with ``<boi>``; needed if ``image_sampling.guided``.
        max_new_tokens: text tokens that it may write; 0 ends the row with its first image.
        max_images: images that it may generate; text cannot open another one after that.
        text_ids: size of the text tokenizer's vocabulary, where the model's is larger; None for all of the model's.
    """

    prompt: Prompt
    grid: Grid
    generator: torch.Generator
    image_sampling: Sampling = field(default_factory=Sampling)
    text_sampling: Sampling = field(default_factory=Sampling)
    negative: Prompt | None = None
    max_new_tokens: int = 0
    max_images: int = 1
    text_ids: int | None = None

    @property
    def rows(self) -> int:
        """Rows of the batch that it takes."""
        return 2 if self.image_sampling.guided and self.max_images else 1


class Row:
    """A request in the batch: where it stands and what it has generated."""

    def __init__(self, request: Request, indices: list[int], decoder: Decoder):
        self.request, self.indices, self.decoder = request, indices, decoder
        generator = request.generator.clone_state()
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
        text_ids = decoder.model.config.vocabulary.text_vocab_size
        self.text_noise = PositionNoise([torch.Generator().manual_seed(seed)], text_ids, decoder.model.device)
        self.image: GrowingImage | None = None  # being generated
        self.segments: list[Segment] = []
        self.text: list[int] = []
        self.written = self.images = 0
        self.first = 0  # column of the cache where it begins
        self.position = [0.0, 0.0]  # next coordinate of the row and of its unconditional side
        self.states = torch.empty(0)  # (sides, T, D) final states of what it ran last
        self.next: int | None = None  # a token that has to follow
        self.finished = False

    def open_image(self) -> None:
        """The next positions are those of an image."""
        self.image = GrowingImage(self.request, self.decoder, self.position[: len(self.indices)])

    def end_image(self) -> None:
        """All codes are sampled; they still have to run if something follows."""
        assert self.image is not None
        codes = self.image.codes[0].cpu().reshape(self.request.grid)
        self.segments.append(ImageSegment(codes))
        self.images += 1
        self.finished = self.written >= self.request.max_new_tokens

    def close_image(self) -> None:
        """All codes have run."""
        assert self.image is not None
        self.position[0] += self.image.passes.advance
        self.image = None
        self.next = self.decoder.model.config.eoi_token_id

    def close_text(self) -> None:
        """The text so far becomes a segment; none without any."""
        if self.text:
            self.segments.append(TextSegment(self.text))
        self.text = []


class GrowingImage:
    """An image of a row: its passes, and its codes ``(1, h*w)``, -1 where none is yet."""

    def __init__(self, request: Request, decoder: Decoder, starts: list[float]):
        model, steps = decoder.model, request.grid[0] * request.grid[1]
        self.codes = torch.full((1, steps), -1, device=model.device)
        self.passes = image_passes(model, request.grid, [request.generator], self.codes)
        self.scales = request.image_sampling.scales(steps)
        self.noise = PositionNoise([request.generator], model.config.codebook_size, model.device)
        start = torch.tensor(starts, device=model.device)[:, None, None]
        self.places = decoder.positions(start + self.passes.offsets)  # (sides, L, ...)
        self.group = 0  # the group that is sampled next
        self.ran = 0  # positions that have run

    @property
    def complete(self) -> bool:
        """Whether all codes are sampled."""
        return self.group == len(self.passes.groups)

    @property
    def ready(self) -> bool:
        """Whether the next group can be sampled: its positions have run."""
        return not self.complete and self.ran == self.passes.groups[self.group].asking[1]

    def running(self) -> tuple[range, range]:
        """Positions of codes and of queries that run next."""
        if self.complete:
            return range(self.ran, len(self.passes.seen)), range(0)
        group = self.passes.groups[self.group]
        return range(*group.entering), range(*group.asking)
