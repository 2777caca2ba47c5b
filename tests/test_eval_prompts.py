"""Prompt files of benchmarks, and the script that generates them."""

import json
import runpy
import sys
from pathlib import Path

import pytest

import prepare_shapes
from unified_eval import Results, read_prompts
from unified_eval.prompts import Prompt

ROOT = Path(__file__).resolve().parent.parent
GENEVAL = [
    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}],
     "prompt": "a photo of two clocks"},
    {"tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "cow", "count": 1, "position": ["above", 0]}],
     "prompt": "a photo of a cow above a dog"},
]  # fmt: skip
PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tBiology\n"
    '"Fly" says a sign \tArts\tWriting\t\n'
    "bond\tAbstract\tBasic\t\n"
)


def test_prompts_of_geneval(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in GENEVAL) + "\n\n")
    prompts = read_prompts(file)
    assert [(prompt.text, prompt.tag) for prompt in prompts] == [
        ("a photo of two clocks", "counting"),
        ("a photo of a cow above a dog", "position"),
    ]
    assert [prompt.metadata for prompt in prompts] == GENEVAL


def test_prompts_of_parti(tmp_path):
    (tmp_path / "PartiPrompts.tsv").write_text(PARTI)
    prompts = read_prompts(tmp_path / "PartiPrompts.tsv")
    assert [(prompt.text, prompt.tag) for prompt in prompts] == [
        ("bond", "Abstract"), ('"Fly" says a sign', "Arts"), ("bond", "Abstract"),
    ]  # fmt: skip
    assert prompts[1].metadata["Challenge"] == "Writing"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "x", "tag": "y"}', r"line 1 of '.*' lacks \['include'\]"),
        ("a.jsonl", '{"prompt": "x", "tag": "y", "include": [1]}\nno', "line 2 of .* is not JSON"),
        ("a.jsonl", "\n", "holds no prompt"),
        ("a.tsv", "Text\tKind\nx\ty\n", r"has the columns \['Text', 'Kind'\]; need Prompt and Category"),
        ("a.tsv", "Prompt\tCategory\n\tArts\n", "line 2 of .* lacks its prompt or category"),
        ("a.csv", "x", r"is missing or not one of \['\.jsonl', '\.tsv', '\.txt'\]"),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["generate_prompts.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "eval" / "generate_prompts.py"), run_name="__main__")


@pytest.mark.process
def test_script_generates_geneval_and_parti(pipeline, tmp_path, monkeypatch, capsys):
    from unified_eval import save_nano_clip, train_nano_clip
    from unified_eval.shapes import check_scene

    pipeline.save_pretrained(tmp_path / "pipeline")
    scene = prepare_shapes.Scene(
        "single_object", "white", (prepare_shapes.Thing("medium", "red", "star", 0.5, 0.5, 0.16),), True, False
    )
    images = [prepare_shapes.draw(scene, 32)] * 2
    save_nano_clip(
        train_nano_clip(images, ["a", "b"], "tiny", steps=1, batch_size=2, progress=False), tmp_path / "clip", {}
    )
    lines = [{"tag": "single_object", "include": prepare_shapes.claims(scene), "prompt": "a red star"},
             {"tag": "colors", "include": [{"class": "circle", "count": 1}], "prompt": "a circle"}]  # fmt: skip
    (tmp_path / "shapes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = ["--pipeline", tmp_path / "pipeline", "--clip", tmp_path / "clip"]
    run(monkeypatch, *common, "--prompts", tmp_path / "shapes.jsonl", "--samples", 2, "--out", tmp_path / "geneval")
    folder = tmp_path / "geneval" / "images"
    assert sorted(path.name for path in folder.iterdir()) == ["00000", "00001"]
    assert [json.loads((folder / name / "metadata.jsonl").read_text()) for name in ("00000", "00001")] == lines
    metrics = json.loads((tmp_path / "geneval" / "metrics.json").read_text())
    assert set(metrics["metrics"]) == {"clip_score", "clip_score_colors", "clip_score_single_object"}
    parts = [metrics["metrics"][f"clip_score_{tag}"] for tag in ("colors", "single_object")]
    assert metrics["metrics"]["clip_score"] == pytest.approx(sum(parts) / 2, rel=1e-9)
    assert metrics["recipes"]["clip_score"]["n"] == 4 and metrics["run"]["generated"] == 4
    assert "CLIP score (tiny), all prompts" in capsys.readouterr().out
    with pytest.raises(ValueError, match="image: 16x16; need a square image of 24 pixels"):
        check_scene(images[0].resize((16, 16)), lines[0]["include"])  # so --shapes is for larger images than these

    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(type(pipeline), "__call__", None)  # errors show before anything is generated
        for message, *wrong in (
            ("clip: './absent' does not exist on this machine", "--clip", "./absent"),
            ("image: 16x16; need a square image of 24 pixels", "--shapes"),
            ("is a file; choose another folder", "--out", tmp_path / "file"),
            ("--samples: 0 is below 1", "--samples", 0),
            ("--clip: 1 prompt; a score needs 2 or more", "--max-prompts", 1),
        ):
            with pytest.raises(SystemExit, match="2"):
                run(patch, *common, "--prompts", tmp_path / "shapes.jsonl", "--out", tmp_path / "none", *wrong)
            assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "none").exists()

    (tmp_path / "parti.tsv").write_text(PARTI)
    run(monkeypatch, *common, "--prompts", tmp_path / "parti.tsv", "--max-prompts", 2, "--out", tmp_path / "parti")
    assert [path.name for path in sorted((tmp_path / "parti" / "images").iterdir())] == ["000.png", "001.png"]
    assert set(json.loads((tmp_path / "parti" / "metrics.json").read_text())["metrics"]) == {
        "clip_score", "clip_score_Abstract", "clip_score_Arts",
    }  # fmt: skip


def test_prompts_that_the_clip_cannot_read_have_no_score():
    """Three prompts of two images each; the second prompt is too long."""
    from test_eval_metrics import CLIP, Tokenizer, flat

    class OneWord(Tokenizer):
        def __call__(self, texts, context_length=2):
            texts = [texts] if isinstance(texts, str) else texts
            rows = super().__call__([text.split()[0] if text else "" for text in texts], context_length)
            for row, text in zip(rows, texts, strict=True):
                row[1 : len(text.split())] = 9
            return rows

    add_clip_scores = runpy.run_path(str(ROOT / "eval" / "generate_prompts.py"))["add_clip_scores"]
    prompts = [Prompt("red", "a", {}), Prompt("green and more", "a", {}), Prompt("blue", "b", {})]
    red, blue = flat(255, 0, 0), flat(0, 0, 255)
    results = Results(["0", "1", "2"])
    add_clip_scores(results, prompts, [red, blue, blue, blue, blue, blue], CLIP._replace(tokenizer=OneWord()))
    assert results.metrics == {"clip_score": 75, "clip_score_a": 50, "clip_score_b": 100}
    assert results.recipes["clip_score"]["n"] == 4 and results.notes[0].startswith("clip: 1 of 3 captions exceed")
