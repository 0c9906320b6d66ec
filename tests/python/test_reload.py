"""The configuration read again, on SIGHUP."""

import os
import signal
import subprocess

import pytest

import tinyserve

CONFIG = """[daemon]
socket = {socket}
log_level = {level}
step_tokens = {tokens}
{more}
[pool tiny]
layers = 2
kv_heads = 2
head_dim = 64
dtype = fp32
block_tokens = 4
blocks = 64
device = host
{pool}
"""


@pytest.fixture
def reloadable(tmp_path):
    file, socket = tmp_path / "c", tmp_path / "s"

    def write(level="info", tokens=100, more="", pool=""):
        file.write_text(CONFIG.format(socket=socket, level=level, tokens=tokens, more=more,
                                      pool=pool))

    write()
    process = subprocess.Popen([os.environ["TS_TEST_DAEMON"], "--config", file], text=True,
                               stderr=subprocess.PIPE)

    def log(beginning):
        for line in process.stderr:
            if line.startswith(beginning):
                return line
        raise AssertionError(f"the daemon ended without {beginning!r}")

    def hang_up():
        process.send_signal(signal.SIGHUP)

    tinyserve.connect(str(socket), wait=60).close()
    yield write, hang_up, log, str(socket)
    process.terminate()
    process.stderr.read()
    assert process.wait(60) == 0


def test_quotas_change_and_what_cannot_is_named(reloadable):
    write, hang_up, log, url = reloadable
    with tinyserve.connect(url) as client, client.pool("tiny") as kv:
        seq, = kv.create(1)
        kv.step([seq], [50]).abort()
        write(tokens=40, pool="tenant_memory = 40K", more="threads = 3\nspin_us = 7")
        hang_up()
        assert log("tinyserved: the configuration was read again")
        assert log("tinyserved: warning: to change") == (
            "tinyserved: warning: to change threads, spin_us, the daemon must be started again\n")
        with pytest.raises(tinyserve.InvalidError,
                           match="a step of 50 new tokens; the limit is 40"):
            kv.step([seq], [50])
        with pytest.raises(tinyserve.QuotaError, match="would pass its limit of 5"):  # of 8 KiB
            kv.step([seq], [24])
        kv.step([seq], [20]).abort()
        write(tokens=200, pool="sequences = 77\nslab = 128K")
        hang_up()
        assert log("tinyserved: the configuration was read again")
        assert "to change pool tiny, the" in log("tinyserved: warning: to change")
        kv.step([seq], [150]).abort()
        # A quarter of the sequences that there are, not of those that the file would have.
        write(tokens=200, pool="sequences = 4", more="sessions = 4")
        hang_up()
        assert log("tinyserved: the configuration was read again")
        kv.free(kv.create(3))
        tinyserve.connect(url).close()


def test_a_file_that_is_wrong_changes_nothing(reloadable):
    write, hang_up, log, url = reloadable
    with tinyserve.connect(url) as client, client.pool("tiny") as kv:
        seq, = kv.create(1)
        write(tokens="many")
        hang_up()
        assert ":4: step_tokens = many: not a number" in log("tinyserved: error")
        assert "nothing was changed" in log("tinyserved: error")
        kv.step([seq], [90]).abort()
        write(level="error", tokens=50)
        hang_up()
        write(level="info", tokens=60)
        hang_up()
        assert log("tinyserved: the configuration was read again")
        with pytest.raises(tinyserve.InvalidError, match="a step of 90 new tokens; the limit is"):
            kv.step([seq], [90])


def test_a_pools_cache_is_switched_off_and_on(reloadable):
    write, hang_up, log, url = reloadable
    with tinyserve.connect(url) as client, client.pool("tiny") as kv:
        def add(seq, ids):
            with kv.step([seq], [len(ids)], tokens=ids) as step:
                for layer in range(2):
                    step.q[...] = step.k[...] = step.v[...] = 0
                    step.run(layer)
                step.commit()

        def publish(first):
            ids = list(range(first, first + 8))
            seq, = kv.create(namespace=b"m")
            add(seq, ids)
            return seq, [*ids, 0]

        def reload(pool, *told):
            write(pool=pool)
            hang_up()
            for line in (*told, "the configuration was read again: what a running daemon can "
                         "change is as it says"):
                assert log(("tinyserved: pool 'tiny':",
                            "tinyserved: the conf")) == f"tinyserved: {line}\n"

        dropped, prompt = publish(0)
        live, other = publish(100)
        kv.free([dropped])
        assert kv.matching([prompt, other], b"m") == [8, 8]
        reload("cache = off", "pool 'tiny': its prefix cache is off, and its 2 cached blocks are "
               "dropped")
        assert kv.matching([prompt, other], b"m") == [0, 0]
        while_off, unseen = publish(200)
        kv.free([while_off])
        assert kv.matching([unseen], b"m") == [0]
        assert kv.lengths([live]) == [8]
        reload("cache = off")  # nothing has changed: nothing is told
        reload("cache = on", "pool 'tiny': its prefix cache is on")
        add(live, [1, 2, 3, 4])
        kv.free([live])
        assert kv.matching([prompt, other, unseen], b"m") == [0, 0, 0]
        again, prompt = publish(0)
        kv.free([again])
        assert kv.matching([prompt], b"m") == [8]
        reload("")  # on is the default
        assert kv.matching([prompt], b"m") == [8]


def test_a_reload_while_the_file_is_read_waits(tmp_path):
    file = tmp_path / "c"
    os.mkfifo(file)
    process = subprocess.Popen([os.environ["TS_TEST_DAEMON"], "--config", file, "--socket",
                                tmp_path / "s"])
    for turn in range(2):  # as the daemon starts, and once more when it serves
        with file.open("w") as text:
            if turn == 0:
                process.send_signal(signal.SIGHUP)
            text.write(CONFIG.format(socket=tmp_path / "s", level="error", tokens=100, more="",
                                     pool=""))
        tinyserve.connect(tmp_path / "s", wait=60).close()
    process.terminate()
    assert process.wait(60) == 0
