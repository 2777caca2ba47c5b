"""Previews on the way, known codes, edits; texts from images; conversations."""

import threading

import numpy as np
import pytest
import torch
from conftest import full_forward, generators
from PIL import Image

from unified.decoding import Sampling
from unified.pipeline.arguments import per_image
from unified.pipeline.editing import outpainting_canvas
from unified_tokenizers.images import to_tensor

PROMPTS = ["red apple", "a cat and a dog"]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.process
def test_arguments_reach_the_sampler(pipeline, photo):
    """A tiny top-p leaves the likeliest code, as top-k 1 does; every caption has its own negative prompt."""
    sample = lambda **options: pipeline(PROMPTS, generator=generators(0, 1), guidance_scale=2.0, **options).codes  # noqa: E731
    likeliest = sample(top_k=1)
    assert torch.equal(sample(top_p=1e-6), likeliest) and not torch.equal(sample(), likeliest)
    *_, last = pipeline.stream(PROMPTS, generator=generators(0, 1), guidance_scale=2.0, top_p=1e-6)
    assert torch.equal(last.codes, likeliest)
    hot = {"temperature": 9.0, "max_new_tokens": 8}
    assert pipeline.caption(photo, top_p=1e-6, generator=seeded(0), **hot) == pipeline.caption(photo, top_k=1, **hot)
    negatives = ["blue car", "dog"]
    both = sample(negative_prompt=negatives)
    for i, negative in enumerate(negatives):
        same = sample(negative_prompt=negative)
        assert torch.equal(both[i], same[i]) and not torch.equal(both[1 - i], same[1 - i])


def test_interrupt_from_another_thread(pipeline):
    begun, told = threading.Event(), threading.Event()

    def interrupt():
        begun.wait(30)
        pipeline.interrupt()
        told.set()

    def callback(pipe, step, timestep, tensors):
        begun.set()
        if step == 3:
            told.wait(30)

    threading.Thread(target=interrupt).start()
    output = pipeline("red apple", generator=generators(0), callback_on_step_end=callback)
    assert output.interrupted and (output.codes < 0).sum() >= 12


def test_guidance_schedules_by_hand():
    scales = Sampling(guidance_scale=5.0, guidance_schedule="cosine").scales(5)
    half = 2**0.5 / 2  # cosine of 45 degrees
    assert scales == pytest.approx([1, 1 + 2 * (1 - half), 3, 1 + 2 * (1 + half), 5])
    assert Sampling(guidance_scale=5.0, guidance_schedule="linear").scales(5) == [1, 2, 3, 4, 5]


# One generator, many images


def test_one_generator_whatever_else_is_sampled(pipeline):
    """Image j of prompt i depends on the generator, i and j alone."""
    sample = lambda prompts, count: pipeline(prompts, generator=seeded(5), num_images_per_prompt=count).codes  # noqa: E731
    many = sample(PROMPTS, 3)
    assert torch.equal(many[:2], sample(PROMPTS[0], 2)) and torch.equal(many[::3], sample(PROMPTS, 1))
    assert torch.equal(sample([*PROMPTS, "blue car"], 2)[:4], many[[0, 1, 3, 4]])
    assert len({tuple(row.flatten().tolist()) for row in many}) == 6


@pytest.mark.parametrize("count", [1, 2, 5, 17])
def test_seeds_of_a_single_generator_do_not_depend_on_their_number(count):
    seeds = [g.initial_seed() for g in per_image(seeded(1), 2, count)]
    reference = [g.initial_seed() for g in per_image(seeded(1), 3, 17)]
    assert seeds == [reference[17 * i + j] for i in range(2) for j in range(count)]
    assert len(set(reference)) == 3 * 17


@pytest.mark.process
@pytest.mark.parametrize("decoding", ["plain", "sjd"])
def test_a_generator_means_what_a_list_of_it_means(pipeline, photo, decoding):
    alone, listed = (pipeline("red apple", generator=g, decoding=decoding).codes for g in (seeded(7), [seeded(7)]))
    assert torch.equal(alone, listed)
    two = pipeline(PROMPTS, generator=seeded(7), decoding=decoding).codes
    assert torch.equal(two[:1], listed) and not torch.equal(two[1], two[0])
    hot = {"temperature": 5.0, "max_new_tokens": 8}
    assert pipeline.caption(photo, generator=seeded(7), **hot) == pipeline.caption(photo, generator=[seeded(7)], **hot)


def test_a_generator_moves_on(pipeline, photo):
    """The next call with the same generator gives something else."""
    generator = seeded(7)
    codes = [pipeline("red apple", generator=generator).codes for _ in range(2)]
    assert not torch.equal(*codes)
    texts = [pipeline.caption(photo, temperature=5.0, max_new_tokens=8, generator=generator)[0] for _ in range(3)]
    assert len(set(texts)) == 3
    with pytest.raises(ValueError, match="generator: one and the same is given for several images"):
        pipeline(PROMPTS, generator=[generator, generator])


