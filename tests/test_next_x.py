"""The laws of next-X prediction, for every order and merge."""

import itertools
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import inputs_of, tiny_model

from unified.data.batches import make_batch
from unified.decoding import Sampling, generate_codes
from unified.decoding import passes as passes_module
from unified.decoding.decoder import BackboneDecoder
from unified.decoding.fused_llama import LeanDecoder, make_decoder
from unified.decoding.sampling import PositionNoise, filter_logits, guide
from unified.model.image_modules import SourceJoin, initialize_image_module
from unified.prediction import order as order_module
from unified.prediction.arrange import arrange, cell_codes
from unified.prediction.merge import merged_grid, patches
from unified.prediction.order import NONE, ORDERS, QUERY, START, Order, rising_sizes
from unified.prediction.plan import Prediction
from unified.sequence import IGNORE, ImageSegment, TextSegment, TokenSequence, build_sequence

TEXT_IDS, CODES = 50, 20
GRID = (4, 8)
ASKED = {
    "raster": {}, "rows": {}, "rows_at_once": {}, "diagonals": {}, "regions": {"size": 2}, "cells": {"size": 2},
    "spread": {"size": 2}, "locality": {"size": 5}, "random": {"size": 6},
}  # fmt: skip
WAYS = [{"order": order, **options} for order, options in ASKED.items()]
WAYS += [{"order": order, **ASKED[order], "merge": "channel"} for order in ("raster", "diagonals", "rows", "random")]
CHAINED = [{**way, "chained": True} for way in WAYS if "merge" in way]
WAYS += CHAINED
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda w: "-".join(map(str, w.values())))


def model_of(way, seed=0, **changes):
    """A tiny model whose image modules are far from their start, so that every part of them matters."""
    model = tiny_model(seed, prediction=way, image_grids=[list(GRID)], **changes)
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in model.image_modules().values():
            for weight in module.parameters():
                weight.normal_(0, 0.5)
    return model


def image(seed=0, grid=GRID):
    return torch.randint(0, CODES, grid, generator=torch.Generator().manual_seed(seed))


def sequence_of(model, *segments, seed=3):
    made = build_sequence(segments, model.config.vocabulary)
    made.seed = seed
    return made


@contextmanager
def scored(model):
    """The states that the image head scores, and their codes, in every forward pass inside."""
    found = []
    hook = model.image_head.register_forward_pre_hook(lambda module, args: found.append(args))
    try:
        yield found
    finally:
        hook.remove()


@torch.no_grad()
def cell_states(model, codes, seed=3, as_sampled=True):
    """``(n, P, m * D)``, what the head scores for each cell of one image ``(h, w)``, by number of the cell."""
    made = sequence_of(model, TextSegment([5, 6]), ImageSegment(codes), TextSegment([7]), seed=seed)
    with scored(model) as found:
        model(**make_batch([made], model.config, as_sampled=as_sampled).inputs)
    states = found[0][0]
    row = arrange(made, model.config.vocabulary, model.config.coordinates, model.prediction, as_sampled=as_sampled)
    per_cell = model.prediction.merge.side**2
    inside = row.is_image & (row.labels[:, 0] != IGNORE)
    entered = plan_of(model, tuple(codes.shape), seed, as_sampled).cells
    first = [int(cell) for i, cell in enumerate(entered) if cell >= 0 and cell not in entered[:i]]
    assert len(first) == int(inside.sum())
    result = torch.empty(len(first), per_cell, states.shape[-1])
    result[first] = states.view(len(first), per_cell, -1)
    return result


def plan_of(model, grid, seed, as_sampled=True):
    prediction, cells = model.prediction, merged_grid(grid, model.prediction.merge.side)
    if not prediction.way.any_order:
        return prediction.plan(cells)
    own = int(np.random.default_rng(seed).integers(2**32, size=1)[0])
    return (prediction.plan if as_sampled else prediction.training_plan)(cells, own)


# Law 1


