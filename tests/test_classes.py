"""Class-conditional models: sampling by class, through every way to decode."""

import json
from contextlib import closing, nullcontext
from types import SimpleNamespace

import pytest
import torch
from browsing import need_gradio
from conftest import generators, tiny_config, tiny_model
from PIL import Image

from unified import GenerationOptions, UnifiedForCausalLM, UnifiedPipeline
from unified.data.batches import make_batch
from unified.decoding import Prompt, Sampling, generate_codes, generate_conditioned
from unified.lora.base import base_of
from unified.model.prefix import BOI, EOI, NO_TEXT
from unified.pipeline.metadata import read_image_metadata
from unified.sequence import ImageSegment, build_sequence
from unified.serving.desk import class_choices
from unified.serving.engine import Engine
from unified_tokenizers.images import to_tensor

NAMES = ["tench, Tinca tinca", "goldfish", "crane", "golden retriever", "crane"]


def class_model(seed=0, names=None, text=None, **changes):
    """A class-conditional model of five classes whose layout is LlamaGen's."""
    conditioning = {"kind": "class", "classes": 5, **({} if names is None else {"names": names})}
    layout = {"positions": "llamagen", "coarse_positions": "unit", "boi_token_id": BOI, "eoi_token_id": EOI}
    model = tiny_model(seed, text={**NO_TEXT, **(text or {})}, conditioning=conditioning, **{**layout, **changes})
    with torch.no_grad():
        model.condition.table.weight.mul_(4)  # so that classes matter
    return model


def class_sequence(model, codes, label):
    sequence = build_sequence([ImageSegment(codes)], model.config.vocabulary)
    sequence.condition = label
    return sequence


