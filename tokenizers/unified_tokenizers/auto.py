"""Load any image tokenizer of the library from a folder or the Hub."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel

from unified_tokenizers.base import ImageTokenizer
from unified_tokenizers.vq_model import VQConfig, VQModel

AutoConfig.register(VQConfig.model_type, VQConfig)
AutoModel.register(VQConfig, VQModel)


class AutoImageTokenizer:
    """``AutoImageTokenizer.from_pretrained(path)`` returns the tokenizer that the folder's ``config.json`` names."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> ImageTokenizer:
        """Load a tokenizer in evaluation mode.

        Raises:
            ValueError: if the folder does not exist or holds something other than an image tokenizer.
        """
        path = str(pretrained_model_name_or_path)
        if path.startswith((".", "/")) and not (Path(path) / "config.json").is_file():
            raise ValueError(f"image_tokenizer: {path!r} has no config.json; give a folder written by save_pretrained.")
        config = AutoConfig.from_pretrained(path)
        if not isinstance(config, VQConfig):
            raise ValueError(
                f"image_tokenizer: {path!r} is a {config.model_type!r} model, not an image tokenizer ({VQConfig.model_type!r})."
            )
        return VQModel.from_pretrained(path, **kwargs).eval()
