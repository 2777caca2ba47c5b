"""Command lines, and what the evaluation reads."""

import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
from hostile.case import VALID, Case, cases, each
from hostile.world import World, script
from PIL import Image

from unified import cli
from unified.files import write_json
from unified_eval.diversity import inception_score, nearest_neighbours
from unified_eval.frechet import frechet_distance
from unified_eval.intervals import bootstrap_interval, share_interval, wilson_interval
from unified_eval.npz import load_npz, save_npz
from unified_eval.prompts import read_prompts
from unified_eval.results import Results
from unified_eval.selection import choose_evenly
from unified_eval.shapes import read_claims

Call = Callable[[World], object]
NAN = float("nan")
PIPELINE, OUT, PHOTO, TEXT, NOTHING = "<pipeline>", "<out>", "<photo>", "<text>", "<nothing>"


def named(arguments: str, w: World) -> list[str]:
    """The arguments of a line, with paths for names in angle brackets, and ``␣`` for a space."""

    def photo() -> str:
        w.photo.save(file := w.fresh() / "photo.png")
        return str(file)

    paths: dict[str, Callable[[], str]] = {
        PIPELINE: lambda: str(w.pipeline_folder),
        OUT: lambda: str(w.fresh()),
        PHOTO: photo,
        TEXT: lambda: str(w.file("text.txt", "x")),
        NOTHING: lambda: str(w.root / "nothing"),
        "<pictures>": lambda: str(w.pictures),
        "<tokenizer>": lambda: str(w.pipeline_folder / "image_tokenizer"),
        "<settings>": lambda: str(w.settings),
        "<empty>": lambda: "",
        "<surrogate>": lambda: "\udcff",
        "<prompts>": lambda: str(w.file("prompts.txt", "red apple\nblue car")),
    }
    return [paths[word]() if word in paths else word.replace("␣", " ") for word in arguments.split()]


def unified(arguments: str) -> Call:
    def call(w: World) -> None:
        if code := cli.main(named(arguments, w)):
            raise SystemExit(code)

    return call


def of(path: str) -> Callable[[str], Call]:
    """The command line of a script."""
    return lambda arguments: lambda w: script(path, *named(arguments, w))


