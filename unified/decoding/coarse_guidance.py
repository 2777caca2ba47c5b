"""Guidance by the coarse ability of a model that was trained with patches, too (autoguidance, arXiv 2406.02507).

In patch mode a position holds the mean of a window of codes, and one distribution stands for all codes of the next window
(:mod:`unified.prediction.npp`): a weak model of the same images, for 1 / p^2 of the positions (1 / p in raster order). Guidance
steers away from it,

    logits = coarse + scale * (fine - coarse)

after the same prompt (``autoguided``: no second row is needed), or after the negative prompt (``coarse_cfg``: the unconditional
side of classifier-free guidance, coarsely).

A window counts only when all of its codes are sampled. Where the windows that predict a code are not finished in time, the code
is not guided: those of the first window row in the order ``rows``; in ``diagonals``, with p = 2, the first of each window. In
raster order the windows left of a code are finished in their last row alone, so every row of codes has windows that end with it: p
sequences of windows, each shifted by a row, and no guidance for the first p - 1 rows. Training has seen unshifted windows alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from unified.decoding.config import Sampling, check_decoding
from unified.decoding.decode import (
    begin_image,
    cell_logits,
    continue_image,
    forced_codes,
    paired_prompts,
    run_positions,
)
from unified.decoding.decoder import Decoder
from unified.decoding.passes import Group, Passes, coarse_passes
from unified.decoding.prefill import Prompt, prefill
from unified.decoding.sampling import guide
from unified.prediction.merge import Grid

_UNGUIDED = Sampling()


@torch.inference_mode()
def coarsely_guided_codes(
    decoder: Decoder,
    prompts: Sequence[Sequence[int] | Prompt],
    negative_prompts: Sequence[Sequence[int] | Prompt] | None,
    grid: Grid,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    known: Tensor | None = None,
    mode: str = "autoguided",
    side: int = 2,
) -> Iterator[Tensor]:
    """Decode one image after every prompt, all together; arguments as for :func:`unified.decoding.iterate_codes`.

    Args:
        mode: ``autoguided`` or ``coarse_cfg``.
        side: p of the windows, one of the patch sizes that the model was trained with.

    Yields:
        As :func:`unified.decoding.iterate_codes`.

    Raises:
        ValueError: for a model with another merge, of any order or trained without patches, or windows that do not divide the grid.
    """
    check_decoding(mode, decoder.model.config)
    rows = paired_prompts(decoder.model, prompts, negative_prompts, sampling, generators)
    forced = forced_codes(known, len(prompts), grid, decoder.model)
    state, passes, coordinates = begin_image(decoder, rows[: len(prompts)], grid, generators, forced)
    guides = []
    if sampling.guided:
        others = rows[len(prompts) :] if mode == "coarse_cfg" else rows[: len(prompts)]
        shifts = range(min(side, grid[0] - side + 1)) if decoder.model.prediction.is_raster else range(1)
        guides = [CoarseGuide(decoder, others, grid, passes, sampling, side, shift) for shift in shifts]
    plain = replace(sampling, guidance_scale=1.0, guidance_schedule="constant")
    yield from continue_image(decoder, state, passes, coordinates, plain, generators, forced, guides=guides)


autoguided_codes = partial(coarsely_guided_codes, mode="autoguided")
coarse_cfg_codes = partial(coarsely_guided_codes, mode="coarse_cfg")


class CoarseGuide:
    """Runs the windows of images as they are finished, and guides the logits of the codes that they predict in time.

    Args:
        decoder: of the model.
        prompts: B rows to predict windows after.
        grid: of codes.
        fine: passes of the codes.
        sampling: the scale of guidance.
        side: p of a window.
        shift: rows of codes above the first window. In raster order the last row of codes of each window is guided, in other
            orders with a shift of 0 every row.
    """

    def __init__(
        self, decoder: Decoder, prompts: Sequence[Prompt], grid: Grid, fine: Passes, sampling: Sampling, side: int, shift: int
    ):  # fmt: skip
        self.decoder, self.passes = decoder, coarse_passes(decoder.model, grid, side, shift)
        self.state = prefill(decoder, prompts, self.passes.room)
        self.positions = decoder.positions(self.passes.coordinates_after(self.state.position))
        self.hidden, self.scales = self.state.hidden[:, None], sampling.scales(grid[0] * grid[1])
        count = grid[0] * grid[1]
        when, self.group, self.place = (torch.full((count,), -1) for _ in range(3))  # of each code
        for number, group in enumerate(fine.groups):
            when[group.codes[0].cpu()] = number
        self.after: list[int] = []  # how many groups of codes come before each group of windows
        self.until: list[int] = []  # the last group of codes that each group of windows predicts
        entered, latest = self.passes.entered[0].cpu(), -1
        for number, group in enumerate(self.passes.groups):
            latest = max([latest, *when[entered[slice(*group.entering)]].flatten().tolist()])
            codes = group.codes[0].cpu()
            self.after.append(latest + 1)
            self.until.append(int(when[codes].max()))
            self.group[codes], self.place[codes] = number, torch.arange(len(codes)) // side**2
        if decoder.model.prediction.is_raster:
            row = torch.arange(count) // grid[1]
            self.group[(row - shift) % side != side - 1] = -1
        self.predicted: dict[int, Tensor] = {}  # logits (B, n, K) by the group of windows
        self.next = 0

    def __call__(self, number: int, group: Group, codes: Tensor, logits: Tensor) -> Tensor:
        """Logits ``(B, n, K)`` of a group of codes, guided where their windows are predicted by windows that are finished.

        Args:
            number: of the group.
            group: the group.
            codes: ``(B, h*w)`` so far.
            logits: of its n codes.
        """
        while self.next < len(self.after) and self.after[self.next] <= number:
            self._predict(self.passes.groups[self.next], codes)
        for done in [each for each in self.predicted if self.until[each] < number]:
            del self.predicted[done]
        scale, sources = self.scales[int(group.ranks[0])], self.group[group.codes[0].cpu()].tolist()
        guided = [column for column, source in enumerate(sources) if source in self.predicted]
        if not guided:
            return logits
        places = self.place[group.codes[0].cpu()].tolist()
        coarse = torch.stack([self.predicted[sources[column]][:, places[column]] for column in guided], dim=1)
        columns = torch.tensor(guided, device=logits.device)
        return logits.index_copy(1, columns, guide(logits[:, columns], coarse, scale))

    def _predict(self, group: Group, codes: Tensor) -> None:
        """Run the windows that were finished last, and the queries for those to come; predict the next group of windows."""
        entering, asking = (torch.arange(*each, device=codes.device) for each in (group.entering, group.asking))
        if len(entering) + len(asking):
            self.hidden = run_positions(self.decoder, self.state, self.passes, self.positions, codes, entering, asking)
        states = self.hidden[:, group.sources].unflatten(1, group.shape)
        self.predicted[self.next] = cell_logits(self.decoder, states, group.missing, _UNGUIDED, 1.0)
        self.next += 1
