"""Settings of a run: YAML, overrides, and what is refused."""

from pathlib import Path

import pytest
from conftest import tiny_config

from unified.training.config import load_config
from unified.training.model_config import ModelConfig

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
        (["optimizer.lr=1"], "config: 'optimizer.lr' is unknown; use one of name, learning_rate, weight_decay"),
        (["data.caption_dropot=1"], "config: 'data.caption_dropot' is unknown; did you mean 'caption_dropout'"),
        (["steps=many"], "config: a value of 'steps' in .* does not fit: Value 'many'"),
        (["optimizer=3"], "config: a value of 'optimizer' in .* does not fit: .* OptimizerConfig"),
        (["batch_size"], r"overrides: \['batch_size'\] are not of the form key=value"),
        (["data.sources=["], "or an override is not YAML"),
        (
            ["model.pipeline=p"],
            r"exactly one of pipeline, backbone and architecture, got \['pipeline', 'architecture'\]",
        ),
        (["model.image_tokenizer=null"], "model.image_tokenizer: missing"),
        (["model.text_tokenizer=null"], "model.text_tokenizer: missing"),
        (["model.boi=<i>", "model.eoi=<i>"], "model.boi, model.eoi: both are '<i>'; use two different tokens"),
        (["optimizer.name=sgd"], "optimizer.name: 'sgd' is unknown; use one of adamw, muon"),
        (["mixed_precision=no"], "mixed_precision: 'False' is unknown; use bf16, fp16 or 'no' .in quotes"),
        (["output_dir=' '"], "output_dir: empty"),
        (["schedule.final=.nan"], r"schedule.final: nan must lie in \[0, 1\]"),
        (["schedule.decay=.nan"], "schedule.warmup, decay: 0.05 and nan must be shares"),
        (["schedule.shares=[1.0]"], r"schedule.shares: \(1.0,\) must be 2 positive numbers"),
        (["steps=1"], "total_steps: 1 is too few for 2 stages"),
        (["optimizer.betas=[0.9]"], r"optimizer.betas: \[0.9\] must be two numbers"),
        (["optimizer.betas=[0.9,0.9,0.9]"], r"optimizer.betas: \[0.9, 0.9, 0.9\] must be two numbers"),
        (["lora.target_modules=[]"], "lora.target_modules: empty"),
        (["lora.modality=sound"], "modality: 'sound' is unknown"),
        (["sample.every=5"], "sample.prompts: empty"),
        (["sample.guidance_scale=0.5"], "guidance_scale: 0.5 must be at least 1"),
        (["evaluation={every: 5, data: d, clip: c, temperature: 0}"], "temperature: 0.0 must be above 0"),
        (["checkpoint_every=15"], "checkpoint_every: 15 is not a multiple of log_every 10"),
        (["data.train=null"], "data: set exactly one of train and sources, got none"),
        (["data.train=null", "data.sources=[{path: a, kind: sound}]"], r"data.sources\[a\].kind: 'sound' is unknown"),
        (
            ["data.train=null", "data.sources=[{path: a, kind: text, captioning: 0.5}]"],
            r"data.sources\[a\].captioning: for images only, not for text",
        ),
        (
            ["data.train=null", "data.sources=[{path: a}]", "validate_every=5"],
            "validate_every: none of data.sources has a validation_split",
        ),
    ],
)
def test_bad_settings_are_named(config_file, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(config_file, overrides)


OUT_OF_RANGE = {
    "at least 0": {
        "optimizer.weight_decay": -1, "data.num_workers": -1, "sample.seed": -1, "evaluation.seed": -1
    },
    "at least 1": {
        "steps": 0, "batch_size": 0, "gradient_accumulation_steps": -1, "processes": 0, "log_every": -10, "validate_every": 0,
        "checkpoint_every": -10, "keep_checkpoints": 0, "sample.every": -1, "evaluation.every": 0, "evaluation.num_images": 0,
        "data.image_size": 0, "data.crops": 0, "data.max_samples": -5, "lora.rank": 0, "lora.alpha": 0,
    },
    "at least 2": {"data.pack": 1, "data.sources[a].max_length": 1},
    "above 0": {
        "optimizer.learning_rate": 0, "optimizer.gradient_limit": -1, "optimizer.gradient_clip": 0, "data.sources[a].weight": 0
    },
    r"lie in \(0, inf\)": {
        "optimizer.learning_rate": ".nan", "optimizer.gradient_limit": ".inf", "data.sources[a].weight": ".nan"
    },
    r"lie in \(0, inf\]": {"optimizer.gradient_clip": ".nan"},
    r"lie in \[0, inf\)": {"optimizer.weight_decay": ".nan"},
    r"lie in \[0, 1\]": {
        "data.caption_dropout": 1.5, "data.code_noise": ".nan", "data.captioning": -0.1, "data.sources[a].captioning": 2,
        "data.sources[a].caption_dropout": -1, "schedule.final": -0.1,
    },
    r"lie in \[0, 1\)": {"optimizer.betas": "[0.9,1.0]", "lora.dropout": 1.0, "schedule.mixed": 1},
    r"lie in \(0, 1\)": {"optimizer.ema_decay": 1.0},
    r"lie in \[0, 4294967295\]": {"seed": 2**32},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "rule"), [(n, v, r) for r, all in OUT_OF_RANGE.items() for n, v in all.items()]
)
def test_numbers_out_of_range_are_refused(config_file, name, value, rule):
    """NaN too, which is neither above nor below anything."""
    if "sources" in name:
        overrides = ["data.train=null", f"data.sources=[{{path: a, {name.split('.')[-1]}: {value}}}]"]
    else:
        overrides = [f"{name}={value}"]
    if name.startswith("evaluation"):
        overrides = ["evaluation={every: 5, data: d, clip: c}", *overrides]
    with pytest.raises(ValueError, match=rf"^{name.replace('[', '.').replace(']', '.')}.* must (be )?{rule}"):
        load_config(config_file, overrides)


