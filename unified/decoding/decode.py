"""Decoding images with a key-value cache, group by group in the order of the model."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from unified.decoding.config import Sampling
from unified.decoding.decoder import Decoder
from unified.decoding.fused_llama import make_decoder
from unified.decoding.passes import Group, Passes, image_passes
from unified.decoding.prefill import Prefilled, Prompt, bias_among, check_conditions, prefill, read
from unified.decoding.sampling import PositionNoise, code_log_probs, guide, sample_codes
from unified.model.modeling import UnifiedForCausalLM
from unified.prediction.coordinates import span_offsets
from unified.prediction.merge import Grid
from unified.prediction.plan import Prediction


def generate_codes(
    model: UnifiedForCausalLM | Decoder,
    prompts: Sequence[Sequence[int] | Prompt],
    negative_prompts: Sequence[Sequence[int] | Prompt] | None,
    grid: Grid,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    on_code: Callable[[int, Tensor], None] | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """Decode one image span after every prompt; see :func:`iterate_codes`.

    Args:
        on_code: called after every pass with its index and the codes so far.

    Returns:
        Codes ``(B, h, w)``.
    """
    decoder = make_decoder(model) if isinstance(model, UnifiedForCausalLM) else model
    for step, codes in enumerate(iterate_codes(decoder, prompts, negative_prompts, grid, sampling, generators, known)):
        if on_code is not None:
            on_code(step, codes)
    return codes.reshape(-1, *grid)


@torch.inference_mode()
def iterate_codes(
    decoder: Decoder,
    prompts: Sequence[Sequence[int] | Prompt],
    negative_prompts: Sequence[Sequence[int] | Prompt] | None,
    grid: Grid,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    known: Tensor | None = None,
) -> Iterator[Tensor]:
    """Decode one image after every prompt, all rows together, pass by pass; in raster order that is code by code.

    Only image codes can be sampled: the text head is never evaluated inside a span. Conditional and unconditional rows
    run in one batch; equal prompts are read once.

    Args:
        decoder: from :func:`unified.decoding.make_decoder`.
        prompts: ids of each row, ending with ``<boi>``; a :class:`Prompt` if they hold images.
        negative_prompts: as many rows for the unconditional side; needed if ``sampling.guided``.
        grid: code grid ``(h, w)``.
        sampling: guidance and filters.
        generators: one per row.
        known: ``(B, h, w)`` codes that are forced, -1 where the model samples. To models of any order they are given
            first, so that what is sampled follows all of them.

    Yields:
        The codes so far, ``(B, n)`` up to ``(B, h*w)``: the first n in raster order, as far as any is sampled; -1 where
        none is yet.

    Raises:
        ValueError: if the model takes a condition instead of a prompt, or a list has another length.
    """
    rows = paired_prompts(decoder.model, prompts, negative_prompts, sampling, generators)
    forced = forced_codes(known, len(prompts), grid, decoder.model)
    parts, whole, reach = _alike(decoder.model.prediction, forced), forced.clone(), 0
    for part in parts:
        own = [generators[row] for row in part]
        sides = [rows[start + row] for start in range(0, len(rows), len(forced)) for row in part]
        state, passes, coordinates = begin_image(decoder, sides, grid, own, forced[part])
        for codes in continue_image(decoder, state, passes, coordinates, sampling, own, forced[part]):
            if len(parts) == 1:
                yield codes
                continue
            whole[part, : codes.shape[1]] = codes
            reach = max(reach, codes.shape[1])
            yield whole[:, :reach]


@torch.inference_mode()
def generate_scored(
    model: UnifiedForCausalLM | Decoder,
    prompts: Sequence[Sequence[int] | Prompt],
    negative_prompts: Sequence[Sequence[int] | Prompt] | None,
    grid: Grid,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
) -> tuple[Tensor, Tensor]:
    """Decode one image span after every prompt, and keep how likely each code was; arguments as for :func:`iterate_codes`.

    Returns:
        Codes ``(B, h, w)``, and their log-probabilities ``(B, h, w)`` in float32 under the distribution that they were sampled
        from: guided, divided by the temperature and filtered, given the codes before. Codes of one pass are independent.

    Raises:
        ValueError: as :func:`iterate_codes`.
    """
    decoder = make_decoder(model) if isinstance(model, UnifiedForCausalLM) else model
    rows = paired_prompts(decoder.model, prompts, negative_prompts, sampling, generators)
    forced = forced_codes(None, len(prompts), grid, decoder.model)
    state, passes, coordinates = begin_image(decoder, rows, grid, generators, forced)
    log_probs = torch.zeros(forced.shape, device=forced.device)
    *_, codes = continue_image(decoder, state, passes, coordinates, sampling, generators, forced, log_probs)
    return codes.reshape(-1, *grid), log_probs.reshape(-1, *grid)


def begin_image(
    decoder: Decoder, rows: Sequence[Prompt], grid: Grid, generators: Sequence[torch.Generator], forced: Tensor
) -> tuple[Prefilled, Passes, Tensor]:
    """Read the prompts of an image; what has been read, the passes of the image, and coordinates of its positions."""
    passes = image_passes(decoder.model, grid, generators, forced)
    state = prefill(decoder, rows, passes.room)
    return state, passes, passes.coordinates_after(state.position)


def _alike(prediction: Prediction, known: Tensor) -> list[list[int]]:
    """Rows that can be decoded together: all, unless the codes that are given first differ.

    A permutation without those leaves other groups in every image.
    """
    rows: dict[object, list[int]] = {}
    for row, given in enumerate((known >= 0).cpu().numpy()):
        alone = prediction.way.any_order and given.any()
        key = row if alone else given.tobytes() if prediction.known_first else None
        rows.setdefault(key, []).append(row)
    return list(rows.values())


@torch.inference_mode()
def generate_conditioned(
    model: UnifiedForCausalLM | Decoder,
    condition: Tensor,
    grid: Grid,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    condition_mask: Tensor | None = None,
) -> Tensor:
    """Decode one image span after a class or features instead of a prompt, with a model converted from LlamaGen.

    Classes may also be prompts of :func:`iterate_codes`, which has all modes and positions.

    Args:
        model: a model with a condition module and its own ``llamagen`` positions, or a decoder of one.
        condition: ``(B,)`` classes or ``(B, P, F)`` features.
        grid: code grid ``(h, w)``.
        sampling: guidance and filters.
        generators: one per image.
        condition_mask: ``(B, P)``, 0 on padded features.

    Returns:
        Codes ``(B, h, w)``.

    Raises:
        ValueError: if the model takes no condition, or there is another number of generators.
    """
    decoder = make_decoder(model) if isinstance(model, UnifiedForCausalLM) else model
    model = decoder.model
    if model.condition is None or model.config.positions != "llamagen":
        raise ValueError(
            "model: takes no condition; use generate_codes with a prompt, or convert a LlamaGen checkpoint."
        )
    if len(generators) != len(condition):
        raise ValueError(f"generators: {len(generators)} given for {len(condition)} conditions; give one each.")
    count = len(condition)
    prefix = model.condition(condition)
    if sampling.guided:
        prefix = torch.cat([prefix, model.condition(model.condition.unconditional(count))])
    rows, length = prefix.shape[:2]
    real = torch.ones(rows, length, dtype=torch.bool, device=model.device)
    if condition_mask is not None:
        real = condition_mask.to(model.device).bool().repeat(rows // count, 1)
    nowhere = torch.full((rows, length, 2), -1.0, device=model.device)
    each, no_images = torch.arange(rows, device=model.device), torch.zeros_like(real)
    forced = forced_codes(None, count, grid, model)
    passes = image_passes(model, grid, generators, forced)
    state = read(decoder, prefix, nowhere, real, no_images, each, passes.room)
    coordinates = passes.offsets_of(rows)
    *_, codes = continue_image(decoder, state, passes, coordinates, sampling, generators, forced)
    return codes.reshape(count, *grid)


def continue_image(
    decoder: Decoder,
    state: Prefilled,
    passes: Passes,
    coordinates: Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    known: Tensor,
    log_probs: Tensor | None = None,
    guides: Sequence[Callable[[int, Group, Tensor, Tensor], Tensor]] = (),
) -> Iterator[Tensor]:
    """The loop itself: an image after what ``state`` has read, ``known (B, h*w)`` codes forced; see :func:`iterate_codes`.

    ``coordinates (R, L, 2)`` are those of the positions of ``passes``, for all rows. The positions of a group that is known
    in every row run together with those of the next one. ``log_probs (B, h*w)`` is filled with those of the sampled codes.
    ``guides`` change the logits of each group: see :class:`unified.decoding.coarse_guidance.CoarseGuide`.
    """
    scales, codes, device = sampling.scales(known.shape[1]), known.clone(), known.device
    positions = decoder.positions(coordinates)
    noise = PositionNoise(generators, decoder.model.config.codebook_size, device)
    hidden, waiting, reach = state.hidden[:, None], torch.empty(0, dtype=torch.long, device=device), 0
    if not passes.groups:
        yield codes  # all given
        return
    for number, (group, skipped) in enumerate(zip(passes.groups, _fixed(passes, known), strict=True)):
        reach = max(reach, group.reach)
        entering = torch.cat([waiting, torch.arange(*group.entering, device=device)])
        if skipped:
            waiting = entering
            yield codes[:, :reach]
            continue
        # 1. Run the codes that were sampled last, and the queries for those to come
        asking = torch.arange(*group.asking, device=device)
        if len(entering) + len(asking):
            hidden = run_positions(decoder, state, passes, positions, codes, entering, asking)
        # 2. Sample the group
        states = hidden[:, group.sources + len(waiting)].unflatten(1, group.shape)
        scale, index = scales[int(group.ranks[0])], group.codes.expand(len(codes), -1)
        given, own = codes.gather(1, index), noise_of(noise, group.ranks)
        guides_now = [partial(guided, number, group, codes) for guided in guides]
        sampled, logits = sample_cells(decoder, states, group.missing, sampling, scale, own, given, guides_now)
        if log_probs is not None:
            log_probs.scatter_(1, index, code_log_probs(logits, sampled, sampling.among(group.shape[0])))
        codes.scatter_(1, index, sampled)
        waiting = waiting[:0]
        yield codes[:, :reach]


def run_positions(
    decoder: Decoder,
    state: Prefilled,
    passes: Passes,
    positions: Tensor,
    codes: Tensor,
    entering: Tensor,
    asking: Tensor,
) -> Tensor:
    """One forward pass of an image: final states ``(R, T, D)`` of codes that enter and, behind them, of queries.

    Args:
        decoder: of the model.
        state: what has been read.
        passes: of the image.
        positions: all of them, from :meth:`Decoder.positions`.
        codes: ``(B, h*w)``, those that enter among them.
        entering, asking: which positions run; the cache keeps the first and forgets the queries, which nobody sees.
    """
    cache, running = state.cache, torch.cat([entering, asking])
    embeds = entering_embeddings(decoder, codes, passes, entering)
    if len(asking):
        embeds = torch.cat([embeds, query_embeddings(decoder, len(embeds), len(asking))], dim=1)
    visible = passes.visible(running)
    if visible is not None:
        bias: Tensor | None = bias_among(state, visible)
    else:
        bias = None if state.bias is None else state.bias[..., : cache.column + len(running)]
    embeds = embeds.repeat(len(state.hidden) // len(codes), 1, 1)
    hidden = decoder(embeds, positions[:, running], cache, bias, passes.is_image(running))
    if len(asking):
        cache.rewind(cache.column - len(asking))
    return hidden


def _fixed(passes: Passes, known: Tensor) -> list[bool]:
    """Of each group, whether it is known in every row; the device is read once."""
    order = torch.cat([group.codes for group in passes.groups], dim=1).expand(len(known), -1)
    given = (known.gather(1, order) >= 0).all(dim=0).cpu()
    return [bool(part.all()) for part in given.split([group.codes.shape[1] for group in passes.groups])]


def entering_embeddings(decoder: Decoder, codes: Tensor, passes: Passes, entering: Tensor) -> Tensor:
    """Embeddings ``(B, T, D)`` of what enters the positions ``entering (T,)``: of ``codes (B, h*w)``, merged as the model
    does, and of the frame's tokens.
    """
    index = passes.entered[:, entering].expand(len(codes), -1, -1)
    found, merge = codes.gather(1, index.flatten(1)).view(index.shape), decoder.model.image_merge
    if passes.tokens is None:
        embeds = decoder.embed(found)
        return embeds.mean(dim=2) if merge is None else merge(embeds)
    tokens = passes.tokens[entering]
    text = decoder.model.get_input_embeddings()(tokens.clamp_min(0))
    embeds = decoder.embed(found.clamp_min(0))[:, :, 0]  # a token stands for no code, which may not be sampled yet
    return torch.where((tokens >= 0)[:, None], text.to(embeds.dtype), embeds)


def query_embeddings(decoder: Decoder, rows: int, count: int) -> Tensor:
    """``(rows, count, D)`` of positions that ask for a code and hold none."""
    assert decoder.model.image_query is not None
    zeros = torch.zeros(rows, count, dtype=torch.long, device=decoder.model.device)
    return decoder.model.image_query(zeros)


def noise_of(noise: PositionNoise, ranks: Tensor) -> Tensor:
    """Noise ``(B, n, K)`` of codes with rising ranks ``(n,)``; it belongs to a code's rank, whatever else is known."""
    first, last = int(ranks[0]), int(ranks[-1])
    found = noise.at(first, last - first + 1)
    return found if len(ranks) == found.shape[1] else found[:, ranks.to(found.device) - first]


