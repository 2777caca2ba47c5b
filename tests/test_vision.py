"""Images that are read by the features of a frozen vision encoder: a tiny SigLIP or CLIP with random weights."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CAPTIONS, inputs_of, text_config, tiny_config, tiny_model, tiny_pipeline
from PIL import Image
from test_chat_rows import TEXT, assistant_list, user
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from encode_images import main as encode_images
from unified import UnifiedForCausalLM, UnifiedPipeline
from unified.conversation import DEFAULT_TEMPLATE, Turn, conversation_segments
from unified.data.captioned import captioned_sequence
from unified.data.chat import chat_sequence, encode_chat
from unified.data.code_cache import encode_source, load_codes
from unified.data.crops import Views
from unified.data.encoding import FEATURES
from unified.decoding import Sampling, make_decoder
from unified.decoding.prefill import Prompt, prefill
from unified.lora.adapters import attach_lora
from unified.model.retrofit import add_vision, change_prediction
from unified.model.vision import VisionEncoder
from unified.pipeline.chat import message
from unified.sequence import IGNORE, FeatureSegment, ImageSegment, TextSegment, build_sequence
from unified.training.config import load_config
from unified.training.loop import train
from unified.training.tracking import read_log
from unified_tokenizers.images import to_tensor

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
KINDS = {
    "siglip": (SiglipVisionModel, SiglipVisionConfig, SiglipImageProcessor),
    "clip": (CLIPVisionModel, CLIPVisionConfig, CLIPImageProcessor),
}


def make_tower(folder, kind="siglip", seed=0):
    """A folder with a vision model that has a feature for each 8 x 8 pixels of 32 x 32."""
    model, config, processor = KINDS[kind]
    torch.manual_seed(seed)
    made = model(config(**SIZES, image_size=32, patch_size=8))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    made.save_pretrained(folder)
    processor(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return make_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def encoder(tower):
    return VisionEncoder(tower, pool=2)


def seen(tower, images, model=SiglipVisionModel, layer=-2):
    """The features ``(B, 16, F)``, by transformers alone."""
    vit = model.from_pretrained(tower).eval()
    pixels = F.interpolate(to_tensor(images) / 2 + 0.5, [32, 32], mode="bilinear", antialias=True)
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        return vit(pixel_values=pixels, output_hidden_states=True).hidden_states[layer][:, -16:]


# The encoder


@pytest.mark.parametrize(("kind", "layer"), [("siglip", -2), ("clip", 1), ("clip", -1)])
def test_features_are_those_of_the_layer(tmp_path, photo, kind, layer):
    folder = make_tower(tmp_path, kind)
    wanted = seen(folder, [photo, photo.rotate(90)], KINDS[kind][0], layer)
    images = to_tensor([photo, photo.rotate(90)])
    torch.testing.assert_close(VisionEncoder(folder, layer)(images), wanted.half())
    square = wanted.view(2, 2, 2, 2, 2, 32).mean(dim=(2, 4)).flatten(1, 2)
    found = VisionEncoder(folder, layer, pool=2)
    torch.testing.assert_close(found(images), square.half())
    assert (found.description["length"], found.description["width"]) == (4, 32)


def test_a_wide_image_is_scaled_whole(tower, encoder):
    """Nothing of it is cut off: its two halves differ, and both are seen."""
    wide = Image.new("RGB", (64, 16), "red")
    wide.paste("blue", (32, 0, 64, 16))
    torch.testing.assert_close(VisionEncoder(tower)(to_tensor([wide])), seen(tower, [wide]).half())
    left, right = (encoder(to_tensor([Image.new("RGB", (16, 16), name)])) for name in ("red", "blue"))
    assert (left - right).abs().max() > 0.1


def test_it_stays_frozen_and_keeps_its_fingerprint(tower, encoder, tmp_path, photo):
    encoder.train()
    assert not encoder.training and not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    encoder.save_pretrained(tmp_path / "kept")
    again = VisionEncoder(tmp_path / "kept", pool=2)
    assert again.description == encoder.description | {"encoder": str(tmp_path / "kept")}
    assert torch.equal(again(to_tensor([photo])), encoder(to_tensor([photo])))
    other = VisionEncoder(make_tower(tmp_path / "other", seed=1), pool=2)
    assert other.description["fingerprint"] != encoder.description["fingerprint"]


def test_the_vision_part_of_a_model_that_reads_text(tower, tmp_path, photo):
    vision = SiglipVisionModel.from_pretrained(tower)
    text = {**SIZES, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    both = SiglipModel(SiglipConfig(vision_config=vision.config.to_dict(), text_config=text))
    both.vision_model.load_state_dict(vision.state_dict())
    both.save_pretrained(tmp_path)
    shutil.copy(f"{tower}/preprocessor_config.json", tmp_path)
    ours, theirs = VisionEncoder(tmp_path), VisionEncoder(tower)
    assert ours.description["fingerprint"] == theirs.description["fingerprint"]
    assert torch.equal(ours(to_tensor([photo])), theirs(to_tensor([photo])))


def test_what_is_no_encoder(tower, tmp_path, pipeline):
    with pytest.raises(ValueError, match=r"vision\.encoder: 'runs/nowhere' does not exist on this machine"):
        VisionEncoder("runs/nowhere")
    with pytest.raises(ValueError, match=r"vision\.layer: 3 is none of the 3 hidden states"):
        VisionEncoder(tower, 3)
    with pytest.raises(ValueError, match=r"model\.options\.vision\.pool: 3 does not divide the 4x4 features"):
        VisionEncoder(tower, pool=3, field="model.options.vision.encoder")
    pipeline.model.backbone.save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"vision\.encoder: .* cannot be loaded"):
        VisionEncoder(tmp_path / "llama")
    shutil.copy(f"{tower}/preprocessor_config.json", tmp_path / "llama")
    with pytest.raises(ValueError, match=r"vision\.encoder: .* is no vision model"):
        VisionEncoder(tmp_path / "llama")
    deeper = tmp_path / "deeper"
    shutil.copytree(tower, deeper)
    content = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"vision\.encoder: .* has no .*layers\.2.* of a SiglipVisionModel"):
        VisionEncoder(deeper)
    (deeper / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 1_000_000}))
    with pytest.raises(ValueError, match=r"vision\.encoder: .* num_hidden_layers 1000000 of .* is more than the"):
        VisionEncoder(deeper)


@pytest.mark.parametrize(
    ("vision", "error"),
    [
        ({}, r"vision\.encoder: missing"),
        ({"encoder": ""}, r"vision\.encoder: '' must be a folder"),
        ({"encoder": "x", "layer": 1.5}, r"vision\.layer: 1\.5 must be a whole number"),
        ({"encoder": "x", "pool": 0}, r"vision\.pool: 0 must be a whole number of at least 1"),
        ({"encoder": "x", "pools": 2}, r"vision: 'pools' is unknown"),
        ("x", "vision: 'x' must be null or a mapping"),
    ],
)
def test_configurations_that_are_refused(vision, error):
    with pytest.raises(ValueError, match=error):
        tiny_config(vision=vision)


def test_a_model_needs_to_know_its_encoder():
    with pytest.raises(ValueError, match=r"vision: has no width; give VisionEncoder\(\.\.\.\)\.description"):
        UnifiedForCausalLM(tiny_config(vision={"encoder": "x"}))
    with pytest.raises(ValueError, match="vision: a model with conditioning reads no images"):
        tiny_config(vision={"encoder": "x"}, conditioning={"kind": "class", "classes": 2})


# The model


def vision_model(encoder, **changes):
    return tiny_model(vision=encoder.description, **changes)


def features(seed, count=4):
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed)).half()


def reading(config, seed, *answer, before=(5, 6, 7)):
    """Text, an image that is read, an answer in the loss."""
    segments = [TextSegment(before), FeatureSegment(features(seed)), TextSegment([8], loss=False), TextSegment(answer)]
    return build_sequence(segments, config.vocabulary, end=True)


def test_a_sequence_with_an_image_that_is_read():
    config = tiny_config()
    sequence = reading(config, 0, 9)
    assert sequence.input_ids.tolist() == [1, 5, 6, 7, 3, 0, 0, 0, 0, 4, 8, 9, 2]
    assert sequence.labels.tolist() == [IGNORE, 5, 6, 7, *[IGNORE] * 7, 9, 2]
    ((start, segment),) = sequence.features
    assert start == 5 and torch.equal(segment.features, features(0)) and sequence.image_grids == []
    inputs = inputs_of(config, sequence)
    assert inputs["feature_inputs"].tolist() == [5, 6, 7, 8] and not len(inputs["image_inputs"])
    assert inputs["positions"][0, :, 0].tolist() == list(range(13))
    for wrong in (torch.zeros(4), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match="features: need floats of shape"):
            build_sequence([FeatureSegment(wrong)], config.vocabulary)


@torch.no_grad()
def test_the_loss_is_that_of_the_backbone_on_features_in_their_places(encoder):
    """The backbone alone, on embeddings that are put together by hand."""
    model = vision_model(encoder)
    projector = model.vision_projector
    sequence = reading(model.config, 0, 9, 10)
    ids, labels = sequence.input_ids[None], sequence.labels
    embeds = model.get_input_embeddings()(ids)
    normal = F.layer_norm(features(0).float(), (32,), projector.norm.weight, projector.norm.bias)
    embeds[0, 5:9] = projector.second(F.gelu(projector.first(normal)))
    logits = model.backbone(inputs_embeds=embeds).logits[0]
    naive = F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE)
    torch.testing.assert_close(model(**inputs_of(model.config, sequence)).loss, naive)


@torch.no_grad()
@pytest.mark.parametrize("order", [None, {"order": "random", "size": 4}, {"merge": "channel"}])
def test_features_count_behind_their_image_only(encoder, order):
    """In every order of codes: a loss in front of the image stays, bit for bit, and one behind it changes."""
    model = vision_model(encoder, prediction=order)
    codes = ImageSegment(torch.arange(16).reshape(4, 4))

    def losses(seed):
        front = [TextSegment([5]), codes, TextSegment([6]), FeatureSegment(features(seed))]
        behind = [TextSegment([5, 6], loss=False), FeatureSegment(features(seed)), TextSegment([7, 8]), codes]
        return [
            float(model(**inputs_of(model.config, build_sequence(each, model.config.vocabulary))).loss)
            for each in (front, behind)
        ]

    one, other = losses(0), losses(1)
    assert one[0] == other[0] and abs(one[1] - other[1]) > 1e-3


@torch.no_grad()
def test_batching_and_packing_change_no_loss(encoder):
    model = vision_model(encoder)
    vocabulary = model.config.vocabulary
    plain = build_sequence([TextSegment([5]), ImageSegment(torch.arange(16).reshape(4, 4))], vocabulary)
    sequences = [reading(model.config, 0, 9), plain, reading(model.config, 1, 9, 10, before=[5])]
    sums, weights = [], []
    for sequence in sequences:
        weights.append(int((sequence.labels != IGNORE).sum()))
        sums.append(model(**inputs_of(model.config, sequence), num_items_in_batch=1.0).loss)
    alone = sum(sums) / sum(weights)
    for pack in (None, 24, 80):
        inputs = inputs_of(model.config, *sequences, pack=pack)
        assert inputs["features"].shape == (8, 32)
        torch.testing.assert_close(model(**inputs, num_items_in_batch=float(sum(weights))).loss, alone)


def test_every_parameter_has_a_gradient(encoder):
    """Batches without images that are read, and batches without codes."""
    model = vision_model(encoder).train()
    drawing = build_sequence([TextSegment([5]), ImageSegment(torch.arange(16).reshape(4, 4))], model.config.vocabulary)
    for sequences in (
        [drawing],
        [reading(model.config, 0, 9)],
        [build_sequence([TextSegment([5, 6])], model.config.vocabulary)],
    ):
        model.zero_grad(set_to_none=True)
        model(**inputs_of(model.config, *sequences)).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        used = any(parameter.grad.abs().sum() > 0 for parameter in model.vision_projector.parameters())
        assert used == bool(sequences[0].features)


@torch.no_grad()
def test_a_model_without_an_encoder_is_what_it_was(encoder):
    """Beside images that are read, a model with one computes the very same, too."""
    plain, model = tiny_model(), vision_model(encoder)
    assert not any("vision" in name for name in plain.state_dict()) and "vision_projector" not in plain.image_modules()
    model.load_state_dict({**model.state_dict(), **plain.state_dict()})
    sequence = build_sequence([TextSegment([5]), ImageSegment(torch.arange(16).reshape(4, 4))], plain.config.vocabulary)
    inputs = inputs_of(plain.config, sequence)
    assert "features" not in inputs and "feature_inputs" not in inputs
    assert torch.equal(plain(**inputs).loss, model(**inputs).loss)
    with pytest.raises(ValueError, match="features: given, but the model has no vision encoder"):
        plain(**inputs_of(plain.config, reading(plain.config, 0, 9)))
    with pytest.raises(ValueError, match=r"features: need \(n, 32\) of the model's vision encoder, got \(4, 8\)"):
        model(
            **inputs_of(
                model.config,
                build_sequence([FeatureSegment(torch.ones(4, 8)), TextSegment([5])], plain.config.vocabulary),
            )
        )


@torch.no_grad()
@pytest.mark.parametrize("order", [None, {"order": "random", "size": 4}])
def test_prompts_are_read_as_in_training(encoder, order):
    """The final state of each prompt of a batch, whose lengths differ and of which one holds codes, too."""
    model = vision_model(encoder, prediction=order)
    vocabulary = model.config.vocabulary
    codes = ImageSegment(torch.arange(16).reshape(4, 4), loss=False)
    rows = [[TextSegment([5]), FeatureSegment(features(0)), TextSegment([6, 7])],
            [FeatureSegment(features(1)), codes, FeatureSegment(features(2)), TextSegment([6])], [TextSegment([9])]]  # fmt: skip
    sequences = [build_sequence(row, vocabulary) for row in rows]
    prompts = [Prompt(tuple(s.input_ids.tolist()), tuple(s.image_grids), features=tuple(s.features)) for s in sequences]
    state = prefill(make_decoder(model), prompts, 4)
    for sequence, hidden in zip(sequences, state.hidden, strict=True):
        inputs = inputs_of(model.config, sequence)
        names = ("input_ids", "positions", "image_inputs", "query_inputs", "steps", "features", "feature_inputs")
        whole = model(**{name: inputs[name] for name in names if name in inputs})
        torch.testing.assert_close(model.text_logits(hidden), whole.logits[0, -1], rtol=1e-4, atol=1e-4)


# The pipeline


def vision_pipeline(text_tokenizer, image_tokenizer, encoder, **changes):
    pipe = tiny_pipeline(text_tokenizer, image_tokenizer)
    model = tiny_model(**{**{name: getattr(pipe.model.config, name) for name in (
        "boi_token_id", "eoi_token_id", "image_tokenizer_fingerprint")}, "text": {"vocab_size": text_tokenizer.vocab_size},
        "vision": encoder.description, **changes})  # fmt: skip
    return UnifiedPipeline(model, image_tokenizer, text_tokenizer, vision_encoder=encoder)


@pytest.fixture
def reader(text_tokenizer, image_tokenizer, encoder):
    return vision_pipeline(text_tokenizer, image_tokenizer, encoder)


@torch.no_grad()
def greedy(pipe, segments, count):
    """The likeliest tokens by full forward passes, without a cache."""
    config, written = pipe.model.config, []
    never = {config.boi_token_id, config.eoi_token_id, config.vocabulary.bos_token_id, config.vocabulary.pad_token_id}
    while len(written) < count:
        sequence = build_sequence([*segments, TextSegment(written)], config.vocabulary)
        inputs = inputs_of(config, sequence)
        names = ("input_ids", "positions", "image_inputs", "features", "feature_inputs")
        logits = pipe.model(**{name: inputs[name] for name in names}).logits[0, -1]
        logits[list(never)] = float("-inf")
        logits[pipe.text_tokenizer.vocab_size :] = float("-inf")
        written.append(int(logits.argmax()))
        if written[-1] == config.vocabulary.eos_token_id:
            return written[:-1]
    return written


def test_captions_with_a_cache_are_those_without(reader, encoder, photo):
    images = [photo, photo.rotate(90)]
    said = reader.caption(images, max_new_tokens=6, top_k=1)
    wanted = [
        reader.text_tokenizer.decode(greedy(reader, [FeatureSegment(encoder(to_tensor([image]))[0])], 6)).strip()
        for image in images
    ]
    assert said == wanted and said[0] != said[1]


def test_what_the_assistant_drew_stays_codes(reader, encoder, photo):
    """In a conversation, images of the user are read by features; the model's own are codes, as it drew them."""
    reader.model.config.chat_template = DEFAULT_TEMPLATE
    drawn = photo.rotate(90)
    (said,) = reader.chat(
        [message("user", photo, "red apple"), message("assistant", "a cat", drawn), message("user", "blue car")],
        6, 0, Sampling(top_k=1),
    ) or [""]  # fmt: skip
    turns = [
        Turn("user", (FeatureSegment(encoder(to_tensor([photo]))[0]), "red apple")),
        Turn("assistant", ("a cat", reader.image_tokenizer.encode(to_tensor([drawn]))[0])),
        Turn("user", ("blue car",)),
    ]
    segments = conversation_segments(turns, reader.text_tokenizer, DEFAULT_TEMPLATE, reply=True)
    assert said == reader.text_tokenizer.decode(greedy(reader, segments, 6)).strip()
    *_, streamed = reader.stream_chat([photo, "red apple"], 6, 0, Sampling(top_k=1))
    assert streamed == reader.chat([photo, "red apple"], 6, 0, Sampling(top_k=1))


