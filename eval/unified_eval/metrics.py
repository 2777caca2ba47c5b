"""The metrics of a text-to-image model, each with its floor, its ceiling and the recipe that decides its value.

To add one, write a class of the protocol :class:`Metric` and add a line to the table below; in your own file, register
it with ``unified.register(name, metric=...)``.
"""

from collections.abc import Container, Iterator, Sequence
from typing import ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from unified import registry
from unified_eval.clip import Clip, caption_rows, clip_text_features, left_out_note, readable_captions
from unified_eval.diversity import inception_score, membership, nearest_neighbours, prompt_diversity
from unified_eval.features import Extractor
from unified_eval.frechet import cmmd, frechet_distance, kernel_distance
from unified_eval.inputs import ImageSet, Inputs, Need
from unified_eval.results import Bound, Results
from unified_eval.shapes import add_records, scene_records

REAL, OTHER_REAL, RECONSTRUCTED = "real images", "other real images", "through the tokenizer"
SAME_CAPTIONS = "real images of the same captions"
GENERATED_AND_RECONSTRUCTED: tuple[tuple[ImageSet, str], ...] = (
    ("generated", ""),
    ("reconstructed", "_reconstructions"),
)


class Metric(Protocol):
    """A metric, or several that are computed together. The first line of a class's docstring is its help text.

    Attributes:
        needs: the optional parts of :class:`Inputs` that it needs.
        least: how many captions it needs.
        default: whether it is measured when no metrics are named.
    """

    needs: ClassVar[tuple[Need, ...]]
    least: ClassVar[int] = 2
    default: ClassVar[bool] = False

    def add(self, inputs: Inputs, results: Results) -> None:
        """Compute the values and add them, each with its recipe and with how it compares between two systems."""
        ...


class FrechetDistance(Metric):
    """Frechet distance of generated to real images (FID with Inception features).

    ``fd_efflite0`` with such an extractor; ``_reconstructions`` to real: the loss of the tokenizer alone; ``_real_halves``:
    a random half of the real images to the other, at N/2 (given 4 or more); ``_real_other``: other real images to the real
    ones, at N.
    """

    needs = ("extractor",)
    default = True

    def add(self, inputs: Inputs, results: Results) -> None:
        """See :class:`Metric`."""
        extractor: Extractor = inputs.require("extractor")
        name, key, real = extractor.metric, extractor.key, inputs.features("real")
        if extractor.note:
            results.note(extractor.note)
        results.note_if_few(
            "frechet", len(real), 10_000, "report the kernel distance, which has no bias, or sample more"
        )
        results.add_distance(
            key, frechet_distance, inputs.one_each("generated"), real, f"{name}, generated to real",
            reference=SAME_CAPTIONS, **inputs.recipe,
        )  # fmt: skip
        results.add_distance(
            f"{key}_reconstructions", frechet_distance, inputs.features("reconstructed"), real,
            f"{name}, reconstructions to real", bound=Bound(key, RECONSTRUCTED), reference="the originals", **inputs.recipe,
        )  # fmt: skip
        if inputs.other_real is not None:
            results.add_distance(
                f"{key}_real_other", frechet_distance, inputs.features("other_real"), real,
                f"{name}, other real to real", given=True, bound=Bound(key, OTHER_REAL),
                reference="real images of other captions", **inputs.recipe,
            )  # fmt: skip
        if len(real) >= 4:
            order, half = np.random.default_rng(results.seed).permutation(len(real)), len(real) // 2
            number = frechet_distance(real[order[:half]], real[order[half : 2 * half]])
            results.add(
                f"{key}_real_halves", number, f"{name}, half of real to the other half", given=True,
                bound=Bound(key, "half of real to the other half"), n=half, n_reference=half, **inputs.recipe,
                reference="the other half", seed=results.seed,
            )  # fmt: skip


