"""Training class-conditional models: from a folder for each class to images by name."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import generators
from forking import torchrun
from PIL import Image
from safetensors.torch import load_file

from unified import UnifiedConfig, UnifiedForCausalLM, UnifiedPipeline
from unified.model.prefix import BOI, EOI, NO_TEXT
from unified.prediction.schedule import image_flops, schedule_flops
from unified.training.config import load_config
from unified.training.data import open_data
from unified.training.loop import train
from unified.training.sources import Context
from unified.training.tracking import read_log

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"blue": (30, 40, 220), "green": (20, 200, 40), "red": (220, 30, 20)}


@pytest.fixture(scope="module")
def class_folder(tmp_path_factory):
    """Noisy images of three colours, a folder for each; held out are two of the colours."""
    root, rng = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for split, names, count in (("train", ["blue", "green", "red"], 4), ("val", ["green", "red"], 2)):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(np.array(COLOURS[name]) + rng.normal(0, 12, (20, 18, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def class_config(parts, class_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(f"""
steps: 6
batch_size: 3
log_every: 1
validate_every: 6
track_with: []
data: {{train: {class_folder}, caption_dropout: 0.3, image_size: 16}}
model:
  image_tokenizer: {parts}/image_tokenizer
  architecture: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
                  max_position_embeddings: 128, attention_dropout: 0.1}}
  options: {{conditioning: {{kind: class, classes: 3}}, dropout: 0.1}}
