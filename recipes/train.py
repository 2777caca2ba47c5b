"""Train a text-to-image language model: from scratch, full fine-tune or LoRA.

accelerate launch recipes/train.py --config recipes/configs/quickstart.yaml [key=value ...]
"""

from collections.abc import Sequence
from pathlib import Path

from unified.errors import explain_errors
from unified.settings import parse_command_line
from unified.training.config import TrainConfig, load_config
from unified.training.loop import train

CONFIGS = Path(__file__).with_name("configs")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings and train."""
    config = load_config(*parse_command_line(__doc__, TrainConfig, argv, CONFIGS))
    measure = None
    if config.evaluation is not None:
        from unified_eval.monitor import measurement  # an extra, for those who measure on the way

        measure = measurement(config.evaluation, Path(config.output_dir) / "features")
    train(config, measure)


if __name__ == "__main__":
    explain_errors(main)
