"""The command line: what it writes is what the pipeline generates; mistakes are one line and exit code 2."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import generators, noisy_adapter
from PIL import Image
from torch._inductor.exc import InductorError

import unified
from unified import UnifiedPipeline, decoding
from unified.cli import main
from unified.decoding import DECODING_MODES
from unified.pipeline.pipeline import UnifiedPipelineOutput


@pytest.fixture
def folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    return str(tmp_path / "pipeline")


@pytest.mark.process
@pytest.mark.parametrize("kind", ["turned", "16 bits", "transparent", "at home"])
def test_a_mask_is_read_as_every_image(kind, pipeline, folder, tmp_path, monkeypatch):
    """Upright, scaled to 8 bits and laid on white; the lower half changes."""
    image = pipeline("red apple", generator=generators(0)).images[0]
    image.save(tmp_path / "image.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 8, 16, 16))
    expected = pipeline.inpaint("blue car", image, mask, generator=generators(0)).images[0]
    exif, file = Image.Exif(), str(tmp_path / "mask.png")
    if kind == "turned":
        exif[0x0112] = 6  # to be turned by a quarter to the right
        mask = mask.transpose(Image.Transpose.ROTATE_90)
    elif kind == "16 bits":
        mask = Image.fromarray(np.asarray(mask).astype(np.uint16) * 100)  # 25500 of 65535 is dark
        mask.paste(65535, (0, 8, 16, 16))
    elif kind == "transparent":
        mask = Image.merge("LA", (Image.new("L", (16, 16)), Image.eval(mask, lambda value: 255 - value)))
    else:
        monkeypatch.setenv("HOME", str(tmp_path))
        file = "~/mask.png"
    mask.save(tmp_path / "mask.png", exif=exif)
    arguments = ["--pipeline", folder, "--prompt", "blue car", "--out", str(tmp_path / "out")]
    assert main(["inpaint", *arguments, "--image", str(tmp_path / "image.png"), "--mask", file]) == 0
    assert Image.open(tmp_path / "out" / "000-blue-car.png").tobytes() == expected.tobytes()
    with Image.open(tmp_path / "mask.png") as given:
        if kind != "turned":  # what a caller opens has been turned by no one
            again = pipeline.inpaint("blue car", image, given, generator=generators(0)).images[0]
            assert again.tobytes() == expected.tobytes()


@pytest.mark.process
def test_generate(pipeline, folder, tmp_path, capsys):
    arguments = ["generate", "--pipeline", folder, "--prompt", "red apple", "blue car", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--seed", "4", "--num-images-per-prompt", "2", "--decoding", "jacobi"]) == 0
    names = ["000-red-apple.png", "001-red-apple.png", "002-blue-car.png", "003-blue-car.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / name) for name in names]
    expected = pipeline("blue car", generator=torch.Generator().manual_seed(6)).images[0]
    assert Image.open(tmp_path / "out" / names[2]).tobytes() == expected.tobytes()


@pytest.mark.process
def test_a_folder_keeps_the_images_of_earlier_calls(folder, tmp_path, capsys, monkeypatch):
    """Numbers go on behind those that are there, also behind one that another call writes at the same time."""
    arguments = ["generate", "--pipeline", folder, "--prompt", "red apple", "--out", str(tmp_path / "out")]
    for seed in ("1", "2"):
        assert main([*arguments, "--seed", seed]) == 0
    files = [tmp_path / "out" / f"00{i}-red-apple.png" for i in (0, 1)]
    assert capsys.readouterr().out.split() == list(map(str, files))
    contents = [file.read_bytes() for file in files]
    assert contents[0] != contents[1]
    (tmp_path / "out" / "0041-blue-car.png").touch()
    listed = list((tmp_path / "out").iterdir())
    (tmp_path / "out" / "042-red-apple.png").write_text("from elsewhere")
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(listed))  # it was not there yet when the folder was read
    assert main(arguments) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / "043-red-apple.png")]
    assert (tmp_path / "out" / "042-red-apple.png").read_text() == "from elsewhere"
    assert [file.read_bytes() for file in files] == contents


@pytest.mark.process
def test_inpaint_and_caption(pipeline, folder, tmp_path, capsys):
    image = pipeline("red apple", generator=generators(0)).images[0]
    image.save(tmp_path / "image.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 8, 16, 16))
    mask.save(tmp_path / "mask.png")
    arguments = ["--pipeline", folder, "--prompt", "blue car", "--out", str(tmp_path / "out")]
    assert (
        main(["inpaint", *arguments, "--image", str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png")]) == 0
    )
    expected = pipeline.inpaint("blue car", image, mask, generator=generators(0)).images[0]
    assert Image.open(tmp_path / "out" / "000-blue-car.png").tobytes() == expected.tobytes()
    capsys.readouterr()
    assert (
        main(["caption", "--pipeline", folder, str(tmp_path / "image.png"), "--top-k", "1", "--max-new-tokens", "5"])
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
        (["--prompt", "red apple", "--width", "-16"], "width: -16 must be a whole number of at least 1"),
        (["--prompt", "red apple", "--lora", "./nowhere"], "lora: './nowhere' does not exist"),
        (["--prompt", "red apple", "--pipeline", "./nowhere"], "pipeline: './nowhere' does not exist"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, capsys, arguments, message):
    code = main(["generate", "--pipeline", folder, "--out", str(tmp_path / "out"), *arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and message in lines[-1] and lines[-1].startswith("unified generate: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", "--prompt", os.fsdecode(b"caf\xe9")],
            r"prompt: 'caf\udce9' is not valid Unicode; give it in UTF-8",
        ),
        (["generate", "--prompt", "red apple", "\t"], r"prompt: '\t' is not a caption"),
        (
            ["generate", "--prompt", "a", "--negative-prompt", "\udcff"],
            r"negative_prompt: '\udcff' is not valid Unicode",
        ),
        (["generate", "--prompt", "red apple", "--top-p", "2"], "top_p: 2.0 must lie in (0, 1]"),
        (["generate", "--prompt", "red apple", "--threads", "0"], "threads: 0 must be a whole number from 1 to 4096"),
        (["inpaint", "--prompt", "red apple", "--image", "nowhere.png", "--mask", "nowhere.png"], "nowhere.png"),
        (["caption", "image.png", "--prompt", " "], "prompt: ' ' is not a caption"),
        (["caption", "image.png", "--prompt", "\udce9"], r"prompt: '\udce9' is not valid Unicode"),
        (["caption", "image.png", "--top-k", "-1"], "top_k: -1 must be a whole number"),
        (["caption", "image.png", "--max-new-tokens", "0"], "max_new_tokens: 0 must be a whole number of at least 1"),
        (["serve", "--port", "99999"], "port: 99999 must be a whole number from 0 to 65535"),
        (["serve", "--max-rows", "1"], "max_rows: 1 must be a whole number of at least 2"),
        (["serve", "--password", ""], "password: it is empty; give one"),
        (["serve", "--queue", "0"], "queue: 0 must be a whole number of at least 1"),
        (["serve", "--per-client", "0"], "per_client: 0 must be a whole number of at least 1"),
        (["serve", "--allow-host", "http://demo"], "allow_host: 'http://demo' is no host name"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(UnifiedPipeline, "from_pretrained", lambda *given, **options: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("image.png")
    out = [] if arguments[0] in ("caption", "serve") else ["--out", "out"]
    assert main([*arguments, "--pipeline", "pipeline", *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"unified {arguments[0]}: ") and message in error and error.count("\n") == 1


def test_a_folder_that_is_a_file_is_found_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(UnifiedPipeline, "from_pretrained", lambda *given, **options: pytest.fail("loaded"))
    (tmp_path / "out").touch()
    assert main(["generate", "--pipeline", "p", "--prompt", "red apple", "--out", str(tmp_path / "out")]) == 2
    assert "File exists" in capsys.readouterr().err


@pytest.mark.process
def test_every_option_reaches_the_pipeline(pipeline, folder, tmp_path, capsys, monkeypatch):
    """All of them off their defaults: arguments of the call, the decoder's switches, the adapter."""
    image = Image.new("RGB", (16, 16), "red")
    for name in ("image.png", "mask.png"):
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
    images = ["--prompt", "red apple", "blue car", "--out", str(tmp_path / "out"), "--num-images-per-prompt", "2",
            "--negative-prompt", "dog", "--guidance-scale", "2.5", "--guidance-schedule", "cosine",
            "--decoding", "sjd", "--group-temperature", "0.8", "--steer", f"{tmp_path}/lora=0.5"]  # fmt: skip
    files = ["--image", str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png")]
    assert main(["generate", *start, *images, *sampling, "--height", "16", "--width", "32", "--int8"]) == 0
    assert main(["inpaint", *start, *images, *sampling, *files, "--compile"]) == 0
    caption = ["--prompt", "a", "--max-new-tokens", "4", str(tmp_path / "image.png")]
    assert main(["caption", *start, *sampling, *caption]) == 0
    generate, inpaint, words = calls
    asked = {"prompt": ["red apple", "blue car"], "negative_prompt": "dog", "num_images_per_prompt": 2, "guidance_scale": 2.5,
             "guidance_schedule": "cosine", "decoding": "sjd", "group_temperature": 0.8,
             "steer": {f"{tmp_path.name}_lora": 0.5}}  # fmt: skip
    shared = {"adapters": ["default"], "temperature": 0.7, "top_k": 3, "top_p": 0.9}
    for call, seeds in ((generate, 4), (inpaint, 4), (words, 1)):
        assert [g.initial_seed() for g in call.pop("generator")] == [5, 6, 7, 8][:seeds]
    assert generate == {**shared, **asked, "height": 16, "width": 32}
    assert (inpaint.pop("image").size, inpaint.pop("mask_image").mode) == ((16, 16), "RGB")
    assert inpaint == {**shared, **asked} and words == {**shared, "prompt": "a", "max_new_tokens": 4}
    assert switches == [{"compile": False, "int8": True}, {"compile": True, "int8": False}]


@pytest.mark.process
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


@pytest.mark.process
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
    assert "threads: 0 must be a whole number from 1 to 4096" in capsys.readouterr().err
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


def test_help_loads_no_torch():
    code = """
import sys
from unified.cli import main
for arguments in (["--help"], ["generate", "--help"]):
    try:
        main(arguments)
    except SystemExit as done:
        assert done.code == 0
print([name for name in ("torch", "transformers", "numpy", "PIL") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stderr
    assert all(f"{name}: {mode.about}" in " ".join(done.stdout.split()) for name, mode in DECODING_MODES.items())


@pytest.mark.parametrize("package", [unified, decoding])
def test_public_names_are_imported_on_first_use(package):
    assert list(package._MODULE_OF) == package.__all__ == sorted(package.__all__)
    for name, module in package._MODULE_OF.items():
        value = getattr(package, name)
        assert value is getattr(sys.modules[f"{package.__name__}.{module}"], name)
        assert getattr(value, "__module__", f"{package.__name__}.{module}") == f"{package.__name__}.{module}"
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
        _ = package.nothing
