"""`steer` of a pipeline: reward adapters that are loaded once and weighted in every call, by every way to ask for images."""

import json
from contextlib import closing

import pytest
import torch
from conftest import full_forward, generators, noisy_adapter, tiny_pipeline
from PIL import Image

from unified import GenerationOptions, UnifiedPipeline
from unified.cli import main
from unified.decoding.config import DECODING_MODES
from unified.decoding.sampling import gumbel_noise
from unified.decoding.steering import REWARDS
from unified.lora.adapters import attach_lora, unload_lora
from unified.lora.base import base_of
from unified.lora.saving import save_lora
from unified.lora.switching import adapter_state, adapters_off, is_disabled, set_adapters
from unified.pipeline.arguments import Wanted
from unified.pipeline.metadata import read_image_metadata
from unified.prediction.plan import RASTER
from unified.serving.engine import Engine
from unified.serving.remote import check_remote
from unified.training.config import load_config
from unified.training.objectives.genarm import GenARM
from unified.training.setup import adapt

STEER = {"one": 0.7, "two": -0.4}


def noted(folder, objectives):
    """Note what an adapter was trained for, as training does."""
    file = folder / "unified_base.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"objectives": objectives}))


@pytest.fixture(scope="module")
def folders(text_tokenizer, image_tokenizer, tmp_path_factory):
    """Adapters: two reward models, one that changes nothing, one of another objective and one that does not say."""
    path, pipe = tmp_path_factory.mktemp("rewards"), tiny_pipeline(text_tokenizer, image_tokenizer)
    for seed, name in enumerate(("one", "two", "likely", "unknown")):
        noisy_adapter(pipe.model, path / name, seed)
    nothing = attach_lora(pipe.model, rank=2)
    save_lora(nothing, path / "nothing")
    unload_lora(nothing)
    for name, objective in (("one", REWARDS), ("two", REWARDS), ("nothing", REWARDS), ("likely", "likelihood")):
        noted(path / name, [objective])
    return path


@pytest.fixture
def steered(pipeline, folders):
    for name in ("one", "two"):
        pipeline.load_lora_weights(folders / name, name)
    return pipeline


@torch.no_grad()
def enumerated(pipe, prompt, negative, generator, steer, scale):
    """Code after code from the probabilities of the paper, softmax(guided logits + sum of weighted guided log-probabilities)."""
    model, config, codes = pipe.model, base_of(pipe.model).config, []
    rows, opposite = Wanted(prompt, negative).rows(config, pipe.text_tokenizer, (4, 4))
    first = config.vocabulary.text_vocab_size

    def guided():
        sides = []
        for row in (rows[0], opposite[0]):
            ids = [*row.ids, *(first + code for code in codes), *[first] * (16 - len(codes))]
            sides.append(full_forward(base_of(model), ids, [(4, 4)]).image_logits[0, len(row.ids) - 1 + len(codes)])
        return (sides[1] + scale * (sides[0] - sides[1])).log_softmax(-1)

    while len(codes) < 16:
        with adapters_off(model):
            total = guided()
        for name, weight in steer.items():
            set_adapters(model, [name], [1.0])
            total = total + weight * guided()
        codes.append(int((total.softmax(-1).log() + gumbel_noise([generator], 20, total.device)[0]).argmax()))
    return torch.tensor(codes).view(1, 4, 4)


@pytest.mark.process
def test_a_call_samples_what_the_paper_says(steered):
    given = {"negative_prompt": "blue car", "guidance_scale": 2.0, "steer": STEER}
    codes = steered("red apple", generator=5, **given).codes
    expected = enumerated(steered, "red apple", "blue car", *generators(5), STEER, 2.0)
    assert torch.equal(codes, expected)


@pytest.mark.process
def test_a_weight_of_zero_is_no_steering(pipeline, folders):
    """Bit for bit, images and all; and adapters that are loaded to steer change nothing by being there."""
    plain = pipeline("red apple", generator=1)
    for name in ("one", "two"):
        pipeline.load_lora_weights(folders / name, name)
    assert pipeline.get_active_adapters() == [] and pipeline.get_list_adapters() == {"model": ["one", "two"]}
    for given in ({}, {"steer": None}, {"steer": {}}, {"steer": {"one": 0.0, "two": 0}}):
        again = pipeline("red apple", generator=1, **given)
        assert torch.equal(again.codes, plain.codes) and again.images[0].tobytes() == plain.images[0].tobytes()
    assert not torch.equal(pipeline("red apple", generator=1, steer=STEER).codes, plain.codes)
    pipeline.unload_lora_weights()
    assert torch.equal(pipeline("red apple", generator=1).codes, plain.codes)


