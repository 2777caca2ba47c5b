"""Image and text tokenizers: images and text to integers and back."""

from unified_tokenizers.auto import AutoImageTokenizer
from unified_tokenizers.base import ImageTokenizer
from unified_tokenizers.cosmos import CosmosConfig, CosmosTokenizer, cosmos_from_weights
from unified_tokenizers.emu3 import Emu3Tokenizer
from unified_tokenizers.layouts import vqgan_from_weights
from unified_tokenizers.text import (
    SentencePieceTokenizer,
    TextTokenizer,
    TransformersTokenizer,
    load_text_tokenizer,
    train_sentencepiece,
)
from unified_tokenizers.vq_model import VQConfig, VQModel
from unified_tokenizers.vqgan import VQGAN, VQGANConfig
from unified_tokenizers.weights import read_weights

__all__ = [
    "VQGAN",
    "AutoImageTokenizer",
    "CosmosConfig",
    "CosmosTokenizer",
    "Emu3Tokenizer",
    "ImageTokenizer",
    "SentencePieceTokenizer",
    "TextTokenizer",
    "TransformersTokenizer",
    "VQConfig",
    "VQGANConfig",
    "VQModel",
    "cosmos_from_weights",
    "load_text_tokenizer",
    "read_weights",
    "train_sentencepiece",
    "vqgan_from_weights",
]
