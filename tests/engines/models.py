"""Small models with random weights, of each family, and what is asked of them."""

import inspect

import torch
from transformers import (AutoModelForCausalLM, Cohere2Config, CohereConfig, DynamicCache,
                          Gemma2Config, Gemma3TextConfig, GPT2Config, GptOssConfig, GraniteConfig,
                          LlamaConfig, MistralConfig, OlmoConfig, Phi3Config, Qwen3Config,
                          SmolLM3Config)

COMMON = dict(vocab_size=200, hidden_size=128, intermediate_size=192, num_hidden_layers=3,
              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
              initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
WINDOW = dict(sliding_window=24)

FAMILIES = {
    "llama": lambda: LlamaConfig(**COMMON, head_dim=32),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=64),
    "qwen3 windows": lambda: Qwen3Config(**COMMON, head_dim=32, use_sliding_window=True, **WINDOW,
                                         max_window_layers=1),
    "gemma2": lambda: Gemma2Config(**COMMON, head_dim=32, query_pre_attn_scalar=20, **WINDOW,
                                   attn_logit_softcapping=5.0, final_logit_softcapping=10.0),
    "gemma3": lambda: Gemma3TextConfig(**COMMON, head_dim=32, query_pre_attn_scalar=20, **WINDOW,
                                       sliding_window_pattern=2),
    "gpt-oss": lambda: GptOssConfig(**COMMON, head_dim=32, num_local_experts=4,
                                    num_experts_per_tok=2, **WINDOW),
    "mistral": lambda: MistralConfig(**COMMON, head_dim=32, sliding_window=None),
    "mistral windows": lambda: MistralConfig(**COMMON, head_dim=32, **WINDOW),
    "phi3": lambda: Phi3Config(**COMMON, sliding_window=None),
    "phi3 windows": lambda: Phi3Config(**COMMON, **WINDOW),
    "granite": lambda: GraniteConfig(**COMMON, attention_multiplier=0.11),
    "olmo": lambda: OlmoConfig(**COMMON, clip_qkv=3.0),
    "cohere": lambda: CohereConfig(**COMMON, use_qk_norm=True, logit_scale=1.0),
    "cohere2": lambda: Cohere2Config(**COMMON, head_dim=32, logit_scale=1.0, **WINDOW),
    "smollm3": lambda: SmolLM3Config(**COMMON, no_rope_layers=[1, 0, 1]),
    "gpt2": lambda: GPT2Config(vocab_size=200, n_embd=128, n_layer=3, n_head=4, n_positions=1024,
                               initializer_range=0.2, pad_token_id=0, bos_token_id=1,
                               eos_token_id=2, scale_attn_by_inverse_layer_idx=True),
}


def make(config, dtype=torch.float32, seed=0, attention=None):
    torch.manual_seed(seed)
    how = {} if attention is None else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_config(config, **how)
    with torch.no_grad():  # what is made as ones or zeros would hide what isn't done
        for name, p in model.named_parameters():
            if p.ndim == 1 and "norm" not in name:
                p.normal_(0, 0.5)
    model.generation_config.eos_token_id = None  # no row ends before the others
    return model.to(dtype).eval()


def llama(seed=0, **changes):
    return make(LlamaConfig(**dict(COMMON, head_dim=32, **changes)), seed=seed)


def cache_name(model):
    """What this Transformers calls the argument."""
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def prompts(*lengths, seed=0, vocabulary=200):
    """A left-padded batch."""
    g = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        ids[row, width - n:] = torch.randint(3, vocabulary, (n,), generator=g)
        mask[row, width - n:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, cache, seed=1, **how):
    how = dict({"max_new_tokens": 24, "do_sample": False}, **how)
    torch.manual_seed(seed)
    return model.generate(**inputs, **how, **{cache_name(model): cache})


def reference(model, inputs, **how):
    """What DynamicCache gives."""
    return generate(model, inputs, DynamicCache(config=model.config), **how)
