"""What can't be served is refused by name, and nothing is computed wrongly without an error."""

import copy
import pickle

import pytest
import torch
from transformers import (AttentionInterface, AutoModelForCausalLM, Llama4TextConfig,
                          masking_utils)

import tinyserve.transformers as ts
from tinyserve.transformers.attention import _window_of
from models import COMMON, FAMILIES, cache_name, generate, llama, make, prompts, reference


@pytest.fixture(scope="module")
def model():
    return llama()


def build(name, **changes):
    config = getattr(__import__("transformers"), name)(**dict(COMMON, **changes))
    return AutoModelForCausalLM.from_config(config).eval()


# ---- models ----

def test_chunked_layers(attach):
    config = Llama4TextConfig(**COMMON, head_dim=32, attention_chunk_size=16, num_local_experts=2,
                              intermediate_size_mlp=64, moe_layers=[])
    with pytest.raises(ts.Unsupported, match="llama4_text: .*chunked"):
        attach(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("name, changes, why", [
    ("BloomConfig", {"n_head": 4}, "bloom: it doesn't attend through the attention interface"),
    ("MambaConfig", {}, "mamba"),
    ("JambaConfig", {"use_mamba_kernels": False, "num_experts": 2}, "jamba: layers of type"),
    ("DeepseekV3Config", {"n_routed_experts": 4, "n_group": 1, "topk_group": 1,
                          "num_experts_per_tok": 2}, "deepseek_v3: latent attention"),
    ("LlamaConfig", {"head_dim": 16}, r"llama: head_dim 16; the limits are 32\.\.256"),
    ("Gemma3TextConfig", {"head_dim": 32, "use_bidirectional_attention": True},
     "gemma3_text: it attends to later tokens"),
    ("GPT2Config", {"reorder_and_upcast_attn": True}, "gpt2: reorder_and_upcast_attn"),
    ("GPT2Config", {"add_cross_attention": True}, "gpt2: cross-attention"),
    ("Gemma3nTextConfig", {"head_dim": 32, "num_kv_shared_layers": 1}, "gemma3n_text: "),
])
def test_models(attach, name, changes, why):
    with pytest.raises(ts.Unsupported, match=why):
        attach(build(name, **changes))


def test_encoder_decoders_and_models_of_images(attach):
    import transformers
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=50, d_model=64, d_kv=32, num_layers=1, num_heads=2, d_ff=64))
    with pytest.raises(ts.Unsupported, match="t5: encoder-decoder"):
        attach(t5)
    config = transformers.Gemma3Config(
        text_config=FAMILIES["gemma3"]().to_dict(),
        vision_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                           num_attention_heads=1, image_size=28, patch_size=14))
    with pytest.raises(ts.Unsupported, match="gemma3: a model of text and other inputs"):
        attach(transformers.Gemma3ForConditionalGeneration(config))


def test_what_is_no_model(attach):
    with pytest.raises(TypeError, match="a model of Transformers, not Linear"):
        attach(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.float64])
def test_types(attach, dtype):
    with pytest.raises(ts.Unsupported, match="llama: a model of torch.float64"):
        attach(llama().to(dtype))


def test_weights_on_several_devices(attach):
    model = llama()
    model.lm_head.to("meta")
    with pytest.raises(ts.Unsupported, match=r"on several devices \(cpu, meta\)"):
        attach(model)


# ---- passes ----

def refused(model, kv, why, inputs=None, error=ts.Unsupported, **more):
    """The pass is refused, and the cache serves on."""
    inputs = prompts(20) if inputs is None else inputs
    cache = kv.cache()
    with pytest.raises(error, match=why):
        with torch.no_grad():
            model(**{**inputs, **more}, **{cache_name(model): cache})
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, prompts(20), cache), reference(model, prompts(20)))


def test_attention_weights(model, attach):
    kv = attach(model)
    refused(model, kv, "output_attentions", output_attentions=True)
    with pytest.raises(ts.Unsupported, match="output_attentions"):
        generate(model, prompts(9), kv.cache(), output_attentions=True,
                 return_dict_in_generate=True)
    with pytest.raises(ValueError, match="output_attentions"):  # says Transformers itself
        model.config.output_attentions = True


def test_masks_that_arent_padding(model, attach):
    kv, inputs = attach(model), prompts(20)
    square = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    refused(model, kv, "attention_mask: of 4 dimensions", attention_mask=square)
    refused(model, kv, "attention_mask: dict", attention_mask={"full_attention": None})
    holes = inputs["attention_mask"].clone()
    holes[0, 5] = 0
    refused(model, kv, "attention_mask with holes", attention_mask=holes)
    right = inputs["attention_mask"].clone()
    right[0, 15:] = 0
    refused(model, kv, "attention_mask with holes", attention_mask=right)
    refused(model, kv, r"attention_mask of \[1, 19\]", attention_mask=torch.ones(1, 19),
            error=ValueError)
    with pytest.raises(ts.Unsupported, match="attention_mask with holes"):
        kv.cache(inputs["input_ids"], holes)
    with pytest.raises(ValueError, match="row 1 of input_ids is all padding"):
        kv.cache(torch.ones(2, 3), torch.tensor([[0, 1, 1], [0, 0, 0]]))


