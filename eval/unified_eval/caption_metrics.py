"""Captions that a model writes, against those that people wrote: exact ones, BLEU-4, CIDEr-D, and the image that they find."""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from unified_eval.clip import Clip, caption_rows, clip_extractor, clip_recipe, clip_text_features, readable_captions
from unified_eval.intervals import interval_around, resample
from unified_eval.results import Bound, Results

ORDERS = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of the penalty on another length, in words
Ngrams = Counter[tuple[str, ...]]


def normalised(text: str) -> str:
    """A text as exact match compares it: lower case, single spaces, without a full stop."""
    return " ".join(text.lower().split()).rstrip(".")


def cider_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D of each caption, from 0 to 10, ``(N,)``; the usual value is their mean.

    The mean over n of 1 to 4 and over references of clipped cosines of tf-idf vectors of n-grams, each with a Gaussian penalty
    on another length. Document frequencies are those of the N sets of references. Words are runs of letters and digits in
    lower case; the original takes Stanford's tokenizer, which differs in punctuation, and counts an n that a short caption has
    no n-gram of as 0, as is done here.

    Raises:
        ValueError: if the lists differ in length, are empty, or a caption has no reference.

    Source: Vedantam et al. 2015, https://arxiv.org/abs/1411.5726.
    """
    if len(captions) != len(references) or not captions or not all(references):
        raise ValueError(f"references: {len(references)} sets for {len(captions)} captions; give 1 or more for each.")
    cooked = [[_ngrams(text) for text in texts] for texts in references]
    documents = Counter(ngram for texts in cooked for ngram in set().union(*texts))
    scores = []
    for caption, texts in zip(captions, cooked, strict=True):
        own = _ngrams(caption)
        scores.append(10 * np.mean([_similarity(own, text, documents, len(captions)) for text in texts]))
    return np.array(scores)


def _ngrams(text: str) -> Ngrams:
    words = re.findall(r"\w+", text.lower())
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1))


def _similarity(own: Ngrams, reference: Ngrams, documents: Ngrams, count: int) -> float:
    first, second = (
        {ngram: times * math.log(count / max(1, documents[ngram])) for ngram, times in text.items()}
        for text in (own, reference)
    )
    difference = sum(times for ngram, times in own.items() if len(ngram) == 1) - sum(
        times for ngram, times in reference.items() if len(ngram) == 1
    )
    total = 0.0
    for order in range(1, ORDERS + 1):
        lengths = [
            math.sqrt(sum(value**2 for ngram, value in each.items() if len(ngram) == order)) for each in (first, second)
        ]
        if all(lengths):
            shared = (ngram for ngram in first.keys() & second.keys() if len(ngram) == order)
            product = sum(min(first[ngram], second[ngram]) * second[ngram] for ngram in shared)
            total += product / math.prod(lengths)
    return total / ORDERS * math.exp(-(difference**2) / (2 * SIGMA**2))


def add_caption_scores(results: Results, captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Add ``caption_exact``, ``bleu4`` and ``cider_d`` of a caption for each image.

    Raises:
        ValueError: as :func:`cider_scores`.
    """
    scores = cider_scores(captions, references)
    groups = [f"image {number}" for number in range(len(captions))]
    exact = np.array([
        float(normalised(text) in map(normalised, given)) for text, given in zip(captions, references, strict=True)
    ])  # fmt: skip
    results.add_mean("caption_exact", exact, "captions as a reference has them, word by word", groups)
    _add_bleu(results, captions, references)
    results.add_mean(
        "cider_d", scores, "CIDEr-D, 0 to 10", groups, formula="arXiv 1411.5726, document frequencies of these references",
        words="runs of letters and digits",
    )  # fmt: skip


def _add_bleu(results: Results, captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    from sacrebleu import BLEU

    metric = BLEU()
    most = max(map(len, references))
    streams = [[given[number] if number < len(given) else None for given in references] for number in range(most)]

    def bleu(rows: Sequence[int]) -> float:
        some = [[stream[row] for row in rows] for stream in streams]
        return metric.corpus_score([captions[row] for row in rows], some).score  # type: ignore[arg-type]

    number = bleu(range(len(captions)))
    value = results.add("bleu4", number, "BLEU-4, 0 to 100", n=len(captions), formula=str(metric.get_signature()))
    if results.resamples and len(captions) > 1:
        value.resampled = np.array(
            [bleu(rows.tolist()) for rows in resample(range(len(captions)), results.resamples, results.seed)]
        )
        value.interval = interval_around(value.number, value.resampled)


def add_retrieval(
    results: Results, clip: Clip, images: Sequence[Image.Image], captions: Sequence[str], references: Sequence[str],
    batch_size: int = 64,
) -> None:  # fmt: skip
    """Add ``retrieval_r1``, the share of captions whose own image a CLIP finds nearest of all, its ceiling with the references,
    and ``caption_clip_score``.

    An empty caption, or one that is longer than the CLIP reads, finds nothing. Errors as for :mod:`unified_eval.clip`.
    """
    recipe, groups = clip_recipe(clip), [f"image {number}" for number in range(len(images))]
    shown = torch.from_numpy(clip_extractor(clip, recipe)(images, batch_size))
    for texts, suffix in ((captions, ""), (references, "_references")):
        fits = set(readable_captions(clip.tokenizer, list(texts)))
        found = [number for number, text in enumerate(texts) if text.strip() and number in fits]
        hits, own = np.zeros(len(images)), np.zeros(len(images))
        if found:
            rows = caption_rows(clip_text_features(clip, [texts[number] for number in found], batch_size), shown, found)
            hits[found], own[found] = rows["hit"], rows["own"]
        title = "references" if suffix else "captions"
        results.add_mean(
            f"retrieval_r1{suffix}", hits, f"R@1 of {len(images)} images by their {title} ({clip.name})", groups,
            given=bool(suffix), bound=Bound("retrieval_r1", "references") if suffix else None, chance=1 / len(images), **recipe,
        )  # fmt: skip
        results.add_mean(
            f"caption_clip_score{suffix}", 100 * own, f"CLIP score ({clip.name}), {title}", groups, given=bool(suffix),
            bound=Bound("caption_clip_score", "references") if suffix else None, formula="100 * mean(cos), unclamped", **recipe,
        )  # fmt: skip
