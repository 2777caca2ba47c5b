"""Rows that begin before the row above has ended: several codes a pass in raster order (ZipAR, arXiv 2412.04062).

A model of raster order predicts a code from the one before it. Here the first row is sampled as ever; each further row begins
once ``window`` codes of the row above it are known, and every row that has begun grows by one code a pass. A code sees those
before it in raster order, as far as they are known: what it misses lies in the rows above, to the right and ``window`` or
more columns away. So the distribution is not that of the model, but near to it, without any training, and the images of
a batch run together.

The first code of a row is predicted from the last one of the row above, which is not known by then. In its place, at its
coordinates, stands the last code of the latest row that has ended. (The paper's code takes the last known code of the row two
above; with a narrow window that one lies in the middle of the image, and the loss of a row's first code is much higher.)
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from unified.decoding.config import Sampling, check_decoding
from unified.decoding.decode import forced_codes, noise_of, paired_prompts, sample_cells, span_coordinates
from unified.decoding.decoder import Decoder
from unified.decoding.prefill import Prompt, bias_among, prefill
from unified.decoding.sampling import PositionNoise
from unified.prediction.merge import Grid


@torch.inference_mode()
def zipar_codes(
    decoder: Decoder,
    prompts: Sequence[Sequence[int] | Prompt],
    negative_prompts: Sequence[Sequence[int] | Prompt] | None,
    grid: Grid,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    known: Tensor | None = None,
    window: int = 3,
) -> Iterator[Tensor]:
    """Decode one image span after every prompt, all together; arguments as for :func:`unified.decoding.iterate_codes`.

    Args:
        window: codes of a row that are known before the next one begins; with a whole row the images are those of plain
            decoding.

    Yields:
        ``(B, n)`` codes so far, the first n in raster order, as far as any is sampled; -1 where an image has none yet.

    Raises:
        ValueError: for a model of another order, or a window below 1.
    """
    model, width, device = decoder.model, grid[1], decoder.model.device
    check_decoding("zipar", model.config)
    if window < 1:
        raise ValueError(f"window: {window} must be at least 1.")
    rows = paired_prompts(model, prompts, negative_prompts, sampling, generators)
    codes, when = forced_codes(known, len(prompts), grid, model).clone(), staggered_passes(grid, window)
    state = prefill(decoder, rows, len(when) + 1)
    positions = decoder.positions(span_coordinates(model, state.position, grid))
    noise = PositionNoise(generators, model.config.codebook_size, device)
    scales = torch.tensor(sampling.scales(len(when)), device=device)[:, None]
    everywhere = torch.ones(1, 1, dtype=torch.bool, device=device)
    ends, columns = when[width - 1 :: width], when[:0]  # when each row ends; the codes in the cache
    states = state.hidden[:, None]
    for number in range(int(when[-1]) + 1):
        cells = (when == number).nonzero().flatten()
        if number:
            # What has been sampled enters, and for the first code of a row perhaps another in place of the one before it.
            places = torch.cat([(when == number - 1).nonzero().flatten(), cells - 1]).unique()
            is_known = when[places] < number
            ended = int((ends < number).sum())
            entering = places.where(is_known, ended * width - 1).to(device)
            visible = (torch.cat([columns, places]) <= places[:, None]).to(device)
            embeds = decoder.embed(codes[:, entering]).repeat(len(rows) // len(codes), 1, 1)
            bias = bias_among(state, visible)
            hidden = decoder(embeds, positions[:, places.to(device)], state.cache, bias, everywhere)
            # The one that stands for another comes last, was seen by none, and is forgotten.
            state.cache.rewind(state.cache.column - int((~is_known).sum()))
            columns = torch.cat([columns, places[is_known]])
            states = hidden[:, torch.searchsorted(places, cells - 1).to(device)]
        index = cells.to(device)
        noises, given = noise_of(noise, cells), codes[:, index]
        codes[:, index], _ = sample_cells(decoder, states[:, :, None], None, sampling, scales[index], noises, given)
        yield codes[:, : int(cells[-1]) + 1]


def staggered_passes(grid: Grid, window: int) -> Tensor:
    """``(h*w,)``, the pass in which each code is sampled: the first row alone, then each row ``window`` behind the one above."""
    row, column = (each.flatten() for each in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    return torch.where(row == 0, column, grid[1] + (row - 1) * min(window, grid[1]) + column)
