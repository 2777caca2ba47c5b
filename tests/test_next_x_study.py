"""The study's arithmetic: cost by formula, costs relative to the baseline, means and spreads."""

from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from conftest import generators, inputs_of, tiny_config
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import unified_eval
from next_x_study import VARIANTS, flops_per_image, measured, parse_arguments, plan, train_and_measure
from next_x_study_report import relative_to_baseline, summarise, table, write_study
from unified import PatchSchedule, UnifiedForCausalLM, UnifiedPipeline
from unified.data.batches import make_batch
from unified.data.code_cache import load_codes
from unified.data.crops import Views
from unified.data.labelled import encode_labelled, labelled_sequence
from unified.prediction.schedule import image_flops, schedule_flops, training_flops
from unified.sequence import ImageSegment, TextSegment, build_sequence
from unified.training.config import load_config
from unified.training.validation import image_loss
from unified_eval.clip import clip_features, load_clip, retrieval_at_1
from unified_eval.features import load_extractor
from unified_eval.frechet import frechet_distance
from unified_eval.selection import choose_evenly, first_usable_rows, unique_captions
from unified_tokenizers import AutoImageTokenizer

pytestmark = pytest.mark.process


@pytest.mark.parametrize("prediction", [
    {"order": "diagonals"}, {"order": "spread", "size": 2}, {"merge": "channel"}, {"order": "rows", "merge": "channel"},
    {"order": "random", "size": 4}, {"merge": "channel", "chained": True},
], ids=str)  # fmt: skip
def test_formula_of_an_image_agrees_with_counted_matrix_products(prediction):
    torch.manual_seed(0)
    config = tiny_config(
        text={"hidden_size": 64, "intermediate_size": 192},
        codebook_size=512,
        image_grids=[[8, 8]],
        prediction=prediction,
    )
    model = UnifiedForCausalLM(config)
    model.set_attn_implementation("eager")
    sequence = build_sequence(
        [TextSegment([9, 8, 7], loss=False), ImageSegment(torch.randint(512, (8, 8)))], config.vocabulary
    )
    inputs = make_batch([sequence], config).inputs
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    positions = inputs["input_ids"].shape[1] - 1
    attention, head = 6 * 2 * 64 * positions**2, 6 * 64 * 50
    scored = 64 * model.image_head.in_features // 64
    in_place = 2 * scored * 64 * 512
    expected = image_flops(config, (8, 8), 5) + attention + head - in_place
    assert counter.get_total_flops() == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("p", [1, 2])
def test_formula_agrees_with_counted_matrix_products(p):
    """Counted by torch over forward and backward. Attention is small here; the formula halves it for causality."""
    torch.manual_seed(0)
    config = tiny_config(text={"hidden_size": 64, "intermediate_size": 192}, codebook_size=512, image_grids=[[8, 8]])
    model = UnifiedForCausalLM(config)
    model.set_attn_implementation("eager")
    codes = torch.randint(512, (8, 8))
    sequence = build_sequence([TextSegment([9, 8, 7], loss=False), ImageSegment(codes)], config.vocabulary)
    batch = inputs_of(config, sequence, p=p)
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    text, image = 5, 64 // p**2  # <eoi>, the last position, is predicted but not run
    positions = text + image
    attention = 6 * 2 * 64 * positions**2  # what the formula leaves out: the half above the diagonal, per layer
    head = 6 * 64 * 50  # one position is scored over text
    in_place = 2 * image * 64 * 512  # the counter does not see the product that adds to the image head's gradient
    expected = training_flops(config, text, image) + attention + head - in_place
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)


def test_schedule_cost_weighs_its_stages():
    config = tiny_config()
    halves = schedule_flops(PatchSchedule((2, 1), (0.5, 0.5)), config, (8, 8), 5)
    assert halves == pytest.approx((training_flops(config, 5, 16) + training_flops(config, 5, 64)) / 2)


