"""Tiny models and tokenizers, built once."""

import runpy
import sys
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from forking import python
from PIL import Image
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tokenizers import Tokenizer, models, pre_tokenizers
from unified import UnifiedConfig, UnifiedForCausalLM, UnifiedPipeline, registry
from unified.data.batches import Source, make_batch
from unified.data.captioned import text_sequence
from unified.data.code_cache import encode_source
from unified.decoding.sampling import filter_logits, guide, gumbel_noise
from unified.lora.adapters import attach_lora, unload_lora
from unified.lora.base import base_of
from unified.lora.saving import save_lora
from unified.prediction.merge import patches
from unified.sequence import ImageSegment, TextSegment, TokenSequence, build_sequence
from unified_tokenizers import SentencePieceTokenizer, VQConfig, VQModel, auto, train_sentencepiece

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
TEXTS = ["the small dog and a cat", "a green tree and a red apple", "blue car", "yellow sun", "a blue dog"]
# Sizes of tiny backbones, and the families that they are built in.
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES = {
    "llama": {"model_type": "llama"},
    "smollm2": {"model_type": "llama", "tie_word_embeddings": True},
    "smollm3": {"model_type": "smollm3"},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3"},
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "gemma": {"model_type": "gemma"},
    "gemma2": {"model_type": "gemma2", "sliding_window": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 8},
    "olmo2": {"model_type": "olmo2"},
    "granite": {"model_type": "granite", "logits_scaling": 8.0, "embedding_multiplier": 12.0},
}
CAPTIONS = ["red apple", "blue car", "a green tree", "the small dog", "a cat and a dog", "yellow sun"]


def pytest_collection_modifyitems(items):
    """Tests on a finished run start a process, too."""
    for item in items:
        if "finished" in item.fixturenames:
            item.add_marker(pytest.mark.process)


