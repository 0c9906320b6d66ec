"""A client that threads share: a call beside another is refused, what is collected is closed."""

import gc
import json
import os
import subprocess
import threading

import pytest

import tinyserve


def test_a_call_beside_another_threads_is_refused(daemon, client):
    with client.pool("tiny") as kv:
        seq, = kv.create()
        with kv.step([seq], [1]) as step:
            for layer in range(2):
                step.run(layer)
            step.commit()
        slot, = kv.slots(seq, 0, 1)
        kv.kv(slot, 0)  # maps its slab: from now on this asks the daemon nothing
        answers = []

        def ask():
            while not answers:
                try:
                    answers.append(kv.lengths([seq]))
                except tinyserve.BusyError:
                    pass  # the first thread was inside, for the moment

        daemon.pause()
        other = threading.Thread(target=ask)
        other.start()
        with pytest.raises(tinyserve.BusyError, match="used by one thread at a time"):
            while True:  # until the other thread is inside
                kv.kv(slot, 0)
        daemon.resume()
        other.join()
        assert answers == [[1]]
        assert kv.lengths([seq]) == [1]


def test_a_client_that_another_thread_collects_is_closed(daemon, client):
    def sessions():
        command = [os.environ["TS_TEST_TSCTL"], "--socket", daemon.url, "--json", "sessions"]
        listed = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        return {int(s["session"], 16) for s in listed}

    dropped = tinyserve.connect(daemon.url)
    step = dropped.pool("tiny").step(dropped.pool("tiny").create(), [1])
    session = dropped.session
    assert {session, client.session} <= sessions()
    gc.disable()
    try:
        del dropped, step  # they refer to each other: the collector finds them
        other = threading.Thread(target=gc.collect)
        other.start()
        other.join()
    finally:
        gc.enable()
    while session in sessions():  # until the daemon has noticed
        pass
