"""Prompts or classes, sizes, generators and known codes that a pipeline is called with: checked, and arranged as one batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from unified.config import UnifiedConfig
from unified.decoding import DECODING_MODES, Prompt, Sampling
from unified.decoding.config import check_decoding
from unified.decoding.decoder import Decoder
from unified.model.vision import VisionEncoder
from unified.pipeline.classes import as_classes, class_count, class_prompt
from unified.pipeline.options import GenerationOptions
from unified.prediction.frame import image_length
from unified.prediction.merge import Grid
from unified.prompts import PromptFormat
from unified_tokenizers import ImageTokenizer, TextTokenizer

Generators = torch.Generator | int | Sequence[torch.Generator | int] | None


def check_parts(config: UnifiedConfig, image_tokenizer: ImageTokenizer, text_tokenizer: TextTokenizer | None) -> None:
    """Refuse tokenizers that a model was not trained with.

    Raises:
        ValueError: naming the tokenizer.
    """
    if config.conditioning is not None and config.classes is None:
        raise ValueError(
            "model: it samples after features of another network, which a pipeline does not make; use "
            "unified.decoding.generate_conditioned."
        )
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
    if (text_tokenizer is None) != (config.classes is not None):
        missing = (
            "missing; the model reads text" if text_tokenizer is None else "given, but a model of classes reads none"
        )
        raise ValueError(f"text_tokenizer: {missing}.")
    if text_tokenizer is None:
        return
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


def check_vision_encoder(config: UnifiedConfig, vision: VisionEncoder | None) -> None:
    """Raises ValueError if a model reads images by another vision encoder than is given, by none, or by one that is missing."""
    if (config.vision is None) != (vision is None):
        wrong = "missing; the model reads images by one" if vision is None else "given, but the model reads codes"
        raise ValueError(f"vision_encoder: {wrong}.")
    if config.vision is None or vision is None:
        return
    for name in ("fingerprint", "layer", "pool"):
        expected, actual = config.vision.get(name), vision.description[name]
        if expected != actual:
            raise ValueError(
                f"vision_encoder: {name} {actual} is not that of the one that the model was trained with ({expected}); its "
                "features would mean something else."
            )


# Prompts


def as_prompts(prompt: Any) -> list[str]:
    """One caption or several as a list. Raises ValueError for anything else, and for empty captions."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, Sequence) or not texts:
        raise ValueError(f"prompt: {short(prompt)} is not a caption; give a non-empty string, or a list of them.")
    for text in texts:
        check_prompt(text)
    return list(texts)


def check_prompt(text: Any) -> None:
    """Refuse anything but a caption with something in it. Raises ValueError."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"prompt: {short(text)} is not a caption; give a non-empty string.")
    check_unicode(text, "prompt")


def as_negatives(negative_prompt: Any, count: int) -> list[str]:
    """One negative prompt per caption, "" for none. Raises ValueError on another number or type."""
    if negative_prompt is None or isinstance(negative_prompt, str):
        texts = [negative_prompt or ""] * count
    elif not isinstance(negative_prompt, Sequence) or not all(isinstance(text, str) for text in negative_prompt):
        raise ValueError(f"negative_prompt: {short(negative_prompt)} is not a string or a list of strings.")
    else:
        texts = list(negative_prompt)
    if len(texts) != count:
        raise ValueError(f"negative_prompt: {len(texts)} given for {count} prompts; give one, or one each.")
    for text in texts:
        check_unicode(text, "negative_prompt")
    return texts


def check_unicode(text: str, name: str) -> None:
    """Refuse lone surrogates, which stand for bytes that were not UTF-8. Raises ValueError, which calls the text ``name``."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name}: {short(text)} is not valid Unicode; give it in UTF-8.")