def sample_cells(
    decoder: Decoder,
    states: Tensor,
    missing: Tensor | None,
    sampling: Sampling,
    scale: float | Tensor,
    noise: Tensor,
    given: Tensor | None = None,
    guides: Sequence[Callable[[Tensor], Tensor]] = (),
) -> tuple[Tensor, Tensor]:
    """Codes ``(B, n * P)`` of n cells, and the guided logits ``(B, n * P, K)`` that they were sampled from.

    Args:
        decoder: of the model.
        states, missing, sampling, scale: as for :func:`cell_logits`; filters apply too.
        noise: ``(B, n * P, K)``.
        given: ``(B, n * P)`` codes that stay, -1 where one is sampled; None samples all.
        guides: each changes the logits; only where codes are not chained.
    """
    sampling = sampling.among(states.shape[1])
    if decoder.model.image_chain is None:
        logits = cell_logits(decoder, states, missing, sampling, scale)
        for guided in guides:
            logits = guided(logits)
        codes = sample_codes(logits.flatten(0, 1), sampling, noise.flatten(0, 1)).view(logits.shape[:2])
        return (codes if given is None else torch.where(given < 0, codes, given)), logits
    found = _cell_states(decoder, states, missing)  # (R, n, P, D)
    sides, (cells, places) = 1 + sampling.guided, found.shape[1:3]
    noise = noise.unflatten(1, (cells, places))
    codes = (
        noise.new_full(noise.shape[:3], -1, dtype=torch.long) if given is None else given.unflatten(1, (cells, places))
    )
    codes, each = codes.clone(), []
    for place in range(places):  # each code follows those before it in its cell
        scored = decoder.model.chained_states(found, codes.repeat(sides, 1, 1), place)
        each.append(_guided_logits(decoder, scored, sampling, scale))
        sampled = sample_codes(each[-1].flatten(0, 1), sampling, noise[:, :, place].flatten(0, 1)).view(-1, cells)
        codes[:, :, place] = torch.where(codes[:, :, place] < 0, sampled, codes[:, :, place])
    return codes.flatten(1), torch.stack(each, dim=2).flatten(1, 2)


