"""The two streams of a guided request: which token each sees, and where.

A prompt is ``<bos> caption <null> <boi>``, then come codes. The conditional stream reads ``<bos> caption <boi> codes``, the
unconditional one ``<bos> <boi> codes`` with ``<bos>`` in the null token's place. Positions count for rotary embeddings alone, and
those see differences only: a stream that begins later is the same stream. What a token is to either stream depends on its id
alone, so that a request may be cut into chunks, share blocks with another one, or be computed again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Streams:
    """Both streams of T tokens, one behind the other.

    Attributes:
        ids: ``(2T,)`` ids of the joint table.
        positions: ``(2T,)``.
        hidden: ``(2T,)`` True where a stream's other tokens do not see this one.
    """

    ids: Tensor
    positions: Tensor
    hidden: Tensor


def two_streams(ids: Tensor, positions: Tensor, first_null: int, first_code: int, boi: int, bos: int | None) -> Streams:
    """Streams of the tokens ``ids (T,)`` at ``positions (T,)``.

    Args:
        first_null: ids from here on are the null token.
        first_code: ids from here to ``first_null`` are codes.
        boi, bos: ids of these tokens; a model without ``<bos>`` has an unconditional prompt of ``<boi>`` alone.
    """
    null = ids >= first_null
    image = ((ids >= first_code) & ~null) | (ids == boi)
    unconditional = ids.masked_fill(null, boi if bos is None else bos)
    unseen = ~image if bos is None else ~(image | null)
    return Streams(
        torch.cat([ids.masked_fill(null, 0), unconditional]),
        torch.cat([(positions - image.to(positions.dtype)).clamp_min(0), positions]),  # a kernel reads a table at them
        torch.cat([null, unseen]),
    )
