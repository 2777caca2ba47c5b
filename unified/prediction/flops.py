"""Arithmetic cost of training, by formula: what a schedule saves before any clock is looked at."""

from unified.config import UnifiedConfig
from unified.prediction.npp import Grid, PatchSchedule, patch_grid


def training_flops(config: UnifiedConfig, text_positions: float, image_positions: float) -> float:
    """FLOPs of one training step on one sequence: forward and backward, two per multiply-add (arXiv 2001.08361).

    Counts the decoder's matrices, causal attention and the image head; a gated MLP is assumed. Embeddings, norms and the
    text head (one or two positions of an image's sequence are scored over text) are left out.

    Args:
        config: the model's configuration.
        text_positions: text tokens of the sequence, frame tokens included.
        image_positions: image positions, ``h*w/p^2`` for every span.
    """
    c = config.text_config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    queries = c.num_attention_heads * head_dim
    keys = (getattr(c, "num_key_value_heads", None) or c.num_attention_heads) * head_dim
    matrices = c.hidden_size * (2 * queries + 2 * keys + 3 * c.intermediate_size)
    positions = text_positions + image_positions
    attention = queries * positions  # scores and values, each over half of the positions on average
    forward = (
        c.num_hidden_layers * positions * (matrices + attention)
        + image_positions * c.hidden_size * config.codebook_size
    )
    return 6.0 * forward


def schedule_flops(schedule: PatchSchedule, config: UnifiedConfig, grid: Grid, text_positions: float) -> float:
    """Mean FLOPs per image of ``grid`` codes over a whole patch schedule."""
    total = 0.0
    for size, share in schedule.size_shares().items():
        rows, columns = patch_grid(grid, size)
        total += share * training_flops(config, text_positions, rows * columns)
    return total