def test_one_cell_at_a_time_in_raster_order_is_next_token_prediction(monkeypatch):
    """The general path, with groups of one cell, against the plain causal one."""
    monkeypatch.setitem(ORDERS, "single", Order(order_module._raster, order_module._previous))
    plain, single = model_of(None), model_of({"order": "single"})
    assert single.load_state_dict(plain.state_dict())
    losses = []
    for model in (plain, single):
        rows = [
            sequence_of(
                model, TextSegment([5]), ImageSegment(image(1)), TextSegment([7]), ImageSegment(image(2, (2, 3)))
            ),
            sequence_of(model, TextSegment([5, 6, 8])),
        ]
        output = model(**inputs_of(model.config, *rows))
        output.loss.backward()
        losses.append(output)
    assert ("steps" in inputs_of(single.config, *rows)) and "steps" not in inputs_of(plain.config, *rows)
    torch.testing.assert_close(losses[0].image_loss, losses[1].image_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses[0].text_loss, losses[1].text_loss, rtol=1e-6, atol=0)
    for one, other in zip(plain.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)


# Law 2


@every_way
@pytest.mark.parametrize("as_sampled", [True, False])
def test_a_cell_sees_the_groups_before_it_and_nothing_else(way, as_sampled):
    """Other codes in a group and after it leave what is scored for the group as it was, to the bit; for later ones not.

    Where codes are chained, that is what is scored for the first code of each cell.
    """
    model = model_of(way)
    codes, plan = image(), plan_of(model, GRID, 3, as_sampled)
    index, states = cell_codes(GRID, model.prediction.merge.side), cell_states(model, codes, as_sampled=as_sampled)
    number = int(plan.groups.max()) // 2
    later = np.flatnonzero(plan.groups >= number)
    changed = codes.flatten().clone()
    changed[index[later].flatten()] = (changed[index[later].flatten()] + 1) % CODES
    other = cell_states(model, changed.view(GRID), as_sampled=as_sampled)
    before, after = plan.groups <= number, plan.groups > number
    assert torch.equal(states[plan.groups < number], other[plan.groups < number])
    assert torch.equal(states[before, 0], other[before, 0])
    assert torch.equal(states[before], other[before]) != model.prediction.merge.chained
    assert after.any() and (states[after] != other[after]).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("way", CHAINED, ids=lambda w: w["order"])
def test_a_chained_code_sees_those_before_it_in_its_window_and_no_others_of_its_group(way):
    model = model_of(way)
    codes, index = image(), cell_codes(GRID, 2)
    states = cell_states(model, codes)
    for place in range(4):
        changed = codes.flatten().clone()
        changed[index[5, place]] = (changed[index[5, place]] + 1) % CODES
        other = cell_states(model, changed.view(GRID))
        alike = (states == other).flatten(2).all(dim=2)
        assert alike[5].tolist() == [True] * (place + 1) + [False] * (3 - place)
        group = plan_of(model, GRID, 3).groups
        rest = group == group[5]
        rest[5] = False
        assert alike[rest].all()


@pytest.mark.parametrize("image_projection", [None, 24])
def test_the_likelihood_of_a_chained_window_adds_to_one_over_all_its_codes(image_projection):
    """K = 3 codes, one window of 2 x 2: all 81 windows are tried; those of independent codes would have rank one."""
    model = tiny_model(0, prediction=CHAINED[0], codebook_size=3, image_projection=image_projection)
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.image_modules().values():
            for weight in module.parameters():
                weight.normal_(0, 0.5)
        model.image_head.weight *= 0.02  # or one window takes all
        rows = [
            sequence_of(model, TextSegment([5]), ImageSegment(torch.tensor(codes).view(2, 2)))
            for codes in itertools.product(range(3), repeat=4)
        ]
        output = model(**make_batch(rows, model.config).inputs, return_log_probs=True)
    likely = output.log_probs.sum(dim=1).exp()
    torch.testing.assert_close(likely.sum(), torch.tensor(1.0))
    joint = likely.view(9, 9)
    assert not torch.allclose(joint, joint.sum(dim=1, keepdim=True) * joint.sum(dim=0), rtol=0.05)


# Law 3


@every_way
def test_every_code_is_a_target_once(way):
    model = model_of(way)
    grids = [GRID, (8, 4)]
    codes = [torch.arange(32).remainder(CODES).view(grid) for grid in grids]
    rows = [sequence_of(model, TextSegment([5]), *(ImageSegment(each) for each in codes), TextSegment([7, 8]))]
    inputs = (
        inputs_of(model.config, *rows) if model.prediction.merge.side == 1 else make_batch(rows, model.config).inputs
    )
    labels = inputs["labels"].reshape(inputs["labels"].shape[1], -1)
    targets = labels[inputs["image_targets"]]
    wanted = [TEXT_IDS + int(code) for each in codes for code in each.flatten()]
    assert sorted(targets[targets != IGNORE].tolist()) == sorted(wanted)
    assert sorted(labels[labels >= TEXT_IDS].tolist()) == sorted(wanted)


