"""Continuous batching: every request gets what it would get alone; text and images against full forward passes."""

import pytest
import torch
from conftest import full_forward, generators, tiny_model

from unified.decoding import Prompt, Sampling, generate_codes, make_decoder, passes
from unified.decoding.batch_rows import Request
from unified.decoding.continuous_batching import Batcher
from unified.decoding.passes import image_columns
from unified.decoding.prefill import prefill
from unified.decoding.sampling import PositionNoise, filter_logits, sample_gumbel
from unified.prediction.plan import Prediction
from unified.sequence import ImageSegment, TextSegment, build_sequence

PROMPTS = [[1, 5, 6, 7, 3], [1, 8, 3], [1, 9, 10, 3], [1, 11, 12, 13, 14, 3], [1, 3]]


def image_requests(sampling, grid=(4, 4)):
    return [
        Request(Prompt(tuple(ids)), grid, *generators(i), image_sampling=sampling, negative=Prompt((1, 3)))
        for i, ids in enumerate(PROMPTS)
    ]


@pytest.mark.process
@pytest.mark.parametrize(
    ("positions", "sampling"),
    [("1d", Sampling(top_k=8)), ("2d", Sampling(guidance_scale=2.0, guidance_schedule="cosine"))],
)
def test_images_are_those_of_the_plain_loop_whenever_they_arrive(threads, positions, sampling):
    """Five requests, two at a time, the last ones submitted while the first are running; columns move back."""
    decoder = make_decoder(tiny_model(positions=positions))
    batcher = Batcher(decoder, max_rows=2 * (1 + sampling.guided), length=25)
    requests, results = image_requests(sampling), {}
    for request in requests[:2]:
        batcher.submit(request)
    for step in range(200):
        results.update(batcher.step())
        if step == 5:
            for request in requests[2:]:
                batcher.submit(request)
        if step > 5 and not batcher.busy:
            break
    assert len(results) == 5 and sorted(batcher.free) == list(range(batcher.max_rows))
    for i, request in enumerate(requests):
        (segment,) = results[request]
        alone = generate_codes(decoder, [PROMPTS[i]], [[1, 3]], (4, 4), sampling, generators(i))
        assert torch.equal(segment.codes, alone[0])


@pytest.mark.process
def test_a_long_prompt_joins_a_row_that_has_just_begun(monkeypatch):
    """Columns move on to make room before it, and back when the last one is written."""
    decoder = make_decoder(tiny_model(positions="2d"))
    batcher, sampling, grid = Batcher(decoder, max_rows=4, length=36), Sampling(guidance_scale=2.0), (4, 4)
    moved, move, compact = [], batcher._move, batcher._compact
    monkeypatch.setattr(batcher, "_move", lambda by: moved.append("on") or move(by))
    monkeypatch.setattr(batcher, "_compact", lambda: moved.append("together") or compact())
    prompts = [(1, 3), (1, *range(5, 20), 3), (1, 6, 3), (1, 7, 8, 3)]
    requests = [
        Request(Prompt(p), grid, *generators(i), image_sampling=sampling, negative=Prompt((1, 3)))
        for i, p in enumerate(prompts)
    ]
    results = {}
    for step in range(60):
        if step in (0, 1, 12, 20):
            batcher.submit(requests[(0, 1, 12, 20).index(step)])
        results.update(batcher.step())
    assert moved == ["on", "on", "together"] and not batcher.busy
    for i, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
        (segment,) = results[request]
        alone = generate_codes(decoder, [prompt], [[1, 3]], grid, sampling, generators(i))
        assert torch.equal(segment.codes, alone[0])


