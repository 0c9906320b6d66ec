"""Sequences that outlive their session: on tickets, and kept under names."""

import signal
import subprocess
import sys

import numpy as np
import pytest
from test_metrics import ask, free_port, values

import tinyserve

POOL = "p:layers=2,kv_heads=2,head_dim=64,dtype=fp32,block_tokens=4,blocks=64"


@pytest.fixture(params=["ring", "messages"])
def session(start_daemon, request):
    daemon = start_daemon(POOL)
    clients = []

    def start():
        clients.append(tinyserve.connect(daemon.url, transport=request.param))
        clients[-1].url = daemon.url
        return clients[-1].pool("p")

    yield start
    for client in clients:
        client.close()


def compute(kv, seq, tokens):
    """What a token computes is its id."""
    with kv.step([seq], [len(tokens)], tokens=tokens) as step:
        step.k[...] = np.array(tokens, np.float32)[:, None, None]
        for layer in range(2):
            step.run(layer)
        step.commit()


def test_a_scheduler_matches_and_a_worker_in_another_process_reads(session, run_worker):
    scheduler = session()
    first, = scheduler.create(namespace=b"m")
    compute(scheduler, first, list(range(10)))
    found, matched = scheduler.match(list(range(20)), b"m")
    assert matched == 8
    ticket = scheduler.ticket(found)
    assert len(ticket) == 16 and ticket != scheduler.ticket(scheduler.create()[0])
    printed = run_worker(
        "import sys, tinyserve\n"
        "with tinyserve.connect(sys.argv[1]) as c, c.pool('p') as kv:\n"
        "    seq = kv.redeem(bytes.fromhex(sys.argv[2]))\n"
        "    print(*kv.lengths([seq]), kv.kv(kv.slots(seq, 7, 1)[0], 1)[0].numpy()[1, 63])\n"
        "    with kv.step([seq], [4], tokens=[8, 9, 10, 11]) as step:\n"
        "        step.run(0)\n"
        "        step.run(1)\n"
        "        step.commit()\n"
        "    print(*kv.matching([range(20)], b'm'))\n",
        scheduler.client.url, ticket.hex())
    assert printed.split() == ["8", "7.0", "12"]
    for use in (lambda: scheduler.lengths([found]), lambda: scheduler.free([found]),
                lambda: scheduler.step([found], [1]), lambda: scheduler.ticket(found)):
        with pytest.raises(tinyserve.NotFoundError, match=f"is no sequence {found:x} in pool"):
            use()
    with pytest.raises(tinyserve.NotFoundError, match="no such ticket in pool 'p': it was re"):
        scheduler.redeem(ticket)  # once