# Laws 4 and 7


def naive_image(model, prompt, negative, grid, sampling, generator, seed):
    """An image by a full pass over all of it for every group, without a cache; codes to come are whatever they are."""
    side = model.prediction.merge.side
    index, plan = cell_codes(grid, side), model.prediction.plan(merged_grid(grid, side), seed)
    noise = PositionNoise([generator.clone_state()], CODES, torch.device("cpu"))
    every = noise.at(0, grid[0] * grid[1])[0]
    codes = torch.zeros(grid[0] * grid[1], dtype=torch.long)
    scales = sampling.scales(len(codes))
    for group in range(plan.groups.max() + 1):
        cells = np.flatnonzero(plan.groups == group)
        cells = cells[plan.ranks[cells].argsort()]
        among = sampling.group_temperature if len(cells) > 1 else 1.0
        filters = Sampling(temperature=sampling.temperature * among, top_k=sampling.top_k, top_p=sampling.top_p)
        first = int(plan.ranks[cells[0]]) * side**2
        for inside in range(side**2):  # where codes are chained, what is scored changes with each
            sides = []
            for ids in (prompt, negative):
                sequence = TokenSequence(torch.tensor([*ids, *(codes + TEXT_IDS).tolist(), 4]), None, [grid])
                sequence.labels = sequence.input_ids.clone()
                sides.append(states_with_plan(model, sequence, plan))
            states = guide(sides[0], sides[1], scales[first]) if sampling.guided else sides[0]
            for cell in cells:
                rank = int(plan.ranks[cell]) * side**2 + inside
                logits = filter_logits(model.image_head(states[cell, inside][None]), filters)
                codes[index[cell, inside]] = int((logits + every[rank]).argmax())
    return codes.view(grid)


@torch.no_grad()
def states_with_plan(model, sequence, plan):
    """``(n, P, m * D)`` by cell, of a sequence with one image that is arranged by a given plan."""
    prediction = model.prediction
    patched = pytest.MonkeyPatch()
    patched.setattr(Prediction, "plan", lambda self, grid, seed=None, known=None: plan)
    from unified.prediction import arrange as arranging

    arranging._image.cache_clear()
    try:
        with scored(model) as found:
            model(**make_batch([sequence], model.config, as_sampled=True).inputs)
    finally:
        patched.undo()
        arranging._image.cache_clear()
    states, per_cell = found[0][0], prediction.merge.side**2
    first = [int(cell) for i, cell in enumerate(plan.cells) if cell >= 0 and cell not in plan.cells[:i]]
    result = torch.empty(len(first), per_cell, states.shape[-1])
    result[first] = states.view(len(first), per_cell, -1)
    return result


PROMPTS, NEGATIVES = [[1, 5, 6, 3], [1, 7, 3], [1, 8, 9, 10, 3]], [[1, 3]] * 3


@every_way
@pytest.mark.parametrize("kind", [LeanDecoder, BackboneDecoder])
def test_sampling_with_a_cache_is_the_naive_loop_in_any_batch(way, kind):
    """Code for code with guidance and top-k, for prompts of different lengths together, and one alone."""
    model, sampling = model_of(way), Sampling(2.0, 0.9, top_k=7, group_temperature=0.6)
    decoder = make_decoder(model) if kind is LeanDecoder else BackboneDecoder(model)
    assert isinstance(decoder, kind)
    seeded = lambda: [torch.Generator().manual_seed(10 + i) for i in range(3)]  # noqa: E731
    together = generate_codes(decoder, PROMPTS, NEGATIVES, GRID, sampling, seeded())
    alone = generate_codes(decoder, PROMPTS[1:2], NEGATIVES[:1], GRID, sampling, seeded()[1:2])
    assert torch.equal(together[1], alone[0])
    if kind is LeanDecoder:
        for row in range(2):
            generator = seeded()[row]
            seed = passes_module.order_seed(generator) if model.prediction.way.any_order else None
            wanted = naive_image(model, PROMPTS[row], NEGATIVES[row], GRID, sampling, generator, seed)
            assert torch.equal(together[row], wanted)
    else:
        lean = generate_codes(make_decoder(model), PROMPTS, NEGATIVES, GRID, sampling, seeded())
        assert torch.equal(together, lean)


