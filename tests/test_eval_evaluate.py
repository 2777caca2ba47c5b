"""Choosing rows, the metrics with their floors and ceilings, and both scripts from data to files."""

import json
import re
import subprocess
import sys
import weakref
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from colour_clip import ColourModel, pixels
from conftest import refused, run_script
from PIL import Image, ImageFile

import unified_eval
from unified.data import SkipReport
from unified.files import write_json, write_whole
from unified_eval import (
    Clip,
    Extractor,
    Inputs,
    choose_evenly,
    first_usable_rows,
    frechet_distance,
    kernel_distance,
    load_clip,
    load_extractor,
    measure_images,
)
from unified_eval.results import recipe_line
from unified_eval.selection import choose_usable, unique_captions, usable_images

ROOT = Path(__file__).resolve().parent.parent
CAPTIONS = ["black", "dark", "light", "white"]


class ColourTokenizer:
    context_length = 2
    words = ("", "red", "green", "blue")

    def __call__(self, texts, context_length: int = 2) -> torch.Tensor:
        texts = [texts] if isinstance(texts, str) else texts
        return torch.tensor([[self.words.index(text)] + [0] * (context_length - 1) for text in texts])


def flat(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (4, 4), colour)


@pytest.fixture
def colour_clip() -> Clip:
    return Clip(ColourModel(), pixels, ColourTokenizer(), "colours")


@pytest.fixture
def mean_extractor() -> Extractor:
    return Extractor("mean", "FD-Mean", 3, "00ff" * 16, "none", "x / 255",
                     lambda images: torch.stack([pixels(image).mean((1, 2)) for image in images]))  # fmt: skip


def test_every_default_metric_of_known_images(colour_clip, mean_extractor):
    captions = ["red", "green", "blue"]
    real = [flat((255, 0, 0)), flat((0, 255, 0)), flat((0, 0, 255))]
    rebuilt = [flat((204, 153, 0)), flat((0, 204, 153)), flat((0, 0, 255))]  # cosines 0.8, 0.8, 1
    generated = [flat((255, 0, 0)), flat((255, 0, 0)), flat((153, 0, 204))]  # cosines 1, 0, 0.8
    others = [flat((10, 20, 30)), flat((30, 10, 20)), flat((20, 30, 10))]
    inputs = Inputs(captions, real, rebuilt, generated, mean_extractor, colour_clip, other_real=others)
    results = measure_images(inputs)
    points = {name: np.array([np.asarray(image)[0, 0] / 255 for image in images])
              for name, images in {"r": real, "t": rebuilt, "g": generated, "o": others}.items()}  # fmt: skip
    expected = {
        "clip_score": 60.0,
        "clip_score_real": 100.0,
        "clip_score_reconstructions": 100 * 2.6 / 3,
        "clip_score_shuffled": 100 * (1 + 0.6) / 6,
        "clip_score_gap": 60 - 100 * (1 + 0.6) / 6,
        "r1_generated": 2 / 3,
        "r1_real": 1.0,
        "r1_reconstructions": 1.0,
        "fd_mean": frechet_distance(points["g"], points["r"]),
        "kd_mean_x1000": 1000 * kernel_distance(points["g"], points["r"]),
        "fd_mean_reconstructions": frechet_distance(points["t"], points["r"]),
        "fd_mean_real_other": frechet_distance(points["o"], points["r"]),
    }
    assert results.metrics == pytest.approx(expected, rel=1e-5)
    assert results.recipes.keys() == results.metrics.keys()
    assert results.recipes["clip_score"]["label"] == "CLIP score (colours), generated"
    assert results.recipes["fd_mean"]["n"] == 3 and results.recipes["fd_mean"]["weights_sha256"] == "00ff" * 16
    assert recipe_line(results.recipes["fd_mean"]).startswith("N=3; mean (sha256 00ff00ff00ff); none; real images")


def test_inception_distances_are_named_fid(colour_clip, mean_extractor):
    fid = Extractor("inception", "FID", 3, "00", "none", "none", mean_extractor.network)
    real = [flat((255, 0, 0)), flat((0, 255, 0))]
    metrics = measure_images(Inputs(["red", "green"], real, real, real, fid, colour_clip)).metrics
    assert {name for name in metrics if "id" in name} == {"fid", "kid_x1000", "fid_reconstructions"}
    assert metrics["fid"] == pytest.approx(0, abs=1e-9)


