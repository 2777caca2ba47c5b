"""Several sources mixed by weight in one stream of batches, each batch a pure function of the step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from unified.config import Vocabulary
from unified.data.batches import Batch, Batches, add_code_noise, captioned_sequence
from unified.sequence import TextSegment, TokenSequence, build_sequence, collate
from unified_tokenizers import TextTokenizer

BLOCK = 1000
_MIX, _SHUFFLE, _CHOICE = 10, 11, 12  # independent random streams of one seed, other ones than in batches.py


@dataclass
class Source:
    """Rows and how one of them becomes a sequence; the generator is for what is sampled again in every epoch."""

    name: str
    rows: datasets.Dataset
    weight: float
    sequence: Callable[[dict[str, Any], np.random.Generator], TokenSequence]

    def once(self, vocabulary: Vocabulary, batch_size: int) -> Iterator[Batch]:
        """Every row once and in order; the last batch may be smaller."""
        rng = np.random.default_rng(0)
        for start in range(0, len(self.rows), batch_size):
            rows = range(start, min(start + batch_size, len(self.rows)))
            yield collate([self.sequence(self.rows[row], rng) for row in rows], vocabulary)


class MixedBatches(Batches):
    """Batches whose sequences come from several sources.

    Sequences are numbered through all steps and processes, and every block of 1000 numbers holds the sources' shares
    exactly (rounded to thousandths), shuffled. The n-th sequence of a source is row ``n mod rows`` of its epoch
    ``n // rows``, each epoch a new permutation: every row once before any comes again. So a sequence depends on the seed
    and its number alone, and resume and the split over processes change nothing.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        vocabulary: Vocabulary,
        batch_size: int,
        num_batches: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pack_length: int | None = None,
    ):
        super().__init__(vocabulary, batch_size, num_batches, seed, rank, world_size, pack_length)
        for source in sources:
            if len(source.rows) == 0:
                raise ValueError(f"data.sources: {source.name} has no row to train on.")
        self.sources = list(sources)
        self.shares = block_shares([source.weight for source in sources])
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def sequences(self, index: int) -> list[TokenSequence]:
        """This process's share of the global batch ``index``."""
        total = self.batch_size * self.world_size
        return [self._sequence(index * total + i) for i in range(self.rank, total, self.world_size)]

    def place(self, number: int) -> tuple[int, int]:
        """Source and row of sequence ``number``."""
        block, offset = divmod(number, BLOCK)
        if self._block is None or self._block[0] != block:
            owners = np.repeat(np.arange(len(self.shares)), self.shares)
            ranks = np.concatenate([np.arange(share) for share in self.shares])
            order = np.random.default_rng((self.seed, _MIX, block)).permutation(BLOCK)
            self._block = (block, owners[order], ranks[order])
        source = int(self._block[1][offset])
        epoch, position = divmod(
            block * self.shares[source] + int(self._block[2][offset]), len(self.sources[source].rows)
        )
        return source, int(self._order(source, epoch)[position])

    def _order(self, source: int, epoch: int) -> np.ndarray:
        if source not in self._orders or self._orders[source][0] != epoch:
            rng = np.random.default_rng((self.seed, _SHUFFLE, source, epoch))
            self._orders[source] = (epoch, rng.permutation(len(self.sources[source].rows)))
        return self._orders[source][1]

    def _sequence(self, number: int) -> TokenSequence:
        source, row = self.place(number)
        rng = np.random.default_rng((self.seed, _CHOICE, number))
        return self.sources[source].sequence(self.sources[source].rows[row], rng)


def block_shares(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers that sum to 1000, by largest remainders.

    Raises:
        ValueError: if a weight is not above 0, or less than half a thousandth of the sum.
    """
    for weight in weights:
        if not 0 < weight < float("inf"):
            raise ValueError(
                f"data.sources: weight {weight} must be above 0; leave a source out that is not to be learned."
            )
    exact = np.asarray(weights) / sum(weights) * BLOCK
    shares = np.floor(exact).astype(int)
    rest = np.argsort(shares - exact, kind="stable")[: BLOCK - shares.sum()]
    shares[rest] += 1
    if shares.min() == 0:
        raise ValueError(
            f"data.sources: weight {weights[int(shares.argmin())]} is below 1/{BLOCK} of their sum; raise it."
        )
    return [int(share) for share in shares]


def image_source(
    name: str,
    rows: datasets.Dataset,
    weight: float,
    text_tokenizer: TextTokenizer,
    vocabulary: Vocabulary,
    caption_dropout: float = 0.0,
    code_noise: float = 0.0,
    train_on_captions: bool = False,
    captioning: float = 0.0,
) -> Source:
    """Rows of a codes cache, laid out as in :class:`unified.data.batches.CaptionedBatches`."""

    def sequence(row: dict[str, Any], rng: np.random.Generator) -> TokenSequence:
        dropped, captioned = (bool(rng.random() < share) for share in (caption_dropout, captioning))
        made = captioned_sequence(row, text_tokenizer, vocabulary, dropped, captioned, train_on_captions)
        if code_noise:
            add_code_noise(made, vocabulary, code_noise, rng)
        return made

    return Source(name, rows, weight, sequence)


def text_source(
    name: str,
    rows: datasets.Dataset,
    weight: float,
    text_tokenizer: TextTokenizer,
    vocabulary: Vocabulary,
    text_column: str = "text",
    max_length: int = 512,
) -> Source:
    """Rows with a text, learned as ``<bos> text <eos>``; a longer text is cut to ``max_length`` tokens, without ``<eos>``."""

    def sequence(row: dict[str, Any], rng: np.random.Generator) -> TokenSequence:
        ids = text_tokenizer.encode(str(row[text_column]))
        room = max_length - (vocabulary.bos_token_id is not None)
        return build_sequence([TextSegment(ids[:room])], vocabulary, end=len(ids) < room)

    return Source(name, rows, weight, sequence)