def test_a_folder_holds_all_of_it(reader, photo, tmp_path, tower):
    said = reader.caption(photo, max_new_tokens=6, top_k=1)
    reader.save_pretrained(tmp_path / "pipe")
    stored = (tmp_path / "pipe" / "model" / "config.json").read_text()
    assert json.loads(stored)["vision"] == reader.vision_encoder.description
    again = UnifiedPipeline.from_pretrained(tmp_path / "pipe")
    assert again.caption(photo, max_new_tokens=6, top_k=1) == said
    assert UnifiedPipeline(**again.components).caption(photo, max_new_tokens=6, top_k=1) == said
    images = again("red apple", generator=0, output_type="codes").codes
    assert torch.equal(images, reader("red apple", generator=0, output_type="codes").codes)
    shutil.rmtree(tmp_path / "pipe" / "vision_encoder")
    with pytest.raises(ValueError, match=r"pipeline: .* has no vision_encoder/"):
        UnifiedPipeline.from_pretrained(tmp_path / "pipe")
    make_tower(tmp_path / "pipe" / "vision_encoder", seed=1)
    with pytest.raises(
        ValueError, match=r"vision_encoder: fingerprint .* is not that of the one that the model was trained"
    ):
        UnifiedPipeline.from_pretrained(tmp_path / "pipe")


