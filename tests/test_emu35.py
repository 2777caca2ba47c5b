"""Emu3.5: logits, text ids and images equal those of the published layout, and it trains."""

import base64
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from published import TEXT, check_training, generated, image_loss, randomize, reloaded
from transformers import Qwen3Config, Qwen3ForCausalLM

import convert_checkpoint
from unified import UnifiedPipeline
from unified.convert import emu35
from unified.convert.emu35 import CODE, NAMES, RANKS, _text_tokenizer, emu35_pipeline
from unified_tokenizers import VQGAN, VQGANConfig

pytestmark = pytest.mark.process
CODES, GRID = 40, (3, 4)
MERGES = [b"re", b"red", b" a", b"pp", b" app", b"le", b" apple", b"ta", b"tas"]


def write_text_tokenizer(folder, names=None):
    """The two files of a tokenizer with every byte and some merges."""
    tokens = [bytes([byte]) for byte in range(256)] + MERGES
    (folder / RANKS).write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    codes = [CODE.format(code) for code in range(CODES)] if names is None else names
    names = ["<|image token|>", "<|image start|>", "<|image end|>", *codes]
    (folder / NAMES).write_text("\n".join(names) + "\n")
    return len(tokens)


def merged(text):
    """Ids of a piece of text: of all pairs of neighbours that are a token, the one of lowest rank, until none is."""
    ranks = {token: 256 + i for i, token in enumerate(MERGES)} | {bytes([byte]): byte for byte in range(256)}
    parts = [bytes([byte]) for byte in text.encode()]
    while True:
        found = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not found:
            return [ranks[part] for part in parts]
        index = min(found)[1]
        parts[index : index + 2] = [parts[index] + parts[index + 1]]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A language model and both tokenizers as they are published, with random weights."""
    folder = tmp_path_factory.mktemp("emu35")
    for name in ("text", "language", "images"):
        (folder / name).mkdir()
    first = write_text_tokenizer(folder / "text") + 208 + 3
    sizes = {**TEXT, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=first + CODES + 2, **sizes, tie_word_embeddings=False))
    randomize(model, 0.1).save_pretrained(folder / "language")
    described = {**{name: value for name, value in sizes.items() if name != "rope_parameters"}, "model_type": "Emu3",
                 "rope_theta": 1000000.0, "rope_scaling": None, "rms_norm_eps": 1e-6, "hidden_act": "silu",
                 "attention_dropout": 0.1, "vocab_size": first + CODES + 2, "pretraining_tp": 1}  # fmt: skip
    (folder / "language" / "config.json").write_text(json.dumps(described))
    torch.manual_seed(1)
    VQGAN(
        VQGANConfig(channels=32, multipliers=[1, 1], residual_blocks=1, attention_levels=[], latent_channels=8,
                    codebook_size=CODES, code_dim=8, normalize_codes=False, quantizer="ibq")
    ).save_pretrained(folder / "images")  # fmt: skip
    return SimpleNamespace(folder=folder, model=model, first=first)


def converted(parts, **changes):
    return emu35_pipeline(
        *(parts.folder / name for name in ("language", "images", "text")), **{"grids": [GRID], **changes}
    )


def ids(parts, text):
    """A prompt as the published script writes it, up to its first code."""
    special = {name: parts.first - 3 - 205 + i for name, i in ((f"<|extra_{i}|>", i) for i in range(205))}
    image, boi = parts.first - 3, parts.first - 2
    start = [
        special["<|extra_203|>"],
        *(each for piece in text for each in merged(piece)),
        special["<|extra_100|>"],
        boi,
    ]
    return [*start, *b"3*4", image], special["<|extra_200|>"]


# Pieces of the two prompts, as the pattern of the tokenizer cuts them.
HEAD = ["You", " are", " a", " helpful", " assistant"]
PROMPT = [*HEAD, " for", " t", "2", "i", " task", ".", " USER", ":", " red", " apple", " ASSISTANT", ":", " "]
EMPTY = [*HEAD, ".", " USER", ":", " ", " ASSISTANT", ":", " "]


@torch.no_grad()
def reference(parts, scale=5.0):
    """Greedy codes by full passes over the joint table, guided on logarithms; a token between rows, none behind the last."""
    (row, line_end), (other, _) = ids(parts, PROMPT), ids(parts, EMPTY)
    codes, after = [], []
    while len(codes) < 12:
        one, two = (parts.model(torch.tensor([each + after])).logits[0, -1].log_softmax(-1) for each in (row, other))
        scores = (two + scale * (one - two))[parts.first : parts.first + CODES]
        codes.append(int(scores.argmax()))
        after += [parts.first + codes[-1], *([line_end] if len(codes) % 4 == 0 else [])]
    return torch.tensor(codes)


def test_images_are_those_of_the_published_loop(parts, tmp_path):
    pipe = reloaded(converted(parts), tmp_path)
    wanted = reference(parts)
    assert pipe.sampling == {"guidance_scale": 5.0, "temperature": 1.0, "top_k": 5120, "top_p": 1.0}
    found = pipe("red apple", top_k=1, output_type="codes").codes
    assert torch.equal(found.flatten(), wanted) and len(wanted.unique()) > 4
    assert generated(tmp_path, tmp_path / "out").size == (8, 6)


@torch.no_grad()
def test_logits_and_loss(parts):
    pipe, codes = converted(parts), torch.randint(0, CODES, GRID, generator=torch.Generator().manual_seed(3))
    row, line_end = ids(parts, PROMPT)
    after = [each for line in codes.tolist() for each in [*(parts.first + code for code in line), line_end]]
    logits = parts.model(torch.tensor([row + after])).logits[0, len(row) - 1 :]
    scores = logits[[i for i in range(15) if i % 5 < 4]][:, parts.first : parts.first + CODES]
    wanted = torch.nn.functional.cross_entropy(scores, codes.flatten())
    torch.testing.assert_close(image_loss(pipe, codes), wanted, rtol=0, atol=1e-4)


def test_it_trains(parts):
    check_training(converted(parts))


def test_the_script_writes_a_pipeline(parts, tmp_path, capsys):
    given = {"checkpoint": "language", "image-tokenizer": "images", "text-tokenizer": "text"}
    arguments = [each for name, folder in given.items() for each in (f"--{name}", str(parts.folder / folder))]
    convert_checkpoint.main(["emu35", *arguments, "--out", str(tmp_path)])
    assert "a pipeline, 110x146 pixels an image" in capsys.readouterr().out
    config = UnifiedPipeline.from_pretrained(tmp_path).model.config
    assert config.image_grids == [list(grid) for grid in emu35.GRIDS] and len(config.image_frame["before"]) == 8


def test_bad_use_is_named(parts, tmp_path):
    with pytest.raises(ValueError, match=r"text_tokenizer: there is no .*emu3_vision_tokens.txt"):
        _text_tokenizer(tmp_path, CODES)
    write_text_tokenizer(tmp_path, [CODE.format(code) for code in (0, 2, 1)])
    with pytest.raises(ValueError, match="does not end with the names of 3 codes in order; give the image tokenizer"):
        _text_tokenizer(tmp_path, 3)
    write_text_tokenizer(tmp_path)
    (tmp_path / RANKS).write_text("IQ== 1\n")
    with pytest.raises(ValueError, match=r"the ranks of .*emu3.tiktoken' are not 0, 1, 2"):
        _text_tokenizer(tmp_path, CODES)
    (tmp_path / RANKS).write_text("IQ==\n")
    with pytest.raises(ValueError, match=r"has a line that is no token and rank"):
        _text_tokenizer(tmp_path, CODES)
    (tmp_path / "config.json").write_text('{"model_type": "emu3"}')
    (tmp_path / "model.safetensors").write_bytes((parts.folder / "language" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"is a 'emu3' model, not an Emu3\.5 one"):
        emu35_pipeline(tmp_path, parts.folder / "images", tmp_path)
