"""Averages of the weights: what they are, where they act, and that a run saves them."""

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file

from unified.lora.adapters import attach_lora
from unified.training.average import Average
from unified.training.config import load_config
from unified.training.loop import train


@torch.no_grad()
def test_an_average_follows_its_formula_and_starts_again():
    model = torch.nn.Linear(2, 2)
    average, expected = Average(model, 0.9), None
    for step in range(6):
        if step == 3:
            average.restart()
        model.weight.normal_()
        average.update()
        expected = model.weight.clone() if step in (0, 3) else 0.9 * expected + 0.1 * model.weight
        torch.testing.assert_close(average.module.weight, expected)
    trained = model.weight.clone()
    with pytest.raises(KeyError), average.in_place():
        torch.testing.assert_close(model.weight, expected)
        assert torch.equal(average.module.weight, trained)
        raise KeyError
    assert torch.equal(model.weight, trained)
    torch.testing.assert_close(average.module.weight, expected)


def test_an_adapter_has_an_average_of_its_own_weights_only():
    model = attach_lora(tiny_model(), rank=2, train_image_tables=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    average = Average(model, 0.5)
    assert {f"module.{name}" for name in trained} | {"n_averaged"} == average.state_dict().keys()
    assert sum(t.numel() for t in average.buffers()) < 0.5 * sum(p.numel() for p in model.parameters())


@pytest.mark.process
@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_saves_its_average(adapter, config_file, on_a_backbone, tmp_path):
    """Not the weights that it trained, which the checkpoint keeps beside it."""
    options = [*on_a_backbone, "lora.rank=2", "lora.train_image_tables=true"] if adapter else []
    train(
        load_config(config_file, [f"output_dir={tmp_path}", "optimizer.ema_decay=0.5", "checkpoint_every=12", *options])
    )
    checkpoint = tmp_path / "checkpoints" / "step-00000012"
    average = load_file(checkpoint / "average.safetensors")
    trained = load_file(checkpoint / ("trainable.safetensors" if adapter else "model.safetensors"))
    saved = load_file(tmp_path / ("lora/adapter_model.safetensors" if adapter else "pipeline/model/model.safetensors"))
    assert len(saved) == len(trained) == len(average) - 1
    for name, tensor in trained.items():
        short = name.replace(".default", "").replace("modules_to_save.", "")
        found = saved[name if name in saved else short]
        assert torch.equal(found, average[f"module.{name}"]) and not torch.equal(found, tensor)