def test_a_run_from_training_to_figures(config_file, parts, picture_source, text_tokenizer, tmp_path, monkeypatch):
    """Metrics are those of the saved pipeline and of images generated again; other settings in the same folder are refused."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # it would hold for all later tests
    rows = first_usable_rows(picture_source, "train")[0][:6]
    clip = unified_eval.train_nano_clip(
        [row.image for row in rows], [row.caption for row in rows], "tiny", steps=1, batch_size=6, progress=False
    )
    unified_eval.save_nano_clip(clip, tmp_path / "clip", {})
    arguments = ["--config", str(config_file), "--data", picture_source, "--clip", str(tmp_path / "clip"), "--out",
                 str(tmp_path / "study"), "--variants", "(2,1)", "--seeds", "5", "--num-images", "4", "steps=4",
                 "validate_every=null", "checkpoint_every=null"]  # fmt: skip
    (run,) = plan(parse_arguments(arguments))
    result = train_and_measure(run)
    assert (result["variant"], result["seed"], result["steps"], result["images"]) == ("(2,1)", 5, 4, 16)
    pipe = UnifiedPipeline.from_pretrained(f"{run.out}/pipeline")
    pipe.set_progress_bar_config(disable=True)
    held_out = load_codes(str(parts / "codes"), "validation", None)
    expected = image_loss(pipe.model, held_out, text_tokenizer, pipe.model.config, 4, torch.device("cpu"))
    assert result["validation_loss"] == expected
    captions = [
        row.caption for row in choose_evenly(unique_captions(first_usable_rows(picture_source, "train")[0]), 4, 0)
    ]
    drawn = pipe(captions, guidance_scale=1.5, generator=generators(0, 1, 2, 3)).images
    assert result["r1"] == retrieval_at_1(*clip_features(load_clip(str(tmp_path / "clip")), drawn, captions), captions)
    config = pipe.model.config
    lengths = [len(text_tokenizer.encode(row["caption"])) for row in load_codes(str(parts / "codes"), "train", None)]
    text = sum(lengths) / len(lengths) + 2
    assert result["flops"] == pytest.approx(
        16 * (training_flops(config, text, 4) + training_flops(config, text, 16)) / 2
    )

    assert train_and_measure(run) == result, "not run again"
    assert measured(run) == result and measured(replace(run, out=str(tmp_path / "other"))) is None
    with pytest.raises(ValueError, match=r"was made with other settings \(num_images: 4 then, 3 now\)"):
        train_and_measure(replace(run, num_images=3))
    with pytest.raises(ValueError, match="was trained with other settings"):
        train_and_measure(replace(run, overrides=(*run.overrides, "steps=5")))


@pytest.fixture(scope="module")
def class_config(parts, tmp_path_factory):
    """A class-conditional run on encoded images of three named classes, and the images' folder."""
    root, rng = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(9)]
    kinds = datasets.ClassLabel(names=["bird", "cat", "dog"])
    features = datasets.Features(image=datasets.Image(), kind=kinds)
    rows = datasets.Dataset.from_dict({"image": images, "kind": [0, 1, 2] * 3}, features)
    datasets.DatasetDict(train=rows, validation=rows.select(range(3))).save_to_disk(root / "images")
    tokenizer = AutoImageTokenizer.from_pretrained(parts / "image_tokenizer")
    encode_labelled(tokenizer, str(root / "images"), root / "codes", Views(((16, 16),)), class_column="kind")
    (root / "run.yaml").write_text(f"""
steps: 4
batch_size: 4
track_with: []
data: {{train: {root}/codes, class_column: kind}}
model:
  image_tokenizer: {parts}/image_tokenizer
  architecture: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
                  max_position_embeddings: 128}}
  options: {{conditioning: {{kind: class, classes: 3}}}}
optimizer: {{learning_rate: 0.01}}
""")
    return root


