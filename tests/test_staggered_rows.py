"""Rows that begin early: against a loop that recomputes everything, at the limit of whole rows, with known codes and in batches."""

import pytest
import torch
from conftest import full_forward, generators, last, tiny_model

from unified.decoding import Sampling, generate_codes, make_decoder
from unified.decoding.prefill import as_bias
from unified.decoding.sampling import filter_logits, guide, gumbel_noise
from unified.decoding.staggered_rows import staggered_passes, zipar_codes

GRID, PROMPTS, NEGATIVES = (4, 5), [[1, 5, 6, 7, 3], [1, 8, 3]], [[1, 3], [1, 9, 9, 9, 3]]
SAMPLING = Sampling(guidance_scale=2.0, guidance_schedule="linear", temperature=0.7)


def model_of_strong_context():
    """A tiny model whose codes depend on one another strongly."""
    model = tiny_model(text={"initializer_range": 0.5})
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.image_modules().values():
            module.weight.normal_(0, 1.5)
    return model


def test_passes_of_a_small_grid():
    assert staggered_passes((3, 4), 2).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 6, 7, 8, 9]
    assert staggered_passes((3, 4), 9).tolist() == list(range(12))


def naive(model, prompt, negative, window, generator):
    """Cell by cell: a whole forward pass over what may be seen, laid out by hand."""
    height, width = GRID
    when, codes = staggered_passes(GRID, window).tolist(), torch.full((height * width,), -1)
    noise = gumbel_noise([generator], height * width * 20, codes.device).view(height * width, 20)
    scales = SAMPLING.scales(height * width)
    for number in range(max(when) + 1):
        for cell in [c for c in range(height * width) if when[c] == number]:
            sides = []
            for ids in (prompt, negative):
                start, source = len(ids), cell - 1
                held = [int(code) if t < number else 0 for code, t in zip(codes, when, strict=True)]
                if source >= 0 and when[source] >= number:  # another code stands for the one before a row
                    row = max(r for r in range(height) if when[r * width + width - 1] < number)
                    held[source] = int(codes[row * width + width - 1])
                visible = torch.ones(start + height * width, start + height * width, dtype=torch.bool).tril()
                for i in range(height * width):
                    for j in range(i):  # a code sees what was known when it entered
                        visible[start + i, start + j] = when[j] <= (when[i] if i != source else number - 1)
                bias = as_bias(visible[None, None], torch.float32)
                rows = [*ids, *(50 + code for code in held)]
                states = full_forward(model, rows, [GRID], attention_mask=bias).image_logits[0]
                sides.append(states[start + source])
            logits = filter_logits(guide(*sides, scales[cell]), SAMPLING)
            codes[cell] = int((logits + noise[cell]).argmax())
    return codes


@pytest.mark.parametrize("window", [1, 2, 3])
def test_equals_a_loop_without_cache(window):
    model = model_of_strong_context()
    codes = last(zipar_codes(make_decoder(model), PROMPTS, NEGATIVES, GRID, SAMPLING, generators(0, 1), window=window))
    for number, seed in enumerate((0, 1)):
        expected = naive(model, PROMPTS[number], NEGATIVES[number], window, generators(seed)[0])
        assert torch.equal(codes[number], expected) and len(expected.unique()) > 4


def test_a_window_of_a_row_is_plain_decoding_and_a_narrow_one_is_not():
    decoder = make_decoder(model_of_strong_context())
    given = [PROMPTS, NEGATIVES, GRID, SAMPLING]
    plain = generate_codes(decoder, *given, generators(0, 1)).flatten(1)
    for window, same in ((5, True), (9, True), (1, False)):
        steps = [codes.clone() for codes in zipar_codes(decoder, *given, generators(0, 1), window=window)]
        assert torch.equal(steps[-1], plain) == same
        assert len(steps) == (20 if same else 5 + 2 + 5)
        assert all(torch.equal(step[step >= 0], steps[-1][:, : step.shape[1]][step >= 0]) for step in steps)


def test_known_codes_stay_and_an_image_depends_on_its_own():
    decoder = make_decoder(model_of_strong_context())
    known = torch.full((2, *GRID), -1)
    known[:, 1:3, ::2] = torch.tensor([7, 11, 2])
    options = {"grid": GRID, "sampling": SAMPLING}
    both = last(zipar_codes(decoder, PROMPTS, NEGATIVES, generators=generators(0, 1), known=known, **options))
    free = last(zipar_codes(decoder, PROMPTS, NEGATIVES, generators=generators(0, 1), **options))
    assert torch.equal(both.reshape(known.shape)[known >= 0], known[known >= 0]) and int(both.min()) >= 0
    assert torch.equal(both[:, :5], free[:, :5]) and not torch.equal(both[:, 5:], free[:, 5:])
    alone = last(zipar_codes(decoder, PROMPTS[1:], NEGATIVES[1:], generators=generators(1), known=known[1:], **options))
    assert torch.equal(alone[0], both[1])


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [({}, {"window": 0}, "window: 0 must be at least 1"),
     ({"prediction": {"order": "diagonals"}}, {}, "decoding: 'zipar' needs the order 'raster'")],
)  # fmt: skip
def test_bad_options_are_named(changes, options, message):
    with pytest.raises(ValueError, match=message):
        last(zipar_codes(make_decoder(tiny_model(**changes)), PROMPTS, None, (4, 4), Sampling(), generators(0, 1),
                         **options))  # fmt: skip
