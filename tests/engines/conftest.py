"""A daemon for all tests of a run, and small models with random weights beside it. Pools are made
as the models need them."""

import os
import subprocess
import sys

import pytest
import torch
import transformers

import tinyserve
import tinyserve.transformers as ts

transformers.logging.set_verbosity_error()
torch.set_num_threads(2)

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

    def stop(self):
        self.process.terminate()
        assert self.process.wait() == 0


@pytest.fixture(scope="session")
def daemon(tmp_path_factory):
    daemon = Daemon(tmp_path_factory.mktemp("daemon"))
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
