"""Chat rows: conversations of roles in a template, of which the replies alone are in the loss."""

import datasets
import numpy as np
import pytest
import torch
from conftest import text_config
from PIL import Image

from unified import UnifiedPipeline
from unified.config import UnifiedConfig
from unified.conversation import DEFAULT_TEMPLATE, Turn, conversation_segments, read_messages, template_of
from unified.data.chat import chat_sequence, chat_texts, encode_chat
from unified.data.code_cache import load_codes
from unified.data.crops import fit
from unified.data.rows import SkipReport
from unified.decoding import Sampling
from unified.pipeline.chat import message
from unified.sequence import IGNORE, build_sequence
from unified.training.config import load_config
from unified.training.loop import train
from unified.training.tracking import read_log
from unified_tokenizers import TransformersTokenizer
from unified_tokenizers.images import to_pil, to_tensor
from unified_tokenizers.text import train_sentencepiece

TEXT = datasets.Value("string")
# A template as published models have it: it trims, names its own tokens, and opens the assistant's turn when asked.
TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ '<r1> ' + m['role'] + ' ' + m['content'] | trim + ' <r2> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<r1> assistant ' }}{% endif %}"
)


def user(*parts):
    return {
        "role": "user",
        "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts],
    }


def assistant(text):
    return {"role": "assistant", "content": text}


def supervised(segments, config):
    """What the model is to write, in words: the pieces in the loss, images as <image>."""
    sequence = build_sequence(segments, config.vocabulary)
    ids, vocabulary = sequence.labels[sequence.labels != IGNORE].tolist(), config.vocabulary
    return [number if number < vocabulary.text_vocab_size else "code" for number in ids]


def test_only_replies_are_in_the_loss(text_tokenizer):
    config, encode = text_config(text_tokenizer), text_tokenizer.encode
    codes = torch.arange(4).reshape(2, 2)
    turns = [Turn("user", (codes, "red apple")), Turn("assistant", ("blue car",)), Turn("user", ("yellow sun",)),
             Turn("assistant", (codes,))]  # fmt: skip
    segments = conversation_segments(turns, text_tokenizer, DEFAULT_TEMPLATE)
    eos, boi, eoi = text_tokenizer.eos_token_id, text_tokenizer.boi_token_id, text_tokenizer.eoi_token_id
    shown = [boi, *(codes.flatten() + config.vocabulary.text_vocab_size).tolist(), eoi]
    assert build_sequence(segments, config.vocabulary).input_ids.tolist() == [
        text_tokenizer.bos_token_id, *encode("user"), *shown, *encode("red apple"), eos, *encode("assistant"),
        *encode("blue car"), eos, *encode("user"), *encode("yellow sun"), eos, *encode("assistant"), *shown, eos,
    ]  # fmt: skip
    assert supervised(segments, config) == [*encode("blue car"), eos, boi, *["code"] * 4, eoi, eos]


def test_a_prompt_ends_where_the_reply_begins(text_tokenizer):
    """What is sampled goes on exactly as in training."""
    turns = [Turn("user", ("red apple",)), Turn("assistant", ("blue car",))]
    config = text_config(text_tokenizer)
    whole = build_sequence(conversation_segments(turns, text_tokenizer, DEFAULT_TEMPLATE), config.vocabulary)
    prompt = build_sequence(
        conversation_segments(turns[:1], text_tokenizer, DEFAULT_TEMPLATE, reply=True), config.vocabulary
    )
    length = len(prompt.input_ids)
    assert torch.equal(whole.input_ids[:length], prompt.input_ids)
    assert (whole.labels[:length] == IGNORE).all() and (whole.labels[length:] != IGNORE).all()


