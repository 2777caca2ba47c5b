"""Several codes per forward pass in any order, from the joint distribution of one at a time (ASSD, arXiv 2504.20456).

A model of any order predicts several cells at once as if they did not depend on one another. Here these are drafts. The
next pass lets them enter in turn, in the image's permutation, each with a query behind it for the next cell: what that
query says follows all drafts before it. Drafts pass the test of :mod:`unified.decoding.speculative`; the first that fails
is sampled again from the residual. The same pass asks for the cells behind the drafts, so every pass both judges and
drafts.

The paper drafts again, in another pass, after a draft has failed. Here drafts behind it are sampled again from what
this pass has said of them, on a context that was wrong in that cell: more codes a pass, and the test makes up for it.
Every pass confirms a cell or more, so there are never more passes than cells.

Codes of a merged cell do not depend on one another, so each of them is tested by itself.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unified.decoding.config import Sampling, check_decoding
from unified.decoding.decode import cell_logits, forced_codes, noise_of, paired_prompts, run_positions
from unified.decoding.decoder import Decoder
from unified.decoding.passes import Passes, image_passes
from unified.decoding.prefill import Prefilled, Prompt, prefill
from unified.decoding.sampling import PositionNoise, filter_logits, sample_gumbel
from unified.decoding.speculative import accepted, leading, residual_codes, verdict_stream
from unified.prediction.merge import Grid, merged_grid


@torch.inference_mode()
def assd_codes(
    decoder: Decoder,
    prompts: Sequence[Sequence[int] | Prompt],
    negative_prompts: Sequence[Sequence[int] | Prompt] | None,
    grid: Grid,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    known: Tensor | None = None,
    window: int = 16,
) -> Iterator[Tensor]:
    """Decode one image after every prompt, one image after the other; arguments as for :func:`unified.decoding.iterate_codes`.

    The distribution is that of plain decoding cell by cell: of a model whose ``prediction.size`` is the number of cells.

    Args:
        window: cells that one pass can confirm: drafts, and the one behind them.

    Yields:
        ``(B, n)`` codes so far, the first n in raster order, as far as any is sampled; -1 where an image has none yet.

    Raises:
        ValueError: for a model of another order, or a window below 2.
    """
    model, count = decoder.model, len(prompts)
    check_decoding("assd", model.config)
    if window < 2:
        raise ValueError(f"window: {window} must be at least 2.")
    rows = paired_prompts(model, prompts, negative_prompts, sampling, generators)
    forced = forced_codes(known, count, grid, model)
    one_by_one = replace(model.prediction, size=math.prod(merged_grid(grid, model.prediction.merge.side)))
    codes, reach = forced.clone(), 0
    for index in range(count):
        passes = image_passes(model, grid, [generators[index]], forced[index, None], one_by_one)
        state = prefill(decoder, rows[index::count], passes.columns + 2 * window)
        for image in _one_image(decoder, state, passes, sampling, generators[index], forced[index], window):
            codes[index] = image
            reach = max(reach, int((image >= 0).nonzero().max()) + 1)
            yield codes[:, :reach]


def _one_image(
    decoder: Decoder,
    state: Prefilled,
    passes: Passes,
    sampling: Sampling,
    generator: torch.Generator,
    known: Tensor,
    window: int,
) -> Iterator[Tensor]:
    """Codes ``(h*w,)`` of one image as they are confirmed, -1 elsewhere."""
    codes, device, size, groups = known.clone(), known.device, decoder.model.config.codebook_size, passes.groups
    if not groups:
        yield codes  # all given
        return
    cells, ranks = (torch.cat([getattr(group, name).view(1, -1) for group in groups]) for name in ("codes", "ranks"))
    queries = torch.tensor([group.asking[0] for group in groups], device=device)
    inputs = torch.tensor([group.entering[0] for group in groups[1:]], device=device)  # a cell enters in the next group
    positions = decoder.positions(passes.coordinates_after(state.position))
    scales = torch.tensor(sampling.scales(len(known)), device=device)[ranks[:, :1].expand_as(ranks)]
    noise, verdicts = PositionNoise([generator], size, device), verdict_stream(generator)
    entering, done = torch.arange(*groups[0].entering, device=device), 0
    drafts, offered = cells.new_empty(0, cells.shape[1]), torch.empty(0, cells.shape[1], size, device=device)
    while done < len(cells):
        # 1. The codes confirmed last and the drafts enter; queries ask for the drafts, and for `window` cells behind them
        guessed = len(drafts)
        asked = slice(done, min(done + guessed + window, len(cells)))
        guess = codes.clone()
        guess[cells[done : done + guessed]] = drafts
        entering = torch.cat([entering, inputs[done : done + guessed]])
        states = run_positions(decoder, state, passes, positions, guess[None], entering, queries[asked])
        logits = cell_logits(decoder, states[:, len(entering) :, None], None, sampling, scales[asked].view(-1, 1))
        logits = filter_logits(logits[0], sampling).view(-1, cells.shape[1], size)
        probability, forced = logits.softmax(dim=-1), known[cells[asked]]
        sampled = sample_gumbel(logits, noise_of(noise, ranks[asked].flatten())[0].view_as(logits))
        sampled = sampled.where(forced < 0, forced)
        # 2. Keep the leading drafts that pass, and one cell more
        wanted, given = (p[:guessed].gather(2, drafts[..., None])[..., 0] for p in (probability, offered))
        good = accepted(wanted, given, verdicts) | (forced[:guessed] >= 0)
        kept = leading(good.all(dim=1))
        last = sampled[kept]
        if kept < guessed:
            last = residual_codes(probability[kept], offered[kept], verdicts)
            last = drafts[kept].where(good[kept], last)
        codes[cells[done : done + kept + 1]] = torch.cat([drafts[:kept], last[None]])
        done += kept + 1
        yield codes
        # 3. Forget the others; what this pass has said of the cells behind is their next draft
        state.cache.rewind(state.cache.column - (guessed - kept))
        entering = inputs[done - 1 : done]
        behind = slice(kept + 1, kept + min(window, len(cells) - done))  # the last cell needs none
        drafts, offered = sampled[behind], probability[behind]
