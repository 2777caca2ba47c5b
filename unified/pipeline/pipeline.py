"""`UnifiedPipeline`: text and images in, images and text out."""

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unified.decoding import Sampling, make_decoder
from unified.decoding.decoder import Decoder
from unified.decoding.weights_state import weights_state
from unified.hub import local_folder
from unified.lora.adapters import base_of
from unified.lora.switching import save_fused
from unified.model.modeling import UnifiedForCausalLM
from unified.model_card import combined_card, read_card
from unified.pipeline.arguments import (
    GUIDANCE_SCALE,
    Drawing,
    as_prompts,
    check_call,
    check_parts,
    check_whole,
    known_grid,
    one_per_image,
    per_image,
    plan_drawing,
)
from unified.pipeline.chat import check_sizes
from unified.pipeline.editing import as_images, codes_to_keep, share_to_keep, unfinished_images
from unified.pipeline.lora_methods import LoraMethods
from unified.pipeline.text_methods import TextMethods
from unified_tokenizers import AutoImageTokenizer, ImageTokenizer, TextTokenizer, load_text_tokenizer
from unified_tokenizers.images import to_pil

PIPELINE_FILE = "pipeline.json"
OUTPUT_TYPES = ("pil", "np", "pt", "codes")
StepCallback = Callable[["UnifiedPipeline", int, int, dict[str, Tensor]], Any]


@dataclass
class UnifiedPipelineOutput:
    """Pictures in the requested form and their codes ``(N, h, w)``, -1 where sampling was interrupted."""

    images: list[Image.Image] | np.ndarray | Tensor
    codes: Tensor
    interrupted: bool = False


