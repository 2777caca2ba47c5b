"""Image tables of two factors against the enumerated joint distribution of all codes."""

import pytest
import torch
from conftest import chi_square_p, full_forward, generators, inputs_of, tiny_config, tiny_model
from torch.nn.functional import cross_entropy

from unified import UnifiedForCausalLM
from unified.decoding import Sampling, generate_codes
from unified.lora.adapters import attach_lora, load_lora
from unified.lora.saving import save_lora
from unified.model.factored import FactoredEmbedding, FactoredHead
from unified.model.image_head import code_log_probs, patch_losses
from unified.model.retrofit import change_prediction
from unified.sequence import ImageSegment, TextSegment, build_sequence
from unified.serving.export import check_exportable

FACTORS, WIDTH = (4, 5), 8


def joint(head, hidden):
    """Probabilities ``(N, 20)`` by a loop over all pairs, in float64."""
    first, second, given = (part.weight.double() for part in (head.first, head.second, head.given))
    rows = []
    for state in hidden.double():
        of_first = (first @ state).exp() / (first @ state).exp().sum()
        row = []
        for a in range(FACTORS[0]):
            scores = second @ (state + given[a])
            row.append(of_first[a] * scores.exp() / scores.exp().sum())
        rows.append(torch.cat(row))
    return torch.stack(rows)


@pytest.fixture
def head():
    torch.manual_seed(0)
    return FactoredHead(FACTORS, WIDTH)


def test_log_probabilities_are_those_of_the_joint(head):
    hidden = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1))
    wanted = joint(head, hidden).log()
    torch.testing.assert_close(wanted.exp().sum(1), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(head(hidden).double(), wanted, rtol=0, atol=1e-5)
    assert (head.second(hidden[:1] + head.given.weight).std(0) > 0.1).any()  # the second factor looks at the first
    codes = torch.tensor([[0, 19, 7], [-100, 3, 3], [5, 6, -100], [1, 2, 3], [18, -100, -100], [11, 12, 13]])
    found = code_log_probs(head, hidden, codes)
    expected = torch.where(codes < 0, 0.0, wanted.gather(1, codes.clamp_min(0)))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_loss_and_gradients_are_those_of_the_joint(head):
    hidden = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    targets, weights = torch.tensor([[0, 19], [-100, 3], [-100, -100]]), torch.tensor([2.0, 1.0, 1.0])
    found = patch_losses(head, hidden, targets, weights)
    logs = joint(head, hidden).log()
    wanted = -(logs[0, 0] + logs[0, 19]) / 2 * 2.0 - logs[1, 3]
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
    parameters = [hidden, *head.parameters()]
    for one, two in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_guided_states_are_guided_scores_of_both_factors(head):
    one, two = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
    found = head(two + 3.0 * (one - two)).view(FACTORS)

    def guided(scores):
        return (scores(two) + 3.0 * (scores(one) - scores(two))).log_softmax(-1)

    first = guided(head.first)
    for a in range(FACTORS[0]):
        wanted = first[a] + guided(lambda state, a=a: head.second(state + head.given.weight[a]))
        torch.testing.assert_close(found[a], wanted, rtol=0, atol=1e-5)


def test_embeddings_are_sums():
    embedding = FactoredEmbedding(FACTORS, WIDTH)
    found = embedding(torch.arange(20).view(4, 5))
    wanted = embedding.first.weight[:, None] + embedding.second.weight[None]
    assert torch.equal(found, wanted)


def factored_model(**changes):
    model = tiny_model(**{"codebook_size": 6, "image_factors": [2, 3], **changes})
    with torch.no_grad():
        for index, (name, weight) in enumerate(
            [*model.image_embed.named_parameters(), *model.image_head.named_parameters()]
        ):
            scale = 1.5 if "given" in name else 0.2
            weight.normal_(0, scale, generator=torch.Generator().manual_seed(index))
    return model


def pair_log_probs(model, prompt, grid):
    """Log-probabilities ``(K, K)`` of the two codes of an image, from a forward pass over each of all images."""
    codes = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    sequences = [
        build_sequence([TextSegment(prompt), ImageSegment(pair.view(grid))], model.config.vocabulary) for pair in codes
    ]
    with torch.no_grad():
        found = model(**inputs_of(model.config, *sequences), return_log_probs=True).log_probs
    return found.view(36, 2).sum(1).double().view(6, 6)


def test_sampling_equals_the_enumerated_likelihood():
    """Of images of two codes: all probabilities sum to 1, and images are sampled as often as they say."""
    model, prompt, grid, count = factored_model(image_grids=[[1, 2]]), [1, 5, 6, 3], (1, 2), 3000
    wanted = pair_log_probs(model, prompt[1:-1], grid).exp()
    torch.testing.assert_close(wanted.sum(), torch.tensor(1.0, dtype=torch.float64), rtol=0, atol=1e-5)
    noise = generators(*range(count))
    codes = generate_codes(model, [prompt] * count, None, grid, Sampling(guidance_scale=1.0), noise).view(count, 2)
    assert chi_square_p(codes[:, 0] * 6 + codes[:, 1], wanted.flatten()) > 1e-3
    independent = wanted.view(2, 3, 6).sum(2)
    assert (independent - independent.sum(1, keepdim=True) * independent.sum(0)).abs().max() > 0.01
    unconditional = independent.sum(1)[:, None, None] * independent.sum(0)[None, :, None] * wanted.sum(0)
    assert chi_square_p(codes[:, 0] * 6 + codes[:, 1], unconditional.flatten()) < 1e-6  # the test can tell


@pytest.mark.parametrize("p", [1, 2])
def test_a_model_scores_and_trains(p):
    model = factored_model()
    codes = torch.randint(6, (4, 4), generator=torch.Generator().manual_seed(0))
    sequence = build_sequence([TextSegment([5, 6], loss=False), ImageSegment(codes)], model.config.vocabulary)
    inputs = inputs_of(model.config, sequence, p=p)
    if p == 1:
        logits = full_forward(model, sequence.input_ids, [(4, 4)]).image_logits[0, 3:19]
        torch.testing.assert_close(
            model(**inputs).image_loss, cross_entropy(logits, codes.flatten()), rtol=0, atol=1e-5
        )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        output = model.train()(**inputs)
        output.loss.backward()
        losses.append(float(output.image_loss.detach()))
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert all(weight.grad.abs().sum() > 0 for weight in model.image_head.parameters())
    optimizer.zero_grad()
    model(**inputs_of(model.config, build_sequence([TextSegment([5, 6])], model.config.vocabulary))).loss.backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in model.image_head.parameters())


