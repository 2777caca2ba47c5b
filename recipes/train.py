"""Train a text-to-image language model: from scratch, full fine-tune or LoRA.

accelerate launch recipes/train.py --config recipes/configs/quickstart.yaml [key=value ...]
"""

from collections.abc import Callable
from pathlib import Path

from unified import UnifiedPipeline
from unified.errors import explain_errors
from unified.settings import parse_command_line
from unified.training.config import EvaluationConfig, TrainConfig, load_config
from unified.training.loop import train


def measurement(config: EvaluationConfig, cache: Path) -> Callable[[UnifiedPipeline], dict[str, float]]:
    """Metrics of a pipeline on a small, fixed choice of captions; real images pass the networks once."""
    from unified_eval.clip import load_clip
    from unified_eval.features import load_extractor
    from unified_eval.monitor import measure_pipeline
    from unified_eval.selection import choose_evenly, first_usable_rows, unique_captions

    rows, report = first_usable_rows(config.data, config.split, None)
    print(f"evaluation on {config.data} [{config.split}]: {report.summary()}")
    chosen = choose_evenly(unique_captions(rows), config.num_images, config.seed)
    clip, extractor = load_clip(config.clip), load_extractor(config.extractor)
    sampling = {"guidance_scale": config.guidance_scale, "temperature": config.temperature}

    def measure(pipeline: UnifiedPipeline) -> dict[str, float]:
        pipeline.set_progress_bar_config(disable=True)
        return measure_pipeline(
            pipeline, chosen, clip, extractor, config.metrics, sampling, config.seed, cache=cache
        ).figures

    return measure


def main() -> None:
    """Read the settings and train."""
    config = load_config(*parse_command_line(__doc__, TrainConfig))
    cache = Path(config.output_dir) / "features"
    train(config, None if config.evaluation is None else measurement(config.evaluation, cache))


if __name__ == "__main__":
    explain_errors(main)