# Law 5


@every_way
def test_text_keeps_its_logits_and_sees_the_whole_image_before_it(way):
    plain, model = model_of(None), model_of(way)
    model.backbone.load_state_dict(plain.backbone.state_dict())
    texts = [
        sequence_of(plain, TextSegment([5, 6, 9])),
        sequence_of(plain, TextSegment([5, 7]), ImageSegment(image(), loss=False)),
    ]
    losses = [each(**make_batch(texts, each.config).inputs).text_loss for each in (plain, model)]
    # <eoi> behind an image that is not in the loss is not either, so all text stands before an image.
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    embeds = {}
    hook = model.image_embed.register_forward_hook(
        lambda module, args, output: embeds.setdefault("found", output.requires_grad_().retain_grad() or output)
    )
    made = sequence_of(model, TextSegment([5], loss=False), ImageSegment(image(), loss=False), TextSegment([7]))
    model(**make_batch([made], model.config).inputs).text_loss.backward()
    hook.remove()
    assert (embeds["found"].grad.flatten(0, -2) != 0).any(dim=-1).all()


# Law 6


@every_way
def test_batches_and_packing_change_no_loss(way):
    model = model_of(way)
    rows = [
        sequence_of(model, TextSegment([5, 6]), ImageSegment(image(1)), TextSegment([7]), seed=1),
        sequence_of(model, TextSegment([5]), ImageSegment(image(2, (8, 4))), seed=2),
        sequence_of(model, TextSegment([8, 9, 10, 11]), seed=3),
    ]
    with torch.no_grad():
        alone = [make_batch([row], model.config) for row in rows]
        total = sum(model(**each.inputs).loss * each.counts.weight for each in alone)
        for options in ({}, {"pack_length": 200}):
            batch = make_batch(rows, model.config, **options)
            assert batch.counts.weight == sum(each.counts.weight for each in alone)
            torch.testing.assert_close(model(**batch.inputs).loss * batch.counts.weight, total, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "way", [w for w in WAYS if w["order"] != "random" and "merge" not in w], ids=lambda w: w["order"]
)
def test_patches_of_an_order_are_one_distribution_each(way):
    """A coarse stage runs the order over patches; each is scored by the mean over its codes, from the sources of its cell."""
    model = model_of(way)
    codes = image()
    made = sequence_of(model, TextSegment([5, 6]), ImageSegment(codes), TextSegment([7]))
    with torch.no_grad(), scored(model) as found:
        output = model(**inputs_of(model.config, made, p=2))
    plan = model.prediction.plan(merged_grid(GRID, 2))
    first = [int(cell) for i, cell in enumerate(plan.cells) if cell >= 0 and cell not in plan.cells[:i]]
    targets = codes.flatten()[torch.from_numpy(cell_codes(GRID, 2)[first])]
    scores = (found[0][0] @ model.image_head.weight.T).log_softmax(dim=-1)
    torch.testing.assert_close(output.image_loss, -scores.gather(1, targets).mean())


# Law 8


@every_way
def test_known_codes_stay_and_any_order_reads_them_first(way):
    """Every known code stays. In any order, what is sampled first already follows known codes anywhere."""
    model, sampling = model_of(way), Sampling(top_k=1)
    known = torch.full((2, *GRID), -1)
    known[0, 2:, 4:], known[1, ::2] = image(5)[2:, 4:], image(6)[::2]
    generators = lambda: [torch.Generator().manual_seed(i) for i in range(2)]  # noqa: E731
    codes = generate_codes(model, PROMPTS[:2], None, GRID, sampling, generators(), known=known)
    assert torch.equal(codes[known >= 0], known[known >= 0])
    assert (codes >= 0).all()
    alone = generate_codes(model, PROMPTS[1:2], None, GRID, sampling, generators()[1:], known=known[1:])
    assert torch.equal(codes[1], alone[0])
    whole = torch.stack([image(5), image(6)])
    assert torch.equal(generate_codes(model, PROMPTS[:2], None, GRID, sampling, generators(), known=whole), whole)
    same = generate_codes(model, PROMPTS[:2], None, GRID, sampling, generators(), known=known[:1].expand(2, -1, -1))
    assert torch.equal(same[0], codes[0]) and torch.equal(same[:, known[0] >= 0], known[0][known[0] >= 0].expand(2, -1))
    if model.prediction.known_first:
        other = known.clone()
        other[0, 2:, 4:] = (other[0, 2:, 4:] + 7) % CODES
        changed = generate_codes(model, PROMPTS[:2], None, GRID, sampling, generators(), known=other)
        assert (changed[0] != codes[0])[known[0] < 0].any()


