"""Text tokenizers behind one interface: a sentencepiece model, or the tokenizer of a transformers backbone."""

import hashlib
import io
import json
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from reprlib import repr as short
from typing import Any, Protocol

import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from unified_tokenizers.fields import is_whole
from unified_tokenizers.hub import local_path, on_the_hub

BOI, EOI = "<boi>", "<eoi>"
MODEL_TYPES = ("bpe", "unigram")
_SENTENCEPIECE_FILE = "sentencepiece.model"
_FRAME_FILE = "image_tokens.json"
_LONGEST = 4192  # bytes of a text that sentencepiece trains on by default
_FIXED_PIECES = 256 + 6  # every byte, and <unk>, <s>, </s>, <pad>, <boi>, <eoi>


class TextTokenizer(Protocol):
    """Text to ids and back; ``boi_token_id`` and ``eoi_token_id`` frame an image and never come out of ``encode``.

    ``chat_template`` is how its language model writes conversations, in transformers' Jinja; None if it does not.
    """

    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int
    boi_token_id: int
    eoi_token_id: int
    chat_template: str | None

    @property
    def fingerprint(self) -> str:
        """Hash of the vocabulary: what every id stands for."""

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens by name; ``encode`` reads their names as plain text."""

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` without any special token."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special tokens are left out."""

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the tokenizer to a folder that :func:`load_text_tokenizer` reads."""


def _fingerprint(vocabulary: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


class SentencePieceTokenizer:
    """A sentencepiece model with ``<boi>`` and ``<eoi>`` among its control symbols.

    Raises:
        ValueError: if the file is missing, is no sentencepiece model, or lacks the two symbols.
    """

    chat_template: str | None = None

    def __init__(self, model_file: str | Path):
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"model_file: {str(model_file)!r} cannot be read as a sentencepiece model: {error}"
            ) from error
        self._model_file = Path(model_file)
        self.vocab_size: int = self.processor.vocab_size()
        self.bos_token_id: int | None = self.processor.bos_id()
        self.eos_token_id: int | None = self.processor.eos_id()
        self.pad_token_id: int = self.processor.pad_id()
        self.boi_token_id: int = self.processor.piece_to_id(BOI)
        self.eoi_token_id: int = self.processor.piece_to_id(EOI)
        unknown = self.processor.unk_id()
        if unknown in (self.boi_token_id, self.eoi_token_id):
            raise ValueError(
                f"model_file: {str(model_file)!r} has no {BOI} and {EOI} symbols; train it with train_sentencepiece."
            )

    @property
    def fingerprint(self) -> str:
        """Hash of the pieces in the order of their ids."""
        return _fingerprint([self.processor.id_to_piece(i) for i in range(self.vocab_size)])

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the control symbols by name."""
        inner = self.processor
        return {inner.id_to_piece(i): i for i in range(self.vocab_size) if inner.is_control(i)}

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; control symbols cannot be typed."""
        return self.processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; control symbols have no text."""
        return self.processor.decode(list(ids))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Copy the model file."""
        target = Path(save_directory) / _SENTENCEPIECE_FILE
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.resolve() != self._model_file.resolve():
            shutil.copyfile(self._model_file, target)


class TransformersTokenizer:
    """A backbone's own tokenizer; two tokens that it already has (reserved or unused) frame an image.

    Raises:
        ValueError: if one of the two is not in the vocabulary, or they are the same.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, boi: str = BOI, eoi: str = EOI):
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        for name, token in (("boi", boi), ("eoi", eoi)):
            if token not in vocabulary:
                raise ValueError(
                    f"{name}: {token!r} is not in the vocabulary; name one of the tokenizer's reserved or unused tokens."
                )
        if boi == eoi:
            raise ValueError(f"eoi: {eoi!r} opens an image already; name another token.")
        self._frame = {"boi": boi, "eoi": eoi}
        # Some tokenizers read a reserved token as one even so; a text is split after its first character.
        cuts = (f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in (boi, eoi))
        self._cuts = re.compile("|".join(cuts))
        self.vocab_size: int = len(tokenizer)
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self.pad_token_id: int = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
        self.boi_token_id: int = vocabulary[boi]
        self.eoi_token_id: int = vocabulary[eoi]
        self.chat_template: str | None = tokenizer.get_chat_template() if tokenizer.chat_template else None

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens in the order of their ids."""
        vocabulary = self.tokenizer.get_vocab()
        return _fingerprint(sorted(vocabulary, key=vocabulary.__getitem__))

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the added tokens by name."""
        return self.tokenizer.get_added_vocab()

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; special tokens spelled out in it are plain text.

        Raises:
            ValueError: if the tokenizer still reads one of the two image tokens in it.
        """
        ids: list[int] = []
        for part in self._cuts.split(text):
            ids += self.tokenizer.encode(part, add_special_tokens=False, split_special_tokens=True)
        if self.boi_token_id in ids or self.eoi_token_id in ids:
            raise ValueError(f"text: {text!r} spells a token that frames images ({', '.join(self._frame.values())}).")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the tokenizer's files and the two names."""
        self.tokenizer.save_pretrained(str(save_directory))
        (Path(save_directory) / _FRAME_FILE).write_text(json.dumps(self._frame))