def check_room(prompts: Sequence[str], tokenizer: TextTokenizer, config: UnifiedConfig, grid: Grid, name: str) -> None:
    """Refuse prompts that leave no room for an image behind them. Raises ValueError, which calls them ``name``."""
    limit = config.text_config.max_position_embeddings - image_length(config, grid) - 2
    for text in prompts:
        count = len(token_ids(text, tokenizer, config, grid))
        if count > limit:
            raise ValueError(
                f"{name}: {count} tokens, the model has room for {limit} beside the image; shorten {short(text)}."
            )


def token_ids(text: str, tokenizer: TextTokenizer, config: UnifiedConfig, grid: Grid, replaced: int = 0) -> list[int]:
    """Ids of a prompt as in training; those of no caption, in place of ``replaced`` tokens, for an empty one."""
    prompts = PromptFormat.of(config)
    return prompts.caption_ids(text, tokenizer, grid) if text.strip() else prompts.null_ids(tokenizer, grid, replaced)


def image_prompt(
    text: str, tokenizer: TextTokenizer, config: UnifiedConfig, grid: Grid, beside: Prompt | None = None
) -> Prompt:
    """``<bos> text <boi>`` with the text in the model's template for an image of a code grid; an empty text is the
    unconditional row ``beside`` another.
    """
    start = [] if config.vocabulary.bos_token_id is None else [config.vocabulary.bos_token_id]
    replaced = 0 if beside is None else len(beside.ids) - len(start) - 1
    return Prompt((*start, *token_ids(text, tokenizer, config, grid, replaced), config.boi_token_id))


# Sizes


def trained_grids(config: UnifiedConfig) -> list[Grid]:
    """Code grids that a model was trained on. Raises ValueError if it does not say."""
    if not config.image_grids:
        raise ValueError("height, width: the model does not say which grids it was trained on; give both.")
    return [(int(height), int(width)) for height, width in config.image_grids]


