"""What people hand to a pipeline, checked and turned into ids, grids and generators."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unified.config import UnifiedConfig
from unified.decoding import Prompt, Sampling, iterate_codes
from unified.decoding.decoder import Decoder
from unified.decoding.speculative import MODES, speculate_codes
from unified.prediction.merge import Grid
from unified_tokenizers import ImageTokenizer, TextTokenizer


def check_parts(config: UnifiedConfig, image_tokenizer: ImageTokenizer, text_tokenizer: TextTokenizer) -> None:
    """Refuse tokenizers that a model was not trained with; what its config does not know of the text one is set there.

    Raises:
        ValueError: naming the tokenizer.
    """
    expected = config.image_tokenizer_fingerprint
    if expected is not None and image_tokenizer.fingerprint != expected:
        raise ValueError(
            f"image_tokenizer: fingerprint {image_tokenizer.fingerprint} is not the one that the model was trained "
            f"with ({expected}); its codes would mean other images."
        )
    if image_tokenizer.codebook_size != config.codebook_size:
        raise ValueError(
            f"image_tokenizer: {image_tokenizer.codebook_size} codes, the model has {config.codebook_size}."
        )
    if text_tokenizer.vocab_size > config.vocabulary.text_vocab_size:
        raise ValueError(
            f"text_tokenizer: {text_tokenizer.vocab_size} ids, the model has {config.vocabulary.text_vocab_size}."
        )
    expected, actual = config.text_tokenizer_fingerprint, text_tokenizer.fingerprint
    if expected not in (None, actual):
        raise ValueError(
            f"text_tokenizer: fingerprint {actual} is not the one that the model was trained with ({expected}); its ids "
            "would mean other words."
        )
    config.text_tokenizer_fingerprint = actual


DECODING = ("plain", *MODES)
GUIDANCE_SCALE = 3.0  # of images, unless told otherwise


def as_prompts(prompt: Any) -> list[str]:
    """One caption or several as a list. Raises ValueError for anything else, and for empty captions."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, Sequence) or not texts:
        raise ValueError(f"prompt: {prompt!r} is not a caption; give a non-empty string, or a list of them.")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"prompt: {text!r} is not a caption; give a non-empty string.")
    return list(texts)


def as_negatives(negative_prompt: Any, count: int) -> list[str]:
    """One negative prompt per caption, "" for none. Raises ValueError on another number or type."""
    if negative_prompt is None or isinstance(negative_prompt, str):
        return [negative_prompt or ""] * count
    if not isinstance(negative_prompt, Sequence) or not all(isinstance(text, str) for text in negative_prompt):
        raise ValueError(f"negative_prompt: {negative_prompt!r} is not a string or a list of strings.")
    if len(negative_prompt) != count:
        raise ValueError(f"negative_prompt: {len(negative_prompt)} given for {count} prompts; give one, or one each.")
    return list(negative_prompt)