@pytest.mark.process
def test_an_image_depends_on_its_seed_and_prompt_alone(steered):
    prompts, negatives = ["red apple", "blue car", "a green tree"], ["the small dog", "", "yellow sun"]
    batch = steered(prompts, negative_prompt=negatives, generator=[3, 4, 5], steer=STEER).codes
    for row, (prompt, negative, seed) in enumerate(zip(prompts, negatives, (3, 4, 5), strict=True)):
        assert torch.equal(
            steered(prompt, negative_prompt=negative, generator=seed, steer=STEER).codes, batch[row, None]
        )


@pytest.mark.process
def test_every_way_to_ask_takes_it(steered, photo):
    call = steered("red apple", generator=7, steer=STEER)
    previews = list(steered.stream("red apple", generator=7, steer=STEER))
    assert len(previews) > 1 and torch.equal(previews[-1].codes, call.codes)
    white = photo.point(lambda value: 255)
    inpainted = steered.inpaint("red apple", photo, white, generator=7, steer=STEER)
    assert torch.equal(inpainted.codes, call.codes)  # all of it is sampled again
    varied = [steered.variation("red apple", photo, 0.5, generator=7, steer=each).codes for each in (STEER, None)]
    assert not torch.equal(*varied)
    with closing(Engine(steered)) as engine:
        for decoding in ("plain", "jacobi"):
            job = engine.submit("red apple", GenerationOptions(steer=STEER, decoding=decoding), generator=7)
            assert torch.equal(job.result(30).codes, call.codes)
        with pytest.raises(ValueError, match="steer: adapter 'three' is not loaded"):
            engine.submit("red apple", GenerationOptions(steer={"three": 1.0}))


@pytest.mark.process
@pytest.mark.parametrize("decoding", [name for name, mode in DECODING_MODES.items() if mode.suits(RASTER)])
def test_an_adapter_that_changes_nothing_halves_the_temperature(pipeline, folders, decoding):
    """The sum of logits and the same logits again, exactly: so every mode of decoding samples from the steered distribution."""
    given = {"generator": [3, 4], "decoding": decoding}
    expected = pipeline(["red apple", "blue car"], temperature=0.5, **given).codes
    pipeline.load_lora_weights(folders / "nothing", "nothing")
    assert torch.equal(pipeline(["red apple", "blue car"], steer={"nothing": 1.0}, **given).codes, expected)


@pytest.mark.process
def test_adapters_act_or_steer(pipeline, folders):
    """One that acts stays active beside those that steer; one that is active and steers does not act in that call."""
    pipeline.load_lora_weights(folders / "unknown", "unknown")
    alone = pipeline("red apple", generator=2).codes
    pipeline.load_lora_weights(folders / "one", "one")
    assert pipeline.get_active_adapters() == ["unknown"]
    assert torch.equal(pipeline("red apple", generator=2, steer={"one": 0.0}).codes, alone)
    pipeline.disable_lora()
    base = pipeline("red apple", generator=2).codes
    both = pipeline("red apple", generator=2, steer={"unknown": 0.8}).codes
    pipeline.load_lora_weights(folders / "two", "two")
    assert is_disabled(pipeline.model)
    pipeline.enable_lora()
    assert torch.equal(pipeline("red apple", generator=2, steer={"unknown": 0.0}).codes, base)
    assert torch.equal(pipeline("red apple", generator=2, steer={"unknown": 0.8}).codes, both)
    assert torch.equal(pipeline("red apple", generator=2).codes, alone)  # as before the call


def test_other_weights_copy_no_weights_again(steered):
    first = steered.decoder(STEER)
    second = steered.decoder({"one": 0.1, "two": 2.0})
    assert all(a is b for a, b in zip(first._decoders, second._decoders, strict=True))
    assert first._weights == [1.0, 0.7, -0.4] and second._weights == [1.0, 0.1, 2.0]
    with torch.no_grad():
        base_of(steered.model).image_head.weight.add_(1.0)
    assert steered.decoder(STEER)._decoders[0] is not first._decoders[0]


