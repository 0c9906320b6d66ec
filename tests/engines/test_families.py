"""Models of each family: logits as with their own eager attention, in fp32, bf16 and fp16; and the
models that can't be served are refused by name."""

import pytest
import torch
from transformers import DynamicCache

from models import FAMILIES, cache_name, generate, llama, make, prompts, reference

TOLERANCE = 1e-4


def logits_of(model, inputs, cache, chunks):
    """The logits of all columns, in passes of chunks[0], chunks[1], ... columns."""
    position_ids = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    out, at = [], 0
    with torch.no_grad():
        for n in chunks:
            out.append(model(input_ids=inputs["input_ids"][:, at:at + n],
                             attention_mask=inputs["attention_mask"][:, :at + n],
                             position_ids=position_ids[:, at:at + n],
                             **{cache_name(model): cache}).logits.float())
            at += n
    return torch.cat(out, 1)


def of_tokens(logits, inputs):
    return logits[inputs["attention_mask"].bool()]


CHUNKS = (40, 1, 1, 9, 1, 12)


@pytest.mark.parametrize("lengths", [(64,), (64, 41, 7)], ids=["one row", "padded batch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_eager_attention(family, lengths, attach):
    inputs = prompts(*lengths)
    eager = make(FAMILIES[family](), attention="eager")
    want = logits_of(eager, inputs, DynamicCache(config=eager.config), CHUNKS)
    model = make(FAMILIES[family]())
    got = logits_of(model, inputs, attach(model).cache(), CHUNKS)
    assert want.std() > 0.5  # differences would show
    assert (of_tokens(got, inputs) - of_tokens(want, inputs)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_is_that_of_dynamic_cache(family, attach):
    """Beyond all windows, in a padded batch, with what is found of an earlier prompt."""
    inputs = prompts(50, 33, 17)
    model = make(FAMILIES[family]())
    want = reference(model, inputs)
    kv = attach(model)
    for _ in range(2):
        assert torch.equal(generate(model, inputs, kv.cache(**inputs)), want)
    assert (kv.stats.found == 0) == (family == "phi3 longrope")  # these are too long to be shared


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss"])
def test_16_bit_errors_are_those_of_eager_attention(family, dtype, attach):
    """Of several models together, beside the same weights in fp32."""
    inputs = prompts(64, 41, 20)
    ours = theirs = 0.0
    for seed in range(6):
        eager = make(FAMILIES[family](), dtype, seed, attention="eager")
        exact = make(FAMILIES[family](), dtype, seed, attention="eager").float()
        want = logits_of(exact, inputs, DynamicCache(config=exact.config), CHUNKS)
        want = of_tokens(want, inputs)
        rough = logits_of(eager, inputs, DynamicCache(config=eager.config), CHUNKS)
        model = make(FAMILIES[family](), dtype, seed)
        got = logits_of(model, inputs, attach(model).cache(), CHUNKS)
        ours += float((of_tokens(got, inputs) - want).square().mean())
        theirs += float((of_tokens(rough, inputs) - want).square().mean())
    assert 0 < ours ** 0.5 <= 1.1 * theirs ** 0.5


def test_longrope_is_shared_only_where_k_depends_on_the_tokens_alone(attach):
    model = make(FAMILIES["phi3 longrope"]())
    kv = attach(model)
    short, long = prompts(40), prompts(90)
    long["input_ids"][:, :40] = short["input_ids"]
    for inputs, found in ((short, 0), (short, 39), (long, 0), (long, 0), (short, 39)):
        want = reference(model, inputs)
        before = kv.stats.found
        assert torch.equal(generate(model, inputs, kv.cache(**inputs)), want)
        assert kv.stats.found - before == found


def test_a_cache_of_another_model_is_refused(attach):
    model, other = llama(), llama(seed=1)
    kv, _ = attach(model), attach(other)
    with pytest.raises(ValueError, match="was made for another model"):
        generate(other, prompts(9), kv.cache())
    kv.close()
    third = llama(seed=2)
    with pytest.raises(NotImplementedError, match="outside the forward pass"):
        generate(third, prompts(9), attach(llama(seed=3)).cache())
