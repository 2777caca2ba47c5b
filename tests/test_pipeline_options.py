"""The options of sampling: one set for the pipeline, the engine, the command line and the page; one table of decoding modes."""

import inspect
from contextlib import closing
from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from browsing import need_gradio
from conftest import generators

from unified import GenerationOptions, Sampling, UnifiedPipeline
from unified.cli import build_parser, main
from unified.decoding import DECODING_MODES
from unified.decoding.config import DecodingMode, modes_for
from unified.prediction.plan import RASTER
from unified.serving.engine import Engine
from unified.serving.page import build_demo

GIVEN = {"height": 16, "width": 16, "guidance_scale": 2.5, "num_images_per_prompt": 2, "temperature": 0.7, "top_k": 9,
         "top_p": 0.9, "guidance_schedule": "cosine", "decoding": "jacobi", "group_temperature": 0.8}  # fmt: skip


def test_options_are_arguments_of_a_call_with_the_same_defaults():
    parameters = inspect.signature(UnifiedPipeline.__call__).parameters
    options = {each.name: each.default for each in fields(GenerationOptions) if each.init}
    assert {name: parameters[name].default for name in options} == options
    # The order of diffusers; what only this pipeline has comes last.
    names = ["self", "prompt", "height", "width", "guidance_scale", "negative_prompt", "num_images_per_prompt", "generator",
             "output_type", "return_dict", "callback_on_step_end"]  # fmt: skip
    assert list(parameters)[: len(names)] == names


def test_options_hold_the_sampling_of_a_code_and_stay():
    options = GenerationOptions(**GIVEN)
    assert options.sampling == Sampling(2.5, 0.7, 9, 0.9, "cosine", 0.8) and options.to_mapping() == {
        **GIVEN,
        "steer": None,
    }
    assert GenerationOptions.from_mapping(GIVEN) == options != GenerationOptions()
    with pytest.raises(FrozenInstanceError):
        options.top_k = 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("height", 16.0, "height: 16.0 must be a whole number of at least 1"),
        ("width", 0, "width: 0 must be a whole number of at least 1"),
        ("num_images_per_prompt", True, "num_images_per_prompt: True must be a whole number of at least 1"),
        ("decoding", "fast", "decoding: 'fast' is unknown; use one of .*'plain'"),
        ("top_p", 0, r"top_p: 0 must lie in \(0, 1\]"),
        ("guidance_scale", 0.5, "guidance_scale: 0.5 must be at least 1"),
    ],
)
def test_options_check_themselves(name, value, message):
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**{name: value})


def test_unknown_options_are_named(pipeline, photo):
    message = "prevew: is no option; the options are height, width, guidance_scale"
    for ask in (
        lambda: pipeline.stream("red apple", prevew=4),
        lambda: pipeline.stream("red apple", image=photo, keep=0.5, prevew=4),
        lambda: pipeline.inpaint("red apple", photo, photo, prevew=4),
        lambda: pipeline.variation("red apple", photo, prevew=4),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
    with pytest.raises(ValueError, match="known: an edit takes it from the image; leave it out"):
        pipeline.stream("red apple", image=photo, keep=0.5, known=torch.zeros(1, 4, 4).long())


@pytest.mark.process
@pytest.mark.parametrize("decoding", [name for name, mode in DECODING_MODES.items() if mode.suits(RASTER)])
def test_the_engine_takes_all_options(pipeline, decoding):
    """In the batch or alone, it generates what a call generates."""
    given, negative = {**GIVEN, "decoding": decoding}, "dog" if DECODING_MODES[decoding].negatives else None
    expected = pipeline("red apple", negative_prompt=negative, generator=generators(1, 2), **given)
    with closing(Engine(pipeline)) as engine:
        options = GenerationOptions(**given)
        job = engine.submit("red apple", options, negative_prompt=negative, generator=generators(1, 2))
        result = job.result(30)
    assert torch.equal(result.codes, expected.codes)
    assert [image.tobytes() for image in result.images] == [image.tobytes() for image in expected.images]


@pytest.mark.process
def test_a_mode_in_the_table_is_offered_everywhere(pipeline, tmp_path, monkeypatch):
    """One line more, and the pipeline, the command line and the page have it."""
    plain = pipeline("red apple", generator=generators(0)).codes
    monkeypatch.setitem(DECODING_MODES, "again", DecodingMode("as plain", "unified.decoding.decode:iterate_codes"))
    assert torch.equal(pipeline("red apple", generator=generators(0), decoding="again").codes, plain)
    assert build_parser().parse_args(
        ["generate", "--pipeline", "p", "--prompt", "a", "--out", "o", "--decoding", "again"]
    )
    pipeline.save_pretrained(tmp_path / "pipeline")
    arguments = ["generate", "--pipeline", str(tmp_path / "pipeline"), "--prompt", "red apple", "--out", str(tmp_path)]
    assert main([*arguments, "--decoding", "again"]) == 0
    need_gradio()
    with closing(Engine(pipeline)) as engine:
        blocks = build_demo(engine).blocks.values()
    (menu,) = (block for block in blocks if block.elem_id == "decoding")
    assert (
        menu.choices == [(mode.about, name) for name, mode in modes_for(pipeline.model.config).items()]
        and ("as plain", "again") in menu.choices
    )
