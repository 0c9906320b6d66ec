"""What callers pass: a wrong argument is refused by name, before C cuts it to what fits."""

import os
import pathlib
import subprocess

import numpy as np
import pytest

import tinyserve


def test_no_string_with_a_nul_reaches_c(client, daemon):
    with client.pool("tiny") as kv:
        seq, = kv.create()
        kv.keep(seq, "prefix")
        for name, use in (
                ("name", lambda: kv.attach("prefix\0of another")),
                ("name", lambda: kv.keep(kv.create()[0], "other\0name")),
                ("kernel", lambda: kv.step([seq], [1], kernel="v1\0v2")),
                ("kernel", lambda: kv.frame(1, kernel="v1\0v2")),
                ("pool name", lambda: client.pool("tiny\0s")),
                ("url", lambda: tinyserve.connect(daemon.url + "\0x")),
                ("url", lambda: tinyserve.connect(pathlib.Path(daemon.url + "\0x"))),
                ("program", lambda: tinyserve.connect(daemon.url, program="a\0b"))):
            with pytest.raises(ValueError, match=f"^{name} .* has a NUL at "):
                use()
        assert kv.attach("prefix") == (seq, 0)
        with pytest.raises(tinyserve.NotFoundError):
            kv.attach("other")
        with pytest.raises(ValueError, match="isn't Unicode text"):
            kv.keep(seq, "\ud800")
        with pytest.raises(TypeError, match=r"^name must be a string, not bytes \(b'prefix'\)"):
            kv.attach(b"prefix")


def test_a_path_may_be_the_url(daemon):
    with tinyserve.connect(pathlib.Path(daemon.url)) as client:
        assert client.session != 0
    with pytest.raises(TypeError, match="^url must be a string or a path, not int"):
        tinyserve.connect(3)


@pytest.mark.parametrize("option, value, error, message", [
    ("timeout", -1, ValueError, "timeout -1 seconds; it must be more than 0 and at most 2147483"),
    ("timeout", 0, ValueError, "timeout 0 seconds"),
    ("timeout", float("nan"), ValueError, "timeout nan seconds"),
    ("timeout", float("inf"), ValueError, "timeout inf seconds"),
    ("timeout", 1e30, ValueError, r"timeout 1e\+30 seconds"),
    ("timeout", "3", TypeError, r"timeout must be a number, not str \('3'\)"),
    ("wait", -0.5, ValueError, "wait -0.5 seconds; it must be at least 0 and at most 2147483"),
    ("wait", float("nan"), ValueError, "wait nan seconds"),
    ("retries", -1, ValueError, "retries -1; at least 0 is needed"),
    ("retries", 1.5, TypeError, "retries must be an integer, not float"),
    ("exchange_bytes", -1, ValueError, "exchange_bytes -1; at least 0 is needed"),
    ("spin_us", -1, ValueError, "spin_us -1; the limits are 0"),
    ("threads", -1, ValueError, r"threads -1; the limits are 0\.\.4096"),
    ("transport", "smoke", ValueError, "transport 'smoke'; known are auto, ring, messages"),
    ("execution", None, ValueError, "execution None; known are daemon, local, auto"),
])
def test_options_of_a_connection_are_checked(daemon, option, value, error, message):
    with pytest.raises(error, match=f"^{message}"):
        tinyserve.connect(daemon.url, **{option: value})


def test_an_option_that_there_is_not_is_named(daemon):
    with pytest.raises(TypeError, match="'timout'"):
        tinyserve.connect(daemon.url, timout=3)


def test_arguments_of_calls_are_named(client):
    with client.pool("tiny") as kv:
        seq, = kv.create()
        with kv.step([seq], [1]) as step:
            for use, error, message in (
                    (lambda: step.run("0"), TypeError, "layer must be an integer, not str"),
                    (lambda: step.run(-1), ValueError, "layer -1; at least 0 is needed"),
                    (lambda: step.run(0, window=-1), ValueError, "window -1; at least 0 is needed"),
                    (lambda: step.run(0, scale="1"), TypeError, "scale must be a number"),
                    (lambda: step.run(0, stream="s"), TypeError, "stream must be an integer"),
                    (lambda: step.commit(1), TypeError, "accepted must be a list of integers")):
                with pytest.raises(error, match=f"^{message}"):
                    use()
        big = 2**32 - 1
        for use, error, message in (
                (lambda: kv.free(5), TypeError, r"seqs must be a list of integers, not int \(5\)"),
                (lambda: kv.free("5"), TypeError, "seqs must be a list of integers, not str"),
                (lambda: kv.free([1.5]), TypeError, "seqs: 1.5 isn't an integer"),
                (lambda: kv.lengths(np.array([[seq]])), TypeError, "seqs: .* isn't an integer"),
                (lambda: kv.lengths([-1]), OverflowError, "seqs: -1 doesn't fit into 64 bits"),
                (lambda: kv.create(-1), ValueError, "count -1; at least 1 is needed"),
                (lambda: kv.create(big), ValueError, f"count {big}; the limits are"),
                (lambda: kv.fork(seq, big), ValueError, f"count {big}; the limits are"),
                (lambda: kv.fork(-1), ValueError, "parent -1; at least 0 is needed"),
                (lambda: kv.fork(seq, length=-1), ValueError, "length -1; at least 0 is needed"),
                (lambda: kv.slots(seq, 0, big), ValueError, f"count {big}; the limits are"),
                (lambda: kv.slots(seq, -1, 1), ValueError, "first -1; at least 0 is needed"),
                (lambda: kv.keep(seq, "x", ttl="1"), TypeError, "ttl must be a number, not str"),
                (lambda: kv.kept(1), TypeError, "prefix must be a string, not int"),
                (lambda: kv.ticket(-1), ValueError, "seq -1; at least 0 is needed"),
                (lambda: kv.kv(-1, 0), ValueError, "slot -1; at least 0 is needed"),
                (lambda: kv.kv(0, "0"), TypeError, "layer must be an integer"),
                (lambda: kv.layer(-1, []), IndexError, "layer -1; the pool has 2"),
                (lambda: kv.step([seq], [1], heads=-2), ValueError, "heads -2; at least 0 is"),
                (lambda: kv.step([seq], ["1"]), TypeError, "new_tokens: '1' isn't an integer")):
            with pytest.raises(error, match=f"^{message}"):
                use()
        assert kv.lengths([seq]) == [0]