def test_it_is_saved_adapted_and_changed(tmp_path):
    model = factored_model()
    model.save_pretrained(tmp_path / "model")
    loaded = UnifiedForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([1, 5, 3, *range(50, 56), *range(50, 56), *range(50, 54)])
    with torch.no_grad():
        wanted = full_forward(model, ids, [(4, 4)]).image_logits
        assert torch.equal(full_forward(loaded.eval(), ids, [(4, 4)]).image_logits, wanted)
        adapted = attach_lora(loaded, rank=2, train_image_tables=True)
        for name, weight in adapted.named_parameters():
            if weight.requires_grad and "image_head" in name:
                weight.add_(0.1)
        changed = full_forward(adapted, ids, [(4, 4)]).image_logits
        save_lora(adapted, tmp_path / "lora")
        again = load_lora(UnifiedForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "lora", "mine").eval()
        assert torch.equal(full_forward(again, ids, [(4, 4)]).image_logits, changed) and not torch.equal(
            changed, wanted
        )
        with pytest.raises(ValueError, match=r"only in the checkpoint: .*image_embed\.first"):
            load_lora(tiny_model(codebook_size=6), tmp_path / "lora", "mine")
    before = {name: value.clone() for name, value in model.image_head.state_dict().items()}
    after = change_prediction(model, {"order": "diagonals"}).image_head.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_backbone_gets_tables_of_its_own_spread(transformers_backbone):
    given = {"codebook_size": 6400, "boi_token_id": 3, "eoi_token_id": 4, "image_factors": [80, 80]}
    torch.manual_seed(0)
    model = UnifiedForCausalLM.from_backbone(str(transformers_backbone), **given)
    text = model.get_input_embeddings().weight.detach()
    codes = model.image_embed(torch.arange(6400)).detach()
    torch.testing.assert_close(codes.mean(0), text.mean(0), rtol=0, atol=0.3 * float(text.std()))
    assert 0.6 < float(codes.std(0).mean() / text.std(0).mean()) < 0.8  # of a mean of two
    assert not model.image_head.given.weight.any()
    with pytest.raises(ValueError, match="image_init, head_init: 'codebook' and 'normal' with image_factors"):
        UnifiedForCausalLM.from_backbone(str(transformers_backbone), **given, image_init="codebook")


def test_bad_use_is_named():
    with pytest.raises(ValueError, match=r"image_factors: \[4, 4\] are not two factors of the codebook of 20 codes"):
        tiny_config(image_factors=[4, 4])
    for wrong in ([20], [1, 20], "4x5", [4, 5, 1]):
        with pytest.raises(ValueError, match=r"image_factors: .* null or two whole numbers of at least 2"):
            tiny_config(image_factors=wrong)
    with pytest.raises(ValueError, match="export: the image tables have two factors"):
        check_exportable(factored_model(positions="1d"))