def test_a_pipeline_with_another_encoder_or_none(pipeline, reader, encoder, tower):
    parts = reader.components
    with pytest.raises(ValueError, match="vision_encoder: missing; the model reads images by one"):
        UnifiedPipeline(**parts | {"vision_encoder": None})
    with pytest.raises(ValueError, match=r"vision_encoder: pool 1 is not that of .* \(2\)"):
        UnifiedPipeline(**parts | {"vision_encoder": VisionEncoder(tower)})
    with pytest.raises(ValueError, match="vision_encoder: given, but the model reads codes"):
        UnifiedPipeline(**pipeline.components | {"vision_encoder": encoder})


def test_a_trained_model_gets_an_encoder(pipeline, reader, encoder):
    """Its own weights stay; a change of its order keeps the projector."""
    before = {name: value.clone() for name, value in pipeline.model.state_dict().items()}
    add_vision(pipeline.model, encoder.description)
    assert all(
        torch.equal(value, before[name]) for name, value in pipeline.model.state_dict().items() if name in before
    )
    assert pipeline.model.config.new_image_tables and pipeline.model.vision_projector.first.weight.std() > 0
    kept = pipeline.model.vision_projector.first.weight.clone()
    changed = change_prediction(pipeline.model, {"order": "diagonals"})
    assert torch.equal(changed.vision_projector.first.weight, kept)


