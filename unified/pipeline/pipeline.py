"""`UnifiedPipeline`: text and images in, images and text out."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import RLock, get_ident
from types import MappingProxyType
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unified.conversation import Turn
from unified.decoding import Sampling
from unified.decoding.config import check_decoding
from unified.decoding.decoder import Decoder
from unified.decoding.decoder_cache import DecoderCache
from unified.decoding.steering import check_steering, gives_rewards
from unified.hub import local_folder
from unified.lora.adapters import base_of, load_lora, save_adapter, unload_lora
from unified.lora.switching import (
    adapter_state,
    apply_weights,
    delete_adapters,
    fuse_lora,
    is_disabled,
    save_fused,
    set_adapters,
    switch,
    unfuse_lora,
)
from unified.model.modeling import UnifiedForCausalLM
from unified.model.vision import VisionEncoder
from unified.model_card import combined_card, read_card
from unified.pipeline.arguments import (
    ImageBatch,
    Wanted,
    arrange_batch,
    check_callback,
    check_parts,
    check_prompt,
    check_sampling,
    check_vision_encoder,
    code_grid,
    one_per_image,
    per_image,
)
from unified.pipeline.chat import (
    Conversation,
    as_conversation,
    as_messages,
    as_segments,
    check_sizes,
    continue_conversations,
    stream_conversation,
)
from unified.pipeline.classes import as_classes, class_count, labels_of
from unified.pipeline.editing import as_images, codes_to_keep, share_to_keep, unfinished_images
from unified.pipeline.folder import (
    VISION_FOLDER,
    adapter_sampling,
    as_dtype,
    check_fingerprint,
    check_one_device,
    load_vision,
    push_folder,
    read_description,
    write_description,
)
from unified.pipeline.options import GenerationOptions, check_defaults, check_whole
from unified.sequence import Segment, TextSegment
from unified_tokenizers import AutoImageTokenizer, ImageTokenizer, TextTokenizer, load_text_tokenizer
from unified_tokenizers.images import to_pil

OUTPUT_TYPES = ("pil", "np", "pt", "codes")
StepCallback = Callable[["UnifiedPipeline", int, int, dict[str, Tensor]], Any]
Classes = int | str | Sequence[int | str] | None
Generators = torch.Generator | int | Sequence[torch.Generator | int] | None
P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class UnifiedPipelineOutput:
    """Images in the requested form and their codes ``(N, h, w)``, -1 where sampling was interrupted."""

    images: list[Image.Image] | np.ndarray | Tensor
    codes: Tensor
    interrupted: bool = False

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields in their order, which ``return_dict=False`` returns."""
        return self.images, self.codes, self.interrupted


def one_at_a_time(
    method: Callable[Concatenate["UnifiedPipeline", P], R],
) -> Callable[Concatenate["UnifiedPipeline", P], R]:
    """Let one thread at a time use the model. A method may call another one, and so may a callback."""

    @functools.wraps(method)
    def locked(self: "UnifiedPipeline", *args: P.args, **kwargs: P.kwargs) -> R:
        with self.lock:
            return method(self, *args, **kwargs)

    return locked


