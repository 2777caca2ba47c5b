"""Results with intervals, differences in pairs, and every metric on images whose values are known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import prepare_shapes
from unified_eval import (
    DEFAULT_METRICS,
    METRICS,
    Clip,
    Extractor,
    Inputs,
    Results,
    SmallSampleWarning,
    compare_results,
    frechet_distance,
    kernel_distance,
    measure_images,
    wilson_interval,
)
from unified_eval.evaluation_report import floors_and_ceilings
from unified_eval.features import UNKNOWN_SCORE
from unified_eval.intervals import bootstrap_interval, interval_around, resample
from unified_eval.metrics import describe_metrics
from unified_eval.results import Bound

ROOT = Path(__file__).resolve().parent.parent

WORDS = ["red", "green", "blue"]
pytestmark = pytest.mark.filterwarnings("ignore::unified_eval.results.SmallSampleWarning")


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


def measure(generated, metrics=DEFAULT_METRICS, resamples=200, seed=0, **inputs):
    inputs = {"real": REAL, "reconstructed": REAL, "captions": WORDS, "clip": CLIP, "extractor": EXTRACTOR, **inputs}
    return measure_images(Inputs(generated=generated, **inputs), metrics, resamples=resamples, seed=seed)


def test_several_images_a_caption():
    """Scores take all images and resample whole prompts; distances take the first of each caption."""
    generated = [flat(255, 0, 0), flat(0, 255, 0), flat(0, 255, 0), flat(0, 255, 0), flat(0, 0, 255), flat(255, 0, 0)]
    results = measure(generated, metrics=["fd", "clip", "clip_definitions", "diversity"])
    metrics = results.metrics
    own = [100, 0, 100, 100, 100, 0]
    assert metrics["clip_score"] == pytest.approx(np.mean(own))
    assert metrics["r1_generated"] == pytest.approx(4 / 6)
    assert metrics["clip_score_shuffled"] == pytest.approx(100 * np.mean([0, 0.5, 0, 0, 0, 0.5]))
    assert results.intervals["clip_score"] == pytest.approx(
        bootstrap_interval(np.array(own, float), ["red", "red", "green", "green", "blue", "blue"]), abs=1e-9
    )
    assert metrics["fd_mean"] == pytest.approx(0, abs=1e-12), "the first of each caption are the real ones"
    assert metrics["diversity"] == pytest.approx(np.mean([1, 0, 1]))
    assert metrics["clip_cosine"] == pytest.approx(4 / 6)
    assert metrics["clip_score_hessel"] == pytest.approx(2.5 * 4 / 6)
    assert metrics["clip_score_clamped"] == pytest.approx(100 * 4 / 6)
    assert results.intervals["r1_real"] == wilson_interval(3, 3)


def test_distances_have_intervals_around_them():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 4)), rng.normal(size=(30, 4)) + 0.5
    results = Results([str(i) for i in range(30)], resamples=50, seed=4)
    results.add_distance("fd", frechet_distance, a, b, "fd")
    resampled = [frechet_distance(a[rows], b[rows]) for rows in resample(range(30), 50, 4)]
    assert results.intervals["fd"] == interval_around(frechet_distance(a, b), resampled)
    low, high = results.intervals["fd"]
    assert (low + high) / 2 == pytest.approx(results.metrics["fd"]) and low < high
    assert np.mean(resampled) > results.metrics["fd"], "repeated rows move the distance upwards"
    without = Results(results.prompts, resamples=0)
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
    training = [*real, flat(10, 200, 30)]
    inputs = Inputs(names, real, rebuilt, generated, EXTRACTOR, model, training=iter(training))
    metrics = measure_images(inputs, ["prdc", "cmmd", "neighbours"], resamples=5).metrics
    rows = {kind: np.array([np.asarray(i)[0, 0] / 255 for i in part])
            for kind, part in (("real", real), ("generated", generated), ("rebuilt", rebuilt))}  # fmt: skip
    inside = [np.linalg.norm(rows["real"] - row, axis=1) <= [
        np.sort(np.linalg.norm(rows["real"] - r, axis=1))[5] for r in rows["real"]] for row in rows["generated"]]  # fmt: skip
    assert metrics["precision"] == pytest.approx(np.any(inside, 1).mean())
    assert metrics["coverage"] == pytest.approx(np.any(inside, 0).mean())
    assert metrics["density"] == pytest.approx(np.sum(inside) / 5 / 8)

    def unit(part):
        return rows[part] / np.linalg.norm(rows[part], axis=1, keepdims=True)

    from unified_eval import cmmd

    assert metrics["cmmd"] == pytest.approx(cmmd(unit("generated"), unit("real")), rel=1e-4)
    training = np.concatenate([rows["real"], [[10 / 255, 200 / 255, 30 / 255]]])
    training /= np.linalg.norm(training, axis=1, keepdims=True)
    nearest = (1 - unit("generated") @ training.T).min(1)
    cosines = training @ training.T
    np.fill_diagonal(cosines, -1)
    apart = 1 - cosines.max(1)
    assert metrics["neighbour_distance"] == pytest.approx(nearest.mean(), abs=1e-6)
    assert metrics["neighbour_distance_training"] == pytest.approx(apart.mean(), abs=1e-6)
    assert metrics["neighbour_copies"] == (nearest < np.quantile(apart, 0.05)).mean() >= 6 / 8


def test_shapes_with_ceilings():
    def circle(colour):
        thing = prepare_shapes.Thing("medium", colour, "circle", 0.5, 0.5, 0.165)
        return prepare_shapes.draw(prepare_shapes.Scene("colors", "white", (thing,), True, False), 32)

    real = [circle(word) for word in WORDS]
    generated = [circle("red"), circle("red"), circle("blue")]
    claims = [[{"class": "circle", "count": 1, "color": word}] for word in WORDS]
    given = {"real": real, "reconstructed": [real[0], real[1], flat(0, 0, 255)], "claims": claims,
             "tags": ["colors", "colors", "other"]}  # fmt: skip
    results = measure(generated, ["shapes"], **given)
    metrics = results.metrics
    assert metrics["shapes_correct"] == 2 / 3 and metrics["shapes_task_colors"] == 0.5
    assert (metrics["shapes_correct_real"], metrics["shapes_correct_reconstructions"]) == (1, 2 / 3)
    assert results.recipes.keys() == metrics.keys()
    rows = {row["metric"]: row for row in compare_results(results, measure(real, ["shapes"], **given))}
    assert rows["shapes_correct"]["difference"] == pytest.approx(1 / 3)
    assert "shapes_correct_real" not in rows and rows["shapes_correct_reconstructions"]["difference"] == 0
    assert rows["shapes_correct"]["interval"] == bootstrap_interval([0, 1, 0], WORDS)


def test_differences_are_in_pairs():
    """Two systems that differ by a constant on prompts of unlike difficulty: the paired interval is exact."""
    prompts = [str(number) for number in range(40)]
    rng = np.random.default_rng(2)
    difficulty, real = rng.normal(0, 10, 40), rng.normal(size=(40, 3))
    systems = []
    for shift in (0.0, 1.0):
        results = Results(prompts, resamples=40, seed=3)
        results.add_mean("score", difficulty + shift, "score")
        results.add_mean("difficulty", difficulty, "score of given images", given=True)
        results.add_distance("kd_real", kernel_distance, real + 0.1 + shift, real, "its name does not matter")
        systems.append(results)
    score, kernel = compare_results(*systems)
    assert (score["metric"], kernel["metric"]) == ("score", "kd_real")
    assert score["difference"] == pytest.approx(1) and score["interval"] == pytest.approx((1, 1))
    assert systems[0].intervals["score"][1] - systems[0].intervals["score"][0] > 4
    both = [
        np.array([kernel_distance(real[i] + 0.1 + shift, real[i]) for i in resample(range(40), 40, 3)])
        for shift in (0.0, 1.0)
    ]
    assert kernel["interval"] == pytest.approx(interval_around(kernel["difference"], both[1] - both[0]))
    systems[1].recipes["kd_real"]["n"] = 41
    with pytest.raises(ValueError, match="kd_real: the recipes differ"):
        compare_results(*systems)
    with pytest.raises(ValueError, match="first, second: prompts, seed or resamples differ"):
        compare_results(systems[0], Results(prompts, resamples=40, seed=9))


def test_few_images_are_a_warning_that_says_what_to_use():
    with pytest.warns(
        SmallSampleWarning, match="frechet: 3 images, where published metrics have 10,000 or more; report"
    ):
        results = measure(REAL)
    assert results.result()["notes"] == results.notes and results.notes[0].startswith("frechet: 3 images")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ["fid"]}, "metrics: 'fid' is unknown; use some of"),
        ({"metrics": ["shapes"]}, "metrics: 'shapes' needs claims"),
        ({"metrics": ["neighbours"]}, "metrics: 'neighbours' needs training"),
        ({"metrics": ["is"]}, "metrics: 'is' needs logits_extractor"),
        ({"clip": None}, "metrics: 'clip' needs clip; give it or leave the metric out"),
        ({"extractor": None, "metrics": ["fd"]}, "metrics: 'fd' needs extractor"),
        ({"metrics": ["prdc"]}, "metrics: 'prdc' needs 6 or more captions, got 3"),
        ({"metrics": ["diversity"]}, "metrics: 'diversity' needs samples_per_caption of 2 or more"),
        ({"generated": [*REAL[:2], REAL[2].resize((16, 16))]}, "generated: number 2 is 16x16, the first real image is 32x32"),
        ({"generated": REAL[:2]}, "generated: 2 images for 3 captions"),
        ({"captions": ["red", "green", "Red "]}, r"captions: number 2 repeats number 0 \('Red '\)"),
    ],
)  # fmt: skip
def test_bad_input_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        measure(**{"generated": REAL, **settings})


def test_inception_score_of_generated_and_real_images():
    sharp = Extractor("logits", "IS", 3, "00", "none", "none", lambda images: 50 * EXTRACTOR.network(images))
    results = measure([REAL[0]] * 3, metrics=["is"], logits_extractor=sharp, seed=1)
    assert results.recipes["inception_score"]["splits"] == 1
    # Sure of one class each: as many as there are classes; all of one class: 1.
    assert results.metrics["inception_score_real"] == pytest.approx(3, rel=1e-6)
    assert results.metrics["inception_score"] == pytest.approx(1, rel=1e-6)
    assert any(note.startswith("inception score: 3 images") for note in results.notes)
    other = measure([REAL[0]] * 3, metrics=["is"], logits_extractor=replace(sharp, metric=UNKNOWN_SCORE), seed=1)
    assert list(other.metrics) == ["exp_kl_classes", "exp_kl_classes_real"] and "SHA-256 00" in other.notes[0]


@pytest.mark.process
def test_captions_that_the_clip_cannot_read_are_left_out_with_a_note():
    """The scores are those of the other captions; distances are of all images."""

    class Short(Tokenizer):
        """It reads one word: of more, ids stand where there is padding else."""

        def __call__(self, texts, context_length=2):
            rows = super().__call__([text.split()[0] if text else "" for text in ([texts] if isinstance(texts, str) else texts)],
                                    context_length)  # fmt: skip
            for row, text in zip(rows, [texts] if isinstance(texts, str) else texts, strict=True):
                row[1 : len(text.split())] = 9
            return rows

    clip = CLIP._replace(tokenizer=Short())
    generated = [REAL[0], REAL[1], flat(255, 255, 0), flat(0, 255, 0), REAL[2], REAL[0]]
    captions = ["red", "green and much more", "blue"]
    results = measure(generated, ["fd", "clip"], captions=captions, clip=clip)
    others = [REAL[0], REAL[1], REAL[2], REAL[0]]
    expected = measure(others, ["clip"], captions=["red", "blue"], real=REAL[::2], reconstructed=REAL[::2], clip=clip)
    assert results.metrics["clip_score"] == 50 and results.metrics["r1_generated"] == 0.5
    assert expected.metrics == {name: results.metrics[name] for name in expected.metrics}
    assert expected.intervals == {name: results.intervals[name] for name in expected.intervals}
    assert results.recipes["r1_generated"]["chance"] == 1 / 2
    assert (
        results.recipes["fd_mean"]["n"] == 3
        and results.metrics["fd_mean"] == measure(generated, ["fd"]).metrics["fd_mean"]
    )
    assert results.notes[1:] == [
        "clip: 1 of 3 captions exceed the 2 tokens that colours reads and are left out of its scores; the first: "
        "'green and much more'."
    ]
    one = measure(generated, ["fd", "clip"], captions=["red", "green and more", "blue and more"], clip=clip)
    assert "fd_mean" in one.metrics and "clip_score" not in one.metrics and one.notes[1].startswith("clip: 2 of 3")


def test_distances_need_no_clip():
    assert measure(REAL, ["fd", "kd"], clip=None).metrics == measure(REAL, ["fd", "kd"]).metrics


def test_a_new_metric_is_a_class_and_a_line(monkeypatch):
    class Redness:
        """Mean red of generated images; ceiling: real ones."""

        needs, least, default = ("extractor",), 2, False

        def add(self, inputs, results):
            results.add_mean("red", inputs.features("generated")[:, 0], "red", inputs.prompts)
            results.add_mean("their_red", inputs.features("real")[:, 0], "red", given=True, bound=Bound("red", "given"))

    monkeypatch.setitem(METRICS, "redness", Redness())
    first, second = measure(REAL, ["redness"]), measure([REAL[0]] * 3, ["redness"])
    assert first.metrics == {"red": pytest.approx(1 / 3), "their_red": pytest.approx(1 / 3)}
    assert [row["metric"] for row in compare_results(first, second)] == ["red"]
    assert floors_and_ceilings(second) == [{"metric": "red", "generated": "1.000", "given": "0.333"}]
    assert "  redness           Mean red of generated images; ceiling: real ones." in describe_metrics().splitlines()
    with pytest.raises(ValueError, match="metrics: 'redness' needs extractor"):
        measure(REAL, ["redness"], extractor=None)


def test_features_are_computed_once_and_on_demand():
    seen = []

    def network(images):
        seen.append([image.getpixel((0, 0)) for image in images])
        return EXTRACTOR.network(images)

    inputs = Inputs(WORDS, REAL, REAL[::-1], [*REAL, *REAL], Extractor("seen", "FD", 3, "00", "", "", network))
    assert inputs.owners == [0, 0, 1, 1, 2, 2] and inputs.prompts[2] == "green" and seen == []
    assert np.array_equal(inputs.one_each("generated"), inputs.features("generated")[[0, 2, 4]]) and len(seen) == 1
    inputs.features("reconstructed")
    assert seen[1:] == [[(0, 0, 255), (0, 255, 0), (255, 0, 0)]]


def test_every_metric_is_explained():
    readme = (ROOT / "eval" / "README.md").read_text(encoding="utf-8")
    for name, metric in METRICS.items():
        assert f"| `{name}` | " in readme, f"eval/README.md lacks {name}"
        assert type(metric).__doc__.splitlines()[0].endswith("."), name
    assert DEFAULT_METRICS == ("fd", "kd", "clip")
