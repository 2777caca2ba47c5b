"""Training: batches, resume, stages, and the recipes through a real launch."""

import json
import math
import shutil

import datasets
import numpy as np
import pytest
import torch
from conftest import generators, tiny_config, tiny_model
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForCausalLM

from unified import UnifiedPipeline
from unified.data.batches import CaptionedBatches, bucketed_order, loader
from unified.data.code_cache import load_codes
from unified.lora.adapters import base_of
from unified.training.config import OptimizerConfig, load_config
from unified.training.loop import train
from unified.training.optimizer import build_optimizers
from unified.training.tracking import read_log
from unified.training.validation import image_loss


class TestBatches:
    def build(self, parts, text_tokenizer, **changes):
        rows = load_codes(parts / "codes", "train", None)
        vocabulary = tiny_config(text={"vocab_size": text_tokenizer.vocab_size}).vocabulary
        return CaptionedBatches(
            rows, text_tokenizer, vocabulary, **{"batch_size": 4, "num_batches": 9, "seed": 1, **changes}
        )

    def test_every_epoch_sees_every_row_once(self, parts, text_tokenizer):
        batches = self.build(parts, text_tokenizer)
        order = [batches._row(i) for i in range(36)]
        assert [sorted(order[i : i + 12]) for i in (0, 12, 24)] == [list(range(12))] * 3
        assert order[:12] != order[12:24]

    def test_a_batch_is_a_function_of_its_index(self, parts, text_tokenizer):
        straight = list(loader(self.build(parts, text_tokenizer, caption_dropout=0.5)))
        resumed = list(loader(self.build(parts, text_tokenizer, caption_dropout=0.5), start=5))
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(straight[5:], resumed, strict=True))

    def test_processes_share_the_global_batch(self, parts, text_tokenizer):
        whole = self.build(parts, text_tokenizer, caption_dropout=0.5)[2]
        halves = [
            self.build(parts, text_tokenizer, caption_dropout=0.5, batch_size=2, rank=r, world_size=2)[2]
            for r in (0, 1)
        ]
        length = [int(mask.sum()) for mask in whole["attention_mask"]]
        for i in range(4):
            part, k = halves[i % 2], i // 2
            assert part["input_ids"][k][: length[i]].tolist() == whole["input_ids"][i][: length[i]].tolist()

    def test_packed_batches_hold_the_same_documents(self, parts, text_tokenizer):
        padded, packed = (self.build(parts, text_tokenizer, captioning=0.4, pack_length=n)[2] for n in (None, 60))
        assert len(packed["input_ids"]) == 2
        documents = [
            row[packed["document_ids"][i] == d].tolist()
            for i, row in enumerate(packed["input_ids"])
            for d in range(int(packed["document_ids"][i].max()) + 1)
        ]
        rows = [
            row[mask.bool()].tolist() for row, mask in zip(padded["input_ids"], padded["attention_mask"], strict=True)
        ]
        assert sorted(documents) == sorted(rows)

    def test_caption_dropout_share(self, parts, text_tokenizer):
        batches = self.build(parts, text_tokenizer, caption_dropout=0.25, num_batches=300)
        vocabulary = batches.vocabulary
        dropped = [int(row[1]) == vocabulary.boi_token_id for batch in loader(batches) for row in batch["input_ids"]]
        assert sum(dropped) / len(dropped) == pytest.approx(0.25, abs=0.04)

    def test_captioning_turns_rows_around(self, parts, text_tokenizer):
        """Codes first, then the caption, which alone is learned; the other rows are as they were."""
        plain, mixed = (
            list(loader(self.build(parts, text_tokenizer, captioning=c, num_batches=60))) for c in (0.0, 0.4)
        )
        vocabulary, turned = self.build(parts, text_tokenizer).vocabulary, 0
        for a, b in zip(plain, mixed, strict=True):
            for i in range(4):
                before, after = (x["input_ids"][i][x["attention_mask"][i].bool()] for x in (a, b))
                labels = b["labels"][i][b["attention_mask"][i].bool()]
                if int(after[1]) != vocabulary.boi_token_id:
                    assert before.tolist() == after.tolist()
                    continue
                turned += 1
                start = before.tolist().index(vocabulary.boi_token_id)
                caption, picture = before[1:start].tolist(), before[start:].tolist()
                assert after.tolist() == [int(before[0]), *picture, *caption, vocabulary.eos_token_id]
                assert labels.tolist() == [-100] * (1 + len(picture)) + [*caption, vocabulary.eos_token_id]
        assert turned / 240 == pytest.approx(0.4, abs=0.08)

    def test_code_noise_touches_inputs_only(self, parts, text_tokenizer):
        clean, noisy = (
            list(loader(self.build(parts, text_tokenizer, code_noise=n, num_batches=60))) for n in (0.0, 0.8)
        )
        shares = []
        for a, b in zip(clean, noisy, strict=True):
            assert torch.equal(a["labels"], b["labels"])
            is_code = a["input_ids"] >= text_tokenizer.vocab_size
            assert torch.equal(a["input_ids"][~is_code], b["input_ids"][~is_code])
            assert torch.equal(b["input_ids"] >= text_tokenizer.vocab_size, is_code)
            changed = (a["input_ids"] != b["input_ids"]) & is_code
            shares += (changed.sum(1) / is_code.sum(1)).tolist()
        # Rates are uniform in [0, 0.8]; one sample in twenty hits the code that was there.
        assert sum(shares) / len(shares) == pytest.approx(0.4 * 19 / 20, abs=0.04)
        assert max(shares) > 0.6 and min(shares) < 0.1


