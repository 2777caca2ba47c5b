"""Turn published checkpoints into folders of this library: config.json and safetensors.

    python recipes/convert_checkpoint.py image-tokenizer --checkpoint vq_ds16_c2i.pt --out runs/llamagen_vq16
    python recipes/convert_checkpoint.py llamagen --checkpoint c2i_B_256.pt --image-tokenizer vq_ds16_c2i.pt --out runs/llamagen_b
    python recipes/convert_checkpoint.py janus --checkpoint deepseek-ai/Janus-Pro-1B --out runs/janus_pro_1b
    python recipes/convert_checkpoint.py emu3 --checkpoint Emu3-community/Emu3-Gen-hf --out runs/emu3_gen
    python recipes/convert_checkpoint.py emu35 --checkpoint BAAI/Emu3.5-Image --image-tokenizer BAAI/Emu3.5-VisionTokenizer \\
        --text-tokenizer Emu3.5/src/tokenizer_emu3_ibq --out runs/emu35
    python recipes/convert_checkpoint.py chameleon --checkpoint leloy/Anole-7b-v0.1-hf --image-tokenizer vqgan.ckpt --out runs/anole
    python recipes/convert_checkpoint.py lumina --checkpoint Alpha-VLLM/Lumina-mGPT-2.0 --image-tokenizer movqgan_270M.ckpt \\
        --out runs/lumina
    python recipes/convert_checkpoint.py liquid --checkpoint Junfeng5/Liquid_V1_7B --image-tokenizer vqgan.ckpt --out runs/liquid
    python recipes/convert_checkpoint.py simplear --checkpoint Daniel0724/SimpleAR-1.5B-RL \\
        --image-tokenizer nvidia/Cosmos-1.0-Tokenizer-DV8x16x16 --out runs/simplear
    python recipes/convert_checkpoint.py wallaroo --checkpoint checkpoint.ckpt --image-tokenizer vq_ds16_t2i.pt \\
        --backbone Qwen/Qwen2.5-VL-7B-Instruct --out runs/wallaroo
    python recipes/convert_checkpoint.py joint-table --checkpoint DIR --codebook-size 8192 --boi 7 --eoi 8 --out runs/joint

llamagen writes a whole pipeline, which `unified generate --class 207` samples, if the model is class-conditional and its
image tokenizer is given; else the model alone. The other families write pipelines, with their templates of prompts and published
sampling settings, which `unified generate` samples and `model.pipeline` trains on.
image-tokenizer reads LlamaGen's vq_ds16/vq_ds8 files, Janus (a model folder or its weights file), Chameleon's vqgan.ckpt,
MoVQGAN's, IBQ's checkpoints (--quantizer ibq), Cosmos's .jit files and Emu3 -hf folders. Weights are opened without running code; a
pickle of anything but tensors is refused.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from unified import UnifiedForCausalLM, UnifiedPipeline
from unified.convert import (
    chameleon_pipeline,
    emu3_pipeline,
    emu35_pipeline,
    janus_pipeline,
    liquid_pipeline,
    llamagen_from_weights,
    lumina_pipeline,
    simplear_pipeline,
    split_joint_table,
    wallaroo_pipeline,
)
from unified.data.class_names import read_class_names
from unified.errors import explain_errors
from unified_tokenizers import AutoImageTokenizer, ImageTokenizer, read_weights

# Families of language models that are converted to whole pipelines, and what they are. The functions of those in NEEDS take more
# than the checkpoint; the others hold their tokenizers themselves.
PIPELINES: dict[str, tuple[Callable[..., UnifiedPipeline], str]] = {
    "janus": (janus_pipeline, "Janus-Pro, as DeepSeek published it or for transformers (-hf)"),
    "emu3": (emu3_pipeline, "Emu3-Gen for transformers (-hf)"),
    "emu35": (emu35_pipeline, "Emu3.5 or Emu3.5-Image, as BAAI published it, one token after the other"),
    "chameleon": (chameleon_pipeline, "Anole, or another Chameleon that makes images, for transformers (-hf)"),
    "lumina": (lumina_pipeline, "Lumina-mGPT 2.0, a Chameleon with MoVQGAN's codes"),
    "liquid": (liquid_pipeline, "Liquid, a Gemma with the codes of Chameleon's image tokenizer"),
    "simplear": (simplear_pipeline, "SimpleAR, a Qwen2 with the codes of NVIDIA's Cosmos tokenizer"),
    "wallaroo": (wallaroo_pipeline, "Wallaroo, the language model of a Qwen2.5-VL with LlamaGen's codes"),
}
_IMAGES = {"image_tokenizer": "the tokenizer of its codes, such as vqgan.ckpt"}
NEEDS: dict[str, dict[str, str]] = {
    "chameleon": _IMAGES,
    "lumina": _IMAGES,
    "liquid": _IMAGES,
    "simplear": _IMAGES,
    "emu35": {**_IMAGES, "text_tokenizer": "folder with emu3.tiktoken and emu3_vision_tokens.txt, from Emu3.5's code"},
    "wallaroo": {**_IMAGES, "backbone": "Qwen2.5-VL that it was trained from, for its settings and text tokenizer"},
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ",".join(["image-tokenizer", "llamagen", *PIPELINES, "joint-table"])
    kinds = parser.add_subparsers(dest="kind", required=True, metavar=f"{{{names}}}")
    tokenizer = kinds.add_parser("image-tokenizer", help="an image tokenizer, alone or inside a whole model")
    tokenizer.add_argument(
        "--quantizer", choices=("vq", "ibq"), help="how codes are compared, where the file does not tell"
    )
    llamagen = kinds.add_parser("llamagen", help="a language model of LlamaGen or next-patch prediction, c2i or t2i")
    joint = kinds.add_parser("joint-table", help="a language model whose last rows are image codes (Liquid)")
    pipelines = [kinds.add_parser(name, help=about) for name, (_, about) in PIPELINES.items()]
    for kind, name in zip(pipelines, PIPELINES, strict=True):
        for option, about in NEEDS.get(name, {}).items():
            kind.add_argument(f"--{option.replace('_', '-')}", required=True, help=about)
    for kind in (tokenizer, llamagen, joint, *pipelines):
        kind.add_argument("--checkpoint", required=True, help="weights file, model folder or Hub name")
        kind.add_argument("--out", type=Path, required=True, help="folder to write")
    llamagen.add_argument("--heads", type=int, help="attention heads, for widths that were not published")
    llamagen.add_argument(
        "--class-names", type=Path, help="what the classes are called: a line each, JSON, or LOC_synset_mapping.txt"
    )
    joint.add_argument("--codebook-size", type=int, required=True, help="how many of the last rows are codes")
    joint.add_argument("--boi", type=int, required=True, help="id of the token that opens an image")
    joint.add_argument("--eoi", type=int, required=True, help="id of the token that closes an image")
    for kind in (llamagen, joint):
        kind.add_argument("--image-tokenizer", help="the tokenizer of its codes; the model will refuse another")
        kind.add_argument("--grid", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="code grid it was trained on")
    return parser.parse_args(argv)


def named_grid(path: str, tokenizer: ImageTokenizer) -> tuple[int, int] | None:
    """The code grid that a name such as ``c2i_B_256.pt`` tells; None if it tells none."""
    found = re.search(r"c2i_[A-Za-z0-9]+_(\d+)(?:\.|$)", Path(path).name)
    side = int(found[1]) if found else 0
    return (side // tokenizer.downsample,) * 2 if side and side % tokenizer.downsample == 0 else None


def name_classes(model: UnifiedForCausalLM, path: Path) -> None:
    """Give the classes of a model the names in a file. Raises ValueError if it has none, or another number of them."""
    names, count = read_class_names(path), model.config.classes
    if count is None:
        raise ValueError("class_names: the model is not class-conditional; leave them out.")
    if len(names) != count:
        raise ValueError(f"class_names: {len(names)} names in {str(path)!r}, the model has {count} classes.")
    model.config.conditioning = {"kind": "class", "classes": count, "names": names}


def convert_model(args: argparse.Namespace, tokenizer: ImageTokenizer | None) -> UnifiedForCausalLM:
    """Convert a language model; raises ValueError if the image tokenizer has another codebook."""
    fingerprint = tokenizer.fingerprint if tokenizer is not None else None
    grids = [(args.grid[0], args.grid[1])] if args.grid else None
    if args.kind == "llamagen":
        model = llamagen_from_weights(read_weights(args.checkpoint), args.checkpoint, args.heads, grids, fingerprint)
        if args.class_names:
            name_classes(model, args.class_names)
    else:
        model = split_joint_table(
            args.checkpoint, args.codebook_size, args.boi, args.eoi,
            image_grids=None if grids is None else [list(grid) for grid in grids], image_tokenizer_fingerprint=fingerprint,
        )  # fmt: skip
    if tokenizer is not None and tokenizer.codebook_size != model.config.codebook_size:
        raise ValueError(
            f"image_tokenizer: {args.image_tokenizer!r} has {tokenizer.codebook_size} codes, the model "
            f"{model.config.codebook_size}; it was trained with another."
        )
    return model


def size_of(model: nn.Module) -> str:
    """How many parameters a model has."""
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters"


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, save, and say what was written."""
    args = parse_arguments(argv)
    if args.kind == "image-tokenizer":
        read = AutoImageTokenizer.from_pretrained(args.checkpoint, quantizer=args.quantizer)
        read.save_pretrained(args.out)
        print(f"{args.out}: {read.codebook_size} codes, stride {read.downsample}, fingerprint {read.fingerprint}")
        return
    if args.kind in PIPELINES:
        needed = {option: getattr(args, option) for option in NEEDS.get(args.kind, {})}
        pipe = PIPELINES[args.kind][0](args.checkpoint, **needed)
        pipe.save_pretrained(args.out)
        height, width = pipe.default_size
        print(f"{args.out}: a pipeline, {height}x{width} pixels an image, {size_of(pipe.model)}")
        return
    tokenizer = AutoImageTokenizer.from_pretrained(args.image_tokenizer) if args.image_tokenizer else None
    model = convert_model(args, tokenizer)
    if tokenizer is not None and model.config.classes is not None:
        if not model.config.image_grids:
            grid = named_grid(args.checkpoint, tokenizer)
            if grid is None:
                raise ValueError(
                    f"grid: {args.checkpoint!r} does not tell the size that the model was trained on; give --grid ROWS COLUMNS."
                )
            model.config.image_grids = [list(grid)]
        UnifiedPipeline(model, tokenizer).save_pretrained(args.out)
        height, width = model.config.image_grids[0]
        print(f"{args.out}: a pipeline of {model.config.classes} classes, {height}x{width} codes an image")
    else:
        model.save_pretrained(args.out)
    print(f"{args.out}: {size_of(model)}, {model.config.codebook_size} codes")


if __name__ == "__main__":
    explain_errors(main)
