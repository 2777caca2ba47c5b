"""The command line: what it writes is what the pipeline generates; mistakes are one line and exit code 2."""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import generators
from PIL import Image
from test_lora import noisy_adapter
from torch._inductor.exc import InductorError

from unified import UnifiedPipeline
from unified.cli import main
from unified.pipeline.pipeline import UnifiedPipelineOutput


@pytest.fixture
def folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    return str(tmp_path / "pipeline")


def test_generate(pipeline, folder, tmp_path, capsys):
    arguments = ["generate", "--pipeline", folder, "--prompt", "red apple", "blue car", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--seed", "4", "--num-images-per-prompt", "2", "--decoding", "jacobi"]) == 0
    names = ["000-red-apple.png", "001-red-apple.png", "002-blue-car.png", "003-blue-car.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / name) for name in names]
    expected = pipeline("blue car", generator=torch.Generator().manual_seed(6)).images[0]
    assert Image.open(tmp_path / "out" / names[2]).tobytes() == expected.tobytes()


def test_inpaint_and_caption(pipeline, folder, tmp_path, capsys):
    image = pipeline("red apple", generator=generators(0)).images[0]
    image.save(tmp_path / "picture.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 8, 16, 16))
    mask.save(tmp_path / "mask.png")
    arguments = ["--pipeline", folder, "--prompt", "blue car", "--out", str(tmp_path / "out")]
    assert (
        main(["inpaint", *arguments, "--image", str(tmp_path / "picture.png"), "--mask", str(tmp_path / "mask.png")])
        == 0
    )
    expected = pipeline.inpaint("blue car", image, mask, generator=generators(0)).images[0]
    assert Image.open(tmp_path / "out" / "000-blue-car.png").tobytes() == expected.tobytes()
    capsys.readouterr()
    assert (
        main(["caption", "--pipeline", folder, str(tmp_path / "picture.png"), "--top-k", "1", "--max-new-tokens", "5"])
        == 0
    )
    text = pipeline.caption(image, top_k=1, max_new_tokens=5)[0]
    assert capsys.readouterr().out == " ".join(text.split()) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", " "], "prompt: ' ' is not a caption"),
        (["--prompt", "red apple", "--height", "32"], "height, width: 32x16"),
        (["--prompt", "red apple", "--temperature", "0"], "temperature: 0.0 must be above 0"),
        (["--prompt", "red apple", "--temperature", "1e-30"], "temperature: 1e-30 must be at least 0.0001"),
        (["--prompt", "red apple", "--guidance-scale", "1e39"], "guidance_scale: 1e+39 must be at most 10000"),
        (["--prompt", "red apple", "--num-images-per-prompt", "0"], "num_images_per_prompt: 0"),
        (["--prompt", "red apple", "--lora", "./nowhere"], "holds no unified_base.json"),
        (["--prompt", "red apple", "--pipeline", "./nowhere"], "has no pipeline.json"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, capsys, arguments, message):
    code = main(["generate", "--pipeline", folder, "--out", str(tmp_path / "out"), *arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and message in lines[-1] and lines[-1].startswith("unified generate: ")


def test_every_option_reaches_the_pipeline(pipeline, folder, tmp_path, capsys, monkeypatch):
    """All of them off their defaults: arguments of the call, the decoder's switches, the adapter."""
    image = Image.new("RGB", (16, 16), "red")
    for name in ("picture.png", "mask.png"):
        image.convert("L" if name == "mask.png" else "RGB").save(tmp_path / name)
    pipeline.model = noisy_adapter(pipeline.model, tmp_path / "lora", 1)
    calls, switches = [], []

    def record(pipe, *args, **given):
        calls.append({"adapters": pipe.get_active_adapters(), **given})
        return (
            UnifiedPipelineOutput([image] * 4, torch.zeros(4, 4, 4)) if "prompt" in given and args == () else ["words"]
        )

    for name in ("__call__", "inpaint", "caption"):
        monkeypatch.setattr(UnifiedPipeline, name, record)
    monkeypatch.setattr(UnifiedPipeline, "enable_fast_decoding", lambda pipe, **given: switches.append(given))
    start = ["--pipeline", folder, "--lora", str(tmp_path / "lora")]
    sampling = ["--temperature", "0.7", "--top-k", "3", "--top-p", "0.9", "--seed", "5"]
    draw = ["--prompt", "red apple", "blue car", "--out", str(tmp_path / "out"), "--num-images-per-prompt", "2",
            "--negative-prompt", "dog", "--guidance-scale", "2.5", "--guidance-schedule", "cosine",
            "--decoding", "sjd"]  # fmt: skip
    files = ["--image", str(tmp_path / "picture.png"), "--mask", str(tmp_path / "mask.png")]
    assert main(["generate", *start, *draw, *sampling, "--height", "16", "--width", "32", "--int8"]) == 0
    assert main(["inpaint", *start, *draw, *sampling, *files, "--compile"]) == 0
    caption = ["--prompt", "a", "--max-new-tokens", "4", str(tmp_path / "picture.png")]
    assert main(["caption", *start, *sampling, *caption]) == 0
    generate, inpaint, words = calls
    drawn = {"prompt": ["red apple", "blue car"], "negative_prompt": "dog", "num_images_per_prompt": 2, "guidance_scale": 2.5,
             "guidance_schedule": "cosine", "decoding": "sjd"}  # fmt: skip
    shared = {"adapters": ["default"], "temperature": 0.7, "top_k": 3, "top_p": 0.9}
    for call, seeds in ((generate, 4), (inpaint, 4), (words, 1)):
        assert [g.initial_seed() for g in call.pop("generator")] == [5, 6, 7, 8][:seeds]
    assert generate == {**shared, **drawn, "height": 16, "width": 32}
    assert (inpaint.pop("image").size, inpaint.pop("mask_image").mode) == ((16, 16), "L")
    assert inpaint == {**shared, **drawn} and words == {**shared, "prompt": "a", "max_new_tokens": 4}
    assert switches == [{"compile": False, "int8": True}, {"compile": True, "int8": False}]


def test_mistakes_of_files_seeds_and_compilers(folder, tmp_path, capsys, monkeypatch):
    start = ["generate", "--out", str(tmp_path / "out"), "--prompt", "red apple", "--pipeline"]
    with pytest.raises(SystemExit):
        main([*start, folder, "--seed", str(2**64)])
    assert f"'{2**64}' is not a whole number from 0 to 2^63 - 1" in capsys.readouterr().err
    shutil.copytree(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert main([*start, str(tmp_path / "cut")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("unified generate: ")

    def failing(error):
        def call(*args, **kwargs):
            raise error

        monkeypatch.setattr("unified.pipeline.pipeline.UnifiedPipeline.__call__", call)

    failing(InductorError(RuntimeError("no working C++ compiler\nmore"), None))
    assert main([*start, folder, "--compile"]) == 2
    assert "unified generate: compile: RuntimeError: no working C++ compiler more; needs" in capsys.readouterr().err
    failing(RuntimeError("out of memory"))  # is nobody's compiler
    with pytest.raises(RuntimeError, match="out of memory"):
        main([*start, folder, "--compile"])


def test_machine_options(pipeline, folder, tmp_path, capsys, monkeypatch):
    """Device, dtype and threads reach torch, and what cannot be used is refused."""
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    arguments = ["generate", "--pipeline", folder, "--prompt", "red apple", "--out", str(tmp_path / "out"),
                 "--num-images-per-prompt", "8"]  # fmt: skip
    assert main([*arguments, "--dtype", "bfloat16", "--device", "cpu", "--threads", "3"]) == 0
    half = UnifiedPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    expected, whole = (
        [p("red apple", generator=generators(i)).images[0].tobytes() for i in range(8)] for p in (half, pipeline)
    )
    assert expected != whole and threads == [3]
    assert [Image.open(path).tobytes() for path in sorted((tmp_path / "out").iterdir())] == expected
    assert main([*arguments, "--threads", "0"]) == 2
    assert "threads: 0 must be a whole number of at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--device", "tpu9"])
    assert "argument --device: 'tpu9' cannot be used: " in capsys.readouterr().err


def test_files_that_are_no_images(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (16, 16)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for path, message in ((tmp_path, "Is a directory"), (tmp_path / "text.png", "cannot identify image file"),
                          (tmp_path / "large.png", "decompression bomb")):  # fmt: skip
        assert main(["caption", "--pipeline", folder, str(path)]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("unified caption: ") and message in error and "\n" not in error


def test_a_missing_image_is_named(folder, capsys):
    assert main(["caption", "--pipeline", folder, "nowhere.png"]) == 2
    assert "nowhere.png" in capsys.readouterr().err


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "unified", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and all(name in done.stdout for name in ("generate", "caption", "inpaint", "serve"))
