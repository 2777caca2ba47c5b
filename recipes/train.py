"""Train a text-to-image language model: from scratch, full fine-tune or LoRA.

accelerate launch recipes/train.py --config recipes/configs/openmoji.yaml [key=value ...]
"""

from unified.settings import parse_command_line
from unified.training.config import TrainConfig, load_config
from unified.training.loop import train

if __name__ == "__main__":
    train(load_config(*parse_command_line(__doc__, TrainConfig)))
