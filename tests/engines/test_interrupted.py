"""What is left of passes and changes that end by Ctrl-C, that the daemon doesn't answer in time, or
that it refuses half way: the cache is as it was before, or says that it isn't."""

import contextlib
import threading

import pytest
import torch

import tinyserve
import tinyserve.step
from models import cache_name, llama, prompts
from tinyserve.transformers import attention

POOL = "p:layers=3,kv_heads=2,head_dim=32,dtype=fp32,block_tokens=16,blocks=64"


@pytest.fixture(scope="module")
def model():
    return llama()


def logits(model, ids, cache=None):
    """Of the last column; with a cache, all that isn't there yet is given."""
    past = cache.get_seq_length() if cache is not None else 0
    given = {cache_name(model): cache} if cache is not None else {}
    with torch.no_grad():
        return model(input_ids=ids[:, past:], use_cache=cache is not None, **given).logits[:, -1]


def lengths(cache):
    return cache.session.pool.lengths(cache.seqs)


def in_use(url):
    with tinyserve.connect(url) as client:
        return client.pool("p").stats().sequences


def interrupting(function):
    """The function, and then Ctrl-C."""
    def call(*args, **kwargs):
        function(*args, **kwargs)
        raise KeyboardInterrupt
    return call


def unanswered(function, daemon):
    """The function, while the daemon stands still: it is carried out later."""
    def call(*args, **kwargs):
        daemon.pause()
        try:
            return function(*args, **kwargs)
        finally:
            daemon.resume()
    return call


def is_free(lock):
    got = []
    thread = threading.Thread(target=lambda: got.append(lock.acquire(blocking=False)) or
                              (got[0] and lock.release()))
    thread.start()
    thread.join()
    return got[0]


@pytest.mark.parametrize("way", ["by Ctrl-C", "without an answer"])
def test_a_commit_that_was_carried_out_is_undone(model, attach, start_daemon, monkeypatch, way):
    daemon, ids = start_daemon(POOL), prompts(40, 40)["input_ids"]
    kv = attach(model, url=daemon.url, timeout=0.5)
    cache, want = kv.cache(), logits(model, ids)
    logits(model, ids[:, :32], cache)
    with monkeypatch.context() as patched:
        if way == "by Ctrl-C":
            patched.setattr(tinyserve.step.lib, "ts_step_commit",
                            interrupting(tinyserve.step.lib.ts_step_commit))
        else:
            patched.setattr(tinyserve.step.Step, "commit",
                            unanswered(tinyserve.step.Step.commit, daemon))
        with pytest.raises(KeyboardInterrupt if way == "by Ctrl-C" else tinyserve.TimedOutError):
            logits(model, ids, cache)
    assert cache.get_seq_length() == 32
    assert (logits(model, ids, cache) - want).abs().max() <= 1e-4
    assert lengths(cache) == [40, 40]
    cache.close()
    assert in_use(daemon.url) == 0


@pytest.mark.parametrize("place", ["create", "step", "select"])
def test_ctrl_c_in_a_pass_leaves_the_session_to_others(model, attach, start_daemon, monkeypatch,
                                                       place):
    daemon, ids = start_daemon(POOL), prompts(40)["input_ids"]
    kv = attach(model, url=daemon.url)
    cache = kv.cache()
    if place != "create":
        logits(model, ids[:, :32], cache)
    if place == "select":  # rows that differ: the sequence is forked
        ids = torch.cat([ids, ids])
        ids[1, 35] = 7
    want = logits(model, ids)
    with monkeypatch.context() as patched:
        pool = cache.session.pool
        patched.setattr(pool, place, interrupting(getattr(pool, place)))
        with pytest.raises(KeyboardInterrupt):
            logits(model, ids, cache)
    assert attention.current() is None and cache.forward is None
    assert is_free(cache.session.lock)
    if place == "select":
        with pytest.raises(tinyserve.DisconnectedError, match="which rows the cache has isn't"):
            cache.get_seq_length() and logits(model, ids, cache)
        cache.reset()
    assert (logits(model, ids, cache) - want).abs().max() <= 1e-4


def test_a_crop_without_an_answer_is_asked_for(model, attach, start_daemon, monkeypatch):
    daemon, ids = start_daemon(POOL), prompts(40)["input_ids"]
    kv = attach(model, url=daemon.url, timeout=0.5)
    cache, want = kv.cache(), logits(model, ids)
    logits(model, ids, cache)
    with monkeypatch.context() as patched:
        pool = cache.session.pool
        patched.setattr(pool, "truncate", unanswered(pool.truncate, daemon))
        with pytest.raises(tinyserve.TimedOutError):
            cache.crop(-10)
    assert lengths(cache) == [cache.get_seq_length()] == [30]
    assert (logits(model, ids, cache) - want).abs().max() <= 1e-4


