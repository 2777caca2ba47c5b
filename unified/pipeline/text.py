"""What a pipeline writes: captions of images, and replies of texts and images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from unified.conversation import Turn
from unified.decoding import Sampling
from unified.lora.base import base_of
from unified.pipeline.arguments import Generators, check_prompt, check_sampling, code_grid, per_image
from unified.pipeline.base import BasePipeline, one_at_a_time
from unified.pipeline.chat import (
    Conversation,
    as_conversation,
    as_messages,
    as_segments,
    check_sizes,
    continue_conversations,
    stream_conversation,
)
from unified.pipeline.editing import as_images
from unified.pipeline.options import GenerationOptions
from unified.sequence import Segment, TextSegment


class TextMixin(BasePipeline):
    """The methods of a pipeline that reply with text: captions and chat."""

    @one_at_a_time
    def caption(
        self,
        images: Image.Image | Sequence[Image.Image],
        prompt: str | None = None,
        max_new_tokens: int = 32,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: Generators = None,
    ) -> list[str]:
        """Texts for images: ``<bos> <boi> codes <eoi> prompt`` and what the model writes until ``<eos>``.

        A model with a vision encoder reads features in place of codes.

        Args:
            images: one image or several, of sizes that the model was trained on.
            prompt: how the text begins; it is not part of the result.
            max_new_tokens: tokens after which a text is cut off.
            temperature, top_k, top_p: see :class:`unified.decoding.Sampling`; ``top_k=1`` takes the likeliest token.
            generator: one per image, or one for all as in :meth:`__call__`.

        Raises:
            ValueError: for images of a size the model does not know, an empty prompt, or a context that is too long.
        """
        if prompt is not None:
            check_prompt(prompt)
        begin = () if prompt is None else (prompt,)
        conversations = [Conversation([Turn("user", (image, *begin))]) for image in as_images(images, "images")]
        sampling = Sampling(1.0, temperature, top_k, top_p)
        replies = self._replies(conversations, (1, 1), max_new_tokens, 0, sampling, Sampling(), generator, None)
        return [" ".join(message for message in reply if isinstance(message, str)) for reply in replies]

    @one_at_a_time
    def chat(
        self,
        messages: Sequence[Any],
        max_new_tokens: int = 64,
        max_images: int = 1,
        text_sampling: Sampling | None = None,
        image_sampling: Sampling | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        callback_on_text: Callable[[str], None] | None = None,
    ) -> list[Any]:
        """Continue conversations of texts and images with texts and images.

        Args:
            messages: in transformers' format, ``[{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text",
                "text": "..."}]}, ...]``; or texts and PIL images, which a model that was trained on conversations (``kind: chat``)
                reads as one turn of the user, and any other one after the other; or a list of such conversations.
            max_new_tokens, max_images: how much a reply may hold at most.
            text_sampling, image_sampling: how text and codes are sampled; guidance applies to images, which are sampled as
                in :meth:`__call__` by default.
            height, width: size of the images in a reply.
            generator: one per conversation, or one for all as in :meth:`__call__`.
            callback_on_text: called as ``f(text)`` with the text so far whenever the first reply's text grows.

        Returns:
            The reply as a list of texts and images, or one reply per conversation.

        Raises:
            ValueError: for anything but texts and images, or a conversation that does not fit the model's context.
        """
        # 1. Check inputs
        text_sampling, image_sampling = self._reply_sampling(text_sampling, image_sampling, height, width)
        one = (str, Image.Image, Mapping)
        several = isinstance(messages, Sequence) and bool(messages) and not isinstance(messages[0], one)
        config = base_of(self.model).config
        given = [as_conversation(each, config, self.text_tokenizer) for each in (messages if several else [messages])]
        grid = self._reply_grid(max_images, height, width)

        # 2. Reply
        replies = self._replies(
            given, grid, max_new_tokens, max_images, text_sampling, image_sampling, generator, callback_on_text
        )
        return replies if several else replies[0]

    def stream_chat(
        self,
        messages: Sequence[Any],
        max_new_tokens: int = 64,
        max_images: int = 1,
        text_sampling: Sampling | None = None,
        image_sampling: Sampling | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
    ) -> Iterator[list[Any]]:
        """Continue one conversation and show the reply on the way; other calls may come in between.

        Arguments as for :meth:`chat`.

        Returns:
            An iterator over replies so far, whenever a text has grown or an image is whole; the last one is that of :meth:`chat`.

        Raises:
            ValueError: as :meth:`chat`.
        """
        with self.lock:
            text_sampling, image_sampling = self._reply_sampling(text_sampling, image_sampling, height, width)
            config = base_of(self.model).config
            given = as_conversation(messages, config, self.text_tokenizer)
            check_sizes(given.images, config, self.image_tokenizer.downsample)
            grid = self._reply_grid(max_images, height, width)
            read = as_segments(given, self.image_tokenizer, self.text_tokenizer, self.vision_encoder)
            replies = stream_conversation(
                self.decoder(), read, grid, self.text_tokenizer, per_image(generator, 1)[0], text_sampling,
                image_sampling, max_new_tokens, max_images,
            )  # fmt: skip
        return self._growing(replies)

    def _reply_sampling(
        self, text: Sampling | None, image: Sampling | None, height: int | None, width: int | None
    ) -> tuple[Sampling, Sampling]:
        """How texts and images of a reply are sampled, with the defaults filled in."""
        check_sampling(text, "text_sampling")
        check_sampling(image, "image_sampling")
        options = GenerationOptions(height, width)
        return text or Sampling(), image or options.filled(self.sampling).sampling

    def _reply_grid(self, max_images: int, height: int | None, width: int | None) -> tuple[int, int]:
        """The code grid of the images in a reply; any for a reply without images."""
        if max_images == 0 and height is None and width is None:
            return 1, 1
        return code_grid(base_of(self.model).config, self.image_tokenizer.downsample, height, width)

    def _growing(self, replies: Iterator[list[Segment]]) -> Iterator[list[Any]]:
        """Texts and images of a growing reply, each image decoded once; the lock is free in between."""
        images: dict[int, list[Any]] = {}
        shown: list[int] | None = None
        while True:
            with self.lock:
                reply = next(replies, None)
                if reply is None:
                    return
                sizes = [len(part.ids) if isinstance(part, TextSegment) else 0 for part in reply]
                if sizes == shown:
                    continue
                shown, messages = sizes, list[Any]()
                for place, part in enumerate(reply):
                    made = images.get(place) or as_messages([part], self.image_tokenizer, self.text_tokenizer)
                    if not isinstance(part, TextSegment):
                        images[place] = made
                    messages += made
            yield messages

    def _replies(
        self,
        conversations: Sequence[Conversation],
        grid: tuple[int, int],
        max_new_tokens: int,
        max_images: int,
        text_sampling: Sampling,
        image_sampling: Sampling,
        generator: Generators,
        on_text: Callable[[str], None] | None,
    ) -> list[list[Any]]:
        """Texts and images of the reply in each conversation; needs the lock."""
        for each in conversations:  # before any image is encoded
            check_sizes(each.images, base_of(self.model).config, self.image_tokenizer.downsample)
        read = [
            as_segments(each, self.image_tokenizer, self.text_tokenizer, self.vision_encoder) for each in conversations
        ]
        replies = continue_conversations(
            self.decoder(), read, grid, self.text_tokenizer, per_image(generator, len(read)), text_sampling,
            image_sampling, max_new_tokens, max_images, on_text=on_text,
        )  # fmt: skip
        return [as_messages(reply, self.image_tokenizer, self.text_tokenizer) for reply in replies]
