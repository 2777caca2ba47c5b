"""The quickstart's bookkeeping: what is done stays done, what changed runs again with all that follows; its edits."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import generators

import quickstart
import quickstart_report
from quickstart_report import EDITS, cell_map, generate_edits
from unified_eval.shapes import claims_of_caption


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """Three steps that append their name to a file; returns a function that runs the quickstart and reads the file."""
    log = tmp_path / "log.txt"
    config = tmp_path / "settings.yaml"
    config.write_text("steps: 1")

    def command(name):
        return [sys.executable, "-c", f"open({str(log)!r}, 'a').write({name!r})", str(config)]

    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    monkeypatch.setattr(quickstart, "STEPS", {name: command(name) for name in "abc"})

    def run(*arguments):
        log.write_text("")
        monkeypatch.setattr(sys, "argv", ["quickstart.py", *arguments])
        quickstart.main()
        return log.read_text()

    run.command, run.config = command, config
    return run


def test_second_run_does_nothing(steps, tmp_path):
    assert steps() == "abc"
    assert steps() == ""
    records = json.loads((tmp_path / quickstart.OUT / "steps.json").read_text())
    assert list(records) == ["a", "b", "c"]
    assert all(record["seconds"] > 0 for record in records.values())


def test_fresh_starts_again(steps):
    steps()
    assert steps("--fresh") == "abc"


def test_it_ends_after_the_step_that_is_named(steps, tmp_path):
    assert steps("--until", "b") == "ab"
    assert steps("--until", "b") == ""
    assert steps() == "c"


def test_changed_command_runs_again_with_what_follows(steps, monkeypatch):
    steps()
    monkeypatch.setitem(quickstart.STEPS, "b", steps.command("B"))
    assert steps() == "Bc"


def test_changed_config_runs_again(steps):
    steps()
    steps.config.write_text("steps: 2")
    assert steps() == "abc"


def test_what_a_changed_training_left_is_removed(steps, tmp_path, monkeypatch):
    """Training refuses a folder with checkpoints, or codes, of another run; encoding one that another began."""
    monkeypatch.setattr(quickstart, "STEPS", {name: steps.command(name) for name in ("codes", "model", "lora")})
    steps()
    out = tmp_path / quickstart.OUT
    left = [out / "model" / "checkpoints" / "step-00000001", out / "lora_run" / "codes", out / "codes.partial"]
    for folder in left:
        folder.mkdir(parents=True)
    assert steps() == "" and all(folder.is_dir() for folder in left)
    steps.config.write_text("steps: 2")
    assert steps() == "codesmodellora" and not any(folder.exists() for folder in left)


def test_failed_step_stops_and_is_continued(steps, monkeypatch):
    monkeypatch.setitem(quickstart.STEPS, "b", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(SystemExit, match="exit code 3; run again to continue"):
        steps()
    monkeypatch.setitem(quickstart.STEPS, "b", steps.command("b"))
    assert steps() == "bc"


@pytest.mark.process
def test_memory_counts_children():
    import subprocess

    import psutil

    hog = "import time; x = bytearray(200_000_000); print('ready', flush=True); time.sleep(20)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hog!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        assert 0.2 < quickstart.tree_memory_gb(psutil.Process(process.pid)) < 0.4
        for child in psutil.Process(process.pid).children():
            child.kill()


@pytest.mark.process
def test_edits_count_the_codes_that_stay(pipeline, tmp_path, monkeypatch):
    lay_out, sheets = quickstart_report.captioned_grid, []
    monkeypatch.setattr(
        quickstart_report,
        "captioned_grid",
        lambda *given, **named: sheets.append((given, named)) or lay_out(*given, **named),
    )
    pairs, sampling = [("red apple", "blue apple"), ("a cat", "a dog")], {"guidance_scale": 1.0}
    found, edited = generate_edits(pipeline, pairs, sampling, tmp_path / "edits.png")
    outputs = {
        (text, seed): pipeline(text, generator=generators(seed), **sampling)
        for (before, after), seeds in zip(pairs, [(0, 2), (1, 3)], strict=True)
        for text, seed in ((before, seeds[0]), (after, seeds[0]), (after, seeds[1]))
    }
    kept = lambda a, b: (outputs[a].codes == outputs[b].codes).float().mean().item()  # noqa: E731
    same = [kept(("red apple", 0), ("blue apple", 0)), kept(("a cat", 1), ("a dog", 1))]
    other = [kept(("red apple", 0), ("blue apple", 2)), kept(("a cat", 1), ("a dog", 3))]
    assert found == pytest.approx({"edit_codes_kept": sum(same) / 2, "other_seed_codes_kept": sum(other) / 2})
    assert [image.tobytes() for image in edited] == [image.tobytes() for image in sheets[0][0][0][1]]
    assert found["edit_codes_kept"] > found["other_seed_codes_kept"]
    (rows, captions), titles = sheets[0]
    assert (tmp_path / "edits.png").is_file() and len(rows) == len(captions) == len(titles["row_titles"]) == 4
    places = {(0, 1): ("a cat", 1), (1, 1): ("a dog", 1), (3, 1): ("a dog", 3), (3, 0): ("blue apple", 2)}
    for (row, column), key in places.items():
        assert rows[row][column].tobytes() == outputs[key].images[0].tobytes() and captions[row][column] == key[0]
    changed = outputs["a cat", 1].codes[0] != outputs["a dog", 1].codes[0]
    assert rows[2][1].tobytes() == cell_map(changed).tobytes()
    assert captions[2][1] == f"{1 - same[1]:.0%} of the codes"
    with pytest.raises(ValueError, match="edits: no pair of captions"):
        generate_edits(pipeline, [], sampling, tmp_path / "none.png")


def test_map_of_changed_cells():
    image = np.asarray(cell_map(torch.tensor([[True, False, False], [False, False, True]]), side=2))
    assert np.array_equal(image < 128, np.kron([[1, 0, 0], [0, 0, 1]], np.ones((2, 2))).astype(bool))


def test_edits_differ_in_one_word():
    for before, after in EDITS:
        words = list(zip(before.split(), after.split(), strict=True))
        assert sum(a != b for a, b in words) == 1
        assert claims_of_caption(before) != claims_of_caption(after)