class UnifiedPipeline:
    """A unified model with its image and text tokenizer.

    It may be used from several threads: their calls take turns, and each samples what it samples alone.

    Args:
        model: the language model.
        image_tokenizer: the tokenizer whose codes the model was trained on.
        text_tokenizer: the tokenizer of its text ids; None for a class-conditional model, which reads no text.
        vision_encoder: that by which the model reads images, where it was trained with one (``UnifiedConfig.vision``).
        sampling: defaults of the options in :data:`unified.pipeline.options.SAMPLING`, saved with the pipeline: what None
            means in a call, in the engine, on the page and on the command line.

    Attributes:
        lock: held while the model is in use.

    Raises:
        ValueError: if the parts do not belong together.
    """

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
    ) -> "UnifiedPipeline":
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
            card = combined_card(
                self._card, {name: self._adapter_cards.get(name) for name in self.get_active_adapters()}
            )
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
            for name in self.get_active_adapters():
                found |= self._adapter_sampling.get(name, {})
        return MappingProxyType(found)

    @sampling.setter
    def sampling(self, sampling: Mapping[str, Any] | None) -> None:
        self._sampling, self._adapter_sampling = check_defaults(sampling), {}

    @one_at_a_time
    def to(self, *args: Any, **kwargs: Any) -> "UnifiedPipeline":
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

    # Images

    @one_at_a_time
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_schedule: str | Callable[[float], float] | None = None,
        decoding: str | None = None,
        known: Tensor | None = None,
        class_labels: Classes = None,
        negative_class_labels: Classes = None,
        group_temperature: float | None = None,
        steer: Mapping[str, float] | None = None,
    ) -> UnifiedPipelineOutput:
        """Generate images for prompts, or for the classes of a class-conditional model.

        Args:
            prompt: one caption or several.
            height, width, guidance_scale, num_images_per_prompt, temperature, top_k, top_p, guidance_schedule, decoding,
                group_temperature: see :class:`unified.pipeline.options.GenerationOptions`; None is the pipeline's default, see
                :attr:`sampling`.
            negative_prompt: what to steer away from; one for all, or one per prompt. Default: that in :attr:`sampling`, else
                no caption, which "" stands for, too.
            generator: one ``torch.Generator`` per image, or one that generates the first and seeds the others; fixes the
                images. A seed 7 is ``torch.Generator().manual_seed(7)``, here and in every other method. Image i depends on
                its generator alone, not on the batch; the same generator with another caption meets the same noise.
            output_type: ``pil``; ``np``, ``(N, H, W, 3)``, or ``pt``, ``(N, 3, H, W)``, floats in [0, 1]; or ``codes``.
            return_dict: False returns the output as a tuple, images first.
            callback_on_step_end: called as ``f(pipeline, step, timestep, {"codes": (N, n)})`` after every pass, which is every
                code in plain decoding in raster order; -1 stands for codes that an image does not have yet. Step and
                timestep are the number of the last code; the result is ignored: codes that are sampled stay.
            known: ``(N, h, w)`` codes that are forced, -1 where the model samples; one for all, per prompt or per image.
            class_labels: in place of prompts, one class or several by number or name (see :attr:`labels`).
            negative_class_labels: classes to steer away from; one for all, or one per class. Default: the unconditional one.
            steer: weights of loaded reward adapters, ``{"colours": 0.5, "clutter": -0.3}``. What else is active stays so, but for
                these: an adapter steers or acts, not both. Each costs a forward pass more. See
                :class:`unified.pipeline.options.GenerationOptions`.

        Raises:
            ValueError: for an empty or too long prompt, an unknown class, prompts beside classes, a size the model does not
                know, lists of the wrong length, an unknown ``output_type`` or ``decoding``, or a mode that does not suit the
                model's order.
        """
        # 1. Check inputs
        options = GenerationOptions(
            height, width, guidance_scale, num_images_per_prompt, temperature, top_k, top_p, guidance_schedule, decoding,
            group_temperature, steer,
        )  # fmt: skip
        check_output_type(output_type)
        check_callback(callback_on_step_end)

        # 2. Arrange the batch: one row of ids, one unconditional row and one generator per image
        wanted = Wanted(prompt, negative_prompt, class_labels, negative_class_labels)
        batch = self._arrange(wanted, options, generator, known)

        # 3. Sample the codes
        *_, codes = self._sample(batch, callback_on_step_end)

        # 4. Decode them to images
        output = self._output(codes, batch, output_type)
        return output if return_dict else output.to_tuple()  # type: ignore[return-value]

    def stream(
        self,
        prompt: str | Sequence[str] | None = None,
        preview_every: int | None = None,
        image: Image.Image | Sequence[Image.Image] | None = None,
        mask_image: Image.Image | Sequence[Image.Image] | None = None,
        keep: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        known: Tensor | None = None,
        class_labels: Classes = None,
        negative_class_labels: Classes = None,
        **options: Any,
    ) -> Iterator[UnifiedPipelineOutput]:
        """Generate images for prompts or classes and show them on the way; other calls may come in between two previews.

        Args:
            prompt, negative_prompt, generator, output_type, callback_on_step_end, known, class_labels,
                negative_class_labels: as in :meth:`__call__`.
            preview_every: codes between two previews; default one row of the grid.
            image, mask_image: as in :meth:`inpaint`.
            image, keep: as in :meth:`variation`.
            options: those of :class:`unified.pipeline.options.GenerationOptions`.

        Returns:
            An iterator over outputs whose images are grey, and whose codes are -1, where nothing is sampled or known; the
            last one is complete.

        Raises:
            ValueError: as :meth:`__call__`.
        """
        edits = [mask_image is not None, keep is not None]
        if (image is not None) != any(edits) or all(edits):
            raise ValueError("image: goes with mask_image to inpaint, or with keep for a variation; give two of them.")
        if preview_every is not None:
            check_whole("preview_every", preview_every)
        check_output_type(output_type)
        check_callback(callback_on_step_end)
        wanted = Wanted(prompt, negative_prompt, class_labels, negative_class_labels)
        if image is not None:
            given = options if known is None else {**options, "known": known}
            known, generator, options = self._known_codes(wanted, image, mask_image, keep, generator, given)
        batch = self._arrange(wanted, GenerationOptions.from_mapping(options), generator, known)
        return self._previews(batch, preview_every or batch.grid[1], callback_on_step_end, output_type)

    def inpaint(
        self,
        prompt: str | Sequence[str] | None,
        image: Image.Image | Sequence[Image.Image],
        mask_image: Image.Image | Sequence[Image.Image],
        negative_prompt: str | Sequence[str] | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        class_labels: Classes = None,
        negative_class_labels: Classes = None,
        **options: Any,
    ) -> UnifiedPipelineOutput:
        """Generate the bright part of a mask again; every other code stays.

        In raster order what is new follows what is above it and left of it; in ``random`` order, all known codes.
        For a larger canvas see :func:`unified.pipeline.editing.outpainting_canvas`.

        Args:
            prompt: what the whole image shows; None with ``class_labels``.
            image: one image, one per prompt or one per image generated, of a size that the model was trained on.
            mask_image: as many masks of the same size.
            negative_prompt, generator, output_type, return_dict, callback_on_step_end, class_labels, negative_class_labels:
                as in :meth:`__call__`.
            options: those of :class:`unified.pipeline.options.GenerationOptions`, without the size.

        Raises:
            ValueError: if sizes differ or are unknown to the model, and as :meth:`__call__`.
        """
        masks = as_images(mask_image, "mask_image")
        wanted = Wanted(prompt, negative_prompt, class_labels, negative_class_labels)
        known, generators, options = self._known_codes(wanted, image, masks, None, generator, options)
        return self(generator=generators, output_type=output_type, return_dict=return_dict, known=known,
                    callback_on_step_end=callback_on_step_end, **vars(wanted), **options)  # fmt: skip

    def variation(
        self,
        prompt: str | Sequence[str] | None,
        image: Image.Image | Sequence[Image.Image],
        keep: float = 0.5,
        negative_prompt: str | Sequence[str] | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        class_labels: Classes = None,
        negative_class_labels: Classes = None,
        **options: Any,
    ) -> UnifiedPipelineOutput:
        """Generate an image again but for a share ``keep`` of its codes; arguments as in :meth:`inpaint`.

        Which codes stay depends on the image's generator.
        """
        wanted = Wanted(prompt, negative_prompt, class_labels, negative_class_labels)
        known, generators, options = self._known_codes(wanted, image, None, keep, generator, options)
        return self(generator=generators, output_type=output_type, return_dict=return_dict, known=known,
                    callback_on_step_end=callback_on_step_end, **vars(wanted), **options)  # fmt: skip

    def interrupt(self) -> None:
        """Stop sampling after the current code; what is missing stays grey.

        From a callback, or between two previews of a stream, it stops that call; from a thread without a call, all of them.
        """
        own = [batch for batch in self._calls if batch.thread == get_ident()]
        for batch in own[-1:] or list(self._calls):
            batch.interrupted = True

    def _arrange(self, wanted: Wanted, options: GenerationOptions, generator: Any, known: Any) -> ImageBatch:
        config, stride = base_of(self.model).config, self.image_tokenizer.downsample
        options, wanted = options.filled(self.sampling), wanted.filled(self.sampling)
        check_steering(self.model, options.steer or {})
        return arrange_batch(config, self._text_tokenizer, stride, wanted, options, generator, known)

    @one_at_a_time
    def _known_codes(
        self, wanted: Wanted, image: Any, masks: Any, keep: Any, generator: Generators, options: dict[str, Any]
    ) -> tuple[Tensor, list[torch.Generator], dict[str, Any]]:
        """Codes that an edit keeps, all but those under masks or all but a share; its generators; options with the size."""
        for name in ("height", "width", "known"):
            if options.get(name) is not None:
                raise ValueError(f"{name}: an edit takes it from the image; leave it out.")
        model = base_of(self.model)
        images, count = as_images(image), wanted.count(model.config)
        check_sizes(images, model.config, self.image_tokenizer.downsample)
        options = {**options, "height": images[0].height, "width": images[0].width}
        given = GenerationOptions.from_mapping(options).filled(self.sampling)
        check_decoding(str(given.decoding), model.prediction)
        each = given.num_images_per_prompt
        generators = per_image(generator, count, each)
        known = codes_to_keep(self.image_tokenizer, images, masks)
        known = one_per_image(known, "image", count, each)
        if masks is None:
            known = share_to_keep(known, keep, generators)
        return known, generators, options

    def _sample(self, batch: ImageBatch, on_step: StepCallback | None) -> Iterator[Tensor]:
        """The codes so far of a batch ``(N, n)``, until they are complete or the call is interrupted; needs the lock."""
        steps = batch.grid[0] * batch.grid[1]
        try:
            with tqdm(total=len(batch.rows) * steps, unit="code", **self._progress_bar) as bar:
                for codes in batch.iterate_codes(self.decoder(batch.steer)):
                    batch.thread = get_ident()
                    self._calls = [*(call for call in self._calls if call is not batch), batch]
                    bar.update(int((codes >= 0).sum()) - bar.n)
                    if on_step is not None:
                        step = int((codes >= 0).sum(dim=1).max()) - 1
                        on_step(self, step, step, {"codes": codes.clone()})  # decoding goes on writing to its own
                    yield codes
                    if batch.interrupted:
                        return
        finally:
            with self.lock:  # a stream that is given up ends in any thread
                self._calls = [call for call in self._calls if call is not batch]

    def _previews(
        self, batch: ImageBatch, every: int, on_step: StepCallback | None, output_type: str
    ) -> Iterator[UnifiedPipelineOutput]:
        """An output whenever each image has ``every`` more codes, and the last one; the lock is free in between."""
        sampling, steps, shown, complete = self._sample(batch, on_step), batch.grid[0] * batch.grid[1], 0, False
        while not complete:
            with self.lock:
                complete = True
                for codes in sampling:
                    done = int((codes >= 0).sum()) // len(batch.rows)
                    if shown + every <= done < steps and not batch.interrupted:
                        shown, complete = done, False
                        break
                output = self._output(codes, batch, output_type)
            yield output

    def _output(self, codes: Tensor, batch: ImageBatch, output_type: str) -> UnifiedPipelineOutput:
        missing = batch.grid[0] * batch.grid[1] - codes.shape[1]
        codes = torch.nn.functional.pad(codes, (0, missing), value=-1).reshape(-1, *batch.grid)
        known = codes if batch.known is None else batch.known.to(codes.device)
        codes = torch.where(codes < 0, known, codes)
        interrupted = batch.interrupted and bool((codes < 0).any())
        if output_type == "codes":
            return UnifiedPipelineOutput(codes, codes, interrupted)
        images: Any = unfinished_images(self.image_tokenizer, codes)
        images = to_pil(images) if output_type == "pil" else (images.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "np":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        return UnifiedPipelineOutput(images, codes, interrupted)

    # Text

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

    # Adapters; the names are those of diffusers

    @one_at_a_time
    def load_lora_weights(
        self,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        **hub: Any,
    ) -> None:
        """Add a LoRA adapter and make it the active one; plain folders of peft are taken, see
        :func:`unified.lora.adapters.load_lora`. While it is active, its defaults of sampling come before the pipeline's.

        One that was trained to steer (``objectives: [{name: genarm}]``) is loaded only, for ``steer`` of a call.

        Args:
            pretrained_model_name_or_path: a local folder, or a repository on the Hub.
            adapter_name: its name; without one ``default``, then ``default_1`` and so on.
            weight_name: name of its safetensors file; default ``adapter_model.safetensors``.
            hub: as in :meth:`from_pretrained`.

        Raises:
            ValueError: if it belongs to another model, or the name is taken.
        """
        taken = self.model.peft_config if isinstance(self.model, PeftModel) else {}
        numbered = ("default" if i == 0 else f"default_{i}" for i in count())
        name = next(free for free in numbered if free not in taken) if adapter_name is None else adapter_name
        folder = local_folder(pretrained_model_name_or_path, "lora", **hub)
        sampling = adapter_sampling(folder)
        disabled = isinstance(self.model, PeftModel) and is_disabled(self.model)
        active = dict(adapter_state(self.model).weights) if isinstance(self.model, PeftModel) else {}
        self.model = load_lora(self.model, folder, name, weight_name=weight_name).eval()
        if gives_rewards(self.model, name):
            apply_weights(self.model, active)
            if disabled:
                switch(self.model, False)
        self._adapter_cards[name], self._adapter_sampling[name] = read_card(folder), sampling

    @one_at_a_time
    def save_lora_weights(self, save_directory: str | Path, adapter_name: str | None = None) -> None:
        """Write one adapter, as it was trained, to a folder that :meth:`load_lora_weights` takes.

        Args:
            save_directory: folder to write.
            adapter_name: which one; it may be left out if only one is loaded.

        Raises:
            ValueError: if there is no such adapter, or several and none is named.
        """
        names = list(self._adapted("adapter_name").peft_config)
        name = names[0] if adapter_name is None and len(names) == 1 else adapter_name
        if name not in names:
            raise ValueError(f"adapter_name: {name!r} is none of those that are loaded; name one of {names}.")
        card, sampling = self._adapter_cards.get(name), self._adapter_sampling.get(name)
        save_adapter(self._adapted("adapter_name"), save_directory, name, card, sampling)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all loaded adapters, active or not, by the part that they belong to: ``{"model": [...]}``."""
        return {"model": list(self.model.peft_config)} if isinstance(self.model, PeftModel) else {}

    @one_at_a_time
    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float | Sequence[float | None] | None = None,
    ) -> None:
        """Activate one adapter or several together, with weights; None stands for 1, as trained.

        Raises:
            ValueError: for unknown names, or weights that are no finite numbers.
        """
        names = as_names(adapter_names)
        several = isinstance(adapter_weights, Sequence) and not isinstance(adapter_weights, str)
        weights: list[Any] = list(adapter_weights) if several else [adapter_weights] * len(names)  # type: ignore[arg-type]
        set_adapters(self._adapted("adapter_names"), names, [1.0 if weight is None else weight for weight in weights])

    def get_active_adapters(self) -> list[str]:
        """Names of the active adapters; empty if none is loaded."""
        return list(adapter_state(self.model).weights) if isinstance(self.model, PeftModel) else []

    @one_at_a_time
    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget adapters; the others stay as they are. Raises ValueError for unknown names."""
        model = self._adapted("adapter_names")
        names = set(as_names(adapter_names))
        if names == set(model.peft_config):
            self.unload_lora_weights()
        else:
            delete_adapters(model, sorted(names))

    @one_at_a_time
    def unload_lora_weights(self) -> None:
        """Drop all adapters, fused or not; the base model is as it was before, bit for bit."""
        if isinstance(self.model, PeftModel):
            self.model = unload_lora(self.model)

    @one_at_a_time
    def disable_lora(self) -> None:
        """Use the base model alone until :meth:`enable_lora`, :meth:`set_adapters` or the next load."""
        switch(self._adapted("lora"), False)

    @one_at_a_time
    def enable_lora(self) -> None:
        """Use the active adapters again."""
        switch(self._adapted("lora"), True)

    @one_at_a_time
    def fuse_lora(self, *, lora_scale: float = 1.0) -> None:
        """Add the active adapters to the weights, their weights times ``lora_scale``; not needed for speed.

        ``save_pretrained`` then writes a plain model. Raises ValueError if adapters are disabled or fused already.
        """
        fuse_lora(self._adapted("fuse_lora"), lora_scale)

    @one_at_a_time
    def unfuse_lora(self) -> None:
        """Take the fused adapters out of the weights again, bit for bit. Raises ValueError if nothing is fused."""
        unfuse_lora(self._adapted("unfuse_lora"))

    def _adapted(self, what: str) -> PeftModel:
        if not isinstance(self.model, PeftModel):
            raise ValueError(f"{what}: no adapter is loaded; call load_lora_weights first.")
        return self.model

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


def check_output_type(output_type: Any) -> None:
    """Refuse an unknown output type. Raises ValueError."""
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type: {output_type!r} is unknown; use one of {OUTPUT_TYPES}.")


def as_names(adapter_names: Any) -> list[str]:
    """One name or several as a list. Raises ValueError for anything else."""
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    if not isinstance(names, list | tuple | set) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"adapter_names: {adapter_names!r} is not a name or a list of names.")
    return list(names)