GENERATE = "generate --pipeline <pipeline> --prompt car --out <out>"
INPAINT = "inpaint --pipeline <pipeline> --prompt car --out <out>"
SERVE = "serve --pipeline <pipeline>"
UNIFIED = [
    ("", "command"),
    ("nothing", "nothing"),
    ("--sound", "command"),
    ("generate", "--pipeline"),
    ("generate --pipeline <nothing> --prompt car --out <out>", "pipeline nothing"),
    ("generate --pipeline <text> --prompt car --out <out>", "pipeline text.txt"),
    ("generate --pipeline <empty> --prompt car --out <out>", "pipeline"),
    ("generate --pipeline no-body/nothing --prompt car --out <out>", "pipeline no-body/nothing"),
    ("generate --pipeline <pipeline> --prompt <empty> --out <out>", "prompt"),
    ("generate --pipeline <pipeline> --prompt <surrogate> --out <out>", "prompt Unicode"),
    ("generate --pipeline <pipeline> --prompt car --out <text>", "text.txt"),
    ("generate --pipeline <pipeline> --prompt car --out /proc/nothing/out", "/proc/nothing"),
    (f"{GENERATE} --negative-prompt <surrogate>", "negative_prompt Unicode"),
    (f"{GENERATE} --height 17", "height 17"),
    (f"{GENERATE} --height -16", "height -16"),
    (f"{GENERATE} --height 1.5", "--height 1.5"),
    (f"{GENERATE} --width 99999999", "width 99999999"),
    (f"{GENERATE} --guidance-scale nan", "guidance_scale nan"),
    (f"{GENERATE} --guidance-scale inf", "guidance_scale inf"),
    (f"{GENERATE} --guidance-scale much", "--guidance-scale much"),
    (f"{GENERATE} --guidance-schedule up", "--guidance-schedule up"),
    (f"{GENERATE} --temperature 0", "temperature 0"),
    (f"{GENERATE} --temperature nan", "temperature nan"),
    (f"{GENERATE} --top-k -1", "top_k -1"),
    (f"{GENERATE} --top-k 1.5", "--top-k 1.5"),
    (f"{GENERATE} --top-p 2", "top_p 2"),
    (f"{GENERATE} --top-p 0", "top_p 0"),
    (f"{GENERATE} --seed -1", "--seed -1"),
    (f"{GENERATE} --seed 99999999999999999999", "--seed 99999999999999999999"),
    (f"{GENERATE} --seed ²", "--seed ²"),
    (f"{GENERATE} --seed {2**63 - 1} --num-images-per-prompt 2", VALID),
    (f"{GENERATE} --num-images-per-prompt 0", "num_images_per_prompt 0"),
    (f"{GENERATE} --decoding fast", "--decoding fast"),
    (f"{GENERATE} --device nowhere", "--device nowhere"),
    (f"{GENERATE} --device cuda:99", "--device cuda:99"),
    (f"{GENERATE} --device meta", "--device meta"),
    (f"{GENERATE} --dtype int8", "--dtype int8"),
    (f"{GENERATE} --threads 0", "threads 0"),
    (f"{GENERATE} --threads -1", "threads -1"),
    (f"{GENERATE} --threads 99999999999", "threads 99999999999"),
    (f"{GENERATE} --lora <nothing>", "lora nothing"),
    (f"{GENERATE} --lora <out>", "lora unified_base.json"),
    (f"{GENERATE} --int8 --compile", "--compile --int8"),
    (f"{GENERATE} --sound 3", "sound"),
    (f"{INPAINT} --image <photo>", "--mask"),
    (f"{INPAINT} --image <nothing> --mask <photo>", "nothing"),
    (f"{INPAINT} --image <text> --mask <photo>", "text.txt"),
    (f"{INPAINT} --image <photo> --mask <text>", "text.txt"),
    (f"{INPAINT} --image <photo> --mask <nothing>", "nothing"),
    (f"{INPAINT} --image <out> --mask <photo>", "directory"),
    ("caption --pipeline <pipeline>", "images"),
    ("caption <nothing> --pipeline <pipeline>", "nothing"),
    ("caption <text> --pipeline <pipeline>", "text.txt"),
    ("caption <photo> --pipeline <pipeline> --max-new-tokens 0", "max_new_tokens 0"),
    ("caption <photo> --pipeline <pipeline> --max-new-tokens 999999999", "max_new_tokens room"),
    ("caption <photo> --pipeline <pipeline> --prompt <empty>", "prompt"),
    ("caption <photo> --pipeline <pipeline> --temperature 0", "temperature 0"),
    ("caption <photo> --pipeline ~/nothing/at/all", "pipeline ~/nothing/at/all"),
    ("prepare", "prepare"),
    ("prepare nothing", "nothing"),
    ("train", "--config"),
    ("train --config nothing", "config nothing"),
    ("tokenizer text --source <nothing> --out <out>", "source nothing"),
    ("compare <nothing> <text>", "results nothing"),
    ("--import <nothing> train", "import nothing"),
    ("generate --import <text>", "import text.txt"),
    ("chat --pipeline <nothing> --out <out>", "pipeline nothing"),
    ("chat --pipeline <pipeline> --out <text>", "text.txt"),
    ("chat --pipeline <pipeline> --out <out> --max-new-tokens 0", "max_new_tokens 0"),
    ("chat --pipeline <pipeline> --out <out> --max-images -1", "max_images -1"),
    ("chat --pipeline <pipeline> --out <out> --temperature 0", "temperature 0"),
    (f"{SERVE} --port -1", "port -1"),
    (f"{SERVE} --port 65536", "port 65536"),
    (f"{SERVE} --port http", "--port http"),
    (f"{SERVE} --max-rows 1", "max_rows 1"),
    (f"{SERVE} --queue 0", "queue 0"),
    (f"{SERVE} --password <empty>", "password"),
    (f"{SERVE} --threads 0", "threads 0"),
    (f"{SERVE} --loras <nothing>", "lora nothing"),
    (f"{SERVE} --port 0 --server localhost", "pipeline unified.json"),
    (f"{SERVE} --port 0 --server http://127.0.0.1:9 --loras <out>", "loras server"),
    (f"{SERVE} --host no␣host --port 0", "host"),
    (f"{GENERATE} --seed {2**63 - 1}", VALID),
]
EVALUATE = "--pipeline <pipeline> --data <pictures> --out <out> --metrics fd"
SCRIPTS: dict[str, list[tuple[str, str]]] = {
    "recipes/train.py": [
        ("", "--config"),
        ("--config <nothing>", "config nothing"),
        ("--config <settings> steps", "overrides steps"),
        ("--config <settings> steps=0", "steps 0"),
        ("--config <settings> output_dir=''", "output_dir"),
        ("--config <settings> --sound 3", "sound"),
        ("--config <settings> data.train=/nothing/at/all output_dir=/tmp/fuzz-nothing", "source /nothing/at/all"),
        ("--config <settings> model.image_tokenizer=/nothing/at/all", "image_tokenizer /nothing/at/all"),
        ("--config <settings> model.text_tokenizer=/nothing/at/all", "text_tokenizer /nothing/at/all"),
        ("--config <settings> output_dir=/proc/nothing", "/proc/nothing"),
        ("--config <settings> track_with=[nothing]", "track_with nothing"),
        ("--config <settings> model.architecture.hidden_size=30", "architecture 30"),
        ("--config <settings> model.architecture.hidden_size=-32", "hidden_size -32"),
        ("--config <settings> model.architecture.model_type=bert", "BertModel"),
        ("--config <settings> model.architecture.hidden_act=nothing", "text_config nothing"),
        ("--config <settings> data.pack=3", "pack 3"),
        ("--config <settings> processes=7", "processes 7"),
        ("--config <settings> lora.target_modules=[nothing]", "target_modules nothing"),
        ("--config <settings> evaluation={every:␣1,data:␣/nothing/at/all,clip:␣b}", "/nothing/at/all"),
        ("--config <settings> sample={every:␣1,prompts:␣['']}", "prompt"),
    ],
    "recipes/encode_images.py": [
        ("", "--image-tokenizer"),
        ("--image-tokenizer <nothing> --source <pictures> --out <out>", "image_tokenizer nothing"),
        ("--image-tokenizer <tokenizer> --source <nothing> --out <out>", "source nothing"),
        ("--image-tokenizer <tokenizer> --source <pictures> --out <out> --image-size 18", "image_size 18"),
        ("--image-tokenizer <tokenizer> --source <pictures> --out <out> --image-size 0", "size 0"),
        ("--image-tokenizer <tokenizer> --source <pictures> --out <out> --batch-size 0", "batch_size 0"),
        ("--image-tokenizer <tokenizer> --source <pictures> --out <out> --buckets 16", "--buckets 16"),
        ("--image-tokenizer <tokenizer> --source <pictures> --out <out> --buckets 0x16", "sizes 0"),
        ("--image-tokenizer <tokenizer> --source <pictures> --out <out> --buckets ²x²", "--buckets ²x²"),
        ("--image-tokenizer <tokenizer> --source <pictures> --out <out> --crops 0", "count 0"),
        ("--image-tokenizer <tokenizer> --source <pictures> --out <out> --zoom nan", "zoom nan"),
        ("--image-tokenizer <tokenizer> --source <pictures> --out <out> --seed -1", "seed -1"),
        ("--image-tokenizer <tokenizer> --source <pictures> --out <out> --splits nothing", "split nothing"),
        ("--image-tokenizer <tokenizer> --source <pictures> --out <out> --segments-column a --crops 2", "--crops"),
        ("--image-tokenizer <tokenizer> --source <pictures> --out <out> --segments-column a", "segments_column a"),
        ("--image-tokenizer <tokenizer> --source <pictures> --out <out> --max-rows 0", "max_rows 0"),
        ("--image-tokenizer <tokenizer> --source <pictures> --out <out> --validation 2", "validation 2"),
        ("--image-tokenizer <tokenizer> --source <pictures> --out <out> --validation nan", "validation nan"),
    ],
    "recipes/train_text_tokenizer.py": [
        ("", "--source"),
        ("--source <nothing> --out <out>", "source nothing"),
        ("--source <pictures> --out <out> --vocab-size 3", "vocab_size 3"),
        ("--source <pictures> --out <out> --vocab-size many", "--vocab-size many"),
        ("--source <pictures> --out <out> --caption-column a", "caption_column a"),
        ("--source <pictures> --out <out> --messages-column a", "messages_column a"),
        ("--source <pictures> --out <out> --model-type words", "--model-type words"),
        ("--source <pictures> --out <text>", "text.txt"),
    ],
    "recipes/convert_checkpoint.py": [
        ("", "image-tokenizer"),
        ("nothing", "nothing"),
        ("image-tokenizer --checkpoint <nothing> --out <out>", "nothing"),
        ("image-tokenizer --checkpoint <text> --out <out>", "text.txt"),
        ("llamagen --checkpoint <text> --out <out>", "text.txt"),
        ("llamagen --checkpoint <nothing> --out <out>", "nothing"),
        ("simplear --checkpoint <nothing> --image-tokenizer <nothing> --out <out>", "nothing"),
        ("emu35 --checkpoint <nothing> --image-tokenizer <nothing> --text-tokenizer <nothing> --out <out>", "nothing"),
        ("lumina --checkpoint <nothing> --image-tokenizer <nothing> --out <out>", "nothing"),
        ("wallaroo --checkpoint <nothing> --image-tokenizer <nothing> --backbone <nothing> --out <out>", "nothing"),
        ("joint-table --checkpoint <nothing> --codebook-size 3 --boi 1 --eoi 2 --out <out>", "nothing"),
        ("joint-table --checkpoint <pipeline> --codebook-size 3 --boi 1 --eoi 2 --out <out>", "config.json"),
    ],
    "recipes/prepare_shapes.py": [
        ("", "--out"),
        ("--out <out> --size 0", "size 0"),
        ("--out <out> --size -64", "size -64"),
        ("--out <out> --train -1", "train -1"),
        ("--out <out> --hold-out-combinations nan", "hold-out-combinations nan"),
        ("--out <out> --train many", "--train many"),
    ],
    "recipes/prepare_shapes_chat.py": [
        ("", "--out"),
        ("--out <out> --size 0", "size 0"),
        ("--out <out> --train -1", "train -1"),
        ("--out <out> --questions 9", "questions 9"),
    ],
    "recipes/prepare_openmoji.py": [
        ("", "--out"),
        ("--out <out> --size 0", "size 0"),
        ("--out <out> --size -3", "size -3"),
        ("--out <out> --validation-share 2", "validation_share 2"),
        ("--out <out> --validation-share nan", "validation_share nan"),
        ("--out <out> --style grey", "--style grey"),
        ("--out <out> --groups nothing", "--groups nothing"),
    ],
    "recipes/prepare_shapes_lists.py": [
        ("", "--out"),
        ("--out <out> --train -1", "train -1"),
        ("--out <out> --questions -1", "questions -1"),
        ("--out <out> --most 1", "most 1"),
        ("--out <out> --seed x", "--seed x"),
    ],
    "recipes/prepare_efficientnet.py": [
        ("", "--out"),
        ("--out <text>", "text.txt"),
    ],
    "recipes/prepare_smollm2.py": [
        ("--out <text>", "text.txt"),
        ("--gguf <nothing> --out <out>", "gguf nothing"),
        ("--gguf <text> --out <out>", "GGUF text.txt"),
    ],
    "recipes/quickstart_report.py": [
        ("--run <nothing>", "run nothing"),
        ("--run <out>", "run"),
    ],
    "recipes/smollm2_report.py": [
        ("--run <nothing> --backbone <nothing>", "run nothing"),
        ("--run <pipeline> --backbone <nothing>", "run"),
    ],
    "recipes/init_study.py": [
        ("--config <nothing> --out <out>", "config nothing"),
        ("--config <settings> --out <out> --kinds nothing", "kinds nothing"),
        ("--config <settings> --out <out> --seeds -1", "seed -1"),
    ],
    "recipes/next_x_study.py": [
        ("--config <nothing> --data <pictures> --clip a --out <out>", "config nothing"),
        ("--config <settings> --data <nothing> --clip a --out <out>", "nothing"),
        ("--config <settings> --data <pictures> --clip a --out <out> --variants nothing", "variants nothing"),
        ("--config <settings> --data <pictures> --clip a --out <out> --jobs 0", "jobs 0"),
    ],
    "eval/evaluate.py": [
        ("", "--out"),
        ("--pipeline <pipeline> --out <out>", "--data"),
        ("--data <pictures> --out <out>", "--pipeline"),
        ("--pipeline <nothing> --data <pictures> --out <out> --metrics fd --num-images 3", "pipeline nothing"),
        ("--pipeline <pipeline> --data <nothing> --out <out> --metrics fd --num-images 3", "source nothing"),
        ("--pipeline <pipeline> --data <pictures> --out <text> --metrics fd", "out text.txt"),
        ("--pipeline <pipeline> --data <pictures> --out <out> --metrics nothing", "--metrics nothing"),
        ("--pipeline <pipeline> --data <pictures> --out <out> --metrics clip", "clip"),
        (f"{EVALUATE} --num-images 0", "--num-images 0"),
        (f"{EVALUATE} --num-images 1", "captions 1"),
        (f"{EVALUATE} --num-images 999", "999"),
        (f"{EVALUATE} --batch-size 0", "--batch-size 0"),
        (f"{EVALUATE} --samples-per-caption 0", "--samples-per-caption 0"),
        (f"{EVALUATE} --max-samples 0", "max_samples 0"),
        (f"{EVALUATE} --resamples 1", "--resamples 1"),
        (f"{EVALUATE} --split nothing", "split nothing"),
        (f"{EVALUATE} --psnr-split nothing --num-images 3", "split nothing"),
        (f"{EVALUATE} --image-column a", "image_column a"),
        (f"{EVALUATE} --caption-column a", "caption_column a"),
        (f"{EVALUATE} --guidance-scale nan --num-images 3", "guidance_scale nan"),
        (f"{EVALUATE} --temperature 0 --num-images 3", "temperature 0"),
        (f"{EVALUATE} --top-p 7 --num-images 3", "top_p 7"),
        (f"{EVALUATE} --top-k -1 --num-images 3", "top_k -1"),
        (f"{EVALUATE} --seed -1 --num-images 3", "seed -1"),
        (f"{EVALUATE} --device nowhere", "--device nowhere"),
        (f"{EVALUATE} --decoding fast", "--decoding fast"),
        (f"{EVALUATE} --decoding plain gsd", "--decoding 2"),
        (f"{EVALUATE} --inception-weights <nothing>", "--inception-weights"),
        (f"{EVALUATE} --features <text>", "features text.txt"),
        (f"{EVALUATE} --lora <nothing> --num-images 3", "lora nothing"),
    ],
    "eval/evaluate_text.py": [
        ("", "--out"),
        ("--pipeline <pipeline> --out <out>", "--questions none"),
        ("--pipeline <nothing> --questions <pictures> --out <out>", "pipeline nothing"),
        ("--pipeline <pipeline> --questions <nothing> --out <out>", "source nothing"),
        ("--pipeline <pipeline> --questions <pictures> --out <out>", "messages_column messages"),
        ("--pipeline <pipeline> --captions <nothing> --out <out>", "source nothing"),
        ("--pipeline <pipeline> --captions <pictures> --ask what? --out <out>", "messages template"),
        ("--pipeline <pipeline> --captions <pictures> --max-new-tokens 0 --out <out>", "max-new-tokens 0"),
        ("--pipeline <pipeline> --texts <pictures> --text-column nothing --out <out>", "text-column nothing"),
        ("--pipeline <pipeline> --texts <pictures> --out <text>", "text.txt"),
    ],
    "eval/compare.py": [
        ("", "A"),
        ("<nothing> <nothing>", "results nothing"),
        ("<out> <text>", "results"),
    ],
    "eval/generate_prompts.py": [
        ("", "--pipeline"),
        ("--pipeline <pipeline> --prompts <nothing> --out <out>", "prompts nothing"),
        ("--pipeline <pipeline> --prompts <pictures> --out <out>", "prompts pictures"),
        ("--pipeline <nothing> --prompts <prompts> --out <out>", "pipeline nothing"),
        ("--pipeline <pipeline> --prompts <prompts> --out <text>", "out text.txt"),
        ("--pipeline <pipeline> --prompts <prompts> --out <out> --samples 0", "--samples 0"),
        ("--pipeline <pipeline> --prompts <prompts> --out <out> --max-prompts 0", "--max-prompts 0"),
        ("--pipeline <pipeline> --prompts <prompts> --out <out> --max-prompts -1", "--max-prompts -1"),
        ("--pipeline <pipeline> --prompts <prompts> --out <out> --clip <nothing>", "clip nothing"),
        ("--pipeline <pipeline> --prompts <prompts> --out <out> --shapes", "--shapes"),
        ("--pipeline <pipeline> --prompts <prompts> --out <out> --top-p 7", "top_p 7"),
        ("--pipeline <pipeline> --prompts <prompts> --out <out> --seed -1", "seed -1"),
    ],
    "eval/evaluate_tokenizer.py": [
        ("", "--tokenizers"),
        ("--tokenizers <nothing> --data <pictures> --image-size 16 --out <out>", "image_tokenizer nothing"),
        ("--tokenizers <tokenizer> --data <nothing> --image-size 16 --out <out>", "source nothing"),
        ("--tokenizers <tokenizer> --data <pictures> --image-size 0 --out <out>", "--image-size 0"),
        ("--tokenizers <tokenizer> --data <pictures> --image-size 18 --out <out>", "18"),
        ("--tokenizers <tokenizer> --data <pictures> --image-size 16 --out <text>", "out text.txt"),
        ("--tokenizers <tokenizer> --data <pictures> --image-size 16 --out <out> --names a b", "--names"),
        ("--tokenizers <tokenizer> --data <pictures> --image-size 16 --out <out> --sheet -1", "sheet -1"),
        ("--tokenizers <tokenizer> --data <pictures> --image-size 16 --out <out> --max-samples 0", "max_samples 0"),
        (
            "--tokenizers <tokenizer> --data <pictures> --image-size 16 --out <out> --lpips <nothing> <nothing>",
            "nothing",
        ),
    ],
    "eval/train_clip.py": [
        ("", "--data"),
        ("--data <nothing> --out <out> --name a", "source nothing"),
        ("--data <pictures> --out <text> --name a", "out text.txt"),
        ("--data <pictures> --out <out> --name a --steps 0", "--steps 0"),
        ("--data <pictures> --out <out> --name a --batch-size 0", "--batch-size 0"),
        ("--data <pictures> --out <out> --name a --learning-rate nan", "--learning-rate nan"),
        ("--data <pictures> --out <out> --name a --learning-rate -1", "--learning-rate -1"),
        ("--data <pictures> --out <out> --name a --seed -1", "seed -1"),
        ("--data <pictures> --out <out> --name a --max-samples 0", "max_samples 0"),
        ("--data <pictures> --out <out> --name <empty>", "name"),
    ],
}


