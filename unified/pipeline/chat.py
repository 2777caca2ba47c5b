"""Images to text, and text and images in turn."""

from collections.abc import Callable, Sequence
from reprlib import repr as short
from typing import Any

import torch
from PIL import Image

from unified.config import UnifiedConfig
from unified.decoding import Prompt, Sampling
from unified.decoding.continuous_batching import Batcher, Request
from unified.decoding.decoder import Decoder
from unified.decoding.passes import image_columns
from unified.decoding.prefill import prompt_columns
from unified.pipeline.arguments import check_unicode, image_prompt, trained_grids
from unified.pipeline.options import check_whole
from unified.prediction.frame import image_length
from unified.prediction.merge import Grid
from unified.sequence import ImageSegment, Segment, TextSegment, build_sequence
from unified_tokenizers import ImageTokenizer, TextTokenizer
from unified_tokenizers.images import load_pixels, to_pil, to_tensor

Message = str | Image.Image


def as_segments(messages: Any, image_tokenizer: ImageTokenizer, text_tokenizer: TextTokenizer) -> list[Segment]:
    """Messages of one conversation as segments, none of them in the loss.

    Raises:
        ValueError: for an empty conversation, an empty text, or anything but texts and images.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages: {short(messages)} is not a conversation; give a list of texts and PIL images.")
    segments: list[Segment] = []
    for message in messages:
        if isinstance(message, Image.Image):
            load_pixels(message, "messages")
            segments.append(ImageSegment(image_tokenizer.encode(to_tensor([message]))[0].cpu(), loss=False))
        elif isinstance(message, str) and message.strip():
            check_unicode(message, "messages")
            segments.append(TextSegment(text_tokenizer.encode(message.strip()), loss=False))
        else:
            raise ValueError(f"messages: {short(message)} is neither a text nor a PIL image.")
    return segments


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
    check_whole("max_new_tokens", max_new_tokens)
    check_whole("max_images", max_images, least=0)
    config = decoder.model.config
    negative = image_prompt("", text_tokenizer, config, grid)
    requests = []
    for segments, generator in zip(conversations, generators, strict=True):
        sequence = build_sequence(segments, config.vocabulary)
        prompt = Prompt(tuple(sequence.input_ids.tolist()), tuple(sequence.image_grids))
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
    batcher = Batcher(decoder, rows, room)

    def show() -> None:
        if on_text is not None and (ids := batcher.written(requests[0])):
            on_text(text_tokenizer.decode(ids))

    replies = batcher.run(requests, show)
    if on_text is not None and replies[0] and isinstance(replies[0][-1], TextSegment):
        on_text(text_tokenizer.decode(replies[0][-1].ids))  # with the token that ended it
    for generator in generators:  # texts are sampled from copies; the next call shall reply differently
        torch.rand((), generator=generator, device=generator.device)
    return replies


def as_messages(
    segments: Sequence[Segment], image_tokenizer: ImageTokenizer, text_tokenizer: TextTokenizer
) -> list[Message]:
    """Segments as texts and images; a text without visible characters is no message."""
    messages: list[Message] = []
    for segment in segments:
        if isinstance(segment, ImageSegment):
            messages += to_pil(image_tokenizer.decode(segment.codes[None]))
        elif text := text_tokenizer.decode(segment.ids).strip():
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
