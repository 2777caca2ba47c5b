"""Matrices that are cut over processes that share a batch, alone and beside FSDP2, learn what one process learns."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType, ParallelismConfig
from conftest import FAMILIES, ROOT, SIZES, tiny_model
from forking import torchrun
from safetensors.torch import load_file
from test_distributed import AVERAGE, OPTIONS, assert_same_training, launched

from unified.training.config import load_config
from unified.training.loop import train
from unified.training.sharding import check_sharding
from unified.training.tensor_parallel import cut_decoder, data_rank

pytestmark = pytest.mark.process

# The norm of the gradients is clipped: it has to be that of all pieces.
WHOLE = [*OPTIONS, AVERAGE, "steps=4", "validate_every=4", "optimizer.gradient_clip=0.1"]
ADAPTER = ["lora.rank=4", "lora.train_image_tables=true", "optimizer.name=muon"]
MODEL, ADAPTED = "pipeline/model/model.safetensors", "lora/adapter_model.safetensors"


@pytest.fixture(scope="module")
def runs(config_file, on_a_backbone, tmp_path_factory):
    """The folder of all runs, of four steps; one goes on after the second of ``beside``."""
    folder = tmp_path_factory.mktemp("runs")
    meshes = {"tensor_parallel": [[], [2]], "fsdp_tensor_parallel": [[2], [2, 2]]}  # of tables and matrices

    def job(file, name, *options):
        groups = len(meshes[file][1])  # of two processes each
        sizes = {"PARALLELISM_CONFIG_TP_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": str(groups)}
        settings = [*WHOLE, *options, f"output_dir={folder}/{name}", f"batch_size={4 // groups}"]
        run(name, 2 * groups, {"meshes": meshes[file], "train": [str(config_file), settings]}, launched(file) | sizes)

    def run(name, processes, job, environment):
        (folder / f"{name}.json").write_text(json.dumps(job))
        done = torchrun(processes, ROOT / "tests" / "cut_training.py", folder / f"{name}.json", **environment)
        assert done.returncode == 0, done.stderr[-6000:]

    job("fsdp_tensor_parallel", "beside", "checkpoint_every=2")
    job("fsdp_tensor_parallel", "beside-again", f"resume={folder}/beside/checkpoints/step-00000002")
    job("tensor_parallel", "alone")
    job("fsdp_tensor_parallel", "adapter", *on_a_backbone, *ADAPTER)
    run("backbones", 2, {"backbones": [SIZES | FAMILIES["olmo2"]]}, {})
    return folder


@pytest.fixture(scope="module")
def one_process(config_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    train(load_config(config_file, [*WHOLE, f"output_dir={output}", "batch_size=4"]))
    return output


@pytest.mark.parametrize("name", ["alone", "beside"])
def test_training_equals_whole(runs, one_process, name):
    """With an average, which is what is saved."""
    assert_same_training(runs / name, one_process)


def test_training_goes_on_from_pieces(runs):
    a, b = (load_file(runs / name / MODEL) for name in ("beside", "beside-again"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_adapter_equals_whole(runs, config_file, on_a_backbone):
    """LoRA by Muon, beside FSDP2."""
    train(
        load_config(config_file, [*WHOLE, *on_a_backbone, *ADAPTER, f"output_dir={runs}/adapter-one", "batch_size=4"])
    )
    ours, theirs = (load_file(runs / name / ADAPTED) for name in ("adapter", "adapter-one"))
    assert ours.keys() == theirs.keys() and any("image_head" in name for name in ours)
    for name in theirs:  # Muon orthogonalises in bfloat16, where rounding grows
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-3)


def test_a_checkpoint_of_pieces_is_not_of_one_process(runs, config_file):
    resume = f"resume={runs}/beside/checkpoints/step-00000002"
    options = [*WHOLE, f"output_dir={runs}/refused", "batch_size=4", resume]
    with pytest.raises(
        ValueError, match=r"resume: .*model.safetensors' is missing; the checkpoint is of another kind of run"
    ):
        train(load_config(config_file, [*options, "allow_changes=true"]))


def test_neighbours_share_batches():
    def ranks(**sizes):
        parallel = ParallelismConfig(**sizes)
        state = SimpleNamespace(parallelism_config=parallel, num_processes=parallel.total_size)
        return [data_rank(SimpleNamespace(**vars(state), process_index=i)) for i in range(parallel.total_size)]

    assert ranks(tp_size=2) == [(0, 1), (0, 1)]
    assert ranks(dp_shard_size=2, tp_size=2) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert ranks(dp_shard_size=2) == [(0, 2), (1, 2)]


@pytest.mark.parametrize(
    ("kind", "sizes", "options", "named"),
    [
        ("MULTI_GPU", {"cp_size": 2}, [], r"parallelism_config: context.*set cp_size and sp_size to 1"),
        ("FSDP", {"tp_size": 2, "cp_size": 2}, [], r"parallelism_config: context.*set cp_size and sp_size to 1"),
        ("MULTI_GPU", {"tp_size": 2, "dp_shard_size": 2}, [], "tp_size: .*fsdp_tensor_parallel.yaml"),
        ("DEEPSPEED", {"tp_size": 2}, [], "tp_size: .*tensor_parallel.yaml"),
        ("MULTI_GPU", {"tp_size": 2}, ["lora={rank: 4, use_dora: true}"], "lora.use_dora: not available with tensor"),
        ("FSDP", {"tp_size": 2, "dp_shard_size": 2}, ["lora={rank: 4, modality: image}"], "lora.modality=image: not avail"),
        ("FSDP", {"tp_size": 2, "dp_shard_size": 2}, [], "fsdp_cpu_ram_efficient_loading: .*set it to false"),
        ("MULTI_GPU", {"tp_size": 2}, ["sample.every=2", "sample.prompts=[red]"], "sample.every: not available with tensor"),
    ],
    ids=str,
)  # fmt: skip
def test_what_processes_that_share_a_batch_cannot_do(config_file, kind, sizes, options, named):
    loading = "fsdp_cpu" in named
    options = ["output_dir=x", "optimizer.ema_decay=null", "sample.every=null", "evaluation=null", *options]
    config = load_config(config_file, options)
    state = SimpleNamespace(
        distributed_type=DistributedType(kind),
        parallelism_config=ParallelismConfig(**sizes),
        mixed_precision="no",
        is_fsdp2=kind == "FSDP",
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(cpu_ram_efficient_loading=loading)),
    )
    with pytest.raises(ValueError, match=named):
        check_sharding(state, config)


@pytest.mark.parametrize(
    ("plan", "count", "words"),
    [
        ({}, 2, "tp_size: LlamaModel has no plan"),
        (
            {"layers.*.self_attn.q_norm": "replicated_with_grad_allreduce"},
            2,
            r"needs \['replicated_with_grad_allreduce'\]",
        ),
        ({"layers.*.mlp.up_proj": "colwise"}, 3, "tp_size: 3 does not divide num_attention_heads 4"),
    ],
)
def test_decoders_that_cannot_be_cut(plan, count, words):
    model = tiny_model()
    model.backbone.base_model.config.base_model_tp_plan = plan
    with pytest.raises(ValueError, match=words):
        cut_decoder(model, SimpleNamespace(parallelism_config=SimpleNamespace(tp_size=count)))