def test_limits_of_the_ranges_are_in_range(config_file):
    options = ["optimizer.betas=[0,0]", "optimizer.weight_decay=0", "optimizer.gradient_clip=.inf", "data.caption_dropout=1",
               "schedule.final=0", "steps=2", "log_every=1", "checkpoint_every=1", "mixed_precision='no'"]  # fmt: skip
    config = load_config(config_file, options)
    assert config.optimizer.betas == [0, 0] and config.mixed_precision == "no"
    assert load_config(config_file, ["schedule.final=1"]).patch_schedule().final == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.options.position=1d"], "model.options: 'position' is unknown or not free; did you mean 'positions'"),
        (["model.options.codebook_size=9"], "model.options: 'codebook_size' is unknown or not free"),
        (["model.options.use_cache=true"], "model.options: 'use_cache' is unknown or not free"),
        (["model.options.positions=3d"], "model.options: positions: '3d' is unknown"),
        (["model.options.image_loss_weight=-1"], "model.options: image_loss_weight: -1 must be a finite number of at"),
        (["model.options.text_loss_weight=.nan"], "model.options: text_loss_weight: nan must be a finite number of at"),
        (["model.options.normalized_range=0"], "model.options: normalized_range: 0 must be a finite number above 0"),
        (["model.architecture.hiden_size=8"], "LlamaConfig has no field 'hiden_size'; did you mean 'hidden_size'"),
        (["model.architecture.hidden_size=big"], "model.architecture: .*hidden_size"),
        (["model.architecture.model_type=lama"], "model.architecture: model_type 'lama' is unknown to transformers"),
    ],
)
def test_fields_of_the_model_are_checked(config_file, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(config_file, overrides)


def test_an_architecture_needs_its_type():
    with pytest.raises(ValueError, match=r"model.architecture: needs a model_type such as 'llama'"):
        ModelConfig(architecture={"hidden_size": 8}, image_tokenizer="it", text_tokenizer="tt").check()


def test_older_names_of_transformers_are_known(config_file):
    config = load_config(config_file, ["model.architecture.rope_theta=5000", "model.architecture.num_hidden_layers=2"])
    assert config.model.architecture["rope_theta"] == 5000


def test_environment_variables_are_not_written(config_file, monkeypatch):
    """Their values would stand in config.yaml, in checkpoints and in the model card; other references may."""
    monkeypatch.setenv("SECRET", "hidden")
    for option in ("data.storage_options.secret=${oc.env:SECRET}", "project='${oc.decode:${oc.env:SECRET}}'"):
        with pytest.raises(
            ValueError, match=rf"config: \['{option.split('=')[0]}'\] read environment variables"
        ) as error:
            load_config(config_file, [option])
        assert "hidden" not in str(error.value)
    assert load_config(config_file, ["project=run-${seed}", "seed=3"]).project == "run-3"


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("- 1", "holds a list"), ("3", "is not YAML")])
def test_files_that_are_no_settings(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "run.yaml")


def test_missing_keys_and_files_are_named(tmp_path):
    (tmp_path / "empty.yaml").write_text("steps: 3\n")
    with pytest.raises(ValueError, match=r"\['output_dir'\] must be set"):
        load_config(tmp_path / "empty.yaml")
    with pytest.raises(ValueError, match="does not exist"):
        load_config(tmp_path / "nothing.yaml")


SHIPPED = [
    path
    for path in sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
    if "tokenizer" not in path.name and "grpo" not in path.name
]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_load(path):
    """A study gives every run its own folder; the other configs name theirs."""
    config = load_config(path, ["output_dir=out"] if "study" in path.name else [])
    fine = (
        "llamagen",
        "retrofit",
        "shapes",
        "dpo",
        "vqa",
        "caption",
        "quickstart",
        "speedrun",
    )  # single codes alone, or most of the time
    assert (config.patch_schedule().relative_cost() < 0.64) != path.name.startswith(fine)


def test_the_papers_stages_by_levels(config_file):
    config = load_config(config_file, ["schedule.levels=3", "schedule.ratio=0.5", "schedule.mixed=0.1", "steps=100"])
    schedule = config.patch_schedule()
    assert [(s.patch_size, s.end) for s in schedule.stages(100)] == [(4, 25), (2, 50), (1, 100)]
    assert schedule.mixed == 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eoi_token_id": 3}, "boi_token_id, eoi_token_id: both are 3; use two different ids"),
        ({"codebook_size": 0}, "codebook_size: 0 must be a whole number of at least 1"),
        ({"text_loss_weight": -0.5}, "text_loss_weight: -0.5 must be a finite number of at least 0"),
        ({"image_loss_weight": float("inf")}, "image_loss_weight: inf must be a finite number of at least 0"),
    ],
)
def test_bad_numbers_of_a_model_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)
