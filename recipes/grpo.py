"""Train an adapter with rewards of sampled images (GRPO, arXiv 2402.03300).

python recipes/grpo.py --config recipes/configs/grpo_shapes.yaml [key=value ...]

Every step samples `group_size` images for each of `prompts_per_step` captions, as they are sampled later (guidance and
temperature), rewards them, and takes `updates` optimizer steps towards those that are better than the others of their caption.
The model without the adapter is the reference that the policy stays near to. Any function of images and prompts is a reward.
Metrics of every step go to ``log.jsonl``, the adapter to ``lora/``. What improves the reward may cost diversity: it is logged,
and `evaluation` measures recall and coverage (metric ``prdc``) on the way.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from omegaconf import MISSING
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm

from unified import PatchSchedule, UnifiedPipeline
from unified.data import load_source
from unified.data.rows import different_captions
from unified.data.sources import terms_of
from unified.decoding import Sampling
from unified.errors import explain_errors
from unified.locks import locked
from unified.lora.adapters import attach_lora, load_lora
from unified.lora.base import base_of
from unified.lora.saving import save_lora
from unified.lora.switching import adapter_state, adapters_off
from unified.model_card import model_card
from unified.pipeline.arguments import Wanted, trained_grids
from unified.settings import check_range, dump_settings, load_settings, parse_command_line
from unified.training.checkpoint import (
    check_inputs,
    check_settings,
    load_checkpoint,
    remove_stale,
    save_checkpoint,
    start_checkpoint,
)
from unified.training.config import EvaluationConfig
from unified.training.inputs import describe_inputs
from unified.training.interrupt import catch_signals
from unified.training.model_config import LoraSettings
from unified.training.objectives.grpo import PolicyLoss, check_policy, code_diversity, group_advantages, grpo_loss
from unified.training.rewards import Rewards, RewardSettings
from unified.training.rollouts import Arranged, Rollout, check_rollout, sample_rollout
from unified.training.step import check_gradients
from unified.training.tracking import RunLog, read_log
from unified_tokenizers.images import to_pil

CONFIGS = Path(__file__).with_name("configs")


@dataclass
class GrpoSettings:
    """Settings of a GRPO run."""

    output_dir: str = MISSING
    pipeline: str = MISSING  # folder or Hub name; the model without an adapter is the reference
    lora: LoraSettings | None = None  # a new adapter; or
    adapter: str | None = None  # the folder of one to go on with
    prompts: str = MISSING  # captioned source to take prompts from
    split: str = "train"
    caption_column: str = "caption"
    rewards: list[RewardSettings] = MISSING  # functions of images and prompts, added up by weight
    steps: int = MISSING  # rollouts
    prompts_per_step: int = 8  # captions of a rollout
    group_size: int = 8  # images of each caption
    updates: int = 1  # optimizer steps on each rollout
    batch_size: int = 32  # images at once in sampling and in training
    guidance_scale: float = 1.0  # of the rollouts; a gain at 1 need not show in guided images
    temperature: float = 1.0
    clip: float = 0.2  # the ratio of probabilities is clipped to 1 - clip ... 1 + clip
    kl_weight: float = 0.02  # of the divergence from the reference
    learning_rate: float = 3e-4
    decay: float = 0.0  # share of the steps, at the end, in which the learning rate falls to a tenth
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    evaluation: EvaluationConfig | None = None  # metrics of generated images on the way, such as prdc
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    resume: str | None = None  # a checkpoint folder, or `latest`
    allow_changes: bool = False  # resume although the settings are not those of the checkpoint
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError for a setting that is out of range, or contradicts another."""
        if not self.output_dir.strip():
            raise ValueError("output_dir: empty; name the folder to write.")
        if (self.lora is None) == (self.adapter is None):
            raise ValueError(
                "lora, adapter: set exactly one; GRPO trains an adapter, and its reference is the model without it "
                "(lora.rank=16 attaches a new one, adapter=FOLDER goes on with one)."
            )
        check_range(
            "",
            self,
            "[1, inf)",
            "steps",
            "prompts_per_step",
            "updates",
            "batch_size",
            "checkpoint_every",
            "keep_checkpoints",
        )
        check_range("", self, "[2, inf)", "group_size")
        check_range("", self, "(0, 1)", "clip")
        check_range("", self, "(0, inf)", "learning_rate", "gradient_clip")
        check_range("", self, "[0, inf)", "kl_weight", "weight_decay")
        check_range("", self, "[0, 1]", "decay")
        check_range("", self, "[0, 4294967295]", "seed")
        _ = self.sampling
        if self.lora is not None:
            self.lora.check()
            if self.lora.dropout:
                raise ValueError(
                    "lora.dropout: not here, where the policy that learns has to be the one that sampled; use 0."
                )
        if self.evaluation is not None:
            self.evaluation.check()

    @property
    def sampling(self) -> Sampling:
        """How rollouts are sampled. Raises ValueError for a value that is out of range."""
        return Sampling(guidance_scale=self.guidance_scale, temperature=self.temperature)


