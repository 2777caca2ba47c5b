"""Arithmetic cost of training, by formula: what a schedule saves before any clock is looked at."""

from unified.config import UnifiedConfig
from unified.prediction.npp import Grid, PatchSchedule, patch_grid


def training_flops(config: UnifiedConfig, text_slots: float, image_slots: float) -> float:
    """FLOPs of one training step on one sequence: forward and backward, two per multiply-add (arXiv 2001.08361).

    Counts the decoder's matrices, causal attention and the image head; a gated MLP is assumed. Embeddings, norms and the
    text head (one or two slots of a picture's sequence are scored over text) are left out.

    Args:
        config: the model's configuration.
        text_slots: text tokens of the sequence, frame tokens included.
        image_slots: image slots, ``h*w/p^2`` for every span.
    """
    c = config.text_config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    queries = c.num_attention_heads * head_dim
    keys = (getattr(c, "num_key_value_heads", None) or c.num_attention_heads) * head_dim
    matrices = c.hidden_size * (2 * queries + 2 * keys + 3 * c.intermediate_size)
    slots = text_slots + image_slots
    attention = queries * slots  # scores and values, each over half of the slots on average
    forward = c.num_hidden_layers * slots * (matrices + attention) + image_slots * c.hidden_size * config.codebook_size
    return 6.0 * forward


def schedule_flops(schedule: PatchSchedule, config: UnifiedConfig, grid: Grid, text_slots: float) -> float:
    """Mean FLOPs per picture of ``grid`` codes over a whole patch schedule."""
    total = 0.0
    for size, share in schedule.size_shares().items():
        rows, columns = patch_grid(grid, size)
        total += share * training_flops(config, text_slots, rows * columns)
    return total