def test_a_choice_of_rows_without_an_answer_is_told(model, attach, start_daemon, monkeypatch):
    daemon, ids = start_daemon(POOL), prompts(40, 40)["input_ids"]
    kv = attach(model, url=daemon.url, timeout=0.5)
    cache, want = kv.cache(), logits(model, ids)
    logits(model, ids[:, :32], cache)
    with monkeypatch.context() as patched:
        pool = cache.session.pool
        patched.setattr(pool, "select", unanswered(pool.select, daemon))
        with pytest.raises(tinyserve.TimedOutError):
            cache.reorder_cache(torch.tensor([1, 1]))
    for use in (lambda: logits(model, ids, cache), lambda: cache.crop(-1),
                lambda: cache.reorder_cache(torch.tensor([0]))):
        with pytest.raises(tinyserve.DisconnectedError, match="which rows the cache has isn't"):
            use()
    cache.reset()
    assert (logits(model, ids, cache) - want).abs().max() <= 1e-4
    cache.close()
    assert in_use(daemon.url) == 0


def test_copies_that_a_quota_refuses_undo_the_pass(model, attach, start_daemon):
    daemon, ids = start_daemon(f"{POOL},tenant_sequences=4"), prompts(40)["input_ids"]
    kv = attach(model, url=daemon.url)
    cache, want = kv.cache(), logits(model, ids)
    with pytest.raises(tinyserve.QuotaError):
        logits(model, ids.repeat(8, 1), cache)
    assert cache.get_seq_length() == 0 and cache.seqs == []
    logits(model, ids[:, :32], cache)
    with pytest.raises(tinyserve.QuotaError):
        logits(model, ids.repeat(8, 1), cache)
    assert cache.get_seq_length() == 32 and lengths(cache) == [32]
    assert (logits(model, ids, cache) - want).abs().max() <= 1e-4


def test_rows_are_as_many_as_before_a_pass_that_is_refused(model, attach, start_daemon):
    daemon, ids = start_daemon(POOL), prompts(40)["input_ids"]
    kv = attach(model, url=daemon.url)
    cache, want = kv.cache(), logits(model, ids)
    logits(model, ids[:, :32], cache)
    long = prompts(600, 600, seed=3)["input_ids"]
    with pytest.raises(tinyserve.NoSpaceError):
        logits(model, torch.cat([ids[:, :32].repeat(2, 1), long], 1), cache)

    def fail(*_):
        raise RuntimeError("half way")

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="half way"):
        logits(model, torch.cat([ids[:, :32].repeat(2, 1), long[:, :9]], 1), cache)
    hook.remove()
    assert cache.batch_size == 1 and lengths(cache) == [32]
    assert (logits(model, ids, cache) - want).abs().max() <= 1e-4


def test_a_sequence_that_an_operator_freed_keeps_no_other(model, attach, start_daemon):
    daemon, ids = start_daemon(POOL), prompts(40, 40, 40)["input_ids"]
    kv = attach(model, url=daemon.url)
    cache = kv.cache()
    logits(model, ids, cache)
    cache.session.pool.free(cache.seqs[1:2])
    cache.close()
    assert in_use(daemon.url) == 0


@contextlib.contextmanager
def in_use_by_another_thread(lock):
    inside, over = threading.Event(), threading.Event()

    def use():
        with lock:
            inside.set()
            over.wait()

    thread = threading.Thread(target=use)
    thread.start()
    inside.wait()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_what_is_dropped_during_a_call_is_freed_later(model, attach, start_daemon):
    """As by a finalizer that runs in the midst of one."""
    daemon, ids = start_daemon(POOL), prompts(40)["input_ids"]
    kv = attach(model, url=daemon.url)
    cache, other = kv.cache(), kv.cache()
    logits(model, ids, cache)
    with in_use_by_another_thread(cache.session.client._opened):
        cache.close()
    assert in_use(daemon.url) == 1
    logits(model, ids, other)
    other.close()
    assert in_use(daemon.url) == 0


def test_what_cannot_be_freed_at_once_is_freed_one_by_one(model, attach, start_daemon):
    """More than a batch may have, and what was dropped twice."""
    daemon = start_daemon(POOL, settings=("batch=4",))
    ids = prompts(40, 40, 40)["input_ids"]
    kv = attach(model, url=daemon.url)
    caches = [kv.cache(), kv.cache()]
    for cache in caches:
        logits(model, ids, cache)
    with in_use_by_another_thread(caches[0].session.lock):
        for cache in caches:
            seqs = cache.seqs
            cache.close()
            cache.session.drop(seqs[:1])
            cache.reset()
    assert in_use(daemon.url) == 6
    logits(model, ids[:1], kv.cache())
    assert in_use(daemon.url) <= 1  # the last one's, until it is collected


def test_rows_that_there_are_not_change_nothing(model, attach, start_daemon):
    daemon, ids = start_daemon(POOL), prompts(40, 40)["input_ids"]
    kv = attach(model, url=daemon.url)
    cache, want = kv.cache(), logits(model, ids)
    logits(model, ids[:, :32], cache)
    for picks in ([0, -1], [0, 2]):
        with pytest.raises((ValueError, OverflowError, IndexError)):
            cache.reorder_cache(torch.tensor(picks))
    assert (logits(model, ids, cache) - want).abs().max() <= 1e-4


def test_a_cache_that_is_closed_in_its_pass(model, attach, start_daemon):
    daemon, ids = start_daemon(POOL), prompts(40)["input_ids"]
    kv = attach(model, url=daemon.url)
    cache, other = kv.cache(), kv.cache()

    def fail(*_):
        cache.close()
        raise RuntimeError("half way")

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="half way"):
        logits(model, ids, cache)
    hook.remove()
    logits(model, ids, other)
    other.close()
    assert in_use(daemon.url) == 0