# What the evaluation reads


def prompts(name: str, content: bytes | str) -> Call:
    return lambda w: read_prompts(w.file(name, content))


def geneval(entry: Any) -> Call:
    return prompts("a.jsonl", json.dumps(entry))


def npz(array: np.ndarray, name: str = "arr_0", **options: Any) -> bytes:
    content = io.BytesIO()
    np.savez(content, **{name: array}, **options)
    return content.getvalue()


def archive(member: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("arr_0.npy", member)
    return content.getvalue()


def images(content: bytes) -> Call:
    return lambda w: list(load_npz(w.file("a.npz", content)))


def pickled(w: World) -> None:
    """An archive of an object whose pickle runs code."""
    list(
        load_npz(
            w.file(
                "a.npz",
                archive(
                    b"\x93NUMPY\x01\x00v\x00"
                    + b"{'descr': '|O', 'fortran_order': False, 'shape': (1, 2, 2, 3), }".ljust(117)
                    + b"\n"
                    + w.bomb
                ),
            )
        )
    )


PIXELS = np.zeros((2, 4, 4, 3), np.uint8)
LINE = {"prompt": "a", "tag": "b", "include": [{"class": "circle", "count": 1}]}

CASES: list[Case] = [
    *each("command line: unified", unified, UNIFIED),
    *(case for path, rows in SCRIPTS.items() for case in each(f"command line: {path}", of(path), rows)),
    *cases(
        "evaluation: prompts",
        ("no file", lambda w: read_prompts(w.root / "nothing.txt"), "prompts nothing.txt"),
        ("a folder", lambda w: read_prompts(w.fresh()), "prompts"),
        ("another kind", prompts("a.csv", "x"), "prompts a.csv"),
        ("nothing in it", prompts("a.txt", ""), "prompts a.txt"),
        ("blank lines", prompts("a.txt", "\n \n"), "prompts a.txt"),
        ("noise", prompts("a.txt", b"\xff\xfe\x00"), "prompts a.txt"),
        ("noise in JSON lines", prompts("a.jsonl", b"\xff\xfe\x00"), "prompts a.jsonl"),
        ("noise in a table", prompts("a.tsv", b"\xff\xfe\x00"), "prompts a.tsv"),
        ("a broken line", prompts("a.jsonl", "{"), "prompts line 1 a.jsonl"),
        ("a line of a list", geneval([1]), "prompts line 1 a.jsonl"),
        ("a line without tag", geneval({**LINE, "tag": ""}), "prompts line 1 tag"),
        ("a prompt of a number", geneval({**LINE, "prompt": 7}), "prompts line 1 prompt"),
        ("a tag of a list", geneval({**LINE, "tag": ["a"]}), "prompts line 1 tag"),
        ("a blank prompt", geneval({**LINE, "prompt": " "}), "prompts line 1 prompt"),
        ("surrogates", prompts("a.jsonl", '{"prompt": "\\ud800", "tag": "a", "include": [1]}'), "prompts line 1"),
        ("a table without columns", prompts("a.tsv", "a\tb\n1\t2"), "prompts a.tsv Prompt"),
        ("a table with a gap", prompts("a.tsv", "Prompt\tCategory\na\t"), "prompts line 2 a.tsv"),
        ("a table of one column", prompts("a.tsv", "Prompt\tCategory\na"), "prompts line 2 a.tsv"),
        ("deep JSON", prompts("a.jsonl", "[" * 100_000), "prompts line 1 a.jsonl"),
        ("a null byte", prompts("a.txt", "a\0b"), VALID),
    ),
    *each(
        "evaluation: claims",
        lambda claims: lambda w: read_claims(claims),
        [
            ([], "claims"),
            ("{", "claims"),
            ("7", "claims"),
            ("null", "claims"),
            (None, "claims"),
            ([7], "claims 7"),
            (["circle"], "claims circle"),
            ([{"class": "circle"}], "claims count"),
            ([{"class": "cloud", "count": 1}], "claims cloud"),
            ([{"class": [], "count": 1}], "claims class"),
            ([{"class": "circle", "count": 0}], "claims count 0"),
            ([{"class": "circle", "count": True}], "claims count True"),
            ([{"class": "circle", "count": "1"}], "claims count 1"),
            ([{"class": "circle", "count": 1, "sound": 1}], "claims sound"),
            ([{"class": "circle", "count": 1, "color": []}], "claims color"),
            ([{"class": "circle", "count": 1, "position": 7}], "claims position 7"),
            ([{"class": "circle", "count": 1, "position": ["left of", 0]}], "claims position"),
            (
                [{"class": "circle", "count": 1}, {"class": "square", "count": 1, "position": ["left of", "a"]}],
                "claims position a",
            ),
            (
                [{"class": "circle", "count": 1}, {"class": "square", "count": 1, "position": [[], 0]}],
                "claims position",
            ),
            (LINE["include"], VALID),
        ],
    ),
    *cases(
        "evaluation: npz",
        ("images", images(npz(PIXELS)), VALID),
        ("an object that runs code", pickled, "a.npz"),
        ("objects", images(npz(np.array([{"a": 1}], dtype=object))), "a.npz object"),
        ("floats", images(npz(PIXELS.astype(np.float32))), "a.npz float32"),
        ("three dimensions", images(npz(PIXELS[0])), "a.npz (4, 4, 3)"),
        ("no images", images(npz(PIXELS[:0])), "a.npz (0, 4, 4, 3)"),
        ("four channels", images(npz(np.zeros((1, 4, 4, 4), np.uint8))), "a.npz (1, 4, 4, 4)"),
        ("images of no size", images(npz(np.zeros((1, 0, 4, 3), np.uint8))), "a.npz (1, 0, 4, 3)"),
        ("another name", images(npz(PIXELS, "images")), "a.npz arr_0"),
        ("no archive", images(b"x"), "a.npz"),
        ("nothing in it", images(b""), "a.npz"),
        ("a cut archive", images(npz(PIXELS)[:-30]), "a.npz"),
        ("an archive of noise", images(archive(b"\xff" * 99)), "a.npz"),
        ("an empty member", images(archive(b"")), "a.npz"),
        (
            "a header beyond the data",
            images(npz(PIXELS).replace(b"(2, 4, 4, 3)", b"(9, 4, 4, 3)")),
            "a.npz",
        ),
        (
            "data that are too short",
            images(
                archive(
                    b"\x93NUMPY\x01\x00v\x00"
                    + b"{'descr': '|u1', 'fortran_order': False, 'shape': (9, 4, 4, 3), }".ljust(117)
                    + b"\n"
                    + b"\0" * 99
                )
            ),
            "a.npz",
        ),
        (
            "a header that is code",
            images(archive(b"\x93NUMPY\x01\x00v\x00" + b"__import__('os').mkdir('executed')".ljust(117) + b"\n")),
            "a.npz",
        ),
        ("no images to save", lambda w: save_npz(w.fresh() / "a.npz", []), "images"),
        ("another suffix", lambda w: save_npz(w.fresh() / "a.zip", [w.photo]), "path a.zip"),
        ("two sizes", lambda w: save_npz(w.fresh() / "a.npz", [w.photo, Image.new("RGB", (8, 8))]), "images 8x8"),
    ),
    *cases(
        "evaluation: numbers",
        ("more hits than trials", lambda w: wilson_interval(3, 2), "hits 3"),
        ("no trial", lambda w: wilson_interval(0, 0), "hits 0"),
        ("no shares", lambda w: share_interval([], []), "hits 0"),
        ("values of NaN", lambda w: bootstrap_interval([1.0, NAN]), "values 1"),
        ("a level of 1", lambda w: bootstrap_interval([1.0, 2.0], level=1), "level 1"),
        ("one group", lambda w: bootstrap_interval([1.0, 2.0], ["a", "a"]), "groups 1"),
        ("groups of another length", lambda w: bootstrap_interval([1.0, 2.0], ["a"]), "groups 1"),
        ("features of NaN", lambda w: frechet_distance(np.full((3, 2), NAN), np.zeros((3, 2))), "a"),
        ("features of other widths", lambda w: frechet_distance(np.zeros((3, 2)), np.zeros((3, 4))), "b"),
        ("one row", lambda w: frechet_distance(np.zeros((1, 2)), np.zeros((3, 2))), "a 1"),
        ("features of texts", lambda w: frechet_distance(np.array([["a"]]), np.zeros((3, 2))), "a: features"),
        ("one row of logits", lambda w: inception_score(np.zeros((1, 4)), splits=10), "logits 1"),
        ("more neighbours than rows", lambda w: nearest_neighbours(np.eye(3), np.eye(3), k=9), "k 9"),
        ("more items than there are", lambda w: choose_evenly([1, 2], 3, 0), "3"),
        ("no items", lambda w: choose_evenly([], 1, 0), "1"),
        (
            "a metric of NaN",
            lambda w: write_json(w.fresh() / "a.json", {"x": Results(["a"]).add("x", NAN, "x").number}),
            "nan",
        ),
    ),
]