class KernelDistance(Metric):
    """Kernel distance x 1000 of generated to real images, without bias (KID with Inception features).

    ``kd_efflite0_x1000`` with such an extractor.
    """

    needs = ("extractor",)
    default = True

    def add(self, inputs: Inputs, results: Results) -> None:
        """See :class:`Metric`."""
        extractor: Extractor = inputs.require("extractor")
        is_fid = extractor.key == "fid"
        key = "kid" if is_fid else extractor.key.replace("fd_", "kd_", 1)
        name = "KID" if is_fid else extractor.metric.replace("FD-", "KD-", 1)
        results.add_distance(
            f"{key}_x1000", lambda a, b: 1000 * kernel_distance(a, b), inputs.one_each("generated"),
            inputs.features("real"), f"{name} x 1000, generated to real", **inputs.recipe, reference=SAME_CAPTIONS,
            kernel="(x.y / D + 1)^3, unbiased, no subsets",
        )  # fmt: skip


class Neighbourhoods(Metric):
    """Precision, recall, density and coverage of generated among real images.

    ``precision``, ``recall``, ``density``, ``coverage``, and each with ``_reconstructions``.
    """

    needs = ("extractor",)
    k: ClassVar[int] = 5  # the neighbour that bounds a ball
    least = k + 1

    def add(self, inputs: Inputs, results: Results) -> None:
        """See :class:`Metric`."""
        extractor: Extractor = inputs.require("extractor")
        real = inputs.features("real")
        results.note_if_few("neighbourhoods", len(real), 1_000, "compare at equal N only, or sample more")
        for kind, suffix in GENERATED_AND_RECONSTRUCTED:
            for name, values in membership(real, inputs.one_each(kind), self.k)._asdict().items():
                results.add_mean(
                    f"{name}{suffix}", values, f"{name} ({extractor.name}, k = {self.k}), {suffix.strip('_') or kind}",
                    bound=Bound(name, RECONSTRUCTED) if suffix else None, k=self.k, **inputs.recipe,
                    reference=SAME_CAPTIONS,
                )  # fmt: skip


class ClipScore(Metric):
    """CLIP score, 100 x mean cosine with the own caption, and R@1, the share of images nearest to it.

    ``clip_score``, ``_real``, ``_reconstructions``; ``_shuffled``: of generated images with all other captions; ``_gap``:
    the difference. ``r1_generated``, ``r1_real``, ``r1_reconstructions``: among all captions.
    """

    needs = ("clip",)
    default = True

    def add(self, inputs: Inputs, results: Results) -> None:
        """See :class:`Metric`."""
        clip, base = inputs.require("clip"), inputs.clip_recipe
        for kind, rows, prompts in _caption_rows(inputs, results, ("generated", "real", "reconstructed")):
            name, among = f"CLIP score ({clip.name})", len(set(prompts))
            shown = "reconstructions" if kind == "reconstructed" else kind
            suffix, given = "" if kind == "generated" else f"_{shown}", kind == "real"
            title = {"generated": None, "real": REAL, "reconstructed": RECONSTRUCTED}[kind]
            results.add_mean(
                f"clip_score{suffix}", 100 * rows["own"], f"{name}, {shown}", prompts, given=given,
                bound=Bound("clip_score", title) if title else None, formula="100 * mean(cos), unclamped", **base,
            )  # fmt: skip
            results.add_mean(
                f"r1_{shown}", rows["hit"], f"R@1 among {among} captions ({clip.name}), {shown}", prompts, given=given,
                bound=Bound("r1_generated", title) if title else None, chance=1 / among, **base,
            )  # fmt: skip
            if kind == "generated":
                results.add_mean(
                    "clip_score_shuffled", 100 * rows["others"], f"{name}, generated, other captions", prompts,
                    bound=Bound("clip_score", "other captions (floor)"),
                    formula="100 * mean(cos) over all mismatched pairs", **base,
                )  # fmt: skip
                results.add_mean(
                    "clip_score_gap", 100 * (rows["own"] - rows["others"]), f"{name}, own less other captions", prompts,
                    formula="clip_score - clip_score_shuffled", **base,
                )  # fmt: skip


