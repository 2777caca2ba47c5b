"""The recipes as commands, one after the other, each through its own command line."""

import subprocess

import pytest
from conftest import LAUNCH, ROOT
from forking import python

from unified.data.code_cache import load_codes
from unified.training.tracking import read_log
from unified_tokenizers import AutoImageTokenizer, load_text_tokenizer

pytestmark = pytest.mark.process


def run(*command, expect=0):
    return checked(python(*command), expect)


def checked(done, expect=0):
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory, picture_source):
    """Both tokenizers and the codes, made by the recipes."""
    folder = tmp_path_factory.mktemp("recipes")
    config = folder / "tokenizer.yaml"
    config.write_text(f"""
output_dir: {folder}/image_tokenizer
sources: [{picture_source}]
image_size: 16
steps: 40
batch_size: 4
shift: 2
validate_every: 10
model: {{channels: 8, encoder_blocks: 1, decoder_blocks: 1, codebook_size: 16, code_dim: 4}}
""")
    launched = [*LAUNCH, "recipes/train_tokenizer.py", "--config", str(config), "seed=3"]
    checked(subprocess.run(launched, cwd=ROOT, capture_output=True, text=True))
    run(
        "recipes/train_text_tokenizer.py",
        "--source",
        picture_source,
        "--out",
        folder / "text_tokenizer",
        "--vocab-size",
        300,
    )
    run("recipes/encode_images.py", "--image-tokenizer", folder / "image_tokenizer", "--source", picture_source,
        "--out", folder / "codes", "--image-size", 16)  # fmt: skip
    return folder


def test_tokenizer_recipe(made):
    log = read_log(made / "image_tokenizer")
    assert [record["step"] for record in log] == [10, 20, 30, 40]
    assert log[-1]["psnr_db"] > log[0]["psnr_db"]
    assert 1 <= log[-1]["perplexity"] <= 16
    assert AutoImageTokenizer.from_pretrained(made / "image_tokenizer").codebook_size == 16


def test_text_tokenizer_recipe(made):
    tokenizer = load_text_tokenizer(made / "text_tokenizer")
    assert tokenizer.decode(tokenizer.encode("red apple")) == "red apple"


def test_encode_recipe(made):
    fingerprint = AutoImageTokenizer.from_pretrained(made / "image_tokenizer").fingerprint
    assert len(load_codes(made / "codes", "train", fingerprint)) == 12


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["train.py", "--config", "recipes/configs/quickstart.yaml", "optimizer.learning_rat=1"],
            "config: 'optimizer.lear",
        ),
        (
            ["train_tokenizer.py", "--config", "recipes/configs/quickstart_tokenizer.yaml", "sources=null"],
            "config: a value of",
        ),
        (["train_text_tokenizer.py", "--source", "./nowhere", "--out", "y"], "source: './nowhere'"),
        (["prepare_smollm2.py", "--gguf", "./nowhere", "--out", "y"], "gguf: 'nowhere' does not exist"),
        (
            ["init_study.py", "--config", "recipes/configs/quickstart.yaml", "--kinds", "text", "--out", "y"],
            "kinds: 'text'",
        ),
    ],
)
def test_bad_commands_say_why(command, message):
    """One line, which begins with the script's name and the field, and exit code 2."""
    done = run(f"recipes/{command[0]}", *command[1:], expect=2)
    assert "Traceback" not in done.stderr and done.stderr.splitlines()[-1].startswith(f"{command[0]}: {message}")


def test_help_explains_every_key():
    text = run("recipes/train.py", "--help").stdout
    for key in ("caption_dropout", "patch_sizes", "ema_decay", "train_image_tables", "segments_column"):
        assert key in text
