"""Settings of a run: YAML, overrides, and what is refused."""

from pathlib import Path

import pytest

from unified.training.config import load_config

ROOT = Path(__file__).resolve().parent.parent
MINIMAL = """
output_dir: out
steps: 10
data: {train: codes}
model: {image_tokenizer: it, text_tokenizer: tt, architecture: {model_type: llama}}
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_overrides_win(config_file):
    config = load_config(
        config_file, ["optimizer.learning_rate=0.5", "schedule.patch_sizes=[4,1]", "data.caption_dropout=0"]
    )
    assert config.optimizer.learning_rate == 0.5
    assert [(s.patch_size, s.start, s.end) for s in config.patch_schedule().stages(config.steps)] == [
        (4, 0, 5),
        (1, 5, 10),
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lr=1"], "lr"),
        (["steps=many"], "steps"),
        (["steps=0"], "steps: 0 must be at least 1"),
        (["batch_size"], r"overrides: \['batch_size'\] are not of the form key=value"),
        (["data.caption_dropout=1.5"], r"data.caption_dropout: 1.5 must lie in \[0, 1\]"),
        (
            ["model.pipeline=p"],
            r"exactly one of pipeline, backbone and architecture, got \['pipeline', 'architecture'\]",
        ),
        (["model.image_tokenizer=null"], "model.image_tokenizer: missing"),
        (["data.captioning=-0.1"], r"data.captioning: -0.1 must lie in \[0, 1\]"),
        (["optimizer.name=sgd"], "optimizer.name: 'sgd' is unknown; use adamw or muon"),
        (["schedule.shares=[1.0]"], "shares"),
        (["steps=1"], "total_steps: 1 is too few for 2 stages"),
    ],
)
def test_bad_settings_are_named(config_file, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(config_file, overrides)


def test_missing_keys_and_files_are_named(tmp_path):
    (tmp_path / "empty.yaml").write_text("steps: 3\n")
    with pytest.raises(ValueError, match=r"\['output_dir'\] must be set"):
        load_config(tmp_path / "empty.yaml")
    with pytest.raises(ValueError, match="does not exist"):
        load_config(tmp_path / "nothing.yaml")


SHIPPED = [path for path in sorted((ROOT / "recipes" / "configs").glob("*.yaml")) if "tokenizer" not in path.name]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_load(path):
    """A study gives every run its own folder; the other configs name theirs."""
    config = load_config(path, ["output_dir=out"] if "study" in path.name else [])
    assert config.patch_schedule().relative_cost() < 0.64


def test_the_papers_stages_by_levels(config_file):
    config = load_config(config_file, ["schedule.levels=3", "schedule.ratio=0.5", "schedule.mixed=0.1", "steps=100"])
    schedule = config.patch_schedule()
    assert [(s.patch_size, s.end) for s in schedule.stages(100)] == [(4, 25), (2, 50), (1, 100)]
    assert schedule.mixed == 0.1