def test_an_adapter_of_an_untrained_projector_trains_its_own(reader):
    model = attach_lora(reader.model, rank=2, train_image_tables=True).train()
    model(**inputs_of(reader.model.config, reading(reader.model.config, 0, 9))).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if "vision_projector" in name and p.requires_grad}
    assert grads and all("modules_to_save" in name and grad.abs().sum() > 0 for name, grad in grads.items())


# The data


def captions(folder, count=4, size=16):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (size, size + 8 * i, 3), dtype=np.uint8)) for i in range(count)]
    rows = datasets.Dataset.from_dict({"image": images, "caption": CAPTIONS[:count]})
    datasets.DatasetDict(train=rows.cast_column("image", datasets.Image())).save_to_disk(folder)
    return str(folder), images


def test_features_lie_beside_the_codes(encoder, image_tokenizer, text_tokenizer, tmp_path):
    source, images = captions(tmp_path / "source")
    options = {"splits": ("train",), "views": Views(((16, 16),), flips=True), "batch_size": 3, "block_rows": 2}
    encode_source(image_tokenizer, source, tmp_path / "codes", vision=encoder, **options)
    rows = load_codes(tmp_path / "codes", "train", image_tokenizer.fingerprint, vision=encoder)
    views = [view for number, image in enumerate(images) for view in Views(((16, 16),), flips=True)(image, number)]
    vocabulary, size = text_config(text_tokenizer).vocabulary, (4, 32)
    for row, view in zip(rows, views, strict=True):
        made = captioned_sequence(
            row, np.random.default_rng(0), text_tokenizer, vocabulary, captioning=1.0, feature_size=size
        )
        wanted = [FeatureSegment(encoder(to_tensor([view]))[0]), TextSegment(text_tokenizer.encode(row["caption"]))]
        reference = build_sequence(wanted, vocabulary, end=True)
        assert torch.equal(made.input_ids, reference.input_ids) and torch.equal(made.labels, reference.labels)
        torch.testing.assert_close(made.features[0][1].features, reference.features[0][1].features, rtol=0, atol=4e-3)
        drawn = captioned_sequence(row, np.random.default_rng(0), text_tokenizer, vocabulary, feature_size=size)
        assert not drawn.features and drawn.image_grids == [(4, 4)]
    assert not set(FEATURES) & set(
        load_codes(tmp_path / "codes", "train", None).column_names
    )  # of a model that reads codes
    with pytest.raises(ValueError, match="features: 128 numbers for 1 images of 5 x 32"):
        captioned_sequence(
            rows[0], np.random.default_rng(0), text_tokenizer, vocabulary, captioning=1.0, feature_size=(5, 32)
        )


