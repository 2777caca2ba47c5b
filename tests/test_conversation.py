"""Replies of a model: texts that can be handed back, and where they end."""

import io
from itertools import pairwise

import pytest
import torch
from conftest import generators
from PIL import Image

from unified.chat_loop import HELP, chat_loop
from unified.cli import main
from unified.conversation import DEFAULT_TEMPLATE, Turn, conversation_segments
from unified.decoding import Sampling
from unified.pipeline.chat import continue_conversations
from unified.sequence import build_sequence
from unified_tokenizers.images import to_tensor


@pytest.fixture
def says(pipeline, monkeypatch):
    """Makes the model all but certain of one token for every text position in turn; the last one stays."""

    def script(*tokens: int) -> None:
        left = list(tokens)

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            row = torch.zeros(pipeline.text_tokenizer.vocab_size)
            row[left.pop(0) if len(left) > 1 else left[0]] = 500.0
            return row.expand(len(hidden), -1).clone()

        monkeypatch.setattr(pipeline.decoder(), "text_logits", logits)

    return script


def test_replies_can_be_handed_back(pipeline, says):
    """A word boundary alone has no text, so it is no message."""
    tokenizer = pipeline.text_tokenizer
    space = tokenizer.processor.piece_to_id("▁")
    assert space != tokenizer.processor.unk_id() and tokenizer.decode([space]) == ""
    word = tokenizer.encode("blue car")
    says(space, tokenizer.boi_token_id, *word, tokenizer.eos_token_id)
    reply = pipeline.chat(["red apple"], max_new_tokens=20, generator=generators(0))
    assert [type(message) for message in reply] == [Image.Image, str] and reply[1] == "blue car"
    says(space, tokenizer.eos_token_id)
    assert pipeline.chat(["red apple", *reply], generator=generators(0)) == []
    assert pipeline.caption(reply[0], top_k=1) == [""]


@pytest.mark.parametrize("last", [0, 1])
def test_any_eos_ends_a_text(pipeline, photo, says, last):
    """A backbone may have several, as chat models do; here the second one is also the padding."""
    tokenizer, text = pipeline.text_tokenizer, pipeline.model.config.text_config
    text.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    text.pad_token_id = tokenizer.pad_token_id
    assert pipeline.model.config.vocabulary.eos_token_id == tokenizer.eos_token_id
    says(*tokenizer.encode("blue car"), text.eos_token_id[last], *tokenizer.encode("dog"))
    assert pipeline.caption(photo, max_new_tokens=30) == ["blue car"]


def test_sizes_are_checked_before_anything_is_encoded(pipeline, photo, monkeypatch):
    def encode(pixels):
        raise AssertionError("encoded")

    monkeypatch.setattr(pipeline.image_tokenizer, "encode", encode)
    large = photo.resize((48, 48))
    for ask in (lambda: pipeline.caption(large), lambda: pipeline.chat(["red apple", large])):
        with pytest.raises(ValueError, match="image: 48x48 is not a size that the model was trained on"):
            ask()
    with pytest.raises(ValueError, match="messages: 3 is not a conversation"):
        pipeline.chat(3)


@pytest.mark.process
def test_captions_of_a_model_that_names_no_grids(pipeline, photo):
    expected = pipeline.caption(photo, generator=generators(0))
    pipeline.model.config.image_grids = None
    assert pipeline.caption(photo, generator=generators(0)) == expected
    with pytest.raises(ValueError, match="height, width: the model does not say which grids"):
        pipeline.chat(["red apple"], max_images=1)


def test_sampling_reaches_the_text(pipeline):
    likely = pipeline.chat(["red apple"], 6, 0, Sampling(top_k=1), generator=generators(0))
    assert likely == pipeline.chat(["red apple"], 6, 0, Sampling(top_k=1), generator=generators(1))
    hot = [pipeline.chat(["red apple"], 6, 0, Sampling(temperature=9.0), generator=generators(i)) for i in range(3)]
    assert hot[0] != hot[1] or hot[1] != hot[2]


