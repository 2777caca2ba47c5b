"""The same metrics while a model is trained: generate for a few captions and measure, without touching the training."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unified import UnifiedPipeline
from unified.data import CaptionedImage
from unified.data.crops import fit
from unified.training.config import EvaluationConfig
from unified_eval.generation import square_side, stream_images
from unified_eval.inputs import Inputs, load_networks
from unified_eval.metrics import DEFAULT_METRICS, check_metrics, measure_images, needs_of
from unified_eval.reconstruction import reconstruct
from unified_eval.results import Results
from unified_eval.selection import Row, choose_usable, first_usable_rows, unique_captions


def measure_pipeline(
    pipeline: UnifiedPipeline,
    rows: Sequence[Row | CaptionedImage],
    metrics: Sequence[str] = DEFAULT_METRICS,
    sampling: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    resamples: int = 0,
    **inputs: Any,
) -> Results:
    """Generate one image for each row's caption and measure it against the row's image.

    Called with one ``seed`` again and again, it generates from the same seeds, so that only the model changes. It takes
    no random number from a global generator and leaves the model in the mode, training or not, that it is in. A new
    ``UnifiedPipeline`` puts its model into evaluation mode: whoever makes one calls ``model.train()`` afterwards. With
    ``cache``, real images and reconstructions pass the networks once.

        rows, _ = first_usable_rows("data/openmoji", "validation", 64)
        measure = partial(measure_pipeline, rows=unique_captions(rows), clip=load_clip("runs/clip"),
                          extractor=load_extractor("efficientnet-lite0"), cache="runs/features")
        log.write(step, **measure(pipeline).metrics)  # every few hundred steps

    Args:
        pipeline: the pipeline of the model that is trained, or of its average.
        rows: captions, all different, with real images; at least 2.
        metrics: names out of :data:`unified_eval.metrics.METRICS`.
        sampling: arguments of the pipeline, such as ``guidance_scale``.
        seed: image i has the seed ``seed + i``.
        batch_size: images at once.
        resamples: how often prompts are resampled for the intervals of distances; 0 for none.
        inputs: further fields of :class:`unified_eval.Inputs`: ``clip``, ``extractor``, ``cache``, ``claims``, ...

    Returns:
        The results. Under several processes all have to call this, for they share the networks' work; each generates all
        images and gets all results.

    Raises:
        ValueError: as for :func:`unified_eval.measure_images` and the pipeline.
    """
    side = square_side(pipeline)
    captions, real = [row.caption for row in rows], [fit(row.image, side) for row in rows]
    was_training = pipeline.model.training
    pipeline.model.eval()
    try:
        seeds = [seed + number for number in range(len(captions))]
        generated = list(stream_images(pipeline, captions, seeds, batch_size, **(sampling or {})))
    finally:
        pipeline.model.train(was_training)
    rebuilt = reconstruct(pipeline.image_tokenizer, real, batch_size)
    given = Inputs(captions, real, rebuilt, generated, batch_size=batch_size, **inputs)
    return measure_images(given, metrics, resamples=resamples, seed=seed)


def measurement(config: EvaluationConfig, cache: Path) -> Callable[[UnifiedPipeline], dict[str, float]]:
    """Metrics of a pipeline on a small, fixed choice of captions; real images pass the networks once."""
    check_metrics(config.metrics, {"clip", "extractor"}, config.num_images)
    rows, report = first_usable_rows(config.data, config.split)
    print(f"evaluation on {config.data} [{config.split}]: {len(rows)} captions, {report.skipped} rows without")
    chosen = choose_usable(unique_captions(rows), config.num_images, config.seed)
    networks = load_networks(needs_of(config.metrics), config.clip, config.extractor)
    sampling = {"guidance_scale": config.guidance_scale, "temperature": config.temperature}

    def measure(pipeline: UnifiedPipeline) -> dict[str, float]:
        pipeline.set_progress_bar_config(disable=True)
        results = measure_pipeline(pipeline, chosen, config.metrics, sampling, config.seed, cache=cache, **networks)
        return results.metrics

    return measure
