"""Generation: seeds, resuming, the layout of GenEval; metrics during training."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from unified_eval import (
    Clip,
    Extractor,
    content_hash,
    first_usable_rows,
    generate_images,
    measure_pipeline,
    stream_images,
)
from unified_eval.generation import geneval_name
from unified_eval.selection import unique_captions

PROMPTS = ["red apple", "blue car", "yellow sun"]


@pytest.fixture
def calls(pipeline, monkeypatch):
    """The prompts of every call of the pipeline."""
    made = []
    original = type(pipeline).__call__

    def call(self, prompt, **settings):
        made.append(list(prompt))
        return original(self, prompt, **settings)

    monkeypatch.setattr(type(pipeline), "__call__", call)
    return made


def test_a_folder_is_continued(pipeline, calls, tmp_path):
    generate = partial(generate_images, pipeline, PROMPTS, tmp_path / "out", 2, 7, batch_size=4, sampling={"top_k": 5})
    images, times = generate()
    assert (times["generated"], times["kept"]) == (6, 0)
    assert calls == [["red apple", "red apple", "blue car", "blue car"], ["yellow sun", "yellow sun"]]
    alone = next(stream_images(pipeline, ["blue car"], [7 + 3], top_k=5))
    assert np.array_equal(np.asarray(alone), np.asarray(images[3]))
    assert not np.array_equal(np.asarray(images[2]), np.asarray(images[3]))
    calls.clear()
    for number in (1, 4):  # as after a kill
        (tmp_path / "out" / f"{number:03d}.png").unlink()
    again, times = generate()
    assert calls == [["red apple", "yellow sun"]] and (times["generated"], times["kept"]) == (2, 4)
    assert [image.tobytes() for image in again] == [image.tobytes() for image in images]
    calls.clear()
    assert generate()[1] == {"generated": 0, "kept": 6, "seconds_per_image": None} and calls == []


@pytest.mark.process
@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"sampling": {"top_k": 3}}, {"identity": {"pipeline": "b"}}, {"samples": 2}]
)
def test_other_settings_generate_again(pipeline, calls, tmp_path, change):
    settings = {"seed": 0, "sampling": {"top_k": 5}, "identity": {"pipeline": "a"}, "samples": 1}
    generate_images(pipeline, PROMPTS, tmp_path / "out", **settings)
    (tmp_path / "out" / "009.png").write_bytes((tmp_path / "out" / "000.png").read_bytes())
    images, times = generate_images(pipeline, PROMPTS, tmp_path / "out", **{**settings, **change})
    assert times["kept"] == 0 and times["generated"] == len(images) == len(list((tmp_path / "out").iterdir()))


@pytest.mark.parametrize("bad", ["red apple " * 200, " "])
def test_every_prompt_is_checked_before_the_first_batch(pipeline, calls, tmp_path, bad):
    with pytest.raises(ValueError, match="prompt: "):
        generate_images(pipeline, [*PROMPTS, bad], tmp_path / "out", batch_size=1)
    assert calls == []


def test_a_hash_tells_pipelines_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "weights").write_bytes(b"123")
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")
    (tmp_path / "b" / "model" / "weights").write_bytes(b"124")
    assert content_hash(tmp_path / "a") != content_hash(tmp_path / "b")
    assert content_hash("owner/name") != content_hash("owner/other")


def test_layout_of_geneval(pipeline, tmp_path):
    images, _ = generate_images(pipeline, PROMPTS, tmp_path / "out", 2, file_name=geneval_name(2))
    files = sorted(str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.png"))
    assert files == [f"{prompt:05d}/samples/{sample:05d}.png" for prompt in range(3) for sample in range(2)]
    last = Image.open(tmp_path / "out" / "00002" / "samples" / "00001.png")
    assert last.tobytes() == images[5].tobytes()
    with pytest.raises(ValueError, match="samples, batch_size: 0 and 64; give 1 or more"):
        generate_images(pipeline, PROMPTS, tmp_path / "out", 0)


class MeanClip(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.visual = torch.nn.Module()
        self.visual.preprocess_cfg = {}

    def encode_image(self, batch):
        return batch.mean((2, 3))

    def encode_text(self, tokens):
        return torch.eye(7, 3)[tokens[:, 0]] + 0.1


class WordTokenizer:
    context_length = 2

    def __call__(self, texts, context_length=2):
        texts = [texts] if isinstance(texts, str) else texts
        return torch.tensor([[len(text) % 7] + [0] * (context_length - 1) for text in texts])


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@pytest.mark.filterwarnings("ignore::unified_eval.results.SmallSampleWarning")
def test_measuring_leaves_a_training_as_it_was(pipeline, picture_source, tmp_path):
    rows = unique_captions(first_usable_rows(picture_source, "validation")[0])
    passes = []

    def network(images):
        passes.append(len(images))
        return torch.stack([pixels(image).mean((1, 2)) for image in images])

    extractor = Extractor("mean", "FD-Mean", 3, "0", "none", "none", network)
    clip = Clip(MeanClip(), pixels, WordTokenizer(), "mean")
    measure = partial(
        measure_pipeline, rows=rows, clip=clip, extractor=extractor, metrics=["kd", "clip"], cache=tmp_path
    )
    pipeline.model.train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = measure(pipeline)
    assert torch.equal(torch.get_rng_state(), state) and pipeline.model.training
    assert passes == [6, 6], "generated, real"
    assert measure(pipeline).metrics == first.metrics
    with torch.no_grad():
        for parameter in pipeline.model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    later = measure(pipeline)
    assert later.metrics["clip_score"] != first.metrics["clip_score"]
    assert later.metrics["clip_score_real"] == first.metrics["clip_score_real"]
    assert passes == [6, 6, 6], "only the images that are generated again pass the network"
    json.dumps(later.metrics)
