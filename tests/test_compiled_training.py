"""What only changes how a step is computed changes no loss: the compiler, recomputed layers, workers."""

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import tiny_model
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from unified.training.config import load_config
from unified.training.loop import train
from unified.training.tracking import read_log

OPTIONS = ["steps=4", "log_every=1", "validate_every=4", "checkpoint_every=null", "schedule.patch_sizes=[2,1]",
           "schedule.shares=[0.5,0.5]"]  # fmt: skip


def run(config_file, folder, *options):
    train(load_config(config_file, [f"output_dir={folder}", *OPTIONS, *options]))
    losses = [r.get("image_loss", r.get("validation_loss")) for r in read_log(folder)]
    return losses, load_file(folder / "pipeline/model/model.safetensors")


@pytest.mark.process
def test_a_compiled_run_equals_a_plain_one(config_file, tmp_path, monkeypatch):
    """Compiled as Accelerate does it for `dynamo_backend`, here without breaks in the graph; with an average beside it."""
    losses, weights = run(config_file, tmp_path / "plain")
    for name, value in {"BACKEND": "EAGER", "USE_FULLGRAPH": "true"}.items():
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", value)
    AcceleratorState._reset_state(reset_partial_state=True)  # it has read the environment already
    graphs, compiled = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **o: graphs.append(o) or compiled(model, **o))
    try:
        ours, theirs = run(config_file, tmp_path / "compiled")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert [(o["backend"], o["fullgraph"]) for o in graphs] == [("eager", True)]
    assert ours == pytest.approx(losses, rel=1e-5)
    assert theirs.keys() == weights.keys()
    for name in weights:
        torch.testing.assert_close(theirs[name], weights[name], rtol=1e-3, atol=1e-5)


@pytest.mark.process
def test_workers_prepare_the_same_batches(config_file, tmp_path):
    plain = run(config_file, tmp_path / "plain", "data.num_workers=null")
    assert run(config_file, tmp_path / "workers", "data.num_workers=2")[0] == plain[0]


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.process
def test_one_layer_in_two_is_recomputed():
    counts = {}
    for every in (None, 1, 2):
        model = tiny_model().train()
        if every is not None:
            model.activation_checkpointing_enable(every_n_layers=every)
        with Products() as products:
            model(torch.arange(5, 13)[None], labels=torch.arange(5, 13)[None]).loss.backward()
        counts[every] = products.count
    assert counts[1] - counts[None] == 2 * (counts[2] - counts[None]) > 0


def test_recomputed_layers_are_a_setting(config_file):
    with pytest.raises(ValueError, match=r"model.gradient_checkpointing_layers: without gradient_checkpointing"):
        load_config(config_file, ["output_dir=x", "model.gradient_checkpointing_layers=2"])
    with pytest.raises(ValueError, match=r"model.attention: images are not sampled with 'flex_attention'; use sdpa"):
        load_config(
            config_file, ["output_dir=x", "model.attention=flex_attention", "sample={every: 2, prompts: [red]}"]
        )
