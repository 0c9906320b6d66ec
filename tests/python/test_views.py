"""Views: what is assigned is rounded to their type, and arrays of them can always be touched."""

import threading
import warnings

import numpy as np
import pytest

import tinyserve

POOLS = [f"{dtype}:layers=2,kv_heads=2,head_dim=32,dtype={dtype},block_tokens=4,blocks=64,"
         "client_write=all" for dtype in ("fp32", "fp16", "bf16", "fp8_e4m3")]


@pytest.fixture
def pools(start_daemon):
    with tinyserve.connect(start_daemon(*POOLS).url) as client:
        yield client


@pytest.fixture
def element(pools):
    """Stores a number in a pool of the type and returns its bits: element(dtype, number)."""
    places = {}

    def store(dtype, values):
        if dtype not in places:
            kv = pools.pool(dtype, writable=True)
            places[dtype] = kv.kv(kv.append(kv.create(), [1])[0], 0)[0]
        view, values = places[dtype], np.asarray(values)
        found = []
        for first in range(0, len(values), 64):
            some = values[first:first + 64]
            rows = np.zeros(64, values.dtype)
            rows[:len(some)] = some
            view[...] = rows.reshape(2, 32)
            found.append(view.bits().reshape(64)[:len(some)].copy())
        return np.concatenate(found)

    return store


def numbers(dtype):
    """Every finite number of the type that isn't negative, in order: its code is its index."""
    if dtype == "fp16":
        return np.arange(0x7c00, dtype=np.uint16).view(np.float16).astype(float)
    if dtype == "bf16":
        return (np.arange(0x7f80, dtype=np.uint32) << 16).view(np.float32).astype(float)
    return np.array([(c & 7) / 512 if c < 8 else (8 + (c & 7)) * 2.0 ** ((c >> 3) - 10)
                     for c in range(0x7f)])


@pytest.mark.parametrize("dtype, kinds", [("fp16", "fd"), ("bf16", "fd"), ("fp8_e4m3", "efd")])
def test_floats_are_rounded_to_the_nearest_and_to_even(element, dtype, kinds):
    exact = numbers(dtype)[::17 if dtype != "fp8_e4m3" else 1]
    code = np.arange(len(numbers(dtype)))[::17 if dtype != "fp8_e4m3" else 1][:-1]
    low, high = exact[:-1], numbers(dtype)[code + 1]
    middle = (low + high) / 2
    sign = {"fp8_e4m3": 0x80}.get(dtype, 0x8000)
    for kind in kinds:
        kept = middle.astype(kind).astype(float) == middle  # the type can hold the tie
        for values, expected in (
                (low, code), (-low, code | sign), (middle, code + code % 2),
                (np.nextafter(middle.astype(kind), np.inf, dtype=kind), code + 1),
                (np.nextafter(middle.astype(kind), -np.inf, dtype=kind), code)):
            found = element(dtype, values.astype(kind))
            np.testing.assert_array_equal(found[kept], expected[kept])


@pytest.mark.parametrize("dtype, beyond, nan", [("fp16", 0x7c00, 0x7e00), ("bf16", 0x7f80, 0x7fc0),
                                                ("fp8_e4m3", 0x7e, 0x7f)])
def test_what_no_number_comes_near_is_infinite_or_the_largest(element, dtype, beyond, nan):
    for kind in "fd":
        found = element(dtype, np.array([np.inf, 3.4e38, np.nan, 0.0, 0.5], kind))
        if dtype == "bf16":
            assert found[1] == 0x7f80 and np.float32(3.4e38) > numbers("bf16")[-1]
        np.testing.assert_array_equal(found[:3], [beyond, beyond, nan])
        np.testing.assert_array_equal(element(dtype, -found[3:].astype(kind) * 0 - np.inf) > beyond,
                                      True)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_half_is_a_half_in_any_type(pools, dtype):
    with pools.pool(dtype) as kv, kv.step(kv.create(), [3], io_dtype=dtype) as step:
        step.q[...] = 0.5
        step.k[...] = step.v[...] = 2
        step.v[1] = np.float32(-3)
        assert (step.q.bits() == {"fp16": 0x3800, "bf16": 0x3f00}[dtype]).all()
        for layer in range(2):
            step.run(layer)
        np.testing.assert_array_equal(step.out.float32()[0], np.full((2, 32), 2, np.float32))
        step.commit()
        step = kv.step(kv.create(), [3], io_dtype=dtype)
        step.k[...] = step.q  # bits, as they are
        step.q[...] = kv.kv(0, 0)[0]
        np.testing.assert_array_equal(step.q.float32(), np.full((3, 2, 32), 2, np.float32))
        np.testing.assert_array_equal(np.asarray(step.q, np.float32), step.q.float32())
        step.abort()


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "fp8_e4m3"])
def test_what_may_be_bits_or_has_another_shape_is_refused(pools, dtype):
    with pools.pool(dtype, writable=True) as kv:
        view, _ = kv.kv(kv.append(kv.create(), [1])[0], 0)
        view[...] = 1
        before = view.bits().copy()
        assert view.float32().tolist() == [[1] * 32] * 2
        wrong = [np.ones((2, 32), bool), np.ones((2, 32), complex), "1", np.array([None] * 32)]
        if dtype != "fp32":
            wrong += [np.full((2, 32), 0x3f80, np.uint16), np.uint8(3), [1] * 32]
        for value in wrong:
            with pytest.raises(TypeError, match=f"assigned to a view of {dtype}: numbers must be "
                                                r"floats.* bits\(\)"):
                view[...] = value
        for value in (np.ones((3, 32)), np.ones(31), np.ones((1, 2, 33))):
            with pytest.raises(ValueError, match="broadcast"):
                view[...] = value
        np.testing.assert_array_equal(view.bits(), before)
    with pools.pool(dtype) as kv:
        with pytest.raises(ValueError, match="read-only"):
            kv.kv(0, 0)[0][...] = 1.0


