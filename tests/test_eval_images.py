"""PSNR, reconstruction, sheets and reports."""

import base64
import io
import math
import re
import weakref
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from unified_eval import Results, captioned_grid, in_rows, psnr, psnr_summary, reconstruct, write_report
from unified_eval.reconstruction import add_tokenizer_psnr, stream_reconstructions
from unified_eval.report import format_value
from unified_tokenizers.images import to_pil, to_tensor


def flat(value: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


class Halving:
    """A tokenizer of four grey codes with a stride of 8, for which every result is known."""

    codebook_size, downsample, fingerprint = 4, 8, "halving"

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        means = torch.nn.functional.avg_pool2d(images, 8).mean(1)
        return ((means + 1) * 2).floor().clamp(0, 3).long()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        grey = (codes.float() / 2 - 0.75)[:, None].expand(-1, 3, -1, -1)
        return grey.repeat_interleave(8, 2).repeat_interleave(8, 3)


def test_psnr_of_known_errors():
    a = torch.zeros(3, 3, 4, 5)
    b = a.clone()
    b[0] += 0.1  # mean squared error 0.01
    b[1, 0] += 0.3  # one channel of three: 0.03
    assert psnr(a, b).tolist() == pytest.approx([20.0, -10 * math.log10(0.03), math.inf], rel=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (
            torch.zeros(1, 3, 4, 4),
            torch.zeros(1, 3, 4, 5),
            r"two equal shapes .* got \(1, 3, 4, 4\) and \(1, 3, 4, 5\)",
        ),
        (torch.zeros(0, 3, 4, 4), torch.zeros(0, 3, 4, 4), "two equal shapes"),
        (torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), -1.0), r"b: values -1..-1 leave \[0, 1\]"),
        (torch.full((1, 3, 4, 4), math.nan), torch.zeros(1, 3, 4, 4), r"a: values nan..nan leave \[0, 1\]"),
    ],
)
def test_psnr_refuses_other_shapes_and_ranges(a, b, message):
    with pytest.raises(ValueError, match=message):
        psnr(a, b)


def test_psnr_summary_separates_mean_and_pooled():
    summary = psnr_summary([flat(0), flat(0)], [flat(51), flat(0)])  # errors 0.04 and 0
    cap = 10 * math.log10(12 * 255**2)
    assert summary["mean_db"] == pytest.approx((-10 * math.log10(0.04) + cap) / 2)
    assert summary["pooled_db"] == pytest.approx(-10 * math.log10(0.02))
    with pytest.raises(ValueError, match="reconstructed: 1 images for 2 originals"):
        psnr_summary([flat(0), flat(0)], [flat(0)])


def test_reconstruction_goes_through_the_codes_in_order():
    images = [flat(value) for value in (0, 70, 130, 255, 200)]
    rebuilt = reconstruct(Halving(), images, batch_size=2)
    assert [np.unique(image).tolist() for image in rebuilt] == [[32], [96], [159], [223], [223]]
    with pytest.raises(ValueError, match="images: the list is empty"):
        reconstruct(Halving(), [])
    with pytest.raises(ValueError, match="images: need one or more images of one size"):
        reconstruct(Halving(), [flat(0), flat(0, (8, 8))])


def test_a_stream_of_images_is_measured_one_batch_at_a_time():
    originals, rebuilt = [], []

    def stream():
        for value in range(0, 240, 12):
            image = flat(value)
            originals.append(weakref.ref(image))
            yield image

    for _, again in stream_reconstructions(Halving(), stream(), batch_size=4):
        rebuilt.append(weakref.ref(again))
        assert max(sum(image() is not None for image in images) for images in (originals, rebuilt)) <= 8
    assert len(rebuilt) == 20
    images = [flat(value) for value in range(0, 240, 12)]
    results = Results(["a", "b"])
    add_tokenizer_psnr(results, Halving(), stream(), "greys", batch_size=4)
    expected = psnr_summary(images, reconstruct(Halving(), images))
    assert results.metrics == {
        "tokenizer_psnr_db": expected["mean_db"],
        "tokenizer_psnr_pooled_db": expected["pooled_db"],
    }
    assert results.recipes["tokenizer_psnr_db"]["n"] == 20 and results.values["tokenizer_psnr_db"].given
    with pytest.raises(ValueError, match="images: there is none"):
        add_tokenizer_psnr(results, Halving(), iter([]), "none")


def test_a_real_tokenizer_gives_its_own_decoding(image_tokenizer):
    images = [flat(20), flat(230)]
    expected = to_pil(image_tokenizer.decode(image_tokenizer.encode(to_tensor(images))))
    for image, wanted in zip(reconstruct(image_tokenizer, images), expected, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(wanted))