def test_halves_split_the_real_images(mean_extractor, colour_clip):
    model = colour_clip._replace(tokenizer=type("Four", (ColourTokenizer,), {"words": ("", *CAPTIONS)})())
    model.model.encode_text = lambda tokens: torch.eye(4, 3)[tokens[:, 0] - 1] + 0.1
    real = [flat((value, value, 9)) for value in (0, 50, 180, 255)]
    results = measure_images(Inputs(CAPTIONS, real, real, real, mean_extractor, model), seed=3)
    order = np.random.default_rng(3).permutation(4)
    points = np.array([[value, value, 9] for value in (0, 50, 180, 255)])[order] / 255
    assert results.metrics["fd_mean_real_halves"] == pytest.approx(frechet_distance(points[:2], points[2:]), rel=1e-5)
    recipe = results.recipes["fd_mean_real_halves"]
    assert (recipe["n"], recipe["n_reference"], recipe["seed"]) == (2, 2, 3)


def test_unequal_sets_and_repeated_captions_are_errors():
    two = [flat((255, 0, 0)), flat((0, 255, 0))]
    with pytest.raises(ValueError, match="generated: 1 images for 2 captions; distances compare at equal N"):
        Inputs(["red", "green"], two, two, two[:1])
    with pytest.raises(ValueError, match="real: 0 images for 2 captions"):
        Inputs(["red", "green"], [], two, two)
    with pytest.raises(ValueError, match="captions: 1 captions; distances need 2 or more"):
        Inputs(["red"], two[:1], two[:1], two[:1])
    with pytest.raises(ValueError, match=r"captions: number 1 repeats number 0 \('red'\)"):
        Inputs(["red", "red"], two, two, two)


def test_rows_are_the_first_usable_ones(picture_source):
    rows, report = first_usable_rows(picture_source, "train", 7)
    assert [row.row for row in rows] == list(range(7)) and report.used == 7
    assert [row.row for row in unique_captions(rows)] == list(range(6))
    assert len(first_usable_rows(picture_source, "train")[0]) == 12
    stream = [(row.row, row.caption, row.image.tobytes()) for row in usable_images(picture_source, "train", 7)]
    assert [(row.row, row.caption, row.image.tobytes()) for row in rows] == stream
    with pytest.raises(ValueError, match="max_samples: 0 is below 1"):
        first_usable_rows(picture_source, "train", 0)
    with pytest.raises(ValueError, match="split: 'test' is not in"):
        first_usable_rows(picture_source, "test")


def test_choice_is_even_and_seeded():
    chosen = choose_evenly(list(range(100)), 10, seed=1)
    assert [value // 10 for value in chosen] == list(range(10))
    assert chosen == choose_evenly(list(range(100)), 10, seed=1) != choose_evenly(list(range(100)), 10, seed=2)
    assert choose_evenly([5, 6, 7], 3, seed=0) == [5, 6, 7]
    with pytest.raises(ValueError, match="count: cannot choose 4 of 3 items"):
        choose_evenly([5, 6, 7], 4, seed=0)


@pytest.fixture
def photos(tmp_path):
    """A folder of 40 large photos, and one that counts how many are decoded."""
    small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(40):
        small.resize((1600, 1200)).save(folder / f"p{number:02d}.jpg")
        (folder / f"p{number:02d}.txt").write_text(f"thing {number}")
    return folder


@pytest.mark.process
def test_choosing_decodes_no_other_images_than_the_choice(photos, monkeypatch):
    """Memory and time follow the number of images that are compared, not the size of the data set."""
    decoded = []
    load = ImageFile.ImageFile.load

    def counting(image):
        if image.fp is not None and getattr(image, "tile", None):
            decoded.append(Path(image.filename).stem)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counting)
    rows, report = first_usable_rows(str(photos))
    assert (len(rows), report.used) == (40, 40) and set(decoded) <= {"p00"}
    chosen = choose_usable(unique_captions(rows), 3, seed=1)
    assert chosen == choose_evenly(rows, 3, seed=1)
    assert set(decoded) <= {"p00", *(f"p{row.row:02d}" for row in chosen)}
    assert all(isinstance(value, str | int | tuple | datasets.Dataset) for row in rows for value in vars(row).values())
    assert chosen[0].image.size == (1600, 1200) and chosen[0].image is not chosen[0].image


@pytest.mark.process
def test_a_stream_keeps_one_image(photos):
    images = []
    for row in usable_images(str(photos)):
        images.append(weakref.ref(row.image))
        assert sum(image() is not None for image in images) <= 2
    assert len(images) == 40


