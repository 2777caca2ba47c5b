"""The settings of what a run trains on."""

from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import MISSING

from unified.data.held_out import part_names
from unified.settings import check_choice, check_range

KINDS = ("image", "text", "interleaved", "pairs", "chat")


@dataclass
class SourceConfig:
    """One of several sources that are mixed by weight."""

    path: str = MISSING  # a codes cache, or any source of `unified.data.sources.load_source`; images are encoded once
    kind: str = "image"  # image: captioned images; text: plain texts; interleaved: lists of both; pairs: of images, for dpo; chat
    weight: float = 1.0  # share of the training rows, relative to the weights of the other sources
    split: str = "train"  # split to train on
    validation_split: str | None = None  # measured every validate_every steps, as `<kind>_validation_loss`
    validation: float | None = None  # hold out this share of `split`, chosen by content, in place of a validation_split
    image_column: str = "image"  # column with the images
    caption_column: str = "caption"  # column with their captions
    caption: str | None = None  # one caption for all images, in place of the column
    class_column: str = "label"  # column with the classes, for a class-conditional model
    text_column: str = "text"  # column with the plain texts
    segments_column: str = "segments"  # column with the interleaved rows: lists of {text, image}, one of them null
    messages_column: str = "messages"  # of chat: column with the conversations, lists of {role, content}
    images_column: str = "images"  # of chat: column with the lists of their images
    chosen_column: str = "chosen"  # of pairs: column with the images that are preferred
    rejected_column: str = "rejected"  # of pairs: column with the others
    max_length: int = 512  # tokens that a text, an interleaved row or a conversation is cut to
    captioning: float | None = None  # for images; default: that of `data`
    caption_dropout: float | None = None  # for images, with captions or classes; default: that of `data`

    def check(self) -> None:
        """Raises ValueError for a field that is out of range or does not go with the kind."""
        name = f"data.sources[{self.path}]."
        check_choice(f"{name}kind", self.kind, KINDS)
        check_range(name, self, "(0, inf)", "weight")
        check_range(name, self, "[2, inf)", "max_length")
        check_range(name, self, "[0, 1]", "captioning", "caption_dropout")
        if self.validation is not None:
            part_names(self.split, self.validation)
            if self.validation_split is not None:
                raise ValueError(
                    f"{name}validation: a share, and validation_split is {self.validation_split!r}; leave one out."
                )
        for option in ("captioning", "caption_dropout"):
            if getattr(self, option) is not None and self.kind != "image":
                raise ValueError(f"{name}{option}: for images only, not for {self.kind}; leave it out.")

    @property
    def name(self) -> str:
        """What logs call it."""
        return f"{self.kind} {self.path!r}"

    def with_splits(self) -> "SourceConfig":
        """The same with the splits that a share of ``validation`` makes of ``split``."""
        if self.validation is None:
            return self
        rest, held_out = part_names(self.split, self.validation)
        return replace(self, split=rest, validation_split=held_out)


@dataclass
class DataConfig:
    """What to train on: either ``train``, or several ``sources`` that are mixed by weight."""

    train: str | None = None  # a codes cache, or captioned images, which are encoded once into `<output_dir>/codes`
    sources: list[SourceConfig] = field(default_factory=list)  # several sources in place of `train`
    validation: str | float | None = None  # other data, or a share of `train` to hold out by content, such as 0.1
    train_split: str = "train"  # split of `train` to train on
    validation_split: str = "validation"  # split that validation losses are measured on
    image_column: str = "image"  # column with the images
    caption_column: str = "caption"  # column with their captions
    caption: str | None = None  # one caption for all images of `train`, in place of the column
    class_column: str = "label"  # column with the classes, for a class-conditional model; it needs no captions
    image_size: int = 64  # side in pixels of images that the run encodes
    crops: int | None = None  # number of random crops of every image that the run encodes; default: the centre
    flips: bool = False  # also encode every image mirrored
    streaming: bool = False  # read rows as they come instead of downloading the source first
    storage_options: dict[str, Any] = field(
        default_factory=dict
    )  # of fsspec, for remote files; no secrets, they are saved
    max_samples: int | None = None  # use only the first rows of the training split
    one_view: bool = False  # an epoch has one of the crops of every image, chosen at random, in place of all
    caption_dropout: float = 0.1  # share of empty captions, or of unconditional classes, for classifier-free guidance
    code_noise: float = 0.0  # input codes are replaced at random, at a rate sampled from [0, code_noise] for each image
    train_on_captions: bool = False  # captions in front of images are in the loss too
    captioning: float = 0.0  # share of rows with the image first, whose caption alone is in the loss
    pack: int | None = None  # pack the sequences of a batch into rows of at most this many tokens
    bucket: bool = False  # batches of one code grid each, for codes of several aspect ratios; leftovers share batches
    num_workers: int | None = None  # processes that prepare batches; 0: the training itself; null: 4 on a GPU, else 0

    def check(self) -> None:
        """Raises ValueError for a field that is out of range or contradicts another."""
        if bool(self.train) == bool(self.sources):
            raise ValueError(f"data: set exactly one of train and sources, got {'both' if self.train else 'none'}.")
        check_range("data.", self, "[0, 1]", "caption_dropout", "code_noise", "captioning")
        check_range("data.", self, "[1, inf)", "image_size", "crops", "max_samples")
        check_range("data.", self, "[2, inf)", "pack")
        check_range("data.", self, "[0, inf)", "num_workers")
        if isinstance(self.validation, float):
            part_names(self.train_split, self.validation)
            if self.validation_split != DataConfig.validation_split:
                raise ValueError(
                    f"data.validation: a share, and data.validation_split is {self.validation_split!r}; leave one out."
                )
        for source in self.sources:
            source.check()
        if self.bucket and self.one_view:
            raise ValueError("data.bucket: not possible with data.one_view; leave one of them out.")
        if self.sources and self.bucket:
            raise ValueError(
                "data.bucket: batches of several sources hold several lengths anyway; use data.pack instead."
            )
        if self.sources and (self.validation or self.max_samples is not None or self.caption):
            raise ValueError("data: validation, max_samples and caption are for train; sources have their own keys.")

    def reads(self, source: SourceConfig) -> bool:
        """Whether rows of a source have images that are read and not in the loss."""
        captioning = self.captioning if source.captioning is None else source.captioning
        return source.kind == "chat" or (source.kind == "image" and captioning > 0)
