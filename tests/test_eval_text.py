"""What a pipeline says about images: scores of captions, accuracy beside blind guesses, and the script from data to files."""

import json
import math

import datasets
import numpy as np
import pytest
import torch
from colour_clip import ColourModel, pixels
from conftest import refused, run_script
from PIL import Image

import prepare_shapes_chat
import unified_eval.caption_metrics as scores
from unified.conversation import DEFAULT_TEMPLATE, Turn
from unified.data.batches import Source, in_order
from unified.data.captioned import text_sequence
from unified.decoding import Sampling
from unified_eval import Clip
from unified_eval.answers import Asked, add_accuracy, answers_of, read_questions
from unified_eval.results import Results

CAPTIONS = [
    "a red star", "Two blue hearts on a white background!", "a large green cross above a small star", "a circle",
]  # fmt: skip
REFERENCES = [
    ["a red star", "one red star"], ["three blue hearts on a white background"],
    ["a large green cross to the left of a small star"], ["a yellow circle and a square"],
]  # fmt: skip


def test_cider_d_is_that_of_the_original():
    """Numbers of pycocoevalcap 1.2 on the same words in lower case."""
    expected = [5.306694990624914, 8.041666666666668, 3.9927537146156666, 1.00092175364601]
    assert scores.cider_scores(CAPTIONS, REFERENCES) == pytest.approx(expected, rel=1e-9)
    assert scores.cider_scores(["a red star in a box", ""], [["a red star in a box"], ["a cat"]])[0] == pytest.approx(
        10
    )
    assert scores.cider_scores(["", "a cat"], [["a red star"], ["a cat"]])[0] == 0
    with pytest.raises(ValueError, match="references: 1 sets for 2 captions"):
        scores.cider_scores(["a", "b"], [["a"]])


def test_scores_of_captions():
    results = Results([], resamples=20)
    scores.add_caption_scores(results, CAPTIONS, REFERENCES)
    assert results.metrics["caption_exact"] == 0.25
    assert results.metrics["cider_d"] == pytest.approx(4.585509281388315)
    low, high = results.intervals["bleu4"]
    assert 0 < low < results.metrics["bleu4"] < high < 100
    assert results.recipes["bleu4"]["formula"].startswith("nrefs:var|case:mixed|")
    results = Results([], resamples=0)
    scores.add_caption_scores(results, ["one two three four five"] * 2, [["one two three four five"]] * 2)
    assert results.metrics["bleu4"] == pytest.approx(100) and results.values["bleu4"].interval is None


def test_bleu_4_by_hand():
    """One word of ten is wrong, and with it two pairs of nine and so on; the caption is as long as its reference."""
    reference = "a b c d e f g h i j"
    results = Results([], resamples=0)
    scores.add_caption_scores(results, ["a b c d x f g h i j"], [[reference]])
    precisions = [9 / 10, 7 / 9, 5 / 8, 3 / 7]
    assert results.metrics["bleu4"] == pytest.approx(100 * math.prod(precisions) ** 0.25)


class WordTokenizer:
    context_length = 2
    words = ("", "red", "green", "blue")

    def __call__(self, texts, context_length: int = 2) -> torch.Tensor:
        rows = [([self.words.index(word) for word in text.split()] + [0] * 9)[:context_length]
                for text in ([texts] if isinstance(texts, str) else texts)]  # fmt: skip
        return torch.tensor(rows)


def test_captions_find_their_images():
    """One finds its image, one another's; an empty one and one that is too long find nothing."""
    clip = Clip(ColourModel(), pixels, WordTokenizer(), "words")
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    images = [Image.new("RGB", (4, 4), colour) for colour in colours]
    results = Results([], resamples=0)
    said = ["red", "blue", "", "red red green"]
    scores.add_retrieval(results, clip, images, said, ["red", "green", "blue", "red red green"])
    assert results.metrics["retrieval_r1"] == 0.25 and results.metrics["retrieval_r1_references"] == 0.75
    assert results.metrics["caption_clip_score"] == pytest.approx(25)
    assert results.recipes["retrieval_r1"]["chance"] == 0.25


