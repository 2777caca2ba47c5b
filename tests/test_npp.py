"""Next-patch prediction against a loop that follows the paper word by word."""

import pytest
import torch
import torch.nn.functional as F

from unified import PatchSchedule, group_embeddings, group_targets, patch_cross_entropy


def reference_windows(grid, p):
    """Raster indices of the codes of every window, windows in raster order, written as plain loops."""
    height, width = grid
    return [
        [(top + i) * width + left + j for i in range(p) for j in range(p)]
        for top in range(0, height, p)
        for left in range(0, width, p)
    ]


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("grid", [(4, 4), (8, 4), (4, 12)])
def test_grouping_equals_loops(grid, p):
    torch.manual_seed(0)
    embeds = torch.randn(3, grid[0] * grid[1], 5, dtype=torch.float64)
    codes = torch.randint(0, 2**40, (3, grid[0] * grid[1]))
    windows = reference_windows(grid, p)
    expected = torch.stack([torch.stack([sum(row[i] for i in w) / len(w) for w in windows]) for row in embeds])
    torch.testing.assert_close(group_embeddings(embeds, grid, p), expected, rtol=0, atol=1e-14)
    assert group_targets(codes, grid, p).tolist() == [[[int(row[i]) for i in w] for w in windows] for row in codes]


def test_large_codes_survive_grouping():
    """Integers stay integers: a pass through bf16 would turn 16383 into 16384."""
    codes = torch.full((1, 16), 16383)
    assert (group_targets(codes, (4, 4), 2) == 16383).all()


@pytest.mark.parametrize("p", [1, 2, 4])
def test_loss_equals_mean_of_cross_entropies(p):
    torch.manual_seed(1)
    logits = torch.randn(6, 30, dtype=torch.float32)
    targets = torch.randint(0, 30, (6, p * p))
    expected = torch.stack(
        [F.cross_entropy(logits.double(), targets[:, k], reduction="none") for k in range(p * p)], 1
    ).mean(1)
    torch.testing.assert_close(patch_cross_entropy(logits, targets).double(), expected, rtol=0, atol=2e-6)


def test_one_code_per_patch_is_bitwise_plain():
    torch.manual_seed(2)
    logits, targets, embeds = torch.randn(7, 30), torch.randint(0, 30, (7, 1)), torch.randn(2, 16, 5)
    assert torch.equal(patch_cross_entropy(logits, targets), F.cross_entropy(logits, targets[:, 0], reduction="none"))
    assert torch.equal(group_embeddings(embeds, (4, 4), 1), embeds)


def test_gradients():
    torch.manual_seed(3)
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 6, (4, 4))
    loss = patch_cross_entropy(logits.float(), targets).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    bag = F.one_hot(targets, 6).double().mean(1)  # d loss / d z = softmax(z) - share of each code in the patch
    torch.testing.assert_close(gradient, logits.detach().softmax(-1) - bag, rtol=0, atol=1e-6)
    embeds = torch.randn(1, 16, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: group_embeddings(x, (4, 4), 2), embeds)


@pytest.mark.parametrize(("grid", "p"), [((4, 6), 4), ((3, 3), 2), ((4, 4), 0)])
def test_undivisible_grid_is_named(grid, p):
    with pytest.raises(
        ValueError, match=rf"patch_size, prediction.window: {p} does not divide the code grid {grid[0]}x{grid[1]}"
    ):
        group_targets(torch.zeros(1, grid[0] * grid[1], dtype=torch.long), grid, p)


def test_wrong_number_of_codes_is_named():
    with pytest.raises(ValueError, match="grid: 4x4 needs 16 codes, got 15"):
        group_embeddings(torch.zeros(1, 15, 2), (4, 4), 2)


class TestSchedule:
    def test_paper_levels(self):
        """Relative token cost of the paper's settings."""
        costs = {(2, 0.5): 0.625, (3, 0.5): 0.578125, (4, 0.5): 0.572265625, (2, 0.67): 0.4975}
        for (levels, ratio), cost in costs.items():
            assert PatchSchedule.from_levels(levels, ratio).relative_cost() == pytest.approx(cost)

    def test_stages_cover_all_steps_and_end_at_one(self):
        stages = PatchSchedule((4, 2, 1), (0.25, 0.25, 0.5)).stages(101)
        assert [(s.patch_size, s.start, s.end) for s in stages] == [(4, 0, 25), (2, 25, 50), (1, 50, 101)]

    def test_every_stage_gets_a_step(self):
        assert [s.end - s.start for s in PatchSchedule((4, 2, 1), (0.01, 0.01, 0.98)).stages(3)] == [1, 1, 1]

    def test_learning_rate_restarts(self):
        schedule = PatchSchedule((2, 1), (0.5, 0.5), warmup=0.1, decay=0.2, final=0.0)
        rates = [schedule.lr_multiplier(step, 200) for step in range(200)]
        assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])  # never 0 at the first step
        assert rates[10:80] == [1.0] * 70
        assert rates[80:100] == pytest.approx([1 - i / 20 for i in range(20)])
        assert rates[100:] == rates[:100]

    def test_one_schedule_over_all_stages(self):
        schedule = PatchSchedule((2, 1), (0.5, 0.5), restart=False, warmup=0.1, decay=0.2, final=0.1)
        rates = [schedule.lr_multiplier(step, 200) for step in range(200)]
        assert min(rates[20:160]) == 1.0
        assert rates[199] == pytest.approx(0.1 + 0.9 / 40)

    def test_mixed_steps_go_back_to_coarser_sizes(self):
        schedule = PatchSchedule((4, 2, 1), (0.2, 0.3, 0.5), mixed=0.25)
        sizes = [schedule.patch_size(step, 40) for step in range(40)]
        assert sizes[:8] == [4] * 8  # nothing is coarser than the first stage
        assert sizes[8:20] == [2, 2, 2, 4] * 3
        assert sizes[20:] == [1, 1, 1, 4, 1, 1, 1, 2] * 2 + [1, 1, 1, 4]
        # By hand: .2/16 + .3 (.75/4 + .25/16) + .5 (.75 + .25 (1/16 + 1/4) / 2)
        assert schedule.relative_cost() == pytest.approx(0.0125 + 0.0609375 + 0.39453125)

    def test_without_mixing_a_step_has_its_stages_size(self):
        schedule = PatchSchedule((2, 1), (0.5, 0.5))
        assert [schedule.patch_size(step, 6) for step in range(6)] == [2, 2, 2, 1, 1, 1]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (((2, 4, 1), (0.3, 0.3, 0.4)), "patch_sizes"),
            (((4, 2), (0.5, 0.5)), "patch_sizes"),
            (((2, 1), (0.5, 0.6)), "shares"),
            (((2, 1), (1.0, 0.0)), "shares"),
            (((2, 1), (0.5, 0.5), True, 0.7, 0.7), "warmup, decay"),
            (((2, 1), (0.5, 0.5), True, 0.1, 0.1, 0.1, 1.0), r"mixed: 1.0 must lie in \[0, 1\)"),
        ],
    )
    def test_bad_fields_are_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            PatchSchedule(*arguments)

    def test_step_outside_is_refused(self):
        with pytest.raises(ValueError, match="step: 10 lies outside"):
            PatchSchedule().lr_multiplier(10, 10)