def naive_interleaved(model, segments, request, seed):
    """Grow one sequence by full forward passes; images without guidance."""
    vocabulary = model.config.vocabulary
    size = request.grid[0] * request.grid[1]
    text_seed = int(torch.randint(2**63 - 1, (), generator=generators(seed)[0]))
    text_noise = PositionNoise(generators(text_seed), vocabulary.text_vocab_size, torch.device("cpu"))
    (image_generator,) = generators(seed)
    start = build_sequence(segments, vocabulary)
    ids, grids, produced, written = start.input_ids.tolist(), list(start.image_grids), [], 0
    while written < request.max_new_tokens:
        with torch.no_grad():
            output = full_forward(model, ids, grids)
        logits = output.logits[:, -1].clone()
        images = sum(isinstance(p, ImageSegment) for p in produced)
        banned = [vocabulary.eoi_token_id, vocabulary.bos_token_id, vocabulary.pad_token_id]
        logits[:, banned + ([vocabulary.boi_token_id] if images >= request.max_images else [])] = float("-inf")
        token = int(sample_gumbel(filter_logits(logits, request.text_sampling), text_noise.at(written)[:, 0]))
        written += 1
        if token == vocabulary.eos_token_id:
            break
        ids.append(token)
        if token != vocabulary.boi_token_id:
            produced.append(token)
            continue
        noise = PositionNoise([image_generator], vocabulary.codebook_size, torch.device("cpu"))
        for step in range(size):
            hidden = [*ids, *[vocabulary.text_vocab_size] * (size - step)]
            with torch.no_grad():
                output = full_forward(model, hidden, [*grids, request.grid])
            logits = output.image_logits[:, len(ids) - 1]
            ids.append(
                vocabulary.text_vocab_size
                + int(sample_gumbel(filter_logits(logits, request.image_sampling), noise.at(step)[:, 0]))
            )
        produced.append(ImageSegment(torch.tensor(ids[-size:]).reshape(request.grid) - vocabulary.text_vocab_size))
        grids.append(request.grid)
        ids.append(vocabulary.eoi_token_id)
    return produced


def flat(segments):
    result = []
    for segment in segments:
        result += list(segment.ids) if isinstance(segment, TextSegment) else [segment.codes.tolist()]
    return result


@pytest.mark.process
@pytest.mark.parametrize("positions", ["1d", "2d"])
@pytest.mark.parametrize("text", [{}, {"model_type": "gemma2", "sliding_window": 6, "head_dim": 8}])
def test_interleaved_rows_equal_full_forward_passes(threads, positions, text):
    """Rows that write, rows that generate, images in the prompt: one batch, each row in its own modality."""
    model = tiny_model(positions=positions, text=text)
    vocabulary = model.config.vocabulary
    image = ImageSegment(torch.arange(8).reshape(2, 4))
    starts = [[TextSegment([5, 6])], [image], [TextSegment([7]), image, TextSegment([8, 9])], [TextSegment([20])]]
    requests = []
    for i, start in enumerate(starts):
        sequence = build_sequence(start, vocabulary)
        prompt = Prompt(tuple(sequence.input_ids.tolist()), tuple(sequence.image_grids))
        requests.append(Request(prompt, (2, 4), *generators(i), text_sampling=Sampling(temperature=30.0),
                                max_new_tokens=30, max_images=2))  # fmt: skip
    results = Batcher(make_decoder(model), max_rows=3, length=80).run(requests)
    count = 0
    for i, (start, request) in enumerate(zip(starts, requests, strict=True)):
        expected = [p if isinstance(p, int) else p.codes.tolist() for p in naive_interleaved(model, start, request, i)]
        assert flat(results[i]) == expected
        count += sum(isinstance(segment, ImageSegment) for segment in results[i])
    assert count > 0  # otherwise the test would not have tested images


def test_guided_images_inside_text():
    """A model that always opens an image generates, guided, what it generates after the same ids in the plain loop."""
    model = tiny_model(text={"tie_word_embeddings": False})
    decoder = make_decoder(model)
    sampling = Sampling(guidance_scale=2.0)
    make = decoder.text_logits
    decoder.text_logits = lambda hidden: make(hidden).index_fill(-1, torch.tensor([3]), 1e4)
    request = Request(Prompt((1, 5, 6)), (2, 4), *generators(4), image_sampling=sampling, negative=Prompt((1, 3)),
                      max_new_tokens=1)  # fmt: skip
    ((segment,),) = Batcher(decoder, max_rows=2, length=40).run([request])
    plain = generate_codes(decoder, [[1, 5, 6, 3]], [[1, 3]], (2, 4), sampling, generators(4))
    assert torch.equal(segment.codes, plain[0])


def test_bad_requests_are_named():
    batcher = Batcher(make_decoder(tiny_model()), max_rows=1, length=20)
    with pytest.raises(ValueError, match=r"request: 5 positions and up to 18 new ones, a row holds 20"):
        batcher.submit(Request(Prompt((1, 5, 6, 7, 3)), (4, 4), *generators(0)))
    guided = Request(Prompt((1, 3)), (2, 2), *generators(0), image_sampling=Sampling(guidance_scale=2.0))
    with pytest.raises(ValueError, match="negative: guidance needs an unconditional row"):
        batcher.submit(guided)
    guided.negative = Prompt((1, 3))
    with pytest.raises(ValueError, match="max_rows: 1 cannot hold a guided request"):
        batcher.submit(guided)


