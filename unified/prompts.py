"""How a caption is written in front of an image: the template that a model was trained with, and what stands for no caption."""

import re
from dataclasses import dataclass

from unified.config import UnifiedConfig
from unified_tokenizers import TextTokenizer

CAPTION, HEIGHT, WIDTH = "{prompt}", "{height}", "{width}"


@dataclass(frozen=True)
class PromptFormat:
    """The text between ``<bos>`` and ``<boi>``, in training as in sampling.

    Args:
        template: text with ``{prompt}`` where a caption stands, and where they are wanted ``{height}`` and ``{width}`` of the
            image; special tokens of the tokenizer by their names. In a caption the same names are plain text.
        null: text in place of all that where there is no caption: what guidance steers away from. It may name sizes as well.
        null_repeats: whether ``null``, a single token, stands as often as the prompt that it replaces has tokens.
        code_pixels: side of a code in the unit of the sizes: the image tokenizer's stride for pixels.
    """

    template: str = CAPTION
    null: str = ""
    null_repeats: bool = False
    code_pixels: int = 1

    @classmethod
    def of(cls, config: UnifiedConfig) -> "PromptFormat":
        """The format that a model was trained with."""
        return cls(config.prompt_template, config.null_prompt, config.null_prompt_repeats, config.code_pixels)

    def caption_ids(self, caption: str, tokenizer: TextTokenizer, grid: tuple[int, int]) -> list[int]:
        """Ids of a caption in the template, in front of an image of the code grid ``grid``."""
        return template_ids(self._sized(self.template, grid), tokenizer, caption.strip())

    def null_ids(self, tokenizer: TextTokenizer, grid: tuple[int, int], length: int = 0) -> list[int]:
        """Ids in place of a prompt of ``length`` tokens. Raises ValueError if what repeats is not a single token."""
        ids = template_ids(self._sized(self.null, grid), tokenizer)
        if not self.null_repeats:
            return ids
        if len(ids) != 1:
            raise ValueError(
                f"null_prompt: {self.null!r} has {len(ids)} tokens; one that repeats must be a single token."
            )
        return ids * length

    def _sized(self, text: str, grid: tuple[int, int]) -> str:
        for name, codes in zip((HEIGHT, WIDTH), grid, strict=True):
            text = text.replace(name, str(codes * self.code_pixels))
        return text


PLAIN = PromptFormat()


def template_ids(text: str, tokenizer: TextTokenizer, caption: str = "") -> list[int]:
    """Ids of a template's text: special tokens are those that it names itself, not those that its caption spells."""
    special = tokenizer.special_tokens
    names = sorted((name for name in special if name and name in text), key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    ids: list[int] = []
    for part in parts:
        if part in special:
            ids.append(special[part])
        elif part := part.replace(CAPTION, caption):
            ids += tokenizer.encode(part)
    return ids
