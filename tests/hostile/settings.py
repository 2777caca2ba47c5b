"""Settings of recipes, and configurations."""

import json
import os
from collections.abc import Callable
from typing import Any

from conftest import tiny_config
from hostile.case import VALID, Case, Silent, cases, each
from hostile.world import World, script

from grpo import GrpoSettings
from unified import UnifiedConfig, UnifiedForCausalLM
from unified.decoding import Sampling
from unified.pipeline.options import GenerationOptions
from unified.prediction.schedule import PatchSchedule
from unified.settings import load_settings
from unified.training.config import load_config
from unified.training.rewards import Rewards

NAN, INF = float("nan"), float("inf")
NUMBER = ".nan many [1] {a:1}"  # no number, wherever one is needed
COUNT = f"0 -1 1.5 .inf {NUMBER}"
SHARE = f"-0.1 1.1 .inf {NUMBER}"
# Fields of a training run, and values that they refuse.
RUN = {
    "steps": f"{COUNT} null",
    "batch_size": f"{COUNT} null",
    "gradient_accumulation_steps": COUNT,
    "processes": COUNT,
    "seed": f"-1 4294967296 1.5 {NUMBER}",
    "peak_flops": f"0 -1 {NUMBER}",
    "log_every": COUNT,
    "validate_every": COUNT,
    "checkpoint_every": COUNT,
    "keep_checkpoints": COUNT,
    "asynchronous_checkpoints": "perhaps",
    "mixed_precision": "fp8 no 16 [1]",
    "output_dir": "'' null [1]",
    "track_with": "nothing {a:1}",
    "allow_changes": "perhaps",
    "data.caption_dropout": SHARE,
    "data.code_noise": SHARE,
    "data.captioning": SHARE,
    "data.image_size": COUNT,
    "data.crops": COUNT,
    "data.max_samples": COUNT,
    "data.pack": f"1 {COUNT}",
    "data.num_workers": f"-1 1.5 {NUMBER}",
    "data.storage_options": "7 [1]",
    "data.validation": "1.5 -0.1 .nan [1] {a:1}",
    "imports": "7 [nothing.py] [no.such.module]",
    "data.train": "null '' [1]",
    "data.bucket": "perhaps",
    "model.options": "7 [1]",
    "model.architecture": "7 [1] {a:1} {model_type:nothing}",
    "model.gradient_checkpointing": "perhaps",
    "model.gradient_checkpointing_layers": f"2 {COUNT}",
    "model.attention": "nothing 7",
    "model.image_init": "nothing codebook",
    "model.head_init": "nothing zero",
    "lora.rank": COUNT,
    "lora.alpha": COUNT,
    "lora.dropout": f"1 {SHARE}",
    "lora.target_modules": "[] 7",
    "lora.modality": "sound",
    "schedule.levels": f"5 {COUNT}",
    "schedule.patch_sizes": "[] [1,2] [0] [2] [1,1] [a] 7",
    "schedule.shares": "[] [0.5] [2] [-1] [.nan] 7",
    "schedule.warmup": f"0.9 {SHARE}",
    "schedule.decay": SHARE,
    "schedule.final": SHARE,
    "schedule.mixed": f"1 {SHARE}",
    "sampling.guidance_scale": f"0.5 1e9 .inf {NUMBER}",
    "sampling.temperature": f"0 -1 .inf {NUMBER}",
    "sampling.top_k": f"-1 1.5 {NUMBER}",
    "sampling.top_p": f"0 1.1 {NUMBER}",
    "sampling.decoding": "fast 7",
    "model.dtype": "float64 7 [1]",
    "model.quantization": "3bit 7",
    "prediction.order": "zigzag 7",
    "prediction.size": f"-1 1.5 {NUMBER}",
    "prediction.merge": "mean sum 7",
    "prediction.window": f"0 -1 2 1.5 {NUMBER}",
    "prediction": "diagonals 7 [1] {oder:rows}",
    "optimizer.name": "sgd null",
    "optimizer.learning_rate": f"0 -1 .inf {NUMBER}",
    "optimizer.weight_decay": f"-1 .inf {NUMBER}",
    "optimizer.betas": "[] [0.9] [0.9,1] [0.9,-1] [0.9,.nan] [a,b] 7",
    "optimizer.gradient_clip": f"0 -1 {NUMBER}",
    "optimizer.gradient_limit": f"0 .inf {NUMBER}",
    "optimizer.ema_decay": f"0 1 {NUMBER}",
    "sample.every": COUNT,
    "sample.guidance_scale": f"0.5 1e9 .inf {NUMBER}",
    "sample.seed": f"-1 {NUMBER}",
    "optimizer.learning_rat": "1",
    "step": "1",
    "data": "null",
    "lora.target": "[a]",
    "data.source": "x",
    "optimizer.lr": "1",
}
# Fields of a run of GRPO.
GRPO = {
    "steps": f"{COUNT} null",
    "prompts_per_step": COUNT,
    "group_size": f"1 {COUNT}",
    "updates": COUNT,
    "batch_size": COUNT,
    "guidance_scale": f"0.5 1e9 .inf {NUMBER}",
    "temperature": f"0 -1 .inf {NUMBER}",
    "clip": f"0 1 -1 {NUMBER}",
    "kl_weight": f"-1 .inf {NUMBER}",
    "learning_rate": f"0 -1 .inf {NUMBER}",
    "weight_decay": f"-1 .inf {NUMBER}",
    "gradient_clip": f"0 -1 .inf {NUMBER}",
    "checkpoint_every": COUNT,
    "keep_checkpoints": COUNT,
    "seed": f"-1 4294967296 1.5 {NUMBER}",
    "output_dir": "'' null [1]",
    "lora": "null 7 [1]",
    "lora.rank": COUNT,
    "lora.dropout": "0.1",
    "adapter": "folder",
    "rewards": "[] null 7 [7]",
}
# Fields of UnifiedConfig, and values that a configuration refuses.
CONFIG: dict[str, list[Any]] = {
    "codebook_size": [0, -1, 1.5, NAN, None, "many", [1]],
    "boi_token_id": [-1, 50, 1.5, None, "<boi>", [3]],
    "eoi_token_id": [-1, 50, 3, None],
    "image_tokenizer_fingerprint": [7, [1]],
    "text_tokenizer_fingerprint": [7],
    "new_image_tables": ["perhaps", 7],
    "positions": ["3d", 7, None, [1]],
    "coarse_positions": ["edge", None],
    "image_grids": [7, [[4]], [[4, 4, 4]], [[0, 4]], [[-4, 4]], [[1.5, 4]], [["a", 4]], [4, 4], [None], "4x4", [[]]],
    "normalized_range": [0, -1, NAN, INF, "far", None, 10**400],
    "loss_normalization": ["row", None],
    "text_loss_weight": [-1, NAN, INF, "much", None],
    "image_loss_weight": [-1, NAN, INF, None],
    "conditioning": [
        *(7, [1], {}, {"kind": "sound"}, {"kind": []}, {"kind": "class"}),
        *({"kind": "class", "classes": value} for value in (0, -5, "a", NAN)),
        {"kind": "features", "length": 0, "features": 4},
    ],
    "vision": [
        *(7, [1], {}, "siglip", {"encoder": "x"}, {"encoder": 7}, {"encoder": "x", "lair": 1}),
        *({"encoder": "x", "width": 8, "layer": value} for value in (1.5, "a", NAN, None, True)),
        *({"encoder": "x", "width": 8, "pool": value} for value in (0, -2, 1.5, "a", NAN, None, [1])),
        *({"encoder": "x", "width": value} for value in (0, -2, 1.5, "a", NAN)),
    ],
    "prediction": [
        *(
            7,
            [1],
            "diagonals",
            {"oder": "rows"},
            {1: 2},
            {"order": "zigzag"},
            {"order": 7},
            {"order": []},
            {"order": None},
        ),
        *({"order": "cells", "size": value} for value in (-1, 1.5, "a", NAN, None, True)),
        *({"merge": value} for value in ("mean", "sum", 7, None, [])),
        *({"merge": "channel", "window": value} for value in (0, -2, 1, 3, 1.5, "a", NAN, None)),
        {"order": "rows", "size": 2},
        {"window": 2},
    ],
    "text_config": [
        *(7, [1], "llama", {}, {"model_type": "nothing"}, {"model_type": 7}, {"model_type": []}),
        *({"model_type": "llama", "hidden_size": value} for value in (0, -8, "a", NAN, [1])),
        {"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4},
        {"model_type": "llama", "rms_norm_eps": "a"},
    ],
}
# Fields of a tokenizer's training, and values that they refuse.
TOKENIZER = {
    "output_dir": "'' null",
    "sources": "7 []",
    "validation": "0 1 1.5 .nan many",
    "image_size": f"6 {COUNT}",
    "cache_gb": f"-1 {NUMBER}",
    "steps": COUNT,
    "batch_size": COUNT,
    "learning_rate": f"0 -1 .inf {NUMBER}",
    "weight_decay": f"-1 .inf {NUMBER}",
    "l1_weight": f"-1 .inf {NUMBER}",
    "perceptual": "nothing lpips",
    "perceptual_weight": f"-1 .inf {NUMBER}",
    "ema_decay": f"0 1 {NUMBER}",
    "shift": f"-1 1.5 {NUMBER}",
    "validate_every": COUNT,
    "checkpoint_every": COUNT,
    "keep_checkpoints": COUNT,
    "seed": f"-1 99999999999999999999 {NUMBER}",
    "model": "7 [1] {channel:8}",
    "discriminator.start": f"-1 9999 {NUMBER}",
    "discriminator.weight": f"-1 .inf {NUMBER}",
    "step": "1",
    "discriminator.channels": COUNT,
    "discriminator.layers": COUNT,
    "discriminator.learning_rate": f"0 -1 .inf {NUMBER}",
    "model.channels": "0 -8 7 1.5 many .nan",
    "model.downsample": "0 -1 1.5 many",
    "model.codebook_size": "0 -1 1.5 many",
    "model.code_dim": "0 -1 many",
    "model.encoder_blocks": "-1 many 1.5",
    "model.decoder_blocks": "-1 many",
    "model.quantizer": "nothing 7 fsq",
    "model.fsq_levels": "7",
    "init_from": "nowhere/nothing/at/all",
}
YAML = [
    ("steps: [", "config run.yaml"),
    ("- 1\n- 2", "config list"),
    ("steps: 1\nsteps: 2", "config steps"),
    ("7", "config run.yaml"),
    ("", "config output_dir steps"),
    ("\x00", "config run.yaml"),
    (b"\xff\xfe\x00", "config run.yaml"),
    ("a: &a [*a]", "config"),
    ("? [1]\n: 2", "config"),
    ("steps: !!python/object/apply:os.mkdir [executed]", "config run.yaml"),
    ("{1: 2}", "config"),
    ("steps: ${steps}", "config steps"),
    ("steps: ${nothing}", "config nothing"),
    ("output_dir: x\nsteps: ${nothing:1}", "config nothing"),
    ("steps: ${", "config"),
    ("output_dir: ${oc.env:HOME}\nsteps: 1", "config output_dir environment"),
    ("output_dir: ${oc.decode:${oc.env:HOME}}\nsteps: 1", "config output_dir environment"),
    (
        "project: ${data.train}\noutput_dir: x\nsteps: 1\ndata: {train: '${oc.env:HOME}'}",
        "config data.train environment",
    ),
    (
        "model: {architecture: {model_type: '${oc.env:HOME}'}}\noutput_dir: x\nsteps: 1",
        "config architecture environment",
    ),
    ("track_with: ['${oc.env:HOME}']\noutput_dir: x\nsteps: 1", "config track_with environment"),
]


def values(table: dict[str, str]) -> list[tuple[str, str]]:
    return [(name, value) for name, texts in table.items() for value in texts.split(" ")]


def training(*overrides: str) -> Callable[[World], object]:
    return lambda world: load_config(world.settings, overrides)


def of_tokenizer(*overrides: str) -> Callable[[World], object]:
    """Train a tokenizer for a step, as the recipe does."""

    def call(world: World) -> None:
        given = {
            "output_dir": str(world.fresh()),
            "sources": [str(world.pictures)],
            "image_size": 16,
            "steps": 1,
            "batch_size": 2,
            "model": {"channels": 8, "encoder_blocks": 1, "decoder_blocks": 1, "codebook_size": 16},
        }
        more = ["discriminator.start=0"] if any("discriminator." in override for override in overrides) else []
        script(
            "recipes/train_tokenizer.py", "--config", str(world.file("run.yaml", json.dumps(given))), *more, *overrides
        )

    return call


def grpo(*overrides: str) -> Callable[[World], object]:
    """Read the settings of a run of GRPO, and find its rewards."""

    def call(world: World) -> None:
        given = {
            "output_dir": "x",
            "pipeline": "y",
            "prompts": "z",
            "steps": 1,
            "lora": {"rank": 4},
            "rewards": [{"path": "math:sqrt"}],
        }
        settings = load_settings(GrpoSettings, world.file("run.yaml", json.dumps(given)), overrides)
        settings.check()
        Rewards(settings.rewards)

    return call


def config(field: str, given: Any) -> Callable[[World], object]:
    if field == "text_config":
        return lambda world: UnifiedConfig(text_config=given)
    return lambda world: UnifiedForCausalLM(tiny_config(**{field: given}))


def architecture(field: str, value: str) -> Callable[[World], object]:
    return training(f"model.architecture.{field}={value}")


def read(text: str | bytes) -> Callable[[World], object]:
    return lambda world: load_config(world.file("run.yaml", text))


def secret(world: World) -> None:
    """An environment variable must not get into what is written."""
    os.environ["FUZZ_SECRET"] = "open sesame"
    try:
        for key, value in (
            ("project", "${oc.env:FUZZ_SECRET}"),
            ("project", "${oc.env:FUZZ_SECRET,x}"),
            ("data.storage_options.key", "${oc.env:FUZZ_SECRET}"),
            ("sample.prompts", "[${oc.env:FUZZ_SECRET}]"),
        ):
            _is_refused(world, f"{key}={value}")
    finally:
        del os.environ["FUZZ_SECRET"]


def _is_refused(world: World, override: str) -> None:
    try:
        load_config(world.settings, [override])
    except ValueError as error:
        if "open sesame" in str(error):
            raise Silent(f"the error of {override} shows the secret") from error
        return
    raise Silent(f"{override} is resolved")


CASES: list[Case] = [
    *(
        Case("settings: train", f"{name}={value}", training(f"{name}={value}"), name.split(".")[-1])
        for name, value in values(RUN)
    ),
    *(
        Case("settings: grpo", f"{name}={value}", grpo(f"{name}={value}"), name.split(".")[-1])
        for name, value in values(GRPO)
    ),
    *each("settings: YAML", read, YAML),
    *cases(
        "settings: train",
        ("a secret", secret, VALID),
        ("a number in place of data", training("data=7"), "config 'data' 7"),
        ("a list in place of data", training("data=[1]"), "config 'data' [1]"),
        ("no file", lambda w: load_config(w.root / "nothing.yaml"), "config nothing.yaml"),
        ("a folder", lambda w: load_config(w.fresh()), "config does not exist"),
        ("no equals sign", training("steps"), "overrides steps"),
        ("no name", training("=7"), "config '' unknown"),
        ("no YAML", training("steps=[1"), "override"),
        ("sources and train", training("data.sources=[{path: a}]"), "data train sources"),
        ("a source without path", training("data.train=null", "data.sources=[{kind: text}]"), "path"),
        ("a source of no kind", training("data.train=null", "data.sources=[{path: a, kind: sound}]"), "kind sound"),
        ("a weight of NaN", training("data.train=null", "data.sources=[{path: a, weight: .nan}]"), "weight nan"),
        ("a weight of 0", training("data.train=null", "data.sources=[{path: a, weight: 0}]"), "weight 0"),
        ("max_length 1", training("data.train=null", "data.sources=[{path: a, max_length: 1}]"), "max_length 1"),
        (
            "a dropout of text",
            training("data.train=null", "data.sources=[{path: a, kind: text, caption_dropout: 0.1}]"),
            "caption_dropout",
        ),
        ("an unknown key of a source", training("data.train=null", "data.sources=[{path: a, wait: 1}]"), "wait"),
        ("sources that are no list", training("data.train=null", "data.sources=a"), "sources"),
        ("an option that is not free", training("model.options.codebook_size=7"), "model.options codebook_size"),
        ("an unknown option", training("model.options.position=1d"), "model.options position"),
        ("an option of a wrong value", training("model.options.positions=3d"), "model.options positions"),
        ("an option of a wrong type", training("model.options.normalized_range=[1]"), "model.options normalized_range"),
        ("a conditioning", training("model.options.conditioning=7"), "model.options conditioning"),
        (
            "an encoder without reading",
            training("model.options.vision={encoder: x}"),
            "model.options.vision captioning",
        ),
        ("no encoder", training("model.options.vision={pool: 2}"), "model.options vision encoder"),
        ("no objective", training("objectives=[]"), "objectives"),
        ("objectives that are no list", training("objectives=7"), "objectives"),
        ("an objective without a name", training("objectives=[{weight: 1}]"), "objectives name"),
        ("an unknown objective", training("objectives=[{name: happiness}]"), "objectives happiness"),
        ("an objective's unknown key", training("objectives=[{name: likelihood, wait: 1}]"), "objectives wait"),
        (
            "an objective's weight of NaN",
            training("objectives=[{name: likelihood, weight: .nan}]"),
            "objectives weight",
        ),
        ("an objective without its adapter", training("objectives=[{name: dpo}]"), "objectives lora"),
        ("an objective without its data", training("objectives=[{name: dpo}]", "lora.rank=4"), "pairs"),
        (
            "an objective's wrong type",
            training("objectives=[{name: cca, beta: [1]}]", "lora.rank=4"),
            "objectives beta",
        ),
        ("samples without prompts", training("sample.every=1"), "sample.prompts"),
        ("an evaluation without data", training("evaluation.every=1"), "evaluation.data"),
        (
            "an evaluation of no metric",
            training("evaluation={every: 1, data: a, clip: b, num_images: 0}"),
            "num_images 0",
        ),
        ("checkpoints off the log", training("log_every=2", "checkpoint_every=3"), "checkpoint_every 3"),
        (
            "steps below stages",
            training("schedule.patch_sizes=[4,2,1]", "schedule.shares=[0.3,0.3,0.4]", "steps=2"),
            "steps 2",
        ),
        ("no tokenizer", training("model.image_tokenizer=null"), "model.image_tokenizer"),
        ("two models", training("model.pipeline=x"), "model pipeline architecture"),
        ("one frame token", training("model.boi=a", "model.eoi=a"), "model.boi model.eoi"),
        ("a modality of DoRA", training("lora.modality=image", "lora.use_dora=true"), "modality use_dora"),
        ("a yes of 1", training("allow_changes=1"), VALID),
        ("infinite clip", training("optimizer.gradient_clip=.inf"), VALID),
    ),
    *(
        Case("settings: architecture", f"{name}={value}", architecture(name, value), f"architecture {name}")
        for name, value in values(
            {
                "hidden_siz": "32",
                "hidden_size": "many [1]",
                "num_hidden_layers": "many",
                "rope_parameters": "7",
                "model_type": "7 bert-nothing",
            }
        )
    ),
    *(
        Case("settings: tokenizer", f"{name}={value}", of_tokenizer(f"{name}={value}"), name.split(".")[-1])
        for name, value in values(TOKENIZER)
    ),
    *(
        Case("UnifiedConfig", f"{name}={value!r:.60}", config(name, value), name)
        for name, given in CONFIG.items()
        for value in given
    ),
    *cases(
        "UnifiedConfig",
        ("no language model", lambda w: UnifiedConfig(), VALID),
        ("a multimodal model", lambda w: UnifiedConfig(text_config={"model_type": "llava"}), "text_config llava"),
    ),
    *each(
        "PatchSchedule",
        lambda given: lambda w: PatchSchedule(**given),
        [
            ({"patch_sizes": ()}, "patch_sizes"),
            ({"patch_sizes": (2, 2, 1), "shares": (0.2, 0.3, 0.5)}, "patch_sizes"),
            ({"patch_sizes": (1.5, 1)}, "patch_sizes 1.5"),
            ({"patch_sizes": ("2", 1)}, "patch_sizes"),
            ({"patch_sizes": 2}, "patch_sizes"),
            ({"patch_sizes": (NAN, 1)}, "patch_sizes nan"),
            ({"shares": (0.5, NAN)}, "shares nan"),
            ({"shares": ()}, "shares"),
            ({"shares": ("a", "b")}, "shares"),
            ({"warmup": NAN}, "warmup nan"),
            ({"warmup": 0.9}, "warmup 0.9"),
            ({"decay": -1}, "decay -1"),
            ({"final": 2}, "final 2"),
            ({"mixed": 1}, "mixed 1"),
            ({"final": "a"}, "final"),
            ({"mixed": None}, "mixed"),
            ({"warmup": None}, "warmup"),
        ],
    ),
    *cases(
        "PatchSchedule",
        ("five levels", lambda w: PatchSchedule.from_levels(5), "levels 5"),
        ("no level", lambda w: PatchSchedule.from_levels(0), "levels 0"),
        ("a ratio of NaN", lambda w: PatchSchedule.from_levels(2, NAN), "ratio nan"),
        ("one and a half levels", lambda w: PatchSchedule.from_levels(1.5), "levels 1.5"),
        ("a step outside", lambda w: PatchSchedule().stage(9, 9), "step 9"),
        ("too few steps", lambda w: PatchSchedule().stages(1), "total_steps 1"),
    ),
    *each(
        "Sampling",
        lambda given: lambda w: Sampling(**given),
        [
            ({"guidance_scale": 0.5}, "guidance_scale 0.5"),
            ({"guidance_scale": NAN}, "guidance_scale nan"),
            ({"guidance_scale": INF}, "guidance_scale inf"),
            ({"guidance_scale": 10**400}, "guidance_scale"),
            ({"guidance_scale": "3"}, "guidance_scale 3"),
            ({"guidance_scale": True}, "guidance_scale True"),
            ({"guidance_scale": None}, "guidance_scale None"),
            ({"guidance_scale": 1j}, "guidance_scale 1j"),
            ({"guidance_scale": 1e9}, "guidance_scale"),
            ({"guidance_scale": -3}, "guidance_scale -3"),
            ({"temperature": 0}, "temperature 0"),
            ({"temperature": -1}, "temperature -1"),
            ({"temperature": 1e-300}, "temperature"),
            ({"temperature": INF}, "temperature inf"),
            ({"temperature": [1]}, "temperature"),
            ({"temperature": 10**400}, "temperature"),
            ({"top_k": -1}, "top_k -1"),
            ({"top_k": 1.5}, "top_k 1.5"),
            ({"top_k": "5"}, "top_k 5"),
            ({"top_k": NAN}, "top_k nan"),
            ({"top_k": None}, "top_k None"),
            ({"top_k": True}, "top_k True"),
            ({"top_k": 10**400}, "top_k"),
            ({"top_k": 10**30}, VALID),
            ({"top_k": 2.0}, VALID),
            ({"top_p": 0}, "top_p 0"),
            ({"top_p": 2}, "top_p 2"),
            ({"top_p": -0.1}, "top_p -0.1"),
            ({"top_p": NAN}, "top_p nan"),
            ({"top_p": "1"}, "top_p 1"),
            ({"top_p": 5e-324}, VALID),
            ({"guidance_schedule": "up"}, "guidance_schedule up"),
            ({"guidance_schedule": None}, "guidance_schedule None"),
            ({"guidance_schedule": []}, "guidance_schedule []"),
            ({"guidance_schedule": {}}, "guidance_schedule {}"),
            ({"guidance_schedule": 3}, "guidance_schedule 3"),
        ],
    ),
    *each(
        "GenerationOptions",
        lambda given: lambda w: GenerationOptions.from_mapping(given),
        [
            ({"height": 0}, "height 0"),
            ({"height": -16}, "height -16"),
            ({"height": 16.0}, "height 16.0"),
            ({"width": "16"}, "width 16"),
            ({"width": True}, "width True"),
            ({"num_images_per_prompt": 0}, "num_images_per_prompt 0"),
            ({"num_images_per_prompt": -1}, "num_images_per_prompt -1"),
            ({"num_images_per_prompt": None}, "num_images_per_prompt None"),
            ({"decoding": "fast"}, "decoding fast"),
            ({"decoding": None}, VALID),
            ({"decoding": []}, "decoding []"),
            ({"decoding": {"a": 1}}, "decoding"),
            ({"size": 3}, "size"),
            ({3: 3}, "3"),
            ({"sampling": 3}, "sampling"),
            ({}, VALID),
        ],
    ),
]
