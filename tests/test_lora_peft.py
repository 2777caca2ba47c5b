"""Plain folders of peft, without our description of the base: taken if every tensor fits."""

import json

import pytest
import torch
from conftest import bits, logits, noisy_adapter, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from unified.lora.adapters import load_lora
from unified.lora.saving import save_lora

TARGETS = ["q_proj", "v_proj", "down_proj"]


def trained_by_peft(model, folder, part, **options):
    """peft alone on a unified model, its language model or the decoder in that; random weights; saved by peft."""
    inner = {"": model, "backbone": model.backbone, "backbone.model": model.backbone.model}[part]
    adapted = get_peft_model(inner, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **options))
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.normal_(0, 0.3)
    adapted.save_pretrained(folder)
    return logits(model.eval())  # with the adapter inside


@pytest.mark.process
@pytest.mark.parametrize("part", ["", "backbone", "backbone.model"])
@pytest.mark.parametrize(
    "options", [{}, {"task_type": "CAUSAL_LM"}, {"rank_pattern": {"q_proj": 2}, "use_rslora": True}]
)
def test_what_peft_saved_computes_as_there(part, options, tmp_path):
    if part == "backbone.model":
        options = {name: value for name, value in options.items() if name != "task_type"}
    wanted, before = trained_by_peft(tiny_model(), tmp_path, part, **options), bits(tiny_model())
    assert not (tmp_path / "unified_base.json").exists()
    with pytest.warns(UserWarning, match=r"has no unified_base.json .* its tensors fit this one"):
        loaded = load_lora(tiny_model(), tmp_path, "style")
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wanted, logits(tiny_model()), atol=0.01)
    assert all(
        torch.equal(value, before[name.replace(".base_layer", "")])
        for name, value in bits(loaded).items()
        if ".lora_" not in name
    )
    save_lora(loaded, tmp_path / "ours")  # says its base from now on
    assert torch.equal(logits(load_lora(tiny_model(), tmp_path / "ours" / "style", "x")), logits(loaded))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {n.replace("layers.1", "layers.5"): v for n, v in t.items()},
            r"only in the checkpoint: \S+model\.layers\.0\.mlp\S+ .* and 8 more; only in the model: ",
        ),
        (
            lambda t: {n: v for n, v in t.items() if "layers.1" not in n},
            r"only in the checkpoint: .* and 2 more; only in the model: \S+backbone\.model\.layers\.0",
        ),
        (
            lambda t: {n.replace("base_model.model.model", "model"): v for n, v in t.items()},
            "only in the checkpoint: model.",
        ),
        (
            lambda t: {n.replace("model.layers.0", "encoder.0"): v for n, v in t.items()},
            r"in the checkpoint: \S+encoder\.0",
        ),
    ],
)
def test_names_that_do_not_all_match_are_errors(change, message, tmp_path):
    trained_by_peft(tiny_model(), tmp_path, "backbone")
    file = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    model, before = tiny_model(), bits(tiny_model())
    with pytest.raises(ValueError, match=rf"lora: the tensors of .* are not those .*{message}"):
        load_lora(model, tmp_path, "style")
    assert bits(model).keys() == before.keys()


def test_other_sizes_and_described_folders_are_not_guessed(tmp_path):
    trained_by_peft(tiny_model(), tmp_path / "plain", "backbone")
    with pytest.raises(ValueError, match=r"of another shape: \S+ \(4, 64\) instead of \(4, 48\)"):
        load_lora(tiny_model(text={"intermediate_size": 48}), tmp_path / "plain", "style")
    noisy_adapter(tiny_model(), tmp_path / "ours", 0)
    file = tmp_path / "ours" / "adapter_model.safetensors"
    save_file({name.replace("backbone.", "", 1): value for name, value in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"only in the checkpoint: base_model\.model\.model\.layers"):
        load_lora(tiny_model(), tmp_path / "ours", "style")  # it says that it is ours, so its names have to be
    config = tmp_path / "plain" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "modules_to_save": ["lm_head"]}))
    with pytest.raises(ValueError, match=r"modules_to_save \['lm_head'\] is not possible"):
        load_lora(tiny_model(), tmp_path / "plain", "style")