def test_a_template_of_transformers_reads_as_there(word_tokenizer):
    """The ids of ``apply_chat_template``; what a text spells is no special token."""
    word_tokenizer.chat_template = TURNS
    try:
        tokenizer = TransformersTokenizer(word_tokenizer, "<r1>", "<r2>")
        assert tokenizer.chat_template == TURNS
        messages = [{"role": "system", "content": "the"}, {"role": "user", "content": " red apple "},
                    {"role": "assistant", "content": "blue car"}]  # fmt: skip
        turns = read_messages(messages)
        segments = conversation_segments(turns, tokenizer, TURNS)
        config = UnifiedConfig(
            text_config={"model_type": "llama", "vocab_size": 60, "bos_token_id": word_tokenizer.bos_token_id},
            boi_token_id=tokenizer.boi_token_id, eoi_token_id=tokenizer.eoi_token_id,
        )  # fmt: skip
        ids = build_sequence(segments, config.vocabulary).input_ids.tolist()
        assert ids == word_tokenizer.apply_chat_template(messages, return_dict=False)
        assert supervised(segments, config) == [*tokenizer.encode("blue car"), tokenizer.eoi_token_id]
        (typed,) = (
            s.ids for s in conversation_segments([Turn("user", ("red <r1>",))], tokenizer, "{{ messages[0].content }}")
        )
        assert len(typed) > 1 and tokenizer.boi_token_id not in typed
    finally:
        word_tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("messages", "images", "message"),
    [
        ([], None, r"messages: \[\] is no conversation"),
        ("hello", None, "messages: 'hello' is no conversation"),
        ([assistant("red")], None, "messages: nobody asks anything; add a turn of the role user"),
        (
            [{"role": "bot", "content": "a"}],
            None,
            r"messages\[0\]: role 'bot' of .* is unknown; use one of system, user",
        ),
        ([{"content": "a"}], None, r"messages\[0\]: role None"),
        ([user("a"), {"role": "system", "content": "b"}], None, r"messages\[1\]: the system speaks after others"),
        ([user(None, "what is this?")], None, r"messages\[0\]: a place of an image without one; give the image"),
        ([user("what is this?")], ["pixels"], "images: 1 more than the messages have places"),
        ([user(" ")], None, r"messages\[0\]: it says nothing"),
        (
            [user("a"), {"role": "assistant", "content": 5}],
            None,
            r"messages\[1\]: content 5 is neither a text nor a list",
        ),
        ([{"role": "user", "content": [{"type": "video"}]}], None, r"messages\[0\]: \{'type': 'video'\} is none of"),
    ],
)
def test_what_is_no_conversation_is_named(messages, images, message):
    with pytest.raises(ValueError, match=message):
        read_messages(messages, images)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['role'] }}", "chat_template: it does not write 'red' once"),
        ("{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.content }}{% endfor %}", "does not write 'red' once"),
        ("{% for m in messages %}{{ m.role }}", "chat_template: it cannot write turns of user, assistant"),
        ("{{ raise_exception('no assistant here') }}", "cannot write turns of user, assistant .*no assistant here"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.role + m.content }}{% endfor %}",
            "does not go on from the prompt",
        ),
    ],
)
def test_templates_that_cannot_be_learned_are_refused(text_tokenizer, template, message):
    with pytest.raises(ValueError, match=message):
        conversation_segments([Turn("user", ("red",)), Turn("assistant", ("car",))], text_tokenizer, template)