def load_text_tokenizer(path: str | Path, boi: str | None = None, eoi: str | None = None) -> TextTokenizer:
    """Load a folder written by ``save_pretrained``, or any transformers tokenizer (folder or Hub name).

    Args:
        path: folder or Hub name.
        boi, eoi: tokens that frame an image, for a transformers tokenizer that does not carry the choice yet.

    Raises:
        ValueError: if there is no such folder or repository, its files cannot be read, or the tokens are not in the
            vocabulary.
    """
    folder = local_path(path, "text_tokenizer")
    if folder is None:
        with on_the_hub(path, "text_tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        return TransformersTokenizer(tokenizer, boi or BOI, eoi or EOI)
    if (folder / _SENTENCEPIECE_FILE).is_file():
        return SentencePieceTokenizer(folder / _SENTENCEPIECE_FILE)
    frame = {"boi": BOI, "eoi": EOI}
    if (folder / _FRAME_FILE).is_file():
        try:
            frame |= json.loads((folder / _FRAME_FILE).read_text())
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"text_tokenizer: {str(folder / _FRAME_FILE)!r} is not JSON of two names ({error})."
            ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # a missing or damaged file raises one of many errors
        raise ValueError(f"text_tokenizer: {str(folder)!r} holds no tokenizer that can be read ({error}).") from error
    return TransformersTokenizer(tokenizer, boi or frame["boi"], eoi or frame["eoi"])


def train_sentencepiece(
    captions: Iterable[str], output_dir: str | Path, vocab_size: int = 1024, model_type: str = "bpe"
) -> SentencePieceTokenizer:
    """Train a sentencepiece model (arXiv 1808.06226) with byte fallback, so that any text can be encoded.

    Every character of the captions becomes a piece if the vocabulary has room for all of them; otherwise the most frequent
    ones take three quarters of the room, and rarer ones are encoded as bytes.

    Args:
        captions: texts to train on.
        output_dir: folder to write.
        vocab_size: upper bound of the vocabulary; small corpora may fill less of it.
        model_type: ``bpe``, or ``unigram``, which splits words that occur in one form alone: of 20,000 captions of shapes it makes
            325 pieces and letters of "purple".

    Raises:
        ValueError: if there is no text, something else stands among them, or ``vocab_size`` is too small for them; or for an
            unknown ``model_type``.
    """
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type: {model_type!r} is unknown; use one of {', '.join(MODEL_TYPES)}.")
    if isinstance(captions, str) or not isinstance(captions, Iterable):
        raise ValueError(f"captions: {short(captions)} is no list of texts.")
    if not is_whole(vocab_size):
        raise ValueError(f"vocab_size: {vocab_size!r} must be a whole number.")
    texts = [caption for caption in captions if _is_text(caption)]
    if not texts:
        raise ValueError("captions: no text to train on; check the caption column.")
    room = vocab_size - _FIXED_PIECES
    if room < 8:
        raise ValueError(
            f"vocab_size: {vocab_size} leaves no room beside the {_FIXED_PIECES} bytes and special tokens; use --vocab-size 512 "
            "or more."
        )
    characters = Counter(character for text in texts for character in unicodedata.normalize("NFKC", text))
    rare = {ord(character): " " for character, _ in characters.most_common()[room * 3 // 4 :]}
    try:
        try:
            model = _train_model(texts, vocab_size, model_type)
        except RuntimeError:  # no room for all characters
            normal = (unicodedata.normalize("NFKC", text).translate(rare) for text in texts)
            model = _train_model([text for text in normal if text.strip()], vocab_size, model_type)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"vocab_size: sentencepiece cannot train {vocab_size} pieces on {len(texts)} captions with {len(characters)} different "
            f"characters; use --vocab-size {_FIXED_PIECES + 2 * len(characters)} or more. ({error})"
        ) from error
    path = Path(output_dir) / _SENTENCEPIECE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model)
    return SentencePieceTokenizer(path)


def _is_text(caption: Any) -> bool:
    """Whether a caption has something in it. Raises ValueError if it is no text, or not valid Unicode."""
    if not isinstance(caption, str):
        raise ValueError(f"captions: {short(caption)} is no text.")
    if any("\ud800" <= character <= "\udfff" for character in caption):
        raise ValueError(f"captions: {short(caption)} is not valid Unicode; give it in UTF-8.")
    return bool(caption.strip())


def _train_model(texts: Sequence[str], vocab_size: int, model_type: str) -> bytes:
    buffer, longest = io.BytesIO(), max(len(text.encode()) for text in texts)
    all_of_them: Any = {"max_sentence_length": longest} if longest > _LONGEST else {}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=buffer,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        model_type=model_type,
        byte_fallback=True,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        control_symbols=[BOI, EOI],
        minloglevel=2,
        **all_of_them,
    )
    return buffer.getvalue()
