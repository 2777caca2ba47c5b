"""`UnifiedPipeline`: prompt in, pictures out."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unified.decoding import Sampling, generate_codes
from unified.lora import base_of, load_lora, set_adapters, unload_lora
from unified.model import UnifiedForCausalLM
from unified_tokenizers import AutoImageTokenizer, ImageTokenizer, TextTokenizer, load_text_tokenizer
from unified_tokenizers.images import to_pil, to_uint8

PIPELINE_FILE = "pipeline.json"


@dataclass
class UnifiedPipelineOutput:
    """Pictures in the requested form and their codes ``(N, h, w)``."""

    images: list[Image.Image] | np.ndarray | Tensor
    codes: Tensor


class UnifiedPipeline:
    """A unified model with its image and text tokenizer.

    Args:
        model: the language model.
        image_tokenizer: the tokenizer whose codes the model was trained on.
        text_tokenizer: the tokenizer of its text ids.

    Raises:
        ValueError: if the parts do not belong together.
    """

    def __init__(self, model: UnifiedForCausalLM, image_tokenizer: ImageTokenizer, text_tokenizer: TextTokenizer):
        expected = model.config.image_tokenizer_fingerprint
        if expected is not None and image_tokenizer.fingerprint != expected:
            raise ValueError(
                f"image_tokenizer: fingerprint {image_tokenizer.fingerprint} is not the one that the model was trained "
                f"with ({expected}); its codes would mean other pictures."
            )
        if image_tokenizer.codebook_size != model.config.codebook_size:
            raise ValueError(
                f"image_tokenizer: {image_tokenizer.codebook_size} codes, the model has {model.config.codebook_size}."
            )
        if text_tokenizer.vocab_size > model.config.layout.text_vocab_size:
            raise ValueError(
                f"text_tokenizer: {text_tokenizer.vocab_size} ids, the model has {model.config.layout.text_vocab_size}."
            )
        self.model: UnifiedForCausalLM | PeftModel = model.eval()
        self.image_tokenizer = image_tokenizer
        self.text_tokenizer = text_tokenizer
        self._progress_bar: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, torch_dtype: torch.dtype = torch.float32
    ) -> "UnifiedPipeline":
        """Load a pipeline folder: ``pipeline.json``, ``model/``, ``image_tokenizer/``, ``text_tokenizer/``.

        Args:
            pretrained_model_name_or_path: a local folder, or a repository on the Hub.
            torch_dtype: dtype of the language model; the image tokenizer stays in float32.

        Raises:
            ValueError: if a local folder is not a pipeline.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.exists() and not str(folder).startswith((".", "/")) and str(folder).count("/") == 1:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(pretrained_model_name_or_path)))
        if not (folder / PIPELINE_FILE).is_file():
            raise ValueError(
                f"pipeline: {str(folder)!r} has no {PIPELINE_FILE}; give a folder written by save_pretrained."
            )
        model = UnifiedForCausalLM.from_pretrained(folder / "model", dtype=torch_dtype)
        image_tokenizer = AutoImageTokenizer.from_pretrained(folder / "image_tokenizer")
        return cls(model, image_tokenizer, load_text_tokenizer(folder / "text_tokenizer"))

    def save_pretrained(self, save_directory: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the base model and both tokenizers: safetensors, JSON and the sentencepiece model; no pickle.

        ``state_dict`` replaces the model's own weights, for models whose weights are cut over processes.

        Raises:
            ValueError: if adapters are loaded; save those with ``unified.lora.save_lora`` and unload them first.
        """
        if isinstance(self.model, PeftModel):
            raise ValueError("save_pretrained: adapters are loaded; call unload_lora_weights() first.")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder / "model", state_dict=state_dict)
        self.image_tokenizer.save_pretrained(folder / "image_tokenizer")
        self.text_tokenizer.save_pretrained(folder / "text_tokenizer")
        description = {
            "_class_name": type(self).__name__,
            "image_tokenizer_fingerprint": self.image_tokenizer.fingerprint,
        }
        (folder / PIPELINE_FILE).write_text(json.dumps(description, indent=2))

    def to(self, *args: Any, **kwargs: Any) -> "UnifiedPipeline":
        """Move the model and the image tokenizer to a device; a dtype goes to the model only."""
        self.model.to(*args, **kwargs)
        if isinstance(self.image_tokenizer, torch.nn.Module):
            self.image_tokenizer.to(self.model.device)
        return self

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Options for the tqdm bar, such as ``disable=True``."""
        self._progress_bar = kwargs

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the first grid that the model was trained on."""
        grids = base_of(self.model).config.image_grids
        if not grids:
            raise ValueError("height, width: the model does not say which grids it was trained on; give both.")
        return grids[0][0] * self.image_tokenizer.downsample, grids[0][1] * self.image_tokenizer.downsample

    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 3.0,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[["UnifiedPipeline", int, Tensor], None] | None = None,
    ) -> UnifiedPipelineOutput:
        """Draw pictures for prompts.

        Args:
            prompt: one caption or several.
            height, width: size in pixels; a grid that the model was trained on. Default: its first one.
            guidance_scale: classifier-free guidance; 1 switches it off.
            negative_prompt: what to steer away from; one for all, or one per prompt. Default: the empty caption.
            num_images_per_prompt: pictures per caption; those of one caption are adjacent in the output.
            temperature, top_k, top_p: see :class:`unified.decoding.Sampling`.
            generator: one ``torch.Generator`` per picture, or one that seeds them all; fixes the result.
            output_type: ``pil``, ``np`` (N, H, W, 3 uint8), ``pt`` (N, 3, H, W in [-1, 1]) or ``codes``.
            callback_on_step_end: called as ``f(pipeline, index, codes (N, index + 1))`` after every code.

        Raises:
            ValueError: for an empty or too long prompt, a size the model does not know, lists of the wrong length,
                or an unknown ``output_type``.
        """
        if output_type not in ("pil", "np", "pt", "codes"):
            raise ValueError(f"output_type: {output_type!r} is unknown; use 'pil', 'np', 'pt' or 'codes'.")
        if not isinstance(prompt, str | Sequence) or not prompt:
            raise ValueError(f"prompt: {prompt!r} is not a caption; give a non-empty string, or a list of them.")
        sampling = Sampling(guidance_scale, temperature, top_k, top_p)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = (
            [negative_prompt] * len(prompts)
            if negative_prompt is None or isinstance(negative_prompt, str)
            else list(negative_prompt)
        )
        if len(negatives) != len(prompts):
            raise ValueError(
                f"negative_prompt: {len(negatives)} given for {len(prompts)} prompts; give one, or one each."
            )
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt: {num_images_per_prompt} must be at least 1.")
        grid = self._grid(height, width)
        rows = [self._ids(text, grid) for text in prompts for _ in range(num_images_per_prompt)]
        negative_rows = [
            self._ids(text, grid, optional=True) for text in negatives for _ in range(num_images_per_prompt)
        ]
        generators = _per_image(generator, len(rows))

        with tqdm(total=grid[0] * grid[1], unit="code", **self._progress_bar) as bar:

            def on_code(index: int, codes: Tensor) -> None:
                bar.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, index, codes)

            codes = generate_codes(base_of(self.model), rows, negative_rows, grid, sampling, generators, on_code)
        if output_type == "codes":
            return UnifiedPipelineOutput(codes, codes)
        pictures = self.image_tokenizer.decode(codes)
        if output_type == "pt":
            return UnifiedPipelineOutput(pictures, codes)
        if output_type == "np":
            return UnifiedPipelineOutput(to_uint8(pictures).permute(0, 2, 3, 1).cpu().numpy(), codes)
        return UnifiedPipelineOutput(to_pil(pictures), codes)

    def _grid(self, height: int | None, width: int | None) -> tuple[int, int]:
        if height is None or width is None:
            default_height, default_width = self.default_size
            height, width = height or default_height, width or default_width
        stride = self.image_tokenizer.downsample
        known = [tuple(grid) for grid in base_of(self.model).config.image_grids or []]
        grid = (height // stride, width // stride)
        if height % stride or width % stride or (known and grid not in known):
            sizes = [f"{h * stride}x{w * stride}" for h, w in known]
            raise ValueError(
                f"height, width: {height}x{width} is not a size that the model was trained on ({', '.join(sizes)})."
            )
        return grid

    def _ids(self, text: str | None, grid: tuple[int, int], optional: bool = False) -> list[int]:
        if not optional and (not isinstance(text, str) or not text.strip()):
            raise ValueError(f"prompt: {text!r} is not a caption; give a non-empty string.")
        config = base_of(self.model).config
        ids = self.text_tokenizer.encode(text.strip()) if text else []
        limit = config.text_config.max_position_embeddings - grid[0] * grid[1] - 2
        if len(ids) > limit:
            raise ValueError(
                f"prompt: {len(ids)} tokens, the model has room for {limit} beside the picture; shorten {text!r}."
            )
        start = [] if config.layout.bos_token_id is None else [config.layout.bos_token_id]
        return [*start, *ids, config.boi_token_id]

    def load_lora_weights(self, pretrained_model_name_or_path: str | Path, adapter_name: str = "default") -> None:
        """Add a LoRA adapter and make it the active one. Raises ValueError if it belongs to another model."""
        self.model = load_lora(self.model, pretrained_model_name_or_path, adapter_name).eval()

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] = 1.0) -> None:
        """Activate one adapter or several together, with weights. Raises ValueError for unknown names."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = [adapter_weights] * len(names) if isinstance(adapter_weights, int | float) else list(adapter_weights)
        if not isinstance(self.model, PeftModel):
            raise ValueError("adapter_names: no adapter is loaded; call load_lora_weights first.")
        set_adapters(self.model, names, weights)

    def unload_lora_weights(self) -> None:
        """Drop all adapters; the base model is as it was before."""
        if isinstance(self.model, PeftModel):
            self.model = unload_lora(self.model)


def _per_image(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[torch.Generator]:
    """One generator per picture; a single one (or the global state) seeds them in order."""
    if generator is None or isinstance(generator, torch.Generator):
        source = generator
        device = source.device if source is not None else torch.device("cpu")
        seeds = torch.randint(2**63 - 1, (count,), generator=source, device=device).tolist()
        return [torch.Generator().manual_seed(seed) for seed in seeds]
    if len(generator) != count:
        raise ValueError(f"generator: {len(generator)} given for {count} pictures; give one, or one per picture.")
    return list(generator)
