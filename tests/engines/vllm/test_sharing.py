"""Two engines of vLLM, with hash seeds of their own, and one daemon. Each prompt's reference is
what Transformers generates; salts keep the tests apart, and say what was computed from nothing."""

import pytest

from conftest import REFERENCE, wait_until

PROMPTS = [p["prompt_ids"] for p in REFERENCE]
GENERATED = [p["output_ids"] for p in REFERENCE]
LONG = (PROMPTS[0] + GENERATED[0] + PROMPTS[1] + GENERATED[1])[:993]


@pytest.fixture(scope="module")
def engines(daemon, start_engine):
    """Two, that are started at once."""
    pair = [start_engine(daemon.url, seed=seed, extra={"ticket_ttl": 5}) for seed in ("1", "2")]
    for engine in pair:
        assert engine.ready() is None
    return pair


@pytest.fixture
def first(engines):
    assert engines[0].ask("forget")
    return engines[0]


@pytest.fixture
def second(engines):
    assert engines[1].ask("forget")
    return engines[1]


def test_all_prompts_are_as_the_reference_and_another_process_finds_them(first, second):
    done = first.generate(PROMPTS[:1], tokens=192)
    assert done["ids"] == GENERATED[:1] and done["found"] == [0]
    # The second prompt has 283 of its 292 tokens in common with the first.
    done = second.generate(PROMPTS[1:2], tokens=192)
    assert done["ids"] == GENERATED[1:2] and done["found"] == [283]
    assert len(PROMPTS[1]) == 292
    assert first.generate(PROMPTS, tokens=192)["ids"] == GENERATED
    assert second.ask("forget")
    again = second.generate(PROMPTS, tokens=192)
    assert again["ids"] == GENERATED
    assert again["found"][:4] == [len(p) - 1 for p in PROMPTS[:4]]


def test_both_at_once(first, second):
    answers = [e.begin("generate", prompts=PROMPTS, tokens=192, salt="both") for e in
               (first, second)]
    for answer in answers:
        assert answer()["ids"] == GENERATED


def test_another_salt_finds_nothing(first, second):
    assert first.generate(PROMPTS[:1], salt="a")["found"] == [0]
    assert second.generate(PROMPTS[:1], salt="b")["found"] == [0]
    assert second.generate(PROMPTS[:1], salt="a")["found"] == [len(PROMPTS[0]) - 1]


def test_a_prompt_that_goes_on_from_an_answer_finds_the_answer_too(first, second):
    first.generate(PROMPTS[:1], tokens=192, salt="chat")
    found, = second.generate([PROMPTS[0] + GENERATED[0] + PROMPTS[4]], salt="chat")["found"]
    assert found >= (len(PROMPTS[0]) + 192) // 32 * 32 - 32


def test_a_lost_pin_and_its_poisoned_step_leave_right_bytes(first, second):
    """The second engine computes a step on pages that were never loaded. It must compute again,
    and store nothing of that step."""
    cold = first.generate([LONG], salt="reference")["ids"]
    assert first.generate([LONG[:600]], tokens=1, salt="lost")["found"] == [0]
    before = second.ask("stats")["store"]
    second.ask("lose_pins", count=1)
    assert second.generate([LONG], salt="lost")["ids"] == cold
    after = second.ask("stats")["store"]
    assert after["failed_loads"] == before["failed_loads"] + 1
    assert after["dropped_saves"] == before["dropped_saves"] + 1
    assert after["stored"] > before["stored"]  # the step that computed it again
    assert first.ask("forget")
    again = first.generate([LONG], salt="lost")
    assert again["ids"] == cold and again["found"] == [len(LONG) - 1]


def test_a_lost_pin_of_one_request_does_not_harm_those_beside_it(first, second):
    want = [GENERATED[i][:48] for i in range(4)]
    assert first.generate(PROMPTS[:4], salt="beside")["ids"] == want
    second.ask("lose_pins", count=2)
    assert second.generate(PROMPTS[:4], salt="beside")["ids"] == want
    assert first.ask("forget")
    assert first.generate(PROMPTS[:4], salt="beside")["ids"] == want


def test_after_reset_nothing_is_found_that_was_stored_before(first, second):
    first.generate(PROMPTS[:1], salt="reset")
    assert second.generate(PROMPTS[:1], salt="reset")["found"] == [len(PROMPTS[0]) - 1]
    assert second.ask("reset")
    assert second.generate(PROMPTS[:1], salt="reset")["found"] == [0]


def test_tickets_and_pins_end(daemon, first):
    """Nothing is held for a request once it has ended."""
    import tinyserve
    first.generate(PROMPTS[:4], salt="end")
    with tinyserve.connect(daemon.url) as client, client.pool("kv") as pool:
        wait_until(lambda: pool.stats().sequences == 0)
        assert pool.stats().used == 0 and pool.stats().cached > 0


def test_a_paused_and_a_killed_daemon_cost_no_bytes(daemon, first, second):
    want = GENERATED[:4]
    second.generate([LONG], tokens=1, salt="killed")
    daemon.pause()
    assert second.generate(PROMPTS[:4], tokens=192, salt="killed")["ids"] == want
    answer = first.begin("generate", prompts=PROMPTS[:4], tokens=192, salt="killed")
    daemon.kill()
    assert answer()["ids"] == want
    assert first.generate(PROMPTS[:4], tokens=192, salt="killed 2")["ids"] == want
    daemon.start()
    wait_until(lambda: first.generate(PROMPTS[:1], salt="new")["ids"] == [GENERATED[0][:48]] and
               first.ask("forget") and first.generate(PROMPTS[:1], salt="new")["found"][0] >= 283)
    wait_until(lambda: second.ask("forget") and
               second.generate(PROMPTS[:1], salt="new")["found"][0] >= 283)