def tiny_config(**changes) -> UnifiedConfig:
    text = {
        "model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }  # fmt: skip
    text.update(changes.pop("text", {}))
    defaults = {"codebook_size": 20, "boi_token_id": 3, "eoi_token_id": 4, "image_grids": [[4, 4]]}
    return UnifiedConfig(text_config=text, **{**defaults, **changes})


def tiny_model(seed: int = 0, **changes) -> UnifiedForCausalLM:
    torch.manual_seed(seed)
    return UnifiedForCausalLM(tiny_config(**changes)).eval()


def inputs_of(
    config: UnifiedConfig, *sequences: TokenSequence, p: int = 1, pack: int | None = None
) -> dict[str, torch.Tensor]:
    """A batch of sequences as keyword arguments of the model, images in patches of side p."""
    return make_batch(sequences, config, patches(p), pack).inputs


def full_forward(model, ids, grids, **arguments):
    """Logits of a plain forward pass over rows of ids ``(B, T)`` (or one row), each with images of the given grids."""
    rows = torch.atleast_2d(torch.as_tensor(ids))
    sequences = [TokenSequence(row, row, [tuple(map(int, grid)) for grid in grids]) for row in rows]
    inputs = inputs_of(model.config, *sequences)
    return model(**{name: inputs[name] for name in ("input_ids", "positions", "image_inputs")}, **arguments)


def text_config(text_tokenizer):
    return tiny_config(
        text={"vocab_size": text_tokenizer.vocab_size},
        boi_token_id=text_tokenizer.boi_token_id,
        eoi_token_id=text_tokenizer.eoi_token_id,
    )


def text_source(text_tokenizer, config, weight=1.0, **options):
    sequence = partial(text_sequence, text_tokenizer=text_tokenizer, vocabulary=config.vocabulary, **options)
    return Source("texts", datasets.Dataset.from_dict({"text": TEXTS}), sequence, weight)


def noisy_adapter(model, folder, seed, **options):
    """Save an adapter with random weights; the model is left as it was."""
    adapted = attach_lora(model, rank=4, **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.normal_(0, 0.3)
    save_lora(adapted, folder)
    return unload_lora(adapted)


@torch.no_grad()
def logits(model):
    vocabulary = base_of(model).config.vocabulary
    segments = [TextSegment([5, 6]), ImageSegment(torch.arange(16).reshape(4, 4)), TextSegment([7])]
    sequence = build_sequence(segments, vocabulary)
    output = full_forward(base_of(model), sequence.input_ids, sequence.image_grids)
    return torch.cat([output.logits, output.image_logits], dim=-1)


def bits(model):
    return {name: value.clone() for name, value in base_of(model).state_dict().items()}


def naive_codes(model, prompt, negative, grid, sampling, generator, known=None):
    """Full forward over the whole sequence for every code, one row at a time, no cache; ``known (h*w,)`` is forced."""
    steps, codes = grid[0] * grid[1], []
    for step in range(steps):
        sides = []
        for ids in (prompt, negative) if sampling.guided else (prompt,):
            rest = [50 + c for c in codes] + [50] * (steps - step)  # codes to come are hidden by causality
            output = full_forward(model, [*ids, *rest], [grid])
            sides.append(output.image_logits[:, len(ids) - 1 + step])
        logits = guide(*sides, sampling.guidance_scale) if sampling.guided else sides[0]
        noise = gumbel_noise([generator], 20, logits.device)
        sampled = int((filter_logits(logits, sampling) + noise).argmax())
        codes.append(sampled if known is None or known[step] < 0 else int(known[step]))
    return codes


def last(iterator):
    """A copy of the last tensor; iterators of codes go on writing to theirs."""
    for codes in iterator:
        result = codes.clone()
    return result


def chi_square_p(samples, probability):
    """Probability of a chi-square at least as large under ``probability``; cells expected below 5 are pooled."""
    expected = probability * len(samples)
    counts = torch.bincount(samples, minlength=len(probability)).double()
    small = expected < 5
    expected = torch.cat([expected[~small], expected[small].sum()[None]]).double()
    counts = torch.cat([counts[~small], counts[small].sum()[None]])
    assert counts[-1] == 0 or expected[-1] > 0
    seen = expected > 0
    statistic = ((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum()
    return float(torch.special.gammaincc((seen.sum() - 1).double() / 2, statistic / 2))


@pytest.fixture(scope="session")
def text_tokenizer(tmp_path_factory) -> SentencePieceTokenizer:
    """Of pieces of words, so that captions have several tokens."""
    return train_sentencepiece(CAPTIONS, tmp_path_factory.mktemp("text"), vocab_size=320, model_type="unigram")


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """A transformers tokenizer of the captions' words, with two reserved tokens."""
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<r1>", "<r2>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                   extra_special_tokens=["<r1>", "<r2>"])  # fmt: skip


@pytest.fixture(scope="session")
def image_tokenizer() -> VQModel:
    torch.manual_seed(0)
    return VQModel(VQConfig(channels=8, encoder_blocks=1, decoder_blocks=1, codebook_size=20, code_dim=4)).eval()


def tiny_pipeline(text_tokenizer, image_tokenizer, **changes) -> UnifiedPipeline:
    model = tiny_model(
        text={"vocab_size": text_tokenizer.vocab_size},
        boi_token_id=text_tokenizer.boi_token_id,
        eoi_token_id=text_tokenizer.eoi_token_id,
        image_tokenizer_fingerprint=image_tokenizer.fingerprint,
        **changes,
    )
    pipe = UnifiedPipeline(model, image_tokenizer, text_tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def one_dimensional(pipeline, folder, **text):
    """A pipeline whose positions a plain engine counts too, as it comes from its folder."""
    torch.manual_seed(3)
    old = pipeline.model.config
    config = tiny_config(
        text={"vocab_size": old.text_config.vocab_size, **text}, codebook_size=old.codebook_size, positions="1d",
        boi_token_id=old.boi_token_id, eoi_token_id=old.eoi_token_id, image_grids=[[4, 4]],
        image_tokenizer_fingerprint=old.image_tokenizer_fingerprint,
    )  # fmt: skip
    UnifiedPipeline(UnifiedForCausalLM(config), pipeline.image_tokenizer, pipeline.text_tokenizer).save_pretrained(
        folder
    )
    pipe = UnifiedPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipeline(text_tokenizer, image_tokenizer) -> UnifiedPipeline:
    return tiny_pipeline(text_tokenizer, image_tokenizer)


@pytest.fixture(scope="session")
def picture_source(tmp_path_factory) -> str:
    """A saved data set of 12 + 6 images of 16 px with captions."""
    rng = np.random.default_rng(0)

    def rows(count: int) -> datasets.Dataset:
        images = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]
        captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(count)]
        return datasets.Dataset.from_dict({"image": images, "caption": captions}).cast_column("image", datasets.Image())

    path = tmp_path_factory.mktemp("data") / "pictures"
    datasets.DatasetDict(train=rows(12), validation=rows(6)).save_to_disk(path)
    return str(path)


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="session")
def parts(tmp_path_factory, image_tokenizer, text_tokenizer, picture_source):
    """Folders of both tokenizers and of the codes."""
    folder = tmp_path_factory.mktemp("parts")
    image_tokenizer.save_pretrained(folder / "image_tokenizer")
    text_tokenizer.save_pretrained(folder / "text_tokenizer")
    encode_source(image_tokenizer, picture_source, folder / "codes", image_size=16)
    return folder


@pytest.fixture(scope="session")
def config_file(parts):
    path = parts / "run.yaml"
    path.write_text(f"""
steps: 12
batch_size: 4
log_every: 1
validate_every: 6
checkpoint_every: 5
track_with: []
data: {{train: {parts}/codes, caption_dropout: 0.3, image_size: 16}}
model:
  image_tokenizer: {parts}/image_tokenizer
  text_tokenizer: {parts}/text_tokenizer
  architecture: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
                  max_position_embeddings: 128}}
schedule: {{patch_sizes: [4, 2, 1], shares: [0.25, 0.25, 0.5]}}
optimizer: {{learning_rate: 0.01, ema_decay: 0.9}}
""")
    return path


@pytest.fixture(scope="session")
def transformers_backbone(tmp_path_factory, word_tokenizer):
    """A folder with a tiny random language model and its tokenizer, as transformers saves them."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(text={"vocab_size": len(word_tokenizer)}).text_config).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def on_a_backbone(transformers_backbone) -> list[str]:
    """Overrides of ``config_file`` that put image tables on that language model."""
    return [f"model.backbone={transformers_backbone}", "model.architecture=null", "model.text_tokenizer=null",
            "model.boi=<r1>", "model.eoi=<r2>"]  # fmt: skip


@pytest.fixture(scope="session")
def finished(config_file, tmp_path_factory):
    """A finished run, of the recipe in its own process."""
    output = tmp_path_factory.mktemp("run")
    options = ["sample.every=6", "sample.prompts=[red apple,blue car]", "track_with=[tensorboard]"]
    done = python("recipes/train.py", "--config", config_file, f"output_dir={output}", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def run_script(monkeypatch, name: str, *arguments: object) -> None:
    """Run a script of eval/ in this process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "eval" / name), run_name="__main__")


