"""Batches: exact shares of several sources, whole epochs, random choices, buckets, resume, processes."""

from collections import Counter
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from conftest import TEXTS, text_config, text_source

from unified.data.batches import Batches, Source, block_shares, bucketed_order, loader
from unified.data.captioned import captioned_sequence
from unified.data.code_cache import load_codes
from unified.prediction.merge import patches


def image_source(rows, text_tokenizer, config, weight=1.0, **options):
    vocabulary = config.vocabulary
    sequence = partial(captioned_sequence, text_tokenizer=text_tokenizer, vocabulary=vocabulary, **options)
    return Source("images", rows, sequence, weight)


def captioned(
    parts, text_tokenizer, pack_length=None, batch_size=4, num_batches=9, seed=1, rank=0, world_size=1, **options
):
    """Batches of the captioned images of ``parts``."""
    config = text_config(text_tokenizer)
    source = image_source(load_codes(parts / "codes", "train", None), text_tokenizer, config, **options)
    return Batches([source], config, batch_size, num_batches, seed, rank, world_size, pack_length)


def mixture(parts, text_tokenizer, weights=(3, 1), **changes):
    """Batches of captioned images and texts."""
    config, images = text_config(text_tokenizer), load_codes(parts / "codes", "train", None)
    sources = [
        image_source(images, text_tokenizer, config, weights[0], caption_dropout=0.5, code_noise=0.5),
        text_source(text_tokenizer, config, weights[1]),
    ]
    return Batches(sources, config, **{"batch_size": 4, "num_batches": 300, "seed": 1, **changes})


def ids(batches, index):
    return [sequence.input_ids.tolist() for sequence in batches.sequences(index)]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [((1, 1, 1), [334, 333, 333]), ((3, 1), [750, 250]), ((0.7, 0.2, 0.1), [700, 200, 100]), ((5,), [1000])],
)
def test_shares_are_rounded_to_thousandths(weights, shares):
    assert block_shares(weights) == shares