class UnifiedPipeline(LoraMethods, TextMethods):
    """A unified model with its image and text tokenizer.

    Args:
        model: the language model.
        image_tokenizer: the tokenizer whose codes the model was trained on.
        text_tokenizer: the tokenizer of its text ids.

    Raises:
        ValueError: if the parts do not belong together.
    """

    def __init__(self, model: UnifiedForCausalLM, image_tokenizer: ImageTokenizer, text_tokenizer: TextTokenizer):
        check_parts(model.config, image_tokenizer, text_tokenizer)
        self.model: UnifiedForCausalLM | PeftModel = model.eval()
        self.image_tokenizer = image_tokenizer
        self.text_tokenizer = text_tokenizer
        self._progress_bar: dict[str, Any] = {}
        self._interrupted = False
        self._card: str | None = None  # text of the folder's README.md, and of its adapters' by name
        self._adapter_cards: dict[str, str | None] = {}
        self._fast: dict[str, bool] = {}  # options of the decoder
        self._kept: Decoder | None = None  # kept between calls
        self._kept_state: Any = None  # weights and adapters that it was made of

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, torch_dtype: torch.dtype = torch.float32
    ) -> "UnifiedPipeline":
        """Load a pipeline folder: ``pipeline.json``, ``model/``, ``image_tokenizer/``, ``text_tokenizer/``.

        Args:
            pretrained_model_name_or_path: a local folder, or a repository on the Hub.
            torch_dtype: dtype of the language model; the image tokenizer stays in float32.

        Raises:
            ValueError: if a local folder is not a pipeline.
        """
        folder = local_folder(pretrained_model_name_or_path)
        if not (folder / PIPELINE_FILE).is_file():
            raise ValueError(
                f"pipeline: {str(folder)!r} has no {PIPELINE_FILE}; give a folder written by save_pretrained."
            )
        model = UnifiedForCausalLM.from_pretrained(folder / "model", dtype=torch_dtype)
        model.name_or_path = str(pretrained_model_name_or_path)  # what an adapter names as its base
        image_tokenizer = AutoImageTokenizer.from_pretrained(folder / "image_tokenizer")
        pipe = cls(model, image_tokenizer, load_text_tokenizer(folder / "text_tokenizer"))
        pipe._card = read_card(folder)
        return pipe

    def save_pretrained(
        self, save_directory: str | Path, state_dict: dict[str, Tensor] | None = None, card: str | None = None
    ) -> None:
        """Write the model and both tokenizers: safetensors, JSON and the sentencepiece model; no pickle.

        Fused adapters are part of the weights that are written. ``state_dict`` replaces the model's own weights, for models
        whose weights are cut over processes; ``card`` is the text of a ``README.md`` beside them, by default that of the folder
        it came from, with those of fused adapters.

        Raises:
            ValueError: if adapters are loaded and not fused: those are saved with ``unified.lora.adapters.save_lora``.
        """
        folder = Path(save_directory)
        if isinstance(self.model, PeftModel):
            save_fused(self.model, folder / "model")
        else:
            self.model.save_pretrained(folder / "model", state_dict=state_dict)
        self.image_tokenizer.save_pretrained(folder / "image_tokenizer")
        self.text_tokenizer.save_pretrained(folder / "text_tokenizer")
        description = {
            "_class_name": type(self).__name__,
            "image_tokenizer_fingerprint": self.image_tokenizer.fingerprint,
        }
        (folder / PIPELINE_FILE).write_text(json.dumps(description, indent=2))
        if card is None:
            card = combined_card(
                self._card, {name: self._adapter_cards.get(name) for name in self.get_active_adapters()}
            )
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")

    def to(self, *args: Any, **kwargs: Any) -> "UnifiedPipeline":
        """Move the model and the image tokenizer to a device; a dtype goes to the model only."""
        self.model.to(*args, **kwargs)
        self._kept = None
        if isinstance(self.image_tokenizer, torch.nn.Module):
            self.image_tokenizer.to(self.model.device)
        return self

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Options for the tqdm bar, such as ``disable=True``."""
        self._progress_bar = kwargs

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
        height, width = known_grid(base_of(self.model).config, stride, None, None)
        return height * stride, width * stride

    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = GUIDANCE_SCALE,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        guidance_schedule: str | Callable[[float], float] = "constant",
        decoding: str = "plain",
        known: Tensor | None = None,
    ) -> UnifiedPipelineOutput:
        """Draw images for prompts.

        Args:
            prompt: one caption or several.
            height, width: size in pixels; a grid that the model was trained on. Default: its first one.
            guidance_scale: classifier-free guidance; 1 switches it off.
            negative_prompt: what to steer away from; one for all, or one per prompt. Default: the empty caption.
            num_images_per_prompt: images per caption; those of one caption are adjacent in the output.
            temperature, top_k, top_p: see :class:`unified.decoding.Sampling`.
            generator: one ``torch.Generator`` per image, or one that generates the first and seeds the others; fixes the
                result, whatever else is in the batch. The same one with another caption meets the same noise.
            output_type: ``pil``; float32 in [0, 1] as ``np`` (N, H, W, 3) or ``pt`` (N, 3, H, W); or ``codes``.
            callback_on_step_end: called as ``f(pipeline, step, timestep, {"codes": (N, step + 1)})`` after every code, with
                speculative decoding after every pass; -1 stands for codes that an image does not have yet. Timestep and
                step are the same here, and what it returns is not looked at: codes that are sampled stay.
            guidance_schedule: see :class:`unified.decoding.Sampling`.
            decoding: ``plain``; ``jacobi`` (the same images) or ``sjd`` (the same distribution), often faster for few
                images; ``gsd``, faster and not exact. See :mod:`unified.decoding.speculative`.
            known: ``(N, h, w)`` codes that are forced, -1 where the model generates; one for all, per prompt or per image.

        Raises:
            ValueError: for an empty or too long prompt, a size the model does not know, lists of the wrong length,
                or an unknown ``output_type`` or ``decoding``.
        """
        sampling = Sampling(guidance_scale, temperature, top_k, top_p, guidance_schedule)
        *_, output = self._draw(prompt, height, width, sampling, negative_prompt, num_images_per_prompt, generator,
                                output_type, callback_on_step_end, decoding, known, None)  # fmt: skip
        return output

    def stream(
        self,
        prompt: str | Sequence[str],
        preview_every: int | None = None,
        image: Image.Image | Sequence[Image.Image] | None = None,
        mask_image: Image.Image | Sequence[Image.Image] | None = None,
        keep: float | None = None,
        **options: Any,
    ) -> Iterator[UnifiedPipelineOutput]:
        """Draw images for prompts and show them on the way.

        Args:
            prompt: one caption or several.
            preview_every: codes between two previews; default one row of the grid.
            image, mask_image: as in :meth:`inpaint`.
            image, keep: as in :meth:`variation`.
            options: all other arguments of :meth:`__call__`.

        Yields:
            Outputs whose images are grey, and whose codes are -1, where nothing is sampled or known; the last one is complete.

        Raises:
            ValueError: as :meth:`__call__`, when the first preview is asked for.
        """
        if image is not None or mask_image is not None or keep is not None:
            if image is None or (mask_image is None) == (keep is None):
                raise ValueError(
                    "image: goes with mask_image to inpaint, or with keep for a variation; give two of them."
                )
            options = self._edited(prompt, image, mask_image, keep, options)
        bound = inspect.signature(self.__call__).bind(prompt, **options)
        bound.apply_defaults()
        given = bound.arguments
        names = ("guidance_scale", "temperature", "top_k", "top_p", "guidance_schedule")
        sampling = Sampling(*(given.pop(name) for name in names))
        given["on_step"] = given.pop("callback_on_step_end")
        if preview_every is not None:
            check_whole("preview_every", preview_every)
        yield from self._draw(sampling=sampling, preview_every=preview_every or 0, **given)  # 0 stands for one row

    def _draw(
        self,
        prompt: Any,
        height: int | None,
        width: int | None,
        sampling: Sampling,
        negative_prompt: Any,
        num_images_per_prompt: int,
        generator: Any,
        output_type: str,
        on_step: StepCallback | None,
        decoding: str,
        known: Tensor | None,
        preview_every: int | None,
    ) -> Iterator[UnifiedPipelineOutput]:
        """Previews, unless ``preview_every`` is None, and the finished images."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: {output_type!r} is unknown; use one of {OUTPUT_TYPES}.")
        check_call(callback=on_step, known=known)
        config = base_of(self.model).config
        grid = known_grid(config, self.image_tokenizer.downsample, height, width)
        drawing = plan_drawing(config, self.text_tokenizer, grid, prompt, negative_prompt, num_images_per_prompt,
                               sampling, generator, known, decoding)  # fmt: skip
        count, steps, shown = len(drawing.rows), grid[0] * grid[1], 0
        every = grid[1] if preview_every == 0 else preview_every
        self._interrupted = False
        with tqdm(total=count * steps, unit="code", **self._progress_bar) as bar:
            for codes in drawing.codes(self._decoder()):
                drawn = int((codes >= 0).sum())
                bar.update(drawn - bar.n)
                if on_step is not None:
                    step = codes.shape[1] - 1
                    on_step(self, step, step, {"codes": codes.clone()})  # decoding goes on writing to its own
                if self._interrupted:
                    break
                if every is not None and shown + every <= drawn // count < steps:
                    shown = drawn // count
                    yield self._output(codes, drawing, output_type)
        yield self._output(codes, drawing, output_type)

    def _output(self, codes: Tensor, drawing: Drawing, output_type: str) -> UnifiedPipelineOutput:
        missing = drawing.grid[0] * drawing.grid[1] - codes.shape[1]
        codes = torch.nn.functional.pad(codes, (0, missing), value=-1).reshape(-1, *drawing.grid)
        known = codes if drawing.known is None else drawing.known.to(codes.device)
        codes = torch.where(codes < 0, known, codes)
        interrupted = self._interrupted and bool((codes < 0).any())
        if output_type == "codes":
            return UnifiedPipelineOutput(codes, codes, interrupted)
        pictures: Any = unfinished_images(self.image_tokenizer, codes)
        pictures = to_pil(pictures) if output_type == "pil" else (pictures.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "np":
            pictures = pictures.permute(0, 2, 3, 1).cpu().numpy()
        return UnifiedPipelineOutput(pictures, codes, interrupted)

    def interrupt(self) -> None:
        """Stop sampling after the current code, from a callback or another thread; what is missing stays grey."""
        self._interrupted = True

    def enable_fast_decoding(self, compile: bool = False, int8: bool = False) -> None:
        """Prepare the decoder now, compiled with ``torch.compile`` or with 8-bit weights (not exact).

        A decoder is a copy of the weights, kept between calls and renewed when weights or adapters change (but not when
        weights are written through ``.data``, which leaves no trace).

        Raises:
            ValueError: if the backbone or the device does not allow it.
        """
        options, model = {"compile": compile, "int8": int8}, base_of(self.model)
        self._kept = make_decoder(model, **options)  # may fail, and then nothing has changed
        self._kept_state, self._fast = weights_state(model), options

    def disable_fast_decoding(self) -> None:
        """Free the decoder that is kept; the next call prepares an exact one that is not compiled."""
        self._fast = {}
        self._kept = None

    def _decoder(self) -> Decoder:
        model = base_of(self.model)
        state = weights_state(model)
        if self._kept is None or self._kept.model is not model or self._kept_state != state:
            self._kept = None  # its memory first
            self._kept, self._kept_state = make_decoder(model, **self._fast), state
        return self._kept

    def inpaint(
        self,
        prompt: str | Sequence[str],
        image: Image.Image | Sequence[Image.Image],
        mask_image: Image.Image | Sequence[Image.Image],
        **options: Any,
    ) -> UnifiedPipelineOutput:
        """Redraw the bright part of a mask; every other code stays.

        Codes are generated row by row, so what is redrawn follows what is above it and left of it. For a larger canvas
        see :func:`unified.pipeline.editing.outpainting_canvas`.

        Args:
            prompt: what the whole image shows.
            image: one image, one per prompt or one per image generated, of a size that the model was trained on.
            mask_image: as many masks of the same size.
            options: as in :meth:`__call__`.

        Raises:
            ValueError: if sizes differ or are unknown to the model, and as :meth:`__call__`.
        """
        masks = as_images(mask_image, "mask_image")
        return self(prompt, **self._edited(prompt, image, masks, None, options))

    def variation(
        self, prompt: str | Sequence[str], image: Image.Image | Sequence[Image.Image], keep: float = 0.5, **options: Any
    ) -> UnifiedPipelineOutput:
        """Draw an image again but for a share ``keep`` of its codes; arguments as in :meth:`inpaint`.

        Which codes stay depends on the image's generator.
        """
        return self(prompt, **self._edited(prompt, image, None, keep, options))

    def _edited(self, prompt: Any, image: Any, masks: Any, keep: Any, options: dict[str, Any]) -> dict[str, Any]:
        """Options of a call that generates images again: what masks cover, or all but a share ``keep``."""
        for name in {"height", "width", "known"} & set(options):
            raise ValueError(f"{name}: an edit takes it from the image; leave it out.")
        images, prompts, per_prompt = as_images(image), as_prompts(prompt), options.get("num_images_per_prompt", 1)
        check_sizes(images, base_of(self.model).config, self.image_tokenizer.downsample)
        check_whole("num_images_per_prompt", per_prompt)
        generators = per_image(options.get("generator"), len(prompts), per_prompt)
        known = codes_to_keep(self.image_tokenizer, images, masks)
        known = one_per_image(known, "image", len(prompts), per_prompt)
        if masks is None:
            known = share_to_keep(known, keep, generators)
        size = {"height": images[0].height, "width": images[0].width}
        return {**options, **size, "known": known, "generator": generators}
