"""Chameleon (arXiv 2405.09818) for transformers: Anole (arXiv 2407.06135), since Meta's own weights make no images."""

from pathlib import Path

import torch

from unified.convert.parts import build_model, read_model, renamed
from unified.model.chameleon import ChameleonTextConfig
from unified.pipeline.pipeline import UnifiedPipeline
from unified_tokenizers import AutoImageTokenizer, load_text_tokenizer
from unified_tokenizers.weights import shape_of

BOI, EOI, END_OF_TURN = "<racm3:break>", "<eoss>", "<reserved08706>"
TEMPLATE = "{prompt}" + END_OF_TURN
_SAMPLING = {"guidance_scale": 3.0, "temperature": 0.7, "top_k": 0, "top_p": 0.9}
_PIXELS = 512  # a side
LANGUAGE = {f"model.{name}.": f"backbone.model.{name}." for name in ("embed_tokens", "layers", "norm")}
FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "rope_theta", "rope_scaling", "attention_bias",
    "attention_dropout", "mlp_bias", "initializer_range", "swin_norm", "model_parallel_size",
)  # fmt: skip


def code_name(code: int) -> str:
    """The name of a code in the vocabulary: its digits as letters."""
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def chameleon_pipeline(path: str | Path, image_tokenizer: str | Path) -> UnifiedPipeline:
    """A pipeline of a Chameleon or Anole checkpoint; its image logits, which transformers masks, are equal.

    The rows of the codes are copied to image tables; the text tables keep all of theirs.

    Args:
        path: model folder or Hub name, in the layout of transformers (``-hf``).
        image_tokenizer: Chameleon's ``vqgan.ckpt``, or a folder with it: transformers' layout lacks its decoder.

    Raises:
        ValueError: if the layout is another one, a token or a tensor is missing, or a tensor not expected or of another shape.
    """
    images, (folder, config, state) = AutoImageTokenizer.from_pretrained(image_tokenizer), read_model(path)
    if config.get("model_type") != "chameleon":
        raise ValueError(f"checkpoint: {str(path)!r} is a {config.get('model_type')!r} model, not a Chameleon one.")
    tokenizer = load_text_tokenizer(folder, BOI, EOI)
    ids, names = config.get("vocabulary_map") or {}, [code_name(code) for code in range(images.codebook_size)]
    missing = [name for name in names if name not in ids]
    if missing or END_OF_TURN not in tokenizer.special_tokens:
        raise ValueError(f"checkpoint: the vocabulary of {str(path)!r} lacks {(*missing, END_OF_TURN)[0]!r}.")
    parts = renamed(state, {**LANGUAGE, "lm_head.": "backbone.lm_head."})
    embed, head = "backbone.model.embed_tokens.weight", "backbone.lm_head.weight"
    shape_of(parts, embed, str(path))
    codes = torch.tensor([ids[name] for name in names])
    parts["image_embed.weight"], parts["image_head.weight"] = parts[embed][codes], parts.get(head, parts[embed])[codes]
    side = _PIXELS // images.downsample
    model = build_model(
        {"model_type": ChameleonTextConfig.model_type, **{name: config[name] for name in FIELDS if name in config}},
        tokenizer, parts, str(path),
        codebook_size=len(codes), image_grids=[[side, side]], image_tokenizer_fingerprint=images.fingerprint,
        prompt_template=TEMPLATE,
    )  # fmt: skip
    return UnifiedPipeline(model, images, tokenizer, _SAMPLING)
