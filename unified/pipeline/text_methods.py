"""The pipeline's methods that write text: captions, and conversations of texts and images."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from PIL import Image

from unified.decoding import Sampling
from unified.decoding.decoder import Decoder
from unified.lora.adapters import base_of
from unified.model.modeling import UnifiedForCausalLM
from unified.pipeline.arguments import GUIDANCE_SCALE, as_prompts, check_call, known_grid, per_image
from unified.pipeline.chat import as_messages, as_segments, check_sizes, continue_conversations
from unified.pipeline.editing import as_images
from unified_tokenizers import ImageTokenizer, TextTokenizer


class TextMethods:
    """Write captions and continue conversations with a pipeline's model."""

    model: UnifiedForCausalLM | PeftModel
    image_tokenizer: ImageTokenizer
    text_tokenizer: TextTokenizer

    def _decoder(self) -> Decoder:
        raise NotImplementedError

    def caption(
        self,
        images: Image.Image | Sequence[Image.Image],
        prompt: str | None = None,
        max_new_tokens: int = 32,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> list[str]:
        """Texts for images: ``<bos> <boi> codes <eoi> prompt`` and what the model writes until ``<eos>``.

        Args:
            images: one image or several, of sizes that the model was trained on.
            prompt: how the text begins; it is not part of the result.
            max_new_tokens: tokens after which a text is cut off.
            temperature, top_k, top_p: see :class:`unified.decoding.Sampling`; ``top_k=1`` takes the likeliest token.
            generator: one per image, or one for all as in :meth:`unified.UnifiedPipeline.__call__`.

        Raises:
            ValueError: for images of a size the model does not know, an empty prompt, or a context that is too long.
        """
        begin = [] if prompt is None else as_prompts([prompt])
        conversations = [[image, *begin] for image in as_images(images, "images")]
        replies = self.chat(
            conversations, max_new_tokens, 0, Sampling(1.0, temperature, top_k, top_p), generator=generator
        )
        return [" ".join(message for message in reply if isinstance(message, str)) for reply in replies]

    def chat(
        self,
        messages: Sequence[Any],
        max_new_tokens: int = 64,
        max_images: int = 1,
        text_sampling: Sampling | None = None,
        image_sampling: Sampling | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> list[Any]:
        """Continue conversations of texts and images with texts and images.

        Args:
            messages: texts and PIL images in turn, or a list of such conversations.
            max_new_tokens, max_images: how much a reply may hold at most.
            text_sampling, image_sampling: how text and codes are sampled; guidance applies to images, which have the
                default scale of :meth:`unified.UnifiedPipeline.__call__`.
            height, width: size of the images that it draws.
            generator: one per conversation, or one for all as in :meth:`unified.UnifiedPipeline.__call__`.

        Returns:
            The reply as a list of texts and images, or one reply per conversation.

        Raises:
            ValueError: for anything but texts and images, or a conversation that does not fit the model's context.
        """
        check_call(text_sampling=text_sampling, image_sampling=image_sampling)
        several = isinstance(messages, Sequence) and bool(messages) and not isinstance(messages[0], str | Image.Image)
        conversations = list(messages) if several else [messages]
        config, stride = base_of(self.model).config, self.image_tokenizer.downsample
        pictures = [
            m for each in conversations if isinstance(each, list | tuple) for m in each if isinstance(m, Image.Image)
        ]
        check_sizes(pictures, config, stride)  # before they are encoded
        read = [as_segments(each, self.image_tokenizer, self.text_tokenizer) for each in conversations]
        draws = max_images != 0 or height is not None or width is not None
        grid = known_grid(config, stride, height, width) if draws else (1, 1)
        replies = continue_conversations(
            self._decoder(), read, grid, self.text_tokenizer,
            per_image(generator, len(read)), text_sampling or Sampling(), image_sampling or Sampling(GUIDANCE_SCALE),
            max_new_tokens, max_images,
        )  # fmt: skip
        shown = [as_messages(reply, self.image_tokenizer, self.text_tokenizer) for reply in replies]
        return shown if several else shown[0]
