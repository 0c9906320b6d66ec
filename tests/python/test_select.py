"""Selections, shortened sequences, priorities, what is forgotten, and what there is of a pool."""

import numpy as np
import pytest

import tinyserve
from test_match import BLOCK, HEADS, LAYERS, MORE, POOL, compute

SPACE = b"model"


@pytest.fixture(params=["ring", "messages", "local"])
def kv(start_daemon, request):
    how = {"execution": "local"} if request.param == "local" else {"transport": request.param}
    with tinyserve.connect(start_daemon(POOL + MORE).url, **how) as client:
        yield client.pool("p", writable=True)


def test_a_selection_forks_the_winners_and_frees_the_losers(kv):
    beams = kv.create(3, namespace=SPACE)
    for i, beam in enumerate(beams):
        compute(kv, beam, [100 + i] * 6)
    picked = kv.select(beams, [2, 0, 2, 2])
    assert picked[0] == beams[2] and picked[1] == beams[0]
    assert len(set(picked)) == 4 and kv.lengths(picked) == [6] * 4
    with pytest.raises(tinyserve.NotFoundError):
        kv.lengths([beams[1]])
    # Forks go on from what they share, each on its own.
    again, = kv.create(namespace=SPACE)
    compute(kv, again, [102] * 6)
    for seq, token in zip((picked[2], picked[3], picked[0]), (7, 8, 9)):
        alone, = kv.fork(again)
        assert np.array_equal(compute(kv, seq, [token]), compute(kv, alone, [token]))


def test_a_selection_takes_no_room(kv):
    beams = kv.create(4)
    kv.append(beams, [16 * BLOCK] * 4)
    assert kv.stats().available == 0
    picked = kv.select(beams, [3, 3, 3, 3])
    assert kv.stats().used == 16 and kv.stats().sequences == 4
    kv.append(picked, [BLOCK] * 4)
    assert kv.lengths(picked) == [17 * BLOCK] * 4


@pytest.mark.parametrize(("picks", "message"), [
    ([0, 2], "pick 1 is sequence 2 of a selection of 2"), ([], "a selection of 0 of 2 sequences"),
    ([10**7], "pick 0 is sequence 10000000 of a selection of 2")])
def test_what_a_selection_is_refused_for_changes_nothing(kv, picks, message):
    beams = kv.create(2)
    with pytest.raises(tinyserve.InvalidError, match=message):
        kv.select(beams, picks)
    with pytest.raises(tinyserve.InvalidError, match="in the batch twice"):
        kv.select([beams[0], beams[0]], [0])
    with kv.step(beams[:1], [1], heads=HEADS):
        with pytest.raises(tinyserve.BusyError):
            kv.select(beams, [0, 0])
    assert kv.lengths(beams) == [0, 0]


def test_sequences_are_shortened_by_counts(kv):
    seqs = kv.create(2)
    kv.append(seqs, [9, 5])
    kv.shorten(seqs, [2, 5])
    assert kv.lengths(seqs) == [7, 0]
    with pytest.raises(tinyserve.InvalidError, match="has 0 tokens; it can't lose 1"):
        kv.shorten(seqs, [1, 1])
    assert kv.lengths(seqs) == [7, 0]


def test_what_is_forgotten_is_not_found(kv):
    prompt, other = list(range(12)), [*range(8), 50, 51, 52, 53]
    for forget in False, True:
        seq, shares = kv.create(2, namespace=SPACE)
        compute(kv, seq, prompt)
        compute(kv, shares, other)
        (kv.forget if forget else kv.free)([seq])
        assert kv.matching([prompt, other], SPACE) == ([8, 11] if forget else [11, 11])
        kv.forget([shares])
        assert kv.matching([prompt, other], SPACE) == ([0, 0] if forget else [11, 8])
    assert kv.stats().cached == 0


def test_content_of_a_low_priority_goes_first(kv):
    prompts = {0: [10] * 8, 1: [11] * 8, -1: [12] * 8}
    for priority, prompt in prompts.items():  # the first to be released has the middle one
        seq, = kv.create(namespace=SPACE)
        with kv.step([seq], [8], heads=HEADS, tokens=prompt, priority=priority) as step:
            for layer in range(LAYERS):
                step.run(layer)
            step.commit()
        kv.free([seq])
    seq, = kv.create()
    kv.append([seq], [60 * BLOCK])  # of 64 blocks: two must go
    assert kv.matching(list(prompts.values()), SPACE) == [7, 7, 0]
    kv.append([seq], [2 * BLOCK])
    assert kv.matching(list(prompts.values()), SPACE) == [0, 7, 0]


def test_a_step_without_room_is_refused_with_all_numbers(kv):
    cached, kept, live = kv.create(3, namespace=SPACE)
    compute(kv, cached, list(range(4 * BLOCK)))
    kv.free([cached])
    kv.append([kept, live], [10 * BLOCK, 40 * BLOCK])
    kv.keep(kept, "k")
    with pytest.raises(tinyserve.NoSpaceError) as error:
        kv.append([live], [20 * BLOCK])
    e = error.value
    assert (e.needed, e.free, e.limit, e.cached, e.pinned, e.others) == (20, 14, 64, 4, 10, 0)
    room = kv.stats()
    assert (room.blocks, room.available, room.used, room.cached, room.pinned, room.limit,
            room.others, room.sequences, room.waiting) == (64, 14, 50, 4, 10, 64, 0, 2, 0)
    assert kv.match([1, 2], SPACE)[1] == 0 and kv.match(list(range(9)), SPACE)[1] == 8
    assert (kv.stats().asked_tokens, kv.stats().found_tokens) == (11, 8)
