"""Turn published checkpoints into folders of this library: config.json and safetensors.

    python recipes/convert_checkpoint.py image-tokenizer --checkpoint vq_ds16_c2i.pt --out runs/llamagen_vq16
    python recipes/convert_checkpoint.py llamagen --checkpoint c2i_B_256.pt --image-tokenizer runs/llamagen_vq16 \\
        --grid 16 16 --out runs/llamagen_b
    python recipes/convert_checkpoint.py joint-table --checkpoint Junfeng5/Liquid_V1_7B --codebook-size 8192 \\
        --boi 7 --eoi 8 --out runs/liquid

image-tokenizer reads LlamaGen's vq_ds16/vq_ds8 files, Janus (a model folder or its weights file), Chameleon's vqgan.ckpt and
Emu3 -hf folders. Weights are opened without running code; a pickle of anything but tensors is refused.
"""

import argparse
from pathlib import Path

from unified import UnifiedForCausalLM
from unified.convert import llamagen_from_weights, split_joint_table
from unified.errors import explain_errors
from unified_tokenizers import AutoImageTokenizer, read_weights


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="{image-tokenizer,llamagen,joint-table}")
    tokenizer = kinds.add_parser("image-tokenizer", help="an image tokenizer, alone or inside a whole model")
    llamagen = kinds.add_parser("llamagen", help="a language model of LlamaGen or next-patch prediction, c2i or t2i")
    joint = kinds.add_parser("joint-table", help="a language model whose last rows are image codes (Liquid)")
    for kind in (tokenizer, llamagen, joint):
        kind.add_argument("--checkpoint", required=True, help="weights file, model folder or Hub name")
        kind.add_argument("--out", type=Path, required=True, help="folder to write")
    llamagen.add_argument("--heads", type=int, help="attention heads, for widths that were not published")
    joint.add_argument("--codebook-size", type=int, required=True, help="how many of the last rows are codes")
    joint.add_argument("--boi", type=int, required=True, help="id of the token that opens an image")
    joint.add_argument("--eoi", type=int, required=True, help="id of the token that closes an image")
    for kind in (llamagen, joint):
        kind.add_argument("--image-tokenizer", help="the tokenizer of its codes; the model will refuse another")
        kind.add_argument("--grid", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="code grid it was trained on")
    return parser.parse_args()


def convert_model(args: argparse.Namespace) -> UnifiedForCausalLM:
    """Convert a language model; raises ValueError if the image tokenizer has another codebook."""
    tokenizer = AutoImageTokenizer.from_pretrained(args.image_tokenizer) if args.image_tokenizer else None
    fingerprint = tokenizer.fingerprint if tokenizer is not None else None
    grids = [(args.grid[0], args.grid[1])] if args.grid else None
    if args.kind == "llamagen":
        model = llamagen_from_weights(read_weights(args.checkpoint), args.checkpoint, args.heads, grids, fingerprint)
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


def main() -> None:
    """Convert, save, and say what was written."""
    args = parse_arguments()
    if args.kind == "image-tokenizer":
        tokenizer = AutoImageTokenizer.from_pretrained(args.checkpoint)
        tokenizer.save_pretrained(args.out)
        print(
            f"{args.out}: {tokenizer.codebook_size} codes, stride {tokenizer.downsample}, fingerprint {tokenizer.fingerprint}"
        )
        return
    model = convert_model(args)
    model.save_pretrained(args.out)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.out}: {size / 1e6:.1f} M parameters, {model.config.codebook_size} codes")


if __name__ == "__main__":
    explain_errors(main)
