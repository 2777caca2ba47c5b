"""Evaluation of generated images: distances, CLIP scores, exact checks of shapes, reconstruction and reports.

The names below are imported on first use, so that ``import unified_eval`` loads neither open_clip nor a feature
network.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unified_eval.clip import (
        Clip,
        clip_extractor,
        clip_features,
        clip_recipe,
        clip_score,
        clip_text_features,
        load_clip,
        retrieval_at_1,
        shuffled_gap,
    )
    from unified_eval.diversity import (
        inception_score,
        nearest_neighbours,
        precision_recall_density_coverage,
        prompt_diversity,
    )
    from unified_eval.drawing import content_hash, draw_images, stream_drawings
    from unified_eval.evaluate import evaluate_images, evaluate_tokenizer, measure_images
    from unified_eval.extraction import extract_features, open_images
    from unified_eval.features import Extractor, load_extractor
    from unified_eval.frechet import cmmd, frechet_distance, kernel_distance, kernel_distances_of_subsets
    from unified_eval.intervals import bootstrap_interval, wilson_interval
    from unified_eval.measures import Measures, SmallSampleWarning, compare_measures
    from unified_eval.monitor import measure_pipeline
    from unified_eval.nano_clip import save_nano_clip, train_nano_clip
    from unified_eval.npz import load_npz, save_npz
    from unified_eval.prompts import read_prompts
    from unified_eval.reconstruction import psnr, psnr_summary, reconstruct
    from unified_eval.report import write_report
    from unified_eval.selection import choose_evenly, first_usable_rows
    from unified_eval.shapes import check_scene, find_shapes, scene_records, shapes_accuracy
    from unified_eval.sheets import captioned_grid, in_rows

_MODULE_OF = {
    "Clip": "clip",
    "Extractor": "features",
    "Measures": "measures",
    "SmallSampleWarning": "measures",
    "bootstrap_interval": "intervals",
    "captioned_grid": "sheets",
    "check_scene": "shapes",
    "choose_evenly": "selection",
    "clip_extractor": "clip",
    "clip_features": "clip",
    "clip_recipe": "clip",
    "clip_score": "clip",
    "clip_text_features": "clip",
    "cmmd": "frechet",
    "compare_measures": "measures",
    "content_hash": "drawing",
    "draw_images": "drawing",
    "evaluate_images": "evaluate",
    "evaluate_tokenizer": "evaluate",
    "extract_features": "extraction",
    "find_shapes": "shapes",
    "first_usable_rows": "selection",
    "frechet_distance": "frechet",
    "in_rows": "sheets",
    "inception_score": "diversity",
    "kernel_distance": "frechet",
    "kernel_distances_of_subsets": "frechet",
    "load_clip": "clip",
    "load_extractor": "features",
    "load_npz": "npz",
    "measure_images": "evaluate",
    "measure_pipeline": "monitor",
    "nearest_neighbours": "diversity",
    "open_images": "extraction",
    "precision_recall_density_coverage": "diversity",
    "prompt_diversity": "diversity",
    "psnr": "reconstruction",
    "psnr_summary": "reconstruction",
    "read_prompts": "prompts",
    "reconstruct": "reconstruction",
    "retrieval_at_1": "clip",
    "save_nano_clip": "nano_clip",
    "save_npz": "npz",
    "scene_records": "shapes",
    "shapes_accuracy": "shapes",
    "shuffled_gap": "clip",
    "stream_drawings": "drawing",
    "train_nano_clip": "nano_clip",
    "wilson_interval": "intervals",
    "write_report": "report",
}

__all__ = [
    "Clip",
    "Extractor",
    "Measures",
    "SmallSampleWarning",
    "bootstrap_interval",
    "captioned_grid",
    "check_scene",
    "choose_evenly",
    "clip_extractor",
    "clip_features",
    "clip_recipe",
    "clip_score",
    "clip_text_features",
    "cmmd",
    "compare_measures",
    "content_hash",
    "draw_images",
    "evaluate_images",
    "evaluate_tokenizer",
    "extract_features",
    "find_shapes",
    "first_usable_rows",
    "frechet_distance",
    "in_rows",
    "inception_score",
    "kernel_distance",
    "kernel_distances_of_subsets",
    "load_clip",
    "load_extractor",
    "load_npz",
    "measure_images",
    "measure_pipeline",
    "nearest_neighbours",
    "open_images",
    "precision_recall_density_coverage",
    "prompt_diversity",
    "psnr",
    "psnr_summary",
    "read_prompts",
    "reconstruct",
    "retrieval_at_1",
    "save_nano_clip",
    "save_npz",
    "scene_records",
    "shapes_accuracy",
    "shuffled_gap",
    "stream_drawings",
    "train_nano_clip",
    "wilson_interval",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'unified_eval' has no attribute {name!r}")
    return getattr(import_module(f"unified_eval.{_MODULE_OF[name]}"), name)