# Orders


def test_groups_of_each_order():
    """Worked out by hand on 2 x 4 or 4 x 4 cells."""
    groups = lambda way, grid: Prediction(**way).plan(grid).groups.reshape(grid).tolist()  # noqa: E731
    assert groups({"order": "rows"}, (2, 3)) == [[0, 1, 2], [3, 3, 3]]
    assert groups({"order": "rows_at_once"}, (2, 3)) == [[0, 0, 0], [1, 1, 1]]
    assert groups({"order": "diagonals"}, (2, 4)) == [[0, 1, 2, 3], [1, 2, 3, 4]]
    assert groups({"order": "regions", "size": 2}, (2, 4)) == [[0, 4, 1, 4], [2, 4, 3, 4]]
    assert groups({"order": "cells", "size": 2}, (2, 4)) == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert groups({"order": "spread", "size": 2}, (2, 4)) == [[0, 1, 0, 1], [2, 3, 2, 3]]
    assert Prediction("rows").plan((2, 3)).cells.tolist() == [0, 1, 2, 0, 1, 3, 4, 5]  # 0 and 1 enter again


def test_sources_of_each_order():
    sources = lambda name, grid, size=0: ORDERS[name].sources(grid, size).tolist()  # noqa: E731
    assert sources("raster", (1, 3)) == [[START], [0], [1]]
    assert sources("rows", (2, 2)) == [[START], [0], [0], [1]]
    assert sources("rows_at_once", (2, 2)) == [[QUERY], [QUERY], [0], [1]]
    assert sources("diagonals", (2, 2)) == [[START, NONE], [0, NONE], [NONE, 0], [2, 1]]
    assert sources("regions", (2, 4), 2) == [[START], [0], [0], [2], [2], [4], [4], [6]]
    assert sources("spread", (1, 2)) == [[QUERY], [QUERY]]


@pytest.mark.parametrize(("order", "grid", "passes"), [
    ("raster", (16, 16), 256), ("rows", (16, 16), 31), ("rows_at_once", (16, 16), 16), ("diagonals", (16, 16), 31),
    ("regions", (16, 16), 67), ("cells", (16, 16), 16), ("spread", (16, 16), 16), ("locality", (16, 16), 20),
    ("random", (16, 16), 88), ("diagonals", (24, 16), 39),
])  # fmt: skip
def test_passes_of_each_order(order, grid, passes):
    plan = Prediction(order).plan(grid)
    assert plan.groups.max() + 1 == passes
    assert sorted(plan.ranks) == list(range(grid[0] * grid[1]))


def test_rising_sizes_sum_up_and_rise():
    sizes = rising_sizes(256, 20)
    assert sizes.sum() == 256 and sizes.min() >= 1 and sizes[-1] > 3 * sizes[0]
    assert rising_sizes(9, 9).tolist() == [1] * 9


def test_locality_keeps_the_cells_of_a_group_apart():
    groups = Prediction("locality").plan((16, 16)).groups
    places = np.stack(np.divmod(np.arange(256), 16), axis=1)
    nearest = []
    for group in range(10):  # later on there is no room
        own = places[groups == group]
        apart = np.abs(own[:, None] - own[None]).sum(axis=2) + 99 * np.eye(len(own), dtype=int)
        nearest.append(apart.min())
    assert min(nearest) >= 2


def test_images_of_a_random_order_differ_in_it_and_are_the_same_again():
    model = model_of({"order": "random", "size": 6})
    rows = [sequence_of(model, ImageSegment(image()), TextSegment([7]), seed=seed) for seed in (1, 1, 2)]
    entered = [inputs_of(model.config, row)["positions"] for row in rows]
    assert torch.equal(entered[0], entered[1]) and not torch.equal(entered[0], entered[2])


