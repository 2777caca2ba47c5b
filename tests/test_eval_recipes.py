"""Recipe cards: those that come along, what applies, what overrides it, and what reports say."""

import argparse
import hashlib
import json
import runpy

import pytest
from conftest import ROOT, refused, run_script

import quickstart
from unified.pipeline.options import SAMPLING
from unified_eval import load_recipe, parse_with_recipe
from unified_eval.command_line import add_generation_arguments
from unified_eval.recipe_cards import (
    FOLDER,
    add_recipe_argument,
    check_resolution,
    find_recipe,
    recipe_names,
    recipe_note,
)

NAMES = [
    "anole_7b", "emu35_image", "emu3_gen", "janus_pro_1b", "liquid_7b", "llamagen_c2i_b_256", "lumina_mgpt_2", "npp_c2i_b",
    "quickstart", "simplear_1.5b", "wallaroo_7b",
]  # fmt: skip


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_generation_arguments(parser)
    add_recipe_argument(parser)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--decoding", nargs="+", choices=["plain", "gsd"], default=["plain"])
    return parse_with_recipe(parser, [str(each) for each in arguments])


def test_the_cards_that_come_along():
    assert recipe_names() == NAMES
    assert {file.suffix for file in FOLDER.iterdir()} == {".yaml"}, "a folder of data, no package"
    for name in NAMES:
        card = load_recipe(find_recipe(name))
        assert card.sources and card.guidance_scale > 1 and card.resolution[0] > 0, name
    assert load_recipe(find_recipe("npp_c2i_b")).published == {"fid_50k": 4.47}


def test_the_card_of_the_quickstart_is_its_command(monkeypatch):
    """The options of its evaluation, and all that it leaves to the defaults."""
    parse_arguments = runpy.run_path(str(ROOT / "eval" / "evaluate.py"))["parse_arguments"]
    command = [str(part) for part in quickstart.STEPS["evaluate"]]
    own = command[command.index("eval/evaluate.py") :]
    monkeypatch.setattr("sys.argv", own)
    expected = vars(parse_arguments())
    bare = list(own)
    for option in ("--num-images", "--guidance-scale", "--temperature"):
        place = bare.index(option)
        del bare[place : place + 2]
    monkeypatch.setattr("sys.argv", [*bare, "--recipe", "quickstart"])
    found = vars(parse_arguments())
    recipe = found.pop("recipe")
    expected.pop("recipe")
    usual = {**SAMPLING, "decoding": [SAMPLING["decoding"]]}  # what the command leaves to the pipeline
    expected |= {name: usual[name] for name in usual if expected.get(name, 0) in (None, [None])}
    assert found == expected and recipe["overrides"] == {}
    assert recipe["settings"]["guidance_scale"] == 1.5 and recipe["not_applied"] == {}


def test_a_card_applies_and_given_options_override_it(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "checkpoint: mine\nsources: [here]\nguidance_scale: 4.0\ntop_k: 7\nseed: 3\nsamples_per_prompt: 2\n"
        "decoding: gsd\nnum_images: 9\nresolution: [8, 16]\n"
    )
    args = parse("--recipe", file, "--top-k", 5, "--seed", 3)
    assert (args.guidance_scale, args.top_k, args.seed, args.samples, args.decoding) == (4.0, 5, 3, 2, ["gsd"])
    assert (args.temperature, args.top_p) == (None, None), "what a card leaves out is left to the pipeline"
    assert args.recipe["overrides"] == {"top_k": {"recipe": 7, "given": 5}}, "3 is what the card says"
    assert args.recipe["not_applied"] == {"num_images": 9}
    assert args.recipe["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert args.recipe["checkpoint"] == "mine" and json.dumps(args.recipe)
    (note,) = recipe_note(args.recipe)
    assert note == f"Recipe mine (sha256 {args.recipe['sha256'][:12]}), with overrides: top_k 5 in place of 7."
    assert parse("--top-k", 5).recipe is None and recipe_note(None) == []
    assert parse("--recipe", file, "--decoding", "plain").recipe["overrides"] == {
        "decoding": {"recipe": ["gsd"], "given": ["plain"]}
    }
    check_resolution(args.recipe, (8, 16))
    check_resolution(None, (1, 1))
    with pytest.raises(ValueError, match="recipe: 'mine' is for 8x16 images, these are 16x16"):
        check_resolution(args.recipe, (16, 16))


def test_bad_cards_are_errors(tmp_path):
    with pytest.raises(ValueError, match="recipe: 'npp_c2i' is no file and no known name; did you mean 'npp_c2i_b'"):
        parse("--recipe", "npp_c2i")
    file = tmp_path / "bad.yaml"
    for line, message in (
        ("guidance: 3", "recipe: 'guidance' is unknown; did you mean 'guidance_scale'"),
        ("guidance_scale: 0.5", "recipe: guidance_scale: 0.5 must be at least 1"),
        ("top_k: many", "recipe: a value of 'top_k'"),
        ("decoding: fast", "recipe: decoding: 'fast' is unknown"),
        ("resolution: [8]", r"recipe: resolution: \[8\] must be \[height, width\]"),
    ):
        file.write_text(f"checkpoint: mine\nsources: [here]\n{line}\n")
        with pytest.raises(ValueError, match=message):
            parse("--recipe", file)
    file.write_text("checkpoint: mine\n")
    with pytest.raises(ValueError, match=r"recipe: \['sources'\] must be set"):
        parse("--recipe", file)


@pytest.mark.process
def test_reports_carry_the_recipe(pipeline, picture_source, tmp_path, monkeypatch, capsys):
    pipeline.save_pretrained(tmp_path / "pipeline")
    height, width = pipeline.default_size
    file = tmp_path / "tiny.yaml"
    text = "checkpoint: tiny\nsources: [here]\ntemperature: 0.5\nnum_images: 3\nresolution: [{}, {}]\n"
    file.write_text(text.format(height, width))
    common = ["evaluate.py", "--pipeline", tmp_path / "pipeline", "--data", picture_source, "--metrics", "kd",
              "--resamples", 0, "--psnr-split", "none", "--recipe", file]  # fmt: skip
    run_script(monkeypatch, *common, "--temperature", 0.7, "--out", tmp_path / "out")
    run = json.loads((tmp_path / "out" / "metrics.json").read_text())["run"]
    assert run["recipe"]["overrides"] == {"temperature": {"recipe": 0.5, "given": 0.7}}
    assert (run["temperature"], run["num_images"], len(run["captions"])) == (0.7, 3, 3)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert run["recipe"]["sha256"] == digest and digest in (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "generated.json").read_text())["sampling"]["temperature"] == 0.7

    file.write_text(text.format(height, 2 * width))
    assert f"recipe: 'tiny' is for {height}x{2 * width} images" in refused(
        monkeypatch, capsys, *common, "--out", tmp_path / "none"
    )
    file.write_text(text.format(height, width))
    (tmp_path / "prompts.txt").write_text("red apple\n")
    run_script(monkeypatch, "generate_prompts.py", "--pipeline", tmp_path / "pipeline", "--prompts",
               tmp_path / "prompts.txt", "--recipe", file, "--out", tmp_path / "prompts")  # fmt: skip
    written = json.loads((tmp_path / "prompts" / "metrics.json").read_text())
    assert (written["run"]["temperature"], written["run"]["recipe"]["not_applied"]) == (0.5, {"num_images": 3})
    assert written["notes"][0].startswith("Recipe tiny (sha256 ")
