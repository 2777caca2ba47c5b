"""Published VQGAN weights, in four layouts, as a :class:`unified_tokenizers.VQGAN`.

- LlamaGen and Janus (``gen_vision_model``) name the levels ``conv_blocks``, the decoder's in running order; codes are
  compared on the unit sphere. These are the names of :class:`VQGAN`, too.
- taming-transformers (Chameleon's ``vqgan.ckpt``) names them ``down`` and ``up``, where ``up.0`` runs last; codes are
  compared plainly. MoVQGAN's ``movqgan_*.ckpt`` has the same names, with norms of the decoder that see the codes.
- Janus in transformers (``vqmodel``) uses taming's names with ``up.0`` running first, on the unit sphere. Its own
  ``encode`` leaves out the normalisation of the original; this library follows the original.
- IBQ (SEED-Voken's checkpoints, Emu3.5's ``model.ckpt``) has taming's names, and its codes are those of the greatest product.
  Nothing in the tensors tells this, so it has to be said; but Emu3.5 keeps a ``config.yaml`` with ``n_embed`` beside its file.
  Where a checkpoint holds averages of the weights as well (``model_ema.``), they are read, as SEED-Voken's scripts do.
"""

import re

from torch import Tensor

from unified_tokenizers.vqgan import VQGAN, VQGANConfig
from unified_tokenizers.weights import load_exactly, shape_of

# Left over from training: usage statistics, the discriminator and the perceptual network.
_NOT_WEIGHTS = re.compile(r"quantize\.codebook_used$|loss\.")
_MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}


_AVERAGES = "model_ema."
_MOST_BY_DISTANCE = (
    16384  # codes of the largest codebook that was published in taming's names and is compared by distance
)


def vqgan_from_weights(
    state: dict[str, Tensor], source: str, normalize_codes: bool | None = None, quantizer: str | None = None
) -> VQGAN:
    """Build the tokenizer that published weights describe; every size is read from their shapes.

    Args:
        state: tensors by name, in one of the layouts above.
        source: where they are from, for errors.
        normalize_codes: whether codes are compared on the unit sphere; by default as the layout says.
        quantizer: ``ibq`` or ``vq``, for a file in taming's names; without, ``vq`` unless it has marks of IBQ.

    Raises:
        ValueError: if the layout is another one, a tensor is missing, not expected or of another shape, or the file may be
            IBQ's and ``quantizer`` is not given.
    """
    state = {name: value for name, value in state.items() if not _NOT_WEIGHTS.match(name)}
    if quantizer is None:
        if any(name.startswith(_AVERAGES) for name in state) or _codes(state) > _MOST_BY_DISTANCE:
            raise ValueError(
                f"quantizer: {source!r} may be IBQ's, whose codes are those of the greatest product, or another file in taming's "
                "names, whose codes are the nearest; give quantizer 'ibq' or 'vq'."
            )
        quantizer = "vq"
    state = _averaged(state, source)
    if "encoder.conv_blocks.0.res.0.conv1.weight" in state:
        normalize = True
    elif "encoder.down.0.block.0.conv1.weight" in state:
        if "decoder.conv_in.weight" not in state:
            raise ValueError(
                f"weights: {source!r} holds an encoder without its decoder, as Chameleon does in transformers; give the "
                "original vqgan.ckpt."
            )
        normalize = "decoder.up.0.upsample.conv.weight" in state  # only Janus in transformers runs up.0 first
        state = _from_taming(state, up_0_runs_first=normalize)
    else:
        some = ", ".join(sorted(state)[:4])
        raise ValueError(
            f"weights: {source!r} is no image tokenizer that is known here (LlamaGen, Janus, taming/Chameleon); its tensors "
            f"are {some}, ..."
        )
    normalize = normalize if normalize_codes is None else normalize_codes
    model = VQGAN(_config_of(state, normalize, quantizer, source))
    load_exactly(model, {name: value.float() for name, value in state.items()}, source)
    return model.eval()


def _codes(state: dict[str, Tensor]) -> int:
    """Number of codes of a file in taming's names; 0 of another."""
    taming = "encoder.down.0.block.0.conv1.weight" in state and "quantize.embedding.weight" in state
    return len(state["quantize.embedding.weight"]) if taming else 0


def _averaged(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The averages that a checkpoint holds in place of its weights; without them it is returned as it is.

    An average is called as its weight, without the dots.
    """
    averages = {name.removeprefix(_AVERAGES): value for name, value in state.items() if name.startswith(_AVERAGES)}
    weights = {name: value for name, value in state.items() if not name.startswith(_AVERAGES)}
    if not averages:
        return weights
    missing = sorted(name for name in weights if name.replace(".", "") not in averages)
    if missing:
        raise ValueError(f"weights: {source!r} holds averages, but none of {', '.join(missing[:4])}; get it again.")
    return {name: averages[name.replace(".", "")] for name in weights}


def _from_taming(state: dict[str, Tensor], up_0_runs_first: bool) -> dict[str, Tensor]:
    """Names of taming-transformers to those of :class:`VQGAN`."""
    last = max((int(found[1]) for name in state if (found := re.match(r"decoder\.up\.(\d+)\.", name))), default=0)

    def rename(name: str) -> str:
        name = re.sub(r"^(encoder|decoder)\.mid\.(\w+)\.", lambda m: f"{m[1]}.mid.{_MIDDLE.get(m[2], m[2])}.", name)
        name = re.sub(r"^encoder\.down\.", "encoder.conv_blocks.", name)
        order = int if up_0_runs_first else lambda level: last - int(level)
        name = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.conv_blocks.{order(m[1])}.", name)
        return re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", name)

    return {rename(name): value for name, value in state.items()}


def _config_of(state: dict[str, Tensor], normalize: bool, quantizer: str, source: str) -> VQGANConfig:
    channels = shape_of(state, "encoder.conv_in.weight", source)[0]
    blocks = {
        (int(m[1]), int(m[2])) for name in state if (m := re.match(r"encoder\.conv_blocks\.(\d+)\.res\.(\d+)\.", name))
    }
    levels, residual_blocks = max(level for level, _ in blocks) + 1, max(block for _, block in blocks) + 1
    if len(blocks) != levels * residual_blocks:
        raise ValueError(f"weights: {source!r} lacks some of the {residual_blocks} blocks of its {levels} levels.")
    widths = [shape_of(state, f"encoder.conv_blocks.{i}.res.0.conv1.weight", source)[0] for i in range(levels)]
    codebook_size, code_dim = shape_of(state, "quantize.embedding.weight", source)
    return VQGANConfig(
        channels=channels,
        multipliers=[width // channels for width in widths],
        residual_blocks=residual_blocks,
        attention_levels=[i for i in range(levels) if f"encoder.conv_blocks.{i}.attn.0.q.weight" in state],
        latent_channels=shape_of(state, "encoder.conv_out.weight", source)[0],
        codebook_size=codebook_size,
        code_dim=code_dim,
        normalize_codes=normalize,
        quantizer=quantizer,
        spatial_norms="decoder.norm_out.conv_y.weight" in state,
    )
