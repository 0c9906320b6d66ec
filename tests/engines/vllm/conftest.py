"""Engines and a daemon in processes of their own."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import tinyserve

HERE = pathlib.Path(__file__).parent
REFERENCE = json.loads((HERE.parents[2] / "tools/model/reference.json").read_text())["prompts"]
POOL = "kv:layers=6,kv_heads=2,head_dim=64,dtype=fp32,block_tokens=16,blocks=4096,device=host," \
       "client_write=all"


class Daemon:
    def __init__(self, folder, *pools):
        self.url = str(folder / "s")
        self.pools = pools or (POOL,)
        self.start()

    def start(self):
        arguments = [os.environ["TS_TEST_DAEMON"], "--config", os.devnull, "--socket", self.url,
                     "--set", "log_level=warning"]
        for pool in self.pools:
            arguments += ["--pool", pool]
        self.process = subprocess.Popen(arguments)
        tinyserve.connect(self.url, wait=60).close()

    def kill(self):
        self.process.kill()
        self.process.wait()

    def pause(self):
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            assert self.process.wait() == 0


class Engine:
    """engine.py; started at once, and waited for when it is first asked."""

    def __init__(self, log, url, *, llm=None, extra=None, processes=False, seed=None):
        environment = dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="1" if processes else "0")
        if seed is not None:
            environment["PYTHONHASHSEED"] = seed
        self._log = open(log, "w")
        settings = {"url": url, "llm": llm or {}, "extra": extra or {}}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "engine.py"), json.dumps(settings)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment,
            start_new_session=True)
        self._ready = None

    def ready(self):
        """None, or what it was refused with."""
        if self._ready is None:
            self._ready = self._answer()
        return self._ready.get("refused")

    def _answer(self):
        line = self.process.stdout.readline()
        assert line, f"the engine ended: see {self._log.name}"
        return json.loads(line)

    def begin(self, do, **arguments):
        assert self.ready() is None, self.ready()
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._answer

    def ask(self, do, **arguments):
        return self.begin(do, **arguments)()

    def generate(self, prompts, tokens=48, salt=None):
        return self.ask("generate", prompts=prompts, tokens=tokens, salt=salt)

    def log(self):
        return pathlib.Path(self._log.name).read_text()

    def kill(self):
        """With the processes that it has started, which would go on."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self):
        if self.process.poll() is None:
            self.process.stdin.close()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()
        self._log.close()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    daemon = Daemon(tmp_path_factory.mktemp("daemon"))
    yield daemon
    daemon.stop()


@pytest.fixture(scope="module")
def start_engine(tmp_path_factory):
    folder, started = tmp_path_factory.mktemp("engines"), []

    def start(url, **how):
        started.append(Engine(folder / f"{len(started)}.log", url, **how))
        return started[-1]

    yield start
    for engine in started:
        engine.stop()


def wait_until(true, seconds=60):
    """Returns once true() is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(0.05)