def test_numpy_has_a_views_numbers_or_says_what_is_missing(pools):
    for dtype, name in ("bf16", "bfloat16"), ("fp8_e4m3", "float8_e4m3fn"):
        with pools.pool(dtype, writable=True) as kv:
            view, _ = kv.kv(kv.append(kv.create(), [1])[0], 0)
            view[...] = np.linspace(-2, 2, 64).reshape(2, 32)
            try:
                import ml_dtypes
            except ImportError:
                for use in (view.numpy, lambda: np.asarray(view), lambda: view[0]):
                    with pytest.raises(TypeError, match=f"NumPy has no {dtype}: install ml_dtypes"):
                        use()
                continue
            assert view.numpy().dtype == np.dtype(getattr(ml_dtypes, name))
            np.testing.assert_array_equal(view.numpy().astype(np.float32), view.float32())
            view.numpy()[0, 0] = 0.5
            assert view[0, 0] == 0.5 and view.float32()[0, 0] == 0.5
            view[...] = np.full(32, 1.5, view.numpy().dtype)
            assert (view.float32() == 1.5).all()


def test_a_view_raises_once_its_step_or_pool_has_ended(client):
    kv = client.pool("tiny")
    seq, = kv.create()
    ended = []
    for end in ("commit", "abort"):
        step = kv.step([seq], [1])
        views = [step.q, step.k, step.v, step.out, step.sinks, step.alibi, step.lse, step.scales]
        assert views[0] is step.q  # one for each step
        for layer in range(2):
            step.run(layer)
        getattr(step, end)()
        ended += [(view, "the step has ended") for view in views]
    ended += [(view, "pool 'tiny' was closed") for view in kv.kv(0, 0) + kv.layer(1, [0])]
    kv.close()
    for view, message in ended:
        for use in (view.numpy, view.bits, view.float32, view.torch, view.__dlpack__,
                    lambda: np.asarray(view), lambda: view[0], lambda: view.__setitem__(0, 0.0)):
            with pytest.raises(tinyserve.DisconnectedError, match=message):
                use()
        assert repr(view).endswith(", ended>")


def test_arrays_can_be_touched_whatever_was_closed(start_daemon, run_worker):
    daemon = start_daemon(*POOLS)
    printed = run_worker("""if True:
        import gc, sys, numpy as np, tinyserve
        def touch():
            for array in arrays:
                array.sum(), float(array.flat[0])
                if array.flags.writeable:
                    array[...] = 1
        for end in "pool", "client", "forgotten":
            client = tinyserve.connect(sys.argv[1])
            kv = client.pool("fp32")
            seq, = kv.create()
            arrays = []
            for tokens in 1, 50, 150:  # the exchange grows
                step = kv.step([seq], [tokens])
                step.q[...] = step.k[...] = step.v[...] = 0
                for layer in 0, 1:
                    step.run(layer)
                arrays += [view.numpy() for view in (step.q, step.k, step.v, step.out, step.lse)]
                arrays += [np.from_dlpack(step.q), step.k[0][..., 3:]]
                step.commit() if tokens == 50 else step.abort()
                touch()
            slots = kv.slots(seq, 0, 50)
            arrays += [x.numpy() for pair in (kv.kv(slots[9], 0), kv.layer(1, slots)) for x in pair]
            touch()
            if end == "pool":
                kv.close()
                touch()
            if end != "forgotten":
                client.close()
            del client, kv, step
            gc.collect()
            touch()
            held = open("/proc/self/maps").read().count("/memfd:")
            del arrays
            gc.collect()
            print(held, open("/proc/self/maps").read().count("/memfd:"))
        """, daemon.url)
    assert printed == "4 0\n" * 3  # three exchanges and a slab, and then nothing


