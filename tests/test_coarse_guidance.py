"""Guidance by coarse predictions: a cached loop against one that runs the training forward pass again for every group."""

import numpy as np
import pytest
import torch
from conftest import generators, inputs_of, last, tiny_model

from unified.decoding import Prompt, Sampling, generate_codes, make_decoder
from unified.decoding.coarse_guidance import autoguided_codes, coarse_cfg_codes, coarsely_guided_codes
from unified.decoding.config import modes_for
from unified.decoding.sampling import filter_logits, gumbel_noise
from unified.prediction.merge import merged_grid
from unified.sequence import ImageSegment, TextSegment, build_sequence

GRID = (8, 4)
ROWS, NEGATIVES = [Prompt((1, 5, 6, 3)), Prompt((1, 9, 3))], [Prompt((1, 3)), Prompt((1, 7, 8, 3))]
SAMPLING = Sampling(guidance_scale=2.5, temperature=0.8, guidance_schedule="linear")
CODES = {"autoguided": autoguided_codes, "coarse_cfg": coarse_cfg_codes}


@torch.no_grad()
def predicted(model, row, codes, side, shift=0):
    """Logits ``(h*w, K)`` of every code of a grid in one training forward pass, those of a window alike; 0 outside of windows."""
    height, width = GRID
    rows = (height - shift) // side * side
    text = TextSegment(list(row.ids[1:-1]), loss=False)
    sequence = build_sequence([text, ImageSegment(codes[shift : shift + rows])], model.config.vocabulary)
    inputs = inputs_of(model.config, sequence, p=side)
    if model.config.coarse_positions == "center":  # the others count windows
        one_dimensional = model.config.positions == "1d"
        image = slice(len(row.ids), len(row.ids) + rows * width // side**2)
        inputs["positions"][:, image] += torch.tensor([shift * width] * 2 if one_dimensional else [shift, 0])
    states = model(**inputs, return_image_states=True).image_states[:, 0]
    plan = model.prediction.plan(merged_grid((rows, width), side))
    entering = np.flatnonzero(plan.cells >= 0)
    _, first = np.unique(plan.cells[entering], return_index=True)
    cells = plan.cells[entering[np.sort(first)]]  # in the order of the targets
    of_cell = torch.empty(len(cells), 20)
    of_cell[torch.from_numpy(cells)] = model.image_head(states)
    logits = torch.zeros(height, width, 20)
    spread = of_cell.view(rows // side, width // side, 20).repeat_interleave(side, 0).repeat_interleave(side, 1)
    logits[shift : shift + rows] = spread
    return logits.flatten(0, 1)


def seen_windows(model, side, shift):
    """For each code, the codes that the coarse prediction of its window depends on, found by gradients; None outside."""
    height, width = GRID
    rows = (height - shift) // side * side
    plan = model.prediction.plan(merged_grid((rows, width), side))
    found = []
    for code in range(height * width):
        row, column = divmod(code, width)
        if not shift <= row < shift + rows:
            found.append(None)
            continue
        cell = (row - shift) // side * (width // side) + column // side
        windows = set()
        for source in plan.sources[cell]:
            if source == -1 or source == -3:  # before the image, or none
                continue
            seen = [i for i in range(len(plan.cells)) if plan.seen[i] <= plan.sees[source] or i == source]
            windows |= {int(plan.cells[i]) for i in seen if plan.cells[i] >= 0}
        found.append({
            (shift + w // (width // side) * side + a) * width + w % (width // side) * side + b
            for w in windows for a in range(side) for b in range(side)
        })  # fmt: skip
    return found


def naive(model, row, negative, sampling, generator, mode, side):
    """Group by group, everything computed again; unfinished codes are noise, which changes nothing if none is read."""
    height, width = GRID
    plan = model.prediction.plan(GRID)
    noise = gumbel_noise([generator], height * width * 20, torch.device("cpu")).view(-1, 20)
    codes, scales = torch.full((height * width,), -1), sampling.scales(height * width)
    rng, guided_codes = torch.Generator().manual_seed(1), 0
    raster = model.prediction.is_raster
    context = {s: seen_windows(model, side, s) for s in range(side if raster else 1)}
    for group in range(plan.groups.max() + 1):
        cells = np.flatnonzero(plan.groups == group)
        filled = torch.where(codes < 0, torch.randint(0, 20, codes.shape, generator=rng), codes).view(GRID)
        logits = predicted(model, row, filled, 1)[cells]
        scale = scales[int(plan.ranks[cells].min())]
        for number, cell in enumerate(cells):
            for shift, of_code in context.items():
                if raster and (cell // width - shift) % side != side - 1:
                    continue
                if of_code[cell] is None or not all(codes[code] >= 0 for code in of_code[cell]):
                    continue
                weak = predicted(model, negative if mode == "coarse_cfg" else row, filled, side, shift)[cell]
                logits[number] = weak + scale * (logits[number] - weak)
                guided_codes += 1
        total = filter_logits(logits, sampling) + noise[plan.ranks[cells]]
        codes[cells] = total.argmax(-1)
    return codes.tolist(), guided_codes / len(codes)


@pytest.mark.process
@pytest.mark.parametrize("mode", CODES)
@pytest.mark.parametrize(
    ("order", "side", "share", "options"),
    [
        ("raster", 2, 7 / 8, {}),
        ("raster", 2, 7 / 8, {"positions": "1d"}),
        ("raster", 2, 7 / 8, {"coarse_positions": "unit"}),
        ("raster", 4, 5 / 8, {}),
        ("rows_at_once", 2, 1.0, {}),
        ("rows", 2, 28 / 32, {}),  # of the first window row that of the first window alone
        ("diagonals", 2, 25 / 32, {}),
        ("regions", 2, 20 / 32, {}),
        ("cells", 2, 1.0, {}),  # one group of windows: from the prompt alone
    ],
)
def test_images_are_those_of_a_loop_that_computes_all_again(order, side, share, options, mode):
    model = tiny_model(prediction={"order": order}, **options)
    decoder = make_decoder(model)
    images = last(
        coarsely_guided_codes(decoder, ROWS, NEGATIVES, GRID, SAMPLING, generators(3, 4), mode=mode, side=side)
    )
    for image, row, negative, generator in zip(images, ROWS, NEGATIVES, generators(3, 4), strict=True):
        expected, guided = naive(model, row, negative, SAMPLING, generator, mode, side)
        assert image.tolist() == expected
        assert guided == pytest.approx(share)


@pytest.mark.process
@pytest.mark.parametrize("mode", CODES)
def test_without_guidance_it_is_plain_decoding(mode):
    model, sampling = tiny_model(), Sampling(temperature=0.8)
    images = last(CODES[mode](make_decoder(model), ROWS, None, GRID, sampling, generators(3, 4)))
    assert torch.equal(images.view(-1, *GRID), generate_codes(model, ROWS, None, GRID, sampling, generators(3, 4)))
    guided = last(CODES[mode](make_decoder(model), ROWS, NEGATIVES, GRID, SAMPLING, generators(3, 4)))
    assert not torch.equal(guided, images)


@pytest.mark.process
def test_given_codes_stay_and_are_read():
    """A window of given codes counts as finished: the same codes, given or sampled, lead to the same image."""
    decoder, whole = make_decoder(tiny_model()), []
    for known in (None, 12):
        given = None if known is None else whole[0].clone().view(-1, *GRID)
        if given is not None:
            given.flatten(1)[:, known:] = -1
        images = autoguided_codes(decoder, ROWS, NEGATIVES, GRID, SAMPLING, generators(3, 4), given)
        whole.append(last(images))
    assert torch.equal(*whole)


@pytest.mark.process
def test_what_it_does_not_read_is_refused(pipeline):
    """And in a pipeline the mode is one of many: with a batch, a schedule, a stream."""
    given = {"decoding": "autoguided", "guidance_scale": 2.0, "guidance_schedule": "linear"}
    codes = pipeline(["red apple", "blue car"], generator=[3, 4], **given).codes
    alone = list(pipeline.stream("blue car", generator=4, **given))
    assert len(alone) > 1 and torch.equal(alone[-1].codes, codes[1:])
    for negative in ("", None):
        assert torch.equal(pipeline("blue car", generator=4, negative_prompt=negative, **given).codes, codes[1:])
    with pytest.raises(ValueError, match="negative_prompt: decoding 'autoguided' does not read it"):
        pipeline("blue car", negative_prompt="red apple", **given)
    pipeline.model.config.patch_sizes = [1, 4]
    with pytest.raises(ValueError, match=r"'autoguided' needs a model .* patches of 2 x 2 codes, too; .* are \[1, 4\]"):
        pipeline("blue car", **given)
    assert not {"autoguided", "coarse_cfg"} & set(modes_for(pipeline.model.config))
    model = tiny_model(prediction={"merge": "channel"})
    with pytest.raises(ValueError, match="decoding: 'coarse_cfg' needs a fixed order with merge 'one'"):
        last(coarse_cfg_codes(make_decoder(model), ROWS, NEGATIVES, GRID, SAMPLING, generators(3, 4)))
    with pytest.raises(ValueError, match="2 does not divide the code grid 3x4"):
        last(autoguided_codes(make_decoder(tiny_model()), ROWS, NEGATIVES, (3, 4), SAMPLING, generators(3, 4)))