def test_features_of_another_encoder_are_refused(encoder, tower, image_tokenizer, tmp_path):
    source, _ = captions(tmp_path / "source")
    for name, vision in (("with", encoder), ("without", None)):
        encode_source(image_tokenizer, source, tmp_path / name, ("train",), 16, vision=vision)
        with pytest.raises(
            ValueError, match=r"codes: .* was made with features of the vision encoder .*, the one in use is"
        ):
            load_codes(tmp_path / name, "train", None, vision=VisionEncoder(tower))


def conversations(folder, photo):
    """Two questions about images, one of them about an image that the assistant has drawn before, too."""
    features = datasets.Features(
        images=datasets.List(datasets.Image()),
        messages=datasets.List({"role": TEXT, "content": datasets.List({"type": TEXT, "text": TEXT})}),
    )
    drawing = {"role": "assistant", "content": [{"type": "image"}]}
    rows = [
        {"images": [photo, photo.rotate(270)], "messages": [user(None, None, "red apple"), assistant_list("yellow sun")]},
        {"images": [photo.rotate(180), photo.rotate(90)],
         "messages": [user("the small dog"), drawing, user(None, "red apple"), assistant_list("blue car")]},
        {"images": [], "messages": [user("a cat"), assistant_list("a dog")]},
    ]  # fmt: skip
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows, features=features)).save_to_disk(folder)
    return str(folder)


