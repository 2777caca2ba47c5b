"""What hostile inputs are made of: tiny models, data and folders, each built when a case first asks for it."""

import importlib.util
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from functools import cache, cached_property
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from conftest import CAPTIONS, ROOT, noisy_adapter, one_dimensional, tiny_model, tiny_pipeline
from PIL import Image
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tokenizers import Tokenizer, models, pre_tokenizers
from unified import UnifiedPipeline
from unified.data.code_cache import encode_source
from unified.errors import explain_errors
from unified.serving.export import export_pipeline
from unified.training.config import load_config
from unified.training.loop import train
from unified_tokenizers import SentencePieceTokenizer, VQConfig, VQModel, train_sentencepiece


def script(path: str, *arguments: object) -> None:
    """Run a script as its command line does."""
    before = sys.argv
    sys.argv = [path, *map(str, arguments)]
    try:
        explain_errors(module(path).main)
    finally:
        sys.argv = before


@cache
def module(path: str) -> Any:
    """A script as a module, imported once."""
    spec = importlib.util.spec_from_file_location(f"script_{Path(path).stem}", ROOT / path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


class Bomb:
    """A pickle that makes a folder when it is opened carelessly."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


class World:
    """Things to break, below ``root``. Cases change copies only."""

    def __init__(self, root: Path):
        self.root, self.marker, self._numbers = root, root / "executed", count()

    def fresh(self) -> Path:
        """A new, empty folder."""
        folder = self.root / f"case-{next(self._numbers)}"
        folder.mkdir(parents=True)
        return folder

    def file(self, name: str, content: bytes | str) -> Path:
        """A new file in its own folder."""
        path = self.fresh() / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def copy(self, folder: Path, change: Callable[[Path], object]) -> Path:
        """A copy of a folder with a change."""
        copied = self.fresh() / folder.name
        shutil.copytree(folder, copied)
        change(copied)
        return copied

    @property
    def bomb(self) -> bytes:
        """The bytes of a pickle that runs code."""
        return pickle.dumps({"weight": Bomb(self.marker)})

    @cached_property
    def text_tokenizer(self) -> SentencePieceTokenizer:
        return train_sentencepiece(CAPTIONS, self.root / "text_tokenizer", vocab_size=320)

    @cached_property
    def image_tokenizer(self) -> VQModel:
        torch.manual_seed(0)
        return VQModel(VQConfig(channels=8, encoder_blocks=1, decoder_blocks=1, codebook_size=20, code_dim=4)).eval()

    @cached_property
    def pipe(self) -> UnifiedPipeline:
        torch.manual_seed(0)
        return tiny_pipeline(self.text_tokenizer, self.image_tokenizer)

    @cached_property
    def pipeline_folder(self) -> Path:
        self.pipe.save_pretrained(self.root / "pipeline")
        return self.root / "pipeline"

    @cached_property
    def exported(self) -> Path:
        one_dimensional(self.pipe, self.root / "one_dimensional")
        export_pipeline(UnifiedPipeline.from_pretrained(self.root / "one_dimensional"), self.root / "exported")
        return self.root / "exported"

    @cached_property
    def backbone(self) -> Path:
        """A language model and its tokenizer as transformers saves them."""
        words = ["<unk>", "<s>", "</s>", "<boi>", "<eoi>", *sorted({w for c in CAPTIONS for w in c.split()})]
        inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        config = tiny_model(text={"vocab_size": len(words)}).config.text_config
        LlamaForCausalLM(config).save_pretrained(self.root / "backbone")
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        PreTrainedTokenizerFast(
            tokenizer_object=inner, extra_special_tokens=["<boi>", "<eoi>"], **names
        ).save_pretrained(self.root / "backbone")
        return self.root / "backbone"

    @cached_property
    def adapter(self) -> Path:
        self.pipe.model = noisy_adapter(self.pipe.model, self.root / "adapter", 0)
        return self.root / "adapter"

    @property
    def photo(self) -> Image.Image:
        return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))

    @cached_property
    def pictures(self) -> Path:
        """A saved data set of 6 + 3 images of 16 px with captions."""
        columns = {"image": [self.photo] * 6, "caption": CAPTIONS}
        rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        datasets.DatasetDict(train=rows, validation=rows.select(range(3))).save_to_disk(self.root / "pictures")
        return self.root / "pictures"

    @cached_property
    def codes(self) -> Path:
        encode_source(self.image_tokenizer, str(self.pictures), self.root / "codes", image_size=16)
        return self.root / "codes"

    @cached_property
    def settings(self) -> Path:
        """The settings of a run of three steps."""
        architecture = {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        }
        settings = {
            "output_dir": str(self.root / "run"),
            "steps": 3,
            "batch_size": 2,
            "log_every": 1,
            "track_with": [],
            "schedule": {"patch_sizes": [1], "shares": [1.0]},
            "data": {"train": str(self.codes), "image_size": 16},
            "model": {
                "image_tokenizer": str(self.pipeline_folder / "image_tokenizer"),
                "architecture": architecture,
                "text_tokenizer": str(self.pipeline_folder / "text_tokenizer"),
            },
        }
        return self.file("run.yaml", json.dumps(settings))

    def train(self, *overrides: str) -> Path:
        """A short run in a new folder."""
        return train(load_config(self.settings, [f"output_dir={self.fresh()}", *overrides]))

    @cached_property
    def run(self) -> Path:
        """The folder of a run with checkpoints."""
        return self.train("checkpoint_every=1").parent