class TestBuckets:
    GRIDS = [(4, 4)] * 13 + [(3, 6)] * 9 + [(6, 3)] * 5  # 27 rows

    def build(self, text_tokenizer, **changes):
        vocabulary = tiny_config(text={"vocab_size": text_tokenizer.vocab_size}).vocabulary
        rows = [
            {"codes": [i % 20] * (h * w), "height": h, "width": w, "caption": "red apple"}
            for i, (h, w) in enumerate(self.GRIDS)
        ]
        rows = datasets.Dataset.from_list(rows).with_format("numpy")
        return CaptionedBatches(
            rows,
            text_tokenizer,
            vocabulary,
            **{"batch_size": 4, "num_batches": 27, "seed": 1, "bucket": True, **changes},
        )

    def test_every_epoch_sees_every_row_once(self, text_tokenizer):
        batches = self.build(text_tokenizer)
        order = [batches._row(i) for i in range(4 * 27)]
        epochs = [order[start : start + 27] for start in range(0, 4 * 27, 27)]
        assert [sorted(epoch) for epoch in epochs] == [list(range(27))] * 4
        assert len({tuple(epoch) for epoch in epochs}) == 4

    def test_batches_hold_one_grid_but_for_leftovers(self, text_tokenizer):
        """Of 27 rows in fours 3 + 2 + 1 batches are whole; the other three rows, and at most one whole batch, make the ends."""
        whole = []
        for batch in loader(self.build(text_tokenizer)):
            grids = set(map(tuple, batch["image_grids"].tolist()))
            whole.append(len(grids) == 1)
        assert sum(whole) >= 4 * 5

    def test_resume_and_processes_see_the_same(self, text_tokenizer):
        straight = [batch["input_ids"] for batch in loader(self.build(text_tokenizer))]
        resumed = [batch["input_ids"] for batch in loader(self.build(text_tokenizer), start=11)]
        assert all(torch.equal(a, b) for a, b in zip(straight[11:], resumed, strict=True))
        whole = self.build(text_tokenizer)
        halves = [self.build(text_tokenizer, batch_size=2, rank=r, world_size=2) for r in (0, 1)]
        for index in (0, 6, 13):
            expected = [s.input_ids.tolist() for s in whole.sequences(index)]
            for rank, half in enumerate(halves):
                assert [s.input_ids.tolist() for s in half.sequences(index)] == expected[rank::2]

    @pytest.mark.parametrize(
        ("counts", "mixed"), [((1,), 0), ((2, 1), 0), ((1, 1, 1, 1), 1), ((13, 9, 5), 0), ((7, 7, 7, 7), 3)]
    )
    def test_leftovers_alone_are_mixed(self, counts, mixed):
        """In fours from the start of a batch: 7 rows of four grids each leave three mixed batches among four whole ones."""
        grids = np.repeat([(4, 4), (3, 6), (6, 3), (2, 8)][: len(counts)], counts, axis=0)
        for begun in range(4):
            order = bucketed_order(grids, 4, begun, np.random.default_rng(begun))
            assert sorted(order) == list(range(sum(counts)))
            batches = order[begun:][: (len(order) - begun) // 4 * 4].reshape(-1, 4)
            found = sum(len(set(map(tuple, grids[batch]))) > 1 for batch in batches)
            assert found == mixed if begun == 0 else found <= mixed


def test_launched_run_leaves_what_it_should(finished):
    log = read_log(finished)
    steps = [r for r in log if "image_loss" in r]
    assert [r["patch_size"] for r in steps] == [4] * 3 + [2] * 3 + [1] * 6
    checks = [r for r in log if "validation_loss" in r]
    assert [r["step"] for r in checks] == [6, 12]
    assert checks[-1]["train_subset_loss"] < math.log(20)
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]
    assert (finished / "samples" / "step-00000012.png").is_file()
    assert list(finished.rglob("events.out.tfevents*"))
    pipe = UnifiedPipeline.from_pretrained(finished / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("red apple", generator=generators(0)).images[0].size == (16, 16)


def test_cost_counts_slots(finished, text_tokenizer):
    """Cumulative positions: text tokens plus 16 / p^2 per image."""
    costs = [r["positions"] for r in read_log(finished) if "image_loss" in r]
    per_step = [b - a for a, b in zip([0, *costs], costs, strict=False)]
    picture_slots = [4 * 1] * 3 + [4 * 4] * 3 + [4 * 16] * 6
    text_positions = [total - image for total, image in zip(per_step, picture_slots, strict=True)]
    assert all(4 * 3 <= text <= 4 * (3 + 14) for text in text_positions)  # <bos>, caption, <boi>, <eoi>


def test_mixed_steps_train_coarser_patches(config_file, tmp_path):
    """With half of the steps mixed, every second step of the fine stage goes back to p = 2, and costs and says so."""
    options = ["schedule.patch_sizes=[2,1]", "schedule.shares=[0.5,0.5]", "schedule.mixed=0.5", "data.caption_dropout=1",
               "validate_every=null", "checkpoint_every=null", "optimizer.ema_decay=null"]  # fmt: skip
    train(load_config(config_file, [f"output_dir={tmp_path}", *options]))
    log = read_log(tmp_path)
    assert [record["patch_size"] for record in log] == [2] * 6 + [1, 2] * 3
    positions = [record["positions"] for record in log]
    per_step = [b - a for a, b in zip([0, *positions[:-1]], positions, strict=True)]
    assert per_step == [4 * (3 + 16 // record["patch_size"] ** 2) for record in log]  # <bos> <boi> codes <eoi>


def test_average_starts_anew_with_every_stage(config_file, tmp_path, monkeypatch):
    update, equal = AveragedModel.update_parameters, []

    def recorded(self, model):
        update(self, model)
        pairs = zip(self.module.parameters(), model.parameters(), strict=True)
        equal.append(all(torch.equal(ours, theirs) for ours, theirs in pairs))

    monkeypatch.setattr(AveragedModel, "update_parameters", recorded)
    train(load_config(config_file, [f"output_dir={tmp_path}", "validate_every=null", "checkpoint_every=null"]))
    assert [step for step, same in enumerate(equal) if same] == [0, 3, 6] and len(equal) == 12


def test_sample_prompts_are_checked_before_training(config_file, tmp_path):
    options = [f"output_dir={tmp_path}", "sample.every=6"]
    with pytest.raises(ValueError, match=r"sample\.prompts: empty"):
        load_config(config_file, options)
    with pytest.raises(ValueError, match=r"sample\.prompts: \d+ tokens, the model has room for"):
        train(load_config(config_file, [*options, f"sample.prompts=[{'apple ' * 200}]"]))
    assert read_log(tmp_path) == []


def test_lora_run_on_a_pipeline(finished, config_file, parts, tmp_path):
    override = [f"output_dir={tmp_path}", f"model.pipeline={finished}/pipeline", "model.architecture=null", "lora.rank=4",
                "optimizer.ema_decay=null", "schedule.patch_sizes=[2,1]", "schedule.shares=[0.5,0.5]"]  # fmt: skip
    folder = train(load_config(config_file, override))
    assert folder.name == "lora"
    pipe = UnifiedPipeline.from_pretrained(finished / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    ids = torch.tensor([[1, *pipe.text_tokenizer.encode("red apple")]])
    base = pipe.model(ids).logits
    pipe.load_lora_weights(folder)
    assert (pipe.model(ids).logits - base).abs().max() > 0.01
    pipe.unload_lora_weights()
    assert torch.equal(pipe.model(ids).logits, base)


def test_captioning_and_muon_run_learns_both_ways(config_file, tmp_path):
    override = ["steps=60", "validate_every=60", "checkpoint_every=null", "optimizer.name=muon", "data.captioning=0.5",
                "data.caption_dropout=0", "schedule.patch_sizes=[2,1]", "schedule.shares=[0.5,0.5]", "batch_size=12"]  # fmt: skip
    train(load_config(config_file, [f"output_dir={tmp_path}", *override]))
    log = read_log(tmp_path)
    final = log[-1]
    assert final["train_subset_loss"] < 1.5 < math.log(20)
    assert final["caption_loss"] < 0.5 * log[0]["text_loss"]


def test_figures_are_measured_while_training(config_file, tmp_path):
    """Every second step of the last stage; training itself is what it is without."""
    sizes = []

    def measure(pipeline):
        sizes.append(pipeline("red apple", generator=generators(0)).images[0].size)
        return {"figure": float(len(sizes))}

    options = ["evaluation.every=2", "evaluation.data=d", "evaluation.clip=c", "checkpoint_every=null"]
    train(load_config(config_file, [f"output_dir={tmp_path}/measured", *options]), measure)
    log = read_log(tmp_path / "measured")
    assert [(r["step"], r["figure"]) for r in log if "figure" in r] == [(8, 1.0), (10, 2.0), (12, 3.0)]
    assert sizes == [(16, 16)] * 3
    train(load_config(config_file, [f"output_dir={tmp_path}/plain", "checkpoint_every=null"]))
    ours, plain = (load_file(tmp_path / name / "pipeline/model/model.safetensors") for name in ("measured", "plain"))
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_packed_run_equals_the_padded_one(config_file, tmp_path):
    """Both directions, so lengths differ; the same documents are learned in every step, in fewer rows."""
    options = ["steps=6", "validate_every=6", "checkpoint_every=null", "data.captioning=0.5", "optimizer.ema_decay=null",
               "schedule.patch_sizes=[2,1]", "schedule.shares=[0.5,0.5]", "batch_size=6"]  # fmt: skip
    for name, pack in (("padded", "null"), ("packed", "64")):
        train(load_config(config_file, [f"output_dir={tmp_path}/{name}", f"data.pack={pack}", *options]))
    ours, theirs = (load_file(tmp_path / name / "pipeline/model/model.safetensors") for name in ("packed", "padded"))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-5)
    ours, theirs = (read_log(tmp_path / name) for name in ("packed", "padded"))
    assert [r.get("positions") for r in ours] == [r.get("positions") for r in theirs]
    with pytest.raises(ValueError, match=r"data.pack: 8 is shorter than a sequence of \d+ tokens"):
        train(load_config(config_file, [f"output_dir={tmp_path}/short", "data.pack=8", *options]))


def test_muon_takes_the_decoders_matrices_only():
    model = tiny_model()
    adamw, muon = build_optimizers(model, OptimizerConfig(name="muon"))
    names = {id(p): name for name, p in model.named_parameters()}
    of_muon = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    of_adamw = {names[id(p)] for g in adamw.param_groups for p in g["params"]}
    assert of_muon | of_adamw == set(names.values()) and not of_muon & of_adamw
    assert {name.rsplit(".", 2)[-2] for name in of_muon} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    decays = {g["weight_decay"]: {names[id(p)].split(".")[-2] for p in g["params"]} for g in adamw.param_groups}
    assert "image_head" in decays[0.05] and "norm" in decays[0.0]


def test_images_are_encoded_on_the_way(config_file, parts, picture_source, tmp_path):
    options = [
        f"output_dir={tmp_path}",
        f"data.train={picture_source}",
        "steps=3",
        "validate_every=3",
        "checkpoint_every=null",
    ]
    train(load_config(config_file, options))
    ours, direct = (load_codes(folder, "train", None)["codes"] for folder in (tmp_path / "codes", parts / "codes"))
    assert [row.tolist() for row in ours] == [row.tolist() for row in direct]
    assert (tmp_path / "codes-validation" / "codes.json").is_file()
    changes = ["data.image_size=32", "data.caption_column=text"]
    with pytest.raises(
        ValueError, match=r"codes' was made with other settings \(image_size: 16 then, 32 now; columns: "
    ):
        train(load_config(config_file, [*options, *changes]))


def test_codes_of_another_tokenizer_are_refused(config_file, parts, tmp_path):
    description = json.loads((parts / "codes" / "codes.json").read_text())
    shutil.copytree(parts / "codes", tmp_path / "codes")
    (tmp_path / "codes" / "codes.json").write_text(json.dumps({**description, "tokenizer_fingerprint": "abc"}))
    with pytest.raises(ValueError, match="was made with tokenizer abc"):
        train(load_config(config_file, [f"output_dir={tmp_path}/run", f"data.train={tmp_path}/codes"]))


def test_adapter_on_a_language_model_loads_into_the_kept_base(
    config_file, parts, tmp_path, transformers_backbone, on_a_backbone
):
    """A pretrained backbone gets image tables and an adapter; base and adapter make the trained model again."""
    options = [f"output_dir={tmp_path}/run", *on_a_backbone, "lora.rank=4",
               "optimizer.ema_decay=null", "checkpoint_every=null"]  # fmt: skip
    folder = train(load_config(config_file, options))
    pipe = UnifiedPipeline.from_pretrained(tmp_path / "run" / "base")
    assert pipe.model.config.new_image_tables  # the base's own are as they were made
    base_named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base_named == str(tmp_path / "run" / "base")
    plain = AutoModelForCausalLM.from_pretrained(transformers_backbone).eval()
    ids = torch.tensor([[1, 5, 6, 7]])
    assert torch.equal(pipe.model(ids).logits, plain(ids).logits)
    pipe.load_lora_weights(folder)
    rows = load_codes(parts / "codes", "train", None)
    batches = CaptionedBatches(rows, pipe.text_tokenizer, base_of(pipe.model).config.vocabulary, 4, 0)
    log = read_log(tmp_path / "run")
    assert image_loss(pipe.model, batches, torch.device("cpu")) < log[0]["image_loss"] - 0.2
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "fused")
    assert not UnifiedPipeline.from_pretrained(tmp_path / "fused").model.config.new_image_tables
    pipe.unload_lora_weights()
    assert torch.equal(pipe.model(ids).logits, plain(ids).logits)
