"""A daemon of its own for each test that asks for one. ctest names the program: TS_TEST_DAEMON."""

import os
import pathlib
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile

import pytest

import tinyserve

POOL = "tiny:layers=2,kv_heads=2,head_dim=64,dtype=fp32,block_tokens=4,blocks=64"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Folders of this run's own: tests let other users into theirs, and another pytest would shut
    those that all of a user's runs lie in."""
    if config.option.basetemp is None:
        config.folder = pathlib.Path(tempfile.mkdtemp(prefix="tinyserve-pytest."))
        config.option.basetemp = str(config.folder / "t")


def pytest_sessionfinish(session, exitstatus):
    folder = getattr(session.config, "folder", None)
    if folder is not None and exitstatus == 0:  # else it may say why
        shutil.rmtree(folder, ignore_errors=True)


class Daemon:
    def __init__(self, folder, pools, device, settings):
        self.url = str(folder / "s")
        arguments = [os.environ["TS_TEST_DAEMON"], "--socket", self.url, "--set",
                     "log_level=warning"]
        for key, value in settings.items():
            arguments += ["--set", f"{key}={value}"]
        for pool in pools:
            arguments += ["--pool", pool if "device=" in pool else f"{pool},device={device}"]
        self.process = subprocess.Popen(arguments)

    def pause(self):
        """Stops all of its threads, until resume(); returns when they stand still."""
        self.process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.send_signal(signal.SIGCONT)  # a test that fails may leave it paused
        assert self.process.wait() == 0


class Supervised:
    """A daemon whose memory a supervisor holds, so that another one follows it. The supervisor has
    a process group of its own: a test's end reaches its daemon, too."""

    def __init__(self, folder, pools, settings, config, descriptors):
        self.url = str(folder / "s")
        self.log = folder / "log"
        arguments = [os.environ["TS_TEST_DAEMON"], "--supervise", "--socket", self.url]
        if descriptors is not None:  # that a process may have
            arguments = ["sh", "-c", f'ulimit -n {descriptors} && exec "$@"', "sh", *arguments]
        if config is not None:
            arguments += ["--config", str(config)]
        for key, value in settings.items():
            arguments += ["--set", f"{key}={value}"]
        for pool in pools:
            arguments += ["--pool", pool if "device=" in pool else f"{pool},device=host"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(arguments, start_new_session=True, stderr=log)

    def pid(self):
        """The daemon's, once it serves."""
        while True:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
                if s.connect_ex(self.url) == 0:
                    break
            assert self.process.poll() is None, self.log.read_text()
            os.sched_yield()
        supervisor = self.process.pid
        return int(pathlib.Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text())

    def kill(self):
        """Ends the daemon as it serves, and returns when it has ended."""
        pid = self.pid()
        process = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        select.select([process], [], [])
        os.close(process)

    def stop(self):
        self.pid()  # between two daemons, it would end with the dead one's status
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=60) == 0, self.log.read_text()


@pytest.fixture
def start_supervised(tmp_path):
    started = []

    def start(*pools, settings=None, config=None, descriptors=None):
        folder = tmp_path / f"supervised-{len(started)}"
        folder.mkdir()
        started.append(Supervised(folder, pools or (POOL,), settings or {}, config, descriptors))
        tinyserve.connect(started[-1].url, wait=60).close()
        return started[-1]

    yield start
    for supervised in started:
        if supervised.process.poll() is None:
            supervised.stop()


@pytest.fixture
def start_daemon(tmp_path):
    daemons = []

    def start(*pools, device="host", settings=None):
        daemon = Daemon(tmp_path, pools or (POOL,), device, settings or {})
        daemons.append(daemon)
        tinyserve.connect(daemon.url, wait=60).close()
        return daemon

    yield start
    for daemon in daemons:
        if daemon.process.poll() is None:
            daemon.stop()


@pytest.fixture
def daemon(start_daemon):
    return start_daemon()


@pytest.fixture
def client(daemon):
    with tinyserve.connect(daemon.url) as c:
        yield c


@pytest.fixture
def run_worker():
    """Runs Python code in a process of its own and returns what it prints."""

    def run(code, *arguments):
        return subprocess.run([sys.executable, "-c", code, *arguments], check=True, text=True,
                              stdout=subprocess.PIPE, timeout=120).stdout

    return run
