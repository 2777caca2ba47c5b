"""Emu3.5 (arXiv 2510.26583), one token after the other: a Qwen3 by its layers, whose last rows are the codes of an IBQ tokenizer.

Its own class differs from Qwen3 in names of settings alone: heads with normalised queries and keys, no biases, plain rotary
positions. Images are framed as those of Emu3, except that no token ends the last row.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from unified.convert.parts import build_model, cut_codes, read_model, renamed
from unified.pipeline.pipeline import UnifiedPipeline
from unified.prediction.merge import Grid
from unified_tokenizers import AutoImageTokenizer, TransformersTokenizer
from unified_tokenizers.hub import expanded
from unified_tokenizers.tiktoken import tokenizer_from_ranks

BOS, EOS, PAD = "<|extra_203|>", "<|extra_204|>", "<|endoftext|>"
BOI, EOI, IMAGE, LINE_END, START = (
    "<|image start|>", "<|image end|>", "<|image token|>", "<|extra_200|>", "<|extra_100|>"
)  # fmt: skip
CODE = "<|visual token {:06d}|>"
TEMPLATE = "You are a helpful assistant for t2i task. USER: {prompt} ASSISTANT: " + START
NULL = "You are a helpful assistant. USER:  ASSISTANT: " + START
GRIDS: tuple[Grid, ...] = ((55, 73), (41, 97), (47, 85), (52, 78), (64, 64), (73, 55), (85, 47), (78, 52))
RANKS, NAMES = "emu3.tiktoken", "emu3_vision_tokens.txt"  # files of its text tokenizer
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = (PAD, "<|im_start|>", "<|im_end|>", *(f"<|extra_{index}|>" for index in range(205)))
_SAMPLING = {"guidance_scale": 5.0, "temperature": 1.0, "top_k": 5120, "top_p": 1.0}
_DEFAULTS = {"head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "num_key_value_heads": 8}
_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_theta", "rope_scaling",
)  # fmt: skip


def emu35_pipeline(
    path: str | Path, image_tokenizer: str | Path, text_tokenizer: str | Path, grids: Sequence[Grid] = GRIDS
) -> UnifiedPipeline:
    """A pipeline of an Emu3.5 checkpoint; its image logits are equal, row by row of the joint table.

    Args:
        path: model folder or Hub name, such as ``BAAI/Emu3.5-Image``.
        image_tokenizer: ``BAAI/Emu3.5-VisionTokenizer``, or a folder with it.
        text_tokenizer: folder with ``emu3.tiktoken`` and ``emu3_vision_tokens.txt``, ``src/tokenizer_emu3_ibq`` of Emu3.5's code.
        grids: code grids of the images that are sampled; by default the published ones, of about a million pixels.

    Raises:
        ValueError: if the layout is another one, the tokenizers do not fit each other, or a tensor is missing, not expected or of
            another shape.
    """
    folder, config, state = read_model(path)
    if config.get("model_type") != "Emu3":
        raise ValueError(f"checkpoint: {str(folder)!r} is a {config.get('model_type')!r} model, not an Emu3.5 one.")
    images = AutoImageTokenizer.from_pretrained(image_tokenizer)
    tokenizer = TransformersTokenizer(_text_tokenizer(expanded(text_tokenizer), images.codebook_size), BOI, EOI)
    parts = renamed(state, {"model.": "backbone.model.", "lm_head.": "backbone.lm_head."})
    first, size = tokenizer.vocab_size, images.codebook_size
    cut_codes(parts, first, size, str(path))
    for table in ("backbone.model.embed_tokens.weight", "backbone.lm_head.weight"):
        parts[table] = parts[table][:first]
    fields: dict[str, Any] = _DEFAULTS | {name: config[name] for name in _FIELDS if name in config}
    ids = tokenizer.special_tokens
    before = {f"{h}x{w}": [*tokenizer.encode(f"{h}*{w}"), ids[IMAGE]] for h, w in grids}
    model = build_model(
        {**fields, "model_type": "qwen3", "vocab_size": first}, tokenizer, parts, str(path),
        codebook_size=size, image_grids=[list(grid) for grid in grids],
        image_frame={"before": before, "between_rows": ids[LINE_END]},
        image_tokenizer_fingerprint=images.fingerprint, prompt_template=TEMPLATE, null_prompt=NULL,
    )  # fmt: skip
    return UnifiedPipeline(model, images, tokenizer, _SAMPLING)


def _text_tokenizer(folder: Path, codes: int) -> PreTrainedTokenizerFast:
    """The tokenizer of the text alone, which ends where the names of the codes begin."""
    file = folder / NAMES
    if not file.is_file():
        raise ValueError(f"text_tokenizer: there is no {str(file)!r}; give the folder with it.")
    names = [name for line in file.read_text(encoding="utf-8").splitlines() if (name := line.strip())]
    if CODE.format(0) not in names:
        raise ValueError(f"text_tokenizer: {str(file)!r} names no {CODE.format(0)!r}.")
    first = names.index(CODE.format(0))
    if names[first:] != [CODE.format(code) for code in range(codes)]:
        raise ValueError(
            f"text_tokenizer: {str(file)!r} does not end with the names of {codes} codes in order; give the image tokenizer of "
            "this model."
        )
    return tokenizer_from_ranks(folder / RANKS, _PIECES, [*_SPECIAL, *names[:first]], BOS, EOS, PAD)
