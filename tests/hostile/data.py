"""Images, sources of data, and caches of codes."""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hostile.case import VALID, Case, Silent, cases, each
from hostile.world import World
from PIL import Image

from unified.data import SkipReport, captioned_images, load_source
from unified.data.chat import encode_chat
from unified.data.code_cache import encode_source, load_codes
from unified.data.interleaved import encode_interleaved
from unified.data.sources import terms_of
from unified_tokenizers.images import read_image

Bytes = Callable[[World], bytes]


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def new(mode: str, size: tuple[int, int] = (16, 16), kind: str = "PNG", **options: Any) -> bytes:
    return encoded(Image.new(mode, size), kind, **options)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header claims a size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def noise(kind: str = "PNG", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), kind, **options)


def exif(orientation: Any) -> bytes:
    data = Image.Exif()
    data[0x0112] = orientation
    return noise("JPEG", exif=data)


def animated() -> bytes:
    frames = [Image.new("P", (16, 16), color) for color in range(3)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def image(content: bytes, name: str = "image.png") -> Callable[[World], object]:
    def call(w: World) -> None:
        read = read_image(w.file(name, content))
        if read.mode != "RGB" or read.getpixel((0, 0)) is None:
            raise Silent(f"it is {read.mode}")

    return call


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'
IMAGES = [
    ("nothing in it", b"", "image.png"),
    ("a null byte", b"\0", "image.png"),
    ("text", b"not an image", "image.png"),
    ("SVG", SVG, "image.png identify"),
    ("HTML", b"<html>404</html>", "image.png identify"),
    ("the magic of PNG", b"\x89PNG\r\n\x1a\n", "image.png"),
    ("a cut PNG", noise()[:400], "image.png truncated"),
    ("a PNG without end", noise()[:-12], VALID),
    ("a cut header", noise()[:20], "image.png"),
    ("a cut JPEG", noise("JPEG")[:300], "image.png"),
    ("a cut WebP", noise("WEBP")[:100], "image.png"),
    ("a cut GIF", animated()[:40], "image.png"),
    ("a cut TIFF", noise("TIFF")[:200], "image.png"),
    ("a cut BMP", noise("BMP")[:200], "image.png"),
    ("noise in a PNG", noise()[:60] + b"\xff" * 200 + noise()[260:], "image.png"),
    ("a bomb of 10^10 pixels", png(100_000, 100_000), "image.png pixels"),
    ("a bomb of 2^62 pixels", png(2**31 - 1, 2**31 - 1), "image.png"),
    ("a wide bomb", png(200_000_000, 1), "image.png pixels"),
    ("a size of 0", png(0, 0), "image.png"),
    ("a size of 0x5", png(0, 5), "image.png"),
    ("a size of 2^32", png(2**32 - 1, 1), "image.png"),
    ("too little data", png(64, 64, b"\0" * 10), "image.png"),
    ("a PPM of letters", b"P3 2 2 255 a b c d", "image.png"),
    ("a PPM of 0", b"P6 0 0 255\n", "image.png"),
    ("a huge PPM", b"P6 99999 99999 255\n", "image.png"),
    ("a PGM of negative size", b"P5 -4 4 255\n" + b"\0" * 16, "image.png"),
    ("floats of NaN", encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "image.png finite"),
    ("floats of inf", encoded(Image.fromarray(np.full((4, 4), np.inf, np.float32)), "TIFF"), "image.png finite"),
    ("an EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/etc/passwd) run\n", "image.png"),
    ("a zip", b"PK\3\4" + b"\0" * 40, "image.png"),
    ("a pickle", b"\x80\x04cos\nmkdir\n", "image.png"),
    ("a PDF", b"%PDF-1.4\n", "image.png"),
    ("1x1", new("RGB", (1, 1)), VALID),
    ("1x4000", new("RGB", (1, 4000)), VALID),
    ("16385x1", new("RGB", (16385, 1)), VALID),
    ("16 bits", new("I;16"), VALID),
    ("32 bits", encoded(Image.new("I", (16, 16)), "TIFF"), VALID),
    ("1 bit", new("1"), VALID),
    ("CMYK", new("CMYK", kind="JPEG"), VALID),
    ("grey with alpha", new("LA"), VALID),
    ("a palette with alpha", new("P", transparency=0), VALID),
    ("a palette of bytes", new("P", transparency=b"\0\x80"), VALID),
    ("floats", encoded(Image.new("F", (9, 9)), "TIFF"), VALID),
    ("YCbCr", encoded(Image.new("YCbCr", (9, 9)), "JPEG"), VALID),
    ("LAB", encoded(Image.new("LAB", (9, 9)), "TIFF"), VALID),
    ("an animation", animated(), VALID),
    ("WebP with alpha", new("RGBA", kind="WEBP"), VALID),
    ("EXIF turned", exif(6), VALID),
    ("EXIF of 99", exif(99), VALID),
    ("EXIF of 0", exif(0), VALID),
    ("EXIF of noise", noise("JPEG", exif=b"Exif\0\0" + b"\xff" * 50), VALID),
    ("a profile of noise", noise(icc_profile=b"\xff" * 99), VALID),
    ("a JPEG with a tail", noise("JPEG") + b"tail" * 99, VALID),
    ("a JPEG named PNG", noise("JPEG"), VALID),
]


# Sources


def skips(count: int, **options: Any) -> Callable[[Path], object]:
    """Reads a source, of which so many rows are to be skipped with a reason."""

    def call(source: Path) -> None:
        report = SkipReport()
        used = list(captioned_images(load_source(str(source), **options), report))
        if report.skipped != count or len(report.examples) != min(count, 10):
            raise Silent(f"{len(used)} used, {report.skipped} skipped: {report.examples}")

    return call


READ = skips(0)


def beside(name: str, content: bytes | str, read: Callable[[Path], object] = READ) -> Callable[[World], object]:
    """A file beside ``a.png`` and ``b.png``."""

    def call(w: World) -> None:
        file = w.file(name, content)
        for image_name in ("a.png", "b.png"):
            w.photo.save(file.parent / image_name)
        read(file)

    return call


def folder(files: dict[str, bytes], read: Callable[[Path], object] = READ) -> Callable[[World], object]:
    def call(w: World) -> None:
        root = w.fresh()
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        read(root)

    return call


def tar(members: dict[str, bytes], cut: int | None = None, kind: str = "w") -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=kind) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()[:cut]


