"""Evaluation of generated images: distances, CLIP scores, exact checks of shapes, reconstruction and reports.

The names below are imported on first use, so that ``import unified_eval`` loads neither open_clip nor a feature
network.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "adm": "measure_adm open_reference precision_and_recall score_in_runs",
    "clip": "Clip clip_extractor clip_features clip_recipe clip_score clip_text_features load_clip retrieval_at_1 shuffled_gap",
    "diversity": "inception_score nearest_neighbours precision_recall_density_coverage prompt_diversity",
    "extraction": "extract_features open_images",
    "features": "Extractor load_extractor",
    "files": "content_hash",
    "frechet": "Moments cmmd frechet_distance frechet_distance_of_moments kernel_distance kernel_distances_of_subsets moments_of",
    "generation": "generate_files generate_images stream_images",
    "inputs": "Inputs",
    "intervals": "bootstrap_interval wilson_interval",
    "metrics": "DEFAULT_METRICS METRICS Metric measure_images",
    "monitor": "measure_pipeline",
    "nano_clip": "save_nano_clip train_nano_clip",
    "npz": "load_npz load_statistics npz_shape save_npz",
    "prompts": "read_prompts",
    "recipe_cards": "load_recipe parse_with_recipe",
    "reconstruction": "psnr psnr_summary reconstruct",
    "report": "write_report",
    "results": "Results SmallSampleWarning compare_results",
    "selection": "choose_evenly first_usable_rows",
    "shapes": "check_scene find_shapes scene_records shapes_accuracy",
    "sheets": "captioned_grid in_rows",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'unified_eval' has no attribute {name!r}")
    return getattr(import_module(f"unified_eval.{_MODULE_OF[name]}"), name)
