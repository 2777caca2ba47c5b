"""GenARM: the preference loss against an enumerated reference, and what it trains steers the model."""

import pytest
import torch
import torch.nn.functional as F
from conftest import generators, tiny_model
from test_cca import micro_batch, naive_log_prob
from test_dpo import pairs_for
from test_objectives import adapted

from unified.decoding import Sampling, generate_codes
from unified.decoding.prefill import Prompt
from unified.decoding.steering import steer
from unified.lora.adapters import attach_lora
from unified.lora.switching import switch
from unified.sequence import ImageSegment, TextSegment, build_sequence
from unified.training.config import load_config
from unified.training.objectives.genarm import GenARM


def test_the_loss_is_that_of_the_paper():
    """Enumerated pair by pair, without any reference."""
    model = adapted(tiny_model())
    rows = pairs_for(model.get_base_model())
    given, _ = micro_batch(GenARM(beta=0.2, gamma=0.3), model, rows)
    term = GenARM(beta=0.2, gamma=0.3).loss(given, 2.0)
    margins = torch.stack([naive_log_prob(model, row) - naive_log_prob(model, row.rejected) for row in rows])
    torch.testing.assert_close(term.loss, -F.logsigmoid(0.2 * margins - 0.3).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(term.metrics["margin"], margins.sum(), rtol=1e-4, atol=1e-3)
    assert float(term.metrics["accuracy"]) == int((margins > 0).sum())


def test_it_needs_pairs_and_an_adapter(config_file, tmp_path):
    base = [f"output_dir={tmp_path}", "objectives=[{name: genarm}]"]
    with pytest.raises(ValueError, match=r"objectives: genarm needs pairs; name them as data\.sources=\[\{path"):
        load_config(config_file, [*base, "lora.rank=4"])
    with pytest.raises(ValueError, match=r"objectives\.genarm\.gamma: -1"):
        load_config(config_file, [f"output_dir={tmp_path}", "objectives=[{name: genarm, gamma: -1}]", "lora.rank=4",
                                  "data.train=null", "data.sources=[{path: x, kind: pairs}]"])  # fmt: skip


@pytest.mark.process
def test_a_trained_reward_steers_the_model_the_way_that_was_preferred():
    """Images of code 3 are preferred to random ones: the more weight, the more of code 3 is sampled, and less below 0."""
    model = tiny_model()
    policy, rows, rng = attach_lora(model, rank=4), [], torch.Generator().manual_seed(0)
    for _ in range(8):
        pair = []
        for preferred in (True, False):
            codes = torch.randint(0, 20, (2, 3), generator=rng)
            codes = torch.where(torch.rand(2, 3, generator=rng) < 0.7, 3, codes) if preferred else codes
            text = TextSegment([5, 6], loss=False)
            pair.append(build_sequence([text, ImageSegment(codes)], model.config.vocabulary))
        pair[0].rejected = pair[1]
        rows.append(pair[0])
    objective = GenARM()
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], 0.02)
    for _ in range(12):
        given, _ = micro_batch(objective, policy, rows)
        objective.loss(given, 8.0).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    switch(policy, False)
    shares = []
    for weight in (-1.0, 0.0, 1.0):
        prompts = [Prompt((1, 5, 6, 3))] * 48
        codes = generate_codes(
            steer(policy, {"default": weight}), prompts, None, (2, 3), Sampling(), generators(*range(48))
        )
        shares.append(float((codes == 3).float().mean()))
    assert shares[0] < shares[1] < shares[2] and shares[2] > shares[1] + 0.1
