"""Adapters from folders: whole or not at all, and the model is as before when one is refused."""

import json
import shutil

import pytest
import torch
from conftest import bits, generators, logits, noisy_adapter, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from unified import UnifiedForCausalLM, UnifiedPipeline
from unified.lora.adapters import attach_lora, load_lora
from unified.lora.base import base_of
from unified.lora.saving import save_lora
from unified.lora.switching import adapter_state, set_adapters

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path):
    noisy_adapter(tiny_model(), tmp_path / "a", 0, train_image_tables=True)
    return tmp_path / "a"


def changed_tensors(folder, change):
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def changed_config(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def cut(folder):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def half(tensors):
    return {name: value for name, value in tensors.items() if "lora_A" not in name}


BROKEN = {
    "names of another trainer": (
        lambda folder: changed_tensors(folder, lambda t: {f"transformer.{n}": v for n, v in t.items()}),
        r"only in the checkpoint: transformer\.base_model.* and \d+ more; only in the model: base_model\.model\.backbone",
    ),
    "half of its tensors": (
        lambda folder: changed_tensors(folder, half),
        r"\(only in the model: \S+layers\.0\.mlp\.down_proj\.lora_A\.weight, .* and 10 more\)",
    ),
    "one tensor too many": (
        lambda folder: changed_tensors(folder, lambda t: t | {"base_model.extra": torch.zeros(2)}),
        r"\(only in the checkpoint: base_model\.extra\)",
    ),
    "another rank": (
        lambda folder: changed_config(folder, r=2),
        r"of another shape: \S+down_proj\.lora_A\.weight \(4, 64\) instead of \(2, 64\)",
    ),
    "image tables of another size": (
        lambda folder: changed_tensors(folder, lambda t: t | {"base_model.model.image_head.weight": torch.zeros(3, 32)}),
        r"\(of another shape: base_model\.model\.image_head\.weight \(3, 32\) instead of \(20, 32\)\)",
    ),
    "a file that is cut short": (cut, "is not a safetensors file"),
    "a config that is no JSON": (lambda folder: (folder / CONFIG).write_text("{"), f"{CONFIG}' is no JSON"),
    "a config that is a list": (lambda folder: (folder / CONFIG).write_text("[]"), f"{CONFIG}' holds a list"),
    "a config nested too deep": (lambda folder: (folder / CONFIG).write_text("[" * 100_000), f"{CONFIG}' is no JSON"),
    "an unknown modality": (
        lambda folder: (folder / "unified_base.json").write_text('{"modality": "sound"}'),
        "modality: 'sound' is unknown",
    ),
}  # fmt: skip


@pytest.mark.process
@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("beside", [False, True])
def test_a_broken_adapter_changes_nothing(beside, broken, adapter, tmp_path):
    model, whole = tiny_model(), shutil.copytree(adapter, tmp_path / "whole")
    if beside:
        model = load_lora(model, whole, "first")
        set_adapters(model, ["first"], [0.5])
    breaks, message = BROKEN[broken]
    breaks(adapter)
    before, wanted, modules = bits(model), logits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        load_lora(model, adapter, "second")
    after = bits(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert modules == [name for name, _ in model.named_modules()] and torch.equal(logits(model), wanted)
    if beside:
        assert adapter_state(model).weights == {"first": 0.5} and list(model.peft_config) == ["first"]
    loaded = load_lora(model, whole, "second")  # the name is free
    assert torch.equal(logits(loaded), logits(load_lora(tiny_model(), whole, "x")))


def test_a_pipeline_that_refuses_an_adapter_is_saved_as_it_was(pipeline, tmp_path):
    """The first adapter is refused, then a later one is: plain weights, then the old adapter at its weight."""
    codes = lambda pipe: pipe("red apple", generator=generators(0)).codes  # noqa: E731
    pipeline.model = noisy_adapter(pipeline.model, tmp_path / "whole", 0)
    cut(shutil.copytree(tmp_path / "whole", tmp_path / "cut"))
    base = codes(pipeline)
    for folder, name in ((tmp_path / "cut", "a"), (tmp_path / "whole", "style-v1.5")):
        with pytest.raises(ValueError, match=r"safetensors|adapter_name: 'style-v1\.5' is not possible"):
            pipeline.load_lora_weights(folder, name)
    assert pipeline.get_active_adapters() == []
    pipeline.save_pretrained(tmp_path / "saved")
    saved = UnifiedPipeline.from_pretrained(tmp_path / "saved")
    saved.set_progress_bar_config(disable=True)
    assert torch.equal(codes(saved), base)
    pipeline.load_lora_weights(tmp_path / "whole", "a")
    pipeline.set_adapters("a", 0.5)
    wanted = codes(pipeline)
    with pytest.raises(ValueError, match="safetensors"):
        pipeline.load_lora_weights(tmp_path / "cut", "b")
    assert pipeline.get_active_adapters() == ["a"] and torch.equal(codes(pipeline), wanted)
    save_lora(pipeline.model, tmp_path / "again")
    assert [folder.name for folder in (tmp_path / "again").iterdir() if folder.is_dir()] == ["a"]
    before, after = (load_file(tmp_path / folder / WEIGHTS) for folder in ("whole", "again/a"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.process
@pytest.mark.parametrize("name", ["style-v1.5", "", "a/b", "..", "model", "layers", "0", "keys", "train", "a\nb"])
def test_names_that_cannot_name_modules_are_refused(name, adapter):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"adapter_name: .* is not possible"):
        load_lora(model, adapter, name)
    assert isinstance(load_lora(model, adapter, "my style-2").get_base_model(), UnifiedForCausalLM)


@pytest.mark.process
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": r"(\w+|\.)+\$"}, r"target_modules '.*' is not possible; it must be a list of names"),
        ({"target_modules": "all-linear"}, "target_modules 'all-linear' is not possible; it must be a list of names"),
        ({"target_modules": ["q_proj", "(.*)+x"]}, "target_modules .* is not possible; it must be a list of names"),
        ({"target_modules": []}, r"target_modules \[\] is not possible"),
        ({"target_modules": None}, "target_modules None is not possible"),
        ({"target_modules": [f"q_{i}" for i in range(10**4)]}, r"target_modules \['q_0', .* are no modules of Llama"),
        ({"exclude_modules": "(a+)+b"}, "exclude_modules '.*' is not possible"),
        ({"modules_to_save": ["(.*)*x"]}, "modules_to_save .* is not possible"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save .* must be null or a list of"),
        ({"rank_pattern": {"(a+)+b": 3}}, "rank_pattern .* is not possible; it must be a rank for each"),
        ({"rank_pattern": {"nothing": 3}}, r"rank_pattern \['nothing'\] are no modules of Llama"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern .* is not possible"),
        ({"layers_to_transform": list(range(10**4))}, r"layers_to_transform \[0, .* is outside the 2 layers"),
        ({"layers_to_transform": [-1]}, r"layers_to_transform \[-1\] is outside the 2 layers"),
        ({"layers_pattern": "(a+)+b", "layers_to_transform": [0]}, "layers_pattern '.*' is not supported; leave it out"),
        ({"layer_replication": [[0, 10**6]]}, "layer_replication .* is not supported"),
        ({"r": 10**6}, "r 1000000 is not possible; it must be a whole number from 1 to 65536"),
        ({"r": 65536}, r"of another shape: \S+ \(4, 64\) instead of \(65536, 64\)"),
        ({"r": -4}, "r -4 is not possible"),
        ({"r": 0}, "r 0 is not possible"),
        ({"r": True}, "r True is not possible"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan is not possible; it must be a number above 0"),
        ({"lora_dropout": 1.5}, "lora_dropout 1.5 is not possible"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices \[1\] is not supported"),
        ({"megatron_core": "os"}, "megatron_core 'os' is not supported"),
        ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS' is not possible; it must be null or CAUSAL_LM"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not possible; it must be LORA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not possible; .* the others change the base"),
    ],
)  # fmt: skip
def test_a_config_that_asks_for_too_much_is_refused(fields, message, adapter):
    changed_config(adapter, **fields)
    model = tiny_model()
    names = list(bits(model))
    with pytest.raises(ValueError, match=f"(?s)lora: .*{message}"):
        load_lora(model, adapter, "x")
    assert list(bits(model)) == names


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "eva", "loftq", "lora_ga", "mica", None])
def test_starts_that_change_the_base_are_refused(init):
    model, before = tiny_model(), bits(tiny_model())
    with pytest.raises(ValueError, match=f"init_lora_weights {init!r} is not possible; .* the others change the base"):
        attach_lora(model, rank=4, init_lora_weights=init)
    after = bits(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_starts_that_leave_the_base_alone(init, tmp_path):
    adapted = attach_lora(tiny_model(), rank=4, init_lora_weights=init)
    base = {n.replace(".base_layer", ""): v for n, v in base_of(adapted).state_dict().items() if ".lora_" not in n}
    before = bits(tiny_model())
    assert before.keys() == base.keys() and all(torch.equal(before[name], base[name]) for name in before)
    save_lora(adapted, tmp_path)
    assert torch.equal(logits(load_lora(tiny_model(), tmp_path, "x")), logits(adapted.eval()))


def test_fields_of_peft_that_are_supported(tmp_path):
    options = {
        "target_modules": ["q_proj", "mlp.up_proj", "o_proj"], "layers_to_transform": [1], "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {"q_proj": 12}, "exclude_modules": ["self_attn.o_proj"],
    }  # fmt: skip
    adapted = attach_lora(tiny_model(), rank=4, **options)
    layers = base_of(adapted).backbone.model.layers
    assert layers[1].self_attn.q_proj.scaling == {"default": 12 / 4}
    assert tuple(layers[1].mlp.up_proj.lora_A["default"].weight.shape) == (2, 32)
    assert {n.split(".lora_")[0] for n, p in base_of(adapted).named_parameters() if p.requires_grad} == {
        "backbone.model.layers.1.self_attn.q_proj", "backbone.model.layers.1.mlp.up_proj"
    }  # fmt: skip
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.normal_(0, 0.3)
    save_lora(adapted, tmp_path)
    assert torch.equal(logits(load_lora(tiny_model(), tmp_path, "x")), logits(adapted.eval()))
    with pytest.raises(ValueError, match=r"lora: \['use_dorra'\] are not supported"):
        attach_lora(tiny_model(), use_dorra=False)


def test_trying_an_adapter_out_takes_no_random_numbers():
    """The adapter starts as peft alone would start it at the same seed."""
    torch.manual_seed(5)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=names))
    ours = attach_lora(tiny_model(), rank=4)
    assert set(ours.peft_config["default"].target_modules) == set(names)
    wanted, started = theirs.state_dict(), ours.state_dict()
    assert wanted.keys() == started.keys() and all(torch.equal(wanted[name], started[name]) for name in wanted)


def test_a_refused_attachment_leaves_the_model_alone():
    model = tiny_model()
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="modality: 'text' works inside decoder layers"):
        attach_lora(model, modality="text", target_modules=["lm_head", "q_proj"])
    with pytest.raises(
        ValueError, match=r"target_modules \['query'\] are no modules of LlamaForCausalLM; its linear layers"
    ):
        attach_lora(model, target_modules=["q_proj", "query"])
    assert modules == [name for name, _ in model.named_modules()] and model.modality_gate is None
