"""Stages over a training, from coarse patches to single codes, and their cost by formula."""

import math
from dataclasses import dataclass

from unified.config import UnifiedConfig, head_dim
from unified.prediction.merge import Grid, merged_grid, patches
from unified.prediction.plan import Prediction


@dataclass(frozen=True)
class Stage:
    """Steps ``[start, end)`` trained with one patch size."""

    patch_size: int
    start: int
    end: int


@dataclass(frozen=True)
class PatchSchedule:
    """Patch sizes from coarse to fine and the share of the training steps that each one gets.

    Args:
        patch_sizes: strictly decreasing, ending at 1.
        shares: one positive share per patch size; they sum to 1.
        restart: restart the learning rate in every stage (as in the paper), or run one schedule over all of them.
        warmup: share of a schedule spent on linear warm-up from ``1 / warmup_steps``.
        decay: share of a schedule spent on linear decay.
        final: multiplier reached at the end of the decay.
        mixed: share of every stage's steps that go back to the coarser sizes in turn, so that they stay trained to the
            end; 0 as in the paper.
    """

    patch_sizes: tuple[int, ...] = (2, 1)
    shares: tuple[float, ...] = (0.5, 0.5)
    restart: bool = True
    warmup: float = 0.05
    decay: float = 0.2
    final: float = 0.1
    mixed: float = 0.0

    def __post_init__(self) -> None:
        for name, kind, wanted in (("patch_sizes", int, "whole numbers"), ("shares", int | float, "numbers")):
            given = getattr(self, name)
            if not isinstance(given, list | tuple) or not all(isinstance(value, kind) for value in given):
                raise ValueError(f"{name}: {given!r} must be a list of {wanted}.")
        for name in ("warmup", "decay", "final", "mixed"):
            if not isinstance(getattr(self, name), int | float):
                raise ValueError(f"{name}: {getattr(self, name)!r} must be a number.")
        sizes = list(self.patch_sizes)
        if not sizes or sizes[-1] != 1 or sizes != sorted(set(sizes), reverse=True):
            raise ValueError(f"patch_sizes: {self.patch_sizes} must be strictly decreasing and end at 1.")
        if (
            len(self.shares) != len(sizes)
            or min(self.shares) <= 0
            or not math.isclose(sum(self.shares), 1.0, abs_tol=1e-6)
        ):
            raise ValueError(f"shares: {self.shares} must be {len(sizes)} positive numbers that sum to 1.")
        if not (self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1):
            raise ValueError(f"warmup, decay: {self.warmup} and {self.decay} must be shares that sum to at most 1.")
        if not 0 <= self.final <= 1:
            raise ValueError(f"final: {self.final} must lie in [0, 1].")
        if not 0 <= self.mixed < 1:
            raise ValueError(f"mixed: {self.mixed} must lie in [0, 1).")

    @classmethod
    def from_levels(cls, levels: int, ratio: float = 0.5, **options: float | bool) -> "PatchSchedule":
        """The paper's schedule: ``levels`` patch sizes ending at 1, stage boundaries at ``ratio ** i`` of the training."""
        if levels not in (1, 2, 3, 4) or not 0 < ratio < 1:
            raise ValueError(f"levels, ratio: {levels} and {ratio} must lie in 1..4 and (0, 1).")
        ends = [ratio**i for i in reversed(range(levels))]
        shares = tuple(end - start for start, end in zip([0.0, *ends], ends, strict=False))
        return cls(patch_sizes=tuple(2**i for i in reversed(range(levels))), shares=shares, **options)  # type: ignore[arg-type]

    def stages(self, total_steps: int) -> list[Stage]:
        """Cut ``total_steps`` into stages; every stage gets at least one step."""
        if total_steps < len(self.patch_sizes):
            raise ValueError(f"total_steps: {total_steps} is too few for {len(self.patch_sizes)} stages.")
        stages, start, passed = [], 0, 0.0
        for i, (size, share) in enumerate(zip(self.patch_sizes, self.shares, strict=True)):
            passed += share
            later = len(self.patch_sizes) - 1 - i
            end = min(max(round(passed * total_steps), start + 1), total_steps - later) if later else total_steps
            stages.append(Stage(size, start, end))
            start = end
        return stages

    def stage(self, step: int, total_steps: int) -> Stage:
        """The stage that ``step`` (counted from 0) belongs to."""
        if not 0 <= step < total_steps:
            raise ValueError(f"step: {step} lies outside the {total_steps} steps of the schedule.")
        return next(stage for stage in self.stages(total_steps) if step < stage.end)

    def patch_size(self, step: int, total_steps: int) -> int:
        """The patch size of ``step``: its stage's, or a coarser one for the share ``mixed`` of the steps, evenly spread."""
        stage = self.stage(step, total_steps)
        coarser = [size for size in self.patch_sizes if size > stage.patch_size]
        done = step - stage.start
        before, after = math.floor(done * self.mixed), math.floor((done + 1) * self.mixed)
        return coarser[before % len(coarser)] if coarser and after > before else stage.patch_size

    def lr_multiplier(self, step: int, total_steps: int) -> float:
        """Factor on the peak learning rate at ``step``: linear warm-up, constant, linear decay. Never 0, never past the end."""
        stage = self.stage(step, total_steps) if self.restart else Stage(1, 0, total_steps)
        length, done = stage.end - stage.start, step - stage.start
        warmup_steps, decay_steps = round(self.warmup * length), round(self.decay * length)
        if done < warmup_steps:
            return (done + 1) / warmup_steps
        left = length - done
        if left < decay_steps:
            return self.final + (1 - self.final) * left / decay_steps
        return 1.0

    def size_shares(self) -> dict[int, float]:
        """Share of all steps that each patch size gets, with mixed steps counted where they are spent."""
        shares = dict.fromkeys(self.patch_sizes, 0.0)
        for i, (size, share) in enumerate(zip(self.patch_sizes, self.shares, strict=True)):
            coarser = self.patch_sizes[:i]
            mixed = self.mixed if coarser else 0.0
            shares[size] += share * (1 - mixed)
            for other in coarser:
                shares[other] += share * mixed / len(coarser)
        return shares

    def relative_cost(self) -> float:
        """Image positions processed, relative to next-token training on the same images."""
        return sum(share / size**2 for size, share in self.size_shares().items())


