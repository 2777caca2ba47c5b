"""Images to text, and text and images in turn."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from reprlib import repr as short
from typing import Any, NamedTuple

import torch
from PIL import Image

from unified.config import UnifiedConfig
from unified.conversation import Turn, conversation_segments, read_messages, template_of
from unified.data.crops import fit, nearest_aspect
from unified.decoding import Prompt, Sampling
from unified.decoding.batch_rows import Request
from unified.decoding.continuous_batching import Batcher
from unified.decoding.decoder import Decoder
from unified.decoding.passes import image_columns
from unified.decoding.prefill import prompt_columns
from unified.model.vision import VisionEncoder
from unified.pipeline.arguments import check_unicode, image_prompt, trained_grids
from unified.pipeline.options import check_whole
from unified.prediction.frame import image_length
from unified.prediction.merge import Grid
from unified.sequence import FeatureSegment, ImageSegment, Segment, TextSegment, build_sequence
from unified_tokenizers import ImageTokenizer, TextTokenizer
from unified_tokenizers.images import load_pixels, to_pil, to_tensor

Message = str | Image.Image


class Conversation(NamedTuple):
    """Turns of texts and images, and the template that they are written in; None for one after the other."""

    turns: list[Turn]
    template: str | None = None

    @property
    def parts(self) -> list[Any]:
        """All texts and images in their order."""
        return [part for turn in self.turns for part in turn.parts]

    @property
    def images(self) -> list[Image.Image]:
        """Its images."""
        return [part for part in self.parts if isinstance(part, Image.Image)]


def as_conversation(messages: Any, config: UnifiedConfig, text_tokenizer: TextTokenizer) -> Conversation:
    """Messages of one conversation: in transformers' format with roles, or texts and images.

    Without roles they are one turn of the user for a model that was trained on conversations, and stand one after the other for
    any other.

    Raises:
        ValueError: for an empty conversation, an empty text, anything but texts and images, as
            :func:`unified.conversation.read_messages` and :func:`unified.conversation.template_of`, or if the assistant spoke
            last.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages: {short(messages)} is not a conversation; give a list of texts and PIL images.")
    if any(isinstance(message, Mapping) for message in messages):
        conversation = Conversation(read_messages(messages), template_of(config, text_tokenizer))
        if conversation.turns[-1].role == "assistant":
            raise ValueError(
                "messages: the assistant spoke last, there is nothing to reply to; end with a turn of the user."
            )
    else:
        conversation = Conversation([Turn("user", tuple(messages))], config.chat_template)
    for part in conversation.parts:
        if isinstance(part, Image.Image):
            load_pixels(part, "messages")
        elif isinstance(part, str) and part.strip():
            check_unicode(part, "messages")
        else:
            raise ValueError(f"messages: {short(part)} is neither a text nor a PIL image.")
    return conversation


def as_segments(
    conversation: Conversation,
    image_tokenizer: ImageTokenizer,
    text_tokenizer: TextTokenizer,
    vision: VisionEncoder | None = None,
) -> list[Segment]:
    """A conversation as segments up to where the model replies, its images encoded.

    They are read by their features where the model has a vision encoder, but for those of the assistant.
    """

    def coded_part(part: Any, role: str) -> Any:
        if isinstance(part, str):
            return part.strip()
        pixels = to_tensor([part])
        if vision is not None and role != "assistant":
            return FeatureSegment(vision(pixels)[0].cpu())
        return image_tokenizer.encode(pixels)[0].cpu()

    coded = [Turn(turn.role, tuple(coded_part(part, turn.role) for part in turn.parts)) for turn in conversation.turns]
    if conversation.template is not None:
        return conversation_segments(coded, text_tokenizer, conversation.template, reply=True)
    return [
        TextSegment(text_tokenizer.encode(part), loss=False)
        if isinstance(part, str)
        else part
        if isinstance(part, FeatureSegment)
        else ImageSegment(part, loss=False)
        for turn in coded
        for part in turn.parts
    ]


def continue_conversations(
    decoder: Decoder,
    conversations: Sequence[Sequence[Segment]],
    grid: Grid,
    text_tokenizer: TextTokenizer,
    generators: Sequence[torch.Generator],
    text_sampling: Sampling,
    image_sampling: Sampling,
    max_new_tokens: int,
    max_images: int,
    batch_size: int = 16,
    on_text: Callable[[str], None] | None = None,
) -> list[list[Segment]]:
    """The model's reply in each conversation; texts and images of all rows are generated in one batch.

    ``on_text`` is called with the text so far whenever that of the first conversation grows.

    Raises:
        ValueError: if a limit is not a whole number, or a conversation does not fit the model's context.
    """
    batcher, requests = _begin(
        decoder, conversations, grid, text_tokenizer, generators, text_sampling, image_sampling, max_new_tokens,
        max_images, batch_size,
    )  # fmt: skip

    def show() -> None:
        if on_text is not None and (ids := batcher.written(requests[0])):
            on_text(text_tokenizer.decode(ids))

    replies = batcher.run(requests, show)
    if on_text is not None and replies[0] and isinstance(replies[0][-1], TextSegment):
        on_text(text_tokenizer.decode(replies[0][-1].ids))  # with the token that ended it
    _spend(generators)
    return replies