def test_tokens_that_no_sequence_may_have_are_refused_before_there_is_memory_for_them(
        start_daemon, run_worker):
    daemon = start_daemon("open:layers=1,kv_heads=1,head_dim=32,blocks=8,client_write=all")
    printed = run_worker(
        "import resource, sys, tinyserve\n"
        "with tinyserve.connect(sys.argv[1]) as c, c.pool('open', writable=True) as kv:\n"
        "    seq, = kv.create()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "    for call in kv.append, kv.step:\n"
        "        try:\n"
        "            call([seq], [2**32 - 1])\n"
        "        except tinyserve.InvalidError as error:\n"
        "            print(str(error).replace(f'{seq:x}', 'S'))\n", daemon.url)
    assert printed.splitlines() == ["4294967295 new tokens for sequence S; the pool's limit is "
                                    "1048576 tokens a sequence"] * 2


def test_types_go_by_their_names(client):
    with client.pool("tiny") as kv:
        with pytest.raises(tinyserve.InvalidError,
                           match="^io_dtype bf16; beside a pool of fp32 it must be fp32$"):
            kv.step(kv.create(), [1], io_dtype="bf16")
        step = kv.step(kv.create(), [3])
        assert repr(kv) == "<tinyserve.Pool 'tiny' of 64 blocks of fp32 on host>"
        assert repr(step) == "<tinyserve.Step of 3 tokens in 'tiny', io_dtype fp32>"
        assert repr(client) == f"<tinyserve.Client of session {client.session:x}>"
        step.abort()
        assert repr(step).endswith("io_dtype fp32, ended>")
    assert repr(kv).endswith("on host, closed>")
    client.close()
    assert repr(client) == "<tinyserve.Client, closed>"


def test_a_step_that_can_have_no_keys_is_refused_when_it_begins(client):
    with client.pool("tiny") as kv:
        seq, = kv.create()
        with pytest.raises(tinyserve.DeniedError, match="didn't open pool 'tiny' to write"):
            kv.step([seq], [1], run=False)
        with kv.step([seq], [1]):
            pass  # the sequence is in no other step


def test_a_pool_that_was_closed_can_be_deleted(client, daemon):

    def tsctl(*arguments):
        return subprocess.run([os.environ["TS_TEST_TSCTL"], "--socket", daemon.url, *arguments],
                              text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=60)

    assert tsctl("pool", "create", "brief", "layers=1", "kv_heads=1", "head_dim=32",
                 "blocks=4").returncode == 0
    kv = client.pool("brief")
    kv.free(kv.create(2))
    assert "pool 'brief' is open in 1 session" in tsctl("--yes", "pool", "delete", "brief").stdout
    kv.close()
    result = tsctl("--yes", "pool", "delete", "brief")
    assert result.returncode == 0, result.stdout


def test_what_is_out_of_range_is_told_in_numbers(start_daemon):
    daemon = start_daemon(settings={"batch": 4, "exchange_max": "4M", "step_tokens": 40})
    with pytest.raises(tinyserve.InvalidError, match="an exchange of 8388608 bytes") as far:
        tinyserve.connect(daemon.url, exchange_bytes=1 << 23)
    assert (far.value.needed, far.value.limit) == (1 << 23, 1 << 22)
    with tinyserve.connect(daemon.url, transport="messages") as client:
        kv = client.pool("tiny")
        seq, = kv.create()
        five, most = kv.create(4) + [seq], kv.sequence_max
        with kv.step([seq], [6]) as step:
            step.run(0)
            step.run(1)
            step.commit()
        for wrong, sentence, needed, limit in (
                (lambda: kv.lengths(five), "a batch of 5 sequences", 5, 4),
                (lambda: kv.create(5), "a batch of 5 sequences", 5, 4),
                (lambda: kv.step(five, [1] * 5), "a step of 5 sequences", 5, 4),
                (lambda: kv.matching([[1]] * 5, b"m"), "a match of 5 prompts", 5, 4),
                (lambda: kv.select(five, [0]), "a selection of 1 of 5 sequences", 5, 4),
                (lambda: kv.step([seq], [41]), "a step of 41 new tokens", 41, 40),
                (lambda: kv.step([seq], [1], heads=2048), "2048 query heads", 2048, 1024),
                (lambda: kv.step([seq], [most + 1]), "new tokens for sequence", most + 1, most),
                (lambda: kv.truncate([seq], [7]), "sequence .* has 6 tokens", 7, 6),
                (lambda: kv.fork(seq, length=7), "a fork at token 7", 7, 6),
                (lambda: kv.slots(seq, 4, 5), "tokens 4 to 9 .*, which has 6", 9, 6),
                (lambda: kv.slots(seq, 4, 3), "tokens 4 to 7 .*, which has 6", 7, 6),
                (lambda: kv.kv(0, 2), "layer 2; the pool has 2", 2, 2),
                (lambda: kv.step([seq], [1]).commit([2]), "2 tokens accepted of the 1", 2, 1)):
            with pytest.raises(tinyserve.InvalidError, match=sentence) as refused:
                wrong()
            assert (refused.value.needed, refused.value.limit) == (needed, limit), sentence
