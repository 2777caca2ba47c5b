"""What users of diffusers expect of a pipeline's folder and parts: dtypes, shards, variants, the Hub, components, tuples."""

import httpx2
import huggingface_hub
import pytest
import torch
from conftest import bits, generators, noisy_adapter
from huggingface_hub.errors import OfflineModeIsEnabled

from unified import UnifiedForCausalLM, UnifiedPipeline
from unified.lora.switching import adapter_state


def sample(pipe, **given):
    pipe.set_progress_bar_config(disable=True)
    return pipe("red apple", generator=7, **given).codes


@pytest.mark.process
def test_dtypes_under_both_names(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "full")
    pipeline.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    load = UnifiedPipeline.from_pretrained
    for given, full, half in (
        ({}, torch.float32, torch.float32),
        ({"torch_dtype": "auto"}, torch.float32, torch.bfloat16),
        ({"dtype": "auto"}, torch.float32, torch.bfloat16),
        ({"dtype": "bfloat16", "torch_dtype": "bfloat16"}, torch.bfloat16, torch.bfloat16),
        ({"torch_dtype": torch.float16}, torch.float16, torch.float16),
    ):
        assert (load(tmp_path / "full", **given).dtype, load(tmp_path / "half", **given).dtype) == (full, half)
    for given, message in (
        ({"torch_dtype": torch.float16, "dtype": "auto"}, "torch_dtype, dtype: .* are two names of one thing"),
        ({"dtype": "int8"}, "dtype: 'int8' is not a floating-point torch.dtype, its name or 'auto'"),
        ({"dtype": torch.int64}, "dtype: torch.int64 is not a floating-point"),
        ({"torch_dtype": "float7"}, "torch_dtype: 'float7' is not a floating-point"),
        ({"torch_dtype": [torch.float32]}, r"torch_dtype: \[torch.float32\] is not a floating-point"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "full", **given)


@pytest.mark.process
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps_of_one_device(pipeline, tmp_path, device_map):
    pipeline.save_pretrained(tmp_path)
    loaded = UnifiedPipeline.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(sample(loaded.to("cpu")), sample(pipeline))


def test_a_model_cut_over_devices_is_refused(pipeline, tmp_path, monkeypatch):
    pipeline.save_pretrained(tmp_path)
    monkeypatch.setattr(UnifiedForCausalLM, "hf_device_map", {"backbone": 0, "image_head": "cpu"}, raising=False)
    with pytest.raises(ValueError, match=r"device_map: the model is cut over \['0', 'cpu'\]; decoding needs all"):
        UnifiedPipeline.from_pretrained(tmp_path, device_map="auto")


@pytest.mark.process
def test_shards_and_variants(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    assert len(list((tmp_path / "a" / "model").glob("model-*.safetensors"))) > 2
    assert torch.equal(sample(UnifiedPipeline.from_pretrained(tmp_path / "a")), sample(pipeline))
    pipeline.save_pretrained(tmp_path / "b", variant="fp32")
    with pytest.raises(ValueError, match="safe_serialization: False would write pickles"):
        pipeline.save_pretrained(tmp_path / "c", safe_serialization=False)
    assert [file.name for file in (tmp_path / "b" / "model").glob("*.safetensors")] == ["model.fp32.safetensors"]
    loaded = UnifiedPipeline.from_pretrained(tmp_path / "b", variant="fp32")
    assert all(torch.equal(value, bits(pipeline.model)[name]) for name, value in bits(loaded.model).items())
    with pytest.raises(OSError, match=r"model.safetensors"):
        UnifiedPipeline.from_pretrained(tmp_path / "b")


def test_where_and_how_it_is_downloaded(pipeline, tmp_path, monkeypatch):
    pipeline.save_pretrained(tmp_path / "p")
    pipeline.model = noisy_adapter(pipeline.model, tmp_path / "lora", 1)
    asked, folders = [], {"owner/name": tmp_path / "p", "owner/lora": tmp_path / "lora"}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **given: asked.append((name, given)) or str(folders[name])
    )
    given = {"revision": "v1", "token": "t", "cache_dir": tmp_path / "c", "local_files_only": True}
    loaded = UnifiedPipeline.from_pretrained("owner/name", **given)
    loaded.load_lora_weights("owner/lora", "style", revision="v2", token=False)
    assert asked == [("owner/name", given), ("owner/lora", {"revision": "v2", "token": False})]
    with pytest.raises(TypeError, match="unexpected keyword argument 'revison'"):
        UnifiedPipeline.from_pretrained("owner/name", revison="v1")


def test_push_to_hub_uploads_what_it_wrote(pipeline, tmp_path, monkeypatch):
    calls = []

    def create_repo(name, **given):
        calls.append((name, given))
        return type("Url", (), {"repo_id": f"me/{name}"})

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **given: calls.append(given))
    pipeline.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True, token="t")
    assert calls[0] == ("mine", {"private": True, "token": "t", "exist_ok": True})
    assert (calls[1]["repo_id"], calls[1]["folder_path"], calls[1]["token"]) == ("me/mine", tmp_path / "mine", "t")
    written = {str(file.relative_to(tmp_path / "mine")) for file in (tmp_path / "mine").rglob("*") if file.is_file()}
    (tmp_path / "mine" / "notes.txt").write_text("not for the Hub")
    paths = [str(file.relative_to(tmp_path / "mine")) for file in (tmp_path / "mine").rglob("*") if file.is_file()]
    taken = huggingface_hub.utils.filter_repo_objects(paths, allow_patterns=calls[1]["allow_patterns"])
    assert set(taken) == written != set(paths)