def parquet(columns: dict[str, list[Any]]) -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.table(columns), content)
    return content.getvalue()


def lines(*rows: Any) -> str:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


def segments(rows: list[Any], streaming: bool = False) -> Callable[[World], object]:
    def call(w: World) -> None:
        file = w.file("rows.jsonl", lines(*[{"segments": row} for row in rows]))
        w.photo.save(file.parent / "a.png")
        encode_interleaved(
            w.image_tokenizer,
            str(file),
            w.fresh() / "codes",
            ("train",),
            ((16, 16),),
            batch_size=2,
            streaming=streaming,
        )

    return call


def conversations(rows: list[Any], streaming: bool = False) -> Callable[[World], object]:
    def call(w: World) -> None:
        file = w.file("rows.jsonl", lines(*rows))
        w.photo.save(file.parent / "a.png")
        encode_chat(
            w.image_tokenizer, str(file), w.fresh() / "codes", ("train",), (16, 16), batch_size=2, streaming=streaming
        )

    return call


def said(*contents: Any, images: Any = ("a.png",), roles: tuple[Any, ...] = ("user", "assistant")) -> dict[str, Any]:
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"messages": messages, "images": images if images is None else list(images)}


def linked(w: World) -> None:
    """A folder that links to itself."""
    root = w.fresh()
    w.photo.save(root / "a.png")
    (root / "a.txt").write_text("red")
    (root / "again").symlink_to(root)
    (root / "nowhere.png").symlink_to(root / "nothing")
    skips(1)(root)