@pytest.mark.parametrize(
    ("steer", "message"),
    [
        ({"three": 1.0}, r"steer: adapter 'three' is not loaded; loaded are \['one', 'two', 'likely'\]"),
        ({"likely": 1.0}, "steer: adapter 'likely' was trained for likelihood and gives no rewards"),
        ({"one": float("inf")}, "steer.one: inf is not a finite number"),
        ({"one": "1"}, "steer.one: '1' is not a finite number"),
        (["one"], r"steer: \['one'\] is no mapping of adapters' names to weights"),
        ({1: 1.0}, "steer: {1: 1.0} is no mapping"),
    ],
)
def test_what_cannot_steer_is_refused(steered, folders, steer, message):
    steered.load_lora_weights(folders / "likely", "likely")
    for ask in (steered, steered.stream):  # a stream before its first preview
        with pytest.raises(ValueError, match=message):
            ask("red apple", steer=steer)


def test_states_that_cannot_be_steered_are_refused(pipeline, folders):
    with pytest.raises(ValueError, match="steer: adapter 'one' is not loaded; loaded are \\[\\]"):
        pipeline("red apple", steer={"one": 1.0})
    with pytest.raises(ValueError, match="sampling: 'steer' is no default of a pipeline"):
        pipeline.sampling = {"steer": {"one": 1.0}}
    with pytest.raises(ValueError, match="steer: a server has no adapters that steer"):
        check_remote(GenerationOptions(steer={"one": 1.0}).filled({}), pipeline.model.config)
    pipeline.load_lora_weights(folders / "unknown", "unknown")
    pipeline.load_lora_weights(folders / "one", "one")
    pipeline.fuse_lora()
    with pytest.raises(ValueError, match="steer: adapters are fused; call unfuse_lora first"):
        pipeline("red apple", steer={"one": 1.0})


def test_an_adapter_says_what_it_was_trained_for(pipeline, folders, config_file, tmp_path):
    """From the settings of a run to its folder, through a pipeline and back."""
    assert GenARM.name == REWARDS
    config = load_config(config_file, [
        f"output_dir={tmp_path}", "objectives=[{name: genarm, weight: 2.0}]", "lora.rank=4", "data.train=null",
        "data.sources=[{path: x, kind: pairs}]", "validate_every=null",
    ])  # fmt: skip
    adapted = adapt(config, pipeline.model, pipeline.image_tokenizer, pipeline.text_tokenizer)
    save_lora(adapted, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "unified_base.json").read_text())["objectives"] == [REWARDS]
    pipeline.model = unload_lora(adapted)
    pipeline.load_lora_weights(folders / "one", "one")
    pipeline.save_lora_weights(tmp_path / "again")
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(tmp_path / "again", "one")
    assert adapter_state(pipeline.model).objectives == {"one": [REWARDS]} and pipeline.get_active_adapters() == []
    noted(tmp_path / "again", "genarm")
    with pytest.raises(ValueError, match=r"lora: objectives 'genarm' in unified_base\.json"):
        pipeline.load_lora_weights(tmp_path / "again", "two")


@pytest.mark.process
def test_the_command_line_loads_and_weighs_them(pipeline, folders, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "pipeline")
    arguments = ["generate", "--pipeline", str(tmp_path / "pipeline"), "--prompt", "red apple", "--seed", "3"]
    asked = ["--steer", f"{folders}/one=0.7", "--steer", f"{folders}/two=-0.4", "--lora", str(folders / "unknown")]
    assert main([*arguments, *asked, "--out", str(tmp_path / "out")]) == 0
    found = read_image_metadata(tmp_path / "out" / "000-red-apple.png")
    name = folders.name
    assert found["settings"]["steer"] == {f"{name}_one": 0.7, f"{name}_two": -0.4} and found["adapters"] == {
        "default": 1.0
    }
    again = UnifiedPipeline.from_pretrained(tmp_path / "pipeline")
    for each in ("one", "two"):
        again.load_lora_weights(folders / each, f"{name}_{each}")
    again.load_lora_weights(folders / "unknown")
    again.set_progress_bar_config(disable=True)
    image = again(found["prompt"], generator=found["seed"], **found["settings"]).images[0]
    with Image.open(tmp_path / "out" / "000-red-apple.png") as written:
        assert image.tobytes() == written.tobytes()
    capsys.readouterr()
    for given, message in (
        ([f"{folders}/one"], "is not NAME=WEIGHT"), (["=1"], "is not NAME=WEIGHT"), (["one=x"], "is not NAME=WEIGHT"),
        (["a/one=1", "--steer", "a/one=2"], "are called alike"), (["one=nan"], "steer.one: nan"),
        ([f"{folders}/likely=1"], "gives no rewards"),
    ):  # fmt: skip
        try:
            assert main([*arguments, "--out", str(tmp_path / "out"), "--steer", *given]) == 2
        except SystemExit as ended:  # argparse
            assert ended.code == 2
        assert message in capsys.readouterr().err
