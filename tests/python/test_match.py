"""Sequences that are found by their tokens' ids."""

import numpy as np
import pytest

import tinyserve

LAYERS, KV, HEADS, DIM, BLOCK = 2, 2, 4, 64, 4
POOL = f"p:layers={LAYERS},kv_heads={KV},head_dim={DIM},dtype=fp32,block_tokens={BLOCK},blocks=64"
MORE = ",client_write=all"


def rows(tokens, first, layer, heads):
    """What a token computes depends on itself, its place and the layer."""
    out = np.empty((len(tokens), heads, DIM), np.float32)
    for i, token in enumerate(tokens):
        out[i] = np.random.default_rng([token, first + i, layer]).standard_normal((heads, DIM))
    return out


def compute(kv, seq, tokens, *, ids=True, accepted=None):
    """Adds the tokens in all layers; what came out."""
    results = []
    first = kv.lengths([seq])[0]
    with kv.step([seq], [len(tokens)], heads=HEADS, tokens=tokens if ids else None) as step:
        for layer in range(LAYERS):
            step.q[...] = rows(tokens, first, layer, HEADS)
            step.k[...] = rows(tokens, first, layer + 10, KV)
            step.v[...] = rows(tokens, first, layer + 20, KV)
            step.run(layer)
            results.append(step.out.numpy().copy())
        step.commit(accepted)
    return results


@pytest.fixture(params=["ring", "messages", "local"])
def connect(start_daemon, request):
    daemon = start_daemon(POOL + MORE)

    def session():
        how = {"execution": "local"} if request.param == "local" else {"transport": request.param}
        client = tinyserve.connect(daemon.url, **how)
        return client, client.pool("p", writable=True)
    return session


def test_a_prompt_is_found_by_another_session_and_gives_the_same_bits(connect):
    prompt = list(range(100, 111))
    a, kv_a = connect()
    b, kv_b = connect()
    first, = kv_a.create(namespace=b"model")
    whole = compute(kv_a, first, prompt[:6])
    whole = compute(kv_a, first, prompt[6:])
    assert kv_b.matching([prompt, prompt[:4], [1, 2]], b"model") == [8, 3, 0]
    second, matched = kv_b.match(prompt, b"model")
    assert matched == 8 and kv_b.lengths([second]) == [8]
    again = compute(kv_b, second, prompt[8:])
    assert np.array_equal([x[-3:] for x in whole], again)
    # What the first gets from now on is its own.
    compute(kv_a, first, [7, 8, 9, 10, 11])
    assert kv_b.matching([prompt + [7, 8, 9, 10, 11, 12]], b"model") == [16]
    assert kv_b.matching([prompt + [1, 1]], b"model") == [11]  # and a part of a block
    assert kv_b.match(prompt, b"another")[1] == 0
    a.close()
    assert kv_b.matching([prompt + [7]], b"model") == [11]  # cached, though its worker is gone
    b.close()


def test_a_part_of_a_block_is_shared_and_copied_when_it_is_written(connect):
    _, kv = connect()
    prompt = list(range(20))
    seq, = kv.create(namespace=b"m")
    compute(kv, seq, prompt)
    kv.free([seq])
    other = prompt[:10] + [99, 98]
    found, matched = kv.match(other, b"m")
    assert matched == 10
    compute(kv, found, other[10:])
    assert kv.matching([prompt + [0]], b"m") == [20]  # nothing of it was overwritten
    assert kv.matching([other + [0]], b"m") == [12]


def test_a_block_that_two_computed_is_stored_once(connect):
    _, kv = connect()
    a, b = kv.create(2, namespace=b"m")
    for seq in (a, b):
        compute(kv, seq, list(range(9)))
    assert kv.slots(a, 0, 8) == kv.slots(b, 0, 8)
    assert kv.slots(a, 8, 1) != kv.slots(b, 8, 1)  # the last block isn't full
    assert np.array_equal(compute(kv, a, [1, 2]), compute(kv, b, [1, 2]))


def test_rejected_and_unknown_tokens_are_never_found(connect):
    _, kv = connect()
    seq, = kv.create(namespace=b"m")
    compute(kv, seq, [1, 2, 3, 4, 5, 6, 7, 8], accepted=[5])
    assert kv.matching([[1, 2, 3, 4, 5, 6, 7, 8, 9]], b"m") == [4]
    compute(kv, seq, [9, 9, 9], ids=False)  # from here on nobody knows
    compute(kv, seq, [1, 2, 3, 4])
    assert kv.matching([[1, 2, 3, 4, 5, 9, 9, 9, 1]], b"m") == [4]
    kv.truncate([seq], [4])  # as far as all is known
    compute(kv, seq, [6, 6, 6, 6])
    assert kv.matching([[1, 2, 3, 4, 6, 6, 6, 6, 9]], b"m") == [8]


