"""Weights cut over processes: the settings that DeepSpeed needs, and the options that need whole weights."""

from collections.abc import Iterable

from accelerate import Accelerator
from accelerate.utils import DistributedType

from unified.training.config import TrainConfig
from unified.training.tensor_parallel import is_tensor_parallel


def configure_deepspeed(accelerator: Accelerator, config: TrainConfig) -> None:
    """Hand DeepSpeed the batch size, which it would read from a data loader, and the norm that it clips at."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = config.batch_size
        settings["gradient_accumulation_steps"] = config.gradient_accumulation_steps
        settings["gradient_clipping"] = config.optimizer.gradient_clip


def check_sharding(accelerator: Accelerator, config: TrainConfig) -> None:
    """Refuse options that need whole weights where they are cut over processes (DeepSpeed hides its pieces, also from Muon,
    averages and copies), two optimizers under one loss scale, and FSDP1, whose flat parameters the checkpoints do not hold.

    Raises:
        ValueError: naming the option.
    """
    kind, parallel = accelerator.distributed_type, accelerator.parallelism_config
    if parallel is not None and parallel.non_data_parallel_size > 1:
        if parallel.tp_size != parallel.non_data_parallel_size:
            raise ValueError(
                "parallelism_config: context and sequence parallelism are not built; set cp_size and sp_size to 1."
            )
        if kind == DistributedType.DEEPSPEED or (kind != DistributedType.FSDP and parallel.data_parallel_size > 1):
            raise ValueError(
                f"tp_size: not available with {kind.value} and batches for {parallel.data_parallel_size}; start with "
                "recipes/accelerate/tensor_parallel.yaml for one batch, fsdp_tensor_parallel.yaml for several."
            )
        if kind == DistributedType.FSDP and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
            raise ValueError(
                "fsdp_cpu_ram_efficient_loading: not available with tensor parallelism; set it to false, as in "
                "recipes/accelerate/fsdp_tensor_parallel.yaml."
            )
        lora = config.lora
        _check_unused(
            "tensor parallelism",
            {
                "sample.every": config.sample.every, "evaluation": config.evaluation,
                "lora.use_dora": lora is not None and lora.use_dora,
                f"lora.modality={lora and lora.modality}": lora is not None and lora.modality != "all",
                "model.quantization": config.model.quantization,
                "mixed_precision=fp16": accelerator.mixed_precision == "fp16",
            },
        )  # fmt: skip
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("fsdp_version: 1 is not supported; set it to 2, as in recipes/accelerate/fsdp2.yaml.")
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        used: dict[str, object] = {"sample.every": config.sample.every, "evaluation": config.evaluation}
        if kind == DistributedType.DEEPSPEED:
            used |= {
                "optimizer.ema_decay": config.optimizer.ema_decay,
                "optimizer.name=muon": config.optimizer.name == "muon",
                "asynchronous_checkpoints": config.asynchronous_checkpoints,
            }
        _check_unused(kind.value, used)
    if config.optimizer.name == "muon" and accelerator.mixed_precision == "fp16":
        # Accelerate updates the loss scale after the first optimizer, so the second one's gradients would be divided by another.
        raise ValueError("optimizer.name=muon: not available with fp16, which handles one optimizer; use bf16.")


def check_modules(accelerator: Accelerator, names: Iterable[str]) -> None:
    """Raises ValueError for objectives with their own parameters where weights are cut over processes."""
    kind = accelerator.distributed_type
    cut = "tensor parallelism" if is_tensor_parallel(accelerator) else kind.value
    for name in (
        names if is_tensor_parallel(accelerator) or kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) else ()
    ):
        raise ValueError(f"objectives: {name} has parameters beside the model, not available with {cut}; use DDP.")


def _check_unused(kind: str, used: dict[str, object]) -> None:
    for name in (name for name, value in used.items() if value):
        raise ValueError(f"{name}: not available with {kind}; leave it out or train with DDP.")