def asked(kind, text, answer, row):
    return Asked([Turn("user", (text,))], text, answer, kind, row)


def test_accuracy_stands_beside_blind_guesses():
    given = [asked("color", "color?", "red", 0), asked("color", "color?", "red", 1), asked("color", "color?", "blue", 2),
             asked("count", "stars?", "two", 3), asked("count", "hearts?", "one", 4)]  # fmt: skip
    training = [asked("color", "color?", "blue", 0), asked("count", "stars?", "two", 1), asked("count", "stars?", "one", 2),
                asked("count", "stars?", "two", 3)]  # fmt: skip
    results = Results([], seed=0)
    add_accuracy(results, given, ["Red.", "blue", "blue", "two", ""], training)
    assert results.metrics == pytest.approx({
        "vqa_accuracy": 3 / 5, "vqa_majority": 3 / 5, "vqa_blind": 2 / 5, "vqa_color": 2 / 3, "vqa_color_majority": 2 / 3,
        "vqa_count": 1 / 2, "vqa_count_majority": 1 / 2, "vqa_kind_mean": 7 / 12,
    })  # fmt: skip
    low, high = results.intervals["vqa_accuracy"]
    assert 0.2 < low < 0.6 < high < 0.9
    assert results.values["vqa_majority"].given and results.values["vqa_majority"].bound.of == "vqa_accuracy"
    with pytest.raises(ValueError, match="answers: 1 for 5 questions"):
        add_accuracy(results, given, ["red"])


@pytest.fixture(scope="module")
def chat_data(tmp_path_factory):
    folders = {drawn: tmp_path_factory.mktemp("chat") / "data" for drawn in (False, True)}
    for drawn, folder in folders.items():
        prepare_shapes_chat.build(16, 14, 7, 0, drawn=drawn).save_to_disk(folder)
    return folders


def test_first_questions_are_read(chat_data):
    found = read_questions(str(chat_data[False]), "validation")
    assert [each.kind for each in found] == list(prepare_shapes_chat.ANSWERS)
    assert found[0].text == "how many triangles are there?" or found[0].text.startswith("how many ")
    assert len(read_questions(str(chat_data[False]), "train", most=3)) == 3
    with pytest.raises(ValueError, match="has no question with an answer"):
        read_questions(str(chat_data[True]), "validation")
    with pytest.raises(ValueError, match="messages_column: 'talk' is not a column of the source"):
        read_questions(str(chat_data[False]), "validation", ("images", "talk"))


def test_a_question_follows_the_pipelines_own_reply(pipeline, chat_data, monkeypatch):
    """And stands alone where that is empty."""
    questions, calls = read_questions(str(chat_data[False]), "validation", most=2), []

    def chat(conversations, *given):
        calls.append([list(map(shape, messages)) for messages in conversations])
        return [["one red star"], [" "]] if len(calls) == 1 else [["red"], ["two"]]

    def shape(message):
        parts = message["content"]
        return (message["role"], parts if isinstance(parts, str) else [part.get("text") for part in parts])

    monkeypatch.setattr(pipeline, "chat", chat)
    said = list(answers_of(pipeline, questions, ask_first="list!"))
    assert said == [("red", "one red star"), ("two", " ")]
    words = [each.text for each in questions]
    request = ("user", [None, "list!"])
    assert calls[0] == [[request]] * 2
    assert calls[1] == [[request, ("assistant", "one red star"), ("user", words[:1])], [("user", [None, words[1]])]]


