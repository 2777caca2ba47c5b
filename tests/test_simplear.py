"""SimpleAR: logits and images equal those of transformers' Qwen2 with the joint table, and it trains."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import full_forward, generators
from published import byte_tokenizer, check_training
from transformers import Qwen2Config, Qwen2ForCausalLM

from unified import UnifiedPipeline
from unified.config import UnifiedConfig
from unified.convert.simplear import BOI, EOI, NULL, START, simplear_pipeline
from unified.decoding import Sampling, generate_codes
from unified.sequence import ImageSegment, TextSegment, build_sequence
from unified_tokenizers import CosmosConfig, CosmosTokenizer

pytestmark = pytest.mark.skipif(
    "prompt_template" not in UnifiedConfig.__annotations__, reason="models have no templates of prompts yet"
)
ROOT = Path(__file__).resolve().parent.parent
CODES, GRID = 8 * 5 * 5, (4, 4)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint as SimpleAR's training leaves it, and a Cosmos tokenizer; random weights."""
    special = [START, "<|i2t|>", BOI, EOI, "<|t2v|>", "<|v2t|>", "<|sov|>"]
    tokenizer = byte_tokenizer(*special, bos=None, eos="<|im_end|>", pad="<|endoftext|>")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer) + CODES, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, tie_word_embeddings=True,
        bos_token_id=5, eos_token_id=6,
    )).eval()  # fmt: skip
    folder = tmp_path_factory.mktemp("simplear")
    model.save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    CosmosTokenizer(CosmosConfig(
        wavelets=1, channels=4, multipliers=[1, 1], halving_levels=[0], doubling_levels=[1], residual_blocks=1, groups=1,
        latent_channels=4, video=True, fsq_levels=[8, 5, 5],
    )).save_pretrained(folder / "images")  # fmt: skip
    pipe = simplear_pipeline(folder / "language", folder / "images", pixels=16)
    pipe.set_progress_bar_config(disable=True)
    return SimpleNamespace(folder=folder, model=model, tokenizer=tokenizer, first=len(tokenizer), pipe=pipe)


def rows(published):
    """A prompt and what it is steered away from, as SimpleAR's script writes them."""
    texts = (f"{START}A highly realistic image of red apple{BOI}", f"{NULL}{BOI}")
    return [published.tokenizer(text).input_ids for text in texts]


def greedy(published, scale):
    """Codes by full passes; guidance is that of SimpleAR, on logarithms of probabilities over text and codes."""
    codes = []
    with torch.no_grad():
        while len(codes) < GRID[0] * GRID[1]:
            after = [published.first + code for code in codes]
            one, two = (
                published.model(torch.tensor([row + after])).logits[0, -1].log_softmax(-1) for row in rows(published)
            )
            codes.append(int((two + scale * (one - two))[published.first :].argmax()))
    return codes


def test_logits_are_those_of_the_joint_table(published):
    model = published.pipe.model
    codes = torch.randint(CODES, GRID, generator=torch.Generator().manual_seed(0))
    prompt = rows(published)[0]
    sequence = build_sequence([TextSegment(prompt[:-1]), ImageSegment(codes)], model.config.vocabulary)
    ids = sequence.input_ids[None]
    assert ids[0, : len(prompt)].tolist() == prompt  # no <bos>, which Qwen's configuration has
    with torch.no_grad():
        ours, theirs = full_forward(model, ids, [GRID]), published.model(ids).logits
    torch.testing.assert_close(ours.logits, theirs[..., : published.first], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.image_logits, theirs[..., published.first :], rtol=0, atol=1e-5)


def test_the_greedy_image_is_that_of_the_published_loop(published):
    expected = greedy(published, 6.0)
    sampling = Sampling(guidance_scale=published.pipe.sampling["guidance_scale"], top_k=1)
    prompt, negative = rows(published)
    found = generate_codes(published.pipe.model, [prompt], [negative], GRID, sampling, generators(0))
    assert found.flatten().tolist() == expected and len(set(expected)) > 4


def test_a_saved_pipeline_writes_prompts_as_published(published, tmp_path):
    published.pipe.save_pretrained(tmp_path)
    pipe = UnifiedPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    found = pipe("red apple", top_k=1, output_type="codes").codes
    assert found.flatten().tolist() == greedy(published, 6.0)


@pytest.mark.process
def test_it_trains(published):
    check_training(simplear_pipeline(published.folder / "language", published.folder / "images", pixels=16))


def test_the_script_writes_a_pipeline(published, tmp_path, monkeypatch, capsys):
    arguments = ("--checkpoint", published.folder / "language", "--image-tokenizer", published.folder / "images")
    monkeypatch.setattr(sys, "argv", ["convert", "simplear", *map(str, arguments), "--out", str(tmp_path / "pipe")])
    runpy.run_path(str(ROOT / "recipes" / "convert_checkpoint.py"), run_name="__main__")
    assert "a pipeline, 1024x1024 pixels an image" in capsys.readouterr().out
    pipe = UnifiedPipeline.from_pretrained(tmp_path / "pipe")
    assert pipe.sampling == {"guidance_scale": 6.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    assert pipe.image_tokenizer.fingerprint == published.pipe.image_tokenizer.fingerprint


def test_bad_use_is_named(published, tmp_path):
    with pytest.raises(ValueError, match="pixels: 18 is no multiple of the image tokenizer's stride 4"):
        simplear_pipeline(published.folder / "language", published.folder / "images", pixels=18)
    CosmosTokenizer(CosmosConfig(
        wavelets=0, channels=4, multipliers=[1], halving_levels=[], doubling_levels=[], residual_blocks=1, groups=1,
        latent_channels=4, fsq_levels=[5, 5],
    )).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(ValueError, match=r"rows before the last 25, its tokenizer .* give the image tokenizer of this"):
        simplear_pipeline(published.folder / "language", tmp_path, pixels=16)
