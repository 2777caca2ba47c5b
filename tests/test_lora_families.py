"""Which layers of a family get an update, and that adapters on them train, save and load."""

import pytest
import torch
from conftest import FAMILIES, SIZES, inputs_of, logits, tiny_model

from unified.lora.adapters import attach_lora, load_lora
from unified.lora.base import base_of
from unified.lora.saving import save_lora
from unified.sequence import ImageSegment, TextSegment, build_sequence

pytestmark = pytest.mark.process

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OTHERS = {
    "phi3": ({}, ["o_proj", "qkv_proj", "gate_up_proj", "down_proj"]),
    "phi": ({}, ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]),
    "gpt_neox": ({}, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    "falcon": ({"head_dim": None}, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    "starcoder2": ({}, ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"]),
    "glm4": ({}, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "mixtral": (EXPERTS, SEVEN[:4]),  # its experts are one tensor
    "qwen2_moe": (
        {**EXPERTS, "shared_expert_intermediate_size": 16},
        SEVEN,
    ),  # without the shared expert's gate of width 1
}
TABLE = {**{family: (fields, SEVEN) for family, fields in FAMILIES.items()}}
TABLE |= {family: ({"model_type": family, **fields}, names) for family, (fields, names) in OTHERS.items()}


def family_model(family):
    fields = {**SIZES, **TABLE[family][0]}
    return tiny_model(text={name: value for name, value in fields.items() if value is not None}, positions="1d")


@pytest.mark.parametrize("family", TABLE)
def test_attention_and_mlp_of_every_family(family, tmp_path):
    """Every adapted layer gets a gradient, no router does, and the saved adapter is the trained one."""
    adapted = attach_lora(family_model(family), rank=2)
    assert set(adapted.peft_config["default"].target_modules) == set(TABLE[family][1])
    layers = {n.split(".")[-4] for n, p in adapted.named_parameters() if p.requires_grad and "lora_B" in n}
    assert layers == set(TABLE[family][1])
    config = base_of(adapted).config
    segments = [TextSegment([5, 6]), ImageSegment(torch.arange(16).reshape(4, 4)), TextSegment([7])]
    batch = inputs_of(config, build_sequence(segments, config.vocabulary))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    before = logits(adapted.eval())
    adapted.train()(**batch).loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora_B" in n)
    optimizer.step()
    trained = logits(adapted.eval())
    assert (trained - before).abs().max() > 1e-4
    save_lora(adapted, tmp_path)
    assert torch.equal(logits(load_lora(family_model(family), tmp_path, "x").eval()), trained)


@pytest.mark.parametrize("family", OTHERS)
def test_names_that_a_family_does_not_have_are_named(family):
    names = TABLE[family][1]
    unknown = sorted({*SEVEN} - {*names})
    if not unknown:
        names, unknown = [*SEVEN, "qkv_proj"], ["qkv_proj"]
        asked = names
    else:
        asked = SEVEN
    model = family_model(family)
    with pytest.raises(ValueError) as refused:
        attach_lora(model, target_modules=asked)
    text = str(refused.value)
    assert text.startswith("lora: target_modules [") and unknown[0] in text
    assert "its linear layers are" in text and all(f"'{name}'" in text for name in TABLE[family][1])
    assert not any("lora_" in name for name in model.state_dict())