def test_what_is_cached_makes_room_for_what_is_live(connect):
    _, kv = connect()
    for i in range(20):  # 20 x 4 blocks in a pool of 64
        seq, = kv.create(namespace=b"m")
        compute(kv, seq, [i] * 16)
        kv.free([seq])
    lengths = kv.matching([[i] * 17 for i in range(20)], b"m")
    assert lengths[-16:] == [16] * 16 and lengths[:4] == [0] * 4  # the oldest are gone
    seq, = kv.create()
    compute(kv, seq, [1] * (64 * BLOCK), ids=False)  # all of the pool
    assert kv.matching([[19] * 17], b"m") == [0]


def test_what_was_not_computed_in_all_layers_is_not_found(connect):
    _, kv = connect()
    prompt = [1, 2, 3, 4, 5]
    seq, = kv.create(1, b"m")
    with kv.step([seq], [5], heads=HEADS, tokens=prompt) as step:
        step.run(0)
        for layer in (LAYERS, 255, 256, 100000, 2**32 - 1):
            with pytest.raises(tinyserve.InvalidError, match=f"layer {layer}; the pool has 2"):
                step.run(layer)
        with pytest.raises(tinyserve.InvalidError, match="only 1 of 2 layers of step .* were run"):
            step.commit()
        step.commit([0])
    assert kv.matching([prompt], b"m") == [0] and kv.lengths([seq]) == [0]


def test_token_ids_need_a_namespace_and_one_for_each_token(connect):
    _, kv = connect()
    seq, = kv.create()
    with pytest.raises(tinyserve.InvalidError, match="a match without a namespace: give one, or"):
        kv.match([5])
    with pytest.raises(tinyserve.InvalidError, match="which has no namespace: name one when"):
        kv.step([seq], [1], heads=HEADS, tokens=[5])
    with pytest.raises(ValueError, match="2 new tokens, but 1 tokens"):
        kv.step([seq], [2], heads=HEADS, tokens=[5])
    with pytest.raises(ValueError, match="namespace of 65 bytes; the limit is 64"):
        kv.create(namespace=b"x" * 65)
    with pytest.raises(TypeError, match="namespace must be bytes, not str"):
        kv.create(namespace="x")
    with pytest.raises(OverflowError, match="tokens"):
        kv.match([-2], b"m")
    with pytest.raises(OverflowError, match="-5 is no token id"):
        kv.match(np.array([1, -5]), b"m")
    with pytest.raises(OverflowError, match="-5 is no token id"):
        kv.match(np.array([1, -5], np.int32), b"m")
    ids = np.array([-1, 0, 7, 0], np.int32)[::2]  # likewise below, from an array with gaps
    with kv.step([seq], [2], heads=HEADS, tokens=ids):
        pass
    with pytest.raises(tinyserve.InvalidError, match="prompt 1 has 0 tokens; the limits are 1"):
        kv.match_many([[1], []], b"m")
    with kv.step([seq], [2], heads=HEADS, tokens=[-1, 7]):  # none is known from the first on
        pass
    seq, = kv.create(namespace=b"m")
    for kind in (np.int32, np.uint32, np.int64):
        compute(kv, seq, np.arange(4, dtype=kind))
    assert kv.matching([np.arange(5), np.tile(np.arange(4), 4)], b"m") == [4, 12]


def test_k_and_v_that_a_worker_writes_itself_are_found_after_its_commit(connect):
    _, kv = connect()
    seq, = kv.create(namespace=b"m")
    prompt = [5, 6, 7, 8, 9]
    with kv.step([seq], [4], run=False, tokens=prompt[:4]) as step:
        for slot in step.slots:
            for layer in range(LAYERS):
                key, value = kv.kv(slot, layer)
                key[...] = 2
                value[...] = 3
        assert kv.matching([prompt], b"m") == [0]
        step.commit()
    assert kv.matching([prompt], b"m") == [4]
    kv.append([seq], [4])  # of these nobody knows the tokens
    found, matched = kv.match(prompt, b"m")
    key, _ = kv.kv(kv.slots(found, 3, 1)[0], 1)
    assert matched == 4 and (key.numpy() == 2).all()
