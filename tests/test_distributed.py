"""Several processes, or several micro-batches, learn what one process learns from the whole batch."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import datasets
import forking
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import CAPTIONS, ROOT, tiny_config, tiny_model
from safetensors.torch import load_file

from unified.data.batches import Batches, Source, make_batch
from unified.prediction.merge import patches
from unified.sequence import ImageSegment, TextSegment, build_sequence
from unified.training.config import load_config
from unified.training.loop import train
from unified.training.sharding import check_sharding, configure_deepspeed
from unified.training.tracking import read_log

pytestmark = pytest.mark.process

# Both directions, so that the parts of a batch weigh differently; token-wise weights differ most.
OPTIONS = ["steps=6", "validate_every=6", "checkpoint_every=null", "data.captioning=0.5", "data.caption_dropout=0",
           "schedule.patch_sizes=[2,1]", "schedule.shares=[0.5,0.5]", "optimizer.ema_decay=null",
           "model.options.loss_normalization=token", "model.options.text_loss_weight=3"]  # fmt: skip
AVERAGE = "optimizer.ema_decay=0.5"


@pytest.fixture(scope="module")
def one_process(config_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    train(load_config(config_file, [f"output_dir={output}", "batch_size=4", *OPTIONS]))
    return output


def assert_same_training(ours, theirs):
    for a, b in zip(read_log(ours), read_log(theirs), strict=True):
        assert a["step"] == b["step"]
        assert a.get("positions") == b.get("positions")
        for name in ("image_loss", "text_loss"):
            assert a.get(name) == (pytest.approx(b[name], rel=1e-4) if name in b else None)
    assert read_log(ours)[-1]["validation_loss"] == pytest.approx(read_log(theirs)[-1]["validation_loss"], rel=1e-4)
    a, b = (load_file(folder / "pipeline/model/model.safetensors") for folder in (ours, theirs))
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5)


def torchrun(processes, config_file, *overrides, script="recipes/train.py", **environment):
    return forking.torchrun(processes, script, "--config", config_file, *OPTIONS, *overrides, **environment)


def test_two_processes_equal_one(one_process, config_file, picture_source, tmp_path):
    """As torchrun itself starts them. They also encode the images together, which one process had as codes."""
    options = ["batch_size=2", "processes=2", f"data.train={picture_source}", f"output_dir={tmp_path}", *OPTIONS]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "recipes/train.py",
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--config", str(config_file), *options], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    assert_same_training(tmp_path, one_process)


def test_processes_without_images_learn_with_the_others(config_file, parts, tmp_path):
    """Mostly texts, so that a process often has no image; DDP raises if a weight has no gradient there."""
    datasets.Dataset.from_dict({"text": CAPTIONS}).to_parquet(tmp_path / "texts.parquet")
    sources = f"[{{path: {parts}/codes, weight: 1}},{{path: {tmp_path}/texts.parquet, kind: text, weight: 3, max_length: 99}}]"
    options = ["seed=1", "data.train=null", f"data.sources={sources}", "validate_every=null", "data.pack=40"]
    done = torchrun(2, config_file, f"output_dir={tmp_path}/two", "batch_size=2", *options)
    assert done.returncode == 0, done.stderr[:6000]
    train(load_config(config_file, [f"output_dir={tmp_path}/one", "batch_size=4", *OPTIONS, *options]))
    assert [r["positions"] for r in read_log(tmp_path / "two")] == [r["positions"] for r in read_log(tmp_path / "one")]
    ours, theirs = (load_file(tmp_path / name / "pipeline/model/model.safetensors") for name in ("two", "one"))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-5)
    sources = [Source("i", [0] * 12, None, 1), Source("t", [0] * 6, None, 3)]
    batches = [Batches(sources, tiny_config(), 2, 6, rank=r, world_size=2)
               for r in (0, 1)]  # fmt: skip
    kinds = [[b.place(4 * i + r + 2 * k)[0] for k in (0, 1)] for i in range(6) for r, b in enumerate(batches)]
    assert [1, 1] in kinds and [0, 1] in [sorted(pair) for pair in kinds]


def test_another_number_of_processes_is_refused(config_file, tmp_path):
    with pytest.raises(ValueError, match=r"processes: 2 wanted, 1 started.*torchrun --nproc_per_node"):
        train(load_config(config_file, [f"output_dir={tmp_path}", "processes=2"]))


def test_accumulated_batches_equal_one(config_file, tmp_path, monkeypatch):
    """Whatever the launcher says of accumulation."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    options = [option for option in OPTIONS if "captioning" not in option]
    train(load_config(config_file, [f"output_dir={tmp_path}/a", "batch_size=4", *options]))
    train(
        load_config(
            config_file, [f"output_dir={tmp_path}/b", "batch_size=2", "gradient_accumulation_steps=2", *options]
        )
    )
    assert_same_training(tmp_path / "b", tmp_path / "a")


