"""LlamaGen's language models (arXiv 2406.06525), and those of next-patch prediction, which keep its layout."""

import re

from torch import Tensor

from unified.config import UnifiedConfig
from unified.model.modeling import UnifiedForCausalLM
from unified.model.prefix import BOI, EOI, NO_TEXT
from unified.prediction.merge import Grid
from unified_tokenizers.weights import load_exactly, shape_of

# Heads cannot be read from the weights; these are the published sizes, by width.
_HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 2560: 40, 3200: 32, 4096: 32}
_BLOCK = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def llamagen_from_weights(
    state: dict[str, Tensor],
    source: str,
    num_attention_heads: int | None = None,
    image_grids: list[Grid] | None = None,
    image_tokenizer_fingerprint: str | None = None,
) -> UnifiedForCausalLM:
    """Build the unified model that a LlamaGen checkpoint describes; its logits are equal.

    Class-conditional checkpoints get a :class:`unified.model.prefix.ClassCondition`, text-conditional ones a
    :class:`unified.model.prefix.FeatureCondition` (120 left-padded Flan-T5-XL vectors). Call the model with
    ``condition=`` and sequences that start with :func:`unified.model.prefix.condition_positions`. Its text head is new and
    not part of the loss.

    Args:
        state: tensors by their published names, as :func:`unified_tokenizers.read_weights` returns them.
        source: where they are from, for errors.
        num_attention_heads: needed for widths that were not published.
        image_grids: code grids the model was trained on; not stored in the checkpoint.
        image_tokenizer_fingerprint: the tokenizer whose codes it was trained on; not stored in the checkpoint.

    Raises:
        ValueError: if the layout is another one, or a tensor is missing, not expected or of another shape.
    """
    if "layers.0.attention.wqkv.weight" not in state:
        some = ", ".join(sorted(state)[:4])
        raise ValueError(f"weights: {source!r} is no LlamaGen language model; its tensors are {some}, ...")
    codebook_size, width = shape_of(state, "tok_embeddings.weight", source)
    heads = num_attention_heads or _HEADS.get(width)
    if heads is None or width % heads or (width // heads) % 4:
        raise ValueError(
            f"num_attention_heads: {heads} is not possible for width {width} of {source!r}; give the number of heads that the "
            "model was trained with (their width is a multiple of 4)."
        )
    head = width // heads
    key_width = (shape_of(state, "layers.0.attention.wqkv.weight", source)[0] - width) // 2
    layers = {int(m[1]) for name in state if (m := re.match(r"layers\.(\d+)\.", name))}
    if len(layers) != max(layers) + 1:
        raise ValueError(f"weights: {source!r} has layers up to {max(layers)}, but only {len(layers)} of them.")
    conditioning, condition = _condition(state, source)
    config = UnifiedConfig(
        text_config={
            "model_type": "llama",
            **NO_TEXT,
            "hidden_size": width,
            "intermediate_size": shape_of(state, "layers.0.feed_forward.w1.weight", source)[0],
            "num_hidden_layers": len(layers),
            "num_attention_heads": heads,
            "num_key_value_heads": key_width // head,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": False,
        },
        codebook_size=codebook_size,
        boi_token_id=BOI,
        eoi_token_id=EOI,
        positions="llamagen",
        coarse_positions="unit",
        text_loss_weight=0.0,
        conditioning=conditioning,
        image_grids=None if image_grids is None else [list(grid) for grid in image_grids],
        image_tokenizer_fingerprint=image_tokenizer_fingerprint,
    )
    model = UnifiedForCausalLM(config)
    own = model.state_dict()
    kept = ("backbone.model.embed_tokens.weight", "backbone.lm_head.weight")
    renamed = {name: own[name] for name in kept} | condition
    for name, value in state.items():
        if not name.startswith("cls_embedding."):
            renamed |= _renamed(name, value.float(), width, key_width, head)
    load_exactly(model, renamed, source)
    return model.eval()


def _condition(state: dict[str, Tensor], source: str) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Description and weights of the condition module."""
    found = {
        name.removeprefix("cls_embedding."): value.float() for name, value in state.items() if "cls_embedding." in name
    }
    if "embedding_table.weight" in found:
        names = {"embedding_table.weight": "table.weight"}
        described: dict[str, object] = {"kind": "class", "classes": len(found["embedding_table.weight"]) - 1}
    else:
        length, features = shape_of(state, "cls_embedding.uncond_embedding", source)
        names = {
            "cap_proj.fc1.weight": "fc1.weight",
            "cap_proj.fc2.weight": "fc2.weight",
            "uncond_embedding": "nothing",
        }
        described = {"kind": "features", "length": length, "features": features}
    return described, {f"condition.{names.get(name, name)}": value for name, value in found.items()}


def _renamed(name: str, value: Tensor, width: int, key_width: int, head: int) -> dict[str, Tensor]:
    """One tensor of LlamaGen as the tensors that it becomes."""
    top = {
        "tok_embeddings.weight": "image_embed.weight",
        "output.weight": "image_head.weight",
        "norm.weight": "backbone.model.norm.weight",
    }
    if name in top:
        return {top[name]: value}
    parts = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
    if parts is None:
        return {name: value}  # reported by load_exactly as not expected
    layer = f"backbone.model.layers.{parts[1]}"
    if parts[2] == "attention.wqkv":
        if len(value) != width + 2 * key_width:
            return {name: value}
        query, key, vector = value.split([width, key_width, key_width])
        split = {"q": _halves(query, head), "k": _halves(key, head), "v": vector}
        return {f"{layer}.self_attn.{letter}_proj.weight": rows for letter, rows in split.items()}
    return {f"{layer}.{_BLOCK.get(parts[2], parts[2])}.weight": value}


def _halves(rows: Tensor, head: int) -> Tensor:
    """Reorder the rows of every head: LlamaGen rotates neighbours (2i, 2i + 1), transformers (i, i + head / 2)."""
    return rows.reshape(-1, head // 2, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape).contiguous()