def test_free_rows_cost_nothing():
    """A request in a wide batch runs two rows; when an early one has left, the next one takes its place."""
    decoder = make_decoder(tiny_model())
    widths = []

    class Watched(type(decoder)):
        def __call__(self, embeds, *given):
            widths.append(len(embeds))
            return super().__call__(embeds, *given)

    decoder.__class__ = Watched
    batcher = Batcher(decoder, max_rows=8, length=25)
    first, second, third = image_requests(Sampling(guidance_scale=2.0))[:3]
    batcher.run([first])
    assert set(widths) == {2}
    batcher.submit(second)
    batcher.step()
    widths.clear()
    batcher.submit(third)
    batcher.step()
    assert widths[-1] == 4
    batcher.cancel(second)
    batcher.submit(first)
    batcher.step()
    assert widths[-1] == 4 and len(batcher.rows) == 2


ORDERS = [
    {"order": "diagonals"}, {"order": "rows"}, {"order": "spread", "size": 2}, {"order": "random", "size": 5},
    {"merge": "channel", "chained": True}, {"order": "diagonals", "merge": "channel"},
]  # fmt: skip


@pytest.mark.process
@pytest.mark.parametrize(
    "sampling", [Sampling(top_k=8), Sampling(guidance_scale=2.0, guidance_schedule="cosine", group_temperature=0.5)]
)
@pytest.mark.parametrize("prediction", ORDERS, ids=str)
def test_images_of_every_order_are_those_of_the_plain_loop_whenever_they_arrive(prediction, sampling, monkeypatch):
    """Rows at different places of their order share passes of several positions; the columns are put together in between."""
    decoder = make_decoder(tiny_model(prediction=prediction))
    length = 6 + image_columns(decoder.model, (4, 4))
    batcher = Batcher(decoder, max_rows=2 * (1 + sampling.guided), length=length)
    together, compact = [], batcher._compact
    monkeypatch.setattr(batcher, "_compact", lambda: together.append(1) or compact())
    requests, results = image_requests(sampling) * 1, {}
    requests += [
        Request(Prompt((1, 7, 8, 3)), (4, 4), *generators(i), sampling, negative=Prompt((1, 3))) for i in range(5, 12)
    ]
    for step in range(200):
        if step % 2 == 0 and step // 2 < len(requests):
            batcher.submit(requests[step // 2])
        results.update(batcher.step())
        if step > 2 * len(requests) and not batcher.busy:
            break
    assert len(results) == len(requests) and together
    for i, request in enumerate(requests):
        (segment,) = results[request]
        alone = generate_codes(decoder, [request.prompt], [[1, 3]], (4, 4), sampling, generators(i))
        assert torch.equal(segment.codes, alone[0])


@pytest.mark.parametrize("prediction", [None, *ORDERS], ids=str)
def test_text_that_follows_an_image_has_read_all_of_it(prediction, monkeypatch):
    """The state behind an image that was sampled is that of a prompt which holds the image, up to its last code."""
    model = tiny_model(prediction=prediction)
    vocabulary, decoder = model.config.vocabulary, make_decoder(model)
    request = Request(Prompt((1, 5, 3)), (4, 4), *generators(1), max_new_tokens=6)
    other = Request(Prompt((1, 6, 7, 3)), (4, 4), *generators(2), max_new_tokens=6)
    batcher = Batcher(decoder, 2, 60)
    batcher.submit(other)
    batcher.step()
    batcher.submit(request)
    (row,) = (batcher.step(), [row for row in batcher.rows if row.request is request])[1]
    while not (row.segments and row.image is None and row.next is None):
        batcher.step()
    image = row.segments[0]
    ids = (1, 5, 3, *(image.codes.flatten() + vocabulary.text_vocab_size).tolist(), vocabulary.eoi_token_id)
    if model.prediction.way.any_order:  # the prompt's image in the permutation of the request
        seed = passes.order_seed(*generators(1))
        monkeypatch.setattr(Prediction, "training_plan", lambda self, grid, own: self.plan(grid, seed))
    wanted = prefill(decoder, [Prompt(ids, ((4, 4),))], 0).hidden[0]
    torch.testing.assert_close(row.states[0, -1], wanted, rtol=1e-4, atol=1e-4)