def test_a_ticket_survives_its_givers_death_and_leaks_nothing_at_its_end(start_daemon):
    port = free_port()
    daemon = start_daemon(POOL, settings={"metrics": f"127.0.0.1:{port}"})
    giver = subprocess.Popen(
        [sys.executable, "-c",
         "import sys, tinyserve\n"
         "kv = tinyserve.connect(sys.argv[1]).pool('p')\n"
         "for ttl in (3600, 0.001):\n"
         "    seq, = kv.create(namespace=b'm')\n"
         "    with kv.step([seq], [9], tokens=[int(ttl)] * 9) as step:\n"
         "        step.run(0)\n"
         "        step.run(1)\n"
         "        step.commit()\n"
         "    print(kv.ticket(seq, ttl).hex(), flush=True)\n"
         "sys.stdin.read()\n", daemon.url],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    first, second = (bytes.fromhex(giver.stdout.readline()) for _ in range(2))
    giver.send_signal(signal.SIGKILL)
    giver.communicate()

    with tinyserve.connect(daemon.url) as client, client.pool("p") as kv:
        with pytest.raises(tinyserve.NotFoundError, match="or its time is over"):
            kv.redeem(second)
        assert kv.matching([[0] * 10, [3600] * 10], b"m") == [8, 8]
        seq = kv.redeem(first)
        assert kv.lengths([seq]) == [9]
        kv.ticket(seq, 0.01)
        # Nobody asks for anything but figures: the daemon ends it by itself.
        while (now := values(ask(port)[1]))['tinyserve_pool_sequences{pool="p",kept="no"}'] != 0:
            pass
        assert now['tinyserve_pool_blocks{pool="p",state="used"}'] == 0


def test_a_sequence_in_a_step_or_under_a_name_gets_no_ticket(session):
    kv, other = session(), session()
    seq, = kv.create()
    with kv.step([seq], [1]):
        with pytest.raises(tinyserve.BusyError, match="is in open step"):
            kv.ticket(seq)
    kv.keep(seq, "x")
    with pytest.raises(tinyserve.InvalidError, match="is kept as 'x', which others attach to"):
        kv.ticket(seq)
    kv.keep(seq, None)
    with pytest.raises(tinyserve.DeniedError):
        other.ticket(seq)
    assert kv.lengths([seq]) == [0]
    for ttl in (0, -1, 3601, float("nan")):
        with pytest.raises(ValueError, match=f"^ttl {ttl} seconds; it must be more than 0 and at"):
            kv.ticket(seq, ttl)
    for wrong, error, message in ((b"", ValueError, "ticket of 0 bytes; it has 16"),
                                  (b"x" * 17, ValueError, "ticket of 17 bytes; it has 16"),
                                  ("x" * 16, TypeError, "ticket must be bytes, not str")):
        with pytest.raises(error, match=f"^{message}$"):
            kv.redeem(wrong)
    with pytest.raises(tinyserve.NotFoundError, match="no such ticket in pool 'p'"):
        kv.redeem(bytes(16))


def test_kept_sequences_are_listed_by_their_names_beginning(session):
    kv, other = session(), session()
    assert kv.kept() == []
    seq, = kv.create(namespace=b"m")
    compute(kv, seq, [1, 2, 3, 4, 5])
    kv.keep(seq, "sys/ä", ttl=3600)
    names = [f"user/{i:04}" for i in range(600)]
    for name in names:
        kv.keep(*kv.create(), name)
    listed = other.kept()
    assert [k.name for k in listed] == ["sys/ä"] + names
    first = listed[0]
    assert (first.seq, first.length, first.blocks) == (seq, 5, 2) and 0 < first.left <= 3600
    assert {k.left for k in listed[1:]} == {None}
    assert [k.name for k in other.kept("user/01")] == names[100:200]
    assert [k.seq for k in other.kept("user/0256")] == [other.attach("user/0256")[0]]
    assert other.kept("sys/ö") == other.kept("zzz") == []
    with pytest.raises(ValueError, match="^prefix .* has a NUL"):
        kv.kept("a\0b")


def test_what_is_under_a_name_is_replaced_in_one_call(session):
    kv, other = session(), session()
    old, new = kv.create(2)
    kv.keep(old, "x")
    with pytest.raises(tinyserve.ExistsError):
        kv.keep(new, "x")
    with other.step([old], [1]):
        with pytest.raises(tinyserve.BusyError, match="which is kept as 'x', is in open step"):
            kv.keep(new, "x", replace=True)
    assert kv.attach("x")[0] == old
    kv.keep(new, "x", replace=True)
    assert other.attach("x")[0] == new
    with pytest.raises(tinyserve.NotFoundError):
        kv.lengths([old])


def test_a_time_to_live_ends_and_what_was_indexed_is_cached(session):
    kv = session()
    for wrong in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="^ttl .* seconds; it must be more than 0"):
            kv.keep(*kv.create(), "y", ttl=wrong)
    with pytest.raises(tinyserve.NotFoundError):
        kv.attach("y")
    seq, = kv.create(namespace=b"m")
    compute(kv, seq, [1] * 9)
    kv.keep(seq, "x", ttl=0.001)
    while kv.kept():  # a look doesn't lengthen it
        pass
    with pytest.raises(tinyserve.NotFoundError):
        kv.attach("x")
    with pytest.raises(tinyserve.NotFoundError):
        kv.free([seq])
    assert kv.matching([[1] * 10], b"m") == [8]
