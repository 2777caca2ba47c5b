"""`UnifiedPipeline`: text and images in, images and text out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unified.decoding.config import check_decoding
from unified.decoding.steering import check_steering
from unified.lora.base import base_of
from unified.pipeline.adapters import AdapterMixin
from unified.pipeline.arguments import (
    Generators,
    ImageBatch,
    Wanted,
    arrange_batch,
    check_callback,
    one_per_image,
    per_image,
)
from unified.pipeline.base import one_at_a_time
from unified.pipeline.chat import check_sizes
from unified.pipeline.editing import as_images, codes_to_keep, share_to_keep, unfinished_images
from unified.pipeline.options import GenerationOptions, check_whole
from unified.pipeline.text import TextMixin
from unified_tokenizers.images import to_pil

OUTPUT_TYPES = ("pil", "np", "pt", "codes")
StepCallback = Callable[["UnifiedPipeline", int, int, dict[str, Tensor]], Any]
Classes = int | str | Sequence[int | str] | None


@dataclass
class UnifiedPipelineOutput:
    """Images in the requested form and their codes ``(N, h, w)``, -1 where sampling was interrupted."""

    images: list[Image.Image] | np.ndarray | Tensor
    codes: Tensor
    interrupted: bool = False

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields in their order, which ``return_dict=False`` returns."""
        return self.images, self.codes, self.interrupted


class UnifiedPipeline(TextMixin, AdapterMixin):
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
        check_decoding(str(given.decoding), model.config)
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


def check_output_type(output_type: Any) -> None:
    """Refuse an unknown output type. Raises ValueError."""
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type: {output_type!r} is unknown; use one of {OUTPUT_TYPES}.")