@pytest.fixture
def class_pipeline(image_tokenizer):
    pipe = UnifiedPipeline(class_model(names=NAMES), image_tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def codes_of(pipe, *labels, **options):
    options = {"guidance_scale": 2.0, "generator": generators(*range(len(labels))), **options}
    return pipe(class_labels=list(labels), output_type="codes", **options).codes


def conditioned(pipe, labels, scale=2.0):
    sampling = Sampling(scale)
    return generate_conditioned(
        base_of(pipe.model), torch.tensor(labels), (4, 4), sampling, generators(*range(len(labels)))
    )


class TestPipeline:
    @pytest.mark.process
    def test_codes_are_those_after_the_condition(self, class_pipeline):
        expected = conditioned(class_pipeline, [3, 1])
        assert torch.equal(codes_of(class_pipeline, "golden retriever", 1), expected)
        assert torch.equal(codes_of(class_pipeline, 3, 1, guidance_scale=1.0), conditioned(class_pipeline, [3, 1], 1.0))
        assert torch.equal(class_pipeline(class_labels=torch.tensor([3, 1]), guidance_scale=2.0, generator=generators(0, 1),
                                          output_type="codes").codes, expected)  # fmt: skip
        assert not torch.equal(codes_of(class_pipeline, 2, 1)[0], expected[0])

    @pytest.mark.process
    def test_an_image_does_not_depend_on_its_batch(self, class_pipeline):
        whole = codes_of(class_pipeline, 0, 1, 2)
        for index in range(3):
            alone = codes_of(class_pipeline, index, generator=generators(index))
            assert torch.equal(alone[0], whole[index])

    @pytest.mark.process
    def test_jacobi_and_previews_end_in_the_same_codes(self, class_pipeline):
        expected = codes_of(class_pipeline, 3, 1)
        assert torch.equal(codes_of(class_pipeline, 3, 1, decoding="jacobi"), expected)
        for mode in ("sjd", "gsd"):
            assert int(codes_of(class_pipeline, 3, decoding=mode).min()) >= 0
        *early, last = class_pipeline.stream(
            class_labels=[3, 1], guidance_scale=2.0, generator=generators(0, 1), output_type="codes"
        )
        assert torch.equal(last.codes, expected) and (early[0].codes < 0).any()

    @pytest.mark.process
    def test_negative_classes(self, class_pipeline):
        """One for all or one each; the default is the unconditional class, number 5."""
        model, prompts = base_of(class_pipeline.model), [Prompt((BOI,), condition=label) for label in (3, 1)]
        negatives = [Prompt((BOI,), condition=label) for label in (0, 2)]
        expected = generate_codes(model, prompts, negatives, (4, 4), Sampling(2.0), generators(0, 1))
        assert torch.equal(codes_of(class_pipeline, 3, 1, negative_class_labels=[0, 2]), expected)
        assert not torch.equal(codes_of(class_pipeline, 3, 1), expected)
        same = codes_of(class_pipeline, 3, 1, negative_class_labels="goldfish")
        assert torch.equal(same, codes_of(class_pipeline, 3, 1, negative_class_labels=[1, 1]))

    @pytest.mark.process
    def test_several_images_of_a_class_and_output_types(self, class_pipeline):
        output = class_pipeline(
            class_labels=["goldfish", 2], num_images_per_prompt=2, output_type="pt", generator=generators(0, 1, 2, 3)
        )
        assert output.images.shape == (4, 3, 16, 16)
        images = class_pipeline(class_labels=1, num_images_per_prompt=2, generator=generators(0, 1)).images
        assert [image.size for image in images] == [(16, 16)] * 2

    def test_edits(self, class_pipeline, photo):
        kept = class_pipeline.variation(
            None, photo, keep=0.5, class_labels=2, generator=generators(0), output_type="codes"
        )
        known = class_pipeline.image_tokenizer.encode(to_tensor([photo]))
        assert int((kept.codes == known).sum()) >= 8

    @pytest.mark.process
    def test_it_survives_its_folder(self, class_pipeline, tmp_path):
        class_pipeline.save_pretrained(tmp_path)
        assert not (tmp_path / "text_tokenizer").exists()
        loaded = UnifiedPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert loaded.labels == class_pipeline.labels
        assert torch.equal(codes_of(loaded, 3, "goldfish"), codes_of(class_pipeline, 3, "goldfish"))

    def test_labels(self, class_pipeline):
        assert class_pipeline.labels == {
            "Tinca tinca": 0, "golden retriever": 3, "goldfish": 1, "tench": 0, "tench, Tinca tinca": 0,
        }  # fmt: skip
        assert list(class_pipeline.labels) == sorted(class_pipeline.labels)
        assert class_pipeline.get_label_ids(["goldfish", "tench"]) == [1, 0]
        assert class_pipeline.get_label_ids("goldfish") == [1]

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            ({"class_labels": 5}, r"class_labels: 5 is not one of the 5 classes \(0 to 4\)"),
            ({"class_labels": [1, -1]}, "class_labels: -1 is not one of"),
            ({"class_labels": "golden retriver"}, "no class is called 'golden retriver'; did you mean 'golden retriever'"),
            ({"class_labels": "xyzzy"}, "no class is called 'xyzzy'; the names are in pipe.labels"),
            ({"class_labels": "crane"}, r"'crane' is a name of the classes \[2, 4\]; give one of the numbers"),
            ({"class_labels": 1.5}, "1.5 is neither the number of a class nor its name"),
            ({"class_labels": True}, "True is neither the number"),
            ({"class_labels": []}, r"class_labels: \[\] is no class"),
            ({}, "class_labels: None is no class"),
            ({"prompt": "red apple"}, "prompt: given but the model has classes and reads no text"),
            ({"prompt": "red apple", "class_labels": 1}, "prompt: given, beside class_labels, but the model has classes"),
            ({"class_labels": 1, "negative_prompt": "blue"}, "negative_prompt: given, beside class_labels,"),
            ({"class_labels": [1, 2, 3], "negative_class_labels": [1, 2]}, "negative_class_labels: 2 given for 3 classes"),
            ({"class_labels": 1, "negative_class_labels": 9}, "negative_class_labels: 9 is not one of"),
        ],
    )  # fmt: skip
    def test_bad_calls_are_named(self, class_pipeline, call, message):
        with pytest.raises(ValueError, match=message):
            class_pipeline(**call)

    def test_text_is_refused(self, class_pipeline, photo, image_tokenizer, text_tokenizer, pipeline):
        for use in (lambda: class_pipeline.caption(photo), lambda: class_pipeline.chat(["hello"])):
            with pytest.raises(ValueError, match="text_tokenizer: the model has classes and reads no text"):
                use()
        with pytest.raises(ValueError, match="text_tokenizer: given, but a model of classes reads none"):
            UnifiedPipeline(class_model(), image_tokenizer, text_tokenizer)
        with pytest.raises(ValueError, match="text_tokenizer: missing; the model reads text"):
            UnifiedPipeline(tiny_model(), image_tokenizer)
        for call in ({"class_labels": 1}, {"prompt": "red apple", "class_labels": 1}):
            with pytest.raises(ValueError, match="class_labels: the model has no classes and reads prompts"):
                pipeline(**call)
        with pytest.raises(ValueError, match="label: the model has no classes"):
            pipeline.get_label_ids("goldfish")
        assert pipeline.labels == {}

    def test_classes_without_names(self, image_tokenizer):
        pipe = UnifiedPipeline(class_model(), image_tokenizer)
        with pytest.raises(
            ValueError, match="'cat', but the classes of the model have no names; give a number from 0 to 4"
        ):
            pipe(class_labels="cat")


