"""Metrics with intervals, differences in pairs, and every metric on images whose metrics are known."""

import numpy as np
import pytest
import torch
from PIL import Image

import prepare_shapes
from unified_eval import (
    Clip,
    Extractor,
    Measures,
    SmallSampleWarning,
    compare_measures,
    frechet_distance,
    kernel_distance,
    measure_images,
    wilson_interval,
)
from unified_eval.evaluate import DEFAULT_METRICS
from unified_eval.intervals import bootstrap_interval, interval_around, resample

WORDS = ["red", "green", "blue"]
pytestmark = pytest.mark.filterwarnings("ignore::unified_eval.measures.SmallSampleWarning")


def flat(red, green, blue):
    return Image.new("RGB", (32, 32), (red, green, blue))


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class Colours(torch.nn.Module):
    """A stand-in CLIP: the mean colour of an image, the primary colour of a word."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.visual = torch.nn.Module()
        self.visual.preprocess_cfg = {"size": 4}

    def encode_image(self, batch):
        return batch.mean((2, 3))

    def encode_text(self, tokens):
        return torch.eye(3)[tokens[:, 0] - 1]


class Tokenizer:
    context_length = 2

    def __call__(self, texts, context_length=2):
        texts = [texts] if isinstance(texts, str) else texts
        ids = [["", *WORDS].index(text.removeprefix("A photo depicts ")) for text in texts]
        return torch.tensor([[number] + [0] * (context_length - 1) for number in ids])


CLIP = Clip(Colours(), pixels, Tokenizer(), "colours")
EXTRACTOR = Extractor("mean", "FD-Mean", 3, "00", "none", "x / 255",
                      lambda images: torch.stack([pixels(image).mean((1, 2)) for image in images]))  # fmt: skip
REAL = [flat(255, 0, 0), flat(0, 255, 0), flat(0, 0, 255)]


def measure(generated, **settings):
    settings = {"real": REAL, "reconstructed": REAL, "captions": WORDS, **settings}
    return measure_images(generated=generated, clip=CLIP, extractor=EXTRACTOR, **settings)


def test_several_images_a_caption():
    """Scores take all images and generate whole prompts; distances take the first of each caption."""
    generated = [flat(255, 0, 0), flat(0, 255, 0), flat(0, 255, 0), flat(0, 255, 0), flat(0, 0, 255), flat(255, 0, 0)]
    measures = measure(generated, metrics=["fd", "clip", "clip_definitions", "diversity"])
    figures = measures.figures
    own = [100, 0, 100, 100, 100, 0]
    assert figures["clip_score"] == pytest.approx(np.mean(own))
    assert figures["r1_generated"] == pytest.approx(4 / 6)
    assert figures["clip_score_shuffled"] == pytest.approx(100 * np.mean([0, 0.5, 0, 0, 0, 0.5]))
    assert measures.intervals["clip_score"] == pytest.approx(
        bootstrap_interval(np.array(own, float), ["red", "red", "green", "green", "blue", "blue"]), abs=1e-9
    )
    assert figures["fd_mean"] == pytest.approx(0, abs=1e-12), "the first of each caption are the real ones"
    assert figures["diversity"] == pytest.approx(np.mean([1, 0, 1]))
    assert figures["clip_cosine"] == pytest.approx(4 / 6)
    assert figures["clip_score_hessel"] == pytest.approx(2.5 * 4 / 6)
    assert figures["clip_score_clamped"] == pytest.approx(100 * 4 / 6)
    assert measures.intervals["r1_real"] == wilson_interval(3, 3)


def test_distances_have_intervals_around_them():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 4)), rng.normal(size=(30, 4)) + 0.5
    measures = Measures([str(i) for i in range(30)], resamples=50, seed=4)
    measures.add_distance("fd", frechet_distance, a, b, "fd")
    draws = [frechet_distance(a[rows], b[rows]) for rows in resample(range(30), 50, 4)]
    assert measures.intervals["fd"] == interval_around(frechet_distance(a, b), draws)
    low, high = measures.intervals["fd"]
    assert (low + high) / 2 == pytest.approx(measures.figures["fd"]) and low < high
    assert np.mean(draws) > measures.figures["fd"], "repeated rows move the distance upwards"
    without = Measures(measures.prompts, resamples=0)
    without.add_distance("fd", frechet_distance, a, b, "fd")
    assert without.intervals == {}


def test_cmmd_fidelity_and_neighbours():
    rng = np.random.default_rng(1)
    real = [flat(*colour) for colour in rng.integers(0, 256, (8, 3)).tolist()]
    generated = [*real[:6], flat(255, 255, 255), flat(0, 0, 0)]
    rebuilt = [Image.eval(image, lambda value: value // 2 + 60) for image in real]
    names = [str(number) for number in range(8)]
    model = Clip(Colours(), pixels, type("Eight", (), {
        "context_length": 2,
        "__call__": lambda self, texts, context_length=2: torch.tensor(
            [[int(text or -1) + 1] + [0] * (context_length - 1) for text in ([texts] if isinstance(texts, str) else texts)]
        ),
    })(), "eight")  # fmt: skip
    model.model.encode_text = lambda tokens: torch.eye(8, 3)[tokens[:, 0] - 1] + 0.1
    generated[7] = flat(1, 2, 3)
    measures = measure_images(
        real, rebuilt, generated, names, model, EXTRACTOR, metrics=["prdc", "cmmd", "neighbours"],
        training=[*real, flat(10, 200, 30)], resamples=5,
    )  # fmt: skip
    figures = measures.figures
    rows = {kind: np.array([np.asarray(i)[0, 0] / 255 for i in part])
            for kind, part in (("real", real), ("generated", generated), ("rebuilt", rebuilt))}  # fmt: skip
    inside = [np.linalg.norm(rows["real"] - row, axis=1) <= [
        np.sort(np.linalg.norm(rows["real"] - r, axis=1))[5] for r in rows["real"]] for row in rows["generated"]]  # fmt: skip
    assert figures["precision"] == pytest.approx(np.any(inside, 1).mean())
    assert figures["coverage"] == pytest.approx(np.any(inside, 0).mean())
    assert figures["density"] == pytest.approx(np.sum(inside) / 5 / 8)

    def unit(part):
        return rows[part] / np.linalg.norm(rows[part], axis=1, keepdims=True)

    from unified_eval import cmmd

    assert figures["cmmd"] == pytest.approx(cmmd(unit("generated"), unit("real")), rel=1e-4)
    training = np.concatenate([rows["real"], [[10 / 255, 200 / 255, 30 / 255]]])
    training /= np.linalg.norm(training, axis=1, keepdims=True)
    nearest = (1 - unit("generated") @ training.T).min(1)
    cosines = training @ training.T
    np.fill_diagonal(cosines, -1)
    apart = 1 - cosines.max(1)
    assert figures["neighbour_distance"] == pytest.approx(nearest.mean(), abs=1e-6)
    assert figures["neighbour_distance_training"] == pytest.approx(apart.mean(), abs=1e-6)
    assert figures["neighbour_copies"] == (nearest < np.quantile(apart, 0.05)).mean() >= 6 / 8


def test_shapes_with_ceilings():
    def circle(colour):
        thing = prepare_shapes.Thing("medium", colour, "circle", 0.5, 0.5, 0.165)
        return prepare_shapes.draw(prepare_shapes.Scene("colors", "white", (thing,), True, False), 32)

    real = [circle(word) for word in WORDS]
    generated = [circle("red"), circle("red"), circle("blue")]
    claims = [[{"class": "circle", "count": 1, "color": word}] for word in WORDS]
    measures = measure(
        generated, real=real, reconstructed=[real[0], real[1], flat(0, 0, 255)], metrics=["shapes"], claims=claims,
        tags=["colors", "colors", "other"],
    )  # fmt: skip
    figures = measures.figures
    assert figures["shapes_correct"] == 2 / 3 and figures["shapes_task_colors"] == 0.5
    assert (figures["shapes_correct_real"], figures["shapes_correct_reconstructions"]) == (1, 2 / 3)
    assert measures.recipes.keys() == figures.keys()
    better = measure(real, real=real, reconstructed=[real[0], real[1], flat(0, 0, 255)], metrics=["shapes"], claims=claims,
                     tags=["colors", "colors", "other"])  # fmt: skip
    rows = {row["figure"]: row for row in compare_measures(measures, better)}
    assert rows["shapes_correct"]["difference"] == pytest.approx(1 / 3)
    assert rows["shapes_correct"]["interval"] == bootstrap_interval([0, 1, 0], WORDS)


def test_differences_are_in_pairs():
    """Two systems that differ by a constant on prompts of unlike difficulty: the paired interval is exact."""
    prompts = [str(number) for number in range(40)]
    rng = np.random.default_rng(2)
    difficulty, real = rng.normal(0, 10, 40), rng.normal(size=(40, 3))
    systems = []
    for shift in (0.0, 1.0):
        measures = Measures(prompts, resamples=40, seed=3)
        measures.add_mean("score", difficulty + shift, "score")
        measures.add_mean("score_real", difficulty, "score, real")
        measures.add_distance("kd", kernel_distance, real + 0.1 + shift, real, "kd")
        systems.append(measures)
    score, kernel = compare_measures(*systems)
    assert score["difference"] == pytest.approx(1) and score["interval"] == pytest.approx((1, 1))
    assert systems[0].intervals["score"][1] - systems[0].intervals["score"][0] > 4
    both = [
        np.array([kernel_distance(real[i] + 0.1 + shift, real[i]) for i in resample(range(40), 40, 3)])
        for shift in (0.0, 1.0)
    ]
    assert kernel["interval"] == pytest.approx(interval_around(kernel["difference"], both[1] - both[0]))
    systems[1].recipes["kd"]["n"] = 41
    with pytest.raises(ValueError, match="kd: the recipes differ"):
        compare_measures(*systems)
    with pytest.raises(ValueError, match="first, second: prompts, seed or resamples differ"):
        compare_measures(systems[0], Measures(prompts, resamples=40, seed=9))


def test_few_images_are_a_warning_that_says_what_to_use():
    with pytest.warns(
        SmallSampleWarning, match="frechet: 3 images, where published metrics have 10,000 or more; report"
    ):
        measures = measure(REAL)
    assert measures.result()["notes"] == measures.notes and measures.notes[0].startswith("frechet: 3 images")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ["fid"]}, "metrics: 'fid' is unknown; use some of"),
        ({"metrics": ["shapes"]}, "metrics: 'shapes' needs claims"),
        ({"metrics": ["neighbours"]}, "metrics: 'neighbours' needs training"),
        ({"metrics": ["is"]}, "metrics: 'is' needs logits_extractor"),
        ({"metrics": ["prdc"]}, "k: 5 of 3 real and 3 fake rows; give 1 or more, and more images than k"),
        ({"metrics": ["diversity"]}, "has a single image; diversity needs 2 or more"),
        ({"generated": [*REAL[:2], REAL[2].resize((16, 16))]}, "generated: number 2 is 16x16, the first real image is 32x32"),
        ({"generated": REAL[:2]}, "generated: 2 images for 3 captions"),
        ({"captions": ["red", "green", "Red "]}, r"captions: number 2 repeats number 0 \('Red '\)"),
    ],
)  # fmt: skip
def test_bad_input_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        measure(**{"generated": REAL, "metrics": DEFAULT_METRICS, **settings})


def test_inception_score_of_generated_and_real_images():
    sharp = Extractor("logits", "IS", 3, "00", "none", "none", lambda images: 50 * EXTRACTOR.network(images))
    measures = measure([REAL[0]] * 3, metrics=["is"], logits_extractor=sharp, seed=1)
    assert measures.recipes["inception_score"]["splits"] == 1
    # Sure of one class each: as many as there are classes; all of one class: 1.
    assert measures.figures["inception_score_real"] == pytest.approx(3, rel=1e-6)
    assert measures.figures["inception_score"] == pytest.approx(1, rel=1e-6)
    assert any(note.startswith("inception score: 3 images") for note in measures.notes)