@dataclass
class Policy:
    """A pipeline whose adapter is trained, and what is done with it."""

    pipeline: UnifiedPipeline
    model: nn.Module  # the adapted model, as Accelerate has prepared it
    settings: GrpoSettings
    accelerator: Accelerator
    optimizer: Any

    def rollout(self, step: int, texts: list[str]) -> tuple[Rollout, list[str]]:
        """The images of a step, and the prompt of each; a function of the weights, the seed and the step alone."""
        s, rng = self.settings, np.random.default_rng((self.settings.seed, step))
        chosen = rng.choice(len(texts), s.prompts_per_step, replace=False)
        seeds = rng.integers(2**62, size=s.prompts_per_step * s.group_size).tolist()
        prompts = [texts[number] for number in chosen for _ in range(s.group_size)]
        config = base_of(cast(PeftModel, self.model)).config
        grid = trained_grids(config)[0]
        rows, negatives = Wanted(prompts).rows(config, self.pipeline.text_tokenizer, grid)
        return sample_rollout(self.model, rows, negatives, grid, s.sampling, seeds, s.batch_size), prompts

    def set_learning_rate(self, step: int) -> float:
        """Set and return the learning rate of a step."""
        s = self.settings
        schedule = PatchSchedule((1,), (1.0,), warmup=0.0, decay=s.decay)
        rate = s.learning_rate * schedule.lr_multiplier(step, s.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def update(self, rollout: Rollout, advantages: Tensor) -> dict[str, float]:
        """``updates`` optimizer steps on a rollout; means of what :class:`PolicyLoss` holds."""
        s, count, device = self.settings, len(rollout.codes), self.accelerator.device
        config = base_of(cast(PeftModel, self.model)).config
        parts = [rollout.part(start, start + s.batch_size) for start in range(0, count, s.batch_size)]
        arranged = [Arranged(part, config, device) for part in parts]
        with torch.no_grad(), adapters_off(self.model):
            references = [part.log_probs(self.model) for part in arranged]
        gains = advantages.to(device).split(s.batch_size)
        sums: dict[str, float] = dict.fromkeys(PolicyLoss._fields, 0.0)
        for _ in range(s.updates):
            for part, batch, reference, gain in zip(parts, arranged, references, gains, strict=True):
                sampled = part.log_probs.flatten(1).to(device)
                found = grpo_loss(batch.log_probs(self.model), sampled, reference, gain, s.clip, s.kl_weight)
                share = len(gain) / count
                self.accelerator.backward(found.loss * share)
                for name, value in found._asdict().items():
                    sums[name] += float(value.detach()) * share / s.updates
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), s.gradient_clip)
            check_gradients(self.accelerator, norm, None)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return sums


def build_policy(settings: GrpoSettings, accelerator: Accelerator) -> Policy:
    """The pipeline, its adapter and the optimizer. Raises ValueError if they do not fit."""
    pipeline = UnifiedPipeline.from_pretrained(settings.pipeline)
    base = base_of(pipeline.model)
    check_rollout(base.config, settings.sampling)
    if isinstance(pipeline.image_tokenizer, nn.Module):
        pipeline.image_tokenizer.to(accelerator.device)
    if settings.adapter is not None:
        adapted = load_lora(base, settings.adapter, "default", trainable=True)
    else:
        s = cast(LoraSettings, settings.lora)
        adapted = attach_lora(
            base, s.rank, s.alpha, 0.0, s.target_modules, s.train_image_tables, s.modality, use_rslora=s.use_rslora,
            use_dora=s.use_dora,
        )  # fmt: skip
    adapter_state(adapted).objectives["default"] = ["grpo"]
    check_policy(adapted)
    adapted.eval()  # dropout would make the policy that learns another one than that which sampled
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings.learning_rate, (0.9, 0.99), weight_decay=settings.weight_decay)
    model, optimizer = accelerator.prepare(adapted, optimizer)
    return Policy(pipeline, model, settings, accelerator, optimizer)


