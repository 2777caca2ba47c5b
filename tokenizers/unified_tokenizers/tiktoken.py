"""A tokenizer of transformers from the rank file of a tiktoken one, without running code of its checkpoint."""

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers


def tokenizer_from_ranks(
    file: str | Path, pattern: str, special_tokens: Sequence[str], bos: str, eos: str, pad: str
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that merges as tiktoken does: of all pairs in a piece of text the one with the lowest rank.

    Args:
        file: lines of a token in base64 and its rank, which is its id; the ranks are 0, 1, 2, ...
        pattern: regular expression of the pieces that a text is cut into, after Unicode normalisation (NFC).
        special_tokens: names of the ids behind the last rank, in order.
        bos, eos, pad: which of them open and close a text, and fill a row.

    Raises:
        ValueError: if the file holds anything else.
    """
    ranks = _read_ranks(Path(file))
    letters = bytes_to_unicode()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [pair for token in ranks for pair in _pairs(token, ranks)]
    inner = Tokenizer(
        models.BPE(
            {written(token): rank for token, rank in ranks.items()},
            [(written(one), written(two)) for one, two in merges],
            ignore_merges=True,
        )
    )
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(special_tokens))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos, pad_token=pad)


def _read_ranks(file: Path) -> dict[bytes, int]:
    if not file.is_file():
        raise ValueError(f"text_tokenizer: there is no {str(file)!r}; give the folder with it.")
    ranks: dict[bytes, int] = {}
    try:
        for line in file.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"text_tokenizer: {str(file)!r} has a line that is no token and rank ({error}).") from error
    if not ranks or list(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"text_tokenizer: the ranks of {str(file)!r} are not 0, 1, 2, ...; get it again.")
    return ranks


def _pairs(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All pairs of tokens that make ``token``: any of them is merged where it stands."""
    cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
    found = [(one, two) for one, two in cuts if one in ranks and two in ranks]
    return sorted(found, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