IMAGE = {"type": "image"}
A, PNG = {"image": "a.png", "caption": "red"}, noise()
SOURCES = [
    ("nothing there", lambda w: load_source(str(w.root / "nothing.csv")), "source nothing.csv"),
    ("an empty name", lambda w: load_source(""), "source ''"),
    ("an empty folder", lambda w: load_source(str(w.fresh())), "source no rows"),
    ("a null byte in a name", lambda w: load_source("a\0b.csv"), "source"),
    ("a name of 10,000 characters", lambda w: load_source("a/" * 5000), "source"),
    ("a Hub name", lambda w: load_source("no-body/nothing"), "source no-body/nothing"),
    ("an unknown scheme", lambda w: load_source("ftpx://a/b.csv"), "source ftpx"),
    ("an unknown suffix", lambda w: load_source(str(w.file("a.docx", "x"))), "source .docx"),
    ("an unknown split", lambda w: load_source(str(w.pictures), "nothing"), "split nothing"),
    ("a folder of text", folder({"a.md": b"x"}), "source"),
    ("a folder that links to itself", linked, VALID),
    ("an empty image", folder({"a.png": b"", "a.txt": b"red"}, skips(1)), VALID),
    ("an empty caption", folder({"a.png": PNG, "a.txt": b"  "}, skips(1)), VALID),
    ("a caption of noise", folder({"a.png": PNG, "a.txt": b"\xff\xfa\xff"}, skips(1)), VALID),
    ("a caption in UTF-16", folder({"a.png": PNG, "a.txt": "red".encode("utf-16")}), VALID),
    ("a caption without image", folder({"a.png": PNG, "a.txt": b"red", "b.txt": b"x"}), VALID),
    ("names of odd letters", folder({"ü [1]*?.png": PNG, "ü [1]*?.txt": b"red"}), VALID),
    ("a text named PNG", folder({"a.png": b"x", "a.txt": b"red"}, skips(1)), VALID),
    ("metadata without file_name", folder({"a.png": PNG, "metadata.csv": b"x,y\n1,2"}), "source file_name"),
    ("metadata that is no CSV", folder({"a.png": PNG, "metadata.jsonl": b"{"}), "source cannot be read"),
    (
        "metadata of other files",
        folder({"a.png": PNG, "metadata.csv": b"file_name,caption\nz.png,red"}, skips(1)),
        VALID,
    ),
    (
        "metadata with traversal",
        folder({"a.png": PNG, "metadata.csv": b"file_name,caption\n../../../../../etc/passwd,red"}, skips(1)),
        VALID,
    ),
    (
        "a README that is no YAML",
        lambda w: terms_of(str(w.file("README.md", "---\n[\n---\n").parent)),
        "README.md YAML",
    ),
    ("a README of noise", lambda w: terms_of(str(w.file("README.md", b"---\n\xff\n---\n").parent)), "README.md"),
    ("a README that is a list", lambda w: terms_of(str(w.file("README.md", "---\n- 1\n---\n").parent)), "README.md"),
    ("CSV", beside("a.csv", "image,caption\na.png,red\nb.png,blue"), VALID),
    ("an empty CSV", beside("a.csv", ""), "source a.csv"),
    ("a CSV of a header", beside("a.csv", "image,caption\n"), "source a.csv no rows"),
    ("a CSV without images", beside("a.csv", "file,caption\na.png,red"), "image_column image"),
    ("a CSV without captions", beside("a.csv", "image,text\na.png,red"), "caption_column caption"),
    (
        "a CSV with traversal",
        beside("a.csv", "image,caption\n../../../../../../etc/passwd,red\na.png,blue", skips(1)),
        VALID,
    ),
    ("a CSV of /dev/zero", beside("a.csv", "image,caption\n/dev/zero,red\na.png,blue", skips(1)), VALID),
    ("a CSV of a folder", beside("a.csv", "image,caption\n.,red\na.png,blue", skips(1)), VALID),
    ("a CSV of an unknown scheme", beside("a.csv", "image,caption\nnope://x,red\na.png,blue", skips(1)), VALID),
    ("a CSV of null bytes", beside("a.csv", b"image,caption\na\0.png,red\na.png,blue", skips(1)), VALID),
    ("a CSV of uneven rows", beside("a.csv", "image,caption\na.png,red,more,more\nb.png,blue"), "source a.csv"),
    ("a CSV with an open quote", beside("a.csv", 'image,caption\na.png,"red\nb.png,blue'), "source a.csv"),
    ("a CSV of noise", beside("a.csv", b"\x80\xff\x00\x01" * 99), "a.csv"),
    ("a CSV that is not UTF-8", beside("a.csv", b"image,caption\na.png,r\xe9d\nb.png,blue", skips(1)), VALID),
    ("a CSV with a gap", beside("a.csv", "image,caption\na.png,\nb.png,blue", skips(1)), VALID),
    (
        "a pipe in place of an image",
        beside("a.csv", "image,caption\nsimplecache::file:///etc/passwd,red\na.png,blue", skips(1)),
        VALID,
    ),
    ("JSONL", beside("a.jsonl", lines(A, A)), VALID),
    ("an empty JSONL", beside("a.jsonl", ""), "source a.jsonl"),
    ("a broken line", beside("a.jsonl", lines(A, "{broken", A), skips(1)), VALID),
    ("a cut line", beside("a.jsonl", lines(A, A)[:-5], skips(1)), VALID),
    ("lines of numbers", beside("a.jsonl", "1\n2\n"), "source a.jsonl"),
    ("lines of lists", beside("a.jsonl", "[1]\n[2]\n"), "source a.jsonl"),
    ("a line of null", beside("a.jsonl", lines(A, None), skips(1)), VALID),
    (
        "another type",
        beside("a.jsonl", lines(A, {"image": "a.png", "caption": [7, {}]})),
        VALID,
    ),
    ("captions of numbers", beside("a.jsonl", lines({"image": "a.png", "caption": 7})), VALID),
    ("captions of objects", beside("a.jsonl", lines({"image": "a.png", "caption": {"a": 1}}), skips(1)), VALID),
    ("captions of null", beside("a.jsonl", lines(A, {"image": "a.png", "caption": None}), skips(1)), VALID),
    (
        "captions of surrogates",
        beside("a.jsonl", '{"image": "a.png", "caption": "\\ud800"}'),
        "a.jsonl",
    ),
    ("deep JSON", beside("a.json", "[" * 100_000), "source a.json"),
    ("a JSON of a number", beside("a.json", "7"), "source a.json"),
    ("images of null", beside("a.jsonl", lines(A, {"image": None, "caption": "x"}), skips(1)), VALID),
    ("images of numbers", beside("a.jsonl", lines({"image": 7, "caption": "x"})), "image_column int64"),
    ("images of lists", beside("a.jsonl", lines({"image": ["a.png"], "caption": "x"})), "image_column"),
    ("a parquet of noise", beside("a.parquet", b"PAR1" + b"\xff" * 99), "source a.parquet"),
    ("an empty parquet", beside("a.parquet", b""), "source a.parquet"),
    ("a cut parquet", beside("a.parquet", parquet({"image": [PNG], "caption": ["a"]})[:-20]), "source a.parquet"),
    (
        "a parquet of bytes",
        beside("a.parquet", parquet({"image": [PNG, b"x"], "caption": ["a", "b"]}), skips(1)),
        VALID,
    ),
    ("a parquet without rows", beside("a.parquet", parquet({"image": [], "caption": []})), "source a.parquet"),
    ("a tar", beside("a.tar", tar({"a.png": PNG, "a.txt": b"red"})), VALID),
    ("an empty tar", beside("a.tar", b""), "source a.tar"),
    ("a tar of noise", beside("a.tar", b"\xff" * 2000), "source a.tar"),
    ("a cut tar", beside("a.tar", tar({"a.png": PNG, "a.txt": b"red"}, 1200)), "source a.tar"),
    ("a tar without members", beside("a.tar", tar({})), "source a.tar no rows"),
    (
        "a tar of a broken image",
        beside("a.tar", tar({"a.png": b"x", "a.txt": b"red", "b.png": PNG, "b.txt": b"blue"}), skips(1)),
        VALID,
    ),
    ("a tar with traversal", beside("a.tar", tar({"../../a.png": PNG, "../../a.txt": b"red"})), VALID),
    (
        "a tar of broken JSON",
        beside("a.tar", tar({"a.png": PNG, "a.json": b"{", "a.txt": b"red"}), skips(1)),
        VALID,
    ),
    ("a tar of hidden files", beside("a.tar", tar({".a": PNG, "b": PNG})), "source a.tar no rows"),
    ("a tar without captions", beside("a.tar", tar({"a.png": PNG})), "caption_column caption"),
    (
        "a tar of noise as text",
        beside("a.tar", tar({"a.png": PNG, "a.txt": b"\xff\xfa", "b.png": PNG, "b.txt": b"x"}), skips(1)),
        VALID,
    ),
    (
        "a saved data set without state",
        lambda w: load_source(str(w.copy(w.pictures, lambda f: (f / "train" / "state.json").unlink()))),
        "source pictures",
    ),
    (
        "a saved data set without rows' files",
        lambda w: load_source(str(w.copy(w.pictures, lambda f: [p.unlink() for p in (f / "train").glob("*.arrow")]))),
        "source pictures",
    ),
    (
        "a saved data set cut",
        lambda w: load_source(
            str(
                w.copy(
                    w.pictures, lambda f: [p.write_bytes(p.read_bytes()[:900]) for p in (f / "train").glob("*.arrow")]
                )
            )
        ),
        "source pictures",
    ),
    (
        "a saved data set of no JSON",
        lambda w: load_source(str(w.copy(w.pictures, lambda f: (f / "dataset_dict.json").write_text("{")))),
        "source pictures",
    ),
    (
        "a saved data set of a list",
        lambda w: load_source(str(w.copy(w.pictures, lambda f: (f / "dataset_dict.json").write_text("[]")))),
        "source pictures",
    ),
    (
        "a folder of a script",
        folder({"data.py": b"import os; os.mkdir('executed')", "a.csv": b"image,caption\n"}),
        "source",
    ),
]