@pytest.mark.parametrize("normalization", ["position", "token"])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_parts_of_a_batch_put_together_give_its_loss(p, normalization):
    model = tiny_model(loss_normalization=normalization, text_loss_weight=0.5, image_loss_weight=2.0)
    vocabulary = model.config.vocabulary

    def image(seed, loss=True):
        codes = torch.randint(0, 20, (4, 4), generator=torch.Generator().manual_seed(seed))
        return ImageSegment(codes, loss)

    sequences = [
        build_sequence([TextSegment([5, 6, 7]), image(0)], vocabulary),
        build_sequence([image(1, False), TextSegment([8, 9])], vocabulary, end=True),
        build_sequence([TextSegment([5, 6], loss=False), image(2)], vocabulary),
    ]
    parts = [make_batch([sequence], model.config, patches(p)) for sequence in sequences]
    whole = make_batch(sequences, model.config, patches(p))
    mean = sum(part.counts.weight * model(**part.inputs).loss for part in parts) / whole.counts.weight
    torch.testing.assert_close(mean, model(**whole.inputs).loss, rtol=1e-5, atol=1e-6)
    told = sum(model(**part.inputs, num_items_in_batch=whole.counts.weight).loss for part in parts)
    torch.testing.assert_close(told, mean, rtol=1e-5, atol=1e-6)


# Accelerate chooses FSDP for processes on GPUs; told so, it cuts weights over CPU processes just as well. The process ends
# without Python's clean-up, in which gloo's threads may abort.
SHARDED = """
import os, sys
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from unified.training import loop
from unified.training.config import load_config

PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
step = loop.train_step

def checked(accelerator, model, *rest):
    assert accelerator.is_fsdp2 and all(isinstance(p, DTensor) for p in model.parameters())
    accelerator.print("cut over", next(p for p in model.parameters() if isinstance(p, DTensor)).device_mesh.shape)
    return step(accelerator, model, *rest)

loop.train_step = checked
loop.train(load_config(sys.argv[2], sys.argv[3:]))
sys.stdout.flush()
os._exit(0)
"""


def launched(name):
    """What `accelerate launch` tells the processes of a launch file."""
    file = str(ROOT / "recipes" / "accelerate" / f"{name}.yaml")
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", file, "train.py"]))
    names = ("FSDP_", "PARALLELISM_", "ACCELERATE_USE_", "ACCELERATE_DYNAMO_")
    return {name: value for name, value in prepare_multi_gpu_env(arguments).items() if name.startswith(names)}


FSDP = launched("fsdp2")
REPLICAS = launched("fsdp2_replicas") | {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}


def test_fully_sharded_training_equals_whole(config_file, tmp_path):
    """FSDP2 with an average, two replicas of two processes each; two go on from their checkpoint, which is in pieces."""
    script, output = tmp_path / "sharded.py", tmp_path / "run"
    script.write_text(SHARDED)
    train(load_config(config_file, [f"output_dir={tmp_path}/one", "batch_size=4", *OPTIONS, AVERAGE]))
    options = [f"output_dir={output}", "checkpoint_every=3", AVERAGE]
    for processes in (4, 2):
        resume = ["resume=latest", "allow_changes=true"] if processes < 4 else []
        every = f"batch_size={4 // processes}"
        cut = REPLICAS if processes == 4 else FSDP
        done = torchrun(processes, config_file, *options, every, *resume, script=script, **cut)
        assert done.returncode == 0, done.stderr
        assert_same_training(output, tmp_path / "one")
        files = {file.suffix for file in (output / "checkpoints").rglob("*") if file.is_file()}
        assert files == {".safetensors", ".json", ".yaml"}
        assert ("cut over (2, 2)" if processes == 4 else "cut over (2,)") in done.stdout
        for folder in ("pipeline", "checkpoints/step-00000006"):
            shutil.rmtree(output / folder)