class TestEngine:
    @pytest.mark.process
    def test_classes_share_the_running_batch(self, class_pipeline):
        expected = codes_of(class_pipeline, 3, 1)
        engine = Engine(class_pipeline, max_rows=4)
        try:
            options = GenerationOptions(guidance_scale=2.0)
            jobs = [engine.submit(options=options, class_labels=label, generator=generators(seed))
                    for label, seed in (("golden retriever", 0), (1, 1))]  # fmt: skip
            fast = engine.submit(
                options=GenerationOptions(guidance_scale=2.0, decoding="jacobi"),
                class_labels=3,
                generator=generators(0),
            )
            assert [torch.equal(job.result(60).codes[0], codes) for job, codes in zip(jobs, expected, strict=True)] == [
                True
            ] * 2
            assert torch.equal(fast.result(60).codes[0], expected[0])
            for call, message in (({"prompt": "a cat"}, "prompt: given but"), ({"class_labels": 7}, "7 is not one of")):
                with pytest.raises(ValueError, match=message):
                    engine.submit(**call)
        finally:
            engine.close()


class TestPage:
    REQUEST = SimpleNamespace(client=SimpleNamespace(host="here"), session_hash="s")

    @pytest.mark.process
    def test_a_class_is_chosen_by_name(self, class_pipeline, photo, tmp_path):
        """The fields hold the classes; what the page makes of one is what the pipeline does, also in an edit."""
        need_gradio()
        from unified.serving.page import build_demo

        with closing(Engine(class_pipeline)) as engine:
            page = build_demo(engine)
            page.visitors.turn = lambda *client: nullcontext()  # no browser reads the answers
            functions = {each.name: each.fn for each in page.fns.values()}
            fields = {block.elem_id: block for block in page.blocks.values()}
            names = [
                ("tench, Tinca tinca", 0),
                ("goldfish", 1),
                ("crane 2", 2),
                ("golden retriever", 3),
                ("crane 4", 4),
            ]
            assert fields["prompt"].choices == fields["whole"].choices == names and fields["prompt"].filterable
            assert fields["negative"].choices == [("none", -1), *names]
            options = {"guidance_scale": 2.0, "temperature": 1.0}
            for label, negative in ((3, -1), (1, 2)):
                *_, (shown, status) = functions["generate"](
                    label, negative, 5, 2, 2.0, 1.0, "plain", "none", self.REQUEST
                )
                expected = class_pipeline(
                    class_labels=label, negative_class_labels=None if negative < 0 else negative, num_images_per_prompt=2,
                    generator=generators(5, 6), **options,
                ).images  # fmt: skip
                for (path, _), wanted in zip(shown, expected, strict=True):
                    assert Image.open(path).tobytes() == wanted.tobytes()
                    assert read_image_metadata(path)["prompt"] == f"class {names[label][0]}"
                assert status.startswith("Done")
            layer = Image.new("RGBA", photo.size)
            layer.paste((255, 0, 0, 255), (0, 8, 16, 16))
            for name, image in (("photo", photo), ("layer", layer)):
                image.save(tmp_path / f"{name}.png")
            files = str(tmp_path / "photo.png"), [str(tmp_path / "layer.png")]
            *_, (edited, _) = functions["edit"](3, files, 0, 2.0, 1.0, "none", self.REQUEST)
            mask = layer.getchannel("A")
            wanted = class_pipeline.inpaint(
                None, photo, mask, class_labels=3, generator=generators(0), **options
            ).images[0]
            assert edited.tobytes() == wanted.tobytes()
            with pytest.raises(Exception, match="class: none is chosen; choose one"):
                list(functions["generate"](None, None, 0, 1, 2.0, 1.0, "plain", "none", self.REQUEST))

    def test_classes_without_names_have_numbers(self, image_tokenizer):
        pipe = UnifiedPipeline(class_model(), image_tokenizer)
        assert class_choices(pipe.model.config) == [(f"class {number}", number) for number in range(5)]

    def test_a_model_of_text_has_none(self, pipeline):
        assert class_choices(pipeline.model.config) is None


