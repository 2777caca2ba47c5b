"""Load any image tokenizer that the library knows, from a weights file, a folder or the Hub."""

import re
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel, Emu3VQVAEConfig, PreTrainedConfig

from unified_tokenizers.base import ImageTokenizer
from unified_tokenizers.cosmos import CosmosConfig, CosmosTokenizer, cosmos_from_files
from unified_tokenizers.emu3 import Emu3Tokenizer
from unified_tokenizers.hub import check_config, local_folder, local_path, on_the_hub
from unified_tokenizers.layouts import vqgan_from_weights
from unified_tokenizers.vq_model import VQConfig, VQModel
from unified_tokenizers.vqgan import VQGAN, VQGANConfig
from unified_tokenizers.weights import HUB, PICKLES, cut_prefix, local_file, read_weights

for _config, _model in ((VQConfig, VQModel), (VQGANConfig, VQGAN), (CosmosConfig, CosmosTokenizer)):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)

# Folders that hold an image tokenizer and nothing else, by the model_type of their config.json.
_TOKENIZERS: dict[str, Any] = {
    VQConfig.model_type: VQModel,
    VQGANConfig.model_type: VQGAN,
    CosmosConfig.model_type: CosmosTokenizer,
    "emu3_vqgan": Emu3Tokenizer,
}
# Folders of a tokenizer in transformers' layout, and of whole models; ``multi_modality`` is Janus as DeepSeek published it.
_PUBLISHED = ("janus_vqgan", "chameleon_vqgan")
_WHOLE_MODELS = ("multi_modality", "janus", "emu3", "chameleon")
_COSMOS_NAME = re.compile(r"Cosmos-[\d.]*-?Tokenizer-D[IV]\d")  # NVIDIA's repositories, which hold TorchScript
_PREFIXES = ("gen_vision_model.", "model.vqmodel.", "vqmodel.")  # where whole models keep the tokenizer


def register_tokenizer(model_type: str, tokenizer: Any) -> None:
    """Let :class:`AutoImageTokenizer` open folders whose ``config.json`` has this ``model_type`` with a class.

    Raises:
        ValueError: if the name is taken, or the class is no module, or lacks ``from_pretrained`` or a method of
            :class:`ImageTokenizer`.
    """
    if model_type in (*_TOKENIZERS, *_PUBLISHED, *_WHOLE_MODELS):
        raise ValueError(f"tokenizer: {model_type!r} is taken; choose another model_type.")
    if not isinstance(tokenizer, type) or not issubclass(tokenizer, nn.Module):
        raise ValueError(f"tokenizer: {tokenizer!r} is no class of torch modules.")
    methods = [name for name, part in vars(ImageTokenizer).items() if callable(part) and not name.startswith("_")]
    missing = [name for name in (*methods, "from_pretrained") if not hasattr(tokenizer, name)]
    if missing:
        raise ValueError(
            f"tokenizer: {tokenizer.__name__} lacks {', '.join(missing)}; see unified_tokenizers.ImageTokenizer."
        )
    _TOKENIZERS[model_type] = tokenizer


class AutoImageTokenizer:
    """``AutoImageTokenizer.from_pretrained(path)`` returns the tokenizer that a file or folder holds."""

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | Path, quantizer: str | None = None, **kwargs: Any
    ) -> ImageTokenizer:
        """Load a tokenizer in evaluation mode.

        Args:
            pretrained_model_name_or_path: a folder written by ``save_pretrained``; a weights file of LlamaGen
                (``vq_ds16_*.pt``), Janus, Chameleon (``vqgan.ckpt``), IBQ, or Cosmos (``autoencoder.jit``), or a folder with one;
                a folder of Cosmos (``encoder.jit``, ``decoder.jit``) or Emu3.5's tokenizer; a model folder of Janus or Emu3;
                a name on the Hub, or a file there as ``hf-hub:owner/name/file``.
            quantizer: ``ibq`` for weights of IBQ, see :mod:`unified_tokenizers.layouts`; only for weights files.
            kwargs: options of transformers' ``from_pretrained``, for folders of a tokenizer alone.

        Raises:
            ValueError: if the path or the repository does not exist, or holds something other than a known image tokenizer.
        """
        name = str(pretrained_model_name_or_path)
        path = (
            local_file(name) if name.startswith(HUB) else local_path(pretrained_model_name_or_path, "image_tokenizer")
        )
        if path is None and _COSMOS_NAME.search(name):
            path = local_folder(name, "image_tokenizer", ("*.jit",))
        if path is not None and (path.suffix == ".jit" or any(path.glob("*.jit"))):
            return cosmos_from_files(path)
        if path is not None and not (path / "config.json").is_file():
            if path.is_dir() and not any(file.suffix in PICKLES for file in path.iterdir()):
                raise ValueError(
                    f"image_tokenizer: {name!r} has no config.json and no weights file; give a folder written by "
                    "save_pretrained."
                )
            return _from_weights_file(path, quantizer)
        if quantizer is not None:
            raise ValueError(f"quantizer: {quantizer!r} given for {name!r}, whose config.json says it; leave it out.")
        check_config(path or name, "image_tokenizer")
        with on_the_hub(name, "image_tokenizer"):
            config, _ = PreTrainedConfig.get_config_dict(path or name)
        kind = config.get("model_type")
        if not isinstance(kind, str):
            raise ValueError(f"image_tokenizer: model_type {kind!r} of {name!r} is no name of a model.")
        if kind in _TOKENIZERS:
            return _TOKENIZERS[kind].from_pretrained(path or name, **kwargs).eval()
        if kind in (*_PUBLISHED, *_WHOLE_MODELS):
            folder = path or local_folder(name, "image_tokenizer", ("*.json", "*.safetensors", "*.bin"))
            return _from_model_folder(folder, kind, config)
        raise ValueError(
            f"image_tokenizer: {name!r} is a {kind!r} model, not an image tokenizer "
            f"({', '.join([*_TOKENIZERS, *_PUBLISHED, *_WHOLE_MODELS])})."
        )


def _from_weights_file(path: Path, quantizer: str | None) -> ImageTokenizer:
    state = read_weights(path)
    within = cut_prefix(state, _PREFIXES)
    if quantizer is None and path.is_dir() and (path / "config.yaml").is_file():  # as Emu3.5 publishes its tokenizer
        quantizer = "ibq" if re.search(r"^n_embed:", (path / "config.yaml").read_text(encoding="utf-8"), re.M) else None
    state = {short: state[name] for short, name in within.items()} or state
    return vqgan_from_weights(state, str(path), quantizer=quantizer)


def _from_model_folder(folder: Path, kind: str, config: dict[str, Any]) -> ImageTokenizer:
    state = read_weights(folder, ("",) if kind in _PUBLISHED else _PREFIXES)
    if kind == "emu3":
        return Emu3Tokenizer.from_weights(Emu3VQVAEConfig(**config.get("vq_config", {})), state, str(folder))
    return vqgan_from_weights(state, str(folder), normalize_codes=not kind.startswith("chameleon"))
