"""Streams of images, the cache of their features, and two processes against one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from forking import torchrun
from PIL import Image

from unified.data import SkipReport, captioned_images, load_source
from unified_eval import Extractor, extract_features, open_images, save_npz

ROOT = Path(__file__).resolve().parent.parent


def noise(count, size=4, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


def means(images):
    return torch.stack([torch.from_numpy(np.array(image)).float().mean((0, 1)) for image in images])


class Counted(list):
    """A feature network that remembers the sizes of its batches."""

    def __call__(self, images):
        self.append(len(images))
        return means(images)


def extractor(network=means, **changes):
    fields = {"name": "mean", "metric": "FD-Mean", "width": 3, "weights_sha256": "0", "resize": "none",
              "normalisation": "none", "network": network}  # fmt: skip
    return Extractor(**{**fields, **changes})


def pixels(stream):
    return [np.asarray(item() if callable(item) else item).tolist() for item in stream]


def test_folder_npz_and_data_set_give_the_same_images(tmp_path):
    import datasets

    images = noise(5)
    (tmp_path / "folder").mkdir()
    for number, image in enumerate(images):
        image.save(tmp_path / "folder" / f"{number:03d}.png")
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    save_npz(tmp_path / "set.npz", images)
    rows = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
    rows.save_to_disk(tmp_path / "rows")
    expected = [np.asarray(image).tolist() for image in images]
    for source in ("folder", "set.npz", "rows"):
        assert pixels(open_images(tmp_path / source)) == expected, source
    assert np.array_equal(extract_features(extractor(), open_images(tmp_path / "folder"), 2), means(images).double())


def test_a_folder_holds_the_same_images_as_for_training(tmp_path, monkeypatch):
    """Of every suffix, upright, on white, without hidden files; also behind ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "folder"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    first, second = noise(2)
    first.transpose(Image.Transpose.ROTATE_90).save(folder / "a.tiff", exif=exif)
    Image.merge("RGBA", (*second.split(), Image.new("L", second.size))).save(folder / "b.PNG")
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(folder / "c.pgm")
    (folder / "._a.tiff").write_bytes(b"what a Mac leaves")
    expected = [first, Image.new("RGB", second.size, "white"), Image.new("RGB", (4, 4), "white")]
    rows = captioned_images(load_source(str(folder)).add_column("caption", ["x"] * 3), SkipReport())
    assert pixels(row.image for row in rows) == pixels(expected)
    for source in (folder, "~/folder"):
        assert pixels(open_images(source)) == pixels(expected)


def test_one_batch_is_in_memory_at_a_time():
    events = []

    def load(number):
        return lambda: events.append(f"load {number}") or Image.new("RGB", (2, 2), (number, 0, 0))

    def network(images):
        events.append(f"run {len(images)}")
        return means(images)

    rows = extract_features(extractor(network), (load(number) for number in range(3)), batch_size=2)
    assert events == ["load 0", "load 1", "run 2", "load 2", "run 1"]
    assert rows.tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0]] and rows.dtype == np.float64


def test_cache_is_keyed_by_pixels_and_recipe(tmp_path):
    images, network = noise(5), Counted()
    first = extract_features(extractor(network), images, 2, tmp_path / "cache")
    assert network == [2, 2, 1] and len(list((tmp_path / "cache").iterdir())) == 3
    copies = [Image.fromarray(np.array(image)) for image in images]
    assert np.array_equal(extract_features(extractor(network), copies, 2, tmp_path / "cache"), first)
    assert network == [2, 2, 1], "equal images were seen before"
    copies[2].putpixel((1, 1), (1, 2, 3))
    changed = extract_features(extractor(network), copies, 2, tmp_path / "cache")
    assert network == [2, 2, 1, 2] and not np.array_equal(changed[2], first[2])
    assert np.array_equal(np.delete(changed, 2, 0), np.delete(first, 2, 0))
    extract_features(extractor(network, weights_sha256="1"), images, 2, tmp_path / "cache")
    assert network == [2, 2, 1, 2, 2, 2, 1], "other weights make other features"
    wide = [image.resize((8, 2), Image.Resampling.NEAREST) for image in images[:1]]
    tall = [Image.frombytes("RGB", (2, 8), wide[0].tobytes())]
    extract_features(extractor(network), wide, 2, tmp_path / "cache")
    extract_features(extractor(network), tall, 2, tmp_path / "cache")
    assert len(network) == 9, "equal bytes of another size are another image"


SCRIPT = """
import sys
import numpy as np
from test_eval_extraction import extractor, noise
from unified_eval import extract_features
from unified_eval.extraction import process_state
state = process_state()
assert state.num_processes == int(sys.argv[1]), state.num_processes
rows = [extract_features(extractor(), noise(count), 3, sys.argv[3]) for count in (7, 2)]  # 3 batches, and 1
for index, part in enumerate(rows):
    np.save(f"{sys.argv[2]}/{index}-{state.process_index}.npy", part)
"""


@pytest.mark.process
def test_two_processes_equal_one(tmp_path):
    """Seven images in batches of 3 leave one process with two batches, of which one is short; two images, one."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "out").mkdir()
    done = torchrun(2, "script.py", 2, tmp_path / "out", tmp_path / "cache", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for index, count in enumerate((7, 2)):
        expected = extract_features(extractor(), noise(count), 3)
        for process in (0, 1):
            assert np.array_equal(np.load(tmp_path / "out" / f"{index}-{process}.npy"), expected)
    network = Counted()
    extract_features(extractor(network), noise(7), 3, tmp_path / "cache")
    assert network == [], "the processes filled one cache"


def test_bad_input_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"source: '.*empty' is an empty folder; give one with images"):
        next(open_images(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"source: '.*absent' does not exist"):
        next(open_images(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"'.*absent\.npz' is not an \.npz file"):
        next(open_images(tmp_path / "absent.npz"))
    with pytest.raises(ValueError, match="images: there is none"):
        extract_features(extractor(), [])
    with pytest.raises(ValueError, match="batch_size: 0 is below 1"):
        extract_features(extractor(), noise(1), 0)

    def broken(images):
        grey = [image.getpixel((0, 0)) == (9, 9, 9) for image in images]
        return means(images).masked_fill(torch.tensor(grey)[:, None], torch.nan)

    images = [*noise(4), Image.new("RGB", (4, 4), (9, 9, 9))]
    with pytest.raises(ValueError, match="images 3 to 4: images: mean makes NaN or infinity of number 1"):
        extract_features(extractor(broken), images, 3, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1, "what failed is not kept"


def test_a_column_that_is_not_there_is_named(picture_source):
    with pytest.raises(ValueError, match=r"image_column: 'photo' is not a column; there are \['caption', 'image'\]"):
        next(open_images(picture_source, image_column="photo"))


def test_processes_that_do_not_see_each_other_are_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="processes: 2 were started, but accelerate sees 1; on CPUs launch with"):
        extract_features(extractor(), noise(1))