def test_conversations_have_features_of_what_is_read(encoder, image_tokenizer, text_tokenizer, tmp_path, photo):
    source = conversations(tmp_path / "source", photo)
    encode_chat(image_tokenizer, source, tmp_path / "codes", ("train",), (16, 16), batch_size=2, vision=encoder)
    rows = load_codes(tmp_path / "codes", "train", None, "chat", encoder).with_format(None)
    assert [len(row["features"]) for row in rows] == [2 * 4 * 32, 4 * 32, 0]
    vocabulary = text_config(text_tokenizer).vocabulary
    codes = image_tokenizer.encode(to_tensor([photo.rotate(180)]))[0]
    read = [FeatureSegment(each) for each in encoder(to_tensor([photo, photo.rotate(270), photo.rotate(90)]))]
    wanted = [
        [Turn("user", (read[0], read[1], "red apple")), Turn("assistant", ("yellow sun",))],
        [Turn("user", ("the small dog",)), Turn("assistant", (codes,)), Turn("user", (read[2], "red apple")),
         Turn("assistant", ("blue car",))],
        [Turn("user", ("a cat",)), Turn("assistant", ("a dog",))],
    ]  # fmt: skip
    for row, turns in zip(rows, wanted, strict=True):
        made = chat_sequence(row, None, text_tokenizer, vocabulary, DEFAULT_TEMPLATE, 512, feature_size=(4, 32))
        reference = build_sequence(conversation_segments(turns, text_tokenizer, DEFAULT_TEMPLATE), vocabulary)
        assert torch.equal(made.input_ids, reference.input_ids) and torch.equal(made.labels, reference.labels)
        for (start, ours), (place, theirs) in zip(made.features, reference.features, strict=True):
            assert start == place
            torch.testing.assert_close(ours.features, theirs.features, rtol=0, atol=4e-3)
    with pytest.raises(ValueError, match="features: 0 numbers for 2 images of 4 x 32"):
        chat_sequence(
            dict(rows[0]) | {"features": []},
            None,
            text_tokenizer,
            vocabulary,
            DEFAULT_TEMPLATE,
            512,
            feature_size=(4, 32),
        )


