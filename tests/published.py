"""Published language models with random weights: their tokenizers, references of their images, and a check that they train."""

import numpy as np
import torch
from conftest import CAPTIONS, inputs_of
from PIL import Image
from transformers import PreTrainedTokenizerFast

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from unified import UnifiedPipeline
from unified import cli as command_line
from unified.data.captioned import captioned_sequence
from unified.lora.adapters import attach_lora
from unified.prompts import PromptFormat

TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip


def byte_tokenizer(*special, bos="<s>", eos="</s>", pad=None):
    """A byte-level tokenizer, as most of these models have one, with some merges and special tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(CAPTIONS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos, pad_token=pad or eos,
                                   extra_special_tokens=list(special))  # fmt: skip


def randomize(model, scale=0.3):
    """Weights that make distinct codes likely."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name and weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
            elif weight.ndim == 1:
                weight.normal_(0, 0.1)
            else:
                weight.normal_(0, scale if "embed" in name else weight[0].numel() ** -0.5)
    return model.eval()


def image_loss(pipe, codes, caption="red apple"):
    return output_of(pipe.model, pipe, codes, caption).image_loss


def loss_of(model, pipe, codes, caption="red apple"):
    return output_of(model, pipe, codes, caption).loss


def output_of(model, pipe, codes, caption):
    row = {"caption": caption, "codes": codes.flatten().tolist(), "height": codes.shape[0], "width": codes.shape[1]}
    config = pipe.model.config
    sequence = captioned_sequence(
        row, np.random.default_rng(0), pipe.text_tokenizer, config.vocabulary, prompts=PromptFormat.of(config)
    )
    return model(**inputs_of(config, sequence))


def check_training(pipe):
    """Other images have another loss, other captions too, and 20 steps of LoRA lower it."""
    grid, size = tuple(pipe.model.config.image_grids[0]), pipe.model.config.codebook_size
    one, other = torch.randint(0, size, (2, *grid), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second, third = (
            float(loss_of(pipe.model, pipe, *each)) for each in ((one,), (other,), (one, "blue car"))
        )
    assert abs(first - second) > 1e-3 and abs(first - third) > 1e-4
    adapted = attach_lora(pipe.model, rank=4).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(adapted, pipe, one).backward()
        optimizer.step()
    with torch.no_grad():
        assert float(loss_of(adapted.eval(), pipe, one)) < 0.9 * first


@torch.no_grad()
def greedy_codes(logits, row, other, steps, first, size, scale):
    """Codes of an image by guided full forward passes: the likeliest of ``size`` ids from ``first`` on, again and again."""
    codes = []
    for _ in range(steps):
        after = [first + code for code in codes]
        one, two = (logits(torch.tensor([[*ids, *after]]))[0, -1, first : first + size] for ids in (row, other))
        codes.append(int((two + scale * (one - two)).argmax()))
    return torch.tensor(codes)


def generated(folder, out, prompt="red apple"):
    """The image that ``unified generate`` writes with the pipeline in a folder."""
    command_line.main(["generate", "--pipeline", str(folder), "--prompt", prompt, "--seed", "1", "--out", str(out)])
    (file,) = out.glob("*.png")
    return Image.open(file)


def reloaded(pipe, folder):
    pipe.save_pretrained(folder)
    loaded = UnifiedPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded
