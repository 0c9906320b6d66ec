"""The Python package against a real daemon, on host memory."""

import os
import pathlib
import subprocess

import numpy as np
import pytest
from test_metrics import ask, free_port

import tinyserve


def attention(q, k, v):
    """Causal attention of the last len(q) tokens over all: [tokens, heads, dim] in float64."""
    n, heads, dim = q.shape
    group = heads // k.shape[1]
    out = np.empty((n, heads, dim))
    for h in range(heads):
        scores = q[:, h].astype(float) @ k[:, h // group].astype(float).T / np.sqrt(dim)
        for i in range(n):
            scores[i, len(k) - n + i + 1:] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, h] = weights / weights.sum(axis=1, keepdims=True) @ v[:, h // group]
    return out


def random_rows(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def test_a_step_attends_and_its_tokens_can_be_read_back(client):
    rng = np.random.default_rng(1)
    with client.pool("tiny") as kv:
        assert kv.geometry == tinyserve.Geometry(2, 2, 64, 4, "fp32", "nhd")
        assert (kv.blocks, kv.device, kv.memory, kv.cuda_device) == (64, "host", "host", None)
        seq, = kv.create()
        k, v = random_rows(rng, 7, 2, 64), random_rows(rng, 7, 2, 64)
        for first, count in ((0, 5), (5, 2)):
            with kv.step([seq], [count], heads=4) as step:
                assert (step.tokens, step.start(0)) == (count, first)
                for layer in range(2):
                    q = random_rows(rng, count, 4, 64)
                    step.q[...] = q
                    step.k[...] = k[first:first + count] * (layer + 1)
                    step.v.numpy()[:] = v[first:first + count]
                    step.run(layer)
                    expected = attention(q, k[:first + count] * (layer + 1), v[:first + count])
                    np.testing.assert_allclose(step.out.numpy(), expected, rtol=0, atol=1e-5)
                step.commit()
        assert kv.lengths([seq]) == [7]
        slots = kv.slots(seq, 0, 7)
        key, value = kv.kv(slots[6], 1)
        assert key.shape == (2, 64)
        np.testing.assert_array_equal(key.numpy(), k[6] * 2)
        np.testing.assert_array_equal(value.numpy(), v[6])
        keys, values = kv.layer(0, slots)
        assert keys.shape == (64, 4, 2, 64)
        blocks = np.array(slots)
        np.testing.assert_array_equal(keys.numpy()[blocks // 4, blocks % 4], k)
        np.testing.assert_array_equal(values.numpy()[blocks // 4, blocks % 4], v)
        with pytest.raises(ValueError):
            key.numpy()[...] = 0  # read-only


def test_blocks_that_are_longer_than_their_layers_are_found(start_daemon):
    """40 layers, say: tinyserve_types.h, ts_geometry_block_bytes."""
    rng = np.random.default_rng(3)
    daemon = start_daemon("long:layers=5,kv_heads=8,head_dim=64,dtype=fp32,block_tokens=4,"
                          "blocks=16")
    with tinyserve.connect(daemon.url) as client, client.pool("long") as kv:
        assert kv.geometry.plane_bytes * 2 * 5 == 80 << 10
        assert kv.geometry.block_bytes == 82 << 10
        seq, = kv.create()
        k, v = random_rows(rng, 5, 23, 8, 64), random_rows(rng, 5, 23, 8, 64)
        q = random_rows(rng, 23, 8, 64)
        with kv.step([seq], [23], heads=8) as step:
            for layer in range(5):
                step.q[...], step.k[...], step.v[...] = q, k[layer], v[layer]
                step.run(layer)
                np.testing.assert_allclose(step.out.numpy(), attention(q, k[layer], v[layer]),
                                           rtol=0, atol=1e-5)
            step.commit()
        slots = np.array(kv.slots(seq, 0, 23))
        for layer in range(5):
            for stored, meant in zip(kv.layer(layer, slots.tolist()), (k, v)):
                np.testing.assert_array_equal(stored.numpy()[slots // 4, slots % 4], meant[layer])
            for stored, meant in zip(kv.kv(int(slots[22]), layer), (k, v)):
                np.testing.assert_array_equal(stored.numpy(), meant[layer][22])


def test_variants_of_attention_go_through_the_service(client):
    rng = np.random.default_rng(2)
    n, past, dim = 3, 40, 64
    with client.pool("tiny") as kv:
        seq, = kv.create()
        k, v = random_rows(rng, past + n, 2, dim), random_rows(rng, past + n, 2, dim)
        sinks, slopes = random_rows(rng, 4), np.float32([0.5, 0.25, 0.125, 0.0625])
        for first, count in ((0, past), (past, n)):
            with kv.step([seq], [count], heads=4, scale=0.25) as step:
                step.k[...], step.v[...] = k[first:first + count], v[first:first + count]
                for layer in range(2):
                    step.run(layer)
                if first == 0:
                    step.commit()
                    continue
                q = random_rows(rng, n, 4, dim)
                step.q[...], step.sinks[...], step.alibi[...] = q, sinks, slopes
                assert step.lse.shape == (n, 4)
                for window, cap, scale, sink, alibi in (
                        (0, 0.0, 0.0, False, False), (7, 0.0, 0.0, False, False),
                        (0, 2.0, 0.5, False, False), (0, 0.0, 0.0, True, False),
                        (0, 0.0, 0.0, False, True), (11, 3.0, 0.3, True, True)):
                    step.out.numpy()[...] = np.nan
                    step.run(1, window=window, soft_cap=cap, scale=scale, sinks=sink, alibi=alibi,
                             lse=True)
                    for i in range(n):
                        at = past + i
                        seen = np.arange(max(0, at + 1 - window) if window else 0, at + 1)
                        for h in range(4):
                            s = k[seen, h // 2].astype(float) @ q[i, h] * (scale or 0.25)
                            s = cap * np.tanh(s / cap) if cap else s
                            s = s + slopes[h] * (seen - at) if alibi else s
                            total = np.exp(s).sum()
                            assert abs(step.lse.numpy()[i, h] - np.log(total)) < 1e-5
                            total += np.exp(float(sinks[h])) if sink else 0
                            expected = np.exp(s) / total @ v[seen, h // 2]
                            np.testing.assert_allclose(step.out.numpy()[i, h], expected, atol=1e-5)
                for bad in ({"soft_cap": -1.0}, {"scale": float("inf")},
                            {"soft_cap": float("nan")}):
                    with pytest.raises(tinyserve.InvalidError,
                                       match="must be finite and not negative"):
                        step.run(1, **bad)


@pytest.mark.parametrize("execution", ["daemon", "local"])
def test_some_sequences_of_a_step_may_get_no_token(start_daemon, execution):
    rng = np.random.default_rng(4)
    daemon = start_daemon("tiny:layers=1,kv_heads=2,head_dim=64,dtype=fp32,block_tokens=4,"
                          "blocks=64,client_write=all")
    with tinyserve.connect(daemon.url, execution=execution) as client, \
            client.pool("tiny", writable=True) as kv:
        seqs = kv.create(3)
        stored = [np.zeros((2, 0, 2, 64), np.float32) for _ in seqs]
        for new_tokens in ((0, 3, 0), (0, 0, 6), (2, 0, 1), (0, 5, 0)):
            total = sum(new_tokens)
            q, rows = random_rows(rng, total, 2, 64), random_rows(rng, 2, total, 2, 64)
            with kv.step(seqs, new_tokens) as step:
                step.q[...], step.k[...], step.v[...] = q, rows[0], rows[1]
                step.run(0)
                first = 0
                for i, n in enumerate(new_tokens):
                    stored[i] = np.concatenate([stored[i], rows[:, first:first + n]], axis=1)
                    if n > 0:
                        np.testing.assert_allclose(
                            step.out.numpy()[first:first + n],
                            attention(q[first:first + n], stored[i][0], stored[i][1]), atol=1e-5)
                    first += n
                step.commit()
            assert kv.lengths(seqs) == [s.shape[1] for s in stored]
        with pytest.raises(tinyserve.InvalidError, match="a step of 3 sequences has 0 new tokens"):
            kv.step(seqs, (0, 0, 0))


def test_a_client_that_finds_the_daemon_finds_its_handle_socket_and_its_page(tmp_path):
    for turn in range(10):
        socket, port = tmp_path / f"s{turn}", free_port()
        daemon = subprocess.Popen([os.environ["TS_TEST_DAEMON"], "--socket", str(socket), "--set",
                                   "log_level=warning", "--set", f"metrics=127.0.0.1:{port}",
                                   "--pool", "p:layers=1,kv_heads=1,head_dim=32,blocks=1,"
                                             "device=host"])
        while not socket.exists():
            assert daemon.poll() is None
        there = pathlib.Path(f"{socket}.handles").exists() and \
            ask(port, "/healthz")[0].status == 200
        daemon.terminate()
        assert daemon.wait() == 0
        assert there


def fp8_values():
    """What the 256 codes of e4m3 stand for."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0 ** -6,
                    (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[(code & 127) == 127] = np.nan
    return np.where(code & 128, -size, size)


def test_an_fp8_pool_keeps_rounded_rows_and_their_scales(start_daemon):
    rng = np.random.default_rng(3)
    n, dim, values = 21, 32, fp8_values()
    finite = np.flatnonzero(~np.isnan(values))
    small = "small:layers=1,kv_heads=2,head_dim=32,dtype=fp8_e4m3,block_tokens=4,blocks=16"
    daemon = start_daemon(small, "plain:layers=1,kv_heads=2,head_dim=32,dtype=fp32,blocks=4")
    with tinyserve.connect(daemon.url) as client, client.pool("small") as kv:
        assert kv.geometry.dtype == "fp8_e4m3"
        seq, = kv.create()
        q, k, v = (random_rows(rng, n, heads, dim) for heads in (4, 2, 2))
        v[3, 1, 5] = 1e6  # becomes 448 times the scale
        scales = np.float32([[0.02, 0.5], [0.1, 3.0]])
        with kv.step([seq], [n], heads=4) as step:
            step.q[...], step.k[...], step.v[...] = q, k, v
            assert step.scales.shape == (2, 2)
            step.scales[...] = scales
            step.run(0, scales=True)
            out = step.out.numpy().copy()
            step.commit()
        slots = kv.slots(seq, 0, n)
        at = np.array(slots)
        stored = [x.bits()[at // 4, at % 4] for x in kv.layer(0, slots)]
        assert stored[0].dtype == np.uint8 and stored[0].shape == (n, 2, dim)
        meant = []
        for rows, codes, scale in zip((k, v), stored, scales):
            wanted = (rows / scale[None, :, None]).astype(float)
            errors = np.abs(values[finite] - wanted[..., None])
            np.testing.assert_array_equal(np.abs(values[codes] - wanted), errors.min(axis=-1))
            meant.append(values[codes] * scale[None, :, None])
        assert values[stored[1][3, 1, 5]] == 448
        np.testing.assert_allclose(out, attention(q, *meant), rtol=1e-5, atol=1e-5)
        with kv.step([seq], [1], heads=4, io_dtype="bf16") as step:
            assert step.q.dtype == "bf16"
        with client.pool("plain") as other, other.step(other.create(), [1]) as step:
            with pytest.raises(tinyserve.InvalidError,
                               match="scales, but the pool is of fp32; they are for fp8_e4m3"):
                step.run(0, scales=True)


def turn(rows, first, theta, dims, interleaved):
    """Rotary embedding of [tokens, heads, dim] from position `first` on, in float64."""
    out = rows.astype(float)
    pairs = np.arange(dims // 2)
    a, b = (2 * pairs, 2 * pairs + 1) if interleaved else (pairs, pairs + dims // 2)
    angle = (first + np.arange(len(rows)))[:, None, None] * theta ** (-2.0 * pairs / dims)
    x, y = out[..., a], out[..., b]
    out[..., a], out[..., b] = (x * np.cos(angle) - y * np.sin(angle),
                                x * np.sin(angle) + y * np.cos(angle))
    return out


@pytest.mark.parametrize("theta, dims, interleaved", [(10000.0, 0, False), (500.0, 24, True)])
def test_queries_and_keys_are_turned_by_their_positions(client, theta, dims, interleaved):
    rng = np.random.default_rng(3)
    with client.pool("tiny") as kv:
        seq, = kv.create()
        q, k, v = (random_rows(rng, 9, heads, 64) for heads in (4, 2, 2))
        turned = [turn(x, 0, theta, dims or 64, interleaved) for x in (q, k)]
        for first, count in ((0, 6), (6, 3)):
            with kv.step([seq], [count], heads=4) as step:
                rows = slice(first, first + count)
                step.q[...], step.k[...], step.v[...] = q[rows], k[rows], v[rows]
                for layer in range(2):
                    step.run(layer, rope_theta=theta, rope_dims=dims, rope_interleaved=interleaved)
                expected = attention(turned[0][rows], turned[1][:first + count], v[:first + count])
                np.testing.assert_allclose(step.out.numpy(), expected, rtol=0, atol=1e-5)
                for bad in ({"rope_dims": 7}, {"rope_dims": 66}, {"rope_theta": -1.0}):
                    with pytest.raises(tinyserve.InvalidError, match="rope"):
                        step.run(0, **{"rope_theta": theta, **bad})
                step.commit()
        key, _ = kv.kv(kv.slots(seq, 8, 1)[0], 0)
        np.testing.assert_allclose(key.numpy(), turned[1][8], rtol=0, atol=1e-6)


def test_leaving_a_step_without_a_commit_drops_its_tokens(client):
    with client.pool("tiny") as kv:
        seqs = kv.create(3)
        with kv.step(seqs, [1, 2, 3]):
            pass
        assert kv.lengths(seqs) == [0, 0, 0]
        with pytest.raises(RuntimeError, match="a worker's own bug"):
            with kv.step(seqs, [1, 2, 3]):
                raise RuntimeError("a worker's own bug")
        assert kv.lengths(seqs) == [0, 0, 0]


def test_a_commit_can_accept_some_tokens(client):
    with client.pool("tiny") as kv:
        seqs = kv.create(2)
        with kv.step(seqs, [4, 4]) as step:
            for layer in range(2):
                step.run(layer)
            with pytest.raises(ValueError, match="1 accepted counts for a step of 2 sequences"):
                step.commit([1])
            step.commit([3, 0])
        assert kv.lengths(seqs) == [3, 0]


def test_forks_share_and_kept_sequences_outlive_their_session(client, daemon, run_worker):
    with client.pool("tiny") as kv:
        seq, = kv.create()
        with kv.step([seq], [6]) as step:
            step.k[...] = np.arange(6, dtype=np.float32)[:, None, None]
            for layer in range(2):
                step.run(layer)
            step.commit()
        child, short = kv.fork(seq) + kv.fork(seq, length=4)
        assert kv.lengths([seq, child, short]) == [6, 6, 4]
        assert kv.slots(child, 0, 6) == kv.slots(seq, 0, 6)
        kv.truncate([child], [2])
        assert kv.lengths([child]) == [2]
        kv.free([child, short])
        kv.keep(seq, "prefix")
        with pytest.raises(tinyserve.ExistsError):
            kv.keep(kv.create()[0], "prefix")
        printed = run_worker(
            "import sys, tinyserve\n"
            "with tinyserve.connect(sys.argv[1]) as c, c.pool('tiny') as kv:\n"
            "    seq, length = kv.attach('prefix')\n"
            "    print(length, kv.kv(kv.slots(seq, 5, 1)[0], 1)[0].numpy()[1, 63])\n", daemon.url)
        assert printed.split() == ["6", "5.0"]
        assert kv.attach("prefix") == (seq, 6)
        kv.keep(seq, None)
        with pytest.raises(tinyserve.NotFoundError):
            kv.attach("prefix")


def test_batches_may_be_numpy_arrays(client):
    with client.pool("tiny") as kv:
        seqs = np.array(kv.create(5), dtype=np.uint64)
        with kv.step(seqs, np.arange(1, 6, dtype=np.uint32)) as step:
            assert step.tokens == 15
            assert len(set(step.slots)) == 15
        with kv.step(seqs[::2], np.array([1, 1, 1])) as step:  # strided, and of another type
            assert step.tokens == 3
        with pytest.raises(ValueError, match="5 sequences, but 4 new_tokens"):
            kv.step(seqs, [1, 1, 1, 1])
        for negative in ([-1], np.array([-1], dtype=np.int32)):
            with pytest.raises(OverflowError, match="-1 doesn't fit into 32 bits"):
                kv.step(seqs[:1], negative)


def test_a_writable_pool_takes_appended_rows(start_daemon):
    daemon = start_daemon("open:layers=1,kv_heads=1,head_dim=32,dtype=bf16,block_tokens=4,blocks=8,"
                          "client_write=all")
    with tinyserve.connect(daemon.url) as c, c.pool("open", writable=True) as kv:
        seq, = kv.create()
        slots = kv.append([seq], [6])
        assert slots == [0, 1, 2, 3, 4, 5]
        for t, slot in enumerate(slots):
            kv.kv(slot, 0)[0].bits()[0, :] = 0x3f80 + t
        assert kv.kv(slots[3], 0)[0].bits()[0, 31] == 0x3f83
        with pytest.raises(tinyserve.NoSpaceError, match="pool 'open' has 6 free") as caught:
            kv.append([seq], [27])
        assert (caught.value.status, caught.value.name) == (4, "TS_ENOSPC")
        assert (caught.value.needed, caught.value.free, caught.value.limit) == (7, 6, 8)
        assert kv.lengths([seq]) == [6]


def test_errors_are_exceptions_with_the_daemons_sentence(client, tmp_path):
    with pytest.raises(tinyserve.NotFoundError, match="there is no pool 'none'; there is 'tiny'"):
        client.pool("none")
    with pytest.raises(tinyserve.DeniedError, match="client_write = none"):
        client.pool("tiny", writable=True)
    with client.pool("tiny") as kv:
        with pytest.raises(tinyserve.InvalidError, match="kernel v3 runs on a GPU"):
            kv.step(kv.create(), [1], kernel="v3")
        with pytest.raises(tinyserve.InvalidError, match="there is no kernel 'x'"):
            kv.step(kv.create(), [1], kernel="x")
        with pytest.raises(tinyserve.InvalidError, match="the pool is in host memory"):
            client.exchange(kv, 1 << 20)
        with pytest.raises(ValueError, match="io_dtype 'int8'"):
            kv.step(kv.create(), [1], io_dtype="int8")
        with pytest.raises(tinyserve.InvalidError,
                           match="a frame is for CUDA graphs, and the pool is in host memory"):
            kv.frame(4)
    with pytest.raises(tinyserve.DisconnectedError, match="is tinyserved running"):
        tinyserve.connect(str(tmp_path / "nobody"))
    assert issubclass(tinyserve.DisconnectedError, ConnectionError)


def test_what_was_closed_says_so(client):
    kv = client.pool("tiny")
    step = kv.step(kv.create(), [1])
    kv.close()
    kv.close()
    for use in (lambda: step.run(0), lambda: step.q, kv.create):
        with pytest.raises(tinyserve.DisconnectedError, match="closed|ended"):
            use()
    client.close()
    with pytest.raises(tinyserve.DisconnectedError, match="the client was closed"):
        client.pool("tiny")


def test_a_daemon_that_stops_ends_the_session(client, daemon):
    kv = client.pool("tiny")
    with pytest.raises(tinyserve.DisconnectedError):
        with kv.step(kv.create(), [1]) as step:
            daemon.stop()
            step.run(0)


def test_views_speak_dlpack(client):
    with client.pool("tiny") as kv, kv.step(kv.create(), [3]) as step:
        from tinyserve import view
        before = set(view._exported)
        step.k[...] = np.arange(3 * 2 * 64, dtype=np.float32).reshape(3, 2, 64)
        array = np.from_dlpack(step.k)
        assert array.shape == (3, 2, 64) and array.dtype == np.float32
        assert array[2, 1, 63] == 383
        step.k[2, 1, 63] = -1
        assert array[2, 1, 63] == -1  # the same memory
        assert step.k.__dlpack_device__() == (1, 0)
        unused = step.k.__dlpack__()
        del unused, array
        np.from_dlpack(step.k)  # lets go what a capsule holds that nobody took
        assert set(view._exported) == before
        with pytest.raises(AttributeError):
            step.k.__cuda_array_interface__


def test_memory_of_no_gpu_is_not_registered(client):
    with pytest.raises(TypeError, match=r"register\(\) of a ndarray.* pool 'tiny' \(host\)"):
        client.register(client.pool("tiny"), np.zeros(4096))


def test_a_list_of_pools_that_is_cut_says_so(start_daemon):
    names = [letter * 40 for letter in "abcd"]
    daemon = start_daemon(*(f"{n}:layers=1,kv_heads=1,head_dim=32,blocks=4" for n in names))
    with tinyserve.connect(daemon.url) as c:
        with pytest.raises(tinyserve.NotFoundError) as missing:
            c.pool("x")
        assert str(missing.value) == \
            f"there is no pool 'x'; there are '{names[0]}', '{names[1]}', ..."
