"""The protocol of ADM: its formulas against independent references, reference batches of both kinds, a whole run."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refused, run_script
from PIL import Image
from scipy import linalg, spatial

from unified.config import UnifiedConfig
from unified_eval import (
    Extractor,
    frechet_distance,
    frechet_distance_of_moments,
    load_npz,
    load_statistics,
    moments_of,
    npz_shape,
    open_reference,
    precision_and_recall,
    save_npz,
    score_in_runs,
)
from unified_eval import adm as adm_module
from unified_eval.features import INCEPTION_SHA256

WIDTHS = (6, 5, 4)  # of the stand-in network


def features(count, width=8, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=(count, width)) + 0.3 * seed).astype(np.float32)


def test_frechet_distance_of_statistics_is_that_of_scipy():
    a, b = features(60, seed=1), features(50, seed=2, scale=1.5)
    covariances = [np.cov(rows.astype(np.float64), rowvar=False) for rows in (a, b)]
    means = [rows.astype(np.float64).mean(0) for rows in (a, b)]
    root = linalg.sqrtm(covariances[0] @ covariances[1])
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root.real)
    found = [moments_of(rows, block=7) for rows in (a, b)]
    np.testing.assert_allclose(found[1].mean, means[1], rtol=1e-12)
    np.testing.assert_allclose(found[1].covariance, covariances[1], rtol=1e-10)
    assert frechet_distance_of_moments(*found) == pytest.approx(expected, rel=1e-9) and expected > 1
    assert frechet_distance_of_moments(found[0], found[0]) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_singular_covariances():
    """Fewer images than features, where a matrix square root is not reliable: against that of the features."""
    a, b = features(5, 30, seed=1), features(9, 30, seed=2)
    expected = frechet_distance(a, b)
    assert frechet_distance_of_moments(moments_of(a), moments_of(b)) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="b: 8 features, but a has 30"):
        frechet_distance_of_moments(moments_of(a), moments_of(features(5)))
    with pytest.raises(ValueError, match="a: the covariance has the eigenvalue -1"):
        frechet_distance_of_moments(moments_of(a)._replace(covariance=-torch.eye(30)), moments_of(b))
    with pytest.raises(ValueError, match="features: row 3 holds NaN or infinity"):
        moments_of(np.concatenate([a[:3], a[:1] * np.nan]))


def test_score_in_runs():
    """Runs in order, the last of them shorter and as heavy as the others, as ADM cuts them."""
    logits = features(12003, 10, seed=3, scale=2.0)
    chances = np.exp(logits.astype(np.float64))
    chances /= chances.sum(1, keepdims=True)
    scores = []
    for start in (0, 5000, 10000):
        part = chances[start : start + 5000]
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    assert score_in_runs(logits) == pytest.approx(np.mean(scores), rel=1e-9)
    assert score_in_runs(logits[:5001]) == pytest.approx((scores[0] + 1) / 2, rel=1e-9)


def rounded_squares(a, b):
    """Squared distances with every result in half precision, row by row."""
    a, b = a.astype(np.float16), b.astype(np.float16)

    def product(x, y):
        return (x.astype(np.float32) * y.astype(np.float32)).sum(-1, dtype=np.float64).astype(np.float16)

    out = np.empty((len(a), len(b)), np.float16)
    for row, x in enumerate(a):
        out[row] = np.maximum((product(x, x) - np.float16(2) * product(x, b)) + product(b, b), np.float16(0))
    return out


def exact_squares(a, b):
    return spatial.distance.cdist(a, b, "sqeuclidean").astype(np.float32)


def shares(squares, real, generated):
    """Precision and recall by brute force."""
    radius_real = np.sort(squares(real, real), axis=1)[:, 3]  # number 0 is the row itself
    radius_generated = np.sort(squares(generated, generated), axis=1)[:, 3]
    between = squares(real, generated)
    precision = np.mean([(between[:, column] <= radius_real).any() for column in range(len(generated))])
    recall = np.mean([(between[row] <= radius_generated).any() for row in range(len(real))])
    return precision, recall


@pytest.mark.parametrize("half", [True, False])
def test_precision_and_recall_by_brute_force(half):
    real, generated = features(40, seed=1), features(31, seed=2, scale=0.7)
    if not half:
        real, generated = 100 * real, 100 * generated  # squares out of the range of half precision
    precision, recall = shares(rounded_squares if half else exact_squares, real, generated)
    assert 0.1 < recall < precision < 1
    for block in ((2048, 8192), (7, 3), (3, 11)):
        assert precision_and_recall(real, generated, block=block) == (precision, recall, half)
    with pytest.raises(ValueError, match="k: 3 of 40 real and 3 generated rows; give more images than k"):
        precision_and_recall(real, generated[:3])


def test_half_precision_matters_and_is_that_of_adm():
    """Rows far from the origin and close to each other, as Inception's are: rounded distances tie, and ties are inside."""
    noise = np.random.default_rng(1).normal(size=(2, 60, 32)).astype(np.float32)
    real, generated = 8 + 0.3 * noise[0], 8.05 + 0.36 * noise[1]
    rounded, exact = shares(rounded_squares, real, generated), shares(exact_squares, real, generated)
    found = precision_and_recall(real, generated)
    assert found[2] and found[:2] == pytest.approx(rounded, abs=1.01 / 60)
    assert max(abs(a - b) for a, b in zip(rounded, exact, strict=True)) > 3 / 60, (rounded, exact)