schedule: {{patch_sizes: [4, 2, 1], shares: [0.34, 0.33, 0.33]}}
optimizer: {{learning_rate: 0.01}}
""")
    return path


@pytest.fixture(scope="module")
def trained(class_config, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    options = ["data.crops=3", "data.one_view=true", "sample.every=6", "sample.class_labels=[green,2]"]
    train(load_config(class_config, [f"output_dir={output}", *options]))
    return output


@pytest.mark.process
def test_a_run_from_folders_to_named_images(trained):
    log = read_log(trained)
    steps = [record for record in log if "image_loss" in record]
    assert [record["patch_size"] for record in steps] == [4, 4, 2, 2, 1, 1]
    costs = [record["positions"] for record in steps]
    assert [after - before for before, after in zip([0, *costs], costs, strict=False)] == [
        3 * (1 + n) for n in (1, 1, 4, 4, 16, 16)
    ]
    (checks,) = [record for record in log if "validation_loss" in record]
    assert 0 < checks["validation_loss"] < 2 * math.log(20) and "train_subset_loss" in checks
    assert (trained / "samples" / "step-00000006.png").is_file()
    pipe = UnifiedPipeline.from_pretrained(trained / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.labels == {"blue": 0, "green": 1, "red": 2} and pipe.default_size == (16, 16)
    card = (trained / "pipeline" / "README.md").read_text()
    assert "pipe(class_labels=0, guidance_scale=2.0)" in card and "one of 3 classes" in card
    by_name = pipe(class_labels=["red", "blue"], generator=generators(0, 1), output_type="codes").codes
    assert torch.equal(by_name, pipe(class_labels=[2, 0], generator=generators(0, 1), output_type="codes").codes)


@pytest.mark.process
def test_codes_know_names_and_a_split_may_lack_classes(trained):
    for folder, rows in (("codes", 12 * 3), ("codes-validation", 4)):
        described = json.loads((trained / folder / "codes.json").read_text())
        assert described["kind"] == "labelled" and "caption" not in described
        assert sum(split["used"] for split in described["rows"].values()) * (3 if folder == "codes" else 1) == rows


def test_held_out_classes_are_found_by_name(class_config, parts, tmp_path):
    """The held-out folder holds green and red alone, whose numbers there are 0 and 1."""
    from accelerate import Accelerator
    from conftest import tiny_config

    from unified_tokenizers import AutoImageTokenizer

    config = load_config(class_config, [f"output_dir={tmp_path}"])
    tokenizer = AutoImageTokenizer.from_pretrained(parts / "image_tokenizer")
    model_config = tiny_config(conditioning={"kind": "class", "classes": 3})
    data = open_data(Context(Accelerator(), config, tokenizer, None, model_config))
    assert model_config.class_names == ["blue", "green", "red"]
    assert [int(row["label"]) for row in data.rows["validation"]] == [1, 1, 2, 2]
    assert [int(row["label"]) for row in data.rows["train"]] == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.process
def test_classes_are_learned(class_config, tmp_path):
    """After a few steps an image is likelier after its own class than after another."""
    options = ["steps=40", "batch_size=6", "validate_every=null", "schedule.patch_sizes=[2,1]", "schedule.shares=[0.5,0.5]",
               "model.options.dropout=0", "model.architecture.attention_dropout=0", "data.caption_dropout=0.1"]  # fmt: skip
    train(load_config(class_config, [f"output_dir={tmp_path}", *options]))
    pipe = UnifiedPipeline.from_pretrained(tmp_path / "pipeline")
    from unified.data.batches import make_batch
    from unified.data.code_cache import load_codes
    from unified.data.labelled import labelled_sequence

    rows, losses = load_codes(tmp_path / "codes", "train", None, "labelled"), torch.empty(3, 3)
    config, rng = pipe.model.config, np.random.default_rng(0)
    for own in range(3):
        for label in range(3):
            sequences = [
                labelled_sequence({**rows[4 * own + i], "label": label}, rng, config.vocabulary, 3) for i in range(4)
            ]
            with torch.no_grad():
                losses[own, label] = pipe.model(**make_batch(sequences, config).inputs).image_loss
    assert losses.argmin(dim=1).tolist() == [0, 1, 2], losses


@pytest.mark.process
@pytest.mark.parametrize(
    "order", [["prediction.order=spread"], ["prediction.merge=channel"], ["prediction.order=random"]]
)
def test_orders_and_merges(class_config, order, tmp_path):
    options = [f"output_dir={tmp_path}", *order, "steps=2", "validate_every=2",
               "schedule.patch_sizes=[1]", "schedule.shares=[1]"]  # fmt: skip
    pipe = UnifiedPipeline.from_pretrained(train(load_config(class_config, options)))
    pipe.set_progress_bar_config(disable=True)
    assert int(pipe(class_labels="red", generator=generators(0), output_type="codes").codes.min()) >= 0


@pytest.mark.process
def test_a_resumed_run_is_the_one_that_was_not_stopped(class_config, tmp_path):
    """With dropout of the class and of activations, and a view chosen for every image."""
    options = ["data.crops=3", "data.one_view=true", "validate_every=null", "checkpoint_every=3", "keep_checkpoints=2"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(load_config(class_config, [f"output_dir={whole}", *options]))
    shutil.copytree(whole, again)
    shutil.rmtree(again / "pipeline")
    shutil.rmtree(again / "checkpoints" / "step-00000006")
    train(load_config(class_config, [f"output_dir={again}", *options, "resume=latest"]))
    ours, theirs = (load_file(folder / "pipeline/model/model.safetensors") for folder in (again, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.process
def test_sources_of_classes_are_mixed(class_config, class_folder, tmp_path):
    """Classes are found by name in each; a source of texts is refused."""
    (tmp_path / "more" / "train").mkdir(parents=True)
    for name in ("green", "red"):
        shutil.copytree(class_folder / "train" / name, tmp_path / "more" / "train" / name)
    sources = f"[{{path: {class_folder}, validation_split: validation}},{{path: {tmp_path}/more}}]"
    options = [f"output_dir={tmp_path}/run", "data.train=null", f"data.sources={sources}"]
    train(load_config(class_config, options))
    assert "image_validation_loss" in read_log(tmp_path / "run")[-1]
    wrong = [*options[:2], f"data.sources=[{{path: {tmp_path}/more, kind: text, validation_split: train}}]"]
    with pytest.raises(ValueError, match=r"data.sources.kind: not for a class-conditional model"):
        train(load_config(class_config, [f"output_dir={tmp_path}/wrong", *wrong[1:]]))


@pytest.mark.process
def test_two_processes_equal_one(class_config, tmp_path):
    """No text is in the loss; DDP raises if a weight has no gradient."""
    options = ["validate_every=null", "model.options.dropout=0", "model.architecture.attention_dropout=0"]
    given = ["--config", class_config, f"output_dir={tmp_path}/two", "batch_size=2", *options]
    done = torchrun(2, "recipes/train.py", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    train(load_config(class_config, [f"output_dir={tmp_path}/one", "batch_size=4", *options]))
    ours, theirs = ([(r["image_loss"], r["positions"]) for r in read_log(tmp_path / name)] for name in ("two", "one"))
    assert len(ours) == 6 and np.array(ours) == pytest.approx(np.array(theirs), rel=1e-5)


@pytest.mark.process
@pytest.mark.parametrize("way", ["", "lora: {rank: 2}", "prediction: {order: spread}"])
def test_a_pipeline_is_trained_on(trained, class_folder, way, tmp_path):
    (tmp_path / "run.yaml").write_text(f"""
