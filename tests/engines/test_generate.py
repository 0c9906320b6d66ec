"""Every way of generate(), token for token as with DynamicCache and sdpa in fp32."""

import copy

import pytest
import torch
from transformers import DynamicCache

import tinyserve
import transformers
from models import FAMILIES, cache_name, generate, llama, make, prompts, reference


VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))


@pytest.fixture(scope="module")
def model():
    return llama()


def seqs_of(daemon):
    with tinyserve.connect(daemon.url, wait=60) as client:
        return sum(client.pool(p.name).stats().sequences for p in client.pools())


WAYS = {
    "greedy": dict(),
    "sampling": dict(do_sample=True, temperature=1.5, top_k=0),
    "beams": dict(num_beams=4),
    "sampled beams": dict(num_beams=3, do_sample=True, temperature=1.5),
    "returned sequences": dict(num_return_sequences=3, do_sample=True, temperature=1.5),
    "returned beams": dict(num_beams=4, num_return_sequences=2),
    "chunked prefill": dict(prefill_chunk_size=7),
    "chunked prefill of beams": dict(prefill_chunk_size=16, num_beams=2),
    "repetition penalty": dict(repetition_penalty=1.3),
}


@pytest.mark.parametrize("lengths", [(61,), (50, 33, 17, 1)], ids=["one row", "padded batch"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("execution", ["daemon", "local", "auto"])
def test_tokens_are_those_of_dynamic_cache(model, attach, way, lengths, execution):
    inputs = prompts(*lengths)
    want = reference(model, inputs, **WAYS[way])
    kv = attach(model, execution=execution, pool=None if execution == "daemon" else "writable",
                **({} if execution == "daemon" else {"url": writable_url()}))
    for _ in range(2):
        got = generate(model, inputs, kv.cache(**inputs), **WAYS[way])
        assert torch.equal(got, want)
    whole = "chunked" in way and VERSION < (5, 21)  # Transformers then computes all of the prompt
    assert (kv.stats.found == 0) == whole


@pytest.mark.parametrize("way", ["greedy", "beams", "returned sequences", "larger chunks",
                                 "prompt lookup"])
def test_a_beginning_that_another_prompt_has_left(model, attach, way):
    how = dict(WAYS, **{"larger chunks": dict(prefill_chunk_size=40),
                        "prompt lookup": dict(prompt_lookup_num_tokens=3)})[way]
    first, second = prompts(61), prompts(61, seed=4)
    second["input_ids"][:, :24] = first["input_ids"][:, :24]
    want, kv = reference(model, second, **how), attach(model)
    generate(model, first, kv.cache(**first))
    cache = kv.cache(**second)
    assert cache.found == cache.get_seq_length() == 24
    assert torch.equal(generate(model, second, cache, **how), want)


def test_rows_of_which_different_parts_are_found(model, attach):
    """All go on at the column that the row with the least has reached."""
    inputs = prompts(50, 33)
    want, kv = reference(model, inputs), attach(model)
    alone = {k: v[:1] for k, v in inputs.items()}
    generate(model, alone, kv.cache(**alone))
    cache = kv.cache(**inputs)
    assert cache.get_seq_length() == 17  # the padding of the second row, which has nothing
    assert cache.session.pool.lengths(cache.seqs) == [17, 0]
    assert torch.equal(generate(model, inputs, cache), want)


_writable = []


def writable_url():
    return _writable[0].url


@pytest.fixture(scope="module", autouse=True)
def writable_daemon(tmp_path_factory):
    from conftest import Daemon
    daemon = Daemon(tmp_path_factory.mktemp("writable"),
                    "writable:layers=3,kv_heads=2,head_dim=32,dtype=fp32,block_tokens=16,"
                    "blocks=4096,client_write=all")
    _writable.append(daemon)
    yield
    daemon.stop()
    _writable.clear()


@pytest.mark.parametrize("lengths", [(61,), (48, 20)])
def test_both_names_of_the_argument(model, attach, lengths):
    inputs = prompts(*lengths)
    want = reference(model, inputs)
    kv = attach(model)
    for name in {"past_key_values", cache_name(model)}:
        got = model.generate(**inputs, max_new_tokens=24, do_sample=False,
                             **{name: kv.cache(**inputs)})
        assert torch.equal(got, want)


def test_prompt_lookup(model, attach):
    inputs = prompts(20)
    inputs = {k: v.repeat(1, 3) for k, v in inputs.items()}  # something to look up
    want = reference(model, inputs, prompt_lookup_num_tokens=4)
    kv = attach(model)
    for _ in range(2):
        cache = kv.cache(**inputs)
        got = generate(model, inputs, cache, prompt_lookup_num_tokens=4)
        assert torch.equal(got, want)
        # Drafts that weren't accepted are gone: all tokens but the last are stored.
        assert cache.get_seq_length() == got.shape[1] - 1
        assert cache.session.pool.lengths(cache.seqs) == [got.shape[1] - 1]
    assert kv.stats.found > 0


def test_assisted(model, attach):
    """The assistant has a cache of its own, or one of TinyServe if it is attached, too."""
    inputs = prompts(40)
    assistant = llama()  # the same weights: most drafts are accepted
    with torch.no_grad():
        for p in assistant.lm_head.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * 0.15)
    want = reference(model, inputs, assistant_model=assistant)
    assert torch.equal(want, reference(model, inputs))
    kv = attach(model)
    got = generate(model, inputs, kv.cache(**inputs), assistant_model=assistant)
    assert torch.equal(got, want)
    attach(assistant)
    got = generate(model, inputs, kv.cache(**inputs), assistant_model=assistant)
    assert torch.equal(got, want)


def test_chat_turns_go_on_from_the_cache(model, attach):
    first, second = prompts(30), prompts(12, seed=5)
    kv = attach(model)

    def chat(cache):
        ids = generate(model, first, cache)
        for turn in (second, prompts(9, seed=6)):
            ids = torch.cat([ids, turn["input_ids"]], 1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            ids = generate(model, inputs, cache)
        return ids

    want = chat(DynamicCache(config=model.config))
    cache = kv.cache(**first)
    assert torch.equal(chat(cache), want)
    computed = kv.stats.computed
    assert computed == want.shape[1] - 1  # nothing twice
    # Another conversation that begins the same finds all of it.
    inputs = {"input_ids": want, "attention_mask": torch.ones_like(want)}
    assert kv.cache(**inputs).get_seq_length() >= want.shape[1] - 16


def test_chat_turns_of_a_padded_batch(model, attach):
    first = prompts(30, 11, 25)
    kv = attach(model)

    def chat(cache):
        ids = generate(model, first, cache)
        more = prompts(8, 8, 8, seed=7)["input_ids"]
        mask = torch.cat([first["attention_mask"],
                          torch.ones(3, ids.shape[1] - 30 + 8, dtype=torch.long)], 1)
        return generate(model, {"input_ids": torch.cat([ids, more], 1), "attention_mask": mask},
                        cache)

    assert torch.equal(chat(kv.cache(**first)), chat(DynamicCache(config=model.config)))


def test_only_the_new_tokens_may_be_given(model, attach):
    first = prompts(30)
    kv = attach(model)

    def two_turns(cache):
        ids = generate(model, first, cache)
        new = prompts(6, seed=8)["input_ids"]
        new = torch.cat([ids[:, -1:], new], 1)  # the last token isn't in the cache yet
        mask = torch.ones(1, cache.get_seq_length() + new.shape[1], dtype=torch.long)
        return generate(model, {"input_ids": new, "attention_mask": mask}, cache)

    assert torch.equal(two_turns(kv.cache(**first)), two_turns(DynamicCache(config=model.config)))


def test_a_deep_copy_is_a_fork(model, attach, daemon):
    system, kv = prompts(40), attach(model)

    def answers(cache):
        with torch.no_grad():
            model(**system, **{cache_name(model): cache})
        out = []
        for seed in (1, 2, 3):
            ids = torch.cat([system["input_ids"], prompts(10, seed=seed)["input_ids"]], 1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            out.append(generate(model, inputs, copy.deepcopy(cache)))
        return out

    want, got = answers(DynamicCache(config=model.config)), answers(kv.cache())
    assert all(torch.equal(a, b) for a, b in zip(want, got))
    assert kv.stats.computed == 40 + 3 * (10 + 23)  # the system prompt once


def test_a_deep_copy_of_a_batch_is_one_call(model, attach):
    inputs, kv = prompts(20, 9, 14), attach(model)
    cache = kv.cache(**inputs)
    with torch.no_grad():
        model(**inputs, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp(min=0),
              **{cache_name(model): cache})
    twin = copy.deepcopy(cache)
    assert cache.session.pool.lengths(cache.seqs + twin.seqs) == [20, 9, 14] * 2
    assert not set(cache.seqs) & set(twin.seqs)
    twin.crop(-10)
    assert cache.session.pool.lengths(cache.seqs + twin.seqs) == [20, 9, 14, 10, 0, 4]
    twin.close()
    assert cache.session.pool.lengths(cache.seqs) == [20, 9, 14]


def test_an_exception_half_way_leaves_the_cache_as_it_was(model, attach, daemon):
    inputs, kv = prompts(30), attach(model)
    want = reference(model, inputs)
    cache = kv.cache(**inputs)

    def fail(*_):
        raise RuntimeError("half way")

    hook = model.model.layers[1].register_forward_hook(fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="half way"):
            generate(model, inputs, cache)
        assert cache.get_seq_length() == 0
        assert cache.session.pool.lengths(cache.seqs) == [0]
    hook.remove()
    assert torch.equal(generate(model, inputs, cache), want)

    # In a later pass: what was there stays, and the same call goes on.
    ids = torch.cat([want, prompts(5, seed=9)["input_ids"]], 1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    length = cache.get_seq_length()
    hook = model.model.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="half way"):
        generate(model, more, cache)
    hook.remove()
    assert cache.get_seq_length() == length == cache.session.pool.lengths(cache.seqs)[0]
    assert torch.equal(generate(model, more, cache), reference(model, more))


def test_a_full_pool_refuses_and_changes_nothing(model, attach, start_daemon):
    daemon = start_daemon("p:layers=3,kv_heads=2,head_dim=32,dtype=fp32,block_tokens=16,blocks=4")
    kv = attach(model, url=daemon.url)
    cache = kv.cache(**prompts(40))
    with pytest.raises(tinyserve.NoSpaceError, match="block"):
        generate(model, prompts(70), kv.cache())
    assert torch.equal(generate(model, prompts(40), cache), reference(model, prompts(40)))


def test_a_batch_is_shrunk_and_grown(model, attach):
    inputs, kv = prompts(20, 9, 14), attach(model)

    def shrunk(cache):
        out = generate(model, inputs, cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        mask = torch.cat([inputs["attention_mask"],
                          torch.ones(3, out.shape[1] - 20, dtype=torch.long)], 1)[[2, 0]]
        out = generate(model, {"input_ids": out[[2, 0]], "attention_mask": mask}, cache)
        cache.batch_repeat_interleave(2)
        mask = torch.cat([mask, torch.ones(2, out.shape[1] - mask.shape[1], dtype=torch.long)], 1)
        rows = [0, 0, 1, 1]
        return generate(model, {"input_ids": out[rows], "attention_mask": mask[rows]}, cache,
                        do_sample=True)

    want = shrunk(DynamicCache(config=model.config))
    cache = kv.cache(**inputs)
    assert torch.equal(shrunk(cache), want)
    with pytest.raises(ValueError, match="a batch of 3 rows; the cache has 4"):
        generate(model, inputs, cache)


def test_beams_are_forks_of_one_prompt(model, attach):
    """The prompt is stored once, whatever the number of beams."""
    inputs, kv = prompts(64), attach(model)
    cache = kv.cache(**inputs)
    before = cache.session.pool.stats().used
    generate(model, inputs, cache, num_beams=4, max_new_tokens=2)
    assert kv.stats.computed == 64 + 4
    assert len(cache.seqs) == 4
    assert cache.session.pool.stats().used - before <= 64 // 16 + 4


def test_pads_are_never_stored(model, attach):
    inputs, kv = prompts(50, 3), attach(model)
    cache = kv.cache(**inputs)
    generate(model, inputs, cache, max_new_tokens=5)
    assert cache.get_seq_length() == 54
    assert cache.session.pool.lengths(cache.seqs) == [54, 7]
    assert kv.stats.computed == 50 + 3 + 2 * 4


def test_sequences_go_with_their_caches(model, attach, daemon):
    kv = attach(model)
    cache = kv.cache(**prompts(20, 10))
    generate(model, prompts(20, 10), cache)
    with kv.cache(**prompts(20)) as short:
        held = seqs_of(daemon)
    assert seqs_of(daemon) == held - 1
    with pytest.raises(tinyserve.DisconnectedError, match="the cache was closed"):
        generate(model, prompts(20), short)
    del cache
    assert seqs_of(daemon) == held - 3


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_other_caches_work_as_before(attach, family):
    model, inputs = make(FAMILIES[family]()), prompts(31, 12)
    before = model.config._attn_implementation
    want = reference(model, inputs)
    with torch.no_grad():
        logits = model(**inputs).logits
    kv = attach(model)
    assert torch.equal(reference(model, inputs), want)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    assert kv.stats.computed == 0
    kv.close()
    assert torch.equal(reference(model, inputs), want)
    assert model.config._attn_implementation == before and "forward" not in vars(model.model)
