"""Training: stages, what a run leaves behind, and the recipe through a real launch."""

import json
import math
import shutil

import pytest
import torch
from conftest import generators, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from unified import UnifiedPipeline
from unified.data.code_cache import load_codes
from unified.lora.base import base_of
from unified.training.average import Average
from unified.training.config import OptimizerConfig, load_config
from unified.training.loop import train
from unified.training.optimizer import build_optimizers
from unified.training.tracking import read_log
from unified.training.validation import image_loss


def test_launched_run_leaves_what_it_should(finished):
    log = read_log(finished)
    steps = [r for r in log if "image_loss" in r]
    assert [r["patch_size"] for r in steps] == [4] * 3 + [2] * 3 + [1] * 6
    checks = [r for r in log if "validation_loss" in r]
    assert [r["step"] for r in checks] == [6, 12]
    assert checks[-1]["train_subset_loss"] < math.log(20)
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]
    assert (finished / "samples" / "step-00000012.png").is_file()
    assert list(finished.rglob("events.out.tfevents*"))
    pipe = UnifiedPipeline.from_pretrained(finished / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("red apple", generator=generators(0)).images[0].size == (16, 16)


def test_cost_counts_positions(finished, text_tokenizer):
    """Cumulative positions: text tokens plus 16 / p^2 per image."""
    costs = [r["positions"] for r in read_log(finished) if "image_loss" in r]
    per_step = [b - a for a, b in zip([0, *costs], costs, strict=False)]
    image_positions = [4 * 1] * 3 + [4 * 4] * 3 + [4 * 16] * 6
    text_positions = [total - image for total, image in zip(per_step, image_positions, strict=True)]
    assert all(4 * 3 <= text <= 4 * (3 + 14) for text in text_positions)  # <bos>, caption, <boi>, <eoi>


@pytest.mark.process
def test_mixed_steps_train_coarser_patches(config_file, tmp_path):
    """With half of the steps mixed, every second step of the fine stage goes back to p = 2, and costs and says so."""
    options = ["schedule.patch_sizes=[2,1]", "schedule.shares=[0.5,0.5]", "schedule.mixed=0.5", "data.caption_dropout=1",
               "validate_every=null", "checkpoint_every=null", "optimizer.ema_decay=null"]  # fmt: skip
    train(load_config(config_file, [f"output_dir={tmp_path}", *options]))
    log = read_log(tmp_path)
    assert [record["patch_size"] for record in log] == [2] * 6 + [1, 2] * 3
    positions = [record["positions"] for record in log]
    per_step = [b - a for a, b in zip([0, *positions[:-1]], positions, strict=True)]
    assert per_step == [4 * (3 + 16 // record["patch_size"] ** 2) for record in log]  # <bos> <boi> codes <eoi>
    assert UnifiedPipeline.from_pretrained(tmp_path / "pipeline").model.config.patch_sizes == [1, 2]


@pytest.mark.process
def test_average_starts_anew_with_every_stage(config_file, tmp_path, monkeypatch):
    update, equal = Average.update, []

    def recorded(self):
        update(self)
        pairs = zip(self.module.buffers(), self._weights, strict=True)
        equal.append(all(torch.equal(ours, theirs) for ours, theirs in pairs))

    monkeypatch.setattr(Average, "update", recorded)
    train(load_config(config_file, [f"output_dir={tmp_path}", "validate_every=null", "checkpoint_every=null"]))
    assert [step for step, same in enumerate(equal) if same] == [0, 3, 6] and len(equal) == 12


def test_sample_prompts_are_checked_before_training(config_file, tmp_path):
    options = [f"output_dir={tmp_path}", "sample.every=6"]
    with pytest.raises(ValueError, match=r"sample\.prompts: empty"):
        load_config(config_file, options)
    with pytest.raises(ValueError, match=r"sample\.prompts: \d+ tokens, the model has room for"):
        train(load_config(config_file, [*options, f"sample.prompts=[{'apple ' * 200}]"]))
    assert read_log(tmp_path) == []


def test_lora_run_on_a_pipeline(finished, config_file, parts, tmp_path):
    override = [f"output_dir={tmp_path}", f"model.pipeline={finished}/pipeline", "model.architecture=null", "lora.rank=4",
                "optimizer.ema_decay=null", "schedule.patch_sizes=[2,1]", "schedule.shares=[0.5,0.5]"]  # fmt: skip
    folder = train(load_config(config_file, override))
    assert folder.name == "lora"
    pipe = UnifiedPipeline.from_pretrained(finished / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    ids = torch.tensor([[1, *pipe.text_tokenizer.encode("red apple")]])
    base = pipe.model(ids).logits
    pipe.load_lora_weights(folder)
    assert (pipe.model(ids).logits - base).abs().max() > 0.01
    pipe.unload_lora_weights()
    assert torch.equal(pipe.model(ids).logits, base)


@pytest.mark.process
def test_captioning_and_muon_run_learns_both_ways(config_file, tmp_path):
    override = ["steps=60", "validate_every=60", "checkpoint_every=null", "optimizer.name=muon", "data.captioning=0.5",
                "data.caption_dropout=0", "schedule.patch_sizes=[2,1]", "schedule.shares=[0.5,0.5]", "batch_size=12"]  # fmt: skip
    train(load_config(config_file, [f"output_dir={tmp_path}", *override]))
    log = read_log(tmp_path)
    final = log[-1]
    assert final["train_subset_loss"] < 1.5 < math.log(20)
    assert final["caption_loss"] < 0.5 * log[0]["text_loss"]


@pytest.mark.process
def test_figures_are_measured_while_training(config_file, tmp_path):
    """Every second step of the last stage; training itself is what it is without."""
    sizes = []

    def measure(pipeline):
        sizes.append(pipeline("red apple", generator=generators(0)).images[0].size)
        return {"metric": float(len(sizes))}

    options = ["evaluation.every=2", "evaluation.data=d", "evaluation.clip=c", "checkpoint_every=null"]
    train(load_config(config_file, [f"output_dir={tmp_path}/measured", *options]), measure)
    log = read_log(tmp_path / "measured")
    assert [(r["step"], r["metric"]) for r in log if "metric" in r] == [(8, 1.0), (10, 2.0), (12, 3.0)]
    assert sizes == [(16, 16)] * 3
    train(load_config(config_file, [f"output_dir={tmp_path}/plain", "checkpoint_every=null"]))
    ours, plain = (load_file(tmp_path / name / "pipeline/model/model.safetensors") for name in ("measured", "plain"))
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.process
def test_packed_run_equals_the_padded_one(config_file, tmp_path):
    """Both directions, so lengths differ; the same documents are learned in every step, in fewer rows."""
    options = ["steps=6", "validate_every=6", "checkpoint_every=null", "data.captioning=0.5", "optimizer.ema_decay=null",
               "schedule.patch_sizes=[2,1]", "schedule.shares=[0.5,0.5]", "batch_size=6"]  # fmt: skip
    for name, pack in (("padded", "null"), ("packed", "64")):
        train(load_config(config_file, [f"output_dir={tmp_path}/{name}", f"data.pack={pack}", *options]))
    ours, theirs = (load_file(tmp_path / name / "pipeline/model/model.safetensors") for name in ("packed", "padded"))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-5)
    ours, theirs = (read_log(tmp_path / name) for name in ("packed", "padded"))
    assert [r.get("positions") for r in ours] == [r.get("positions") for r in theirs]
    with pytest.raises(ValueError, match=r"data.pack: 8 is shorter than a sequence of \d+ tokens"):
        train(load_config(config_file, [f"output_dir={tmp_path}/short", "data.pack=8", *options]))


def test_muon_takes_the_decoders_matrices_only():
    model = tiny_model()
    adamw, muon = build_optimizers(model, OptimizerConfig(name="muon"))
    names = {id(p): name for name, p in model.named_parameters()}
    of_muon = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    of_adamw = {names[id(p)] for g in adamw.param_groups for p in g["params"]}
    assert of_muon | of_adamw == set(names.values()) and not of_muon & of_adamw
    assert {name.rsplit(".", 2)[-2] for name in of_muon} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    decays = {g["weight_decay"]: {names[id(p)].split(".")[-2] for p in g["params"]} for g in adamw.param_groups}
    assert "image_head" in decays[0.05] and "norm" in decays[0.0]


@pytest.mark.process
def test_images_are_encoded_on_the_way(config_file, parts, picture_source, tmp_path):
    options = [
        f"output_dir={tmp_path}",
        f"data.train={picture_source}",
        "steps=3",
        "validate_every=3",
        "checkpoint_every=null",
    ]
    train(load_config(config_file, options))
    ours, direct = (load_codes(folder, "train", None)["codes"] for folder in (tmp_path / "codes", parts / "codes"))
    assert [row.tolist() for row in ours] == [row.tolist() for row in direct]
    assert (tmp_path / "codes-validation" / "codes.json").is_file()
    changes = ["data.image_size=32", "data.caption_column=text"]
    with pytest.raises(
        ValueError, match=r"codes' was made with other settings \(image_size: 16 then, 32 now; columns: "
    ):
        train(load_config(config_file, [*options, *changes]))


def test_codes_of_another_tokenizer_are_refused(config_file, parts, tmp_path):
    description = json.loads((parts / "codes" / "codes.json").read_text())
    shutil.copytree(parts / "codes", tmp_path / "codes")
    (tmp_path / "codes" / "codes.json").write_text(json.dumps({**description, "tokenizer_fingerprint": "abc"}))
    with pytest.raises(ValueError, match="was made with tokenizer abc"):
        train(load_config(config_file, [f"output_dir={tmp_path}/run", f"data.train={tmp_path}/codes"]))


@pytest.mark.process
def test_adapter_on_a_language_model_loads_into_the_kept_base(
    config_file, parts, tmp_path, transformers_backbone, on_a_backbone
):
    """A pretrained backbone gets image tables and an adapter; base and adapter make the trained model again."""
    options = [f"output_dir={tmp_path}/run", *on_a_backbone, "lora.rank=4",
               "optimizer.ema_decay=null", "checkpoint_every=null"]  # fmt: skip
    folder = train(load_config(config_file, options))
    pipe = UnifiedPipeline.from_pretrained(tmp_path / "run" / "base")
    assert pipe.model.config.new_image_tables  # the base's own are as they were made
    base_named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base_named == str(tmp_path / "run" / "base")
    plain = AutoModelForCausalLM.from_pretrained(transformers_backbone).eval()
    ids = torch.tensor([[1, 5, 6, 7]])
    assert torch.equal(pipe.model(ids).logits, plain(ids).logits)
    pipe.load_lora_weights(folder)
    rows, config = load_codes(parts / "codes", "train", None), base_of(pipe.model).config
    log = read_log(tmp_path / "run")
    loss = image_loss(pipe.model, rows, pipe.text_tokenizer, config, 4, torch.device("cpu"))
    assert loss < log[0]["image_loss"] - 0.2
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "fused")
    assert not UnifiedPipeline.from_pretrained(tmp_path / "fused").model.config.new_image_tables
    pipe.unload_lora_weights()
    assert torch.equal(pipe.model(ids).logits, plain(ids).logits)
