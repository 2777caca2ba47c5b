"""Train a text-to-image language model: from scratch, full fine-tune or LoRA.

accelerate launch recipes/train.py --config recipes/configs/quickstart.yaml [key=value ...]
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from unified import UnifiedPipeline
from unified.errors import explain_errors
from unified.settings import parse_command_line
from unified.training.config import EvaluationConfig, TrainConfig, load_config
from unified.training.loop import train

CONFIGS = Path(__file__).with_name("configs")


def measurement(config: EvaluationConfig, cache: Path) -> Callable[[UnifiedPipeline], dict[str, float]]:
    """Metrics of a pipeline on a small, fixed choice of captions; real images pass the networks once."""
    from unified_eval.inputs import load_networks
    from unified_eval.metrics import check_metrics, needs_of
    from unified_eval.monitor import measure_pipeline
    from unified_eval.selection import choose_usable, first_usable_rows, unique_captions

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


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings and train."""
    config = load_config(*parse_command_line(__doc__, TrainConfig, argv, CONFIGS))
    cache = Path(config.output_dir) / "features"
    train(config, None if config.evaluation is None else measurement(config.evaluation, cache))


if __name__ == "__main__":
    explain_errors(main)
