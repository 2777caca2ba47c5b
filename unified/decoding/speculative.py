"""Several codes per forward pass in raster order: drafts of the codes to come are checked together.

All modes guess a window of codes, run it through the model at once and keep the leading codes that the model confirms.
What it says about the rest of the window, on a context that was partly wrong, becomes the next draft (Jacobi
iteration); a position new in the window is guessed from the one above it in the image. They differ in the test that a
draft has to pass:

``jacobi``
    The draft equals the code that plain decoding samples with the noise of that position. The image is that of plain
    decoding, code for code.
``sjd``
    Speculative Jacobi decoding (arXiv 2410.01699): a draft sampled from q is kept with probability ``min(1, p/q)``, else
    sampled again from the residual ``max(0, p - q)``. The distribution is that of plain decoding; the image for a seed is
    another. Keeps more drafts than ``jacobi``. A place is sampled with the same noise in every pass, so that its draft stays
    while its distribution hardly moves: the Gumbel coupling of Speculative Coupled Decoding (arXiv 2510.24211).
``gsd``
    As ``sjd``, but a draft is judged by the probability of its group, the codes nearest to it in the model's image
    embedding. Faster and not exact: it samples a code when the model only wanted a similar one.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from unified.decoding.config import Sampling, check_decoding
from unified.decoding.decode import cell_logits, forced_codes, paired_prompts, span_coordinates
from unified.decoding.decoder import Decoder
from unified.decoding.prefill import Prefilled, Prompt, causal_bias, prefill
from unified.decoding.sampling import PositionNoise, filter_logits, gumbel_noise, sample_gumbel
from unified.prediction.merge import Grid

MODES = ("jacobi", "sjd", "gsd")


@torch.inference_mode()
def speculate_codes(
    decoder: Decoder,
    prompts: Sequence[Sequence[int] | Prompt],
    negative_prompts: Sequence[Sequence[int] | Prompt] | None,
    grid: Grid,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    known: Tensor | None = None,
    mode: str = "sjd",
    window: int = 16,
    group_size: int = 16,
) -> Iterator[Tensor]:
    """Decode one image span after every prompt, one image after the other.

    Rows of a batch would wait for the one whose drafts fail, so images take turns; large batches are better served by
    :func:`unified.decoding.iterate_codes`, whose arguments these are.

    Args:
        mode: ``jacobi``, ``sjd`` or ``gsd``.
        window: codes checked in one forward pass.
        group_size: codes in a group of ``gsd``; with 1 it is ``sjd``.

    Yields:
        ``(B, n)`` codes so far, n those of the image that is furthest, -1 where an image has none yet.

    Raises:
        ValueError: for an unknown mode, one that does not suit the model's order, a window below 2 or a group below 1.
    """
    if mode not in MODES:
        raise ValueError(f"decoding: {mode!r} is unknown; use 'plain' or one of {MODES}.")
    check_decoding(mode, decoder.model.config)
    if window < 2 or group_size < 1:
        raise ValueError(f"window, group_size: {window} and {group_size} must be at least 2 and 1.")
    steps, count = grid[0] * grid[1], len(prompts)
    rows = paired_prompts(decoder.model, prompts, negative_prompts, sampling, generators)
    forced = forced_codes(known, count, grid, decoder.model)
    groups = None
    if mode == "gsd":
        if group_size not in decoder.groups:
            every_code = torch.arange(decoder.model.config.codebook_size, device=decoder.model.device)
            decoder.groups[group_size] = _groups(decoder.embed(every_code).detach(), group_size)
        groups = decoder.groups[group_size]
    codes = torch.full((count, steps), -1, dtype=torch.int64, device=decoder.model.device)
    furthest = 0
    for index in range(count):
        state = prefill(decoder, rows[index::count], steps)
        judge = _Judge(mode, generators[index], groups, decoder.model.config.codebook_size, grid[1], codes.device)
        for done in _one_image(decoder, state, grid, sampling, judge, forced[index], window):
            codes[index, : len(done)] = done
            furthest = max(furthest, len(done))
            yield codes[:, :furthest]


jacobi_codes = partial(speculate_codes, mode="jacobi")
sjd_codes = partial(speculate_codes, mode="sjd")
gsd_codes = partial(speculate_codes, mode="gsd")


def _one_image(
    decoder: Decoder, state: Prefilled, grid: Grid, sampling: Sampling, judge: "_Judge", known: Tensor, window: int
) -> Iterator[Tensor]:
    """Codes ``(n,)`` of one image as they are confirmed."""
    cache, steps, sides, start = state.cache, len(known), len(state.hidden), state.cache.column
    positions = decoder.positions(span_coordinates(decoder.model, state.position, grid))
    scales = torch.tensor(sampling.scales(steps), device=known.device)
    codes, done = torch.empty(steps, dtype=torch.int64, device=known.device), 0
    hidden, everywhere = state.hidden[:, None], torch.ones(1, 1, dtype=torch.bool, device=known.device)
    while True:
        # Hidden states predict the codes `done`, `done + 1`, ...; the judge holds drafts for all of them but the last.
        scale = scales[done : done + hidden.shape[1], None]
        logits = cell_logits(decoder, hidden[:, :, None], None, sampling, scale)[0]
        confirmed = judge(filter_logits(logits, sampling), done, known, min(window, steps))
        codes[done : done + len(confirmed)] = confirmed
        done += len(confirmed)
        yield codes[:done]
        if done == steps:
            return
        inputs = torch.cat([codes[done - 1 : done], judge.drafts[: steps - done - 1]])
        first, last = done - 1, done - 1 + len(inputs)
        cache.rewind(start + first)
        embeds = decoder.embed(inputs).expand(sides, -1, -1)
        hidden = decoder(embeds, positions[:, first:last], cache, causal_bias(state, last - first), everywhere)


class _Judge:
    """Confirms drafts of one image and holds those of the codes that follow.

    Randomness is tied to positions: a draft of a position is always sampled with that position's noise. Verdicts come from
    a second stream.
    """

    def __init__(
        self,
        mode: str,
        generator: torch.Generator,
        groups: Tensor | None,
        codebook_size: int,
        columns: int,
        device: torch.device,
    ):
        self.exact_image, self.groups, self.columns = mode == "jacobi", groups, columns
        self.verdicts = verdict_stream(generator)
        self.noise = PositionNoise([generator], codebook_size, device)
        self.drafts = torch.empty(0, dtype=torch.int64, device=device)
        self.proposal = torch.empty(0, codebook_size, device=device)  # distributions that the drafts were sampled from
        self.seen = torch.empty(0, codebook_size, device=device)  # latest logits of positions, from one row back on

    def __call__(self, logits: Tensor, position: int, known: Tensor, window: int) -> Tensor:
        """Confirm the leading drafts by filtered ``logits (T, K)`` of the codes from ``position`` on; at least one code.

        The next drafts are sampled from the same logits, those of further positions from the logits of the position
        above.
        """
        width = len(logits)
        forced = known[position : position + width]
        sampled = self._sampled(range(position, position + width), logits, known, position)
        if self.exact_image:
            kept = leading(sampled[:-1] == self.drafts[: width - 1])
            confirmed = sampled[: kept + 1]
        else:
            probability = logits.softmax(dim=-1)
            kept = self._accepted(probability, forced)
            last = sampled[kept : kept + 1]
            if kept < width - 1 and forced[kept] < 0:
                last = residual_codes(probability[kept, None], self.proposal[kept, None], self.verdicts)
            confirmed = torch.cat([self.drafts[:kept], last])
            self.proposal = probability[kept + 1 :]
        self.drafts = sampled[kept + 1 :]
        beyond = position + len(confirmed)  # first position to be drafted again
        missing = range(beyond + len(self.drafts), min(beyond + window - 1, len(known)))
        first, newest = max(0, position - self.columns), position + width - 1  # `seen` reaches from and to
        seen = torch.cat([self.seen[: position - first], logits])
        if missing:
            above = torch.arange(missing.start, missing.stop, device=known.device) - self.columns
            above = above.clamp_max(newest).where(above >= 0, newest)  # the first row has none above it
            self._draft(missing, seen[above - first], known, beyond)
        self.seen = seen[max(0, beyond - self.columns) - first :]
        return confirmed

    def _draft(self, positions: range, logits: Tensor, known: Tensor, first: int) -> None:
        """Add drafts of positions by ``logits`` of others, with noise from position ``first`` on."""
        self.drafts = torch.cat([self.drafts, self._sampled(positions, logits, known, first)])
        if not self.exact_image:
            self.proposal = torch.cat([self.proposal, logits.softmax(dim=-1)])

    def _sampled(self, positions: range, logits: Tensor, known: Tensor, first: int) -> Tensor:
        """Codes of positions, known or sampled from ``logits``; the noise from position ``first`` on is kept."""
        forced, noise = known[positions.start : positions.stop], self.noise.at(first, positions.stop - first)[0]
        return torch.where(forced < 0, sample_gumbel(logits, noise[positions.start - first :]), forced)

    def _accepted(self, probability: Tensor, forced: Tensor) -> int:
        """Number of leading drafts that speculative sampling keeps."""
        width = len(probability)
        drafts, proposal = self.drafts[: width - 1], self.proposal[: width - 1]
        group = drafts[:, None] if self.groups is None else self.groups[drafts]
        wanted, offered = (p.gather(1, group).sum(dim=1) for p in (probability[:-1], proposal))
        return leading(accepted(wanted, offered, self.verdicts) | (forced[:-1] >= 0))


def verdict_stream(generator: torch.Generator) -> torch.Generator:
    """The stream of random numbers that judge an image's drafts; beside the one of its noise, which stays."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator.clone_state(), device=generator.device))
    return torch.Generator(generator.device).manual_seed(seed)