@pytest.mark.parametrize(
    "positions", ["2d", *(pytest.param(other, marks=pytest.mark.process) for other in ("1d", "llamagen"))]
)
@pytest.mark.parametrize(
    "prediction", [{"order": "raster"}, {"order": "spread"}, {"order": "diagonals"}, {"merge": "channel"}]
)
def test_decoding_equals_a_full_pass(positions, prediction):
    """The likeliest codes after a class, one after the other, are what a pass over all of them finds likeliest."""
    model = class_model(positions=positions, coarse_positions="center", prediction=prediction)
    (codes,) = generate_codes(model, [Prompt((BOI,), condition=2)], None, (4, 4), Sampling(top_k=1), generators(7))
    found = []
    model.image_head.register_forward_pre_hook(lambda module, args: found.append(args))
    sequences = [class_sequence(model, codes, 2), class_sequence(model, codes, 3)]
    with torch.no_grad():
        model(**make_batch(sequences, model.config, as_sampled=True).inputs)
    states, targets = found[0][:2]
    here, other = (states @ model.image_head.weight.T).argmax(dim=-1).flatten().eq(targets.flatten()).chunk(2)
    assert bool(here.all()) and not bool(other.all()) and len(codes.unique()) > 2


@pytest.mark.process
def test_forward_depends_on_no_values():
    """It compiles to one graph, with classes and dropout."""
    torch._dynamo.reset()
    model = class_model(dropout=0.5, text={"num_hidden_layers": 1}).train()
    sequences = [class_sequence(model, torch.arange(16).reshape(4, 4), label) for label in (1, 5)]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(**make_batch(sequences, model.config).inputs).loss.backward()
    touched = (model.condition.table.weight.grad != 0).any(dim=1)
    assert touched.nonzero().flatten().tolist() == [1, 5]


class TestPrompts:
    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            (Prompt((5, BOI), condition=1), r"samples after a class, not after a prompt; give Prompt\(\(1,\), condition=...\)"),
            (Prompt((BOI,)), "samples after a class, not after a prompt"),
            (Prompt((BOI,), condition=6), r"condition: 6 is not in \[0, 5\]; the last one is the unconditional class"),
        ],
    )  # fmt: skip
    def test_bad_prompts_are_named(self, prompt, message):
        with pytest.raises(ValueError, match=message):
            generate_codes(class_model(), [prompt], None, (4, 4), Sampling(), generators(0))

    def test_a_class_for_a_model_of_text(self):
        with pytest.raises(ValueError, match="condition: class 1 given, but the model takes prompts of text"):
            generate_codes(tiny_model(), [Prompt((1, 3), condition=1)], None, (4, 4), Sampling(), generators(0))

    def test_conditions_do_not_mix_in_a_batch(self):
        model = class_model()
        rows = [class_sequence(model, torch.arange(16).reshape(4, 4), label) for label in (1, None)]
        with pytest.raises(ValueError, match="rows: 1 of 2 have a condition; give one to all of them or none"):
            make_batch(rows, model.config)
        with pytest.raises(ValueError, match=r"condition: not possible in packed rows; leave data.pack out"):
            make_batch(rows[:1], model.config, pack_length=64)

    def test_a_checkpoint_of_another_size(self, tmp_path):
        class_model().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["conditioning"]["classes"] = 6
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"condition\.table\.weight"):
            UnifiedForCausalLM.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("conditioning", "message"),
        [
            ("class", "conditioning: 'class' must be null or a description"),
            ({"kind": "class", "classes": 0}, r"conditioning.classes: 0 must be a whole number in"),
            (
                {"kind": "class", "classes": 2, "names": ["a"]},
                r"conditioning.names: 1 names for 2 classes; give one each",
            ),
            ({"kind": "class", "classes": 1, "names": [" "]}, r"conditioning.names: .* must be a list of names"),
            ({"kind": "class", "classes": 1, "labels": 3}, r"conditioning: \['labels'\] unknown for kind 'class'"),
        ],
    )
    def test_bad_conditions_are_named(self, conditioning, message):
        with pytest.raises(ValueError, match=message):
            tiny_config(conditioning=conditioning)


def test_dropout_acts_in_training_alone():
    plain, dropping = class_model(), class_model(dropout=0.3)
    inputs = make_batch([class_sequence(plain, torch.arange(16).reshape(4, 4), 1)], plain.config).inputs

    def losses(model):
        return [float(model(**inputs).loss) for _ in range(2)]

    with torch.no_grad():
        expected = losses(plain)
        assert losses(dropping) == expected and expected[0] == expected[1]
        trained = losses(dropping.train())
        assert trained[0] != trained[1] and trained[0] != expected[0]