@pytest.mark.process
def test_counterfactual_edit_changes_little(pipeline):
    """Another word with the same noise leaves most codes; with other noise, chance decides."""
    options = {"guidance_scale": 1.0, "num_images_per_prompt": 1}
    same, other = [], []
    for seed in range(12):
        before = pipeline("red apple", generator=seeded(seed), **options).codes
        same.append((pipeline("blue apple", generator=seeded(seed), **options).codes == before).float().mean())
        other.append((pipeline("blue apple", generator=seeded(seed + 100), **options).codes == before).float().mean())
    assert torch.stack(same).mean() > 0.4 > 0.25 > torch.stack(other).mean()


# On the way


def test_stream_shows_what_is_sampled(pipeline):
    final = pipeline("red apple", generator=generators(0), output_type="pt")
    *previews, last = pipeline.stream("red apple", generator=generators(0), output_type="pt")
    assert torch.equal(last.codes, final.codes) and torch.equal(last.images, final.images)
    assert [int((p.codes >= 0).sum()) for p in previews] == [4, 8, 12]
    for preview in previews:
        sampled = preview.codes >= 0
        assert torch.equal(preview.codes[sampled], final.codes[sampled])
        grey = (~sampled).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(preview.images)
        assert (preview.images[grey] == 0.5).all()
    counts = [int((p.codes >= 0).sum()) for p in pipeline.stream("red apple", preview_every=6, generator=generators(0))]
    assert counts == [6, 12, 16]


def test_interrupt_keeps_what_there_is(pipeline):
    final = pipeline(PROMPTS, generator=generators(0, 1)).codes

    def stop(pipe, index, timestep, tensors):
        if index == 5:
            pipe.interrupt()

    output = pipeline(PROMPTS, generator=generators(0, 1), callback_on_step_end=stop)
    assert output.interrupted and len(output.images) == 2
    assert torch.equal(output.codes.flatten(1)[:, :6], final.flatten(1)[:, :6])
    assert (output.codes.flatten(1)[:, 6:] == -1).all()
    assert not pipeline(PROMPTS, generator=generators(0, 1)).interrupted


@pytest.mark.parametrize("decoding", ["plain", "jacobi"])
def test_a_callback_may_keep_and_change_what_it_gets(pipeline, decoding):
    final = pipeline(PROMPTS, generator=generators(0, 1), decoding=decoding).codes
    seen, before = [], []

    def callback(pipe, index, timestep, tensors):
        codes = tensors["codes"]
        before.append(codes.clone())
        seen.append(codes)
        if len(seen) > 1:
            assert torch.equal(seen[-2], before[-2])  # decoding did not write to it
            seen[-2].fill_(0)

    output = pipeline(PROMPTS, generator=generators(0, 1), decoding=decoding, callback_on_step_end=callback)
    assert torch.equal(output.codes, final)
    output.codes.fill_(0)


def test_interrupt_at_the_end_leaves_nothing_out(pipeline):
    def stop(pipe, index, timestep, tensors):
        if index == 15:
            pipe.interrupt()

    output = pipeline("red apple", generator=generators(0), callback_on_step_end=stop)
    assert not output.interrupted and output.codes.min() >= 0


def test_known_codes_are_shown_from_the_start(pipeline, photo):
    """Of an image whose second row and last two cells are known, previews hide what is missing alone."""
    mask = Image.new("L", (16, 16), 255)
    mask.paste(0, (0, 4, 16, 8))
    mask.paste(0, (8, 12, 16, 16))
    before = pipeline.image_tokenizer.encode(to_tensor([photo]))[0]
    options = {"image": photo, "mask_image": mask, "generator": seeded(0), "output_type": "pt"}
    first, *_, last = pipeline.stream("red apple", preview_every=2, **options)
    known = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1]]).bool()  # two cells are sampled
    assert torch.equal(first.codes[0] >= 0, known)
    assert torch.equal(first.codes[0][known][2:], before[known][2:]) and torch.equal(
        first.codes[0, 0, :2], last.codes[0, 0, :2]
    )
    # What is missing stands for the code before it while the rest is decoded.
    filled = first.codes[0].clone()
    filled[0, 2:], filled[2:, :] = filled[0, 1], filled[1, 3]
    filled[3, 2:] = before[3, 2:]
    pixels = known.repeat_interleave(4, 0).repeat_interleave(4, 1)
    decoded = pipeline.image_tokenizer.decode(filled[None])[0] / 2 + 0.5
    assert torch.equal(first.images[0][:, pixels], decoded[:, pixels])
    assert len(first.images[0][:, ~pixels].unique()) == 1

    options = {"callback_on_step_end": lambda pipe, *step: pipe.interrupt(), "generator": seeded(0)}
    output = pipeline.inpaint("red apple", photo, mask, **options)
    assert output.interrupted and torch.equal(output.codes[0, 1], before[1]) and output.codes[0, 0, 1] == -1


