"""What users register from their own files: the examples work, and mistakes say what is wrong."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from unified_evaluation.evaluate import parse_arguments

from unified import register
from unified.registry import REWARDS, import_extensions, import_modules
from unified.training.config import load_config
from unified_eval.inputs import Inputs
from unified_eval.metrics import METRICS, measure_images
from unified_tokenizers import AutoImageTokenizer, ImageTokenizer, auto

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = [str(ROOT / "examples" / f"{name}.py") for name in ("tokenizer", "metric", "reward")]


pytestmark = pytest.mark.usefixtures("extension_tables")


def test_the_tokenizer_of_the_example(tmp_path, photo):
    import_modules(EXAMPLES[:1])
    tokenizer = auto._TOKENIZERS["mean_colours"](downsample=8, levels=4)
    tokenizer.save_pretrained(tmp_path)
    opened = AutoImageTokenizer.from_pretrained(tmp_path)
    assert isinstance(opened, ImageTokenizer) and opened.fingerprint == tokenizer.fingerprint
    assert opened.codebook_size == 64 and opened.downsample == 8
    red = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand(1, 3, 16, 16)
    codes = opened.encode(red)
    assert codes.tolist() == [[[48, 48], [48, 48]]]  # 3 * 16 + 0 * 4 + 0
    assert torch.equal(opened.decode(codes), red)


def test_the_metric_of_the_example(tmp_path):
    import_modules(EXAMPLES[1:2])
    assert "sharpness" in METRICS
    stripes = Image.fromarray(np.tile(np.array([0, 100], np.uint8), (8, 4)))  # differs by 100 to the right, not below
    grey = Image.new("L", (8, 8), 7)
    inputs = Inputs(["a", "b"], [grey, grey], [grey, grey], [stripes.convert("RGB"), grey.convert("RGB")])
    results = measure_images(inputs, ["sharpness"])
    assert results.metrics == {"sharpness": pytest.approx(25.0), "sharpness_real": 0.0}
    assert parse_arguments([*["--pipeline", "p", "--data", "d", "--out", "o", "--metrics", "sharpness"]]).metrics == [
        "sharpness"
    ]


def test_an_option_imports_before_names_are_read():
    line = ["--pipeline", "p", "--data", "d", "--out", "o", "--metrics", "sharpness"]
    with pytest.raises(SystemExit):
        parse_arguments(line)
    assert parse_arguments(["--import", EXAMPLES[1], *line]).metrics == ["sharpness"]


def test_the_reward_of_the_example():
    import_modules(EXAMPLES[2:])
    image = Image.new("RGB", (4, 4), (230, 30, 30))
    image.paste((0, 0, 0), (0, 0, 4, 1))
    captions = ["a red circle", "a blue circle", "a circle"]
    assert REWARDS["named_colour"]([image] * 3, captions) == [0.75, 0.0, 0.0]


def test_a_config_names_its_imports(config_file, tmp_path):
    load_config(config_file, [f"output_dir={tmp_path}", f"imports=[{EXAMPLES[2]}]"])
    assert "named_colour" in REWARDS
    with pytest.raises(ValueError, match=r"imports: 'nothing.py' does not exist"):
        load_config(config_file, [f"output_dir={tmp_path}", "imports=[nothing.py]"])


def test_modules_of_this_folder_are_found(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "import unified\nunified.register('one', reward=lambda images, captions: [1.0])"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert import_extensions(["a", "--import", "my_rewards", "--b", "c"]) == ["a", "--b", "c"]
    assert REWARDS["one"]([], []) == [1.0]


def test_a_file_that_fails_can_be_imported_again(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import no_such_package")
    with pytest.raises(ValueError, match="no_such_package"):
        import_modules([str(file)])
    file.write_text("from unified import register; register('one', reward=len)")
    import_modules([str(file), str(file)])  # once
    assert REWARDS["one"] is len


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("", {"reward": len}, "name: '' is no name"),
        ("x", {}, "register: nothing is given for 'x'"),
        ("x", {"reward": 3}, "reward: 'x' is 3, which cannot be called"),
        ("x", {"metric": object()}, "metric: 'x' is .*, not an instance with needs and add"),
        ("fd", {"metric": METRICS["fd"]}, "metric: 'fd' is taken"),
        ("x", {"metric": type(METRICS["fd"])}, "metric: 'x' is .*, not an instance"),
        (
            "x",
            {"tokenizer": torch.nn.Linear},
            "tokenizer: Linear lacks encode, decode, codebook_vectors, save_pretrained, from_pre",
        ),
        ("x", {"tokenizer": 3}, "tokenizer: 3 is no class"),
        ("janus", {"tokenizer": torch.nn.Linear}, "tokenizer: 'janus' is taken"),
    ],
)
def test_what_cannot_be_registered(name, given, message):
    with pytest.raises(ValueError, match=message):
        register(name, **given)
    assert name == "fd" or (name not in METRICS and name not in REWARDS)
