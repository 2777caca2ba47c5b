"""What generated PNGs say of themselves."""

import pytest
import torch
from conftest import generators, noisy_adapter
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unified import UnifiedPipeline, read_image_metadata
from unified.cli import main
from unified.pipeline.metadata import describe, describe_images, model_name, write_png
from unified.serving.desk import stored
from unified.training.config import SampleConfig
from unified.training.tracking import RunLog
from unified_eval.generation import generate_images
from unified_tokenizers.images import to_tensor

SETTINGS = {"height": 16, "width": 16, "guidance_scale": 2.0, "temperature": 1.0, "top_k": 5, "top_p": 1.0,
            "guidance_schedule": "constant", "decoding": "plain", "group_temperature": 1.0}  # fmt: skip


@pytest.mark.process
def test_an_image_of_the_command_line_is_generated_again(pipeline, tmp_path):
    """From what its file says alone, with the adapter."""
    pipeline.save_pretrained(tmp_path / "runs" / "mine" / "pipeline")
    pipeline.model = noisy_adapter(pipeline.model, tmp_path / "lora", 1)
    folder = str(tmp_path / "runs" / "mine" / "pipeline")
    assert main(["generate", "--pipeline", folder, "--prompt", "red apple", "grüner Baum", "--seed", "7", "--top-k", "5",
                 "--guidance-scale", "2", "--num-images-per-prompt", "2", "--negative-prompt", "a dog", "--lora",
                 str(tmp_path / "lora"), "--out", str(tmp_path / "out")]) == 0  # fmt: skip
    files = sorted((tmp_path / "out").iterdir())
    assert [read_image_metadata(file)["seed"] for file in files] == [7, 8, 9, 10]
    found = read_image_metadata(files[2])
    assert found == {"prompt": "grüner Baum", "negative_prompt": "a dog", "seed": 9, "settings": SETTINGS, "software": "unified",
                     "adapters": {"default": 1.0}, "model": "mine/pipeline"}  # fmt: skip
    pipe = UnifiedPipeline.from_pretrained(folder)
    pipe.load_lora_weights(tmp_path / "lora")
    again = pipe(
        found["prompt"], negative_prompt=found["negative_prompt"], generator=found["seed"], **found["settings"]
    )
    assert torch.equal(to_tensor([Image.open(files[2])]), to_tensor(again.images))


@pytest.mark.process
def test_edits_the_page_evaluations_and_runs_say_it_too(pipeline, tmp_path, photo):
    pytest.importorskip("gradio")
    (image,) = pipeline("red apple", generator=3).images
    describe_images(pipeline, [image], ["red apple"], [3], {"guidance_scale": 2.0, "top_k": 5}, edit="inpaint")
    expected = {"prompt": "red apple", "seed": 3, "settings": SETTINGS, "software": "unified"}
    assert read_image_metadata(stored(image, str(tmp_path))) == {**expected, "edit": "inpaint"}  # gradio writes it
    generate_images(pipeline, ["red apple"], tmp_path / "e", 1, 3, sampling={"guidance_scale": 2.0, "top_k": 5})
    assert read_image_metadata(tmp_path / "e" / "000.png") == expected

    class Accelerator:
        is_main_process, trackers = True, []

    log = RunLog(Accelerator(), tmp_path / "run", 0)
    log.samples(7, pipeline, SampleConfig(prompts=["red apple", "blue car"], guidance_scale=2.0, seed=5))
    sheet = read_image_metadata(tmp_path / "run" / "samples" / "step-00000007.png")
    assert (sheet["prompts"], sheet["seed"], sheet["model"]) == (["red apple", "blue car"], 5, "run, step 7")
    assert sheet["settings"]["guidance_scale"] == 2.0


def test_other_files(tmp_path):
    image = Image.new("RGB", (4, 4))
    image.info["comment"] = "of a camera"
    write_png(image, tmp_path / "plain.png")
    assert Image.open(tmp_path / "plain.png").info == {} and read_image_metadata(tmp_path / "plain.png") == {}
    image.save(tmp_path / "photo.jpg")
    with pytest.raises(ValueError, match=r"image: '.*photo.jpg' is no PNG that can be read"):
        read_image_metadata(tmp_path / "photo.jpg")
    whole = (tmp_path / "plain.png").read_bytes()
    for number, damage in enumerate((whole[:20], whole[:40], whole.replace(b"IDAT", b"IDAx"), b"")):
        (tmp_path / f"{number}.png").write_bytes(damage)
        with pytest.raises(ValueError, match=rf"image: '.*{number}.png' is no PNG that can be read"):
            read_image_metadata(tmp_path / f"{number}.png")
    for seed in ("seven", "[" * 100_000):
        chunks = PngInfo()
        chunks.add_text("software", "unified")
        chunks.add_text("seed", seed)
        image.save(tmp_path / "changed.png", pnginfo=chunks)
        with pytest.raises(ValueError, match=r"image: seed in '.*changed.png' is no JSON"):
            read_image_metadata(tmp_path / "changed.png")
    with pytest.raises(ValueError, match=r"metadata: \['caption'\] are none of"):
        describe(image, caption="red apple")
    describe(image, seed=0, settings={"guidance_schedule": generators}, prompt="")
    write_png(image, tmp_path / "seed.png")
    assert read_image_metadata(tmp_path / "seed.png") == {
        "seed": 0, "settings": {"guidance_schedule": "generators"}, "software": "unified"
    }  # fmt: skip


def test_a_folder_says_nothing_of_the_machine():
    assert model_name("/home/me/runs/mine/pipeline") == "mine/pipeline" == model_name("mine/pipeline")
    assert model_name("/pipeline") == "pipeline" and model_name("") == ""