# Caches of codes


def cache(change: Callable[[Path], object], split: str = "train") -> Callable[[World], object]:
    """Train on a changed copy of a cache."""
    return lambda w: w.train(f"data.train={w.copy(w.codes, change)}", f"data.train_split={split}")


def rows(change: Callable[[dict[str, Any]], dict[str, Any]], **kinds: Any) -> Callable[[World], object]:
    """Train on a cache with its rows changed."""

    def rewrite(path: Path) -> None:
        split = datasets.load_from_disk(str(path / "train"))
        made = [{**row, **change(row)} for row in split.with_format(None)]
        features = datasets.Features(
            {name: kind for name, kind in {**split.features, **kinds}.items() if name in made[0]}
        )
        changed = datasets.Dataset.from_list(made, features=features)
        changed.save_to_disk(path / "new")
        for file in (path / "train").iterdir():
            file.unlink()
        for file in (path / "new").iterdir():
            file.rename(path / "train" / file.name)

    return cache(rewrite)


def described(**fields: Any) -> Callable[[Path], object]:
    """Change the description of a cache; None removes a field."""

    def write(path: Path) -> None:
        content = {**json.loads((path / "codes.json").read_text()), **fields}
        (path / "codes.json").write_text(
            json.dumps({name: value for name, value in content.items() if value is not None})
        )

    return write