def code_grid(config: UnifiedConfig, stride: int, height: int | None, width: int | None) -> Grid:
    """Code grid of an image of ``height`` x ``width`` pixels; None stands for the model's first grid.

    Raises:
        ValueError: if the model was not trained on it.
    """
    if height is None or width is None:
        first = trained_grids(config)[0]
        height, width = height or first[0] * stride, width or first[1] * stride
    grid, known = (height // stride, width // stride), config.image_grids and trained_grids(config)
    if height % stride or width % stride or (known and grid not in known):
        sizes = ", ".join(f"{h * stride}x{w * stride}" for h, w in known or []) or f"multiples of {stride}"
        raise ValueError(f"height, width: {height}x{width} is not a size that the model was trained on ({sizes}).")
    return grid


# Generators and known codes


def seeded(first: int, count: int) -> list[torch.Generator]:
    """Generators with the seeds ``first``, ``first + 1``, ..."""
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def as_generator(generator: Any) -> torch.Generator:
    """A generator as it is, or one with a whole number as its seed. Raises ValueError for anything else."""
    if isinstance(generator, torch.Generator):
        return generator
    if isinstance(generator, bool) or not isinstance(generator, int) or not -(2**63) <= generator < 2**64:
        raise ValueError(f"generator: {generator!r} is not a torch.Generator or a seed, or a list of them.")
    return torch.Generator().manual_seed(generator)


def per_image(generator: Generators, prompts: int, images_per_prompt: int = 1) -> list[torch.Generator]:
    """One generator per image. A whole number stands for a generator with this seed.

    A list is taken as it is, and image i depends on its generator alone. A single generator generates the first image,
    so that it means the same as a list of one. All others are seeded by its state, or by the global one for None: every
    prompt has a seed in turn, and image j of a prompt depends on that seed and j; more prompts behind it or more
    images of each change nothing.

    Raises:
        ValueError: if a list has another length, or holds something else or one generator twice.
    """
    count = prompts * images_per_prompt
    if not isinstance(generator, Sequence) or isinstance(generator, str):
        first = None if generator is None else as_generator(generator)
        state = None if first is None else first.clone_state()
        device = torch.device("cpu") if first is None else first.device
        seeds = torch.randint(2**63 - 1, (prompts,), generator=state, device=device).tolist()
        result = []
        for seed in seeds:
            more = torch.randint(2**63 - 1, (images_per_prompt - 1,), generator=torch.Generator().manual_seed(seed))
            result += [torch.Generator().manual_seed(each) for each in (seed, *more.tolist())]
        return result if first is None else [first, *result[1:]]
    generators = [as_generator(each) for each in generator]
    if len(generators) != count:
        raise ValueError(f"generator: {len(generators)} given for {count} images; give one, or one per image.")
    if len({id(each) for each in generators}) < count:
        raise ValueError("generator: one and the same is given for several images; they would depend on one another.")
    return generators


def one_per_image(codes: Tensor, name: str, prompts: int, images_per_prompt: int) -> Tensor:
    """Grids ``(n, h, w)`` that are given once for all, per prompt or per image, as one per image.

    Raises:
        ValueError: if there is another number of them.
    """
    count = prompts * images_per_prompt
    if len(codes) not in (1, prompts, count):
        raise ValueError(f"{name}: {len(codes)} given for {count} images of {prompts} prompts; give one, or one each.")
    return codes.repeat_interleave(count // len(codes), dim=0)


def check_known(known: Any) -> None:
    """Refuse known codes that are no tensor of integers. Raises ValueError."""
    number = isinstance(known, Tensor) and not known.is_floating_point() and not known.is_complex()
    if not number or known.dtype == torch.bool or known.layout != torch.strided:
        kind = known.dtype if isinstance(known, Tensor) else type(known).__name__
        raise ValueError(f"known: {kind} is not a tensor of integer codes; give int64, -1 where the model samples.")


def check_callback(callback: Any) -> None:
    """Refuse a callback that cannot be called. Raises ValueError."""
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end: {callback!r} is not a function.")


def check_sampling(sampling: Any, name: str) -> None:
    """Refuse anything but a Sampling or None. Raises ValueError, which calls it ``name``."""
    if sampling is not None and not isinstance(sampling, Sampling):
        raise ValueError(f"{name}: {sampling!r} is not a unified.decoding.Sampling.")


# All of it


@dataclass(eq=False)
class ImageBatch:
    """Images to be sampled in one call, those of a caption side by side, and the state of that call.

    Attributes:
        rows, negatives: a prompt and its unconditional side per image.
        grid: code grid of all images.
        sampling: guidance and filters.
        generators: one per image.
        known: ``(N, h, w)`` codes that are forced, -1 where the model samples; None for no such codes.
        decoding: name of the decoding mode.
        steer: weights of the adapters that steer; None for none.
        interrupted: whether sampling shall stop, or has stopped, before its end.
        thread: the thread that samples.
    """

    rows: list[Prompt]
    negatives: list[Prompt]
    grid: Grid
    sampling: Sampling
    generators: list[torch.Generator]
    known: Tensor | None
    decoding: str
    steer: Mapping[str, float] | None = None
    interrupted: bool = False
    thread: int = 0

    def iterate_codes(self, decoder: Decoder) -> Iterator[Tensor]:
        """The codes so far ``(N, n)``, growing; -1 where an image has none yet."""
        decode = DECODING_MODES[self.decoding]
        return decode(decoder, self.rows, self.negatives, self.grid, self.sampling, self.generators, self.known)


@dataclass(frozen=True)
class Wanted:
    """What the images of a call show: prompts, or classes of a class-conditional model.

    Args:
        prompt, negative_prompt, class_labels, negative_class_labels: as for :class:`unified.UnifiedPipeline`.
    """

    prompt: Any = None
    negative_prompt: Any = None
    class_labels: Any = None
    negative_class_labels: Any = None

    def filled(self, defaults: Mapping[str, Any]) -> "Wanted":
        """The same with the negative prompt of a pipeline's ``defaults`` where prompts come without one."""
        if self.prompt is None or self.negative_prompt is not None:
            return self
        return replace(self, negative_prompt=defaults.get("negative_prompt"))

    def check_negatives(self, decoding: str) -> None:
        """Raises ValueError for negative prompts or classes that a decoding mode does not read."""
        for name in ("negative_prompt", "negative_class_labels"):
            if getattr(self, name) not in (None, "") and not DECODING_MODES[decoding].negatives:
                raise ValueError(f'{name}: decoding {decoding!r} does not read it; leave it out, or give "".')

    def count(self, config: UnifiedConfig) -> int:
        """Number of prompts or classes. Raises ValueError as :meth:`rows`."""
        if self._classes(config) is None:
            return len(as_prompts(self.prompt))
        return len(as_classes(config, self.class_labels))

    def rows(
        self, config: UnifiedConfig, tokenizer: TextTokenizer | None, grid: Grid
    ) -> tuple[list[Prompt], list[Prompt]]:
        """A row for each prompt or class, and as many unconditional ones.

        Raises:
            ValueError: for prompts or classes that are invalid, too long or unknown, or that the model does not take.
        """
        classes = self._classes(config)
        if classes is None:
            assert tokenizer is not None
            prompts = as_prompts(self.prompt)
            negatives = as_negatives(self.negative_prompt, len(prompts))
            check_room(prompts, tokenizer, config, grid, "prompt")
            check_room(negatives, tokenizer, config, grid, "negative_prompt")
            rows = [image_prompt(text, tokenizer, config, grid) for text in prompts]
            opposite = zip(negatives, rows, strict=True)
            return rows, [image_prompt(text, tokenizer, config, grid, row) for text, row in opposite]
        labels, name = as_classes(config, self.class_labels), "negative_class_labels"
        given = (
            [classes] if self.negative_class_labels is None else as_classes(config, self.negative_class_labels, name)
        )
        if len(given) not in (1, len(labels)):
            raise ValueError(f"{name}: {len(given)} given for {len(labels)} classes; give one, or one each.")
        others = given * (len(labels) if len(given) == 1 else 1)
        return [class_prompt(config, label) for label in labels], [class_prompt(config, label) for label in others]

    def _classes(self, config: UnifiedConfig) -> int | None:
        given = {name: getattr(self, name) for name in ("class_labels", "negative_class_labels")}
        texts = {name: getattr(self, name) for name in ("prompt", "negative_prompt")}
        return class_count(config, given, texts)


def arrange_batch(
    config: UnifiedConfig,
    tokenizer: TextTokenizer | None,
    stride: int,
    wanted: Wanted,
    options: GenerationOptions,
    generator: Any,
    known: Tensor | None = None,
) -> ImageBatch:
    """Turn the arguments of a call into one row per image.

    Args:
        config: of the model.
        tokenizer: of its text; None for a class-conditional model.
        stride: pixels per code.
        wanted: what the images show.
        options, generator, known: as for :class:`unified.UnifiedPipeline`.

    Raises:
        ValueError: naming the argument that is wrong.
    """
    options = options.filled({})
    assert options.decoding is not None
    check_decoding(options.decoding, config)
    wanted.check_negatives(options.decoding)
    grid, each = code_grid(config, stride, options.height, options.width), options.num_images_per_prompt
    options.sampling.check_schedule(grid[0] * grid[1])
    rows, negatives = wanted.rows(config, tokenizer, grid)
    count = len(rows)
    if known is not None:
        check_known(known)
        if tuple(known.shape[1:]) != tuple(grid):
            raise ValueError(f"known: shape {tuple(known.shape)}, need (N, {grid[0]}, {grid[1]}) for this size.")
        known = one_per_image(known, "known", count, each).long()
    rows, negatives = ([row for row in side for _ in range(each)] for side in (rows, negatives))
    generators = per_image(generator, count, each)
    return ImageBatch(rows, negatives, grid, options.sampling, generators, known, options.decoding, options.steer)
