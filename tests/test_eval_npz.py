"""Images in ADM's file: as NumPy and the original evaluator read it, and back again."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from unified_eval import load_npz, save_npz


def noise(count, size=(6, 4)):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


def test_numpy_reads_what_is_written_and_the_way_back(tmp_path):
    images = noise(5)
    path = save_npz(tmp_path / "deep" / "set.npz", images)
    with np.load(path, allow_pickle=False) as archive:
        assert archive.files == ["arr_0"]
        array = archive["arr_0"]
    assert array.dtype == np.uint8 and array.shape == (5, 4, 6, 3)
    assert np.array_equal(array, np.stack([np.asarray(image) for image in images]))
    assert [image.tobytes() for image in load_npz(path)] == [image.tobytes() for image in images]
    for compressed, save in enumerate((np.savez, np.savez_compressed)):  # as others write it
        save(tmp_path / f"{compressed}.npz", array)
        again = list(load_npz(tmp_path / f"{compressed}.npz"))
        assert np.array_equal(np.stack([np.asarray(image) for image in again]), array)


def test_bad_files_and_images_are_errors(tmp_path):
    with pytest.raises(ValueError, match="images: number 2 is 5x5, the first is 6x4; bring them to one size"):
        save_npz(tmp_path / "mixed.npz", [*noise(2), *noise(1, (5, 5))])
    assert not (tmp_path / "mixed.npz").exists()
    with pytest.raises(ValueError, match="images: the list is empty"):
        save_npz(tmp_path / "empty.npz", [])
    with pytest.raises(ValueError, match="labels: 1 labels for 2 images; give one for each"):
        save_npz(tmp_path / "labels.npz", noise(2), [3])
    with pytest.raises(ValueError, match=r"'.*set.npy' is not named .npz"):
        save_npz(tmp_path / "set.npy", noise(1))
    with pytest.raises(ValueError, match=r"is not an \.npz file"):
        next(load_npz(tmp_path / "absent.npz"))
    np.savez(tmp_path / "floats.npz", np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"is float64 \(2, 4, 4, 3\); need uint8 \(N, H, W, 3\)"):
        next(load_npz(tmp_path / "floats.npz"))
    np.savez(tmp_path / "named.npz", mu=np.zeros(2))
    with pytest.raises(ValueError, match="has no arr_0; it holds"):
        next(load_npz(tmp_path / "named.npz"))


def test_an_array_that_ends_early_is_named(tmp_path):
    path = save_npz(tmp_path / "set.npz", noise(3))
    with zipfile.ZipFile(path) as archive:
        content = archive.read("arr_0.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", content[:-10])
    images = load_npz(path)
    assert [next(images).size, next(images).size] == [(6, 4), (6, 4)]
    with pytest.raises(ValueError, match=r"set\.npz' ends within image 2 of 3"):
        next(images)