@pytest.mark.process
def test_corrupt_images_are_replaced_within_their_run(photos):
    rows, _ = first_usable_rows(str(photos))
    plain = choose_evenly(rows, 4, seed=0)
    for row in (plain[1], plain[3]):
        (photos / f"p{row.row:02d}.jpg").write_bytes(b"no image")
    chosen = choose_usable(rows, 4, seed=0)
    assert [chosen[0], chosen[2]] == [plain[0], plain[2]] and chosen[1] != plain[1] and chosen[3] != plain[3]
    assert [row.row // 10 for row in chosen] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=rf"row {plain[1].row}: the image of 'thing {plain[1].row}' is corrupt"):
        _ = plain[1].image
    for number in range(20, 30):  # a whole run
        (photos / f"p{number}.jpg").write_bytes(b"no image")
    chosen = choose_usable(rows, 4, seed=0)
    assert len(chosen) == 4 and not [row for row in chosen if 20 <= row.row < 30]
    report = SkipReport()
    assert len(list(usable_images(str(photos), report=report))) == 40 - report.corrupt_image == 28
    with pytest.raises(ValueError, match="count: cannot choose 29 of 28 items"):
        choose_usable(rows, 29, seed=0)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "new" / "a.json", {"a": float("nan")})

    def half(beside):
        beside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "new" / "a.json", half)
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"a": 1}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_importing_the_package_loads_no_network():
    code = "import sys, unified_eval; assert not {'open_clip', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert all(getattr(unified_eval, name) is not None for name in unified_eval.__all__)
    assert not hasattr(unified_eval, "no_such_name")