@pytest.mark.parametrize("decoding", ["jacobi", "sjd", "gsd"])
def test_decoding_modes(pipeline, decoding):
    plain = pipeline(PROMPTS, generator=generators(0, 1)).codes
    seen = []
    fast = pipeline(
        PROMPTS,
        generator=generators(0, 1),
        decoding=decoding,
        callback_on_step_end=lambda p, i, t, tensors: seen.append(tensors["codes"].shape),
    )
    assert fast.codes.min() >= 0 and seen[-1] == (2, 16)
    assert torch.equal(fast.codes, plain) == (decoding == "jacobi")
    *_, last = pipeline.stream(PROMPTS, generator=generators(0, 1), decoding=decoding)
    assert torch.equal(last.codes, fast.codes)


def test_guidance_schedule_reaches_the_loop(pipeline):
    sample = lambda **options: pipeline("red apple", generator=generators(0), **options).codes  # noqa: E731
    assert torch.equal(sample(guidance_scale=4.0, guidance_schedule=lambda share: 2.0), sample(guidance_scale=2.0))
    # Guidance that rises from 1: the first code is that of no guidance.
    assert sample(guidance_scale=9.0, guidance_schedule="linear")[0, 0, 0] == sample(guidance_scale=1.0)[0, 0, 0]


# Known codes


def test_inpainting_touches_masked_cells_only(pipeline, photo):
    mask = Image.new("L", (16, 16))
    mask.putpixel((5, 6), 255)  # one bright pixel marks its whole cell
    mask.paste(255, (8, 8, 16, 16))
    before = pipeline.image_tokenizer.encode(to_tensor([photo]))
    changed = torch.zeros(4, 4, dtype=torch.bool)
    changed[1, 1] = changed[2:, 2:] = True
    results = [pipeline.inpaint("red apple", photo, mask, generator=generators(seed)).codes for seed in range(3)]
    for codes in results:
        assert torch.equal(codes[0][~changed], before[0][~changed])
    assert len({tuple(codes[0][changed].tolist()) for codes in results}) == 3


def test_known_codes_are_context(pipeline, photo):
    """What is new is generated as in a plain image whose codes happen to be the kept ones."""
    plain = pipeline("red apple", generator=generators(3)).codes
    known = plain.clone()
    known[0, 2:] = -1
    assert torch.equal(pipeline("red apple", generator=generators(3), known=known).codes, plain)
    other = (known + 1) % 20 * (known >= 0) - (known < 0).long()
    assert not torch.equal(pipeline("red apple", generator=generators(3), known=other).codes[0, 2:], plain[0, 2:])


def test_variation_keeps_its_share(pipeline, photo):
    before = pipeline.image_tokenizer.encode(to_tensor([photo]))
    assert torch.equal(pipeline.variation("red apple", photo, keep=1.0).codes, before)
    codes = pipeline.variation("red apple", photo, keep=0.75, generator=generators(0), num_images_per_prompt=1).codes
    assert 12 <= int((codes == before).sum()) < 16
    new = pipeline.variation("red apple", photo, keep=0.0, generator=generators(0)).codes
    assert torch.equal(new, pipeline("red apple", generator=generators(0)).codes)


@pytest.mark.process
def test_every_variation_keeps_cells_of_its_own(pipeline, photo):
    before = pipeline.image_tokenizer.encode(to_tensor([photo])).flatten()

    def kept(generator, **options):
        """The cells that are the same in all images of a generator's state, whatever the caption."""
        sampled = [
            pipeline.variation(text, photo, keep=0.5, generator=generator(), temperature=9.0, **options).codes.flatten(
                1
            )
            for text in ("red apple", "blue car", "yellow sun", "the small dog")
        ]
        return [tuple(row.nonzero().flatten().tolist()) for row in (torch.stack(sampled) == before).all(dim=0)]

    two = kept(lambda: generators(1, 2), num_images_per_prompt=2)
    assert all(len(cells) >= 8 for cells in two) and two[0] != two[1]
    assert kept(lambda: generators(2)) == two[1:]
    assert kept(lambda: seeded(1)) == two[:1]


