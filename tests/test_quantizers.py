"""Quantizers by bits and by index: codes, gradients and losses as the papers' equations say."""

import pytest
import torch

from unified_tokenizers.quantizers import BinaryQuantizer, IndexQuantizer, index_backpropagation


def latents(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def enumerated(bits, spherical):
    """Every vector of a binary codebook, by its code."""
    signs = torch.tensor(
        [[1.0 if code >> (bits - 1 - i) & 1 else -1.0 for i in range(bits)] for code in range(2**bits)]
    )
    return signs.double() / (bits**0.5 if spherical else 1)


@pytest.mark.parametrize("spherical", [False, True])
def test_bits_are_the_nearest_of_all_vectors(spherical):
    quantizer, x = BinaryQuantizer(5, spherical, 0.0), latents(2, 30, 5)
    vectors, codes, loss = quantizer(x)
    book = enumerated(5, spherical)
    assert torch.equal(codes, torch.cdist(x, book).argmin(-1)) and len(codes.unique()) > 20
    torch.testing.assert_close(quantizer.indices_to_codes(torch.arange(32)), book.float())
    torch.testing.assert_close(vectors, book[codes])
    assert loss == 0


@pytest.mark.parametrize("spherical", [False, True])
def test_entropy_equals_the_enumerated_one(spherical):
    """The entropy of each choice is exact; that of their mean is the sum over bits, which is never below the enumerated one."""
    x, book = latents(40, 4, scale=0.01), enumerated(4, spherical)
    unit = x / x.norm(dim=-1, keepdim=True) * 0.02 if spherical else x
    soft = (2 * 100.0 * unit @ book.T).softmax(-1)
    each = -(soft * soft.log()).sum(-1).mean()
    of_bits = [(soft[:, book[:, i] > 0]).sum(-1).mean() for i in range(4)]
    bound = -sum(p * p.log() + (1 - p) * (1 - p).log() for p in of_bits)
    mean = soft.mean(0)
    assert bound >= -(mean * mean.log()).sum()
    torch.testing.assert_close(BinaryQuantizer(4, spherical, 1.0).entropy(unit), each - bound)
    far = (x * 1e6).float().requires_grad_()  # where every choice is sure
    BinaryQuantizer(4, spherical, 1.0).entropy(far).backward()
    assert far.grad.isfinite().all()


def test_gradient_passes_through_the_sign():
    x = latents(6, 3).requires_grad_()
    vectors, _, _ = BinaryQuantizer(3, spherical=False, entropy_weight=0.0)(x)
    weight = latents(6, 3, seed=1)
    (vectors * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight)


@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
def test_index_backpropagation_is_the_papers(entropy_weight):
    x, book = latents(10, 4).requires_grad_(), latents(7, 4, seed=1, scale=0.7).requires_grad_()
    vectors, codes, loss = index_backpropagation(x, book, entropy_weight)
    products = x @ book.T
    assert torch.equal(codes, products.argmax(-1))
    torch.testing.assert_close(vectors, book[codes])
    # The gradient of what is decoded is that of the expected vector, plus that of the chosen rows themselves.
    weight = latents(10, 4, seed=2)
    got = torch.autograd.grad((vectors * weight).sum(), (x, book), retain_graph=True)
    shares = products.softmax(-1)
    hard = torch.nn.functional.one_hot(codes, 7).double()
    expected = torch.autograd.grad(
        ((shares @ book.detach() + hard @ book) * weight).sum(), (x, book), retain_graph=True
    )
    torch.testing.assert_close(got, expected)
    assert (got[1].abs().sum(-1) > 0).all() and len(codes.unique()) < 7  # codes that nothing chose learn too
    by_hand = 2 * (x - book[codes]).square().mean()
    soft = (100 * products).softmax(-1)
    each, mean = -torch.xlogy(soft, soft).sum(-1).mean(), soft.mean(0)
    torch.testing.assert_close(loss, by_hand + entropy_weight * (each + torch.xlogy(mean, mean).sum()))


def test_the_codebook_is_pulled_to_its_latents():
    quantizer, x = IndexQuantizer(5, 3, entropy_weight=0.0, commitment_weight=0.5).double(), latents(2, 4, 3)
    vectors, codes, loss = quantizer(x)
    assert codes.shape == (2, 4) and vectors.shape == (2, 4, 3)
    torch.testing.assert_close(loss, 2.5 * (quantizer.embedding.weight[codes] - x).square().mean())