class ClipScoreDefinitions(Metric):
    """CLIP score of generated images as others define it: torchmetrics, Hessel et al., a plain cosine.

    ``clip_score_clamped`` (torchmetrics), ``clip_score_hessel``, ``clip_cosine``.
    """

    needs = ("clip",)

    def add(self, inputs: Inputs, results: Results) -> None:
        """See :class:`Metric`."""
        name, base = f"CLIP score ({inputs.require('clip').name})", inputs.clip_recipe
        for _, rows, prompts in _caption_rows(inputs, results, ("generated",)):
            formula = "mean(cos)"
            results.add_mean("clip_cosine", rows["own"], f"{name} as {formula}", prompts, formula=formula, **base)
            formula = "max(100 * mean(cos), 0)"
            results.add(
                "clip_score_clamped", max(100 * rows["own"].mean(), 0.0), f"{name} as {formula}", n=len(prompts),
                formula=formula, **base,
            )  # fmt: skip
        for _, rows, prompts in _caption_rows(inputs, results, ("generated",), prefix="A photo depicts "):
            formula = "2.5 * mean(max(cos, 0)), prefix 'A photo depicts'"
            results.add_mean(
                "clip_score_hessel", 2.5 * rows["own"].clip(0), f"{name} as {formula}", prompts, formula=formula, **base
            )


class Cmmd(Metric):
    """CLIP maximum mean discrepancy of generated to real images (CMMD with CLIP ViT-L/14 at 336 pixels).

    ``cmmd``, and ``cmmd_reconstructions``.
    """

    needs = ("clip",)

    def add(self, inputs: Inputs, results: Results) -> None:
        """See :class:`Metric`."""

        def unit(kind: ImageSet) -> np.ndarray:
            rows = torch.from_numpy(inputs.one_each(kind, inputs.clip_extractor))
            return F.normalize(rows, dim=1).numpy()

        for kind, suffix in GENERATED_AND_RECONSTRUCTED:
            results.add_distance(
                f"cmmd{suffix}", cmmd, unit(kind), unit("real"),
                f"CMMD ({inputs.clip_extractor.name}), {suffix.strip('_') or kind} to real",
                bound=Bound("cmmd", RECONSTRUCTED) if suffix else None, kernel="Gaussian, sigma 10, x 1000",
                reference=SAME_CAPTIONS, **inputs.clip_recipe,
            )  # fmt: skip


class InceptionScore(Metric):
    """Inception Score of generated images, which looks at no reference.

    ``inception_score``, and ``inception_score_real``; ``exp_kl_classes`` of other weights than the known ones.
    """

    needs = ("logits_extractor",)

    def add(self, inputs: Inputs, results: Results) -> None:
        """See :class:`Metric`."""
        network: Extractor = inputs.require("logits_extractor")
        name = "Inception Score" if network.metric == "IS" else "exp KL of class scores of unknown weights"
        key = "inception_score" if network.metric == "IS" else "exp_kl_classes"
        if network.note:
            results.note(network.note)
        results.note_if_few("inception score", len(inputs.generated), 5_000, "sample more, or leave it out")
        kinds: tuple[ImageSet, ...] = ("generated", "real")
        for kind in kinds:
            logits = inputs.features(kind, network)
            splits = 10 if len(logits) >= 1000 else 1  # parts of few images would lack most classes
            score, spread = inception_score(logits, splits, results.seed)
            given = kind == "real"
            results.add(
                f"{key}_real" if given else key, score, f"{name}, {kind}", given=given,
                bound=Bound(key, REAL) if given else None, n=len(logits), splits=splits,
                deviation_over_splits=spread, seed=results.seed, **network.recipe(), **inputs.size,
            )  # fmt: skip


