"""Sampling defaults that a pipeline is saved with: used wherever a caller does not say otherwise."""

import json
import re
from contextlib import closing

import pytest
import torch
from browsing import need_gradio

from unified import GenerationOptions, UnifiedPipeline
from unified.cli import main
from unified.pipeline.metadata import read_image_metadata
from unified.pipeline.options import SAMPLING
from unified.serving.engine import Engine
from unified.serving.page import build_demo
from unified.training.config import load_config
from unified.training.setup import sampling_of
from unified_eval.command_line import add_generation_arguments
from unified_eval.command_line import sampling_of as evaluated_with

DEFAULTS = {
    "guidance_scale": 12.5,
    "temperature": 0.05,
    "top_k": 9,
    "guidance_schedule": "linear",
    "decoding": "jacobi",
}


@pytest.fixture
def saved(pipeline, tmp_path):
    """A folder whose ``pipeline.json`` holds DEFAULTS."""
    pipeline.sampling = DEFAULTS
    pipeline.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.process
def test_none_is_what_the_pipeline_was_saved_with(pipeline, saved, photo):
    loaded = UnifiedPipeline.from_pretrained(saved)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.sampling == DEFAULTS and json.loads((saved / "pipeline.json").read_text())["sampling"] == DEFAULTS
    pipeline.sampling = {}
    ask = {
        "call": lambda pipe, **given: pipe("red apple", generator=7, **given).codes,
        "stream": lambda pipe, **given: list(pipe.stream("red apple", generator=7, **given))[-1].codes,
        "inpaint": lambda pipe, **given: pipe.inpaint("red apple", photo, photo, generator=7, **given).codes,
        "variation": lambda pipe, **given: pipe.variation("red apple", photo, 0.2, generator=7, **given).codes,
    }
    for name, sample in ask.items():
        assert torch.equal(sample(loaded), sample(pipeline, **DEFAULTS)), name
        assert torch.equal(sample(loaded, **SAMPLING), sample(pipeline)), name  # what is said wins
        assert not torch.equal(sample(loaded), sample(pipeline)), name
    with closing(Engine(loaded)) as engine:
        for options in (None, GenerationOptions(top_k=9)):
            codes = engine.submit("red apple", options, generator=7).result(30).codes
            assert torch.equal(codes, ask["call"](pipeline, **DEFAULTS))


def test_a_folder_without_defaults_is_as_it_was(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    assert "sampling" not in json.loads((tmp_path / "pipeline.json").read_text())
    loaded = UnifiedPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.sampling == {}
    usual = {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance_schedule": "constant",
             "decoding": "plain", "group_temperature": 1.0}  # fmt: skip
    assert GenerationOptions().filled({}) == GenerationOptions(**usual)
    assert torch.equal(loaded("red apple", generator=1).codes, pipeline("red apple", generator=1, **usual).codes)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ([3], r"sampling: \[3\] is not a mapping of guidance_scale"),
        ({"guidance": 3}, "sampling: 'guidance' is no default of a pipeline; these are guidance_scale"),
        ({"height": 16}, "sampling: 'height' is no default of a pipeline"),
        ({"temperature": 0}, "sampling.temperature: 0 must be above 0"),
        ({"guidance_scale": "3"}, "sampling.guidance_scale: '3' is not a finite number"),
        ({"decoding": "fast"}, "sampling.decoding: 'fast' is unknown"),
        ({"guidance_schedule": [1]}, r"sampling.guidance_schedule: \[1\] cannot be saved; name one of"),
    ],
)
def test_bad_defaults_are_named(pipeline, saved, sampling, message):
    file = saved / "pipeline.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sampling": sampling}))
    with pytest.raises(ValueError, match=f"pipeline: '{re.escape(str(file))}': {message}"):
        UnifiedPipeline.from_pretrained(saved)
    with pytest.raises(ValueError, match=message):
        pipeline.sampling = sampling
    with pytest.raises(TypeError):
        pipeline.sampling["top_k"] = 3  # it would not be checked
    assert pipeline.sampling == DEFAULTS


def test_a_damaged_description_is_named(pipeline, saved):
    damage = {"{": "is no JSON", "[" * 100_000: "is no JSON", "[]": "holds a list; need names with values",
              '{"image_tokenizer_fingerprint": "0"}': "of .* has the image_tokenizer_fingerprint '0'"}  # fmt: skip
    for text, message in damage.items():
        (saved / "pipeline.json").write_text(text)
        with pytest.raises(ValueError, match=f"pipeline: .*pipeline.json'? {message}"):
            UnifiedPipeline.from_pretrained(saved)
    with pytest.raises(ValueError, match=r"guidance_schedule: .* cannot be saved"):
        pipeline.sampling = {"guidance_schedule": lambda share: 2.0}


@pytest.mark.process
def test_the_command_line_and_the_page_begin_with_them(pipeline, saved, tmp_path, capsys):
    command = [
        "generate",
        "--pipeline",
        str(saved),
        "--prompt",
        "red apple",
        "--out",
        str(tmp_path / "out"),
        "--seed",
        "7",
    ]
    assert main(command) == 0 and main([*command, "--top-k", "3"]) == 0
    settings = [read_image_metadata(file)["settings"] for file in sorted((tmp_path / "out").iterdir())]
    usual = {"height": 16, "width": 16, "top_p": 1.0, "group_temperature": 1.0, **DEFAULTS}
    assert settings == [usual, {**usual, "top_k": 3}]
    need_gradio()
    with closing(Engine(UnifiedPipeline.from_pretrained(saved))) as engine:
        blocks = {block.elem_id: block for block in build_demo(engine).blocks.values()}
    guidance, temperature = blocks["guidance"], blocks["temperature"]
    assert (guidance.value, guidance.maximum) == (12.5, 12.5) and (temperature.value, temperature.minimum) == (
        0.05,
        0.05,
    )
    assert blocks["decoding"].value == "jacobi"


def test_runs_and_evaluations_have_them(saved, config_file, tmp_path):
    import argparse

    parser = argparse.ArgumentParser()
    add_generation_arguments(parser)
    asked = evaluated_with(parser.parse_args(["--top-p", "0.5"]), UnifiedPipeline.from_pretrained(saved).sampling)
    assert asked == {**DEFAULTS, "top_p": 0.5, "group_temperature": 1.0}
    tuned = [f"output_dir={tmp_path}/run", f"model.pipeline={saved}", "model.architecture=null"]
    assert sampling_of(load_config(config_file, [*tuned, "sampling.top_k=4"])) == {**DEFAULTS, "top_k": 4}
    fresh = [f"output_dir={tmp_path}/run", "sampling={guidance_scale: 2, decoding: sjd}"]
    assert sampling_of(load_config(config_file, fresh)) == {"guidance_scale": 2.0, "decoding": "sjd"}
    for override, message in {
        "sampling.temperature=-1": "sampling.temperature: -1.0 must be above 0",
        "sampling.decoding=x": "sampling.decoding: 'x' is unknown",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_config(config_file, [*fresh, override])
    with pytest.raises(ValueError, match="sampling: an adapter is sampled as its pipeline is"):
        load_config(config_file, [*tuned, "lora.rank=4", "optimizer.ema_decay=null", "sampling.top_k=4"])
