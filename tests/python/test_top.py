"""tsctl top on a terminal: what a person sees, and the keys."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time

import pytest

import tinyserve

POOLS = ["first:layers=1,kv_heads=1,head_dim=32,block_tokens=4,blocks=64,client_write=all",
         "second:layers=1,kv_heads=1,head_dim=32,block_tokens=4,blocks=32"]


class Terminal:
    """24 lines; what has been written to it is looked at with cursor movements as blanks."""

    def __init__(self, *command, columns=80):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm", LC_ALL="C.UTF-8", ESCDELAY="25")
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            os.execv(command[0], command)
        self.raw = ""

    def wait_for(self, pattern, redraw=True):
        """Until what is written from now on has the pattern. redraw: the whole screen is asked for
        again and again, since else only what changes is written."""
        end = time.monotonic() + 30
        self.raw = ""
        while not re.search(pattern, self.text()):
            assert time.monotonic() < end, self.text()[-4000:]
            if redraw:
                self.press("\x0c")
            if select.select([self.fd], [], [], 0.5)[0]:
                self.raw += os.read(self.fd, 65536).decode(errors="replace")

    def text(self):
        moved = re.sub(r"\x1b\[[0-9;]*[HdG]|\x1b\[[0-9]*[ABCX]|[\r\n\b]", " ", self.raw)
        shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[()][A-Z0-9]|[\x0e\x0f]", "", moved)
        return re.sub(" +", " ", shown)

    def press(self, key):
        os.write(self.fd, key.encode())

    def end(self):
        try:
            while os.read(self.fd, 65536):
                pass
        except OSError:
            pass  # the other side is closed
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def daemon(start_daemon):
    return start_daemon(*POOLS)


def test_it_shows_the_pools_and_ends_with_q(daemon):
    with tinyserve.connect(daemon.url, program="the-worker") as client, \
            client.pool("first", writable=True) as kv:
        seq, = kv.create()
        kv.append([seq], [10])
        terminal = Terminal(os.environ["TS_TEST_TSCTL"], "-s", daemon.url, "top", "--watch=0.2")
        terminal.wait_for(r"first on host \(1 of 2\): 3 of 64 blocks used \(5 %\), 0 shared; "
                          r"1.5 KiB of 32.0 KiB 1 sequences, 0 kept; 0 blocks cached \(0 %\); "
                          r"0 steps open, 0 wait; ")
        terminal.wait_for(rf"{client.session:x} the-worker {os.getpid()} 0 1 3 0")
        terminal.wait_for(r"STEPS REQ/S")
        terminal.press("n")
        terminal.wait_for(r"second on host")
        terminal.press("n")
        terminal.wait_for(r"first on host")
        terminal.press("p")
        terminal.wait_for(r"second on host")
        terminal.press(" ")
        terminal.wait_for(r"tinyserved [0-9.]+ stopped up ")
        terminal.press("q")
        assert terminal.end() == 0


def test_where_it_can_t_be_it_says_so(daemon):
    def run(*more):
        return subprocess.run([os.environ["TS_TEST_TSCTL"], "-s", daemon.url, "top", *more],
                              text=True, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert run().returncode == 2
    assert run().stderr == "tsctl: top needs a terminal; elsewhere there is --watch\n"
    terminal = Terminal(os.environ["TS_TEST_TSCTL"], "-s", daemon.url, "top", "-P", "third")
    terminal.wait_for(r"there is no pool 'third'", redraw=False)
    assert terminal.end() == 1
    terminal = Terminal(os.environ["TS_TEST_TSCTL"], "-s", daemon.url, "top")
    terminal.wait_for(r"first on host")
    daemon.stop()
    terminal.wait_for(r"tsctl: .*", redraw=False)
    assert terminal.end() == 3


def test_pools_that_are_deleted_give_way_to_others_and_to_none(daemon):
    def delete(name):
        subprocess.run([os.environ["TS_TEST_TSCTL"], "-s", daemon.url, "--yes", "pool", "delete",
                        name], check=True)

    terminal = Terminal(os.environ["TS_TEST_TSCTL"], "-s", daemon.url, "--watch=0.1", "top")
    terminal.wait_for(r"first on host \(1 of 2\)")
    delete("first")
    terminal.wait_for(r"second on host \(1 of 1\)")
    delete("second")
    terminal.wait_for(r"no pools")
    terminal.press("n")
    terminal.press("p")
    terminal.wait_for(r"no pools.*q end")
    terminal.press("q")
    assert terminal.end() == 0


def test_names_are_cut_where_a_terminal_ends_and_nowhere_else(start_daemon):
    daemon = start_daemon(*POOLS)
    name = "a-name-of-forty-characters-" + "é" * 5 + "王" * 4 + "-end"
    ctl = [os.environ["TS_TEST_TSCTL"], "-s", daemon.url]
    with tinyserve.connect(daemon.url, program="p" * 40) as client, client.pool("first") as kv:
        kv.keep(kv.create()[0], name)
        piped = [subprocess.run([*ctl, *words], check=True, text=True,
                                stdout=subprocess.PIPE).stdout
                 for words in (["seqs", "first"], ["sessions"])]
        assert piped[0].splitlines()[1].endswith(" " + name)
        assert "p" * 40 in piped[1]
        for columns, kept in ((80, name[:15]), (97, name[:32]), (98, name[:32]), (99, name[:33]),
                              (132, name)):
            terminal = Terminal(*ctl, "seqs", "first", "--watch=0.1", columns=columns)
            terminal.wait_for(f" - {kept} ", redraw=False)
            os.kill(terminal.pid, signal.SIGTERM)
            os.waitpid(terminal.pid, 0)
            os.close(terminal.fd)


def test_an_operators_looks_are_not_in_the_log(tmp_path):
    process = subprocess.Popen([os.environ["TS_TEST_DAEMON"], "--socket", tmp_path / "s", "--pool",
                                POOLS[0] + ",device=host"], text=True, stderr=subprocess.PIPE)
    url = str(tmp_path / "s")
    tinyserve.connect(url, wait=60, program="worker").close()
    for words in (["status"], ["seqs"], ["check"]):
        subprocess.run([os.environ["TS_TEST_TSCTL"], "-s", url, *words], check=True,
                       stdout=subprocess.DEVNULL)
    process.terminate()
    log = process.stderr.read()
    assert process.wait(60) == 0
    assert log.count("opened: worker") == 1 and log.count(" closed (uid") == 1
    assert "tsctl" not in log