class Diversity(Metric):
    """Mean cosine distance between the images of one caption; needs several of each.

    ``diversity``.
    """

    needs = ("extractor", "samples_per_caption")

    def add(self, inputs: Inputs, results: Results) -> None:
        """See :class:`Metric`."""
        extractor: Extractor = inputs.require("extractor")
        values = prompt_diversity(inputs.features("generated"), inputs.owners)
        label = f"diversity of the {inputs.samples_per_caption} images of a caption ({extractor.name})"
        results.add_mean(
            "diversity",
            np.array(list(values.values())),
            label,
            formula="mean pairwise cosine distance",
            **inputs.recipe,
        )


class TrainingNeighbours(Metric):
    """Distance of generated images to the nearest training image, and the share that is as near as a copy.

    ``neighbour_distance``, and ``_training``, of training images to each other; ``neighbour_copies``: the share that is
    nearer to a training image than 95 % of training images are to another: 0.05 for new images of the same kind, 1 for
    copies.
    """

    needs = ("extractor", "training")
    copies: ClassVar[float] = 0.05  # a copy is as near as this share of training images are to another

    def add(self, inputs: Inputs, results: Results) -> None:
        """See :class:`Metric`."""
        extractor: Extractor = inputs.require("extractor")
        training = inputs.features("training")
        base = {**inputs.recipe, "n_reference": len(training), "reference": "training images",
                "formula": "cosine distance"}  # fmt: skip
        label = f"distance to the nearest training image ({extractor.name})"
        nearest = nearest_neighbours(inputs.features("generated"), training)[1][:, 0]
        results.add_mean("neighbour_distance", nearest, f"{label}, generated", inputs.prompts, **base)
        # Each of some training images finds itself first, and then the nearest other.
        some = training[np.unique(np.linspace(0, len(training) - 1, min(len(training), 2000)).astype(int))]
        apart = nearest_neighbours(some, training, k=2)[1][:, 1]
        results.add(
            "neighbour_distance_training", apart.mean(), f"{label}, of training images to others", given=True,
            bound=Bound("neighbour_distance", "training images"), n=len(some), **base,
        )  # fmt: skip
        near = (nearest < np.quantile(apart, self.copies)).astype(float)
        label = f"nearer to a training image than {1 - self.copies:.0%} of those are to another ({extractor.name})"
        results.add_mean("neighbour_copies", near, label, inputs.prompts, chance=self.copies, **base)


class ShapeClaims(Metric):
    """Share of images of coloured shapes that show exactly what their captions claim, from their pixels.

    The values of :func:`unified_eval.shapes.add_records` of generated images, and the ceilings ``shapes_correct_real`` and
    ``shapes_correct_reconstructions``.
    """

    needs = ("claims",)

    def add(self, inputs: Inputs, results: Results) -> None:
        """See :class:`Metric`."""
        claims, tags = inputs.require("claims"), inputs.tags
        all_claims = [claims[owner] for owner in inputs.owners]
        all_tags = [tags[owner] for owner in inputs.owners] if tags is not None else None
        add_records(results, list(scene_records(inputs.generated, all_claims, all_tags, inputs.prompts)))
        for images, suffix, title in (
            (inputs.real, "_real", REAL), (inputs.reconstructed, "_reconstructions", RECONSTRUCTED),
        ):  # fmt: skip
            correct = np.array([float(record["correct"]) for record in scene_records(images, claims)])
            results.add_mean(
                f"shapes_correct{suffix}", correct, f"images of shapes with every claim true, {suffix.strip('_')}",
                given=title == REAL, bound=Bound("shapes_correct", title), checker="from pixels",
            )  # fmt: skip


_BUILT_IN: dict[str, Metric] = {
    "fd": FrechetDistance(),
    "kd": KernelDistance(),
    "prdc": Neighbourhoods(),
    "clip": ClipScore(),
    "clip_definitions": ClipScoreDefinitions(),
    "cmmd": Cmmd(),
    "is": InceptionScore(),
    "diversity": Diversity(),
    "neighbours": TrainingNeighbours(),
    "shapes": ShapeClaims(),
}
METRICS: dict[str, Metric] = registry.METRICS  # with those that users register
for _name, _metric in _BUILT_IN.items():
    registry.register(_name, metric=_metric)