def test_classes_in_place_of_captions(class_config, parts, tmp_path, monkeypatch):
    """Losses and both distances are those of the saved pipeline, asked for the classes of the chosen images; no R@1."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    arguments = ["--config", str(class_config / "run.yaml"), "--data", str(class_config / "images"), "--out", str(tmp_path),
                 "--variants", "(2,1)", "--seeds", "5", "--num-images", "6", "--guidance-scale", "2"]  # fmt: skip
    (run,) = plan(parse_arguments(arguments))
    result = train_and_measure(run)
    pipe = UnifiedPipeline.from_pretrained(f"{run.out}/pipeline")
    pipe.set_progress_bar_config(disable=True)
    config = pipe.model.config
    held_out = load_codes(class_config / "codes", "validation", None, "labelled")
    sequences = [labelled_sequence(row, np.random.default_rng(0), config.vocabulary, 3) for row in held_out]
    with torch.no_grad():
        expected = pipe.model(**make_batch(sequences, config).inputs).image_loss.item()
    assert result["validation_loss"] == pytest.approx(expected, rel=1e-6)
    chosen = choose_evenly(range(9), 6, 0)
    rows = datasets.load_from_disk(class_config / "images")["train"]
    extractor = load_extractor("efficientnet-lite0")
    real = extractor([rows[i]["image"] for i in chosen])
    for name, scale in (("fd_efflite0", 2.0), ("fd_efflite0_unguided", 1.0)):
        labels = [i % 3 for i in chosen]
        images = pipe(class_labels=labels, guidance_scale=scale, generator=generators(*range(6))).images
        assert result[name] == pytest.approx(frechet_distance(extractor(images), real), rel=1e-5)
    assert "r1" not in result and result["passes"] == 16 and result["seconds_of_16"] > 0
    assert result["flops"] == pytest.approx(16 * (training_flops(config, 0, 4) + training_flops(config, 0, 16)) / 2)
    lines = table(summarise(relative_to_baseline([result], "(2,1)")), 1).splitlines()
    assert "| FD-EffLite0 | FD-EffLite0, no guidance |" in lines[2]


def test_clip_is_for_captions(class_config, config_file):
    arguments = ["--data", "x", "--out", "y", "--config"]
    with pytest.raises(ValueError, match="clip: a class-conditional model has no captions to find its images by"):
        plan(parse_arguments([*arguments, str(class_config / "run.yaml"), "--clip", "z"]))
    with pytest.raises(ValueError, match="clip: missing, and images are found by their captions"):
        plan(parse_arguments([*arguments, str(config_file)]))


RESULTS = [
    {"variant": v, "seed": s, "flops": f, "cpu_seconds": c, "training_loss": t, "validation_loss": 2.0,
     "fd_efflite0": 100.0, "r1": r}
    for v, s, f, c, t, r in [("base", 0, 10.0, 8.0, 1.0, 0.5), ("fast", 0, 6.0, 4.0, 1.5, 0.7),
                             ("base", 1, 10.0, 4.0, 2.0, 0.6), ("fast", 1, 6.0, 3.0, 2.5, 0.9)]
]  # fmt: skip


def test_costs_are_relative_within_a_seed():
    summary = summarise(relative_to_baseline(RESULTS, "base"))
    assert summary["base"]["cpu_seconds"] == (1.0, 0.0)
    mean, spread = summary["fast"]["cpu_seconds"]
    assert mean == pytest.approx((0.5 + 0.75) / 2) and spread == pytest.approx(0.25 / 2**0.5)
    assert summary["fast"]["flops"] == (0.6, 0.0)
    assert summary["fast"]["r1"][0] == pytest.approx(0.8)


def test_table_marks_the_best():
    lines = table(summarise(relative_to_baseline(RESULTS, "base")), 2).splitlines()
    assert "agreement" not in lines[2]
    base, fast = lines[4].split(" | "), lines[5].split(" | ")
    assert base[3] == "**1.500 ± 0.707**" and fast[3] == "2.000 ± 0.707"  # lower loss
    assert fast[6].startswith("**0.800") and not base[6].startswith("**")  # higher R@1


def test_seed_without_baseline_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"seeds \[1\] lack 'base'"):
        write_study([r for r in RESULTS if (r["variant"], r["seed"]) != ("base", 1)], "base", tmp_path)


def test_study_writes_plot_and_table(tmp_path):
    write_study(RESULTS, "base", tmp_path)
    assert (tmp_path / "study.png").stat().st_size > 10_000
    assert "| fast |" in (tmp_path / "table.md").read_text()


def test_a_variant_stops_at_the_cost_of_another(config_file, picture_source, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    arguments = ["--config", str(config_file), "--data", picture_source, "--clip", "none", "--out", str(tmp_path),
                 "--num-images", "0", "steps=8", "validate_every=null", "checkpoint_every=null"]  # fmt: skip
    names = ["next-token, cost of (2,1)", "channel diagonals"]
    stopped, channel = plan(parse_arguments(["--variants", *names, "--seeds", "3", *arguments]))
    assert plan(parse_arguments([*arguments[:8], "--variants", *names, "--seeds", "3", *arguments[8:]])) == [
        stopped,
        channel,
    ]
    one, two = (load_config(config_file, [*VARIANTS[name][0], "output_dir=x"]) for name in ("next-token", "(2,1)"))
    result = train_and_measure(stopped)
    assert result["steps"] == round(8 * flops_per_image(two) / flops_per_image(one)) < 8
    assert result["passes"] == 16
    result = train_and_measure(channel)
    own = load_config(config_file, [*VARIANTS["channel diagonals"][0], "output_dir=x"])
    assert result["steps"] == round(8 * flops_per_image(one) / flops_per_image(own)) > 8
    assert result["passes"] == 3 and result["seconds_of_16"] > 0
    pipe = UnifiedPipeline.from_pretrained(f"{channel.out}/pipeline")
    assert pipe.model.prediction.order == "diagonals" and pipe.model.prediction.merge.side == 2
    assert len({run.out for run in plan(parse_arguments([*arguments, "--variants", *VARIANTS]))}) == 3 * len(VARIANTS)
