"""The same metrics while a model is trained: generate for a few captions and measure, without touching the training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unified.data.sources import CaptionedImage, fit_square
from unified_eval.clip import Clip
from unified_eval.drawing import stream_drawings
from unified_eval.evaluate import DEFAULT_METRICS, measure_images
from unified_eval.features import Extractor
from unified_eval.measures import Measures
from unified_eval.reconstruction import reconstruct

if TYPE_CHECKING:
    from unified import UnifiedPipeline


def measure_pipeline(
    pipeline: "UnifiedPipeline",
    rows: Sequence[CaptionedImage],
    clip: Clip,
    extractor: Extractor,
    metrics: Sequence[str] = DEFAULT_METRICS,
    sampling: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    resamples: int = 0,
    cache: str | Path | None = None,
    **settings: Any,
) -> Measures:
    """Draw one image for each row's caption and measure it against the row's image.

    Called again and again with one ``seed``, it samples with the same seeds, so that what changes is the model. It samples
    no random number from a global generator and leaves the model in the mode, training or not, that it is in; a new
    ``UnifiedPipeline`` puts its model into evaluation mode, so that who makes one calls ``model.train()`` afterwards.
    With ``cache``, real images and reconstructions pass the networks once.

        rows, _ = first_usable_rows("data/openmoji", "validation", 64)
        measure = partial(measure_pipeline, rows=unique_captions(rows), clip=load_clip("runs/clip"),
                          extractor=load_extractor("efficientnet-lite0"), cache="runs/features")
        log.write(step, **measure(pipeline).metrics)  # every few hundred steps

    Args:
        pipeline: what is trained, or its average.
        rows: captions, all different, with real images; at least 2.
        clip: what :func:`unified_eval.load_clip` returned.
        extractor: what :func:`unified_eval.load_extractor` returned.
        metrics: names out of :data:`unified_eval.evaluate.METRICS`.
        sampling: arguments of the pipeline, such as ``guidance_scale``.
        seed: image i is sampled with ``seed + i``.
        batch_size: images at once.
        resamples: generates of prompts for the intervals of distances; 0 for none.
        cache: folder of cached features.
        settings: further arguments of :func:`unified_eval.measure_images`, such as ``training`` or ``claims``.

    Returns:
        The figures. Under several processes all have to call this, for they share the networks' work; each generates all
        images and gets all figures.

    Raises:
        ValueError: as for :func:`unified_eval.measure_images` and the pipeline.
    """
    height, width = pipeline.default_size
    if height != width:
        raise ValueError(
            f"pipeline: generates {height}x{width} images; real ones are cropped to squares to be compared."
        )
    captions, real = [row.caption for row in rows], [fit_square(row.image, width) for row in rows]
    was_training = pipeline.model.training
    pipeline.model.eval()
    try:
        seeds = [seed + number for number in range(len(captions))]
        generated = list(stream_drawings(pipeline, captions, seeds, batch_size, **(sampling or {})))
    finally:
        pipeline.model.train(was_training)
    rebuilt = reconstruct(pipeline.image_tokenizer, real, batch_size)
    return measure_images(
        real, rebuilt, generated, captions, clip, extractor, seed=seed, batch_size=batch_size, metrics=metrics,
        resamples=resamples, cache=cache, **settings,
    )  # fmt: skip