def refused(monkeypatch, capsys, name: str, *arguments: object) -> str:
    """The last line on stderr of a script that ends with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        run_script(monkeypatch, name, *arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def extension_tables():
    """Leaves the tables of tokenizers, metrics and rewards as they were, and forgets which files were imported."""
    import unified_eval.metrics  # noqa: F401  # fills its table

    before = [(table, dict(table)) for table in (registry.METRICS, registry.REWARDS, auto._TOKENIZERS)]
    yield
    for table, content in before:
        table.clear()
        table.update(content)
    for name in [name for name in sys.modules if name.startswith("unified_extension.")]:
        del sys.modules[name]


@pytest.fixture(params=[1, 2])
def threads(request):
    """One thread and two, on which decoding goes different ways."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def split_sequence(input_ids, image_grids, vocabulary):
    """The inverse of ``build_sequence`` for the ids ``(T,)``: segments without ``<bos>``, ``<boi>`` and ``<eoi>``."""
    frame = {vocabulary.boi_token_id, vocabulary.eoi_token_id}
    segments, text = [], []
    grids = iter(image_grids)
    ids = input_ids.tolist()
    position = 1 if ids and ids[0] == vocabulary.bos_token_id else 0
    while position < len(ids):
        token = ids[position]
        if token < vocabulary.text_vocab_size:
            if token not in frame:
                text.append(token)
            position += 1
            continue
        if text:
            segments.append(TextSegment(text))
            text = []
        height, width = next(grids)
        codes = input_ids[position : position + height * width] - vocabulary.text_vocab_size
        segments.append(ImageSegment(codes.reshape(height, width)))
        position += height * width
    if text:
        segments.append(TextSegment(text))
    return segments