def cell_logits(
    decoder: Decoder, states: Tensor, missing: Tensor | None, sampling: Sampling, scale: float | Tensor
) -> Tensor:
    """Image logits ``(B, n * P, K)`` of n cells whose codes are not chained, guided and not yet filtered.

    With guidance, ``states`` has the B unconditional rows behind the conditional ones.

    Args:
        decoder: of the model.
        states: ``(R, n, m, D)`` final states of the cells' sources, of the conditional rows and then of the others.
        missing: ``(n, m)``, True for sources that a cell does not have.
        sampling: guidance.
        scale: of the guidance; broadcasts to ``(B, n * P, 1)``.
    """
    return _guided_logits(decoder, _cell_states(decoder, states, missing).flatten(1, 2), sampling, scale)


def _cell_states(decoder: Decoder, states: Tensor, missing: Tensor | None) -> Tensor:
    """``(R, n, P, D)`` of n cells, from the final states of their sources."""
    everywhere = None if missing is None else missing.repeat(len(states), 1)
    merge = "mean" if decoder.model.image_split is None else "channel"
    return decoder.image_states(states.flatten(0, 1), everywhere, merge).unflatten(0, states.shape[:2])


def _guided_logits(decoder: Decoder, scored: Tensor, sampling: Sampling, scale: float | Tensor) -> Tensor:
    if sampling.guided:
        conditional, unconditional = scored.chunk(2)
        scored = guide(conditional, unconditional, scale)
    return decoder.image_logits(scored)


