"""Training batches as a pure function of the step, so that a resumed run sees exactly what it would have seen."""

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from unified.config import TokenLayout
from unified.sequence import ImageSegment, TextSegment, TokenSequence, build_sequence, collate
from unified_tokenizers import TextTokenizer

_SHUFFLE, _DROPOUT, _NOISE, _DIRECTION = 0, 1, 2, 3  # independent random streams of one seed


class CaptionedBatches(Dataset):
    """Item i is the i-th batch of this process: captions and codes laid out as ``<bos> caption <boi> codes <eoi>``.

    For a share ``captioning`` of the rows the picture comes first and the caption is learned instead:
    ``<bos> <boi> codes <eoi> caption <eos>``. Every epoch is a new permutation of the rows; batches run across its end,
    so no row is dropped. Processes take interleaved slices of one global batch.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        text_tokenizer: TextTokenizer,
        layout: TokenLayout,
        batch_size: int,
        num_batches: int,
        seed: int = 0,
        caption_dropout: float = 0.0,
        code_noise: float = 0.0,
        train_on_captions: bool = False,
        captioning: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if len(rows) == 0:
            raise ValueError("data.train: no rows to train on.")
        self.rows, self.text_tokenizer, self.layout = rows, text_tokenizer, layout
        self.batch_size, self.num_batches, self.seed = batch_size, num_batches, seed
        self.caption_dropout, self.code_noise, self.train_on_captions = caption_dropout, code_noise, train_on_captions
        self.captioning, self.rank, self.world_size = captioning, rank, world_size
        self._epoch: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.num_batches:
            raise IndexError(index)
        total = self.batch_size * self.world_size
        dropped = np.random.default_rng((self.seed, _DROPOUT, index)).random(total) < self.caption_dropout
        captioned = np.random.default_rng((self.seed, _DIRECTION, index)).random(total) < self.captioning
        mine = range(self.rank, total, self.world_size)
        rows = self.rows[[self._row(index * total + i) for i in mine]]
        sequences = [self._sequence(rows, k, bool(dropped[i]), bool(captioned[i])) for k, i in enumerate(mine)]
        if self.code_noise:
            for sequence, i in zip(sequences, mine, strict=True):
                self._add_noise(sequence, np.random.default_rng((self.seed, _NOISE, index * total + i)))
        return collate(sequences, self.layout)

    def once(self, captioned: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        """Every row once and in order, without dropout or noise; the last batch may be smaller."""
        for start in range(0, len(self.rows), self.batch_size):
            rows = self.rows[start : start + self.batch_size]
            yield collate([self._sequence(rows, k, False, captioned) for k in range(len(rows["caption"]))], self.layout)

    def _row(self, position: int) -> int:
        """Row at ``position`` of the endless stream of shuffled epochs."""
        epoch, offset = divmod(position, len(self.rows))
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.default_rng((self.seed, _SHUFFLE, epoch)).permutation(len(self.rows))
            self._epoch = (epoch, order)
        return int(self._epoch[1][offset])

    def _add_noise(self, sequence: TokenSequence, rng: np.random.Generator) -> None:
        """Replace input codes at random; the labels stay. A small set of pictures can be told apart by their first
        codes alone: noise makes the model look at the caption, and forgives its own slips when it draws.
        """
        is_code = (sequence.input_ids >= self.layout.text_vocab_size).numpy()
        replaced = is_code & (rng.random(len(is_code)) < rng.uniform(0, self.code_noise))
        codes = rng.integers(self.layout.codebook_size, size=int(replaced.sum())) + self.layout.text_vocab_size
        sequence.input_ids[torch.from_numpy(replaced)] = torch.from_numpy(codes)

    def _sequence(self, rows: dict[str, Any], k: int, dropped: bool, captioned: bool) -> TokenSequence:
        caption = self.text_tokenizer.encode(str(rows["caption"][k]))
        codes = (
            torch.as_tensor(np.asarray(rows["codes"][k])).long().reshape(int(rows["height"][k]), int(rows["width"][k]))
        )
        if captioned:
            return build_sequence([ImageSegment(codes, loss=False), TextSegment(caption)], self.layout, end=True)
        text = TextSegment([] if dropped else caption, loss=self.train_on_captions)
        return build_sequence([text, ImageSegment(codes)], self.layout)


def loader(batches: CaptionedBatches, start: int = 0, num_workers: int = 0) -> DataLoader:
    """Iterate over batches from index ``start`` on. The global random stream, which dropout draws from, is left alone."""
    indices, generator = range(start, len(batches)), torch.Generator()
    return DataLoader(batches, batch_size=None, sampler=indices, num_workers=num_workers, generator=generator)