def test_a_template_without_roles_is_refused(text_tokenizer):
    with pytest.raises(
        ValueError, match=r"chat_template: .* must be null or a Jinja template that looks at message\['role'\]"
    ):
        UnifiedConfig(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(
        ValueError, match="messages: they have roles, and the model was trained without a chat template"
    ):
        template_of(UnifiedConfig(), text_tokenizer)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """A saved data set of conversations; three rows cannot be used."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (16, 16 + 8 * i, 3), dtype=np.uint8)) for i in range(2)]
    rows = [
        ([user(None, "red apple"), user("blue car"), assistant_list("yellow sun")], [images[0]]),
        ([user("blue car"), assistant_list("the small dog")], []),
        ([user("blue car")], []),
        ([user(None, "blue car"), assistant_list("red")], []),
        ([user(None, None, "a cat"), assistant_list("a dog")], [images[1], images[0]]),
        ([user(None, "red"), assistant_list("red")], [{"bytes": b"broken", "path": None}]),
    ]
    features = datasets.Features(
        images=datasets.List(datasets.Image()),
        messages=datasets.List({"role": TEXT, "content": datasets.List({"type": TEXT, "text": TEXT})}),
    )
    rows = [{"messages": messages, "images": shown} for messages, shown in rows]
    folder = tmp_path_factory.mktemp("chat") / "rows"
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows, features=features)).save_to_disk(folder)
    return str(folder), images


def assistant_list(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


@pytest.mark.parametrize("options", [{}, {"block_rows": 2, "batch_size": 1}, {"streaming": True}])
def test_conversations_are_encoded_once(image_tokenizer, text_tokenizer, conversations, tmp_path, options):
    source, images = conversations
    report = encode_chat(image_tokenizer, source, tmp_path / "codes", ("train",), (16, 16), **options)["train"]
    assert (report.used, report.corrupt_image, report.unreadable_row) == (3, 1, 2)
    assert "row 2: unreadable row (messages: nobody replies" in report.summary()
    assert "row 3: unreadable row (messages[0]: a place of an image without one" in report.summary()
    rows = load_codes(tmp_path / "codes", "train", image_tokenizer.fingerprint, "chat").with_format(None)
    shown = [image_tokenizer.encode(to_tensor([fit(image, 16)]))[0] for image in images]
    expected = [
        [Turn("user", (shown[0], "red apple")), Turn("user", ("blue car",)), Turn("assistant", ("yellow sun",))],
        [Turn("user", ("blue car",)), Turn("assistant", ("the small dog",))],
        [Turn("user", (shown[1], shown[0], "a cat")), Turn("assistant", ("a dog",))],
    ]
    vocabulary = text_config(text_tokenizer).vocabulary
    for row, turns in zip(rows, expected, strict=True):
        made = chat_sequence(row, None, text_tokenizer, vocabulary, DEFAULT_TEMPLATE, 512)
        reference = build_sequence(conversation_segments(turns, text_tokenizer, DEFAULT_TEMPLATE), vocabulary)
        assert torch.equal(made.input_ids, reference.input_ids) and torch.equal(made.labels, reference.labels)
        assert made.image_grids == reference.image_grids
    report = SkipReport()
    said = list(chat_texts(datasets.load_from_disk(source)["train"], report))
    assert said[:6] == ["user", "red apple", "user", "blue car", "assistant", "yellow sun"] and report.used == 4


def test_whole_exchanges_are_left_out_of_long_rows(text_tokenizer):
    vocabulary = text_config(text_tokenizer).vocabulary
    row = {"texts": ["red apple", "blue car", "yellow sun", "a cat"], "roles": ["user", "assistant"] * 2, "codes": [],
           "heights": [], "widths": []}  # fmt: skip

    def length(limit, **change):
        return len(chat_sequence(row | change, None, text_tokenizer, vocabulary, DEFAULT_TEMPLATE, limit).input_ids)

    whole = length(512)
    short = length(whole - 1)
    first = conversation_segments(
        [Turn("user", ("red apple",)), Turn("assistant", ("blue car",))], text_tokenizer, DEFAULT_TEMPLATE
    )
    assert short == len(build_sequence(first, vocabulary).input_ids) < whole
    with pytest.raises(
        ValueError, match=f"max_length: {short - 1} has no room for the first reply of a row, which needs {short}"
    ):
        length(short - 1)
    for change, error in (
        ({"roles": ["user"] * 4}, "roles: .* are no conversation"),
        ({"roles": [None, "user", "assistant", None]}, "roles: .* are no conversation"),
        ({"texts": ["red apple", None, "yellow sun", "a cat"]}, "texts: .* for 0 images"),
    ):
        with pytest.raises(ValueError, match=error):
            length(512, **change)


@pytest.mark.process
def test_a_run_learns_to_talk_and_to_draw(config_file, tmp_path, photo):
    """One conversation of each sort, learned by heart; the template is saved with the pipeline, and a reply ends by itself."""
    features = datasets.Features(
        images=datasets.List(datasets.Image()),
        messages=datasets.List({"role": TEXT, "content": datasets.List({"type": TEXT, "text": TEXT})}),
    )
    drawing = {"role": "assistant", "content": [{"type": "image"}]}
    rows = [
        {"images": [photo], "messages": [user(None, "red apple"), assistant_list("yellow sun"), user("a cat"),
                                         assistant_list("a dog")]},
        {"images": [photo.rotate(90)], "messages": [user(None, "red apple"), assistant_list("blue car")]},
        {"images": [photo], "messages": [user("the small dog"), drawing]},
    ]  # fmt: skip
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows, features=features)).save_to_disk(tmp_path / "rows")
    options = [
        "data.train=null", "steps=140", "validate_every=140", "checkpoint_every=null", "schedule.patch_sizes=[2,1]",
        "schedule.shares=[0.2,0.8]", "schedule.decay=0.5", "optimizer.ema_decay=null", f"output_dir={tmp_path}",
        f"data.sources=[{{path: {tmp_path}/rows, kind: chat, max_length: 99, validation_split: train}}]",
    ]  # fmt: skip
    train(load_config(config_file, options))
    pipe = UnifiedPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.model.config.chat_template == DEFAULT_TEMPLATE
    assert "Conversations" in (tmp_path / "pipeline" / "README.md").read_text()
    assert read_log(tmp_path)[-1]["chat_validation_loss"] < 0.1
    likely = Sampling(top_k=1)

    def ask(*messages):
        return pipe.chat(list(messages), 20, 1, likely, likely, generator=0)

    assert ask(message("user", photo, "red apple")) == ["yellow sun"]
    assert ask(message("user", photo.rotate(90), "red apple")) == ["blue car"]
    assert ask(message("user", photo, "red apple"), message("assistant", "yellow sun"), message("user", "a cat")) == [
        "a dog"
    ]
    (drawn,) = ask(message("user", "the small dog"))
    codes = pipe.image_tokenizer.encode(to_tensor([photo]))
    assert drawn.tobytes() == to_pil(pipe.image_tokenizer.decode(codes))[0].tobytes()


def test_an_adapter_needs_a_base_with_a_template(config_file, conversations, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "base")
    options = [
        f"output_dir={tmp_path}/run", "data.train=null", "validate_every=null", "checkpoint_every=null", "lora={rank: 2}",
        f"model={{pipeline: {tmp_path}/base, image_tokenizer: null, text_tokenizer: null, architecture: null}}",
        "optimizer.ema_decay=null", f"data.sources=[{{path: {conversations[0]}, kind: chat, max_length: 99}}]",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"chat rows need a chat_template, and .* has none"):
        train(load_config(config_file, options))


def test_bpe_makes_pieces_of_whole_words(tmp_path):
    texts = ["what color is it", "where is it"]
    pieces = {kind: train_sentencepiece(texts, tmp_path / kind, 320, kind) for kind in ("unigram", "bpe")}
    assert len(pieces["bpe"].encode("what color")) == 2 < len(pieces["unigram"].encode("what color"))
    with pytest.raises(ValueError, match="model_type: 'words' is unknown; use one of bpe, unigram"):
        train_sentencepiece(texts, tmp_path / "x", 320, "words")
