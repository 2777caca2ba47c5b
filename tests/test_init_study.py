"""The study of initialisations: what it runs, what it does not run again, and its table."""

import json

import pytest

import init_study
from unified.training.tracking import read_log

RESULTS = [
    {"kind": kind, "seed": seed, "validation_loss": {"5": first, "10": last}}
    for kind, seed, first, last in [
        ("a/b", 0, 3.0, 2.0),
        ("c/d", 0, 2.0, 2.5),
        ("a/b", 1, 4.0, 2.0),
        ("c/d", 1, 2.0, 3.5),
    ]
]


def test_table_of_means_and_spreads():
    lines = init_study.table(RESULTS).splitlines()
    assert lines[0] == "| image_init/head_init | step 5 | step 10 |"
    assert lines[2] == "| a/b | 3.500 ± 0.707 | **2.000 ± 0.000** |"
    assert lines[3] == "| c/d | **2.000 ± 0.000** | 3.000 ± 0.707 |"
    assert init_study.table(RESULTS[:2]).splitlines()[2] == "| a/b | 3.000 | **2.000** |"


@pytest.mark.process
def test_runs_once_and_keeps_losses_alone(config_file, on_a_backbone, tmp_path, monkeypatch):
    overrides = [*on_a_backbone, "steps=4", "validate_every=2", "schedule.patch_sizes=[1]", "schedule.shares=[1.0]",
                 "lora.rank=2", "lora.train_image_tables=true", "optimizer.ema_decay=null"]  # fmt: skip
    kinds = ["text/zero", "codebook/tied-like"]
    table = init_study.study(str(config_file), overrides, kinds, [0, 1], tmp_path)
    assert table == (tmp_path / "table.md").read_text() and "| codebook/tied-like | " in table
    runs = json.loads((tmp_path / "study.json").read_text())["runs"]
    assert [(r["kind"], r["seed"]) for r in runs] == [(k, s) for s in (0, 1) for k in kinds]
    for result in runs:
        folder = tmp_path / result["kind"].replace("/", "-") / f"seed-{result['seed']}"
        logged = {str(r["step"]): r["validation_loss"] for r in read_log(folder) if "validation_loss" in r}
        assert result["validation_loss"] == logged and list(logged) == ["2", "4"]
        assert sorted(file.name for file in folder.iterdir()) == ["config.yaml", "log.jsonl", "result.json"]
    assert len({r["validation_loss"]["2"] for r in runs}) == 4

    interrupted = tmp_path / "text-zero" / "seed-0"
    (interrupted / "result.json").unlink()
    (interrupted / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert init_study.study(str(config_file), overrides, kinds, [0, 1], tmp_path) == table
    assert not (interrupted / "checkpoints").exists()

    def forbidden(settings):
        raise AssertionError("trained again")

    monkeypatch.setattr(init_study, "train", forbidden)
    assert init_study.study(str(config_file), overrides, kinds, [0, 1], tmp_path) == table
    with pytest.raises(ValueError, match=r"out: .*text-zero/seed-0' was run with other settings"):
        init_study.study(str(config_file), [*overrides, "batch_size=2"], kinds, [0], tmp_path)


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("text", [], "kinds: 'text' is not of the form image_init/head_init"),
        ("text/one", [], "model.head_init: 'one' is unknown"),
        ("text/zero", ["validate_every=null"], "validate_every: null, so there is no loss to compare"),
    ],
)
def test_bad_kinds_are_named(config_file, on_a_backbone, tmp_path, kind, overrides, message):
    with pytest.raises(ValueError, match=message):
        init_study.settings_of(str(config_file), [*on_a_backbone, *overrides], kind, 0, tmp_path)