@pytest.mark.parametrize("options", [{"keep": 0.5}, {"mask_image": True}])
def test_edits_stream(pipeline, photo, options):
    if "mask_image" in options:
        options = {"mask_image": Image.new("L", (16, 16), 255)}
        final = pipeline.inpaint("red apple", photo, generator=seeded(3), **options)
    else:
        final = pipeline.variation("red apple", photo, generator=seeded(3), **options)
    *previews, last = pipeline.stream("red apple", image=photo, generator=seeded(3), **options)
    assert torch.equal(last.codes, final.codes) and len(previews) == 3


def test_edits_of_several_images(pipeline, photo):
    """One image for all, one per prompt, or one per image generated."""
    photos = [photo, photo.rotate(90), photo.rotate(180), photo.rotate(270)]
    keeping = Image.new("L", (16, 16))
    codes = pipeline.image_tokenizer.encode(to_tensor(photos))
    for used, expected in ((1, [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (4, [0, 1, 2, 3])):
        sampled = pipeline.inpaint(PROMPTS, photos[:used], [keeping] * used, num_images_per_prompt=2).codes
        assert torch.equal(sampled, codes[expected])


def test_outpainting_keeps_the_middle(pipeline, photo):
    small = photo.crop((0, 0, 8, 8))
    canvas, mask = outpainting_canvas(small, 16, 16, top=4, left=8)
    assert canvas.crop((8, 4, 16, 12)).tobytes() == small.tobytes()
    assert np.array_equal(np.asarray(mask) == 0, np.pad(np.ones((8, 8), bool), ((4, 4), (8, 0))))
    codes = pipeline.inpaint("red apple", canvas, mask, generator=generators(0)).codes
    assert torch.equal(codes[0, 1:3, 2:], pipeline.image_tokenizer.encode(to_tensor([canvas]))[0, 1:3, 2:])
    with pytest.raises(ValueError, match="image: 8x8 pixels at top 9, left 0 leave the canvas of 16x16"):
        outpainting_canvas(small, 16, 16, top=9)


# Words


@pytest.mark.process
def test_caption_is_the_models_own_continuation(pipeline, photo):
    """The likeliest tokens, one full forward pass each."""
    vocabulary = pipeline.model.config.vocabulary
    codes = pipeline.image_tokenizer.encode(to_tensor([photo])).flatten().tolist()
    start = pipeline.text_tokenizer.encode("a")
    ids = [
        vocabulary.bos_token_id,
        vocabulary.boi_token_id,
        *(vocabulary.text_vocab_size + c for c in codes),
        vocabulary.eoi_token_id,
        *start,
    ]
    written = []
    banned = [vocabulary.boi_token_id, vocabulary.eoi_token_id, vocabulary.bos_token_id, vocabulary.pad_token_id]
    while len(written) < 6:
        with torch.no_grad():
            logits = full_forward(pipeline.model, ids, [(4, 4)]).logits[0, -1]
        logits[banned] = float("-inf")
        token = int(logits.argmax())
        if token == vocabulary.eos_token_id:
            break
        written.append(token)
        ids.append(token)
    assert written
    both = pipeline.caption([photo, photo.rotate(90)], prompt="a", max_new_tokens=6, top_k=1)
    assert both[0] == pipeline.text_tokenizer.decode(written)
    assert pipeline.caption(photo.rotate(90), prompt="a", max_new_tokens=6, top_k=1) == both[1:]
    free = [pipeline.caption(photo, temperature=5.0, generator=seeded(seed))[0] for seed in (0, 0, 1)]
    assert free[0] == free[1] != free[2]


def test_chat_answers_in_both(pipeline, photo, monkeypatch):
    decoder = pipeline.decoder()
    hot, make = Sampling(temperature=50.0), decoder.text_logits
    often = torch.zeros(pipeline.text_tokenizer.vocab_size).index_fill(
        0, torch.tensor([pipeline.model.config.boi_token_id]), 200
    )
    monkeypatch.setattr(decoder, "text_logits", lambda hidden: make(hidden) + often)
    conversations = [["red apple", photo, "blue car"], [photo], ["yellow sun"]]
    replies = pipeline.chat(
        conversations, 30, 2, text_sampling=hot, image_sampling=Sampling(2.0), generator=generators(0, 1, 2)
    )
    kinds = {type(message) for reply in replies for message in reply}
    assert kinds == {str, Image.Image}
    assert all(message.size == (16, 16) for reply in replies for message in reply if isinstance(message, Image.Image))
    alone = pipeline.chat(
        conversations[1], 30, 2, text_sampling=hot, image_sampling=Sampling(2.0), generator=generators(1)
    )
    assert [m if isinstance(m, str) else m.tobytes() for m in alone] == [
        m if isinstance(m, str) else m.tobytes() for m in replies[1]
    ]
