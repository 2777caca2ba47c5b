"""A path on this machine or a repository on the Hub: one answer everywhere."""

from pathlib import Path

import huggingface_hub
import pytest
import transformers

from unified import UnifiedPipeline
from unified.data import load_source
from unified.hub import local_folder, local_path
from unified.model.backbone import load_language_model
from unified_tokenizers import AutoImageTokenizer, load_text_tokenizer

OPEN = {
    "pipeline": UnifiedPipeline.from_pretrained,
    "image_tokenizer": AutoImageTokenizer.from_pretrained,
    "text_tokenizer": load_text_tokenizer,
    "source": load_source,
    "backbone": lambda name: load_language_model(name, None, None),
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that has nothing, and the names that it was asked for."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def missing(name, *_, **__):
        asked.append(str(name))
        raise FileNotFoundError("404: no such repository\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    for kind in (transformers.AutoTokenizer, transformers.AutoConfig):
        monkeypatch.setattr(kind, "from_pretrained", missing)
    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", missing)
    monkeypatch.setattr("datasets.load_dataset", missing)
    return asked


@pytest.mark.parametrize("field", OPEN)
@pytest.mark.parametrize(
    "name", ["runs/nope", "data/nope", "./nope", "../nope", "/no/pe", "~/nope", "a/b/c", "here/nope", "x/y.safetensors"]
)
def test_what_looks_like_a_path_is_never_looked_up(hub, tmp_path, field, name):
    (tmp_path / "here").mkdir()
    with pytest.raises(ValueError, match=rf"{field}: '.*(nope|/no/pe|a/b/c|y.safetensors)' does not exist"):
        OPEN[field](name)
    assert hub == []


@pytest.mark.parametrize("field", OPEN)
@pytest.mark.parametrize("name", ["owner/name", "name"])
def test_what_the_hub_does_not_have_either_says_both(hub, field, name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no look at the network, and no retries
    with pytest.raises(ValueError, match=rf"{field}: '{name}' is neither a path on this machine nor .* from the Hub"):
        OPEN[field](name)
    assert hub == [name]


def test_what_exists_is_a_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert local_path("owner/name", "x") == Path("owner/name")
    assert local_path("~/owner", "x") == tmp_path / "owner"
    assert local_path("other/name", "x") is None and local_path("meta-llama/Llama-3.2-1B", "x") is None
    with pytest.raises(ValueError, match="x: 'owner/other' does not exist"):
        local_path("owner/other", "x")


def test_downloads(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: calls.append((name, options)) or str(tmp_path)
    )
    assert local_folder("owner/name") == tmp_path == local_folder("owner/name", "x", ("*.json",))
    assert calls == [("owner/name", {}), ("owner/name", {"allow_patterns": ["*.json"]})]