@pytest.mark.process
def test_scripts_from_data_to_metrics(pipeline, picture_source, tmp_path, monkeypatch, capsys):
    pipeline.save_pretrained(tmp_path / "pipeline")
    run_script(monkeypatch, "train_clip.py", "--data", picture_source, "--max-samples", 6, "--steps", 2,
               "--batch-size", 6, "--out", tmp_path / "clip", "--name", "tiny-nano")  # fmt: skip
    record = json.loads((tmp_path / "clip" / "nano_clip.json").read_text())
    assert (record["name"], record["samples"], record["steps"], record["seed"]) == ("tiny-nano", 6, 2, 0)
    assert record["retrieval_at_1"]["train"]["captions"] == record["retrieval_at_1"]["validation"]["captions"] == 6

    common = ["--pipeline", tmp_path / "pipeline", "--data", picture_source, "--clip", tmp_path / "clip",
              "--num-images", 4, "--guidance-scale", 1.0, "--seed", 5, "--psnr-data", picture_source]  # fmt: skip
    run_script(monkeypatch, "evaluate.py", *common, "--out", tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    found, run = metrics["metrics"], metrics["run"]
    assert found.keys() == metrics["recipes"].keys()
    assert "CLIP score (tiny-nano), generated" in capsys.readouterr().out
    assert run["samples"] == 12 and len(run["captions"]) == 4 and run["rows"] == sorted(run["rows"])

    # The files are the images of seed + i, and the metrics are those of the files.
    files = sorted((tmp_path / "out" / "generated").iterdir())
    assert [file.name for file in files] == ["000.png", "001.png", "002.png", "003.png"]
    generated = [Image.open(file).convert("RGB") for file in files]
    alone = pipeline(run["captions"][2], generator=[torch.Generator().manual_seed(7)], guidance_scale=1.0).images[0]
    assert np.array_equal(np.asarray(alone), np.asarray(generated[2]))
    rows = {row.row: row for row in first_usable_rows(picture_source, "train")[0]}
    real = [rows[number].image for number in run["rows"]]
    assert [rows[number].caption for number in run["rows"]] == run["captions"]
    extractor = load_extractor("efficientnet-lite0")
    assert found["fd_efflite0"] == pytest.approx(frechet_distance(extractor(generated), extractor(real)), rel=1e-4)
    again = measure_images(Inputs(run["captions"], real, real, generated, extractor, load_clip(tmp_path / "clip")))
    assert found["clip_score"] == pytest.approx(again.metrics["clip_score"], rel=1e-5)
    assert 0 < found["tokenizer_psnr_pooled_db"] <= found["tokenizer_psnr_db"] < 40
    assert metrics["recipes"]["tokenizer_psnr_db"]["n"] == 6
    assert Image.open(tmp_path / "out" / "samples.png").width == 4 * (128 + 14) + 14
    assert Image.open(tmp_path / "out" / "comparison.png").width == 4 * (128 + 14) + 14

    report = (tmp_path / "out" / "report.html").read_text()
    for text in ("CLIP score (tiny-nano), generated", "Floors and ceilings", "Best 2 by score", "Worst 2 by score",
                 "other captions (floor)", "95 % intervals", "frechet: 4 images, where published"):  # fmt: skip
        assert text in report, text
    assert metrics["intervals"]["clip_score"][0] < found["clip_score"] < metrics["intervals"]["clip_score"][1]
    run_script(monkeypatch, "evaluate.py", *common, "--out", tmp_path / "out", "--npz")
    again = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (again["run"]["kept"], again["run"]["generated"]) == (4, 0)
    assert (again["metrics"], again["intervals"]) == (found, metrics["intervals"]), "exactly the same, from kept files"
    pixels_of = [image.tobytes() for image in unified_eval.load_npz(tmp_path / "out" / "generated.npz")]
    assert pixels_of == [image.tobytes() for image in generated]

    monkeypatch.setattr(type(pipeline), "__call__", None)  # nothing is generated any more
    (tmp_path / "file").write_text("a file")
    for message, *wrong in (
        ("count: cannot choose 7 of 6 items", "--num-images", 7),
        ("weights: the inception extractor needs a weights file", "--extractor", "inception"),
        (f"out: '{tmp_path}/file' is a file", "--out", tmp_path / "file" / "inside"),
        (f"features: '{tmp_path}/file' is a file", "--features", tmp_path / "file"),
        (f"pipeline: '{tmp_path}/absent' does not exist", "--pipeline", tmp_path / "absent"),
        ("clip: './absent' does not exist on this machine", "--clip", "./absent"),
        ("split: 'absent' is not in", "--psnr-split", "absent"),
        ("split: 'absent' is not in", "--metrics", "neighbours", "--training-split", "absent"),
        ("metrics: 'prdc' needs 6 or more captions, got 4", "--metrics", "prdc"),
        ("metrics: 'diversity' needs samples_per_caption of 2 or more", "--metrics", "diversity"),
        ("metrics: claims need the columns include and tag", "--metrics", "shapes"),
        ("--batch-size: 0 is below 1", "--batch-size", 0),
    ):
        assert message in refused(monkeypatch, capsys, "evaluate.py", *common, "--out", tmp_path / "none", *wrong)
    assert not (tmp_path / "none").exists()
    without = [part for part in common if part not in ("--clip", tmp_path / "clip")]
    message = refused(monkeypatch, capsys, "evaluate.py", *without, "--out", tmp_path / "none")
    assert message == "evaluate.py: metrics: 'clip' needs clip; give it or leave the metric out."
    trained = ["train_clip.py", "--data", picture_source, "--name", "x", "--out", tmp_path / "out"]
    assert "exists and is no earlier nano CLIP" in refused(monkeypatch, capsys, *trained)


@pytest.mark.process
def test_distances_run_without_a_clip(pipeline, picture_source, tmp_path, monkeypatch):
    pipeline.save_pretrained(tmp_path / "pipeline")
    run_script(monkeypatch, "evaluate.py", "--pipeline", tmp_path / "pipeline", "--data", picture_source, "--metrics", "kd",
               "--num-images", 3, "--resamples", 0, "--psnr-split", "none", "--out", tmp_path / "out")  # fmt: skip
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(metrics["metrics"]) == ["kd_efflite0_x1000"]
    assert "by score" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.process
def test_a_caption_too_long_for_a_pipeline_shows_before_anything_is_generated(
    pipeline, picture_source, tmp_path, monkeypatch, capsys
):
    """Also one for the second of two."""
    pipeline.save_pretrained(tmp_path / "one")
    pipeline.model.config.text_config.max_position_embeddings = 24
    pipeline.save_pretrained(tmp_path / "two")
    common = ["--data", picture_source, "--metrics", "kd", "--num-images", 6, "--resamples", 0, "--psnr-split", "none"]
    out = tmp_path / "out"
    for systems in (["--pipeline", tmp_path / "two"], ["--compare", tmp_path / "one", tmp_path / "two"]):
        message = refused(monkeypatch, capsys, "evaluate.py", *systems, *common, "--batch-size", 1, "--out", out)
        assert re.search(r"prompt: \d+ tokens, the model has room for 6 beside the image; shorten '", message)
        assert not list(out.rglob("*.png"))


@pytest.mark.process
def test_corrupt_images_are_left_out_everywhere(pipeline, photos, tmp_path, monkeypatch, capsys):
    """Of 40 photos 12 are listed; of these, two are corrupt, and so is one of the others."""
    pipeline.save_pretrained(tmp_path / "pipeline")
    listed = first_usable_rows(str(photos), max_samples=12)[0]
    first, second = choose_evenly(listed, 3, seed=0)[1].row, 11
    for number in (first, second, 30):
        (photos / f"p{number:02d}.jpg").write_bytes(b"no image")
    run_script(monkeypatch, "evaluate.py", "--pipeline", tmp_path / "pipeline", "--data", photos, "--max-samples", 12,
               "--num-images", 3, "--metrics", "kd", "neighbours", "--resamples", 0, "--psnr-split", "train",
               "--out", tmp_path / "out")  # fmt: skip
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert first != second and not {first, second} & set(metrics["run"]["rows"])
    assert [number // 4 for number in metrics["run"]["rows"]] == [0, 1, 2]
    assert metrics["recipes"]["neighbour_distance"]["n_reference"] == 10
    assert metrics["recipes"]["tokenizer_psnr_db"]["n"] == 37
    said = capsys.readouterr().out
    assert f"in place of rows [{first}], whose images are corrupt" in said and "37 rows used, 3 corrupt images" in said


@pytest.mark.process
def test_comparison_of_two_pipelines(pipeline, picture_source, tmp_path, monkeypatch, capsys):
    pipeline.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        for parameter in pipeline.model.parameters():
            parameter.mul_(1.5)
    pipeline.save_pretrained(tmp_path / "two")
    rows = first_usable_rows(picture_source, "train")[0][:6]
    clip = unified_eval.train_nano_clip(
        [row.image for row in rows], [row.caption for row in rows], "tiny", steps=1, batch_size=6, progress=False
    )
    unified_eval.save_nano_clip(clip, tmp_path / "clip", {})
    common = ["--data", picture_source, "--clip", tmp_path / "clip", "--num-images", 6, "--psnr-split", "none"]
    common += ["--metrics", "kd", "clip", "prdc", "neighbours", "--features", tmp_path / "features"]
    run_script(
        monkeypatch, "evaluate.py", "--compare", tmp_path / "one", tmp_path / "two", *common, "--out", tmp_path / "ab"
    )
    written = json.loads((tmp_path / "ab" / "metrics.json").read_text())
    sides = [json.loads((tmp_path / "ab" / side / "metrics.json").read_text()) for side in "ab"]
    assert sides[0]["run"]["pipeline_sha256"] != sides[1]["run"]["pipeline_sha256"]
    assert sides[0]["run"]["captions"] == sides[1]["run"]["captions"]
    differences = {row["metric"]: row for row in written["differences"]}
    assert set(differences) == {name for name in sides[0]["metrics"] if not name.endswith(("_real", "_training"))}
    for name, row in differences.items():
        assert row["difference"] == pytest.approx(sides[1]["metrics"][name] - sides[0]["metrics"][name], abs=1e-12)
    score = differences["clip_score"]
    assert score["interval"][0] <= score["difference"] <= score["interval"][1] and score["difference"] != 0
    assert differences["clip_score_reconstructions"]["interval"] == [0, 0], "both have the same image tokenizer"
    assert "B - A [95 % interval in pairs]" in capsys.readouterr().out
    assert "not told apart" in (tmp_path / "ab" / "report.html").read_text()
    assert "nearest training image" in (tmp_path / "ab" / "b" / "report.html").read_text()

    same = ["--compare", tmp_path / "one", tmp_path / "one", *common, "--out", tmp_path / "aa"]
    run_script(monkeypatch, "evaluate.py", *same)
    for row in json.loads((tmp_path / "aa" / "metrics.json").read_text())["differences"]:
        assert row["difference"] == 0 and row["interval"] == [0, 0], row
    modes = [*same[:-1], tmp_path / "modes", "--decoding", "jacobi", "gsd+int8"]
    run_script(monkeypatch, "evaluate.py", *modes)
    sides = [json.loads((tmp_path / "modes" / side / "metrics.json").read_text()) for side in "ab"]
    plain = json.loads((tmp_path / "aa" / "a" / "metrics.json").read_text())
    assert sides[0]["metrics"] == plain["metrics"], "jacobi decoding generates the same images"
    assert sides[1]["metrics"]["clip_score"] != plain["metrics"]["clip_score"]
    assert [side["run"]["decoding"] for side in sides] == ["jacobi", "gsd+int8"]
    assert sides[1]["run"]["weights"] == "int8"

    script = ["evaluate.py", "--compare", tmp_path / "one", tmp_path / "absent", *common, "--out", tmp_path / "none"]
    assert "absent' does not exist" in refused(monkeypatch, capsys, *script), "before the first one generates"
    assert not (tmp_path / "none").exists()
    message = refused(monkeypatch, capsys, "evaluate.py", *same, "--decoding", "plain", "sjd", "gsd")
    assert message == "evaluate.py: --decoding: 3 modes for 2 pipeline(s)."
    message = refused(monkeypatch, capsys, "evaluate.py", *same, "--lora", tmp_path / "lora")
    assert "--lora is for --pipeline; with --compare write PIPELINE+LORA" in message