# Runs


def test_runs_that_are_refused(config_file, tower, tmp_path, reader, parts):
    base = [f"output_dir={tmp_path}/run", f"model.options.vision.encoder={tower}"]
    with pytest.raises(ValueError, match=r"model\.options\.vision: no row of the data has an image that is read"):
        load_config(config_file, base)
    with pytest.raises(ValueError, match=r"model\.options: vision\.pool: 0 must be"):
        load_config(config_file, [*base, "model.options.vision.pool=0"])
    with pytest.raises(ValueError, match=r"model\.options\.vision\.fingerprint: 'abc', but .* has"):
        train(load_config(config_file, [*base, "data.captioning=0.5", "model.options.vision.fingerprint=abc"]))
    with pytest.raises(ValueError, match=r"codes: .* was made with features of the vision encoder None"):
        train(load_config(config_file, [*base, "data.captioning=0.5"]))
    with pytest.raises(ValueError, match=r"model\.options\.vision\.encoder: 'runs/nowhere' does not exist"):
        train(load_config(config_file, [base[0], "model.options.vision.encoder=runs/nowhere", "data.captioning=0.5"]))
    reader.save_pretrained(tmp_path / "pipe")
    pipe = [f"model={{pipeline: {tmp_path}/pipe, image_tokenizer: null, text_tokenizer: null, architecture: null}}"]
    with pytest.raises(ValueError, match=r"model\.options\.vision: a pipeline has its own; leave it out"):
        train(load_config(config_file, [*pipe, *base, "data.captioning=0.5"]))


