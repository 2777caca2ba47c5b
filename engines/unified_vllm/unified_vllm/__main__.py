"""Serve an exported folder with guidance: ``python -m unified_vllm DIR [options of vllm serve]``."""

import json
import os
import sys
from collections.abc import Sequence

from unified_vllm.export import guided_overrides


def command(arguments: Sequence[str]) -> list[str]:
    """The command line of vLLM for a folder and further options. Raises ValueError as :func:`guided_overrides`."""
    if not arguments or arguments[0].startswith("-"):
        raise ValueError("model: none given; python -m unified_vllm DIR [options of vllm serve].")
    folder, *options = arguments
    return [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", folder, "--skip-tokenizer-init", "--enforce-eager",
        "--hf-overrides", json.dumps(guided_overrides(folder)), "--logits-processors", "unified_vllm.guidance:Guidance",
        *options,
    ]  # fmt: skip


if __name__ == "__main__":
    try:
        started = command(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"unified_vllm: {error}")
    os.execv(started[0], started)