def accepted(wanted: Tensor, offered: Tensor, verdicts: torch.Generator) -> Tensor:
    """Which drafts pass, each with probability ``min(1, wanted/offered)``: its own under both distributions."""
    chance = torch.rand(wanted.shape, generator=verdicts, device=verdicts.device).to(wanted.device)
    return chance * offered < wanted


def residual_codes(wanted: Tensor, offered: Tensor, verdicts: torch.Generator) -> Tensor:
    """Codes ``(N,)`` in place of failed drafts, from the residuals of ``wanted (N, K)`` over ``offered``."""
    rest = (wanted - offered).clamp_min(0)
    rest = rest.where(rest.any(dim=1, keepdim=True), wanted)  # equal up to rounding
    return sample_gumbel(rest.log(), gumbel_noise([verdicts] * len(rest), rest.shape[1], rest.device))


def leading(good: Tensor) -> int:
    """Length of the leading run of True."""
    return int(good.long().cumprod(dim=0).sum())


def _groups(embedding: Tensor, size: int, rows: int = 1024) -> Tensor:
    """``(K, size)``: every code and those nearest to it in an embedding ``(K, D)``; ``rows`` codes at a time."""
    embedding = embedding.float()
    nearest = []
    for start in range(0, len(embedding), rows):
        distance = torch.cdist(embedding[start : start + rows], embedding)
        distance.diagonal(start).fill_(-1.0)  # a code leads its group
        nearest.append(distance.topk(min(size, len(embedding)), largest=False).indices)
    return torch.cat(nearest)