output_dir: {tmp_path}/run
steps: 2
batch_size: 2
track_with: []
data: {{train: {class_folder}, image_size: 16}}
model: {{pipeline: {trained}/pipeline}}
schedule: {{patch_sizes: [1], shares: [1]}}
{way}
""")
    folder = train(load_config(tmp_path / "run.yaml"))
    pipe = UnifiedPipeline.from_pretrained(trained / "pipeline" if "lora" in way else folder)
    pipe.set_progress_bar_config(disable=True)
    if "lora" in way:
        pipe.load_lora_weights(folder)
    assert pipe.labels == {"blue": 0, "green": 1, "red": 2}
    assert int(pipe(class_labels="red", generator=generators(0), output_type="codes").codes.min()) >= 0
    with pytest.raises(ValueError, match=r"model.options.conditioning: a pipeline has its own; leave it out"):
        load_config(tmp_path / "run.yaml", ["model.options.conditioning={kind: class, classes: 4}"])


@pytest.mark.process
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.pack=64"], "condition: not possible in packed rows; leave data.pack out"),
        (["data.captioning=0.5"], "data.captioning: not for a class-conditional model"),
        (["data.train_on_captions=true"], "data.train_on_captions: not for a class-conditional model"),
        (["data.class_column=kind"], "class_column: 'kind' is not a column of the source"),
        (["model.options.conditioning.classes=5"], "conditioning.classes: 5, but .* has 3 classes; set it to 3"),
        (["sample.every=6", "sample.class_labels=[grene]"], "class_labels: no class is called 'grene'; did you mean 'green'"),
        (["sample.every=6", "sample.class_labels=[7]"], "sample.class_labels: 7 is not one of the 3 classes"),
        (["sample.every=6", "sample.prompts=[red]"], "sample.prompts: not for a class-conditional model"),
        (["model.architecture.max_position_embeddings=16"], "the backbone has 16 positions, an image of 4x4 codes needs 17"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_with_classes_are_named(class_config, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(load_config(class_config, [f"output_dir={tmp_path}", *options]))
    assert read_log(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.text_tokenizer=t"], "model.options.conditioning: a class-conditional model reads no text"),
        (
            ["model.options.conditioning.kind=features"],
            r"\['length', 'features'\] missing for kind 'features'|cannot be trained",
        ),
        (["model.options.conditioning.classes=0"], "conditioning.classes: 0 must be a whole number in"),
        (["model.options.conditioning=klass"], "conditioning: kind 'klass' cannot be trained here; use class"),
        (["model.options.dropout=1"], r"dropout: 1 must be a number in \[0, 1\)"),
        (["data.one_view=true", "data.bucket=true"], "data.bucket: not possible with data.one_view"),
        (
            ["sample.every=1", "sample.prompts=[a]", "sample.class_labels=[1]"],
            "sample.class_labels: a model reads prompts or",
        ),
    ],
)
def test_bad_settings_are_named(class_config, options, message):
    with pytest.raises(ValueError, match=message):
        load_config(class_config, ["output_dir=out", *options])


def test_classes_for_a_model_of_text_are_refused(config_file, tmp_path):
    with pytest.raises(ValueError, match=r"data.class_column: 'kind' is for a class-conditional model"):
        train(load_config(config_file, [f"output_dir={tmp_path}", "data.class_column=kind"]))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("npp_c2i_b", 111), ("npp_c2i_l", 343), ("npp_c2i_xl", 775), ("npp_c2i_xxl", 1411), ("llamagen_c2i_b", 111)],
)
def test_the_papers_sizes_and_what_their_files_say(name, millions):
    """Parameters as published; steps, positions and FLOPs in the header as the formula has them."""
    path = ROOT / "recipes" / "configs" / f"{name}.yaml"
    config, header = load_config(path), path.read_text()
    architecture = {**config.model.architecture, **NO_TEXT}
    model_config = UnifiedConfig(
        text_config=architecture, codebook_size=16384, boi_token_id=BOI, eoi_token_id=EOI, **config.model.options
    )
    with torch.device("meta"):
        model = UnifiedForCausalLM(model_config)
    assert round(model.num_parameters() / 1e6) == millions
    batch = config.batch_size * config.processes
    assert batch == 256 and config.steps == round(300 * 1281167 / batch)
    stated = re.search(r"A step: (.+)\.", header)[1]
    for patch_size in config.schedule.patch_sizes:
        flops = batch * image_flops(model_config, (16, 16), 0, patch_size) / 1e12
        assert f"{256 * batch // patch_size**2:,} positions and {flops:.3g} TFLOPs at p = {patch_size}" in stated
    whole = config.steps * batch * schedule_flops(config.patch_schedule(), model_config, (16, 16), 0)
    assert f"images: {whole:.2g} FLOPs".replace("e+", "e") in header


@pytest.mark.process
def test_the_papers_configuration_starts_on_two_cores(parts, class_folder, tmp_path):
    """recipes/configs/npp_c2i_b.yaml with a tiny width and few images, by overrides alone."""
    options = [
        f"output_dir={tmp_path}", f"data.train={class_folder}", f"data.validation={class_folder}", "data.image_size=16",
        "data.num_workers=0", "data.one_view=false", f"model.image_tokenizer={parts}/image_tokenizer",
        "model.architecture.hidden_size=32", "model.architecture.intermediate_size=64", "model.architecture.num_hidden_layers=2",
        "model.architecture.num_attention_heads=4", "model.options.conditioning.classes=3", "steps=4", "batch_size=3",
        "processes=1", "mixed_precision='no'", "log_every=1", "validate_every=4", "checkpoint_every=null", "track_with=[]",
    ]  # fmt: skip
    folder = train(load_config(ROOT / "recipes" / "configs" / "npp_c2i_b.yaml", options))
    steps = [record for record in read_log(tmp_path) if "image_loss" in record]
    assert [record["patch_size"] for record in steps] == [2, 2, 1, 1]
    weights = load_file(folder / "model" / "model.safetensors")
    assert weights["condition.table.weight"].shape == (4, 32)
