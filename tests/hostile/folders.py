"""Folders: pipelines, models, tokenizers, language models, adapters, checkpoints."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile.case import VALID, Case, cases
from hostile.world import World
from safetensors.torch import load_file, save_file

from unified import UnifiedForCausalLM, UnifiedPipeline
from unified.convert import llamagen_from_weights, split_joint_table
from unified.lora.adapters import load_lora, unload_lora
from unified_tokenizers import AutoImageTokenizer, load_text_tokenizer, read_weights

Change = Callable[[Path], object]
Call = Callable[[World], object]
NAN = float("nan")


# Changes of a folder


def fields(file: str, **values: Any) -> Change:
    """Set fields of a JSON file, by names with dots as ``__``; a field set to ... is removed."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        for name, value in values.items():
            *outer, last = name.split("__")
            inner = content
            for part in outer:
                inner = inner[part]
            inner[last] = value
            if value is ...:
                del inner[last]
        (folder / file).write_text(json.dumps(content))

    return change


def write(file: str, content: bytes | str) -> Change:
    return lambda folder: (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)


def remove(file: str) -> Change:
    return lambda folder: (folder / file).unlink()


def cut(file: str, size: int) -> Change:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def tensors(file: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Edit the tensors of a file in place."""

    def change(folder: Path) -> None:
        state = load_file(folder / file)
        edit(state)
        save_file(state, folder / file, {"format": "pt"})

    return change


def first(state: dict[str, torch.Tensor]) -> str:
    return next(iter(sorted(state)))


def header(file: str, edit: Callable[[dict[str, Any]], object]) -> Change:
    """Edit the header of a safetensors file and leave its data."""

    def change(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + size])
        edit(entries)
        made = json.dumps(entries).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(made)) + made + content[8 + size :])

    return change


def entry(entries: dict[str, Any]) -> dict[str, Any]:
    return next(value for name, value in sorted(entries.items()) if name != "__metadata__")


def weights(file: str) -> list[tuple[str, Change]]:
    """Damages of a safetensors file, which every loader has to notice."""

    def poison(folder: Path) -> None:
        (folder / file).write_bytes(b"\x80\x04cos\nmkdir\n(S'executed'\ntR.")

    return [
        ("no weights", remove(file)),
        ("empty weights", write(file, b"")),
        ("weights of noise", write(file, b"\xff" * 999)),
        ("a pickle as weights", poison),
        ("cut weights", cut(file, 2000)),
        ("a cut header", cut(file, 20)),
        ("a header of 2^63 bytes", write(file, struct.pack("<Q", 2**63 - 1) + b"{}")),
        ("a header that is no JSON", write(file, struct.pack("<Q", 4) + b"{{{{" + b"\0" * 99)),
        ("no tensors", write(file, struct.pack("<Q", 2) + b"{}")),
        ("a header that lies about a shape", header(file, lambda e: entry(e).update(shape=[10**6, 10**6]))),
        ("a header that lies about a type", header(file, lambda e: entry(e).update(dtype="F64"))),
        ("a header of an unknown type", header(file, lambda e: entry(e).update(dtype="Q7"))),
        ("a header beyond the file", header(file, lambda e: entry(e).update(data_offsets=[0, 2**60]))),
        ("a negative offset", header(file, lambda e: entry(e).update(data_offsets=[-8, 8]))),
        ("a missing tensor", tensors(file, lambda s: s.pop(first(s)))),
        ("a renamed tensor", tensors(file, lambda s: s.update(other=s.pop(first(s))))),
        ("one tensor more", tensors(file, lambda s: s.update(other=torch.zeros(3)))),
        ("a tensor of another shape", tensors(file, lambda s: s.update({first(s): torch.zeros(3, 5)}))),
        ("an empty tensor", tensors(file, lambda s: s.update({first(s): torch.zeros(0)}))),
    ]


# Loading


def model(change: Change) -> Call:
    return lambda w: UnifiedPipeline.from_pretrained(w.copy(w.pipeline_folder, lambda f: change(f / "model")))


def pipeline(change: Change) -> Call:
    return lambda w: UnifiedPipeline.from_pretrained(w.copy(w.pipeline_folder, change))


def image_tokenizer(change: Change) -> Call:
    return lambda w: AutoImageTokenizer.from_pretrained(w.copy(w.pipeline_folder / "image_tokenizer", change))


def text_tokenizer(change: Change) -> Call:
    return lambda w: load_text_tokenizer(w.copy(w.pipeline_folder / "text_tokenizer", change))


def backbone_tokenizer(change: Change, **frame: Any) -> Call:
    return lambda w: load_text_tokenizer(w.copy(w.backbone, change), **frame)


def backbone(change: Change, **options: Any) -> Call:
    given = {"codebook_size": 20, "boi_token_id": 3, "eoi_token_id": 4, **options}
    return lambda w: UnifiedForCausalLM.from_backbone(str(w.copy(w.backbone, change)), **given)


def adapter(change: Change) -> Call:
    def call(w: World) -> None:
        before = {name: value.clone() for name, value in w.pipe.model.state_dict().items()}
        try:
            unload_lora(load_lora(w.pipe.model, w.copy(w.adapter, change), "a"))
        finally:  # a refused adapter leaves the model as it was
            after = w.pipe.model.state_dict()
            assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    return call


def checkpoint(change: Change, *overrides: str) -> Call:
    """Resume from a changed copy of the last checkpoint but one."""

    def call(w: World) -> None:
        run = w.copy(w.run, lambda f: change(sorted((f / "checkpoints").iterdir())[-1]))
        settings = [f"output_dir={run}", "checkpoint_every=1", "resume=latest", "steps=4", "allow_changes=true"]
        w.train(*settings, *overrides)

    return call


def nothing(folder: Path) -> None:
    """Change nothing."""


def poisoned(name: str, load: Callable[[Path], object], others: bool = False) -> Call:
    """A folder or file with a pickle that runs code; ``others`` keeps the weights beside it."""

    def call(w: World) -> None:
        def change(folder: Path) -> None:
            (folder / name).write_bytes(w.bomb)
            if not others:
                (folder / "model.safetensors").unlink()

        load(w.copy(w.pipeline_folder / "model", change))

    return call


def numpy_file(w: World) -> Path:
    np.savez(file := w.fresh() / "a.npz", weight=np.zeros(3))
    return file


CONFIG, WEIGHTS = "config.json", "model.safetensors"
TRAINER, MODEL, OPTIMIZER, RANDOM = (
    "trainer_state.json",
    "model.safetensors",
    "optimizer.safetensors",
    "random-0.safetensors",
)
ADAPTER, DESCRIPTION, TENSORS = "adapter_config.json", "unified_base.json", "adapter_model.safetensors"

BROKEN_JSON = [
    ("nothing", "", ""),
    ("no JSON", "{", ""),
    ("a list", "[]", ""),
    ("a number", "7", ""),
    ("null", "null", ""),
    ("noise", b"\xff\xfe\x00", ""),
    ("deep JSON", "[" * 100_000, ""),
]
MODEL_FIELDS: list[tuple] = [
    ({"codebook_size": "many"}, "codebook_size many"),
    ({"codebook_size": -1}, "codebook_size -1"),
    ({"codebook_size": 0}, "codebook_size 0"),
    ({"codebook_size": 1.5}, "codebook_size 1.5"),
    ({"codebook_size": NAN}, "codebook_size nan"),
    ({"codebook_size": None}, "codebook_size None"),
    ({"codebook_size": 21}, "image_embed"),
    ({"codebook_size": ...}, "image_embed"),
    ({"boi_token_id": -1}, "boi_token_id -1"),
    ({"boi_token_id": 10**6}, "boi_token_id 1000000"),
    ({"eoi_token_id": "a"}, "eoi_token_id a"),
    ({"image_grids": "4x4"}, "image_grids 4x4"),
    ({"image_grids": [[4, -4]]}, "image_grids -4"),
    ({"positions": "3d"}, "positions 3d"),
    ({"text_loss_weight": NAN}, "text_loss_weight nan"),
    ({"conditioning": {"kind": "class", "classes": 4}}, "condition"),
    ({"conditioning": 7}, "conditioning 7"),
    ({"image_tokenizer_fingerprint": "0"}, "image_tokenizer fingerprint"),
    ({"text_tokenizer_fingerprint": "0"}, "text_tokenizer fingerprint"),
    ({"text_config": ...}, "config model"),
    ({"text_config": []}, "text_config"),
    ({"text_config": "llama"}, "text_config llama"),
    ({"text_config__model_type": "nothing"}, "text_config nothing"),
    ({"text_config__model_type": ...}, "text_config model_type"),
    ({"text_config__hidden_size": -1}, "hidden_size -1"),
    ({"text_config__hidden_size": 0}, "hidden_size 0"),
    ({"text_config__hidden_size": "wide"}, "hidden_size wide"),
    ({"text_config__hidden_size": 33}, "hidden size 33"),
    ({"text_config__hidden_size": 64}, "32"),
    ({"text_config__num_hidden_layers": 0}, "num_hidden_layers 0"),
    ({"text_config__num_hidden_layers": -1}, "num_hidden_layers -1"),
    ({"text_config__num_hidden_layers": 1.5}, "num_hidden_layers 1.5"),
    ({"text_config__num_hidden_layers": 3}, "layers.2"),
    ({"text_config__num_hidden_layers": 1}, "layers.1"),
    ({"text_config__num_attention_heads": 0}, "num_attention_heads 0"),
    ({"text_config__num_attention_heads": 3}, "heads 3"),
    ({"text_config__vocab_size": -3}, "vocab_size -3"),
    ({"text_config__vocab_size": 10}, "10"),
    ({"text_config__max_position_embeddings": "far"}, "max_position_embeddings far"),
    ({"text_config__rms_norm_eps": "small"}, "rms_norm_eps small"),
    ({"text_config__hidden_act": "nothing"}, "config nothing"),
    ({"text_config__rope_parameters": {"rope_type": "nothing"}}, "config nothing"),
    ({"model_type": "nothing"}, VALID),
    ({"codebook_size": 10**12}, "codebook_size 1000000000000"),
    ({"auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}, VALID),
]
HUGE: list[dict[str, Any]] = [
    {"text_config__num_hidden_layers": 10**6},
    {"text_config__hidden_size": 2**40},
    {"text_config__vocab_size": 2**40},
    {"text_config__intermediate_size": 2**50},
]
TOKENIZER_FIELDS: list[tuple] = [
    ({"codebook_size": 0}, "codebook_size 0"),
    ({"codebook_size": "a"}, "codebook_size a"),
    ({"codebook_size": NAN}, "codebook_size nan"),
    ({"codebook_size": 21}, "codebook"),
    ({"codebook_size": 2**50}, "codebook_size"),
    ({"channels": -8}, "channels -8"),
    ({"channels": 7}, "channels 7"),
    ({"channels": 16}, "image_tokenizer"),
    ({"channels": None}, "channels None"),
    ({"downsample": 0}, "downsample 0"),
    ({"downsample": 2}, "encoder"),
    ({"downsample": "four"}, "downsample four"),
    ({"encoder_blocks": -1}, "encoder_blocks -1"),
    ({"encoder_blocks": 2}, "encoder"),
    ({"decoder_blocks": 1.5}, "decoder_blocks 1.5"),
    ({"code_dim": 0}, "code_dim 0"),
    ({"quantizer": "nothing"}, "quantizer nothing"),
    ({"quantizer": "fsq"}, "fsq_levels"),
    ({"quantizer": "fsq", "fsq_levels": [5, 4]}, "quantizer"),
    ({"quantizer": "lfq"}, "power of two"),
    ({"model_type": "llama"}, "image_tokenizer llama"),
    ({"model_type": "nothing"}, "image_tokenizer nothing"),
    ({"model_type": 7}, "image_tokenizer 7"),
    ({"model_type": ...}, "image_tokenizer"),
    ({"model_type": []}, "image_tokenizer"),
    ({"auto_map": {"AutoModel": "code.Model"}}, VALID),
]
ADAPTER_FIELDS: list[tuple] = [
    ({"r": 0}, "r 0"),
    ({"r": -4}, "r -4"),
    ({"r": 2}, "tensors adapter_config.json"),
    ({"r": "4"}, "r 4"),
    ({"r": 10**9}, "r 1000000000"),
    ({"r": NAN}, "r nan"),
    ({"r": None}, "r None"),
    ({"lora_alpha": NAN}, "lora_alpha nan"),
    ({"lora_alpha": 0}, "lora_alpha 0"),
    ({"lora_alpha": "a"}, "lora_alpha a"),
    ({"lora_dropout": 1}, "lora_dropout 1"),
    ({"target_modules": "(a|a)*$"}, "target_modules (a|a)*$"),
    ({"target_modules": "([a-z_.]+)+$"}, "target_modules"),
    ({"target_modules": ["(x+x+)+y"]}, "target_modules (x+x+)+y"),
    ({"target_modules": ["q_proj", 7]}, "target_modules 7"),
    ({"target_modules": []}, "target_modules []"),
    ({"target_modules": None}, "target_modules None"),
    ({"target_modules": "all-linear"}, "target_modules all-linear"),
    ({"target_modules": ["nothing"]}, "target_modules nothing"),
    ({"target_modules": ["q_proj"]}, "tensors adapter_config.json"),
    ({"target_modules": ["../q_proj"]}, "target_modules ../q_proj"),
    ({"exclude_modules": "(a+)+$"}, "exclude_modules (a+)+$"),
    ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern (a+)+$"),
    ({"rank_pattern": {"q_proj": 2}}, "tensors adapter_config.json"),
    ({"rank_pattern": 7}, "rank_pattern 7"),
    ({"alpha_pattern": {"q_proj": NAN}}, "alpha_pattern nan"),
    ({"alpha_pattern": []}, "alpha_pattern []"),
    ({"layers_to_transform": [0]}, "tensors adapter_config.json"),
    ({"layers_to_transform": [99]}, "layers_to_transform 99"),
    ({"layers_to_transform": -1}, "layers_to_transform -1"),
    ({"modules_to_save": ["image_embed"]}, "tensors adapter_config.json"),
    ({"modules_to_save": ["backbone"]}, "modules_to_save backbone"),
    ({"modules_to_save": "image_embed"}, "modules_to_save image_embed"),
    ({"use_dora": True}, "tensors adapter_config.json"),
    ({"use_dora": "yes"}, "use_dora yes"),
    ({"use_rslora": 1}, "use_rslora 1"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
    ({"peft_type": "IA3"}, "peft_type IA3"),
    ({"bias": "all"}, "bias all"),
    ({"layer_replication": [[0, 9]]}, "layer_replication"),
    ({"loftq_config": {"a": 1}}, "loftq_config"),
    ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron"),
    ({"auto_mapping": {"base_model_class": "os", "parent_library": "os"}}, VALID),
    ({"base_model_name_or_path": 7}, "base_model_name_or_path 7"),
    ({"sound": 7}, "sound 7"),
]
BASE_FIELDS: list[tuple] = [
    ({"modality": "sound"}, "modality sound"),
    ({"modality": 7}, "modality 7"),
    ({"modality": None}, "modality None"),
    ({"hidden_size": 33}, "hidden_size 33"),
    ({"hidden_size": "a"}, "hidden_size a"),
    ({"image_tokenizer_fingerprint": "0"}, "image_tokenizer_fingerprint 0"),
    ({"positions": NAN}, "positions nan"),
]


def each(entry: str, load: Callable[[Change], Call], file: str, rows: list[tuple]) -> list[Case]:
    return [Case(entry, f"{file}: {values}", load(fields(file, **values)), *rest) for values, *rest in rows]


def broken(entry: str, load: Callable[[Change], Call], file: str, words: str) -> list[Case]:
    """A file that is no JSON of names with values."""
    return [Case(entry, f"{name} in {file}", load(write(file, content)), words) for name, content, _ in BROKEN_JSON]


def damaged(entry: str, load: Callable[[Change], Call], file: str, words: str) -> list[Case]:
    return [Case(entry, name, load(change), words) for name, change in weights(file)]


CASES: list[Case] = [
    *damaged("model folder", model, WEIGHTS, "model"),
    *broken("model folder", model, CONFIG, "config"),
    *each("model folder", model, CONFIG, MODEL_FIELDS),
    *(Case("model folder", f"{values}", model(fields(CONFIG, **values)), "config") for values in HUGE),
    *cases(
        "model folder",
        ("no configuration", model(remove(CONFIG)), "config.json"),
        ("an adapter beside it", model(write(ADAPTER, "{}")), "adapter_config.json"),
        (
            "a pickle in its place (.bin)",
            poisoned("pytorch_model.bin", UnifiedForCausalLM.from_pretrained),
            "model",
        ),
        ("a pickle beside it (.bin)", poisoned("pytorch_model.bin", UnifiedForCausalLM.from_pretrained, True), VALID),
        ("a pickle beside it (.pkl)", poisoned("a.pkl", UnifiedForCausalLM.from_pretrained, True), VALID),
        (
            "an index without shards",
            model(lambda f: ((f / WEIGHTS).unlink(), write(f"{WEIGHTS}.index.json", '{"weight_map": {"a": "b"}}')(f))),
            "model",
        ),
        (
            "an index that is no JSON",
            model(lambda f: ((f / WEIGHTS).unlink(), write(f"{WEIGHTS}.index.json", "{")(f))),
            "index.json",
        ),
        (
            "an index nested too deep",
            model(lambda f: ((f / WEIGHTS).unlink(), write(f"{WEIGHTS}.index.json", "[" * 100_000)(f))),
            "index.json",
        ),
        (
            "an index with traversal",
            model(
                lambda f: (
                    (f / WEIGHTS).unlink(),
                    write(f"{WEIGHTS}.index.json", '{"metadata": {}, "weight_map": {"a": "../../../etc/passwd"}}')(f),
                )
            ),
            "model",
        ),
        ("weights of NaN", model(tensors(WEIGHTS, lambda s: s.update({n: v * NAN for n, v in s.items()}))), VALID),
        ("float64", model(tensors(WEIGHTS, lambda s: s.update({n: v.double() for n, v in s.items()}))), VALID),
        ("generation_config.json of noise", model(write("generation_config.json", b"\xff")), "generation_config"),
        ("nothing there", lambda w: UnifiedForCausalLM.from_pretrained(w.root / "nothing"), "nothing"),
        ("an empty folder", lambda w: UnifiedForCausalLM.from_pretrained(w.fresh()), "model config.json"),
        ("a file", lambda w: UnifiedForCausalLM.from_pretrained(w.file("model.txt", "x")), "model.txt"),
    ),
    *cases(
        "pipeline folder",
        ("nothing there", lambda w: UnifiedPipeline.from_pretrained(w.root / "nothing"), "pipeline nothing"),
        ("a Hub name", lambda w: UnifiedPipeline.from_pretrained("no-body/nothing"), "pipeline no-body/nothing"),
        ("an empty name", lambda w: UnifiedPipeline.from_pretrained(""), "pipeline"),
        ("None", lambda w: UnifiedPipeline.from_pretrained(None), "pipeline None"),
        ("a null byte", lambda w: UnifiedPipeline.from_pretrained("a\0b"), "pipeline"),
        ("a name of 10,000 letters", lambda w: UnifiedPipeline.from_pretrained("a" * 10_000), "pipeline"),
        ("a file", lambda w: UnifiedPipeline.from_pretrained(w.file("a.txt", "x")), "pipeline a.txt"),
        ("an empty folder", lambda w: UnifiedPipeline.from_pretrained(w.fresh()), "pipeline pipeline.json"),
        ("no pipeline.json", pipeline(remove("pipeline.json")), "pipeline pipeline.json"),
        ("no model", pipeline(lambda f: (f / "model").rename(f / "other")), "model"),
        ("no image tokenizer", pipeline(lambda f: (f / "image_tokenizer").rename(f / "other")), "image_tokenizer"),
        ("no text tokenizer", pipeline(lambda f: (f / "text_tokenizer").rename(f / "other")), "text_tokenizer"),
        (
            "another image tokenizer",
            pipeline(
                tensors(
                    "image_tokenizer/model.safetensors",
                    lambda s: s.update({n: v + 1 for n, v in s.items() if v.is_floating_point()}),
                )
            ),
            "image_tokenizer fingerprint",
        ),
        (
            "another fingerprint",
            pipeline(fields("pipeline.json", image_tokenizer_fingerprint="0")),
            "pipeline.json image_tokenizer_fingerprint 0",
        ),
        (
            "another class",
            pipeline(fields("pipeline.json", _class_name="os.system")),
            VALID,
        ),
        ("a card of noise", pipeline(write("README.md", b"\xff\xfe")), "README.md"),
        (
            "a dtype of text",
            lambda w: UnifiedPipeline.from_pretrained(w.pipeline_folder, torch_dtype="float7"),
            "torch_dtype float7",
        ),
        (
            "a dtype of integers",
            lambda w: UnifiedPipeline.from_pretrained(w.pipeline_folder, torch_dtype=torch.int8),
            "torch_dtype int8",
        ),
    ),
    *broken("pipeline folder", pipeline, "pipeline.json", "pipeline.json"),
    *damaged("image tokenizer folder", image_tokenizer, WEIGHTS, "image_tokenizer"),
    *broken("image tokenizer folder", image_tokenizer, CONFIG, "config"),
    *each("image tokenizer folder", image_tokenizer, CONFIG, TOKENIZER_FIELDS),
    *(
        Case("image tokenizer folder", f"{values}", image_tokenizer(fields(CONFIG, **values)), "config")
        for values in ({"encoder_blocks": 10**6}, {"channels": 2**40}, {"downsample": 10**6})
    ),
    *cases(
        "image tokenizer folder",
        ("nothing there", lambda w: AutoImageTokenizer.from_pretrained(w.root / "nothing"), "image_tokenizer nothing"),
        ("an empty folder", lambda w: AutoImageTokenizer.from_pretrained(w.fresh()), "image_tokenizer config.json"),
        ("no configuration", image_tokenizer(remove(CONFIG)), "image_tokenizer"),
        ("None", lambda w: AutoImageTokenizer.from_pretrained(None), "image_tokenizer None"),
        ("a text", lambda w: AutoImageTokenizer.from_pretrained(w.file("a.txt", "x")), "a.txt"),
        ("a pickle (.pt)", lambda w: AutoImageTokenizer.from_pretrained(w.file("a.pt", w.bomb)), "weights a.pt"),
        ("a pickle (.ckpt)", lambda w: AutoImageTokenizer.from_pretrained(w.file("a.ckpt", w.bomb)), "weights a.ckpt"),
        (
            "a folder of a pickle",
            lambda w: AutoImageTokenizer.from_pretrained(w.file("a.bin", w.bomb).parent),
            "weights a.bin",
        ),
        ("a file of the Hub", lambda w: AutoImageTokenizer.from_pretrained("hf-hub:nothing"), "hf-hub:nothing"),
    ),
    *cases(
        "weights files",
        ("a pickle (.pt)", lambda w: read_weights(w.file("a.pt", w.bomb)), "weights a.pt"),
        ("a pickle (.pkl)", lambda w: read_weights(w.file("a.pkl", w.bomb)), "weights a.pkl"),
        (
            "a pickle named safetensors",
            lambda w: read_weights(w.file("a.safetensors", w.bomb)),
            "weights a.safetensors",
        ),
        (
            "an object saved by torch",
            lambda w: (torch.save({"a": Path("x")}, f := w.fresh() / "a.pt"), read_weights(f)),
            "weights a.pt",
        ),
        (
            "numbers saved by torch",
            lambda w: (torch.save({"a": 7}, f := w.fresh() / "a.pt"), read_weights(f)),
            "weights a.pt",
        ),
        (
            "a list saved by torch",
            lambda w: (torch.save([torch.zeros(3)], f := w.fresh() / "a.pt"), read_weights(f)),
            "weights a.pt list",
        ),
        ("an empty dictionary", lambda w: (torch.save({}, f := w.fresh() / "a.pt"), read_weights(f)), "weights a.pt"),
        (
            "names that are numbers",
            lambda w: (torch.save({7: torch.zeros(3)}, f := w.fresh() / "a.pt"), read_weights(f)),
            "weights a.pt",
        ),
        (
            "a cut file",
            lambda w: (
                torch.save({"a": torch.zeros(999)}, f := w.fresh() / "a.pt"),
                cut("a.pt", 900)(f.parent),
                read_weights(f),
            ),
            "weights a.pt",
        ),
        ("an archive of NumPy", lambda w: read_weights(numpy_file(w)), "weights a.npz"),
        ("no file", lambda w: read_weights(w.root / "nothing.pt"), "weights nothing.pt"),
        ("an empty file", lambda w: read_weights(w.file("a.pt", b"")), "weights a.pt"),
        ("LlamaGen of other tensors", lambda w: llamagen_from_weights({"a": torch.zeros(3)}, "a.pt"), "a.pt"),
        ("LlamaGen of no tensors", lambda w: llamagen_from_weights({}, "a.pt"), "a.pt"),
        ("a joint table of no codes", lambda w: split_joint_table(str(w.backbone), 0, 3, 4), "codebook_size 0"),
        (
            "a joint table of too many codes",
            lambda w: split_joint_table(str(w.backbone), 10**6, 3, 4),
            "codebook_size 1000000",
        ),
    ),
    *cases(
        "text tokenizer folder",
        ("nothing there", lambda w: load_text_tokenizer(w.root / "nothing"), "text_tokenizer nothing"),
        ("an empty folder", lambda w: load_text_tokenizer(w.fresh()), "text_tokenizer"),
        ("None", lambda w: load_text_tokenizer(None), "text_tokenizer None"),
        ("an empty model", text_tokenizer(write("sentencepiece.model", b"")), "sentencepiece.model"),
        ("a model of noise", text_tokenizer(write("sentencepiece.model", b"\xff" * 999)), "sentencepiece.model"),
        ("a cut model", text_tokenizer(cut("sentencepiece.model", 300)), "sentencepiece.model"),
        (
            "a model of a pickle",
            text_tokenizer(write("sentencepiece.model", b"\x80\x04cos\nmkdir\n")),
            "sentencepiece.model",
        ),
        ("a model of text", text_tokenizer(write("sentencepiece.model", "hello")), "sentencepiece.model"),
        ("no tokenizer.json", backbone_tokenizer(remove("tokenizer.json")), "text_tokenizer"),
        ("tokenizer.json of noise", backbone_tokenizer(write("tokenizer.json", b"\xff" * 99)), "text_tokenizer"),
        ("tokenizer.json of a list", backbone_tokenizer(write("tokenizer.json", "[]")), "text_tokenizer"),
        ("tokenizer.json without model", backbone_tokenizer(fields("tokenizer.json", model=...)), "text_tokenizer"),
        (
            "tokenizer.json of special tokens alone",
            backbone_tokenizer(fields("tokenizer.json", model__vocab={})),
            VALID,
        ),
        (
            "tokenizer.json with ids that are texts",
            backbone_tokenizer(fields("tokenizer.json", model__vocab={"a": "b"})),
            "text_tokenizer",
        ),
        (
            "tokenizer.json with negative ids",
            backbone_tokenizer(fields("tokenizer.json", model__vocab={"a": -1})),
            "text_tokenizer",
        ),
        (
            "tokenizer_config.json of noise",
            backbone_tokenizer(write("tokenizer_config.json", b"\xff")),
            "text_tokenizer",
        ),
        ("tokenizer_config.json of a list", backbone_tokenizer(write("tokenizer_config.json", "[]")), "text_tokenizer"),
        (
            "code of its own",
            backbone_tokenizer(fields("tokenizer_config.json", auto_map={"AutoTokenizer": ["code.A", "code.B"]})),
            VALID,
        ),
        (
            "an unknown class",
            backbone_tokenizer(fields("tokenizer_config.json", tokenizer_class="NothingTokenizer")),
            VALID,
        ),
        ("image tokens of noise", backbone_tokenizer(write("image_tokens.json", b"\xff")), "image_tokens.json"),
        ("image tokens that are a list", backbone_tokenizer(write("image_tokens.json", "[1, 2]")), "image_tokens.json"),
        (
            "image tokens that are numbers",
            backbone_tokenizer(write("image_tokens.json", '{"boi": 7, "eoi": 8}')),
            "boi 7",
        ),
        ("an unknown token", backbone_tokenizer(nothing, boi="<nothing>"), "boi <nothing>"),
        ("one token twice", backbone_tokenizer(nothing, boi="<boi>", eoi="<boi>"), "eoi <boi>"),
    ),
    *damaged("language model folder", backbone, WEIGHTS, "backbone"),
    *broken("language model folder", backbone, CONFIG, "backbone"),
    *(
        Case("language model folder", f"{values}", backbone(fields(CONFIG, **values)), "backbone")
        for values in ({"num_hidden_layers": 10**6}, {"hidden_size": 2**40}, {"vocab_size": 2**40})
    ),
    *each(
        "language model folder",
        backbone,
        CONFIG,
        [
            ({"model_type": "nothing"}, "nothing"),
            ({"model_type": "bert"}, "backbone"),
            ({"hidden_size": -1}, "backbone -1"),
            ({"hidden_size": "a"}, "backbone hidden_size"),
            ({"num_hidden_layers": 3}, "layers.2"),
            ({"num_attention_heads": 0}, "backbone"),
            ({"vocab_size": None}, "backbone vocab_size"),
            ({"hidden_act": "nothing"}, "backbone nothing"),
            ({"auto_map": {"AutoModelForCausalLM": "code.Model"}}, VALID),
        ],
    ),
    *cases(
        "language model folder",
        ("no codes", backbone(nothing, codebook_size=0), "codebook_size 0"),
        ("a frame outside", backbone(nothing, boi_token_id=10**6), "boi_token_id 1000000"),
        ("one frame twice", backbone(nothing, boi_token_id=4), "boi_token_id"),
        ("an unknown start", backbone(nothing, image_init="zero"), "image_init zero"),
        ("an unknown option", backbone(nothing, sound=7), "sound"),
        ("an adapter beside it", backbone(write(ADAPTER, "{}")), "adapter_config.json"),
    ),
    *damaged("adapter folder", adapter, TENSORS, "adapter"),
    *broken("adapter folder", adapter, ADAPTER, "lora adapter_config.json"),
    *broken("adapter folder", adapter, DESCRIPTION, "lora unified_base.json"),
    *each("adapter folder", adapter, ADAPTER, ADAPTER_FIELDS),
    *each("adapter folder", adapter, DESCRIPTION, BASE_FIELDS),
    *cases(
        "adapter folder",
        ("nothing there", lambda w: w.pipe.load_lora_weights(w.root / "nothing"), "lora nothing"),
        ("an empty folder", lambda w: w.pipe.load_lora_weights(w.fresh()), "lora unified_base.json"),
        (
            "a pickle in its place",
            lambda w: w.pipe.load_lora_weights(
                w.copy(w.adapter, lambda f: (write("adapter_model.bin", w.bomb)(f), (f / TENSORS).unlink()))
            ),
            "lora adapter_model.safetensors",
        ),
        (
            "half the tensors",
            adapter(tensors(TENSORS, lambda s: [s.pop(name) for name in sorted(s)[::2]])),
            "lora tensors",
        ),
        (
            "names of paths",
            adapter(tensors(TENSORS, lambda s: s.update({f"../{n}": s.pop(n) for n in list(s)}))),
            "lora tensors",
        ),
        (
            "names with dots",
            adapter(tensors(TENSORS, lambda s: s.update({f"{n}.": s.pop(n) for n in list(s)}))),
            "lora tensors",
        ),
        (
            "tensors of NaN",
            adapter(tensors(TENSORS, lambda s: s.update({n: v * NAN for n, v in s.items()}))),
            "lora finite",
        ),
        (
            "tensors of integers",
            adapter(tensors(TENSORS, lambda s: s.update({n: v.int() for n, v in s.items()}))),
            "lora int32",
        ),
    ),
    *cases(
        "checkpoint",
        ("resumed", checkpoint(nothing), VALID),
        ("no state", checkpoint(remove(TRAINER)), "resume trainer_state.json"),
        ("a cut state", checkpoint(cut(TRAINER, 100)), "resume trainer_state.json"),
        ("a state of a list", checkpoint(write(TRAINER, "[]")), "resume trainer_state.json"),
        ("a state of noise", checkpoint(write(TRAINER, b"\xff")), "resume trainer_state.json"),
        ("a state without step", checkpoint(fields(TRAINER, step=...)), "resume trainer_state.json step"),
        ("a step of text", checkpoint(fields(TRAINER, step="three")), "resume step three"),
        ("a negative step", checkpoint(fields(TRAINER, step=-1)), "resume step -1"),
        ("a step beyond", checkpoint(fields(TRAINER, step=10**9)), "resume step 1000000000"),
        ("files that are a list", checkpoint(fields(TRAINER, files=[])), "resume trainer_state.json"),
        ("sizes that are texts", checkpoint(fields(TRAINER, files={MODEL: "a"})), "resume model.safetensors"),
        ("files with traversal", checkpoint(fields(TRAINER, files={"../../../../etc/passwd": 7})), "resume passwd"),
        ("no numbers", checkpoint(fields(TRAINER, numbers=...)), "resume trainer_state.json numbers"),
        ("numbers that are null", checkpoint(fields(TRAINER, numbers=None)), "resume trainer_state.json numbers"),
        ("no optimizers", checkpoint(fields(TRAINER, numbers__optimizers=[])), "resume optimizers"),
        (
            "an optimizer of other tensors",
            checkpoint(fields(TRAINER, numbers__optimizers=[{"state": {}, "groups": []}])),
            "resume",
        ),
        (
            "an optimizer of an unknown type",
            checkpoint(fields(TRAINER, numbers__optimizers=[{"state": {"0.step": ["nothing"]}, "groups": [{}]}])),
            "resume",
        ),
        ("no inputs", checkpoint(fields(TRAINER, inputs=...)), "resume trainer_state.json inputs"),
        ("no settings", checkpoint(remove("settings.yaml")), "resume settings.yaml"),
        ("settings that are no YAML", checkpoint(write("settings.yaml", "[")), "resume settings.yaml"),
        (
            "settings that run code",
            checkpoint(write("settings.yaml", "!!python/object/apply:os.mkdir [executed]")),
            "resume settings.yaml",
        ),
        ("no model", checkpoint(remove(MODEL)), "resume model.safetensors"),
        ("a cut model", checkpoint(cut(MODEL, 900)), "resume model.safetensors"),
        (
            "a model of noise in its length",
            checkpoint(lambda f: (f / MODEL).write_bytes(b"\xff" * (f / MODEL).stat().st_size)),
            "resume model",
        ),
        ("no optimizer", checkpoint(remove(OPTIMIZER)), "resume optimizer.safetensors"),
        ("no random state", checkpoint(remove(RANDOM)), "resume random-0.safetensors"),
        (
            "random state of noise",
            checkpoint(lambda f: (f / RANDOM).write_bytes(b"\xff" * (f / RANDOM).stat().st_size)),
            "resume random",
        ),
        ("another width", checkpoint(nothing, "model.architecture.hidden_size=64"), "resume (288"),
        ("another optimizer", checkpoint(nothing, "optimizer.name=muon"), "resume optimizer"),
        ("an average", checkpoint(nothing, "optimizer.ema_decay=0.9"), "resume average"),
        ("an adapter", checkpoint(nothing, "lora.rank=2"), "resume"),
        (
            "another precision",
            checkpoint(nothing, "mixed_precision='no'", "allow_changes=false"),
            "resume mixed_precision",
        ),
        ("other settings", checkpoint(nothing, "seed=7", "allow_changes=false"), "resume seed"),
        ("no such checkpoint", lambda w: w.train("resume=step-7"), "resume step-7"),
        ("none at all", lambda w: w.train("resume=latest"), "resume checkpoint"),
        ("a file", lambda w: w.train(f"resume={w.file('step-3', 'x')}"), "resume step-3"),
        ("of another run", lambda w: w.train(f"resume={w.run}"), "resume"),
    ),
]
