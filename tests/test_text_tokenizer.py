"""Sentencepiece and transformers tokenizers through one interface."""

import numpy as np
import pytest
from conftest import CAPTIONS

from unified_tokenizers import TransformersTokenizer, load_text_tokenizer, train_sentencepiece


@pytest.mark.parametrize("kind", ["sentencepiece", "transformers"])
def test_interface(kind, text_tokenizer, word_tokenizer, tmp_path):
    tokenizer = text_tokenizer if kind == "sentencepiece" else TransformersTokenizer(word_tokenizer, "<r1>", "<r2>")
    tokenizer.save_pretrained(tmp_path)
    loaded = load_text_tokenizer(tmp_path)
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.boi_token_id, tokenizer.eoi_token_id}
    assert len(special) == 4
    for caption in CAPTIONS:
        ids = tokenizer.encode(caption)
        assert tokenizer.decode(ids) == caption
        assert loaded.encode(caption) == ids
        assert not special & set(ids) and max(ids) < tokenizer.vocab_size
    assert (loaded.boi_token_id, loaded.eoi_token_id, loaded.vocab_size) == (
        tokenizer.boi_token_id, tokenizer.eoi_token_id, tokenizer.vocab_size,
    )  # fmt: skip


def test_image_frame_cannot_be_typed(text_tokenizer, word_tokenizer):
    assert text_tokenizer.boi_token_id not in text_tokenizer.encode("red <boi> apple <eoi>")
    wrapped = TransformersTokenizer(word_tokenizer, "<r1>", "<r2>")
    assert wrapped.boi_token_id in word_tokenizer.encode("red <r1> apple", add_special_tokens=False)
    red, apple, unknown = *wrapped.encode("red apple"), word_tokenizer.unk_token_id
    assert wrapped.encode("red <r1> apple") == [red, unknown, unknown, apple]
    assert wrapped.encode("<r2><r1>") == [unknown] * 3  # "<", "r2><", "r1>"
    # A single character cannot be cut.
    with pytest.raises(ValueError, match="'a dog' spells a token that frames images"):
        TransformersTokenizer(word_tokenizer, "a", "<r2>").encode("a dog")


def test_fingerprint_tells_vocabularies_apart(text_tokenizer, word_tokenizer, tmp_path):
    other = train_sentencepiece([caption.upper() for caption in CAPTIONS], tmp_path, vocab_size=320)
    wrapped = TransformersTokenizer(word_tokenizer, "<r1>", "<r2>")
    assert len({text_tokenizer.fingerprint, other.fingerprint, wrapped.fingerprint}) == 3
    for tokenizer in (other, wrapped):
        tokenizer.save_pretrained(tmp_path / "copy" / tokenizer.fingerprint)
        assert load_text_tokenizer(tmp_path / "copy" / tokenizer.fingerprint).fingerprint == tokenizer.fingerprint


def test_bytes_fall_back(text_tokenizer):
    assert text_tokenizer.decode(text_tokenizer.encode("żółw 🐢")) == "żółw 🐢"


def test_bad_input_is_named(word_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="boi: '<boi>' is not in the vocabulary"):
        TransformersTokenizer(word_tokenizer)
    with pytest.raises(ValueError, match="eoi: '<r1>' opens an image already"):
        TransformersTokenizer(word_tokenizer, "<r1>", "<r1>")
    with pytest.raises(ValueError, match=r"text_tokenizer: .* does not exist"):
        load_text_tokenizer(tmp_path / "nothing")
    with pytest.raises(ValueError, match="captions: no text"):
        train_sentencepiece(["", "  "], tmp_path)
    with pytest.raises(ValueError, match=r"vocab_size: 265 leaves no room beside the 262 .*; use --vocab-size 512"):
        train_sentencepiece(CAPTIONS, tmp_path, 265)


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_damaged_tokenizer_files_are_named(content, text_tokenizer, word_tokenizer, tmp_path):
    """One ValueError with the file's name, for a sentencepiece model cut short as well."""
    text_tokenizer.save_pretrained(tmp_path / "pieces")
    file = tmp_path / "pieces" / "sentencepiece.model"
    file.write_bytes(file.read_bytes()[:-20] if content is None else content)
    with pytest.raises(ValueError, match=r"model_file: '.*sentencepiece.model' (cannot be read|has no <boi>)"):
        load_text_tokenizer(tmp_path / "pieces")
    TransformersTokenizer(word_tokenizer, "<r1>", "<r2>").save_pretrained(tmp_path / "words")
    for name in ("image_tokens.json", "tokenizer.json"):
        file = tmp_path / "words" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-5] if content is None else content)
        with pytest.raises(ValueError, match=r"text_tokenizer: '.*words.*' (is not JSON|holds no tokenizer)"):
            load_text_tokenizer(tmp_path / "words")
        file.write_bytes(whole)


@pytest.mark.parametrize("vocab_size", [300, 1024])
def test_more_characters_than_the_vocabulary_has_room_for(vocab_size, tmp_path):
    """The frequent ones become pieces, the rare ones bytes; every caption survives."""
    rng = np.random.default_rng(0)
    rare = ["".join(chr(0x4E00 + code) for code in rng.integers(0, 3000, 12)) for _ in range(400)]
    captions = [f"一只{text}的图片" for text in rare]
    tokenizer = train_sentencepiece(captions, tmp_path, vocab_size)
    assert tokenizer.vocab_size <= vocab_size
    assert all(tokenizer.decode(tokenizer.encode(caption)) == caption for caption in captions)
    assert len(tokenizer.encode("一只")) <= 3 < len(tokenizer.encode("\u9fa5\u9fa4"))


def test_long_captions_are_not_left_out(tmp_path):
    """sentencepiece leaves out texts of more than 4192 bytes unless it is asked not to."""
    tokenizer = train_sentencepiece(["zebra " * 2000] * 3 + ["a cat"], tmp_path, 300)
    assert len(tokenizer.encode("zebra")) <= 2
