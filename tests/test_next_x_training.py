"""Orders and merges from a recipe's settings to images: training, resuming, adapters, another order for a trained model."""

import copy
import json
import shutil

import pytest
import torch
from conftest import bits, generators, noisy_adapter, tiny_model, tiny_pipeline
from torch._subclasses.fake_tensor import FakeTensorMode

from unified import UnifiedPipeline
from unified.data.batches import make_batch
from unified.decoding import Sampling, generate_codes
from unified.lora.adapters import load_lora
from unified.lora.base import base_of
from unified.lora.switching import active_table
from unified.model.retrofit import change_prediction
from unified.sequence import ImageSegment, TextSegment, build_sequence
from unified.training.config import load_config
from unified.training.loop import train
from unified.training.setup import adapt
from unified.training.tracking import read_log
from unified_tokenizers.images import to_tensor

SHORT = ["steps=4", "validate_every=4", "checkpoint_every=null", "optimizer.ema_decay=null"]
FINE = ["schedule.patch_sizes=[1]", "schedule.shares=[1.0]"]


def run(config_file, folder, *options):
    return train(load_config(config_file, [f"output_dir={folder}", *options]))


def opened(folder):
    pipe = UnifiedPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.process
@pytest.mark.parametrize(("options", "passes"), [
    (["prediction.order=diagonals", "schedule.patch_sizes=[2,1]", "schedule.shares=[0.5,0.5]"], 7),
    (["prediction.order=random", "prediction.size=5", *FINE], 5),
    (["prediction.order=rows_at_once", "prediction.merge=channel", *FINE], 2),
], ids=str)  # fmt: skip
def test_a_run_ends_in_a_pipeline_that_needs_no_word_about_the_order(options, passes, config_file, tmp_path):
    pipe = opened(run(config_file, tmp_path, *SHORT, *options))
    seen = []
    result = pipe("red apple", generator=generators(3), guidance_scale=2.0, output_type="codes",
                  callback_on_step_end=lambda pipe, step, timestep, state: seen.append(step))  # fmt: skip
    assert len(seen) == passes and seen[-1] == 15 and seen == sorted(seen)
    again = pipe(["blue car", "red apple"], generator=generators(4, 3), guidance_scale=2.0, output_type="codes")
    assert torch.equal(again.codes[1], result.codes[0])
    *_, streamed = pipe.stream("red apple", generator=generators(3), guidance_scale=2.0, output_type="codes")
    assert torch.equal(streamed.codes, result.codes)
    pipe.enable_fast_decoding(int8=True)
    assert pipe("red apple", generator=generators(3), output_type="codes").codes.min() >= 0


@pytest.mark.process
def test_inpainting_by_queries_keeps_what_is_outside_of_the_mask(config_file, tmp_path):
    pipe = opened(run(config_file, tmp_path, *SHORT, "prediction.order=spread", "prediction.size=2", *FINE))
    image = pipe("red apple", generator=generators(1)).images[0]
    codes = pipe.image_tokenizer.encode(to_tensor([image]))
    mask = image.convert("L").point(lambda value: 0)
    stride = pipe.image_tokenizer.downsample
    mask.paste(255, (0, 0, 2 * stride, 2 * stride))
    result = pipe.inpaint("blue car", image, mask, generator=generators(2), output_type="codes")
    outside = torch.ones(4, 4, dtype=torch.bool)
    outside[:2, :2] = False
    assert torch.equal(result.codes[0][outside], codes[0][outside])