def paired_prompts(
    model: UnifiedForCausalLM,
    prompts: Sequence[Sequence[int] | Prompt],
    negatives: Sequence[Sequence[int] | Prompt] | None,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
) -> list[Prompt]:
    """All rows of a batch: the prompts, then their negatives if guidance needs them.

    Raises:
        ValueError: if there is no prompt or one is empty, the model takes a condition instead of a prompt, or a list has
            another length.
    """
    rows = list(prompts)
    if sampling.guided:
        if negatives is None or len(negatives) != len(rows):
            raise ValueError(f"negative_prompts: guidance needs one row per prompt ({len(rows)}).")
        rows += negatives
    made = [row if isinstance(row, Prompt) else Prompt(tuple(row)) for row in rows]
    if not made or not all(row.ids for row in made):
        raise ValueError("prompts: need one or more rows of at least one id.")
    if len(generators) != len(prompts):
        raise ValueError(f"generators: {len(generators)} given for {len(prompts)} prompts; give one each.")
    check_conditions(model, made)
    return made


def span_coordinates(model: UnifiedForCausalLM, position: Tensor, grid: Grid) -> Tensor:
    """``(B, h*w, 2)`` rows and columns of a span whose first code sits at ``position (B,)``."""
    offsets, _ = span_offsets(grid, 1, *model.config.coordinates)
    return position[:, None, None] + offsets.to(position.device)


def forced_codes(known: Tensor | None, count: int, grid: Grid, model: UnifiedForCausalLM) -> Tensor:
    """Known codes ``(B, h, w)`` as ``(B, h*w)`` on the model's device; -1 everywhere for None.

    Raises:
        ValueError: on another shape or codes outside the codebook.
    """
    if known is None:
        return torch.full((count, grid[0] * grid[1]), -1, device=model.device)
    if tuple(known.shape) != (count, *grid):
        raise ValueError(f"known: shape {tuple(known.shape)}, need {(count, *grid)}: one grid of codes per image.")
    size = model.config.codebook_size
    if known.numel() and (int(known.min()) < -1 or int(known.max()) >= size):
        raise ValueError(f"known: values {int(known.min())}..{int(known.max())} leave the codebook [0, {size}).")
    return known.reshape(count, -1).to(model.device)