def training_flops(
    config: UnifiedConfig,
    text_positions: float,
    image_positions: float,
    scored: float | None = None,
    squares: float | None = None,
) -> float:
    """FLOPs of one training step on one sequence: forward and backward, two per multiply-add (arXiv 2001.08361).

    Counts the decoder's matrices, causal attention and the image head; a gated MLP is assumed. Embeddings, norms and the
    text head (one or two positions of an image's sequence are scored over text) are left out.

    Args:
        config: the model's configuration.
        text_positions: text tokens of the sequence, frame tokens included.
        image_positions: image positions, ``h*w/p^2`` for every image.
        scored: states that the image head scores; default ``image_positions``.
        squares: of several sequences together, the sum of their squared lengths; default: there is one.
    """
    c = config.text_config
    width = head_dim(c)
    queries = c.num_attention_heads * width
    keys = (getattr(c, "num_key_value_heads", None) or c.num_attention_heads) * width
    matrices = c.hidden_size * (2 * queries + 2 * keys + 3 * c.intermediate_size)
    positions = text_positions + image_positions
    squares = positions**2 if squares is None else squares
    attention = queries * squares  # scores and values, each over half of the positions on average
    scored = image_positions if scored is None else scored
    forward = c.num_hidden_layers * (positions * matrices + attention) + scored * c.hidden_size * config.codebook_size
    return 6.0 * forward


def image_flops(config: UnifiedConfig, grid: Grid, text_positions: float, patch_size: int = 1) -> float:
    """FLOPs of one training step on one image of ``grid`` codes behind a text, in the order and with the merge of a model.

    The modules of a merge, of its chain, and of a join of sources are counted too (unified/model/image_modules.py).
    """
    prediction = Prediction.of(config)
    merge = prediction.merge if patch_size == 1 else patches(patch_size)
    cells = merged_grid(grid, merge.side)
    plan = prediction.training_plan(cells, 0)
    count, sources, learned = cells[0] * cells[1], prediction.way.most_sources, merge.kind == "channel"
    codes = merge.side**2 if learned else 1
    squares = 0  # matrices of width x width that a vector passes
    if learned:
        squares += 4 * int((plan.cells >= 0).sum()) + (3 + codes) * count
        if merge.chained:
            squares += (1 + 4 * codes) * count
    if sources > 1:
        squares += (3 + sources) * count
    flops = training_flops(config, text_positions, len(plan.cells), count * codes)
    return flops + 6.0 * squares * config.text_config.hidden_size**2


def schedule_flops(schedule: PatchSchedule, config: UnifiedConfig, grid: Grid, text_positions: float) -> float:
    """Mean FLOPs per image of ``grid`` codes over a whole patch schedule."""
    shares = schedule.size_shares().items()
    return sum(share * image_flops(config, grid, text_positions, size) for size, share in shares)
