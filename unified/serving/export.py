"""A pipeline as a plain checkpoint of transformers with one joint table, for engines that know no image tables."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from unified.model.modeling import UnifiedForCausalLM
from unified.pipeline.options import GenerationOptions
from unified.pipeline.pipeline import UnifiedPipeline

EXPORT_FILE = "unified.json"
PROMPT_FIELDS = ("prompt_template", "null_prompt", "null_prompt_repeats", "code_pixels")


def export_pipeline(pipe: UnifiedPipeline, folder: str | Path) -> None:
    """Write a language model whose last rows are image codes, both tokenizers, and what a client has to know.

    ``unified.json`` holds the id of the first code, the codebook's size, the grids, the tokens that frame an image, the
    fingerprints of the tokenizers and the sampling defaults. An engine samples an image after ``<bos> caption <boi>`` from
    the ids of the codes alone (``allowed_token_ids``), ``h * w`` of them; the caption stands in ``prompt_template``.
    :func:`unified.convert.split_joint_table` is the way back.

    Args:
        pipe: the pipeline; adapters are fused or unloaded.
        folder: folder to write.

    Raises:
        ValueError: for what a plain model cannot do: adapters beside the weights, positions other than ``1d``, an order other
            than raster, a merge, a condition, or a family whose joint model would score codes differently.
    """
    if isinstance(pipe.model, PeftModel):
        raise ValueError(
            "export: adapters are loaded; call fuse_lora() and save the pipeline, or unload_lora_weights()."
        )
    model = pipe.model
    check_exportable(model)
    joint = joint_model(model)
    check_equal(model, joint)
    config, out = model.config, Path(folder)
    vocabulary = config.vocabulary
    joint.save_pretrained(out)
    pipe.text_tokenizer.save_pretrained(out / "text_tokenizer")
    pipe.image_tokenizer.save_pretrained(out / "image_tokenizer")
    defaults = GenerationOptions().filled(pipe.sampling).sampling
    description = {
        "first_code": vocabulary.text_vocab_size,
        "codebook_size": vocabulary.codebook_size,
        "image_grids": config.image_grids,
        "bos_token_id": vocabulary.bos_token_id,
        "boi_token_id": vocabulary.boi_token_id,
        "eoi_token_id": vocabulary.eoi_token_id,
        **{name: getattr(config, name) for name in PROMPT_FIELDS},
        "image_tokenizer_fingerprint": pipe.image_tokenizer.fingerprint,
        "text_tokenizer_fingerprint": pipe.text_tokenizer.fingerprint,
        "guidance_scale": defaults.guidance_scale,
        "guidance_schedule": defaults.guidance_schedule,
        "needs_guidance": defaults.guided,
        "temperature": defaults.temperature,
        "top_k": defaults.top_k,
        "top_p": defaults.top_p,
    }
    (out / EXPORT_FILE).write_text(json.dumps(description, indent=2))


def check_exportable(model: UnifiedForCausalLM) -> None:
    """Raises ValueError, with the way out, if a plain causal model cannot be the same."""
    config = model.config
    if config.positions != "1d":
        raise ValueError(
            f"export: positions are {config.positions!r}, and other engines count tokens; train with model.options.positions=1d."
        )
    if not model.prediction.is_raster or model.image_split is not None:
        raise ValueError(
            f"export: images are predicted in the order {model.prediction.order!r} with the merge {model.prediction.merge.kind!r}; "
            "other engines generate one token after the other. Train in raster order."
        )
    if model.condition is not None:
        raise ValueError(
            "export: the model samples after a class or features, not after a prompt; export a model without conditioning."
        )
    if model.prediction.frame is not None:
        raise ValueError(
            "export: images have text tokens between their codes, which other engines would sample; use `unified serve`."
        )
    if model.config.image_factors is not None:
        raise ValueError(
            "export: the image tables have two factors, a joint table has a row for each code; use `unified serve`."
        )
    if model.image_projection is not None:
        raise ValueError(
            "export: the image head has a hidden layer, which a joint table has not; serve it with `unified serve`."
        )


@torch.no_grad()
def joint_model(model: UnifiedForCausalLM) -> PreTrainedModel:
    """The backbone with the image tables behind its text tables, not tied."""
    config = copy.deepcopy(model.config.text_config)
    text = config.vocab_size
    config.vocab_size, config.tie_word_embeddings = text + model.config.codebook_size, False
    joint = AutoModelForCausalLM.from_config(config, trust_remote_code=False).to(model.device, model.dtype)
    embeds: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    # Some families (Gemma) scale what they look up: the rows are those that come out as the image embeddings.
    rows = embeds.weight[:text]
    found, codes = embeds(torch.arange(text, device=model.device)), model.image_embed.weight
    if not torch.equal(found, rows):
        codes = codes / (found.norm() / rows.norm())
    tables = {
        id(joint.get_input_embeddings().weight): torch.cat([rows, codes]),
        id(joint.get_output_embeddings().weight): torch.cat([head.weight[:text], model.image_head.weight]),
    }
    weights: dict[str, Tensor] = {n: t for n, t in model.backbone.state_dict().items() if "rotary_emb" not in n}
    weights |= {name: tables[id(weight)] for name, weight in joint.named_parameters() if id(weight) in tables}
    joint.load_state_dict(weights)
    joint.generation_config = copy.deepcopy(model.generation_config)
    return joint.eval()


@torch.no_grad()
def check_equal(model: UnifiedForCausalLM, joint: nn.Module) -> None:
    """Raises ValueError unless both models give the same logits for text and codes, found out by a few of them."""
    text, codes = model.config.text_config.vocab_size, model.config.codebook_size
    ids = torch.tensor(
        [[0, 1 % text, model.config.boi_token_id, text, text + codes - 1, text + codes // 2]], device=model.device
    )
    embeds = model.get_input_embeddings()(ids.clamp_max(text - 1))
    embeds[ids >= text] = model.image_embed(ids[ids >= text] - text).to(embeds.dtype)
    hidden = model.run_backbone(embeds, None).last_hidden_state
    wanted = torch.cat([model.text_logits(hidden), model.image_head(hidden)], dim=-1)
    if not torch.allclose(joint(input_ids=ids).logits, wanted, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"export: {type(model.backbone).__name__} scales or caps its logits or embeddings in a way that image codes do not "
            "have; export works for Llama, Qwen, Mistral and families like them."
        )