FLOATS = {"codes": datasets.List(datasets.Value("float32"))}
CODES = [
    ("no description", cache(lambda f: (f / "codes.json").unlink()), "codes"),
    ("a description that is no JSON", cache(lambda f: (f / "codes.json").write_text("{")), "codes.json"),
    ("a description that is a list", cache(lambda f: (f / "codes.json").write_text("[]")), "codes.json"),
    ("a description nested too deep", cache(lambda f: (f / "codes.json").write_text("[" * 100_000)), "codes.json"),
    ("a description of noise", cache(lambda f: (f / "codes.json").write_bytes(b"\xff")), "codes.json"),
    ("another fingerprint", cache(described(tokenizer_fingerprint="0" * 16)), "tokenizer 0000000000000000"),
    ("no fingerprint", cache(described(tokenizer_fingerprint=None)), "tokenizer_fingerprint"),
    ("a fingerprint that is a number", cache(described(tokenizer_fingerprint=7)), "tokenizer 7"),
    ("interleaved rows", cache(described(kind="interleaved")), "interleaved"),
    ("another split", cache(lambda f: None, "nothing"), "split nothing"),
    ("no rows' files", cache(lambda f: [p.unlink() for p in (f / "train").glob("*.arrow")]), "codes"),
    (
        "a cut file",
        cache(lambda f: [p.write_bytes(p.read_bytes()[:700]) for p in (f / "train").glob("*.arrow")]),
        "codes",
    ),
    (
        "a file of noise",
        cache(lambda f: [p.write_bytes(b"\xff" * 999) for p in (f / "train").glob("*.arrow")]),
        "codes",
    ),
    ("no index", cache(lambda f: (f / "train" / "state.json").unlink()), "codes"),
    ("an index that is no JSON", cache(lambda f: (f / "train" / "state.json").write_text("{")), "codes"),
    ("fewer codes", rows(lambda r: {"codes": r["codes"][:15]}), "codes 15"),
    ("more codes", rows(lambda r: {"codes": [*r["codes"], 1]}), "codes 17"),
    ("no codes", rows(lambda r: {"codes": []}), "codes"),
    ("codes beyond", rows(lambda r: {"codes": [20] * 16}), "codes 20"),
    ("negative codes", rows(lambda r: {"codes": [-1] * 16}), "codes -1"),
    ("codes of null", rows(lambda r: {"codes": None}), "codes"),
    ("codes of floats", rows(lambda r: {"codes": [0.5] * 16}, **FLOATS), "codes float"),
    ("a height of 0", rows(lambda r: {"height": 0}), "codes"),
    ("a negative grid", rows(lambda r: {"height": -4, "width": -4}), "height -4"),
    ("a huge grid", rows(lambda r: {"height": 2**30, "width": 2**30}), "longest"),
    ("a height of null", rows(lambda r: {"height": None}), "height"),
    ("captions of null", rows(lambda r: {"caption": None}), "caption"),
    (
        "captions of numbers",
        rows(lambda r: {"caption": 7}, caption=datasets.Value("int64")),
        "caption",
    ),
    ("empty captions", rows(lambda r: {"caption": ""}), VALID),
    ("long captions", rows(lambda r: {"caption": "x" * 10_000}), "longest"),
    ("captions of control characters", rows(lambda r: {"caption": "\x00\x07"}), VALID),
    ("no captions", lambda w: load_codes(w.root / "nothing", "train", None), "codes nothing"),
]