def test_reference_batches_of_both_kinds(tmp_path, monkeypatch):
    monkeypatch.setattr("unified_eval.adm.ADM_WIDTHS", (3, 3, 9))
    mu, sigma = np.arange(3.0), np.eye(3)
    images = np.zeros((5, 4, 6, 3), np.uint8)
    np.savez(tmp_path / "images.npz", images, np.arange(5))
    np.savez(tmp_path / "statistics.npz", mu=mu, sigma=sigma, mu_s=mu, sigma_s=2 * sigma)
    np.savez(tmp_path / "both.npz", arr_0=images, mu=mu.astype(np.float32), sigma=sigma)
    assert npz_shape(tmp_path / "images.npz") == (5, 4, 6) and npz_shape(tmp_path / "statistics.npz") is None
    assert (open_reference(tmp_path / "images.npz").images, load_statistics(tmp_path / "images.npz")) == ((5, 4, 6), {})
    statistics = open_reference(tmp_path / "statistics.npz").statistics
    assert list(statistics) == ["mu", "sigma", "mu_s", "sigma_s"] and statistics["sigma_s"][1, 1] == 2
    both = open_reference(tmp_path / "both.npz")
    assert both.images == (5, 4, 6) and list(both.statistics) == ["mu", "sigma"]
    assert both.statistics["mu"].dtype == np.float64

    np.savez(tmp_path / "neither.npz", other=mu)
    np.savez(tmp_path / "half.npz", mu=mu)
    np.savez(tmp_path / "few.npz", images[:3])
    np.savez(tmp_path / "width.npz", mu=mu[:2], sigma=np.eye(2))
    np.savez(tmp_path / "shape.npz", mu=mu, sigma=np.eye(2))
    for name, message in (
        ("neither", "has neither images"), ("half", "has only one of mu and sigma"), ("absent", "is not an .npz file"),
        ("few", "has 3 images; give more than 3"), ("width", "has 2 features, ADM's has 3"),
        ("shape", r"are \(3,\) and \(2, 2\); need \(D,\) and \(D, D\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^reference: .*{message}"):
            open_reference(tmp_path / f"{name}.npz")


class ClassPipeline:
    """A stand-in for a class-conditional pipeline: an image of a class is its colour with a little of its own noise."""

    default_size = (8, 8)
    labels = ("ant", "bee", "cat", "dog")

    def __init__(self):
        self.calls = []
        config = UnifiedConfig()
        self.model = SimpleNamespace(name_or_path="p", config=config)
        self.sampling = {"temperature": 0.9}

    def set_progress_bar_config(self, disable):
        pass

    def to(self, device):
        return self

    def __call__(self, class_labels, generator, **options):
        self.calls.append(list(class_labels))
        self.options = options
        pixels = [
            torch.randint(0, 40, (8, 8, 3), generator=each) + 50 * label
            for label, each in zip(class_labels, generator, strict=True)
        ]
        images = [Image.fromarray(each.numpy().astype(np.uint8)) for each in pixels]
        return type("Output", (), {"images": images})


def stand_in_network(sha256="ab" * 32):
    """Random projections of 8 x 8 images in place of the Inception network."""
    weights = torch.from_numpy(np.random.default_rng(0).normal(size=(192, sum(WIDTHS)))).float() / 192

    def network(images):
        return torch.from_numpy(np.stack([np.asarray(image) for image in images])).flatten(1).float() @ weights

    metric = "FID" if sha256 == INCEPTION_SHA256 else "FD-Inception"
    return Extractor("inception-adm", metric, sum(WIDTHS), sha256, "none", "none", network)


@pytest.fixture
def stand_ins(monkeypatch):
    """A pipeline and a network in place of the real ones; returns the pipeline."""
    pipeline = ClassPipeline()
    monkeypatch.setattr("unified_eval.generation.load_system", lambda name, lora: (pipeline, {"pipeline_sha256": name}))
    monkeypatch.setattr("unified_eval.adm.ADM_WIDTHS", WIDTHS)
    monkeypatch.setattr("unified_eval.adm_protocol.load_extractor", lambda *arguments: stand_in_network())
    return pipeline


def reference_file(folder, count=12):
    rng = np.random.default_rng(1)
    path = folder / "reference.npz"
    np.savez(path, rng.integers(0, 200, (count, 8, 8, 3), dtype=np.uint8))
    return path


@pytest.mark.process
def test_a_class_conditional_run(stand_ins, tmp_path, monkeypatch, capsys):
    reference, out = reference_file(tmp_path), tmp_path / "out"
    command = ["evaluate.py", "--protocol", "adm-50k", "--pipeline", "p", "--reference", reference, "--inception", "w",
               "--num-images", 10, "--batch-size", 4, "--seed", 5, "--out", out]  # fmt: skip
    run_script(monkeypatch, *command)
    assert stand_ins.calls == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1]]
    assert stand_ins.options == {
        "guidance_scale": 3.0, "temperature": 0.9, "top_k": 0, "top_p": 1.0, "guidance_schedule": "constant",
        "decoding": "plain", "group_temperature": 1.0,
    }  # fmt: skip
    with np.load(out / "generated.npz") as arrays:
        pixels, labels = arrays["arr_0"], arrays["arr_1"]
    assert labels.dtype == np.int64 and labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert pixels.shape == (10, 8, 8, 3) and (pixels.min((1, 2, 3)) // 50).tolist() == labels.tolist()
    assert np.array_equal(pixels[7], np.asarray(Image.open(out / "generated" / "00007.png")))

    # The values, from the pixels in the file.
    written = json.loads((out / "metrics.json").read_text())
    network = stand_in_network()
    own, real = (network([Image.fromarray(each) for each in np.load(file)["arr_0"]]).astype(np.float32)
                 for file in (out / "generated.npz", reference))  # fmt: skip
    cuts = [slice(0, 6), slice(6, 11), slice(11, 15)]
    precision, recall, _ = precision_and_recall(real[:, cuts[0]], own[:, cuts[0]])
    expected = {
        "fd_inception_pool": frechet_distance(own[:, cuts[0]], real[:, cuts[0]]),
        "fd_inception_spatial": frechet_distance(own[:, cuts[1]], real[:, cuts[1]]),
        "exp_kl_classes": score_in_runs(own[:, cuts[2]]), "precision": precision, "recall": recall,
    }  # fmt: skip
    assert written["metrics"] == pytest.approx(expected, rel=1e-6)
    assert list(written["metrics"]) == list(expected), "no metric is called FID without the weights of FID"
    assert any("ab" * 32 in note and INCEPTION_SHA256 in note for note in written["notes"])
    run = written["run"]
    assert {name: run[name] for name in stand_ins.options} == stand_ins.options
    assert (run["images_per_class"], run["num_images"], run["generated"], run["kept"]) == ([2, 3], 10, 10, 0)
    assert written["recipes"]["precision"]["n_reference"] == 12
    report = (out / "report.html").read_text()
    assert "FID-50k" not in report and "pool features of unknown weights" in report

    # Continued after a kill: only what is missing is generated, and all is as it was.
    stand_ins.calls.clear()
    (out / "generated" / "00006.png").unlink()
    run_script(monkeypatch, *command)
    again = json.loads((out / "metrics.json").read_text())
    assert stand_ins.calls == [[2]] and again["metrics"] == written["metrics"]
    assert (again["run"]["generated"], again["run"]["kept"]) == (1, 9)


def test_names_are_earned(stand_ins, tmp_path, monkeypatch):
    """With the known weights: FID, with the number of images; FID-50k of the full number only."""
    reference = reference_file(tmp_path)
    save_npz(tmp_path / "own.npz", list(load_npz(reference))[:10])
    with np.load(reference) as arrays:
        rows = stand_in_network()([Image.fromarray(each) for each in arrays["arr_0"]])
    moments = moments_of(rows[:, :6])
    np.savez(tmp_path / "statistics.npz", mu=moments.mean, sigma=moments.covariance)
    monkeypatch.setattr(
        "unified_eval.adm_protocol.load_extractor", lambda *arguments: stand_in_network(INCEPTION_SHA256)
    )

    def run(reference):
        command = ["evaluate.py", "--protocol", "adm-50k", "--images", tmp_path / "own.npz", "--reference", reference,
                   "--inception", "w", "--out", tmp_path / "out"]  # fmt: skip
        run_script(monkeypatch, *command, "--num-images", 10)
        return json.loads((tmp_path / "out" / "metrics.json").read_text())

    few = run(reference)
    assert list(few["metrics"]) == ["fid", "sfid", "inception_score", "precision", "recall"]
    assert few["recipes"]["fid"]["label"] == "FID of 10 images"
    assert few["notes"][0].startswith("10 images, not 50,000: these values do not compare with FID-50k")

    # Statistics alone: what they are not enough for is left out and said.
    alone = run(tmp_path / "statistics.npz")
    assert list(alone["metrics"]) == ["fid", "inception_score"]
    assert alone["metrics"]["fid"] == pytest.approx(few["metrics"]["fid"], rel=1e-9)
    assert "sFID of 10 images: statistics.npz has no mu_s; left out." in alone["notes"]
    assert "precision, recall: statistics.npz has no images (arr_0); left out." in alone["notes"]

    monkeypatch.setattr(adm_module, "FULL", 10)
    full = run(reference)
    assert list(full["metrics"]) == ["fid_50k", "sfid_50k", "inception_score", "precision", "recall"]
    assert full["recipes"]["fid_50k"]["label"] == "FID-50k" and full["notes"] == []
    assert full["metrics"]["fid_50k"] == few["metrics"]["fid"]


@pytest.mark.process
def test_captions_and_folders(stand_ins, pipeline, picture_source, tmp_path, monkeypatch):
    """A text pipeline generates the captions of a data set; a folder is measured as it is and written on demand."""
    monkeypatch.setattr(type(pipeline), "default_size", (8, 8))
    monkeypatch.setattr("unified_eval.generation.load_system", lambda name, lora: (pipeline, {}))
    pipeline.to = lambda device: pipeline
    prompts = []

    def call(self, captions, generator, **options):
        prompts.extend(captions)
        return ClassPipeline()([1] * len(captions), generator)

    monkeypatch.setattr(type(pipeline), "__call__", call)
    reference = reference_file(tmp_path)
    common = ["evaluate.py", "--protocol", "adm-50k", "--reference", reference, "--inception", "w", "--num-images", 8]
    run_script(monkeypatch, *common, "--pipeline", "p", "--data", picture_source, "--samples-per-caption", 2,
               "--out", tmp_path / "text")  # fmt: skip
    assert len(prompts) == 8 and len(set(prompts)) == 4 and prompts[0] == prompts[1] != prompts[2]
    with np.load(tmp_path / "text" / "generated.npz") as arrays:
        assert arrays.files == ["arr_0"]
    run_script(monkeypatch, *common, "--images", tmp_path / "text" / "generated", "--npz", "--out", tmp_path / "folder")
    values = [json.loads((tmp_path / name / "metrics.json").read_text())["metrics"] for name in ("text", "folder")]
    assert values[0] == values[1]
    assert not {"guidance_scale", "seed"} & set(json.loads((tmp_path / "folder" / "metrics.json").read_text())["run"])
    images = [list(load_npz(tmp_path / name / "generated.npz")) for name in ("text", "folder")]
    assert images[0] == images[1]


def test_mistakes_show_before_anything_is_generated(stand_ins, tmp_path, monkeypatch, capsys):
    reference = reference_file(tmp_path)
    save_npz(tmp_path / "large.npz", [Image.new("RGB", (9, 8))] * 5)
    np.savez(tmp_path / "none.npz", mu=np.zeros(6), sigma=np.eye(6))
    common = ["evaluate.py", "--protocol", "adm-50k", "--out", tmp_path / "out", "--pipeline", "p"]
    given = [*common, "--reference", reference, "--inception", "w"]
    images = [part for part in given if part not in ("--pipeline", "p")]
    for message, command in (
        ("--reference: missing; give a reference batch", [*common, "--inception", "w"]),
        ("--inception: missing; FID and Inception Score are of the Inception network: give its weights",
         [*common, "--reference", reference]),
        ("--num-images: 50000, but", [*images, "--images", reference]),
        ("--images: are measured as they are", [*images, "--images", reference, "--data", "d"]),
        ("--images: 'absent' is neither a folder of images nor an .npz file", [*images, "--images", "absent"]),
        ("has no arr_0", [*images, "--images", tmp_path / "none.npz"]),
        ("--images: are measured as they are", [*images, "--images", reference, "--recipe", "npp_c2i_b"]),
        ("--metrics: the protocol adm-50k has its own metrics and network", [*given, "--metrics", "kd"]),
        ("recipe: 'npp_c2i_b' is for 256x256 images, these are 8x8", [*given, "--recipe", "npp_c2i_b"]),
        ("--num-images: 3; precision and recall need more than 3", [*given, "--num-images", 3]),
        ("--npz: ", [*images, "--images", reference, "--npz"]),
        ("--reference: its images are 8x9, those to measure 8x8", [*given, "--reference", tmp_path / "large.npz"]),
        ("--samples-per-caption: 3 does not divide the 10", [*given, "--num-images", 10, "--samples-per-caption", 3]),
        ("--images, --reference: they are for --protocol adm-50k", ["evaluate.py", *given[3:], "--data", "d"]),
        ("--data: missing", ["evaluate.py", *common[3:]]),
    ):  # fmt: skip
        assert message in refused(monkeypatch, capsys, *command), message
    monkeypatch.setattr(ClassPipeline, "labels", ())
    assert "pipeline: has no class labels; give captions with --data" in refused(monkeypatch, capsys, *given)
    assert stand_ins.calls == [] and not (tmp_path / "out" / "generated").exists()