def test_every_block_holds_the_shares_and_every_epoch_every_row(parts, text_tokenizer):
    batches = mixture(parts, text_tokenizer, weights=(2, 1))
    places = [batches.place(number) for number in range(3000)]
    for start in (0, 1000, 2000):
        assert Counter(source for source, _ in places[start : start + 1000]) == {0: 667, 1: 333}
    assert [source for source, _ in places[:1000]] != [source for source, _ in places[1000:2000]]
    for source, rows in ((0, 12), (1, 5)):
        order = [row for owner, row in places if owner == source]
        epochs = [order[start : start + rows] for start in range(0, len(order) - rows, rows)]
        assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_one_source_is_a_list_of_one(parts, text_tokenizer):
    batches = captioned(parts, text_tokenizer)
    order = [batches.place(i)[1] for i in range(2400)]
    epochs = [order[i : i + 12] for i in range(0, 2400, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs) and epochs[0] != epochs[1]


def test_a_batch_is_a_function_of_its_index(parts, text_tokenizer):
    straight = list(loader(mixture(parts, text_tokenizer, num_batches=255), start=235))
    resumed = list(loader(mixture(parts, text_tokenizer, num_batches=255), start=245))  # blocks end at 250
    assert len(resumed) == 10
    for a, b in zip(straight[10:], resumed, strict=True):
        assert a.counts == b.counts and a.inputs.keys() == b.inputs.keys()
        assert all(torch.equal(a.inputs[name], b.inputs[name]) for name in a.inputs)
    first, other = (mixture(parts, text_tokenizer, seed=seed)[0].inputs["input_ids"] for seed in (1, 2))
    assert not torch.equal(first[:, :4], other[:, :4])


def test_processes_share_the_global_batch(parts, text_tokenizer):
    whole = mixture(parts, text_tokenizer)
    halves = [mixture(parts, text_tokenizer, batch_size=2, rank=r, world_size=2) for r in (0, 1)]
    for index in (0, 7, 251):
        parted = [ids(half, index) for half in halves]
        assert [parted[0][0], parted[1][0], parted[0][1], parted[1][1]] == ids(whole, index)


def test_accumulated_parts_are_the_batch(parts, text_tokenizer):
    """Dropout, direction and noise belong to a row's place in the epoch: 4 x 2 rows are the rows of one batch of 8."""
    options = {"caption_dropout": 0.5, "captioning": 0.3, "code_noise": 0.5}
    eight = captioned(parts, text_tokenizer, batch_size=8, **options)
    two = captioned(parts, text_tokenizer, batch_size=2, num_batches=36, **options)
    for index in range(9):
        assert [row for part in range(4) for row in ids(two, 4 * index + part)] == ids(eight, index)


def test_rows_of_a_batch_are_merged_by_its_index(parts, text_tokenizer):
    config = text_config(text_tokenizer)
    source = image_source(load_codes(parts / "codes", "train", None), text_tokenizer, config)
    batches = Batches([source], config, 4, 3, merge_of=lambda index: patches(2 if index == 0 else 1))
    assert [batch.counts.image_targets for batch in batches] == [16, 64, 64]


def test_packed_batches_hold_the_same_documents(parts, text_tokenizer):
    batches = captioned(parts, text_tokenizer, captioning=0.4, pack_length=60)
    packed = batches[2].inputs
    assert len(packed["input_ids"]) == 2
    documents = [
        row[packed["document_ids"][i] == d].tolist()
        for i, row in enumerate(packed["input_ids"])
        for d in range(int(packed["document_ids"][i].max()) + 1)
    ]
    assert sorted(documents) == sorted(ids(batches, 2))


@pytest.mark.process
def test_caption_dropout_share(parts, text_tokenizer):
    batches = captioned(parts, text_tokenizer, caption_dropout=0.25, num_batches=150)
    boi = batches.config.boi_token_id
    dropped = [row[1] == boi for index in range(150) for row in ids(batches, index)]
    assert sum(dropped) / len(dropped) == pytest.approx(0.25, abs=0.04)


@pytest.mark.process
def test_captioning_turns_rows_around(parts, text_tokenizer):
    """Codes first, then the caption, which alone is in the loss; the other rows are as they were."""
    plain, mixed = (captioned(parts, text_tokenizer, captioning=share, num_batches=60) for share in (0.0, 0.4))
    vocabulary, turned = plain.config.vocabulary, 0
    for index in range(60):
        for a, b in zip(plain.sequences(index), mixed.sequences(index), strict=True):
            before, after = a.input_ids.tolist(), b.input_ids.tolist()
            if after[1] != vocabulary.boi_token_id:
                assert before == after
                continue
            turned += 1
            start = before.index(vocabulary.boi_token_id)
            caption, image = before[1:start], before[start:]
            assert after == [before[0], *image, *caption, vocabulary.eos_token_id]
            assert b.labels.tolist() == [-100] * (1 + len(image)) + [*caption, vocabulary.eos_token_id]
    assert turned / 240 == pytest.approx(0.4, abs=0.08)


@pytest.mark.process
def test_code_noise_touches_inputs_only(parts, text_tokenizer):
    clean, noisy = (captioned(parts, text_tokenizer, code_noise=noise, num_batches=60) for noise in (0.0, 0.8))
    shares = []
    for index in range(60):
        for a, b in zip(clean.sequences(index), noisy.sequences(index), strict=True):
            assert torch.equal(a.labels, b.labels)
            is_code = a.input_ids >= text_tokenizer.vocab_size
            assert torch.equal(a.input_ids[~is_code], b.input_ids[~is_code])
            assert torch.equal(b.input_ids >= text_tokenizer.vocab_size, is_code)
            shares.append(float(((a.input_ids != b.input_ids) & is_code).sum() / is_code.sum()))
    # Rates are uniform in [0, 0.8]; one sample in twenty hits the code that was there.
    assert sum(shares) / len(shares) == pytest.approx(0.4 * 19 / 20, abs=0.04)
    assert max(shares) > 0.6 and min(shares) < 0.1


def test_texts_are_cut_and_supervised(text_tokenizer):
    config, row, rng = text_config(text_tokenizer), {"text": TEXTS[0]}, np.random.default_rng(0)
    words = text_tokenizer.encode(TEXTS[0])
    bos, eos = config.vocabulary.bos_token_id, config.vocabulary.eos_token_id
    whole = text_source(text_tokenizer, config).sequence(row, rng)
    assert whole.input_ids.tolist() == [bos, *words, eos] and whole.labels.tolist() == [-100, *words, eos]
    cut = text_source(text_tokenizer, config, max_length=len(words)).sequence(row, rng)
    assert cut.input_ids.tolist() == [bos, *words[:-1]]


class TestBuckets:
    GRIDS = [(4, 4)] * 13 + [(3, 6)] * 9 + [(6, 3)] * 5  # 27 rows

    def build(self, text_tokenizer, **changes):
        rows = [
            {"codes": [i % 20] * (h * w), "height": h, "width": w, "caption": "red apple"}
            for i, (h, w) in enumerate(self.GRIDS)
        ]
        rows = datasets.Dataset.from_list(rows).with_format("numpy")
        config = text_config(text_tokenizer)
        return Batches(
            [image_source(rows, text_tokenizer, config)],
            config,
            **{"batch_size": 4, "num_batches": 27, "seed": 1, "bucket": True, **changes},
        )

    def test_every_epoch_sees_every_row_once(self, text_tokenizer):
        batches = self.build(text_tokenizer)
        order = [batches.place(i)[1] for i in range(4 * 27)]
        epochs = [order[start : start + 27] for start in range(0, 4 * 27, 27)]
        assert [sorted(epoch) for epoch in epochs] == [list(range(27))] * 4
        assert len({tuple(epoch) for epoch in epochs}) == 4

    def test_batches_hold_one_grid_but_for_leftovers(self, text_tokenizer):
        """Of 27 rows in fours 3 + 2 + 1 batches are whole; the other three rows, and at most one whole batch, make the ends."""
        whole = []
        for batch in loader(self.build(text_tokenizer)):
            lengths = batch.inputs["text_targets"]  # <eoi> behind images of one grid stands in one column
            whole.append(len(set((lengths % batch.inputs["input_ids"].shape[1]).tolist())) == 1)
        assert sum(whole) >= 4 * 5

    @pytest.mark.process
    def test_resume_and_processes_see_the_same(self, text_tokenizer):
        straight = [batch.inputs["input_ids"] for batch in loader(self.build(text_tokenizer))]
        resumed = [batch.inputs["input_ids"] for batch in loader(self.build(text_tokenizer), start=11)]
        assert all(torch.equal(a, b) for a, b in zip(straight[11:], resumed, strict=True))
        whole = self.build(text_tokenizer)
        halves = [self.build(text_tokenizer, batch_size=2, rank=r, world_size=2) for r in (0, 1)]
        for index in (0, 6, 13):
            expected = [s.input_ids.tolist() for s in whole.sequences(index)]
            for rank, half in enumerate(halves):
                assert [s.input_ids.tolist() for s in half.sequences(index)] == expected[rank::2]

    @pytest.mark.parametrize(
        ("counts", "mixed"), [((1,), 0), ((2, 1), 0), ((1, 1, 1, 1), 1), ((13, 9, 5), 0), ((7, 7, 7, 7), 3)]
    )
    def test_leftovers_alone_are_mixed(self, counts, mixed):
        """In fours from the start of a batch: 7 rows of four grids each leave three mixed batches among four whole ones."""
        grids = np.repeat([(4, 4), (3, 6), (6, 3), (2, 8)][: len(counts)], counts, axis=0)
        for begun in range(4):
            order = bucketed_order(grids, 4, begun, np.random.default_rng(begun))
            assert sorted(order) == list(range(sum(counts)))
            batches = order[begun:][: (len(order) - begun) // 4 * 4].reshape(-1, 4)
            found = sum(len(set(map(tuple, grids[batch]))) > 1 for batch in batches)
            assert found == mixed if begun == 0 else found <= mixed