def test_padding_that_comes_or_goes(model, attach):
    kv, inputs = attach(model), prompts(20, 12)
    cache = kv.cache(**inputs)
    generate(model, inputs, cache, max_new_tokens=2)
    columns = cache.get_seq_length()
    new = {"input_ids": torch.full((2, 1), 5), **{cache_name(model): cache}}
    with torch.no_grad():
        with pytest.raises(ValueError, match="row 1 has 0 columns of padding, and had 8"):
            model(attention_mask=torch.ones(2, columns + 1), **new)
        with pytest.raises(ValueError, match="attention_mask is missing"):
            model(**new)
    assert cache.get_seq_length() == columns


def test_a_model_that_makes_no_mask(model, attach):
    """An implementation whose mask function has gone gives None, which must not pass as causal."""
    from transformers.masking_utils import AttentionMaskInterface
    kv, inputs = attach(model), prompts(20, 9)
    name = model.config._attn_implementation
    held = AttentionMaskInterface._global_mapping.pop(name)
    try:
        with pytest.raises(ts.Unsupported, match="the model gave the layers no mask"):
            generate(model, inputs, kv.cache(**inputs))
    finally:
        AttentionMaskInterface._global_mapping[name] = held
    assert torch.equal(generate(model, inputs, kv.cache(**inputs)), reference(model, inputs))


def test_masks_with_overlays(attach):
    """What a model adds to the causal mask is seen, whatever it is called."""
    model = llama()
    kv = attach(model)
    module = __import__("sys").modules[type(model).__module__]
    plain = module.create_causal_mask

    def later_too(batch, head, q, k):
        return k >= 0

    def every_other(batch, head, q, k):
        return k % 2 == 0

    for overlay, given in ((later_too, "or_mask_function"), (every_other, "and_mask_function")):
        module.create_causal_mask = lambda **a: plain(**a, **{given: overlay})
        try:
            with pytest.raises(ts.Unsupported, match="attention mask: "):
                generate(model, prompts(9), kv.cache())
        finally:
            module.create_causal_mask = plain
    chunked = masking_utils.chunked_causal_mask_function(7, torch.zeros(1, dtype=int))
    with pytest.raises(ts.Unsupported, match="chunked_overlay"):
        _window_of(chunked)
    with pytest.raises(ts.Unsupported, match="later ones"):
        _window_of(masking_utils.bidirectional_mask_function)


@pytest.mark.parametrize("use", [
    lambda mask: mask.dtype, lambda mask: mask[..., :5], lambda mask: torch.zeros(1) + mask,
    lambda mask: mask + torch.zeros(1), lambda mask: torch.where(mask, 1.0, 0.0)])
def test_layers_that_compute_with_the_mask(attach, use):
    model = llama()
    kv, layer = attach(model), model.model.layers[1].self_attn
    forward = layer.forward

    def own(*_, attention_mask, **arguments):
        use(attention_mask)

    layer.forward = own
    cache = kv.cache()
    with pytest.raises(ts.Unsupported, match="a layer that computes with its attention mask"):
        generate(model, prompts(9), cache)
    layer.forward = forward
    assert torch.equal(generate(model, prompts(9), cache), reference(model, prompts(9)))


def test_the_smallest_window_of_a_mask_counts():
    window = masking_utils.sliding_window_causal_mask_function(7)
    assert _window_of(masking_utils.causal_mask_function) == 0 and _window_of(window) == 7
    assert _window_of(masking_utils.and_masks(
        window, masking_utils.sliding_window_overlay(3))) == 3


def test_layers_that_attend_by_themselves(attach):
    model = llama()
    kv = attach(model)
    attention = type(model.model.layers[1].self_attn)

    def own(self, hidden_states, **_):
        return hidden_states, None

    layer = model.model.layers[1].self_attn
    layer.forward = own.__get__(layer, attention)
    cache = kv.cache()
    with pytest.raises(ts.Unsupported, match=r"layers \[1\] didn't attend"):
        generate(model, prompts(9), cache)
    assert cache.get_seq_length() == 0
    del model.model.layers[1].self_attn.forward
    assert torch.equal(generate(model, prompts(9), cache), reference(model, prompts(9)))


def test_models_that_call_their_layers_past_the_base_model(attach):
    model = build("OPTConfig", ffn_dim=64, word_embed_proj_dim=128)
    with pytest.raises(ts.Unsupported, match="past its base_model, as OPT does"):
        generate(model, prompts(9), attach(model).cache())


def test_a_layer_that_is_used_twice(attach):
    model = llama()
    model.model.layers[2] = model.model.layers[0]
    cache = attach(model).cache()
    with pytest.raises(ts.Unsupported, match="layer 0 attends twice"):
        generate(model, prompts(9), cache)
    assert cache.get_seq_length() == 0


