"""A daemon for all tests of a run, and small models with random weights beside it. Pools are made
as the models need them. With TS_TEST_KILL_EVERY=SECONDS it runs under --supervise, and is killed
each time that they have passed: no test may notice."""

import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest
import torch
import transformers

import tinyserve
import tinyserve.transformers as ts

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)  # the models are small: more would wait for each other

SMALL = "small:layers=1,kv_heads=1,head_dim=32,dtype=fp32,block_tokens=16,blocks=8"


class Daemon:
    def __init__(self, folder, *pools, settings=()):
        self.url = str(folder / "s")
        self.arguments = [os.environ["TS_TEST_DAEMON"], "--config", os.devnull, "--socket",
                          self.url, "--set", "log_level=warning"]
        for setting in settings:
            self.arguments += ["--set", setting]
        for pool in pools or (SMALL,):
            self.arguments += ["--pool", f"{pool},device=host"]
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.arguments)
        tinyserve.connect(self.url, wait=60).close()

    def pause(self):
        """Stops all of its threads, until resume(); returns when they stand still."""
        self.process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def stop(self):
        self.process.terminate()
        self.resume()  # a test that fails may leave it paused
        assert self.process.wait() == 0


class KilledDaemon(Daemon):
    """One under --supervise, which a thread kills again and again while it serves."""

    def __init__(self, folder, every):
        self.kills, self.over = 0, threading.Event()
        super().__init__(folder)
        self.killer = threading.Thread(target=self.kill, args=(every,))
        self.killer.start()

    def start(self):
        self.arguments.insert(1, "--supervise")
        super().start()

    def kill(self, every):
        while not self.over.wait(every):
            tinyserve.connect(self.url, wait=60, timeout=60).close()
            pid = self.process.pid
            children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for child in children:
                os.kill(int(child), signal.SIGKILL)
                self.kills += 1

    def stop(self):
        self.over.set()
        self.killer.join()
        super().stop()
        print(f"\nthe daemon was killed {self.kills} times")


@pytest.fixture(scope="session")
def daemon(tmp_path_factory):
    every = os.environ.get("TS_TEST_KILL_EVERY")
    folder = tmp_path_factory.mktemp("daemon")
    daemon = Daemon(folder) if every is None else KilledDaemon(folder, float(every))
    yield daemon
    daemon.stop()


@pytest.fixture
def start_daemon(tmp_path):
    """A daemon of the test's own, with these pools."""
    started = []

    def start(*pools, settings=()):
        started.append(Daemon(tmp_path, *pools, settings=settings))
        return started[-1]

    yield start
    for daemon in started:
        if daemon.process.poll() is None:
            daemon.stop()


@pytest.fixture
def attach(daemon):
    """ts.attach(), with a namespace of the test's own, so that no test finds another's tokens."""
    attached = []

    def attach_(model, *, url=None, salt=None, **how):
        salt = os.urandom(8) if salt is None else salt
        attached.append(ts.attach(model, url=url or daemon.url, salt=salt, **how))
        return attached[-1]

    yield attach_
    for kv in attached:
        kv.close()


@pytest.fixture
def run_worker():
    """Starts Python code in a process of its own; communicate() gives what it prints."""
    def run(code, *arguments):
        return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, *arguments], text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                cwd=os.path.dirname(__file__))
    return run
