"""Evaluation of generated pictures: Frechet distances, CLIP scores, retrieval, reconstruction and reports.

The names below are imported on first use, so that ``import unified_eval`` loads neither open_clip nor a feature
network.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unified_eval.clip import Clip, clip_features, clip_recipe, clip_score, load_clip, retrieval_at_1, shuffled_gap
    from unified_eval.evaluate import evaluate_pictures, evaluate_tokenizer
    from unified_eval.features import Extractor, load_extractor
    from unified_eval.frechet import frechet_distance, kernel_distance
    from unified_eval.intervals import bootstrap_interval, wilson_interval
    from unified_eval.nano_clip import save_nano_clip, train_nano_clip
    from unified_eval.reconstruction import psnr, psnr_summary, reconstruct
    from unified_eval.report import write_report
    from unified_eval.selection import choose_evenly, first_usable_rows
    from unified_eval.shapes import check_scene, find_shapes, scene_records, shapes_accuracy
    from unified_eval.sheets import captioned_grid, in_rows

_MODULE_OF = {
    "Clip": "clip",
    "Extractor": "features",
    "bootstrap_interval": "intervals",
    "captioned_grid": "sheets",
    "check_scene": "shapes",
    "choose_evenly": "selection",
    "clip_features": "clip",
    "clip_recipe": "clip",
    "clip_score": "clip",
    "evaluate_pictures": "evaluate",
    "evaluate_tokenizer": "evaluate",
    "find_shapes": "shapes",
    "first_usable_rows": "selection",
    "frechet_distance": "frechet",
    "in_rows": "sheets",
    "kernel_distance": "frechet",
    "load_clip": "clip",
    "load_extractor": "features",
    "psnr": "reconstruction",
    "psnr_summary": "reconstruction",
    "reconstruct": "reconstruction",
    "retrieval_at_1": "clip",
    "save_nano_clip": "nano_clip",
    "scene_records": "shapes",
    "shapes_accuracy": "shapes",
    "shuffled_gap": "clip",
    "train_nano_clip": "nano_clip",
    "wilson_interval": "intervals",
    "write_report": "report",
}

__all__ = [
    "Clip",
    "Extractor",
    "bootstrap_interval",
    "captioned_grid",
    "check_scene",
    "choose_evenly",
    "clip_features",
    "clip_recipe",
    "clip_score",
    "evaluate_pictures",
    "evaluate_tokenizer",
    "find_shapes",
    "first_usable_rows",
    "frechet_distance",
    "in_rows",
    "kernel_distance",
    "load_clip",
    "load_extractor",
    "psnr",
    "psnr_summary",
    "reconstruct",
    "retrieval_at_1",
    "save_nano_clip",
    "scene_records",
    "shapes_accuracy",
    "shuffled_gap",
    "train_nano_clip",
    "wilson_interval",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'unified_eval' has no attribute {name!r}")
    return getattr(import_module(f"unified_eval.{_MODULE_OF[name]}"), name)