@pytest.mark.process
@pytest.mark.parametrize(
    "error", [OfflineModeIsEnabled("offline mode"), httpx2.ConnectError("no route"), OSError("403")]
)
def test_push_to_hub_without_a_hub_is_one_error(pipeline, tmp_path, monkeypatch, error):
    def create_repo(name, **given):
        raise error

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    with pytest.raises(ValueError, match=f"push_to_hub: 'me/mine' could not be uploaded .{error}.; .* is written"):
        pipeline.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/mine")
    assert torch.equal(sample(UnifiedPipeline.from_pretrained(tmp_path)), sample(pipeline))


@pytest.mark.process
def test_components_make_another_pipeline(pipeline, tmp_path):
    pipeline.sampling = {"top_k": 4}
    pipeline.model = noisy_adapter(pipeline.model, tmp_path, 1)
    pipeline.load_lora_weights(tmp_path, "style")
    other = UnifiedPipeline(**pipeline.components)
    assert list(pipeline.components) == ["model", "image_tokenizer", "text_tokenizer", "sampling", "vision_encoder"]
    assert other.model is pipeline.model and other.get_active_adapters() == ["style"]
    assert torch.equal(sample(other), sample(pipeline))
    other.sampling = {"top_k": 2}
    assert pipeline.sampling == {"top_k": 4}


@pytest.mark.process
def test_tuples_in_place_of_outputs(pipeline, photo):
    output = pipeline("red apple", generator=7, output_type="np")
    images, codes, interrupted = pipeline("red apple", generator=7, output_type="np", return_dict=False)
    assert (images == output.images).all() and torch.equal(codes, output.codes) and interrupted is False
    for edit, given in ((pipeline.inpaint, {"mask_image": photo}), (pipeline.variation, {"keep": 0.5})):
        output, again = (edit("red apple", photo, generator=7, return_dict=kind, **given) for kind in (True, False))
        assert isinstance(again, tuple) and torch.equal(again[1], output.codes)


@pytest.mark.process
def test_seeds_are_generators(pipeline, photo):
    assert torch.equal(sample(pipeline), pipeline("red apple", generator=torch.Generator().manual_seed(7)).codes)
    several = {"num_images_per_prompt": 2}
    for seeds, same in ((7, torch.Generator().manual_seed(7)), ([7, 8], generators(7, 8)), ([7, 7], generators(7, 7))):
        first, second = (pipeline("red apple", generator=each, **several).codes for each in (seeds, same))
        assert torch.equal(first, second)
    hot = {"temperature": 5.0, "max_new_tokens": 8}
    assert pipeline.caption(photo, generator=3, **hot) == pipeline.caption(photo, generator=generators(3), **hot)
    assert pipeline.caption(photo, generator=3, **hot) != pipeline.caption(photo, generator=4, **hot)
    chats = [pipeline.chat(["red apple"], 8, 0, generator=each) for each in (3, generators(3))]
    assert chats[0] == chats[1]
    last = [list(pipeline.stream("red apple", generator=each))[-1].codes for each in (7, generators(7))]
    assert torch.equal(*last) and torch.equal(last[0], sample(pipeline))


@pytest.mark.process
def test_adapters_are_listed_and_saved_one_by_one(pipeline, tmp_path):
    for seed, name in enumerate(("outline", "default")):
        pipeline.model = noisy_adapter(pipeline.model, tmp_path / name, seed, train_image_tables=True)
    assert pipeline.get_list_adapters() == {}
    for name in ("outline", "default"):
        pipeline.load_lora_weights(tmp_path / name, name)
    assert pipeline.get_list_adapters() == {"model": ["outline", "default"]}
    pipeline.set_adapters("outline", 0.5)
    for name, given in (("outline", "outline"), ("default", "default")):
        pipeline.save_lora_weights(tmp_path / "saved" / name, given)
        before, after = ((tmp_path / kind / name / "adapter_model.safetensors") for kind in (".", "saved"))
        assert before.read_bytes() == after.read_bytes()
        names = {"adapter_config.json", "adapter_model.safetensors", "unified_base.json", "README.md"}
        assert {file.name for file in (tmp_path / "saved" / name).iterdir()} == names
    assert adapter_state(pipeline.model).weights == {"outline": 0.5}  # as it was
    for given in (None, "style"):
        with pytest.raises(
            ValueError, match=rf"adapter_name: {given!r} is none .* name one of \['outline', 'default'\]"
        ):
            pipeline.save_lora_weights(tmp_path / "no", given)
    codes = sample(pipeline)
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(tmp_path / "saved" / "outline")
    pipeline.set_adapters("default", 0.5)
    assert torch.equal(sample(pipeline), codes)
    pipeline.save_lora_weights(tmp_path / "again")  # the only one
    pipeline.unload_lora_weights()
    with pytest.raises(ValueError, match="adapter_name: no adapter is loaded"):
        pipeline.save_lora_weights(tmp_path / "no")


def test_weights_under_another_name(pipeline, tmp_path):
    pipeline.model = noisy_adapter(pipeline.model, tmp_path, 0)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=r"holds no adapter_model\.safetensors"):
        pipeline.load_lora_weights(tmp_path)
    for name in ("../style.safetensors", "style.bin"):
        with pytest.raises(ValueError, match=f"weight_name: '{name}' is not the name of a .safetensors file"):
            pipeline.load_lora_weights(tmp_path, weight_name=name)
    pipeline.load_lora_weights(tmp_path, weight_name="style.safetensors")
    assert pipeline.get_active_adapters() == ["default"]