@pytest.mark.process
def test_a_run_learns_to_read(config_file, tower, tmp_path, photo):
    """Answers that depend on the image alone are learned by heart; the folder is complete, and its encoder is what it was."""
    source = conversations(tmp_path / "source", photo)
    options = [
        "data.train=null", "steps=120", "validate_every=120", "checkpoint_every=null", "schedule.patch_sizes=[2,1]",
        "schedule.shares=[0.2,0.8]", "schedule.decay=0.5", "optimizer.ema_decay=null", f"output_dir={tmp_path}/run",
        f"data.sources=[{{path: {source}, kind: chat, max_length: 99, validation_split: train}}]",
        f"model.options.vision={{encoder: {tower}, pool: 2}}",
    ]  # fmt: skip
    train(load_config(config_file, options))
    log = read_log(tmp_path / "run")
    assert log[0]["text_loss"] > 3 and log[-1]["chat_validation_loss"] < 0.1
    shutil.rmtree(tmp_path / "source")
    pipe = UnifiedPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.vision_encoder.description["fingerprint"] == VisionEncoder(tower).description["fingerprint"]
    assert not any("encoder" in name for name in pipe.model.state_dict())
    likely = Sampling(top_k=1)
    assert pipe.chat([message("user", photo, photo.rotate(270), "red apple")], 20, 0, likely) == ["yellow sun"]
    drawn = pipe.chat([message("user", "the small dog")], 20, 1, likely, likely, generator=0)
    asked = [
        message("user", "the small dog"),
        message("assistant", *drawn),
        message("user", photo.rotate(90), "red apple"),
    ]
    assert pipe.chat(asked, 20, 0, likely) == ["blue car"]
    assert "Vision encoder" in (tmp_path / "run" / "pipeline" / "README.md").read_text()


@pytest.mark.process
def test_a_run_from_a_script_s_codes(config_file, parts, tower, tmp_path, pipeline, picture_source):
    """Codes and features encoded before; a trained pipeline gets an encoder, and a run of an adapter goes on from it."""
    encode_images(["--image-tokenizer", f"{parts}/image_tokenizer", "--source", picture_source, "--image-size", "16",
                   "--out", f"{tmp_path}/codes", "--vision-encoder", tower, "--vision-pool", "2"])  # fmt: skip
    pipeline.save_pretrained(tmp_path / "plain")
    shared = ["steps=8", "checkpoint_every=null", "schedule.patch_sizes=[1]", "schedule.shares=[1.0]", "data.captioning=0.5",
              "validate_every=8", "optimizer.ema_decay=null", f"data.train={tmp_path}/codes"]  # fmt: skip
    model = "model={{pipeline: {}, image_tokenizer: null, text_tokenizer: null, architecture: null{}}}"
    vision = f", options: {{vision: {{encoder: {tower}, pool: 2}}}}"
    train(load_config(config_file, [*shared, f"output_dir={tmp_path}/first", model.format(tmp_path / "plain", vision)]))
    pipe = UnifiedPipeline.from_pretrained(tmp_path / "first" / "pipeline")
    assert pipe.vision_encoder is not None and not pipe.model.config.new_image_tables
    assert {"caption_loss", "validation_loss"} <= set(read_log(tmp_path / "first")[-1])
    train(
        load_config(
            config_file,
            [
                *shared,
                "lora={rank: 2}",
                f"output_dir={tmp_path}/second",
                model.format(tmp_path / "first" / "pipeline", ""),
            ],
        )
    )
    pipe.load_lora_weights(tmp_path / "second" / "lora")
    assert len(pipe.caption(Image.new("RGB", (16, 16)), max_new_tokens=4)) == 1
    described = json.loads((tmp_path / "second" / "lora" / "unified_base.json").read_text())
    assert described["vision_fingerprint"] == pipe.vision_encoder.description["fingerprint"]
    # An adapter on a pipeline that has no encoder brings the projector; its base is kept with the encoder.
    train(
        load_config(
            config_file,
            [*shared, "lora={rank: 2}", f"output_dir={tmp_path}/third", model.format(tmp_path / "plain", vision)],
        )
    )
    pipe = UnifiedPipeline.from_pretrained(tmp_path / "third" / "base")
    projector = pipe.model.vision_projector.first.weight.clone()
    pipe.load_lora_weights(tmp_path / "third" / "lora")
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "fused")
    fused = UnifiedPipeline.from_pretrained(tmp_path / "fused")
    assert not torch.equal(fused.model.vision_projector.first.weight, projector)