def encode(**options: Any) -> Callable[[World], object]:
    return lambda w: encode_source(
        w.image_tokenizer, options.pop("source", str(w.pictures)), w.fresh() / "codes", **{"image_size": 16, **options}
    )


CASES: list[Case] = [
    *(Case("image reader", name, image(content), words) for name, content, words in IMAGES),
    *cases(
        "image reader",
        ("no file", lambda w: read_image(w.root / "nothing.png"), "nothing.png"),
        ("a folder", lambda w: read_image(w.fresh()), "directory"),
        ("an empty name", lambda w: read_image(""), "directory"),
        ("a null byte", lambda w: read_image("a\0b"), "null"),
        ("/dev/null", lambda w: read_image("/dev/null"), "/dev/null"),
        ("bytes of noise", lambda w: read_image(b"\xff" * 99), "identify"),
        ("no bytes", lambda w: read_image(b""), "identify"),
        ("a number", lambda w: read_image(7), "7"),
        ("None", lambda w: read_image(None), "None"),
        ("/dev/zero", lambda w: read_image("/dev/zero"), "/dev/zero"),
    ),
    *cases("sources", *SOURCES),
    *each(
        "interleaved rows",
        segments,
        [
            ([[{"text": "red", "image": None}, {"text": None, "image": "a.png"}]], VALID),
            ([[{"text": "red"}]], "segments_column"),
            ([["red"]], "segments_column"),
            ([[7]], "segments_column"),
            ([7], "segments_column"),
            (["red"], "segments_column"),
            ([[]], "segments_column"),
            ([None], "segments_column"),
            ([[{"text": None, "image": None}]], "no usable row"),
            ([[{"text": None, "image": "nothing.png"}]], "nothing.png"),
            ([[{"text": "a", "image": "a.png"}]], "both"),
            ([[{"text": 7, "image": None}]], VALID),
            ([[{"text": ["a"], "image": None}]], "segments_column"),
            ([[{"text": None, "image": {"a": 1}}]], "source no image"),
            ([[{"text": "x", "image": None, "sound": 1}]], "segments_column sound"),
        ],
    ),
    *each(
        "interleaved rows",
        lambda rows: segments(rows, streaming=True),
        [
            ([[{"sound": 1}]], "source no usable row"),
            ([["red"]], "source no usable row"),
            ([[7]], "source no usable row"),
            ([7], "source no usable row"),
        ],
    ),
    *each(
        "chat rows",
        conversations,
        [
            ([said([IMAGE, {"type": "text", "text": "red?"}], [{"type": "text", "text": "yes"}])], VALID),
            ([said("red?", "yes", images=())], VALID),
            ([said("red?", "yes", images=None)], VALID),
            (
                [said([IMAGE, {"type": "text", "text": "red?"}], [{"type": "text", "text": "yes"}], images=())],
                "image without",
            ),
            ([said("red?", "yes")], "images places"),
            ([said("red?", images=())], "nobody replies"),
            ([said("yes", images=(), roles=("assistant",))], "nobody asks"),
            ([said("red?", "yes", images=(), roles=("user", "bot"))], "role bot"),
            ([said("red?", "yes", images=(), roles=("user", None))], "role None"),
            ([said("red?", " ", images=())], "says nothing"),
            ([said(7, 8, images=())], "content 7"),
            ([said([{"type": "video"}], [{"type": "text"}], images=())], "video"),
            ([said([IMAGE], [{"type": "text", "text": "yes"}], images=("nothing.png",))], "nothing.png"),
            ([{"messages": [], "images": []}], "messages"),
            ([{"messages": "red", "images": []}], "messages red"),
            ([{"messages": 7, "images": []}], "messages 7"),
            ([{"images": ["a.png"]}], "messages_column messages"),
            ([{"messages": [{"role": "user", "content": "a"}], "images": 7}], "images"),
        ],
    ),
    *each(
        "chat rows",
        lambda rows: conversations(rows, streaming=True),
        [
            ([said([IMAGE, {"type": "text", "text": "red?"}], [{"type": "text", "text": "yes"}])], VALID),
            ([said("red?", images=())], "nobody replies"),
            ([{"messages": [7], "images": []}], "messages 7"),
            ([{"messages": 7, "images": []}], "messages 7"),
        ],
    ),
    *cases("codes cache", *CODES),
    *each(
        "encode_source",
        lambda options: encode(**options),
        [
            ({"image_size": 18}, "image_size 18"),
            ({"image_size": 0}, "size"),
            ({"image_size": -16}, "size"),
            ({"image_size": 16.5}, "size"),
            ({"batch_size": 0}, "batch_size 0"),
            ({"block_rows": 0}, "block_rows 0"),
            ({"max_rows": 0}, "max_rows 0"),
            ({"splits": ("nothing",)}, "split nothing"),
            ({"splits": ()}, "splits"),
            ({"image_column": "picture"}, "image_column picture"),
            ({"caption_column": "text"}, "caption_column text"),
            ({"caption": "a"}, "caption"),
            ({"source": "/nothing/at/all"}, "source /nothing/at/all"),
            ({"batch_size": 1.5}, "batch_size 1.5"),
            ({"max_rows": 1.5}, "max_rows 1.5"),
        ],
    ),
]
