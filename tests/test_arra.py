"""ARRA against a reference that is computed position by position, with a tiny vision transformer as encoder."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from test_objectives import rows_of
from test_rear_and_otr import given_of
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from unified.prediction.merge import patches
from unified.training.config import load_config
from unified.training.objectives.arra import ARRA


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with a vision transformer that has a feature for each 4 x 4 pixels of 16 x 16."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4, initializer_range=0.5)).save_pretrained(folder)
    ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    ).save_pretrained(folder)
    return folder


@pytest.mark.process
@pytest.mark.parametrize(("p", "pack"), [(1, None), (2, 90)])
def test_the_loss_is_the_mean_over_positions(encoder, image_tokenizer, p, pack):
    """Noise in the input changes no target; two packed rows in a coarse stage; the encoder stays as it is."""
    model = tiny_model()
    objective = ARRA(encoder=str(encoder), layer=1, width=16)
    torch.manual_seed(3)
    objective.module = objective.build(model, image_tokenizer)
    rows = rows_of(model, 2)
    true = [(row.input_ids[row.input_ids >= 50] - 50).view(4, 4) for row in rows]
    rows[0].input_ids[4] = 50 + (rows[0].input_ids[4] - 49) % 20
    given = given_of(objective, model, rows, patches(p), pack)
    cells = 16 // p**2
    term = objective.loss(given, 2.0 * cells)
    vit, mean, std = (
        ViTModel.from_pretrained(encoder).eval(),
        torch.tensor([0.4, 0.5, 0.6]),
        torch.tensor([0.2, 0.3, 0.4]),
    )
    states, losses = given.output.hidden_states[1], []
    flat = states.flatten(0, 1)
    start = 0
    for row, codes in zip(rows, true, strict=True):
        with torch.no_grad():
            pixels = (image_tokenizer.decode(codes[None]).clamp(-1, 1) + 1) / 2
            seen = vit((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)).last_hidden_state[0, 1:].view(4, 4, 8)
        first = int((row.input_ids >= 50).nonzero()[0])
        for cell in range(cells):
            i, j = divmod(cell, 4 // p)
            wanted = seen[i * p : (i + 1) * p, j * p : (j + 1) * p].mean(dim=(0, 1))
            losses.append(1 - F.cosine_similarity(objective.module(flat[start + first + cell]), wanted, dim=0))
        start += states.shape[1] if pack is None else len(row.input_ids) - 16 + cells
    naive = torch.stack(losses).mean()
    torch.testing.assert_close(term.loss, naive, rtol=1e-4, atol=1e-5)
    term.loss.backward()
    assert all(parameter.grad is None for parameter in objective.eye.model.parameters())
    assert objective.module[0].weight.grad.abs().sum() > 0 and model.image_embed.weight.grad.abs().sum() > 0
    assert model.image_head.weight.grad is None or model.image_head.weight.grad.abs().sum() == 0


def test_what_does_not_fit(encoder, image_tokenizer, config_file, tmp_path):
    with pytest.raises(ValueError, match=r"objectives\.arra\.encoder: 'nowhere' is no folder of a vision model"):
        load_config(config_file, [f"output_dir={tmp_path}", "objectives=[{name: arra, encoder: nowhere}]"])
    with pytest.raises(ValueError, match=r"objectives\.arra\.encoder"):
        load_config(config_file, [f"output_dir={tmp_path}", "objectives=[{name: arra}]"])
    with pytest.raises(ValueError, match="objectives: arra needs codes in raster order, the model has 'diagonals'"):
        ARRA(encoder=str(encoder)).build(tiny_model(prediction={"order": "diagonals"}), image_tokenizer)
    with pytest.raises(ValueError, match=r"objectives\.arra\.layer: 9 is beyond the 2 layers"):
        ARRA(encoder=str(encoder), layer=9).build(tiny_model(), image_tokenizer)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"objectives\.arra\.encoder: .* cannot be loaded"):
        ARRA(encoder=str(tmp_path / "empty")).build(tiny_model(), image_tokenizer)
