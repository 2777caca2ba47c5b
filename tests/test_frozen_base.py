"""Adapters on a frozen base that takes less memory: in bfloat16, in 4 or 8 bits."""

import importlib.util

import pytest
import torch
from conftest import bits, generators
from peft import PeftModel
from safetensors.torch import load_file

from unified import UnifiedPipeline
from unified.lora.base import base_of
from unified.model.quantization import quantization
from unified.training.config import load_config
from unified.training.loop import make_accelerator, save, set_up, train_steps
from unified.training.tracking import read_log

pytestmark = pytest.mark.process


def frozen(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("tables", [False, True])
def test_a_base_in_bfloat16_stays_and_its_adapter_is_float32(pipeline, config_file, tmp_path, tables):
    """The loss falls, samples are generated on the way, and the adapter works on the base in either dtype."""
    pipeline.save_pretrained(tmp_path / "base")
    config = load_config(config_file, [
        f"output_dir={tmp_path}/run", f"model.pipeline={tmp_path}/base", "model.architecture=null", "model.image_tokenizer=null",
        "model.text_tokenizer=null", "model.dtype=bfloat16", "lora.rank=4", f"lora.train_image_tables={tables}",
        "optimizer.ema_decay=null", "schedule={patch_sizes: [1], shares: [1.0]}", "sample.every=6",
        "sample.prompts=[red apple]", "steps=24", "optimizer.learning_rate=0.02",
        "validate_every=8",
    ])  # fmt: skip
    run = set_up(config, make_accelerator(config))
    before = frozen(run.current())
    assert {weight.dtype for name, weight in before.items()} == {torch.bfloat16}
    assert {p.dtype for p in run.model.parameters() if p.requires_grad} == {torch.float32}
    train_steps(run, None, lambda: False)
    after = frozen(run.current())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    folder = save(run)
    losses = [line["train_subset_loss"] for line in read_log(tmp_path / "run") if "train_subset_loss" in line]
    assert losses[-1] < losses[0] - 0.2
    assert {t.dtype for t in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 4
    for dtype in (torch.float32, torch.bfloat16):
        pipe = UnifiedPipeline.from_pretrained(tmp_path / "base", torch_dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        plain, weights = pipe("red apple", generator=7).codes, bits(pipe.model)
        pipe.load_lora_weights(folder)
        assert not torch.equal(pipe("red apple", generator=generators(7)).codes, plain)
        pipe.unload_lora_weights()
        assert all(torch.equal(weights[name], value) for name, value in bits(pipe.model).items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.dtype=bfloat16"], "model.dtype: 'bfloat16' is for a frozen base, and a new model is trained"),
        (["model.dtype=int8"], "model.dtype: 'int8' is unknown; use one of float32, bfloat16"),
        (["model.pipeline=p", "model.architecture=null", "model.dtype=bfloat16"], "model.dtype: 'bfloat16' is for the frozen base"),
        (["model.pipeline=p", "model.architecture=null", "model.quantization=2bit"], "model.quantization: '2bit' is unknown"),
        (["model.pipeline=p", "model.architecture=null", "model.quantization=4bit", "lora.rank=4"],
         "model.quantization: bitsandbytes is not installed; pip install bitsandbytes"),
        (["model.quantization=8bit"], "model.quantization: for the pipeline of an adapter; save the model as one"),
    ],
)  # fmt: skip
def test_what_is_no_frozen_base_is_refused(config_file, overrides, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        load_config(config_file, ["output_dir=x", "optimizer.ema_decay=null", *overrides])
    for kind, reason in (
        ("4bit", "bitsandbytes is not installed"),
        ("3bit", "'3bit' is unknown; use one of 4bit, 8bit"),
    ):
        with pytest.raises(ValueError, match=f"quantization: {reason}"):
            quantization(kind)


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_an_adapter_on_a_base_in_few_bits(kind, pipeline, config_file, tmp_path):
    """Needs bitsandbytes, which computes in 8 bits on a CPU, too."""
    pytest.importorskip("bitsandbytes")
    pipeline.save_pretrained(tmp_path / "base")
    config = load_config(config_file, [
        f"output_dir={tmp_path}/run", f"model.pipeline={tmp_path}/base", "model.architecture=null", "model.image_tokenizer=null",
        "model.text_tokenizer=null", f"model.quantization={kind}", "lora.rank=4", "lora.train_image_tables=true",
        "optimizer.ema_decay=null", "schedule={patch_sizes: [1], shares: [1.0]}", "checkpoint_every=null",
        "optimizer.learning_rate=0.02", "steps=16", "validate_every=8",
    ])  # fmt: skip
    run = set_up(config, make_accelerator(config))
    linear = {type(module).__name__ for module in base_of(run.current()).modules()}
    assert {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[kind] in linear and isinstance(run.current(), PeftModel)
    assert {p.dtype for p in run.model.parameters() if p.requires_grad} == {torch.float32}
    if kind == "4bit":  # bitsandbytes' own layout of them for CPUs does not bear going from evaluation to training
        return
    train_steps(run, None, lambda: False)
    losses = [line["train_subset_loss"] for line in read_log(tmp_path / "run") if "train_subset_loss" in line]
    assert losses[-1] < losses[0] - 0.1
    folder = save(run)
    pipe = UnifiedPipeline.from_pretrained(tmp_path / "base", quantization_config=quantization(kind))
    pipe.set_progress_bar_config(disable=True)
    plain = pipe("red apple", generator=7).codes
    pipe.load_lora_weights(folder)
    assert not torch.equal(pipe("red apple", generator=7).codes, plain)
    with pytest.raises(ValueError, match="fuse_lora: the base is in 4 or 8 bits"):
        pipe.fuse_lora()


def test_a_language_model_in_bfloat16_gets_tables_and_is_kept(config_file, on_a_backbone, tmp_path):
    """The pipeline that the run keeps is the base that it trains on, and has the run's sampling defaults."""
    options = [f"output_dir={tmp_path}/run", *on_a_backbone, "model.dtype=bfloat16", "lora.rank=4", "sampling.top_k=4",
               "optimizer.ema_decay=null"]  # fmt: skip
    run = set_up(load_config(config_file, options), make_accelerator(load_config(config_file, options)))
    base = UnifiedPipeline.from_pretrained(tmp_path / "run" / "base", torch_dtype="auto")
    assert base.dtype == torch.bfloat16 and base.sampling == {"top_k": 4} == run.pipeline().sampling
    kept = dict(base.model.named_parameters())
    for name, weight in frozen(base_of(run.current())).items():
        name = name.replace(".base_layer", "").replace(".original_module", "")
        assert torch.equal(weight, kept[name]), name