@pytest.mark.process
def test_images_are_guided_as_in_a_call(pipeline, photo, says):
    """After the same row, a conversation generates the image that a call generates by default."""
    says(pipeline.text_tokenizer.boi_token_id)
    reply = pipeline.chat(["red apple"], max_new_tokens=1, generator=generators(5))
    assert reply[0].tobytes() == pipeline("red apple", generator=generators(5)).images[0].tobytes()
    unguided = pipeline.chat(["red apple"], 1, image_sampling=Sampling(), generator=generators(5))
    assert unguided[0].tobytes() != reply[0].tobytes()


@pytest.mark.parametrize("ends", ["with a token", "at the limit"])
def test_a_text_is_shown_while_it_grows(pipeline, says, ends):
    tokenizer, texts = pipeline.text_tokenizer, []
    words = tokenizer.encode("blue car")
    says(*words, *([tokenizer.eos_token_id] if ends == "with a token" else words))
    limit = 20 if ends == "with a token" else len(words)
    reply = pipeline.chat(["red apple"], limit, generator=generators(0), callback_on_text=texts.append)
    assert reply == ["blue car"] and texts[-1].strip() == "blue car" and len(texts) >= len(words) > 1
    assert all(after.startswith(before) for before, after in pairwise(texts))


def test_a_streamed_reply_grows_to_that_of_a_call(pipeline, says, photo):
    tokenizer = pipeline.text_tokenizer
    script = [*tokenizer.encode("blue car"), tokenizer.boi_token_id, *tokenizer.encode("dog"), tokenizer.eos_token_id]
    says(*script)
    expected = pipeline.chat(["red apple"], 20, generator=generators(5))
    says(*script)
    shown = list(pipeline.stream_chat(["red apple"], 20, generator=generators(5)))
    as_bytes = [[part if isinstance(part, str) else part.tobytes() for part in reply] for reply in [*shown, expected]]
    assert as_bytes[-2] == as_bytes[-1] and [type(part) for part in expected] == [str, Image.Image, str]
    assert [len(reply) for reply in as_bytes] == sorted(len(reply) for reply in as_bytes) and len(shown) > 4
    assert all("blue car".startswith(reply[0]) for reply in as_bytes if reply)
    with pytest.raises(ValueError, match="max_new_tokens: 0"):
        pipeline.stream_chat(["red apple"], 0)
    with pytest.raises(ValueError, match="image: 8x8 is not a size"):
        pipeline.stream_chat([photo.resize((8, 8))])


def test_texts_and_images_in_turn(pipeline, says, photo, tmp_path, capsys):
    tokenizer, saved = pipeline.text_tokenizer, []

    def save(image, prompt):
        saved.append((image, prompt))
        return tmp_path / f"{len(saved)}.png"

    photo.save(tmp_path / "photo.png")
    says(*tokenizer.encode("blue car"), tokenizer.eos_token_id)
    lines = ["/generate red apple\n", f"/show {tmp_path}/photo.png\n", "/show nothing.png\n", "\n", "what is this?\n", "/hm\n",
             "/new\n", "/quit\n", "never read\n"]  # fmt: skip
    chat_loop(pipeline, lines, save, 20, 1, Sampling(), *generators(3))
    assert [prompt for _, prompt in saved] == ["red apple"]
    assert saved[0][0].tobytes() == pipeline("red apple", generator=generators(3)).images[0].tobytes()
    out = capsys.readouterr().out.splitlines()
    without_help = [line for line in out if line not in HELP.splitlines()]
    assert without_help[0] == str(tmp_path / "1.png") and without_help[2:] == ["blue car"]
    assert without_help[1].startswith("unified chat: ") and "nothing.png" in without_help[1]
    assert len(out) - len(without_help) == 2 * len(HELP.splitlines())  # at the start, and for an unknown command


