"""Data that does not fit the model or the schedule is refused before the first step."""

import json
from functools import partial

import datasets
import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file

from unified import UnifiedPipeline
from unified.data.batches import Source
from unified.data.captioned import text_sequence
from unified.data.code_cache import load_codes
from unified.prediction.plan import RASTER
from unified.training.config import load_config
from unified.training.inputs import SPELT, add_grids, bytes_per_token, check_grids, check_lengths, code_grids
from unified.training.loop import train
from unified.training.tracking import read_log
from unified.training.validation import image_loss


def rows_of(*grids):
    columns = {"height": [h for h, _ in grids], "width": [w for _, w in grids], "caption": ["red apple"] * len(grids)}
    return datasets.Dataset.from_dict(columns).with_format("numpy")


def test_grids_come_from_the_codes():
    rows = rows_of((4, 8), (6, 6), (4, 8), (4, 4))
    assert code_grids(rows) == [(4, 4), (4, 8), (6, 6)]
    check_grids(code_grids(rows), (2, 1), RASTER)
    with pytest.raises(ValueError, match=r"schedule.patch_sizes: 4 does not divide the code grid 6x6 of the data"):
        check_grids(code_grids(rows), (4, 2, 1), RASTER)


def test_a_model_learns_new_grids_and_an_adapters_base_does_not():
    config = tiny_config(image_grids=[[6, 6]])
    add_grids(config, [(4, 4), (6, 6)], fixed=False)
    assert config.image_grids == [[6, 6], [4, 4]]  # the first one stays the default
    add_grids(config, [(4, 4)], fixed=True)
    with pytest.raises(
        ValueError, match=r"model.pipeline: it samples the code grids .* the data also has \[\[8, 8\]\]"
    ):
        add_grids(config, [(8, 8)], fixed=True)


def test_text_that_a_tokenizer_spells_is_told(text_tokenizer, capsys, config_file, tmp_path):
    texts = ["red apple", "zzqy vvxw kjqz"]
    config = tiny_config(text={"vocab_size": text_tokenizer.vocab_size}, boi_token_id=text_tokenizer.boi_token_id,
                         eoi_token_id=text_tokenizer.eoi_token_id)  # fmt: skip
    for text in texts:
        rows = datasets.Dataset.from_dict({"text": [text]})
        sequence = partial(text_sequence, text_tokenizer=text_tokenizer, vocabulary=config.vocabulary)
        tokens = len(text_tokenizer.encode(text))
        found = bytes_per_token(Source("text", rows, sequence), text_tokenizer, config.vocabulary)
        assert found == pytest.approx(len(text) / tokens)
    assert found < SPELT
    table = tmp_path / "texts.jsonl"
    table.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[1:] * 8))
    source = {"path": str(table), "kind": "text", "max_length": 64}
    options = [f"output_dir={tmp_path / 'run'}", "data.train=null", f"data.sources=[{source}]", "validate_every=null",
               "steps=1", "log_every=1", "checkpoint_every=null", "schedule={patch_sizes: [1], shares: [1.0]}"]  # fmt: skip
    train(load_config(config_file, options))
    assert f"text '{table}': {found:.1f} bytes of text a token, so the text tokenizer spells" in capsys.readouterr().out


def test_longest_row_has_to_fit(text_tokenizer):
    """<bos> caption <boi> codes <eoi> <eos>, to the token."""
    rows = rows_of((4, 4), (2, 4))
    length = 4 + 16 + len(text_tokenizer.encode("red apple"))
    check_lengths(rows, text_tokenizer, tiny_config(text={"max_position_embeddings": length}))
    with pytest.raises(
        ValueError, match=f"the backbone has {length - 1} positions, the longest row of the data needs {length}"
    ):
        check_lengths(rows, text_tokenizer, tiny_config(text={"max_position_embeddings": length - 1}))


def test_unfit_data_is_refused_before_the_first_step(config_file, tmp_path):
    for option, message in (
        ("model.architecture.max_position_embeddings=20", "max_position_embeddings: the backbone has 20 positions"),
        (
            "schedule={patch_sizes: [8,1], shares: [0.5,0.5]}",
            "schedule.patch_sizes: 8 does not divide the code grid 4x4",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(load_config(config_file, [f"output_dir={tmp_path}", option]))
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.process
def test_adapter_on_a_new_model_loads_into_the_kept_base(config_file, parts, tmp_path):
    """The base samples the size of the codes, whatever data.image_size says, and is refused for another model."""
    options = [f"output_dir={tmp_path}", "data.image_size=64", "lora.rank=4", "lora.train_image_tables=true",
               "optimizer.ema_decay=null", "checkpoint_every=null"]  # fmt: skip
    folder = train(load_config(config_file, options))
    pipe = UnifiedPipeline.from_pretrained(tmp_path / "base")
    assert pipe.default_size == (16, 16)
    rows = load_codes(parts / "codes", "validation", None)
    config = pipe.model.config
    pipe.load_lora_weights(folder)
    adapted = image_loss(pipe.model, rows, pipe.text_tokenizer, config, 4, torch.device("cpu"))
    assert adapted == pytest.approx(read_log(tmp_path)[-1]["validation_loss"], rel=1e-5)

    before = load_file(tmp_path / "base" / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"base' was made with other settings \(seed: 0 then, 1 now\)"):
        train(load_config(config_file, [*options, "seed=1"]))
    (tmp_path / "base").rename(tmp_path / ".partial-base")  # as a kill leaves it
    (tmp_path / ".partial-base" / "model" / "model.safetensors").unlink()
    train(load_config(config_file, [*options, "steps=3"]))
    after = load_file(tmp_path / "base" / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before) and not (tmp_path / ".partial-base").exists()