def test_an_interpreter_may_end_with_everything_open(start_daemon):
    import subprocess
    import sys
    daemon = start_daemon(*POOLS)
    result = subprocess.run([sys.executable, "-c", """if True:
        import builtins, sys, numpy as np, tinyserve
        client = tinyserve.connect(sys.argv[1])
        kv = client.pool("fp32")
        step = kv.step(kv.create(), [3])
        builtins.kept = [step.q.numpy(), np.from_dlpack(step.k), step.v.__dlpack__(), step.out]
        sys.kept = [np.from_dlpack(step.v), step, client]
        """, daemon.url], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_step_that_is_forgotten_lets_its_sequences_go(client):
    with client.pool("tiny") as kv:
        seq, = kv.create()
        step = kv.step([seq], [1])
        view = step.q  # keeps the memory, not the step
        with pytest.warns(ResourceWarning, match="step of 1 tokens in 'tiny' was dropped without"):
            del step
        with pytest.raises(tinyserve.DisconnectedError, match="the step has ended"):
            view.numpy()
        step = kv.step([seq], [2])  # it is in no step
        held = [step]
        del step
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            other = threading.Thread(target=held.clear)
            other.start()
            other.join()
        assert [w.category for w in caught] == [ResourceWarning]
        with kv.step([seq], [3]):
            pass
        assert kv.lengths([seq]) == [0]


def test_slabs_that_are_not_mapped_read_as_zeros(start_daemon, run_worker):
    daemon = start_daemon("wide:layers=1,kv_heads=8,head_dim=128,dtype=fp32,block_tokens=16,"
                          "blocks=256,slab=1M,client_write=all")
    printed = run_worker("""if True:
        import sys, tinyserve
        with tinyserve.connect(sys.argv[1]) as c, c.pool("wide", writable=True) as kv:
            try:
                kv.layer(0, [])
            except ValueError as error:
                print(error)
            seq, = kv.create()
            slot, = kv.append([seq], [1])
            key, _ = kv.kv(slot, 0)
            key[...] = 0.5
            keys, values = kv.layer(0, [slot])
            assert keys.shape == (256, 16, 8, 128)
            print(keys.numpy().sum(), abs(values.numpy()).sum())
        """, daemon.url)
    assert printed == ("no slab of the pool is mapped yet, and slots names none\n"
                       "512.0 0.0\n")


def test_numpy_is_needed_by_nothing_but_arrays(client, daemon, run_worker):
    printed = run_worker("""if True:
        import sys
        sys.modules["numpy"] = None
        import tinyserve
        with tinyserve.connect(sys.argv[1]) as c, c.pool("tiny") as kv:
            seq, = kv.create()
            with kv.step([seq], [2]) as step:
                step.k.__dlpack__()
                try:
                    step.k[...] = 0
                except ImportError as error:
                    print(error)
                for layer in range(2):
                    step.run(layer)
                step.commit()
            print(kv.lengths([seq]))
        """, daemon.url)
    assert printed == ("a view's numbers need NumPy: pip install 'tinyserve[numpy]', or numpy; "
                       ".torch() goes without\n[2]\n")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_tensors_go_in_and_out(pools, dtype):
    torch = pytest.importorskip("torch")
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    with pools.pool(dtype) as kv:
        step = kv.step(kv.create(), [3], io_dtype=dtype)
        numbers_ = torch.linspace(-3, 3, 3 * 2 * 32).reshape(3, 2, 32)
        step.q[...] = numbers_
        step.k[...] = numbers_.to(kind)
        step.v[...] = numbers_.numpy()
        for view in step.q, step.k, step.v:
            assert view.torch().dtype == kind
            assert torch.equal(view.torch(), numbers_.to(kind))
            assert view.torch().data_ptr() == view.ptr
        if dtype != "fp32":
            with pytest.raises(TypeError, match="numbers must be floats"):
                step.q[...] = torch.ones(32, dtype=torch.int16)
        kept = step.q.torch().unsqueeze_(0)  # of this tensor alone
        assert step.q.torch().shape == (3, 2, 32)
        step.abort()
        with pytest.raises(tinyserve.DisconnectedError):
            step.q.torch()
    pools.close()
    assert torch.equal(kept[0], numbers_.to(kind))  # it can still be touched


def test_a_tensor_of_fp8_has_its_numbers(pools):
    torch = pytest.importorskip("torch")
    with pools.pool("fp8_e4m3", writable=True) as kv:
        view, _ = kv.kv(kv.append(kv.create(), [1])[0], 0)
        view[...] = torch.linspace(-3, 3, 64).reshape(2, 32)
        assert view.torch().dtype == torch.float8_e4m3fn
        rounded = torch.linspace(-3, 3, 64).reshape(2, 32).to(torch.float8_e4m3fn)
        assert torch.equal(view.torch().float(), rounded.float())
        np.testing.assert_array_equal(view.float32(), rounded.float().numpy())
