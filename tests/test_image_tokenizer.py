"""The VQ model, its folder, its fingerprint, and the codes cache."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from unified.data import load_source
from unified.data.code_cache import encode_source, load_codes
from unified_tokenizers import AutoImageTokenizer, ImageTokenizer, VQConfig, VQModel
from unified_tokenizers.images import to_pil, to_tensor

FSQ = {"quantizer": "fsq", "fsq_levels": [5, 4], "codebook_size": 20}
LFQ = {"quantizer": "lfq", "codebook_size": 16}
BSQ = {"quantizer": "bsq", "codebook_size": 16}
IBQ = {"quantizer": "ibq"}


def small(**changes):
    torch.manual_seed(0)
    return VQModel(
        VQConfig(channels=8, encoder_blocks=1, decoder_blocks=1, **{"codebook_size": 20, "code_dim": 4, **changes})
    ).eval()


@pytest.mark.parametrize("changes", [{}, FSQ, LFQ, BSQ, IBQ, {"downsample": 8}])
def test_folder_round_trip(tmp_path, changes):
    tokenizer = small(**changes)
    assert isinstance(tokenizer, ImageTokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoImageTokenizer.from_pretrained(tmp_path)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    codes = tokenizer.encode(images)
    stride = changes.get("downsample", 4)
    assert codes.shape == (2, 16 // stride, 24 // stride) and codes.dtype == torch.int64
    assert torch.equal(loaded.encode(images), codes)
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))
    assert loaded.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("changes", [{}, FSQ, LFQ, BSQ, IBQ])
def test_decode_of_codes_is_what_training_sees(changes):
    """The straight-through forward and encode-then-decode give the same image."""
    tokenizer = small(**changes)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    decoded, codes, _ = tokenizer(images)
    assert torch.equal(codes, tokenizer.encode(images))
    torch.testing.assert_close(tokenizer.decode(codes), decoded.clamp(-1, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, FSQ, LFQ, BSQ, IBQ])
def test_codebook_vectors_are_what_the_decoder_gets(changes):
    tokenizer = small(**changes)
    codes = torch.randint(tokenizer.codebook_size, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    vectors = tokenizer.codebook_vectors()
    assert len(vectors) == len(vectors.unique(dim=0)) == tokenizer.codebook_size
    expected = tokenizer.decoder(vectors[codes].permute(0, 3, 1, 2)).clamp(-1, 1)
    torch.testing.assert_close(tokenizer.decode(codes), expected, rtol=0, atol=1e-6)


def test_codes_are_the_nearest_in_angle():
    tokenizer = small()
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    latents = tokenizer.encoder(images).permute(0, 2, 3, 1).reshape(16, 4)
    codebook = tokenizer.quantizer.codebook
    cosine = torch.nn.functional.normalize(latents, dim=-1) @ torch.nn.functional.normalize(codebook, dim=-1).T
    assert torch.equal(tokenizer.encode(images).flatten(), cosine.argmax(-1))


@pytest.mark.process
@pytest.mark.parametrize("changes", [{}, FSQ, LFQ, BSQ, IBQ])
def test_training_moves_towards_the_image(changes):
    tokenizer = small(**changes).train()
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 1e-2)
    errors = []
    for _ in range(30):
        decoded, _, commitment = tokenizer(images)
        error = (decoded - images).square().mean()
        (error + commitment).backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(error.item())
    assert errors[-1] < 0.8 * errors[0]


def test_fingerprint_follows_weights_and_meaning():
    one, same = small(), small()
    assert one.fingerprint == same.fingerprint
    with torch.no_grad():
        same.decoder[0].bias[0] += 1e-3
    assert one.fingerprint != same.fingerprint


def test_encode_leaves_the_codebook_alone():
    tokenizer = small().train()
    before = tokenizer.fingerprint
    tokenizer.encode(torch.rand(8, 3, 16, 16))
    assert tokenizer.training and tokenizer.fingerprint == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.encode(torch.zeros(1, 3, 18, 16)), "size 18x16 does not divide by the tokenizer's stride 4"),
        (lambda t: t.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)), "images: need float"),
        (lambda t: t.encode(torch.zeros(3, 16, 16)), "images: need float"),
        (lambda t: t.decode(torch.full((1, 4, 4), 20)), r"codes: values 20..20 leave the codebook \[0, 20\)"),
        (lambda t: t.decode(torch.zeros(1, 4, 4)), "codes: need int64"),
    ],
)
def test_bad_input_is_named(image_tokenizer, call, message):
    with pytest.raises(ValueError, match=message):
        call(image_tokenizer)


def test_bad_folders_and_configs_are_named(tmp_path, pipeline):
    with pytest.raises(ValueError, match=r"image_tokenizer: '.*nothing' does not exist on this machine"):
        AutoImageTokenizer.from_pretrained(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty' has no config.json and no weights file"):
        AutoImageTokenizer.from_pretrained(tmp_path / "empty")
    pipeline.model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="is a 'unified' model, not an image tokenizer"):
        AutoImageTokenizer.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"codebook_size: 21 is not the product of fsq_levels \[5, 4\]"):
        small(**{**FSQ, "codebook_size": 21})
    with pytest.raises(ValueError, match="codebook_size: 20 is not a power of two, which 'lfq' needs"):
        small(quantizer="lfq")
    with pytest.raises(ValueError, match="quantizer: 'gumbel' must be one of"):
        small(quantizer="gumbel")


def test_images_and_tensors():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    images = [Image.fromarray(p) for p in pixels]
    assert np.array_equal(np.stack([np.asarray(image) for image in to_pil(to_tensor(images))]), pixels)
    with pytest.raises(ValueError, match=r"got sizes \[\(8, 8\), \(9, 9\)\]"):
        to_tensor([images[0], Image.new("RGB", (9, 9))])


class TestCodesCache:
    def test_codes_are_those_of_the_images(self, image_tokenizer, picture_source, tmp_path):
        reports = encode_source(image_tokenizer, picture_source, tmp_path / "codes", image_size=16, batch_size=5)
        assert (reports["train"].used, reports["validation"].used) == (12, 6)
        rows = load_codes(tmp_path / "codes", "train", image_tokenizer.fingerprint)
        images = load_source(picture_source)["image"]
        expected = image_tokenizer.encode(to_tensor(list(images))).flatten(1)
        assert np.array_equal(np.stack(rows["codes"]), expected.numpy())
        assert set(zip(map(int, rows["height"]), map(int, rows["width"]), strict=True)) == {(4, 4)}
        assert list(rows["caption"][:2]) == ["red apple", "blue car"]
        assert [path.name for path in tmp_path.iterdir()] == ["codes"]

    def test_codes_of_another_tokenizer_are_refused(self, image_tokenizer, picture_source, tmp_path):
        encode_source(image_tokenizer, picture_source, tmp_path / "codes", image_size=16)
        with pytest.raises(
            ValueError, match=f"made with tokenizer {image_tokenizer.fingerprint}, the one in use is abc"
        ):
            load_codes(tmp_path / "codes", "train", "abc")
        with pytest.raises(ValueError, match=r"has no codes.json"):
            load_codes(picture_source, "train", None)

    def test_size_must_divide(self, image_tokenizer, picture_source, tmp_path):
        with pytest.raises(ValueError, match="image_size: 18 does not divide"):
            encode_source(image_tokenizer, picture_source, tmp_path / "codes", image_size=18)

    def test_bad_rows_are_reported_and_the_rest_is_encoded(self, image_tokenizer, picture_source, tmp_path):
        rows = load_source(picture_source).cast_column("image", datasets.Image(decode=False)).to_list()
        rows[3]["image"]["bytes"] = b"broken"
        rows[5]["caption"] = ""
        datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False)).to_parquet(
            tmp_path / "bad.parquet"
        )
        source = str(tmp_path / "bad.parquet")
        report = encode_source(image_tokenizer, source, tmp_path / "codes", ("train",), image_size=16)["train"]
        assert (report.used, report.corrupt_image, report.empty_caption) == (10, 1, 1)
        kept = [int(row) for row in load_codes(tmp_path / "codes", "train", None)["source_row"]]
        assert kept == [i for i in range(12) if i not in (3, 5)]


def test_a_local_code_depends_on_its_own_patch_alone():
    """With `local`, other pixels move no code; without, they do. Both decode what they encode to the same size."""
    torch.manual_seed(0)
    images = torch.rand(1, 3, 24, 24) * 2 - 1
    others = torch.rand(1, 3, 24, 24) * 2 - 1
    others[:, :, 8:12, 12:16] = images[:, :, 8:12, 12:16]
    for local in (True, False):
        model = VQModel(VQConfig(channels=16, encoder_blocks=2, decoder_blocks=1, code_dim=4, local=local)).eval()
        latents, elsewhere = (model.encoder(pixels)[..., 2, 3] for pixels in (images, others))
        assert torch.equal(latents, elsewhere) == local
        assert model.decode(model.encode(images)).shape == images.shape
    with pytest.raises(ValueError, match="local: 1 must be true or false"):
        VQConfig(local=1)