def read_texts(settings: GrpoSettings) -> list[str]:
    """The different captions of the source, in its order. Raises ValueError if there are too few."""
    found = different_captions(load_source(settings.prompts, settings.split), settings.caption_column)
    if len(found) < settings.prompts_per_step:
        raise ValueError(
            f"prompts_per_step: {settings.prompts_per_step}, but {settings.prompts!r} has {len(found)} different captions."
        )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings and train."""
    run(load_settings(GrpoSettings, *parse_command_line(__doc__, GrpoSettings, argv, CONFIGS)))


def run(settings: GrpoSettings) -> Path:
    """Train as configured; returns the folder of the adapter. One process at a time writes to an output folder."""
    settings.check()
    rewards = Rewards(settings.rewards)
    accelerator = Accelerator(mixed_precision="no")  # the sampler and the training pass have to agree
    if accelerator.num_processes > 1:
        raise ValueError(
            f"processes: {accelerator.num_processes}; GRPO runs in one, start it without accelerate launch."
        )
    measure = None
    if settings.evaluation is not None:
        from unified_eval.monitor import measurement  # an extra, for those who measure on the way

        measure = measurement(settings.evaluation, Path(settings.output_dir) / "features")
    with locked(settings.output_dir):
        return train(settings, accelerator, rewards, measure)


def train(
    settings: GrpoSettings,
    accelerator: Accelerator,
    rewards: Rewards,
    measure: Callable[[UnifiedPipeline], dict[str, float]] | None = None,
) -> Path:
    """Train, and save the adapter beside its log. SIGTERM and Ctrl-C end it after a step, with a checkpoint."""
    # 1. What to continue from
    set_seed(settings.seed)
    output = Path(settings.output_dir)
    checkpoint = start_checkpoint(settings.resume, output / "checkpoints")
    if checkpoint:
        check_settings(checkpoint, settings, settings.allow_changes)

    # 2. Policy and prompts
    texts = read_texts(settings)
    policy = build_policy(settings, accelerator)
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    inputs = describe_inputs({}, policy.model, accelerator, policy.pipeline.text_tokenizer) | {"prompts": digest}
    if checkpoint:
        check_inputs(checkpoint, inputs, settings.allow_changes)
    done = load_checkpoint(accelerator, checkpoint)[0] if checkpoint else 0
    output.mkdir(parents=True, exist_ok=True)
    remove_stale(accelerator, output / "checkpoints", done)
    log = RunLog(accelerator, output, resumed_at=done)

    # 3. Steps
    bar = tqdm(range(done, settings.steps), initial=done, total=settings.steps, unit="step")
    with catch_signals(accelerator) as stopped:
        for step in bar:
            rollout, prompts = policy.rollout(step, texts)
            images = to_pil(policy.pipeline.image_tokenizer.decode(rollout.codes))
            total, parts = rewards(images, prompts)
            rate = policy.set_learning_rate(step)
            metrics = policy.update(rollout, group_advantages(total, settings.group_size))
            metrics |= {f"reward {path}": float(values.mean()) for path, values in parts.items() if len(parts) > 1}
            metrics |= {
                "reward": float(total.mean()),
                "reward_spread": float(total.view(-1, settings.group_size).std(dim=1).mean()),
                "entropy": -float(rollout.log_probs.mean()),  # nats a code, estimated by the codes that were sampled
                "diversity": code_diversity(rollout.codes, settings.group_size),
                "lr": rate,
            }
            now, last = step + 1, step + 1 == settings.steps
            evaluation = settings.evaluation
            if measure is not None and evaluation is not None and (last or now % evaluation.every == 0):
                metrics |= measure(policy.pipeline)
            log.write(now, **metrics)
            bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("reward", "kl", "entropy", "diversity")})
            interrupted = stopped() and not last
            due = settings.checkpoint_every and (last or now % settings.checkpoint_every == 0)
            if interrupted or due:
                keep = settings.keep_checkpoints
                save_checkpoint(accelerator, output / "checkpoints", now, 0, keep, settings, inputs)
            if interrupted:
                print(f"stopped after step {now} with a checkpoint; resume=latest goes on from there")
                raise SystemExit(130)

    # 4. The adapter
    folder = output / "lora"
    origins = [(f"Weights: `{settings.pipeline}`", terms_of(settings.pipeline)),
               (f"Prompts: `{settings.prompts}`", terms_of(settings.prompts))]  # fmt: skip
    fingerprint = policy.pipeline.image_tokenizer.fingerprint
    card = model_card(
        "lora", folder, settings.pipeline, origins, read_log(output), fingerprint, dump_settings(settings), None
    )
    save_lora(cast(PeftModel, accelerator.unwrap_model(policy.model)), folder, card=card)
    print(f"saved {folder}")
    return folder


if __name__ == "__main__":
    explain_errors(main)