def test_fully_sharded_adapter_equals_whole(config_file, on_a_backbone, tmp_path):
    """LoRA on a language model, its frozen weights cut over two processes as well, by Muon and with an average; it resumes
    bit for bit from a checkpoint that was written beside the training.
    """
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    options = [*on_a_backbone, "lora.rank=4", "lora.train_image_tables=true", "optimizer.name=muon", AVERAGE]
    sharded = [
        *options,
        f"output_dir={tmp_path}/two",
        "batch_size=2",
        "checkpoint_every=3",
        "asynchronous_checkpoints=true",
    ]
    done = torchrun(2, config_file, *sharded, script=script, **FSDP)
    assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "two" / "lora", tmp_path / "whole")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000006")
    done = torchrun(2, config_file, *sharded, "resume=latest", script=script, **FSDP)
    assert done.returncode == 0, done.stderr
    a, b = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "two" / "lora", tmp_path / "whole")
    )
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    train(load_config(config_file, [*OPTIONS, *options, f"output_dir={tmp_path}/one", "batch_size=4"]))
    ours, theirs = (load_file(tmp_path / name / "lora" / "adapter_model.safetensors") for name in ("two", "one"))
    assert ours.keys() == theirs.keys() and any("image_head" in name for name in ours)
    for name in theirs:  # Muon orthogonalises in bfloat16, where rounding grows; its six steps move a weight by 1e-2
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_launch_configurations_are_understood(file):
    """Read by Accelerate itself, which refuses unknown keys."""
    config = load_config_from_file(str(file))
    assert config.distributed_type.value in ("MULTI_GPU", "FSDP", "DEEPSPEED") and config.num_processes == 8
    assert f"--config_file recipes/accelerate/{file.name}" in file.read_text()


def test_launch_configurations_reach_the_processes():
    assert FSDP["ACCELERATE_USE_FSDP"] == "true" and FSDP["FSDP_VERSION"] == "2"
    replicas, compiled = launched("fsdp2_replicas"), launched("compiled")
    sizes = [int(replicas[f"PARALLELISM_CONFIG_DP_{kind}_SIZE"]) for kind in ("REPLICATE", "SHARD")]
    assert sizes == [2, 4] and replicas["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
    assert compiled["ACCELERATE_DYNAMO_BACKEND"] == "INDUCTOR" and compiled["ACCELERATE_DYNAMO_USE_DYNAMIC"] == "True"
    assert FSDP["ACCELERATE_DYNAMO_BACKEND"] == "NO"


def test_deepspeed_learns_what_it_cannot_see(config_file):
    """Without these numbers Accelerate refuses to prepare a model without its dataloader, or clips at 1."""
    plugin = DeepSpeedPlugin(zero_stage=2, gradient_clipping=1.0)
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert plugin.is_auto(names[0])
    state = SimpleNamespace(deepspeed_plugin=plugin)
    options = ["output_dir=x", "batch_size=6", "gradient_accumulation_steps=3", "optimizer.gradient_clip=0.5"]
    config = load_config(config_file, options)
    configure_deepspeed(SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=state), config)
    assert [plugin.get_value(name) for name in names] == [6, 3, 0.5]


@pytest.mark.parametrize(
    ("option", "named", "kind"),
    [
        ("optimizer.ema_decay=0.9", "optimizer.ema_decay", DistributedType.DEEPSPEED),
        ("optimizer.name=muon", "optimizer.name=muon", DistributedType.DEEPSPEED),
        ("sample={every: 5, prompts: [a]}", "sample.every", DistributedType.FSDP),
        ("evaluation={every: 5, data: d, clip: c}", "evaluation", DistributedType.FSDP),
    ],
)
def test_options_that_need_whole_weights_are_refused_when_sharded(option, named, kind, config_file):
    plain = load_config(config_file, ["output_dir=x", "optimizer.ema_decay=null"])
    check_sharding(
        SimpleNamespace(distributed_type=kind, mixed_precision="fp16", is_fsdp2=True, parallelism_config=None), plain
    )
    config = load_config(config_file, ["output_dir=x", "optimizer.ema_decay=null", option])
    whole = SimpleNamespace(distributed_type=DistributedType.MULTI_GPU, mixed_precision="bf16", parallelism_config=None)
    check_sharding(whole, config)
    with pytest.raises(ValueError, match=f"{named}: not available with {kind.value}"):
        check_sharding(SimpleNamespace(distributed_type=kind, is_fsdp2=True, parallelism_config=None), config)
    if kind == DistributedType.FSDP:
        with pytest.raises(ValueError, match="fsdp_version: 1 is not supported; set it to 2"):
            check_sharding(SimpleNamespace(distributed_type=kind, is_fsdp2=False, parallelism_config=None), plain)
    if named == "optimizer.name=muon":
        whole.mixed_precision = "fp16"
        with pytest.raises(ValueError, match=r"optimizer.name=muon: not available with fp16.*use bf16"):
            check_sharding(whole, config)