@pytest.mark.parametrize(("way", "message"), [
    ({"order": "zigzag"}, r"prediction\.order: 'zigzag' is unknown; use one of \('raster'"),
    ({"order": "rows", "size": 3}, r"prediction\.size: 'rows' takes none"),
    ({"order": "cells", "size": -1}, r"prediction\.size: -1 must be a whole number"),
    ({"order": "cells", "size": True}, r"prediction\.size: True must be"),
    ({"merge": "mean", "window": 2}, r"prediction\.merge: 'mean' is for training stages"),
    ({"merge": "one", "window": 2}, r"prediction\.merge: .one. cannot have windows of side 2"),
    ({"merge": "channel", "window": 3}, r"prediction\.window: 3\^2 does not divide the width of 32"),
    ({"order": "rows", "chained": True}, r"prediction\.chained: True with merge 'one'; it is true or false, and true only with"),
    ({"merge": "channel", "chained": "yes"}, r"prediction\.chained: 'yes' with merge 'channel'"),
    ({"oder": "rows"}, r"prediction: \['oder'\] unknown; use order, size, merge, window and chained"),
])  # fmt: skip
def test_bad_predictions_are_named(way, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(prediction=way)


def test_grids_that_do_not_fit_an_order_are_named():
    with pytest.raises(ValueError, match=r"prediction\.size: 3 regions a side do not divide a grid of 4x8 cells"):
        Prediction("regions", 3).plan((4, 8))
    with pytest.raises(ValueError, match=r"prediction\.size: 40 passes must lie in 1\.\.32"):
        Prediction("random", 40).plan((4, 8), 0)
    with pytest.raises(ValueError, match="known: only cells that queries predict"):
        Prediction("rows").plan((4, 8), known=np.ones(32, dtype=bool))


def test_a_window_of_attention_and_queries_exclude_one_another():
    text = {"model_type": "mistral", "sliding_window": 8, "num_key_value_heads": 2}
    with pytest.raises(ValueError, match=r"prediction\.order: mistral sees windows of 8 positions"):
        tiny_model(prediction={"order": "spread"}, text=text)
    model_of({"order": "diagonals"}, text=text)


@pytest.mark.parametrize(
    "way", [{"order": "rows"}, {"order": "diagonals"}, {"order": "regions"}], ids=lambda w: w["order"]
)
def test_layers_with_a_window_decode_as_they_train(way):
    model, sampling = (
        model_of(way, text={"model_type": "mistral", "sliding_window": 8, "num_key_value_heads": 2}),
        Sampling(),
    )
    codes = generate_codes(model, PROMPTS[:1], None, GRID, sampling, [torch.Generator().manual_seed(4)])
    generator = torch.Generator().manual_seed(4)
    assert torch.equal(codes[0], naive_image(model, PROMPTS[0], PROMPTS[0], GRID, sampling, generator, None))


def test_no_coarse_patches_beside_a_learned_merge():
    model = model_of({"order": "raster", "merge": "channel"})
    made = sequence_of(model, ImageSegment(image()), TextSegment([7]))
    rows = [
        arrange(made, model.config.vocabulary, model.config.coordinates, model.prediction, merge)
        for merge in (None, patches(2))
    ]
    from unified.prediction.arrange import collate

    with pytest.raises(ValueError, match=r"rows: merges \['channel', 'mean'\] cannot stand in one batch"):
        collate(rows, model.config)


def test_joined_states_equal_their_formula_and_ignore_missing_sources():
    torch.manual_seed(0)
    join = SourceJoin(4, 2).double()
    assert initialize_image_module(join) and initialize_image_module(join.mlp)
    hidden, missing = torch.randn(3, 2, 4).double(), torch.tensor([[False, False], [True, False], [False, True]])
    mean = torch.stack([hidden[0].mean(dim=0), hidden[1, 1], hidden[2, 0]])
    torch.testing.assert_close(join(hidden, missing), mean)  # before training
    for weight in join.parameters():
        torch.nn.init.normal_(weight)
    left, above = join.narrow.weight.split(4, dim=1)
    x = torch.stack([(left @ hidden[0, 0] + above @ hidden[0, 1]) / 2, above @ hidden[1, 1], left @ hidden[2, 0]])
    normed = x / (x.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * join.mlp.norm.weight
    gate, up = (normed @ join.mlp.gate_up.weight.T).split(4, dim=1)
    torch.testing.assert_close(join(hidden, missing), x + (gate * gate.sigmoid() * up) @ join.mlp.down.weight.T)
