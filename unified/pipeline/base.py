"""The parts of a pipeline: loaded and saved, moved and decoded with; one thread at a time."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import RLock
from types import MappingProxyType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import torch
from peft import PeftModel
from torch import Tensor

from unified.decoding.decoder import Decoder
from unified.decoding.decoder_cache import DecoderCache
from unified.hub import local_folder
from unified.lora.base import base_of
from unified.lora.switching import active_adapters, is_disabled, save_fused
from unified.model.modeling import UnifiedForCausalLM
from unified.model.vision import VisionEncoder
from unified.model_card import combined_card, read_card
from unified.pipeline.arguments import ImageBatch, check_parts, check_vision_encoder, code_grid
from unified.pipeline.classes import as_classes, class_count, labels_of
from unified.pipeline.folder import (
    VISION_FOLDER,
    as_dtype,
    check_fingerprint,
    check_one_device,
    load_vision,
    push_folder,
    read_description,
    write_description,
)
from unified.pipeline.options import check_defaults
from unified_tokenizers import AutoImageTokenizer, ImageTokenizer, TextTokenizer, load_text_tokenizer

Pipeline = TypeVar("Pipeline", bound="BasePipeline")
P = ParamSpec("P")
R = TypeVar("R")


def one_at_a_time(
    method: Callable[Concatenate[Pipeline, P], R],
) -> Callable[Concatenate[Pipeline, P], R]:
    """Let one thread at a time use the model. A method may call another one, and so may a callback."""

    @functools.wraps(method)
    def locked(self: Pipeline, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.lock:
            return method(self, *args, **kwargs)

    return locked


class BasePipeline:
    """A model with its tokenizers and what is kept with them; :class:`unified.UnifiedPipeline` makes something of it."""

    def __init__(
        self,
        model: UnifiedForCausalLM | PeftModel,
        image_tokenizer: ImageTokenizer,
        text_tokenizer: TextTokenizer | None = None,
        sampling: Mapping[str, Any] | None = None,
        vision_encoder: VisionEncoder | None = None,
    ):
        config = base_of(model).config
        check_parts(config, image_tokenizer, text_tokenizer)
        check_vision_encoder(config, vision_encoder)
        self._sampling, self._adapter_sampling = check_defaults(sampling), dict[str, dict[str, Any]]()
        if text_tokenizer is not None:
            config.text_tokenizer_fingerprint = text_tokenizer.fingerprint
        self.model: UnifiedForCausalLM | PeftModel = model.eval()
        self.image_tokenizer = image_tokenizer
        self.vision_encoder = vision_encoder
        self._text_tokenizer = text_tokenizer
        self.lock = RLock()
        self._calls: list[ImageBatch] = []  # in progress; the one that sampled last is at the end
        self._decoders = DecoderCache()
        self._progress_bar: dict[str, Any] = {}
        self._card: str | None = None  # text of the folder's README.md, and of its adapters' by name
        self._adapter_cards: dict[str, str | None] = {}

    # Folders, devices

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        torch_dtype: torch.dtype | str | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        variant: str | None = None,
        quantization_config: Any = None,
        **hub: Any,
    ) -> Self:
        """Load a pipeline folder: ``pipeline.json``, ``model/``, ``image_tokenizer/``, unless the model is
        class-conditional, ``text_tokenizer/``, and ``vision_encoder/`` where it reads images by one.

        Args:
            pretrained_model_name_or_path: a local folder, or a repository on the Hub.
            torch_dtype, dtype: dtype of the language model, ``auto`` for the one that it was saved in; default float32. The
                image tokenizer stays in float32.
            device_map: as in transformers, where all lands on one device, such as ``cuda``; the image tokenizer follows.
            variant: which weights of the language model, ``fp16`` for ``model.fp16.safetensors``.
            quantization_config: of transformers, for 8 or 4 bits; see :func:`unified.model.quantization.quantization`.
            hub: ``revision``, ``token``, ``cache_dir`` and ``local_files_only``, for a repository.

        Raises:
            ValueError: if a local folder is not a pipeline, or an argument does not fit.
        """
        options = {"device_map": device_map, "variant": variant, "quantization_config": quantization_config}
        options = {name: value for name, value in options.items() if value is not None}
        options["dtype"] = as_dtype(torch_dtype, dtype)
        folder = local_folder(pretrained_model_name_or_path, "pipeline", **hub)
        description = read_description(folder)
        model = UnifiedForCausalLM.from_pretrained(folder / "model", **options)
        check_one_device(model)
        model.name_or_path = str(pretrained_model_name_or_path)  # what an adapter names as its base
        image_tokenizer = AutoImageTokenizer.from_pretrained(folder / "image_tokenizer")
        check_fingerprint(folder, description, image_tokenizer)
        vision_encoder = load_vision(folder, model.config)
        for part in (image_tokenizer, vision_encoder):
            if device_map is not None and isinstance(part, torch.nn.Module):
                part.to(model.device)
        reads_text = model.config.conditioning is None
        text_tokenizer = load_text_tokenizer(folder / "text_tokenizer") if reads_text else None
        pipe = cls(model, image_tokenizer, text_tokenizer, description["sampling"], vision_encoder)
        pipe._card = read_card(folder)
        return pipe

    @one_at_a_time
    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        *,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        state_dict: dict[str, Tensor] | None = None,
        card: str | None = None,
    ) -> None:
        """Write the model and its tokenizers: safetensors, JSON and the sentencepiece model; no pickle.

        Fused adapters are part of the weights that are written.

        Args:
            save_directory: folder to write.
            safe_serialization: True; nothing but safetensors is written.
            variant: part of the name of the language model's files: ``fp16`` for ``model.fp16.safetensors``.
            max_shard_size: largest file of the language model, such as ``5GB``; default: that of transformers.
            push_to_hub: also upload what is written to the Hub.
            repo_id: ``owner/name`` of the repository; default: the folder's name.
            private, token, commit_message, create_pr: of the upload, as in ``huggingface_hub``.
            state_dict: weights in place of the model's own, for models whose weights are cut over processes.
            card: text of a ``README.md``; by default that of the folder it came from, with those of fused adapters.

        Raises:
            ValueError: if adapters are loaded and not fused, which :meth:`save_lora_weights` saves; or if the upload fails,
                after all is written.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization: False would write pickles; leave it out, safetensors are written.")
        folder, given = Path(save_directory), {"variant": variant, "max_shard_size": max_shard_size}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if isinstance(self.model, PeftModel):
            save_fused(self.model, folder / "model", **options)
        else:
            self.model.save_pretrained(folder / "model", state_dict=state_dict, **options)
        self.image_tokenizer.save_pretrained(folder / "image_tokenizer")
        if self._text_tokenizer is not None:
            self._text_tokenizer.save_pretrained(folder / "text_tokenizer")
        if self.vision_encoder is not None:
            self.vision_encoder.save_pretrained(folder / VISION_FOLDER)
        write_description(folder, type(self).__name__, self.image_tokenizer.fingerprint, self.sampling)
        if card is None:
            cards = {name: self._adapter_cards.get(name) for name in active_adapters(self.model)}
            card = combined_card(self._card, cards)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
        if push_to_hub:
            push_folder(folder, repo_id, private, token, commit_message, create_pr)

    @property
    def components(self) -> dict[str, Any]:
        """The arguments of another pipeline of the same parts, ``UnifiedPipeline(**pipe.components)``.

        They share the model, with its adapters; use one of them at a time.
        """
        return {
            "model": self.model, "image_tokenizer": self.image_tokenizer, "text_tokenizer": self.text_tokenizer,
            "sampling": dict(self.sampling), "vision_encoder": self.vision_encoder,
        }  # fmt: skip

    @property
    def sampling(self) -> Mapping[str, Any]:
        """The sampling defaults that it is saved with, and before them those of its active adapters, the last one first.

        To be set as a whole, which also forgets those of the adapters: ValueError for a name or value that is none.
        """
        found = dict(self._sampling)
        if isinstance(self.model, PeftModel) and not is_disabled(self.model):
            for name in active_adapters(self.model):
                found |= self._adapter_sampling.get(name, {})
        return MappingProxyType(found)

    @sampling.setter
    def sampling(self, sampling: Mapping[str, Any] | None) -> None:
        self._sampling, self._adapter_sampling = check_defaults(sampling), {}

    @one_at_a_time
    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the model, the image tokenizer and the vision encoder to a device; a dtype goes to the model only."""
        self._decoders.free()  # the old device shall have its memory back now
        self.model.to(*args, **kwargs)
        for part in (self.image_tokenizer, self.vision_encoder):
            if isinstance(part, torch.nn.Module):
                part.to(self.model.device)
        return self

    @property
    def device(self) -> torch.device:
        """Device of the language model."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the language model's weights."""
        return self.model.dtype

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the first grid that the model was trained on."""
        stride = self.image_tokenizer.downsample
        height, width = code_grid(base_of(self.model).config, stride, None, None)
        return height * stride, width * stride

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """The tokenizer of the model's text. Raises ValueError for a class-conditional model, which reads none."""
        if self._text_tokenizer is None:
            raise ValueError("text_tokenizer: the model has classes and reads no text; only class_labels make images.")
        return self._text_tokenizer

    @property
    def labels(self) -> dict[str, int]:
        """Numbers of the classes by name, of a class-conditional model whose classes have names; else empty.

        Each of the words for a class is a name, but none that several classes share.
        """
        return labels_of(base_of(self.model).config)

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Numbers of classes by name. Raises ValueError for an unknown name, with the nearest ones."""
        config = base_of(self.model).config
        class_count(config, {"label": label}, {})
        names = [label] if isinstance(label, str) else list(label)
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"label: {label!r} is not a name, or a list of names.")
        return as_classes(config, names, "label")

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Options for the tqdm bar, such as ``disable=True``."""
        self._progress_bar = kwargs

    # The decoder

    @one_at_a_time
    def enable_fast_decoding(self, compile: bool = False, int8: bool = False) -> None:
        """Prepare the decoder now, compiled with ``torch.compile`` or with 8-bit weights (not exact).

        A decoder is a copy of the weights, kept between calls and made again when weights or adapters change.

        Raises:
            ValueError: if the backbone or the device does not allow it; nothing has changed then.
        """
        self._decoders.configure(base_of(self.model), compile=compile, int8=int8)

    @one_at_a_time
    def disable_fast_decoding(self) -> None:
        """Free the decoder that is kept; the next call prepares an exact one that is not compiled."""
        self._decoders = DecoderCache()

    @one_at_a_time
    def decoder(self, steer: Mapping[str, float] | None = None) -> Decoder:
        """The decoder of the model and its adapters as they are now, steered as in :meth:`__call__`."""
        return self._decoders.get(self.model, steer)
