"""Image and text tokenizers: pictures and text to integers and back."""

from unified_tokenizers.auto import AutoImageTokenizer
from unified_tokenizers.base import ImageTokenizer
from unified_tokenizers.text import (
    SentencePieceTokenizer,
    TextTokenizer,
    TransformersTokenizer,
    load_text_tokenizer,
    train_sentencepiece,
)
from unified_tokenizers.vq_model import VQConfig, VQModel

__all__ = [
    "AutoImageTokenizer",
    "ImageTokenizer",
    "SentencePieceTokenizer",
    "TextTokenizer",
    "TransformersTokenizer",
    "VQConfig",
    "VQModel",
    "load_text_tokenizer",
    "train_sentencepiece",
]
