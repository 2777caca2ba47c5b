"""Adapters on a frozen base that takes less memory: in bfloat16, in 4 or 8 bits."""

import pytest
import torch
from conftest import bits, generators
from safetensors.torch import load_file

from unified import UnifiedPipeline
from unified.training.config import load_config
from unified.training.loop import make_accelerator, save, set_up, train_steps
from unified.training.tracking import read_log


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