def test_inputs_that_ids_dont_tell(model, attach):
    kv = attach(model)
    with pytest.raises(ts.Unsupported, match="pixel_values: K and V would depend on more"):
        kv.cache(**prompts(9), pixel_values=torch.zeros(1, 3, 4, 4))
    gpt2 = make(FAMILIES["gpt2"]())
    refused(gpt2, attach(gpt2), "token_type_ids", token_type_ids=torch.ones(1, 20, dtype=int))


def test_positions(model, attach):
    """Other positions than usual aren't shared, and nothing that is shared goes before them."""
    kv, inputs = attach(model), prompts(40)
    shifted = torch.arange(7, 47)[None]
    name = cache_name(model)
    with torch.no_grad():
        want = model(**inputs, position_ids=shifted).logits
        got = model(**inputs, position_ids=shifted, **{name: kv.cache()}).logits
        assert (got - want).abs().max() <= 1e-4
        assert kv.cache(**inputs).found == 0
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        got = model(inputs_embeds=embeds, **{name: kv.cache()}).logits
        assert (got - model(**inputs).logits).abs().max() <= 1e-4
        assert kv.cache(**inputs).found == 0
        model(**inputs, **{name: kv.cache()})
        cache = kv.cache(**inputs)
        assert cache.found == 32
        with pytest.raises(ts.Unsupported, match="position_ids, or inputs_embeds"):
            model(inputs["input_ids"][:, 39:], position_ids=torch.tensor([[46]]), **{name: cache})


def test_plain_passes_of_padded_batches_arent_shared(model, attach):
    """Without position_ids a model counts padding: the K of a padded row is another."""
    kv, inputs = attach(model), prompts(40, 33)
    with torch.no_grad():
        model(**inputs, **{cache_name(model): kv.cache()})
    alone = {k: v[1:, 7:] for k, v in inputs.items()}
    assert kv.cache(**alone).found == 0


def test_gradients_and_dropout(model, attach):
    kv = attach(model)
    with pytest.raises(ts.Unsupported, match="gradients"):
        model(**prompts(9), **{cache_name(model): kv.cache()})
    gemma = make(FAMILIES["gemma2"]())
    for layer in gemma.model.layers:
        layer.self_attn.attention_dropout = 0.5
    kv = attach(gemma)
    gemma.train()
    with pytest.raises(ts.Unsupported, match="dropout 0.5"), torch.no_grad():
        gemma(**prompts(9), **{cache_name(gemma): kv.cache()})


def test_autocast(model, attach):
    kv = attach(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with pytest.raises(ts.Unsupported, match="torch.bfloat16; the model was attached with"):
            model(**prompts(9), **{cache_name(model): kv.cache()})


def test_copies_and_pickles(model, attach):
    kv = attach(model)
    with pytest.raises(ts.Unsupported, match="a copy of an attached model"):
        copy.deepcopy(model)
    with pytest.raises(TypeError, match="can't be pickled"):
        pickle.dumps(kv.cache())
    with pytest.raises(ts.Unsupported, match="K and V lie in the pool"):
        kv.cache().layers[0].keys
    with pytest.raises(ValueError, match="attached already"):
        attach(model)


def test_cropping(model, attach):
    kv = attach(model)
    cache = kv.cache(**prompts(20))
    generate(model, prompts(20), cache)
    with pytest.raises(ValueError, match="44 columns to remove; the cache has 43"):
        cache.crop(-44)
    if not kv.crop_to_length:
        with pytest.raises(ValueError, match="give a negative number"):
            cache.crop(5)
    else:
        cache.crop(41)
    cache.crop(-1)
    cache.reset()
    assert torch.equal(generate(model, prompts(7, 5), cache), reference(model, prompts(7, 5)))


def test_versions(monkeypatch):
    import importlib
    import sys
    import transformers
    for version in ("5.16.1", "5.25.0", "4.57.0"):
        monkeypatch.setattr(transformers, "__version__", version)
        held = {n: sys.modules.pop(n) for n in list(sys.modules)
                if n.startswith("tinyserve.transformers")}
        try:
            with pytest.raises(ImportError, match=f"{version}; .* supports 5.17 to 5.24"):
                importlib.import_module("tinyserve.transformers")
        finally:
            sys.modules.update(held)


def test_an_unknown_argument_of_attention(model, attach):
    """A model that passes its attention function something new is refused, not ignored."""
    kv = attach(model)
    name = model.config._attn_implementation
    function = AttentionInterface._global_mapping[name]
    AttentionInterface._global_mapping[name] = \
        lambda *t, **a: function(*t, **a, position_bias=torch.zeros(1))
    try:
        with pytest.raises(ts.Unsupported, match="attention with position_bias"):
            generate(model, prompts(9), kv.cache())
    finally:
        AttentionInterface._global_mapping[name] = function