def stream_conversation(
    decoder: Decoder, segments: Sequence[Segment], grid: Grid, text_tokenizer: TextTokenizer, generator: torch.Generator,
    text_sampling: Sampling, image_sampling: Sampling, max_new_tokens: int, max_images: int,
) -> Iterator[list[Segment]]:  # fmt: skip
    """The model's reply in one conversation as far as it is, after every step; the last one is complete.

    Raises:
        ValueError: as :func:`continue_conversations`, before the first step.
    """
    batcher, (request,) = _begin(
        decoder,
        [segments],
        grid,
        text_tokenizer,
        [generator],
        text_sampling,
        image_sampling,
        max_new_tokens,
        max_images,
        1,
    )
    batcher.submit(request)

    def steps() -> Iterator[list[Segment]]:
        while batcher.busy:
            done = dict(batcher.step())
            if batcher.failed:
                raise batcher.failed[request]
            yield done[request] if request in done else batcher.so_far(request)
        _spend([generator])

    return steps()


def _begin(
    decoder: Decoder, conversations: Sequence[Sequence[Segment]], grid: Grid, text_tokenizer: TextTokenizer,
    generators: Sequence[torch.Generator], text_sampling: Sampling, image_sampling: Sampling, max_new_tokens: int,
    max_images: int, batch_size: int,
) -> tuple[Batcher, list[Request]]:  # fmt: skip
    """A batch with room for conversations, and the requests to be run in it. Raises as :func:`continue_conversations`."""
    check_whole("max_new_tokens", max_new_tokens)
    check_whole("max_images", max_images, least=0)
    config = decoder.model.config
    negative = image_prompt("", text_tokenizer, config, grid)
    requests = []
    for segments, generator in zip(conversations, generators, strict=True):
        sequence = build_sequence(segments, config.vocabulary)
        prompt = Prompt(
            tuple(sequence.input_ids.tolist()), tuple(sequence.image_grids), features=tuple(sequence.features)
        )
        requests.append(Request(prompt, grid, generator, image_sampling, text_sampling, negative, max_new_tokens,
                                max_images, text_tokenizer.vocab_size))  # fmt: skip
    new = max_new_tokens + (max_images and max_images * (image_length(config, grid) + 2))
    longest = max(len(request.prompt.ids) for request in requests)
    limit = config.text_config.max_position_embeddings
    if longest + new > limit:
        raise ValueError(
            f"messages: {longest} tokens and up to {new} new ones, the model has room for {limit}; "
            "shorten the conversation or lower max_new_tokens or max_images."
        )
    rows = min(batch_size, len(requests)) * requests[0].rows
    room = max(prompt_columns(decoder.model, request.prompt) for request in requests) + max_new_tokens
    room += max_images and max_images * image_columns(decoder.model, grid)
    return Batcher(decoder, rows, room), requests


def _spend(generators: Sequence[torch.Generator]) -> None:
    """Texts are sampled from copies of the generators; the next call shall reply differently."""
    for generator in generators:
        torch.rand((), generator=generator, device=generator.device)


def as_messages(
    segments: Sequence[Segment], image_tokenizer: ImageTokenizer, text_tokenizer: TextTokenizer
) -> list[Message]:
    """Segments as texts and images; a text without visible characters is no message."""
    messages: list[Message] = []
    for segment in segments:
        if isinstance(segment, ImageSegment):
            messages += to_pil(image_tokenizer.decode(segment.codes[None]))
        elif isinstance(segment, TextSegment) and (text := text_tokenizer.decode(segment.ids).strip()):
            messages.append(text)
    return messages


def check_sizes(images: Sequence[Image.Image], config: UnifiedConfig, stride: int) -> None:
    """Refuse images whose grid the model was not trained on."""
    known = [(h * stride, w * stride) for h, w in trained_grids(config)] if config.image_grids else []
    for image in images:
        if known and (image.height, image.width) not in known:
            raise ValueError(
                f"image: {image.height}x{image.width} is not a size that the model was trained on "
                f"({', '.join(f'{h}x{w}' for h, w in known)}); see unified.data.crops.fit."
            )


def fit_image(image: Image.Image, config: UnifiedConfig, stride: int) -> Image.Image:
    """An image scaled and cropped to the most similar size that the model was trained on; any image if it names none.

    Raises:
        ValueError: if it is smaller, and would have to be made up.
    """
    sizes = [(h * stride, w * stride) for h, w in config.image_grids or []]
    if not sizes:
        return image
    height, width = nearest_aspect(image, sizes)
    if image.height < height or image.width < width:
        raise ValueError(
            f"image: {image.height}x{image.width} is too small, the model reads {height}x{width}; give a larger one."
        )
    return fit(image, (height, width))


def message(role: str, *parts: str | Image.Image) -> dict[str, Any]:
    """A turn in transformers' format."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return {"role": role, "content": content}
