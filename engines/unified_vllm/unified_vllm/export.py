"""What vLLM has to know of an exported folder. Standard library alone."""

import json
from pathlib import Path
from typing import Any

from unified_vllm import ARCHITECTURE

EXPORT_FILE = "unified.json"


def guided_overrides(folder: str | Path) -> dict[str, Any]:
    """Changes of the folder's ``config.json`` (``--hf-overrides``) that serve it with guidance.

    The vocabulary grows: behind the text and the codes stand the codes again, for the scores without the caption. The first of
    these ids is in a prompt the null token, which a server without guidance refuses as out of its vocabulary.

    Raises:
        ValueError: if the folder was not written by ``unified export``.
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / EXPORT_FILE).read_text(encoding="utf-8"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kept = {name: about[name] for name in ("first_code", "codebook_size", "bos_token_id", "boi_token_id")}
        architecture = config["architectures"][0]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"model: {str(folder)!r} is no folder of `unified export` ({type(error).__name__}: {error})."
        ) from error
    return {
        "architectures": [ARCHITECTURE],
        "vocab_size": kept["first_code"] + 2 * kept["codebook_size"],
        "unified": {**kept, "architecture": architecture},
    }
