"""Checkpoints load whole or not at all: no random numbers in place of tensors, no adapter by the way, no foreign code."""

import ast
import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, noisy_adapter, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, Emu3VQVAE, Emu3VQVAEConfig, LlamaForCausalLM

from unified import UnifiedForCausalLM, UnifiedPipeline
from unified_tokenizers import AutoImageTokenizer, VQConfig, VQModel, load_text_tokenizer
from unified_tokenizers.emu3 import Emu3Tokenizer
from unified_tokenizers.vqgan import VQGAN, VQGANConfig

UP = "layers.0.mlp.up_proj.weight"


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def renamed(tensors, name):
    tensors[f"module.{name}"] = tensors.pop(name)


# What happens to a checkpoint whose names start with a prefix, and what the error says.
DAMAGES = {
    "absent": (lambda t, p: t.pop(p + UP), r"\(only in the model: {p}layers\.0\.mlp\.up_proj\.weight\)"),
    "renamed": (lambda t, p: renamed(t, p + UP), r"\(only in the checkpoint: module\.{p}\S+; only in the model: {p}\S+\)"),
    "left over": (lambda t, p: t.update({p + "lora_A": torch.zeros(2)}), r"\(only in the checkpoint: {p}lora_A\)"),
    "of another shape": (lambda t, p: t.update({p + UP: torch.zeros(3, 32)}),
                         r"\(of another shape: {p}layers\.0\.mlp\.up_proj\.weight \(3, 32\) instead of \(64, 32\)\)"),
    "all foreign": (lambda t, p: [renamed(t, name) for name in list(t)], r"only in the checkpoint: .* and \d+ more; only in"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("loader", [UnifiedForCausalLM, AutoModelForCausalLM, AutoModel])
def test_names_of_absent_and_left_over_tensors(loader, damage, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    change, message = DAMAGES[damage]
    rewrite(tmp_path, lambda tensors: change(tensors, "backbone.model."))
    with pytest.raises(ValueError, match="weights: .*" + message.replace("{p}", r"backbone\.model\.")):
        loader.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_backbone_is_whole(damage, tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_model().config.text_config).save_pretrained(tmp_path)
    assert UnifiedForCausalLM.from_backbone(str(tmp_path), 20, 3, 4).backbone.model.layers
    change, message = DAMAGES[damage]
    rewrite(tmp_path, lambda tensors: change(tensors, "model."))
    with pytest.raises(ValueError, match="weights: .* LlamaForCausalLM; .*" + message.replace("{p}", r"model\.")):
        UnifiedForCausalLM.from_backbone(str(tmp_path), 20, 3, 4)


CONV = "decoder.conv_out.weight"  # of a VQGAN
TOKENIZER_DAMAGES = {
    "absent": (lambda t, name: t.pop(name), r"\(only in the model: {name}\)"),
    "renamed": (renamed, r"\(only in the checkpoint: module\.{name}; only in the model: {name}\)"),
    "left over": (lambda t, name: t.update({"extra": torch.zeros(2)}), r"\(only in the checkpoint: extra\)"),
    "of another shape": (lambda t, name: t.update({name: torch.zeros(3, 3)}), r"\(of another shape: {name} \(3, 3\) inst"),
    "all foreign": (lambda t, name: [renamed(t, each) for each in list(t)], r"only in the checkpoint: .* and \d+ more; only"),
}  # fmt: skip


@pytest.mark.process
@pytest.mark.parametrize("damage", TOKENIZER_DAMAGES)
@pytest.mark.parametrize("kind", ["vq", "vqgan", "emu3"])
def test_an_image_tokenizer_is_whole(kind, damage, tmp_path):
    few = {"multipliers": [1, 1], "residual_blocks": 1, "latent_channels": 8}
    emu3 = {"channel_multiplier": [1, 1], "num_res_blocks": 1, "z_channels": 4, "base_channels": 32}
    model, name = {
        "vq": lambda: (VQModel(VQConfig(channels=8, encoder_blocks=1, codebook_size=20)), "decoder.0.weight"),
        "vqgan": lambda: (VQGAN(VQGANConfig(channels=32, codebook_size=16, **few)), CONV),
        "emu3": lambda: (Emu3VQVAE(Emu3VQVAEConfig(codebook_size=16, **emu3)), CONV),
    }[kind]()
    model.save_pretrained(tmp_path)
    whole = AutoImageTokenizer.from_pretrained(tmp_path)
    assert whole.fingerprint == AutoImageTokenizer.from_pretrained(tmp_path).fingerprint
    change, message = TOKENIZER_DAMAGES[damage]
    rewrite(tmp_path, lambda tensors: change(tensors, name))
    loaders = [
        AutoImageTokenizer.from_pretrained,
        Emu3Tokenizer.from_pretrained if kind == "emu3" else type(model).from_pretrained,
    ]
    for load in loaders:
        with pytest.raises(ValueError, match="weights: .*" + message.replace("{name}", re.escape(name))):
            load(tmp_path)


def test_an_image_tokenizer_takes_no_adapter(image_tokenizer, tmp_path):
    """Not one that is called as its layers are either; transformers would add it to them without a word."""
    image_tokenizer.save_pretrained(tmp_path / "tokenizer")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        noisy_adapter(tiny_model(), tmp_path / "adapter", 0)
        shutil.copy(tmp_path / "adapter" / file, tmp_path / "tokenizer")
    for load in (AutoImageTokenizer.from_pretrained, VQModel.from_pretrained):
        with pytest.raises(ValueError, match=r"model: '.*' holds an adapter"):
            load(tmp_path / "tokenizer")


def test_a_path_that_does_not_exist_is_no_name_on_the_hub():
    for load in (UnifiedForCausalLM.from_pretrained, VQModel.from_pretrained):
        with pytest.raises(ValueError, match="model: 'runs/nope' does not exist on this machine"):
            load("runs/nope")


def test_a_pipeline_never_samples_with_random_weights(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    rewrite(tmp_path / "model", lambda tensors: tensors.pop("image_head.weight"))
    with pytest.raises(ValueError, match=r"only in the model: image_head\.weight"):
        UnifiedPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_derived_need_not_be_stored(tied, tmp_path):
    """Tied heads and rotary frequencies; and a caller gets the loading information that it asks for."""
    model = tiny_model(text={"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, info = UnifiedForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not info["missing_keys"]
    stored = {name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    assert ("backbone.lm_head.weight" in stored) != tied and not any("inv_freq" in name for name in stored)


def test_a_file_that_is_cut_short(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"weights: a file of '.*' is cut short or no safetensors file"):
        UnifiedForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("loader", [UnifiedForCausalLM, AutoModelForCausalLM, AutoModel, "backbone"])
@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter_beside_a_model_is_refused(alone, loader, tmp_path):
    """Also a folder of an adapter alone, which names the model that transformers would load in its place."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    model.backbone.save_pretrained(tmp_path / "backbone")
    noisy_adapter(model, tmp_path / "adapter", 0)
    folder = tmp_path / ("backbone" if loader == "backbone" else "base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    for file in (tmp_path / "adapter").glob("adapter_*"):
        shutil.copy(file, folder)
    if alone:
        (folder / "adapter_config.json").unlink()
        folder = tmp_path / "adapter"
    with pytest.raises(ValueError, match=r"model: '.*' holds an adapter"):
        if loader == "backbone":
            UnifiedForCausalLM.from_backbone(str(folder), 20, 3, 4)
        else:
            loader.from_pretrained(folder)


@pytest.fixture
def no_questions(monkeypatch):
    """transformers asks before it runs the code of a folder."""

    def asked(*args):
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", asked)


def with_code(folder, file, **auto_map):
    """Add code to a folder as the Hub does: it leaves a trace where it runs."""
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, "auto_map": auto_map}))


@pytest.mark.parametrize("kind", ["model", "backbone", "text_tokenizer"])
@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_folder_is_never_run(known, kind, word_tokenizer, tmp_path, no_questions):
    """A kind of model that transformers knows is loaded with its own code, another one is refused."""
    model = tiny_model()
    (model if kind == "model" else model.backbone).save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    with_code(
        tmp_path, "config.json", AutoConfig="code.Config", AutoModelForCausalLM="code.Model", AutoModel="code.Model"
    )
    with_code(tmp_path, "tokenizer_config.json", AutoTokenizer=["code.Tokenizer", "code.Tokenizer"])
    if not known:
        for file, key in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")):
            content = json.loads((tmp_path / file).read_text())
            (tmp_path / file).write_text(json.dumps({**content, key: "Unheard"}))
    load = {
        "model": lambda: AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False),
        "backbone": lambda: UnifiedForCausalLM.from_backbone(str(tmp_path), 20, 3, 4),
        "text_tokenizer": lambda: load_text_tokenizer(tmp_path, "<r1>", "<r2>"),
    }[kind]
    if known:
        load()
    else:
        with pytest.raises(ValueError):
            load()
    assert not (tmp_path / "ran").exists()


@pytest.mark.process
def test_no_call_leaves_remote_code_open():
    """Every use of an Auto class of transformers says that code of a folder is not run."""
    seen = 0
    for top in ("unified", "tokenizers", "eval", "recipes"):
        for file in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                if (
                    not owner.startswith("Auto")
                    or owner == "AutoImageTokenizer"
                    or not node.func.attr.startswith("from_")
                ):
                    continue
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("trust_remote_code") == "False", f"{file}:{node.lineno}"
                seen += 1
    assert seen >= 5
