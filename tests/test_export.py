"""A pipeline as a plain checkpoint: round trip to the bit, the codes of a plain engine, and what is refused."""

import json

import pytest
import torch
from conftest import noisy_adapter, one_dimensional, tiny_model
from transformers import AutoModelForCausalLM

from unified import UnifiedPipeline
from unified.cli import main
from unified.convert import split_joint_table
from unified.serving.export import EXPORT_FILE, check_exportable, export_pipeline, joint_model


@pytest.mark.process
@pytest.mark.parametrize(
    "text",
    [{}, {"tie_word_embeddings": True}, {"model_type": "qwen3", "head_dim": 8, "num_key_value_heads": 2}],
    ids=str,
)
def test_round_trip_and_a_plain_engine(text, pipeline, tmp_path):
    """The way back gives the same weights; greedy codes of transformers' own generation are the pipeline's."""
    pipe = one_dimensional(pipeline, tmp_path / "pipe", **text)
    export_pipeline(pipe, tmp_path / "out")
    about = json.loads((tmp_path / "out" / EXPORT_FILE).read_text())
    back = split_joint_table(
        str(tmp_path / "out"), about["codebook_size"], about["boi_token_id"], about["eoi_token_id"]
    )
    for name in ("image_embed", "image_head"):
        assert torch.equal(getattr(back, name).weight, getattr(pipe.model, name).weight)
    ids = torch.tensor([[1, 5, 6, 7]])
    assert torch.equal(back(ids).logits, pipe.model(ids).logits)

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    prompt = [about["bos_token_id"], *pipe.text_tokenizer.encode("red apple"), about["boi_token_id"]]
    first, size = about["first_code"], about["codebook_size"]
    with torch.no_grad():
        codes = []
        for _ in range(16):
            logits = plain(torch.tensor([[*prompt, *(first + c for c in codes)]])).logits[0, -1]
            codes.append(int(logits[first : first + size].argmax()))
    own = pipe("red apple", guidance_scale=1.0, top_k=1, output_type="codes").codes
    assert own.flatten().tolist() == codes
    assert about["needs_guidance"] and about["image_grids"] == [[4, 4]]


def test_what_a_plain_engine_cannot_do_is_refused(pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"export: positions are '2d'.*positions=1d"):
        export_pipeline(pipeline, tmp_path / "out")
    for prediction in ({"order": "diagonals"}, {"merge": "channel"}):
        with pytest.raises(ValueError, match="export: images are predicted in the order"):
            check_exportable(tiny_model(positions="1d", prediction=prediction))
    pipe = one_dimensional(pipeline, tmp_path / "pipe")
    noisy_adapter(pipe.model, tmp_path / "lora", 1)
    pipe.load_lora_weights(tmp_path / "lora")
    with pytest.raises(ValueError, match="export: adapters are loaded; call fuse_lora"):
        export_pipeline(pipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_family_that_caps_its_logits_is_found_out(pipeline, tmp_path):
    pipe = one_dimensional(pipeline, tmp_path / "pipe", model_type="granite", logits_scaling=8.0)
    with pytest.raises(ValueError, match="export: GraniteForCausalLM scales or caps"):
        export_pipeline(pipe, tmp_path / "out")


def test_a_family_that_scales_its_embeddings_is_the_same():
    model = tiny_model(positions="1d", text={"model_type": "gemma", "head_dim": 8, "num_key_value_heads": 2})
    joint = joint_model(model)
    codes = torch.tensor([[3, 19]])
    embeds = joint.base_model(input_ids=codes + 50, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(embeds, model.image_embed(codes), rtol=1e-5, atol=1e-6)


@pytest.mark.process
def test_command_fuses_an_adapter(pipeline, tmp_path, capsys):
    pipe = one_dimensional(pipeline, tmp_path / "pipe")
    noisy_adapter(pipe.model, tmp_path / "lora", 1)
    arguments = ["export", "--pipeline", tmp_path / "pipe", "--lora", tmp_path / "lora", "--out", tmp_path / "out"]
    assert main(list(map(str, arguments))) == 0
    pipe = UnifiedPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path / "lora")
    ids = torch.tensor([[1, 5, 6, 7]])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(
        plain(ids).logits[..., : pipe.text_tokenizer.vocab_size], pipe.model(ids).logits, rtol=1e-4, atol=1e-4
    )