def test_a_model_of_conversations_hears_who_speaks(pipeline, says, photo, monkeypatch):
    """Roles in the template; a list without roles is a turn of the user; captions stay what they were."""
    tokenizer, prompts = pipeline.text_tokenizer, []
    says(*tokenizer.encode("blue car"), tokenizer.eos_token_id)
    plain = pipeline.caption(photo, generator=generators(0))
    pipeline.model.config.chat_template = DEFAULT_TEMPLATE
    kept = continue_conversations

    def spy(decoder, read, *args, **options):
        prompts.append(read)
        return kept(decoder, read, *args, **options)

    monkeypatch.setattr("unified.pipeline.text.continue_conversations", spy)
    asked = [{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": "red apple"}]}]
    says(*tokenizer.encode("blue car"), tokenizer.eos_token_id)
    assert pipeline.chat(asked, generator=generators(0)) == ["blue car"]
    says(*tokenizer.encode("blue car"), tokenizer.eos_token_id)
    assert pipeline.chat([photo, "red apple"], generator=generators(0)) == ["blue car"]
    codes = pipeline.image_tokenizer.encode(to_tensor([photo]))[0]
    expected = conversation_segments([Turn("user", (codes, "red apple"))], tokenizer, DEFAULT_TEMPLATE, reply=True)
    vocabulary = pipeline.model.config.vocabulary
    ids = build_sequence(expected, vocabulary).input_ids.tolist()
    assert [build_sequence(read[0], vocabulary).input_ids.tolist() for read in prompts] == [ids, ids]
    says(*tokenizer.encode("blue car"), tokenizer.eos_token_id)
    assert pipeline.caption(photo, generator=generators(0)) == plain
    for messages, error in (
        ([*asked, {"role": "assistant", "content": "a"}], "messages: the assistant spoke last"),
        (
            [{"role": "user", "content": [{"type": "image", "image": 5}]}],
            "messages: 5 is neither a text nor a PIL image",
        ),
        ([{"role": "user", "content": [{"type": "image", "image": photo.resize((8, 8))}]}], "image: 8x8 is not a size"),
    ):
        with pytest.raises(ValueError, match=error):
            pipeline.chat(messages)


def test_the_loop_keeps_who_said_what(pipeline, says, photo, tmp_path, monkeypatch, capsys):
    """An image that is shown belongs to the next line; other sizes are fitted, too small ones refused."""
    pipeline.model.config.chat_template = DEFAULT_TEMPLATE
    tokenizer, heard = pipeline.text_tokenizer, []
    says(*tokenizer.encode("blue car"), tokenizer.eos_token_id)
    kept = pipeline.chat

    def spy(messages, *args, **options):
        heard.append(list(messages))
        return kept(messages, *args, **options)

    monkeypatch.setattr(pipeline, "chat", spy)
    photo.resize((48, 32)).save(tmp_path / "large.png")
    photo.resize((8, 48)).save(tmp_path / "small.png")
    lines = [f"/show {tmp_path}/small.png", f"/show {tmp_path}/large.png", "what is this?", "and now?"]
    chat_loop(pipeline, lines, None, 20, 0, Sampling(), *generators(3))
    out = [line for line in capsys.readouterr().out.splitlines() if line not in HELP.splitlines()]
    assert out == ["unified chat: image: 48x8 is too small, the model reads 16x16; give a larger one.", "blue car"]
    assert [message["role"] for message in heard[1]] == ["user", "assistant", "user"]
    first = heard[0][0]["content"]
    assert first[0]["image"].size == (16, 16) and first[1] == {"type": "text", "text": "what is this?"}
    assert heard[1][1]["content"] == [{"type": "text", "text": "blue car"}]


def test_an_answer_with_an_image_is_saved(pipeline, says, tmp_path, monkeypatch, capsys):
    """The command; what a model of these settings replies is one image."""
    pipeline.save_pretrained(tmp_path / "pipeline")
    says(pipeline.text_tokenizer.boi_token_id)
    monkeypatch.setattr("unified.commands._load", lambda args: pipeline)
    monkeypatch.setattr("sys.stdin", io.StringIO("red apple\n"))
    arguments = ["--pipeline", str(tmp_path / "pipeline"), "--out", str(tmp_path / "out"), "--max-new-tokens", "1"]
    assert main(["chat", *arguments, "--seed", "5"]) == 0
    file = tmp_path / "out" / "000-red-apple.png"
    assert capsys.readouterr().out.splitlines()[-1] == str(file)
    assert Image.open(file).tobytes() == pipeline("red apple", generator=generators(5)).images[0].tobytes()