@pytest.mark.process
def test_a_resumed_run_of_a_random_order_equals_an_uninterrupted_one(config_file, tmp_path):
    """Permutations belong to the row's number, so a run that continues meets the same ones."""
    options = ["steps=6", "checkpoint_every=3", "prediction.order=random", *FINE]
    run(config_file, tmp_path / "whole", *options)
    shutil.copytree(
        tmp_path / "whole", tmp_path / "resumed", ignore=shutil.ignore_patterns("step-00000006", "pipeline")
    )
    run(config_file, tmp_path / "resumed", *options, "resume=latest")
    whole, resumed = (opened(tmp_path / name / "pipeline").model.state_dict() for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_accumulation_and_batch_see_the_same_permutations(config_file, tmp_path):
    options = [*SHORT, "steps=2", "validate_every=null", "prediction.order=random", "data.caption_dropout=0.3", *FINE]
    run(config_file, tmp_path / "one", *options, "batch_size=8")
    run(config_file, tmp_path / "several", *options, "batch_size=2", "gradient_accumulation_steps=4")
    losses = [[entry["image_loss"] for entry in read_log(tmp_path / name)] for name in ("one", "several")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_another_order_for_a_trained_model(finished, config_file, tmp_path):
    base = [f"model.pipeline={finished}/pipeline", "model.architecture=null", "prediction.order=diagonals", *FINE]
    full = opened(run(config_file, tmp_path / "full", *base, *SHORT, "steps=12", "validate_every=12"))
    assert full.model.prediction.order == "diagonals" and not full.model.config.new_image_tables
    log = read_log(tmp_path / "full")
    assert log[11]["image_loss"] < log[0]["image_loss"]


def codes_of(pipe, **options):
    return pipe("red apple", generator=generators(3), output_type="codes", **options).codes


@pytest.fixture(scope="module")
def raster(text_tokenizer, image_tokenizer, tmp_path_factory):
    """A pipeline of raster order."""
    folder = tmp_path_factory.mktemp("raster") / "pipeline"
    tiny_pipeline(text_tokenizer, image_tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def brought(raster, tmp_path):
    """Makes an adapter of another order with random weights, in a folder."""

    def make(order):
        changed = change_prediction(opened(raster).model, {"order": order})
        noisy_adapter(changed, tmp_path / order, 1)
        return tmp_path / order

    return make


@pytest.mark.process
def test_a_run_trains_an_adapter_of_another_order(raster, config_file, tmp_path):
    """The loss falls, the join is trained and saved beside the LoRA, and the raster pipeline itself loads it."""
    options = [
        f"model.pipeline={raster}",
        "model.architecture=null",
        "prediction.order=diagonals",
        "optimizer.ema_decay=null",
    ]
    kept = ["lora.rank=4", "data.caption_dropout=0", "checkpoint_every=null", "validate_every=null", *FINE]
    folder = run(config_file, tmp_path, *options, *kept, "steps=16")
    losses = [entry["image_loss"] for entry in read_log(tmp_path)]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["image_join"]
    assert not (tmp_path / "base").exists()
    pipe = opened(raster)
    pipe.load_lora_weights(folder)
    model = pipe.model.get_base_model()
    assert model.prediction.order == "diagonals" and codes_of(pipe).min() >= 0
    config = load_config(config_file, [*options, *kept, f"output_dir={tmp_path}", "objectives=[{name: cca}]"])
    with pytest.raises(ValueError, match=r"objectives: cca compares .* has not learned the order 'diagonals'"):
        adapt(config, change_prediction(opened(raster).model, {"order": "diagonals"}), pipe.image_tokenizer, None)
    with torch.no_grad():  # what was trained is what was loaded, the join included
        made = change_prediction(opened(raster).model, {"order": "diagonals"}).image_join
        assert not torch.equal(active_table(model.image_join).narrow.weight, made.narrow.weight)


@pytest.mark.process
@pytest.mark.parametrize(
    ("order", "new", "passes"),
    [("diagonals", ["image_join"], 7), ("rows", None, 7), ("rows_at_once", ["image_query"], 4)],
)
def test_an_adapter_brings_its_order_and_takes_it_along(order, new, passes, raster, brought, tmp_path):
    folder = brought(order)
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == new
    pipe = opened(raster)
    before, weights = codes_of(pipe), bits(pipe.model)
    pipe.load_lora_weights(folder)
    assert pipe.model.get_base_model().prediction.order == order
    steps = []
    after = codes_of(pipe, callback_on_step_end=lambda pipe, step, timestep, state: steps.append(step))
    assert len(steps) == passes
    pipe.save_lora_weights(tmp_path / "again")
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "fused")
    fused, again = opened(tmp_path / "fused"), opened(raster)
    again.load_lora_weights(tmp_path / "again")
    assert torch.equal(codes_of(again), after)
    assert torch.equal(codes_of(fused), after) and fused.model.prediction.order == order
    pipe.unload_lora_weights()
    assert pipe.model.prediction.is_raster and torch.equal(codes_of(pipe), before)
    found = pipe.model.state_dict()
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
    pipe.load_lora_weights(folder)
    assert torch.equal(codes_of(pipe), after)


@pytest.mark.process
def test_an_adapter_of_another_order_is_whole_alone(raster, brought, tmp_path):
    folder, pipe = brought("diagonals"), opened(raster)
    noisy_adapter(opened(raster).model, tmp_path / "raster", 0)
    pipe.load_lora_weights(folder, "diagonal")
    after = codes_of(pipe)
    for refused, message in (
        (lambda: pipe.load_lora_weights(folder, "b"), r"lora: \['diagonal'\] has changed the order of the model"),
        (
            lambda: pipe.set_adapters("diagonal", 0.5),
            "set_adapters: the adapter has changed the order of the model to 'diagonals'",
        ),
        (lambda: pipe.disable_lora(), "disable_lora: the adapter has changed the order"),
        (lambda: pipe.fuse_lora(lora_scale=0.5), "lora_scale: the adapter has changed the order"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    pipe.set_adapters("diagonal")
    assert torch.equal(codes_of(pipe), after)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "raster", "raster")
    with pytest.raises(
        ValueError, match=r"changes the order of the model to 'diagonals', not for the adapters \['raster'\]"
    ):
        pipe.load_lora_weights(folder)
    with pytest.raises(ValueError, match="to 'diagonals', not for a run that trains it further"):
        load_lora(opened(raster).model, folder, "a", trainable=True)
    rows = change_prediction(opened(raster).model, {"order": "rows"})
    with pytest.raises(ValueError, match=r"made for another model .*prediction"):
        load_lora(rows, folder, "a")
    file = folder / "unified_base.json"
    file.write_text(file.read_text().replace('"kind"', '"kin"', 1))
    with pytest.raises(
        ValueError, match=r"unified_base\.json.*needs order, size and a merge with kind, side and chained"
    ):
        opened(raster).load_lora_weights(folder)


def test_a_changed_prediction_keeps_backbone_embedding_and_head():
    model = tiny_model(seed=3)
    head, text = model.image_head.weight.clone(), copy.deepcopy(model)(torch.tensor([[1, 5, 6]])).logits
    changed = change_prediction(model, {"order": "diagonals"})
    assert torch.equal(changed.image_head.weight, head)
    assert torch.equal(changed(torch.tensor([[1, 5, 6]])).logits, text)
    codes = generate_codes(changed, [[1, 5, 3]], None, (4, 4), Sampling(), generators(1))
    assert codes.shape == (1, 4, 4)


@pytest.mark.process
def test_an_adapter_of_all_image_modules(config_file, tmp_path, on_a_backbone):
    """Queries and a learned merge are trained, saved and loaded with the adapter."""
    way = ["prediction.order=spread", "prediction.merge=channel", "prediction.chained=true"]
    options = [*on_a_backbone, *SHORT, *FINE, "lora.rank=4", *way]
    folder = run(config_file, tmp_path, *options)
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert set(saved["modules_to_save"]) == {
        f"image_{name}" for name in ("embed", "head", "query", "merge", "split", "chain")
    }
    pipe = opened(tmp_path / "base")
    before = {name: value.clone() for name, value in base_of(pipe.model).state_dict().items()}
    pipe.load_lora_weights(folder)
    once = pipe("red apple", generator=generators(3), output_type="codes").codes
    pipe.set_adapters("default", 0.5)
    assert not torch.equal(pipe("red apple", generator=generators(3), output_type="codes").codes, once)
    pipe.unload_lora_weights()
    after = base_of(pipe.model).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("option", "message"), [
    ("prediction.order=zigzag", r"prediction\.order: 'zigzag' is unknown"),
    ("prediction.merge=mean", r"prediction\.merge: 'mean' is for training stages"),
    ("prediction.size=-1", r"prediction\.size: -1 must be"),
    ("prediction={merge: channel, window: 3}", r"prediction\.window: 3 does not divide|\^2 does not divide"),
    ("prediction={order: regions, size: 3}", r"prediction\.size: 3 regions a side do not divide a grid of 4x4"),
    ("prediction.direction=up", "direction"),
    ("model.options={prediction: {order: rows}}", r"model\.options: 'prediction' is unknown or not free"),
])  # fmt: skip
def test_bad_settings_are_named_before_the_first_step(option, message, config_file, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(config_file, tmp_path, *SHORT, *FINE, option)


@pytest.mark.process
@pytest.mark.parametrize(
    "prediction",
    [{"order": "diagonals"}, {"order": "random"}, {"order": "rows", "merge": "channel", "chained": True}],
    ids=str,
)
@pytest.mark.parametrize("pack_length", [None, 100])
def test_forward_with_loss_depends_on_no_values(prediction, pack_length):
    model = tiny_model(prediction=prediction).train()
    rows = [
        build_sequence([TextSegment([5]), ImageSegment(torch.zeros(4, 4).long())], model.config.vocabulary)
        for _ in range(2)
    ]
    batch = make_batch(rows, model.config, None, pack_length).inputs
    mode, fake = FakeTensorMode(), copy.deepcopy(model)
    with mode:
        for module in fake.modules():
            for table, wrap in ((module._parameters, torch.nn.Parameter), (module._buffers, lambda t: t)):
                table.update({name: wrap(mode.from_tensor(t)) for name, t in table.items() if t is not None})
        inputs = {name: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for name, t in batch.items()}
        loss = fake(**inputs).loss
        loss.backward()
    assert loss.shape == ()


@pytest.mark.process
@pytest.mark.parametrize(
    "prediction", [{"order": "diagonals"}, {"order": "random", "merge": "channel", "chained": True}], ids=str
)
def test_forward_with_loss_compiles_to_one_graph(prediction):
    torch._dynamo.reset()
    model = tiny_model(prediction=prediction).train()
    rows = [build_sequence([TextSegment([5]), ImageSegment(torch.ones(4, 4).long())], model.config.vocabulary)]
    batch = make_batch(rows, model.config).inputs
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss, rtol=1e-6, atol=1e-6)
