"""What stands for something of a session isn't copied; what only tells of it is."""

import copy
import gc
import pickle

import numpy as np
import pytest

import tinyserve
from tinyserve import view


@pytest.fixture(params=["client", "pool", "step", "frame", "view", "ended view", "memory"])
def thing(request, client):
    kv = client.pool("tiny")
    step = kv.step(kv.create(), [5])
    q, things = step.q, {"client": client, "pool": kv, "step": step, "view": step.q,
                         "memory": step.q._memory, "frame": object.__new__(tinyserve.Frame)}
    step.commit() if request.param == "step" and step.run(0) or step.run(1) else step.abort()
    return things.get(request.param, q)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_what_the_library_ends_once_has_no_copy(client, thing, copied):
    with pytest.raises(TypeError, match=f"tinyserve.{type(thing).__name__} can't be copied or "
                                        "pickled: .+"):
        copied(thing)
    gc.collect()
    assert client.pools()[0].name == "tiny"
    with client.pool("tiny") as kv, kv.step(kv.create(), [5]) as step:
        step.q[...] = 1.0  # the exchange is mapped still
        step.run(0)


def test_records_and_errors_are_copied(client):
    kv = client.pool("tiny")
    with pytest.raises(tinyserve.NoSpaceError) as refused:
        kv.step(kv.create(), [1000])
    for thing in (client.pools(), kv.geometry, kv.stats()):
        assert pickle.loads(pickle.dumps(thing)) == copy.deepcopy(thing) == thing
    for error in (copy.copy(refused.value), pickle.loads(pickle.dumps(refused.value))):
        assert type(error) is tinyserve.NoSpaceError
        assert vars(error) == vars(refused.value) and str(error) == str(refused.value)


def test_a_capsule_that_its_consumer_refuses_keeps_the_refusal_and_holds_nothing(start_daemon):
    daemon = start_daemon("half:layers=2,kv_heads=2,head_dim=64,dtype=bf16,memory=1M")
    before = set(view._exported)
    with tinyserve.connect(daemon.url) as client, client.pool("half") as kv:
        with kv.step(kv.create(), [3], io_dtype="bf16") as step:
            for _ in range(3):
                with pytest.raises((BufferError, RuntimeError, TypeError), match="(?i)dtype|type"):
                    np.from_dlpack(step.q)
            assert len(set(view._exported) - before) <= 1  # the last one's, until the next
    assert set(view._exported) == before
