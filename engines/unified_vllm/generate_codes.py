"""Codes for rows of token ids from an engine in this process: ``python generate_codes.py DIR REQUESTS.json CODES.json``.

Requests are ``{"rows": [[id, ...], ...], "max_tokens": N, "guidance_scale": 3.0}``, without a scale for a server without guidance;
written are the greedy codes of each row, and how many of its tokens were found in shared blocks. For tests; runs where vLLM is
installed.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def main(folder: str, requests_file: str, codes_file: str, *options: str) -> None:
    """Start, generate, write."""
    from vllm import LLM, SamplingParams

    requests = json.loads(Path(requests_file).read_text())
    about = json.loads((Path(folder) / "unified.json").read_text())
    first, codes = about["first_code"], about["codebook_size"]
    scale, given = requests.get("guidance_scale"), json.loads(options[0]) if options else {}
    sampling: dict[str, Any] = {"allowed_token_ids": list(range(first, first + codes))}
    if scale is not None:
        from unified_vllm.export import guided_overrides
        from unified_vllm.guidance import Guidance

        given |= {"hf_overrides": guided_overrides(folder), "logits_processors": [Guidance]}
        sampling = {"extra_args": {"guidance_scale": scale}}
    engine = LLM(folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, **given)
    settings = SamplingParams(
        temperature=0, max_tokens=requests["max_tokens"], ignore_eos=True, detokenize=False, **sampling
    )
    outputs = engine.generate([{"prompt_token_ids": row} for row in requests["rows"]], settings)
    found = {
        "codes": [[token - first for token in each.outputs[0].token_ids] for each in outputs],
        "cached_tokens": [each.num_cached_tokens for each in outputs],
    }
    Path(codes_file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