def known_grid(config: UnifiedConfig, stride: int, height: int | None, width: int | None) -> Grid:
    """Code grid of an image of ``height`` x ``width`` pixels; None stands for the model's first grid.

    Raises:
        ValueError: if the model was not trained on it.
    """
    known = [(int(h), int(w)) for h, w in config.image_grids or []]
    sizes = ", ".join(f"{h * stride}x{w * stride}" for h, w in known)
    if (height is None or width is None) and not known:
        raise ValueError("height, width: the model does not say which grids it was trained on; give both.")
    height = known[0][0] * stride if height is None else height
    width = known[0][1] * stride if width is None else width
    for name, value in (("height", height), ("width", width)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {value!r} is not a whole number of pixels.")
    grid = (height // stride, width // stride)
    if height % stride or width % stride or (known and grid not in known):
        raise ValueError(
            f"height, width: {height}x{width} is not a size that the model was trained on ({sizes or f'multiples of {stride}'})."
        )
    return grid


def drawing_prompt(
    text: str, tokenizer: TextTokenizer, config: UnifiedConfig, grid: Grid, name: str = "prompt"
) -> Prompt:
    """``<bos> text <boi>``. Raises ValueError, which calls the text ``name``, if the image has no room behind it."""
    ids = tokenizer.encode(text.strip()) if text.strip() else []
    limit = config.text_config.max_position_embeddings - grid[0] * grid[1] - 2
    if len(ids) > limit:
        raise ValueError(
            f"{name}: {len(ids)} tokens, the model has room for {limit} beside the image; shorten {text!r}."
        )
    start = [] if config.vocabulary.bos_token_id is None else [config.vocabulary.bos_token_id]
    return Prompt((*start, *ids, config.boi_token_id))


def per_image(
    generator: torch.Generator | Sequence[torch.Generator] | None, prompts: int, images_per_prompt: int = 1
) -> list[torch.Generator]:
    """One generator per image.

    A list is taken as it is, and image i depends on its generator alone. A single generator generates the first image,
    so that it means the same as a list of one. All others are seeded by its state, or by the global one for None: every
    prompt has a seed in turn, and image j of a prompt depends on that seed and j; more prompts behind it or more
    images of each change nothing.

    Raises:
        ValueError: if a list has another length, or holds something else or one generator twice.
    """
    count = prompts * images_per_prompt
    if generator is None or isinstance(generator, torch.Generator):
        state = None if generator is None else generator.clone_state()
        device = torch.device("cpu") if generator is None else generator.device
        seeds = torch.randint(2**63 - 1, (prompts,), generator=state, device=device).tolist()
        result = []
        for seed in seeds:
            more = torch.randint(2**63 - 1, (images_per_prompt - 1,), generator=torch.Generator().manual_seed(seed))
            result += [torch.Generator().manual_seed(each) for each in (seed, *more.tolist())]
        return result if generator is None else [generator, *result[1:]]
    if not isinstance(generator, Sequence) or not all(isinstance(each, torch.Generator) for each in generator):
        raise ValueError(f"generator: {generator!r} is not a torch.Generator or a list of them.")
    if len(generator) != count:
        raise ValueError(f"generator: {len(generator)} given for {count} images; give one, or one per image.")
    if len({id(each) for each in generator}) < count:
        raise ValueError("generator: one and the same is given for several images; they would depend on one another.")
    return list(generator)


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Refuse anything but a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: {value!r} must be a whole number of at least {least}.")


def check_call(callback: Any = None, known: Any = None, text_sampling: Any = None, image_sampling: Any = None) -> None:
    """Refuse arguments of a pipeline's methods that are of another type. Raises ValueError naming the argument."""
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end: {callback!r} is not a function.")
    if known is not None:
        number = isinstance(known, Tensor) and not known.is_floating_point() and not known.is_complex()
        if not number or known.dtype == torch.bool:
            kind = known.dtype if isinstance(known, Tensor) else type(known).__name__
            raise ValueError(f"known: {kind} is not a tensor of integer codes; give int64, -1 where the model draws.")
    for name, sampling in (("text_sampling", text_sampling), ("image_sampling", image_sampling)):
        if sampling is not None and not isinstance(sampling, Sampling):
            raise ValueError(f"{name}: {sampling!r} is not a unified.decoding.Sampling.")


def one_per_image(codes: Tensor, name: str, prompts: int, images_per_prompt: int) -> Tensor:
    """Grids ``(n, h, w)`` that are given once for all, per prompt or per image, as one per image.

    Raises:
        ValueError: if there is another number of them.
    """
    count = prompts * images_per_prompt
    if len(codes) not in (1, prompts, count):
        raise ValueError(f"{name}: {len(codes)} given for {count} images of {prompts} prompts; give one, or one each.")
    return codes.repeat_interleave(count // len(codes), dim=0)


@dataclass
class Drawing:
    """A batch of images to be generated, one row each; the fields are arguments of the decoding loops."""

    rows: list[Prompt]
    negatives: list[Prompt]
    grid: Grid
    sampling: Sampling
    generators: list[torch.Generator]
    known: Tensor | None
    mode: str

    def codes(self, decoder: Decoder) -> Iterator[Tensor]:
        """The codes so far ``(N, n)``, growing; -1 where an image has none yet."""
        arguments = (decoder, self.rows, self.negatives, self.grid, self.sampling, self.generators, self.known)
        return iterate_codes(*arguments) if self.mode == "plain" else speculate_codes(*arguments, mode=self.mode)


def plan_drawing(
    config: UnifiedConfig,
    tokenizer: TextTokenizer,
    grid: Grid,
    prompt: Any,
    negative_prompt: Any,
    images_per_prompt: int,
    sampling: Sampling,
    generator: Any,
    known: Tensor | None,
    mode: str,
) -> Drawing:
    """Check the arguments of a pipeline's call and lay them out, the images of one caption side by side.

    Raises:
        ValueError: naming the argument that is wrong.
    """
    prompts = as_prompts(prompt)
    negatives = as_negatives(negative_prompt, len(prompts))
    check_whole("num_images_per_prompt", images_per_prompt)
    if mode not in DECODING:
        raise ValueError(f"decoding: {mode!r} is unknown; use one of {DECODING}.")
    if known is not None:
        if tuple(known.shape[1:]) != tuple(grid):
            raise ValueError(f"known: shape {tuple(known.shape)}, need (N, {grid[0]}, {grid[1]}) for this size.")
        known = one_per_image(known, "known", len(prompts), images_per_prompt).long()
    rows, opposite = (
        [drawing_prompt(text, tokenizer, config, grid, name) for text in texts for _ in range(images_per_prompt)]
        for name, texts in (("prompt", prompts), ("negative_prompt", negatives))
    )
    generators = per_image(generator, len(prompts), images_per_prompt)
    return Drawing(rows, opposite, grid, sampling, generators, known, mode)