def test_the_script_from_data_to_files(pipeline, chat_data, picture_source, tmp_path, monkeypatch, capsys):
    pipeline.model.config.chat_template = DEFAULT_TEMPLATE
    pipeline.save_pretrained(tmp_path / "pipeline")
    options = ["--pipeline", tmp_path / "pipeline", "--out", tmp_path / "out", "--max-new-tokens", 4, "--resamples", 5]
    run_script(monkeypatch, "evaluate_text.py", *options, "--questions", chat_data[False], "--captions", picture_source,
               "--texts", picture_source, "--text-column", "caption", "--max-length", 20)  # fmt: skip
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    captions = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert len(answers) == 7 and len(captions) == 6 == len({each["caption"] for each in captions})
    right = np.mean([each["said"] == each["answer"] for each in answers])
    assert metrics["metrics"]["vqa_accuracy"] == right
    (row,) = datasets.load_from_disk(chat_data[False])["validation"].select([0])
    shown, text = row["images"][0], row["messages"][0]["content"][1]["text"]
    reply = pipeline.chat(
        [{"role": "user", "content": [{"type": "image", "image": shown}, {"type": "text", "text": text}]}],
        4, 0, Sampling(top_k=1),
    )  # fmt: skip
    assert " ".join(reply) == answers[0]["said"]
    run_script(monkeypatch, "evaluate_text.py", *options[:2], *options[4:], "--out", tmp_path / "first", "--questions",
               chat_data[False], "--ask-first", "list the shapes.")  # fmt: skip
    asked_first = json.loads((tmp_path / "first" / "answers.jsonl").read_text().splitlines()[0])
    request = {
        "role": "user",
        "content": [{"type": "image", "image": shown}, {"type": "text", "text": "list the shapes."}],
    }
    first = pipeline.chat([request], 4, 0, Sampling(top_k=1))
    assert asked_first["said_first"] == " ".join(first)
    turns = [request, {"role": "assistant", "content": " ".join(first)}, {"role": "user", "content": text}]
    assert asked_first["said"] == " ".join(pipeline.chat(turns, 4, 0, Sampling(top_k=1)))
    rule = json.loads((tmp_path / "first" / "metrics.json").read_text())["recipes"]["vqa_accuracy"]["formula"]
    assert rule == "exact match in lower case, after its own reply to 'list the shapes.'"
    held_out = datasets.load_from_disk(picture_source)["validation"].select_columns("caption")
    source = Source("texts", held_out, lambda row, rng: text_sequence(
        row, rng, pipeline.text_tokenizer, pipeline.model.config.vocabulary, "caption", 20))  # fmt: skip
    total = targets = 0.0
    for batch in in_order(source, pipeline.model.config, 1):
        total += float(pipeline.model(**batch.inputs).text_loss.detach()) * batch.counts.text_targets
        targets += batch.counts.text_targets
    assert metrics["metrics"]["text_perplexity"] == pytest.approx(math.exp(total / targets), rel=1e-4)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| exact answers |" in report and "| BLEU-4, 0 to 100 |" in report and "evaluate_text.py" in report
    assert "vqa_accuracy" in json.loads((tmp_path / "out" / "values.json").read_text())["values"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--questions, --captions, --texts: none is given; name what to measure."),
        (["--questions", "x", "--ask", "what?"], "--ask: it is for --captions; give those, or leave it out."),
        (["--questions", "x", "--clip", "c"], "--clip: it is for --captions"),
        (["--texts", "x", "--batch-size", "0"], "--batch-size: 0 is below 1."),
        (["--texts", "x", "--resamples", "1"], "--resamples: 1 gives no interval"),
        (["--texts", "x", "--seed", "-1"], "--seed: -1 is below 0."),
        (["--texts", "x", "--max-length", "1"], "--max-length: 1 is below 2."),
    ],
)
def test_mistakes_are_one_line(options, message, tmp_path, monkeypatch, capsys):
    line = refused(monkeypatch, capsys, "evaluate_text.py", "--pipeline", "p", "--out", tmp_path, *options)
    assert message in line


def test_a_model_without_conversations_is_not_asked(pipeline, chat_data, tmp_path, monkeypatch, capsys):
    pipeline.save_pretrained(tmp_path / "pipeline")
    options = ["--pipeline", tmp_path / "pipeline", "--out", tmp_path / "out", "--questions", chat_data[False]]
    assert "trained without a chat template" in refused(monkeypatch, capsys, "evaluate_text.py", *options)