def test_grid_places_images_and_captions():
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (16, 8), "blue")
    plain = captioned_grid([[red, blue], [blue]], scale=32)
    assert plain.size == (14 + 32 + 14 + 32 + 14, 14 + 2 * (32 + 14))
    assert plain.getpixel((0, 0)) == (255, 255, 255)
    assert plain.getpixel((14 + 16, 14 + 16)) == (255, 0, 0)
    assert plain.getpixel((14 + 46 + 16, 14 + 16)) == (0, 0, 255)
    assert plain.getpixel((14 + 46 + 16, 14 + 2)) == (255, 255, 255)  # a wide image keeps its proportions
    assert plain.getpixel((14 + 16, 14 + 46 + 16)) == (0, 0, 255)
    captioned = captioned_grid([[red, blue]], [["a red square", ""]], scale=32)
    below = np.asarray(captioned)[14 + 32 + 4 :]
    assert (below[:, :50] < 200).any() and not (below[:, 58:] < 200).any()
    longer = captioned_grid([[red, blue]], [["a red square " * 20, ""]], scale=64)
    four_lines = captioned_grid([[red, blue]], [["a red square " * 9, ""]], scale=64)
    assert longer.size == four_lines.size  # captions stop at four lines


def test_grid_titles_make_room():
    row = [[flat(0), flat(99)]]
    plain = captioned_grid(row)
    titled = captioned_grid(row, column_titles=["real", "generated"], row_titles=["red apple"], title="Images")
    assert titled.width == max(plain.width + 128 + 14, 320 + 28) and titled.height > plain.height + 30
    left = np.asarray(titled)[-128 - 14 : -14, : 128 + 14]
    assert (left < 128).any() and not (np.asarray(captioned_grid(row, row_titles=[""]))[:, :140] < 128).any()


def test_nearest_enlarges_by_whole_factors():
    checks = Image.fromarray((np.indices((10, 10)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    sheet = np.asarray(captioned_grid([[checks]], scale=64, resample="nearest"))
    inside = sheet[16:76, 16:76]  # a factor of 6, centred in the tile
    assert np.array_equal(inside, np.asarray(checks).repeat(6, 0).repeat(6, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": []}, "rows: there is no image"),
        ({"rows": [[]]}, "rows: there is no image"),
        ({"rows": [[flat(0)]], "captions": [["a", "b"]]}, r"captions: rows of \[2\] for images in rows of \[1\]"),
        ({"rows": [[flat(0)]], "column_titles": ["a", "b"]}, "column_titles: 2 titles for 1 columns"),
        ({"rows": [[flat(0)]], "row_titles": []}, "row_titles: 0 titles for 1 rows"),
        ({"rows": [[flat(0)]], "scale": 4}, "scale: 4 pixels is too small"),
    ],
)
def test_grid_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        captioned_grid(**arguments)


def test_in_rows():
    assert in_rows([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    with pytest.raises(ValueError, match="columns: 0 is below 1"):
        in_rows([1], 0)


class Page(HTMLParser):
    """Checks that tags nest, and keeps texts by tag, and image sources."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.sources: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.sources.append(dict(attrs)["src"])
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())


def test_report_holds_everything_it_was_given(tmp_path):
    image = flat(77, (5, 4))
    file = tmp_path / "curve.png"
    flat(33).save(file)
    out = write_report(
        tmp_path / "new" / "report.html",
        "Apples & <pears>",
        metrics=[("FD-EffLite0", 12.3456, "N=64"), ("R@1", 0.5, "chance 1/64")],
        tables={"Training": [{"step": 1000, "stage": "patch <4>"}, {"step": 2000, "stage": "patch 1"}]},
        images=[(image, "one grey"), (file, "another")],
        commands=["python eval/evaluate.py --out 'a' && echo"],
        notes=["Art: CC BY-SA 4.0"],
    )
    page = Page()
    page.feed(out.read_text(encoding="utf-8"))
    assert page.open == []
    assert page.texts["h1"] == ["Apples & <pears>"] and page.texts["p"] == ["Art: CC BY-SA 4.0"]
    assert page.texts["td"] == ["FD-EffLite0", "12.35", "N=64", "R@1", "0.500", "chance 1/64",
                                "1,000", "patch <4>", "2,000", "patch 1"]  # fmt: skip
    assert page.texts["figcaption"] == ["one grey", "another"]
    assert page.texts["pre"] == ["python eval/evaluate.py --out 'a' && echo"]
    embedded = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in page.sources]
    assert np.array_equal(np.asarray(embedded[0].convert("RGB")), np.asarray(image))
    assert embedded[1].getpixel((0, 0)) == (33, 33, 33)
    assert not re.search(r"https?://|src=\"(?!data:)", out.read_text(encoding="utf-8"))  # nothing is fetched
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_report_errors(tmp_path):
    with pytest.raises(ValueError, match=r"out: '.*report.txt' is not named .html"):
        write_report(tmp_path / "report.txt", "x")
    with pytest.raises(ValueError, match=r"tables: row 1 of 'T' has the keys \['b'\], the first has \['a'\]"):
        write_report(tmp_path / "report.html", "x", tables={"T": [{"a": 1}, {"b": 1}]})
    with pytest.raises(ValueError, match=r"images: '.*absent.png' is missing"):
        write_report(tmp_path / "report.html", "x", images=[(tmp_path / "absent.png", "x")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234567, "1,234,567"), (0.0, "0.000"), (0.98765, "0.988"), (-7.5, "-7.500"), (1234.5, "1,234.50"),
     (2e-5, "2e-05"), ("n/a", "n/a"), (True, "True")],
)  # fmt: skip
def test_numbers_are_printed_readably(value, shown):
    assert format_value(value) == shown