DEFAULT_METRICS = tuple(name for name, metric in _BUILT_IN.items() if metric.default)


def measure_images(
    inputs: Inputs, metrics: Sequence[str] = DEFAULT_METRICS, *, resamples: int = 200, seed: int = 0
) -> Results:
    """Measure generated images against the real ones of the same captions, at equal N.

    With several images a caption, distances take the first of each and all other metrics take all.

    Args:
        inputs: images, captions and networks.
        metrics: names out of :data:`METRICS`; their classes list the values.
        resamples: how often prompts are resampled for the intervals of distances; 0 for none.
        seed: seed of the intervals, and of the split into halves.

    Raises:
        ValueError: if a metric is unknown or lacks something that it needs.
    """
    check_metrics(metrics, inputs.given(), len(inputs.captions))
    results = Results(inputs.captions, resamples, seed)
    for name, metric in METRICS.items():
        if name in metrics:
            metric.add(inputs, results)
    return results


def check_metrics(metrics: Sequence[str], given: Container[str], captions: int) -> None:
    """Check that metrics can be measured, before anything is generated.

    Args:
        metrics: names of metrics.
        given: names of the optional parts of :class:`Inputs` that there will be.
        captions: number of captions.

    Raises:
        ValueError: if a metric is unknown or lacks something that it needs.
    """
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metrics: {name!r} is unknown; use some of {list(METRICS)}.")
        for need in METRICS[name].needs:
            if need not in given:
                more = " of 2 or more" if need == "samples_per_caption" else ""
                raise ValueError(f"metrics: {name!r} needs {need}{more}; give it or leave the metric out.")
        if captions < METRICS[name].least:
            raise ValueError(
                f"metrics: {name!r} needs {METRICS[name].least} or more captions, got {captions}; use more images or "
                "leave the metric out."
            )


def needs_of(metrics: Sequence[str]) -> set[Need]:
    """The optional parts of :class:`Inputs` that metrics need; unknown ones need nothing."""
    return {need for name in metrics if name in METRICS for need in METRICS[name].needs}


def readable_places(clip: Clip, texts: Sequence[str], results: Results) -> dict[int, int]:
    """The captions that a CLIP reads whole, by their numbers: 0, 1, ... among themselves; a note names the others.

    Empty if fewer than 2 are left.
    """
    readable = readable_captions(clip.tokenizer, texts)
    if len(readable) < len(texts):
        results.note(left_out_note(clip, texts, readable))
    return {number: place for place, number in enumerate(readable)} if len(readable) > 1 else {}


def _caption_rows(
    inputs: Inputs, results: Results, kinds: Sequence[ImageSet], prefix: str = ""
) -> Iterator[tuple[ImageSet, dict[str, np.ndarray], list[str]]]:
    """Yield for each set of images the values of :func:`caption_rows` and the captions of the images.

    Captions longer than the context of the CLIP are left out with a note; nothing is yielded if fewer than 2 are left.
    """
    clip = inputs.require("clip")
    texts = [prefix + caption for caption in inputs.captions]
    place = readable_places(clip, texts, results)
    if not place:
        return
    text_features = clip_text_features(clip, [texts[index] for index in place], inputs.batch_size)
    for kind in kinds:
        owners = inputs.owners if kind == "generated" else list(range(len(texts)))
        rows = [row for row, owner in enumerate(owners) if owner in place]
        vectors = torch.from_numpy(inputs.features(kind, inputs.clip_extractor)[rows])
        values = caption_rows(vectors, text_features, [place[owners[row]] for row in rows])
        yield kind, values, [inputs.captions[owners[row]] for row in rows]


def describe_metrics() -> str:
    """All metrics with the first lines of their docstrings, for help texts."""
    return "\n".join(f"  {name:<17} {(type(metric).__doc__ or '').splitlines()[0]}" for name, metric in METRICS.items())
