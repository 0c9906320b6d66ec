"""tsctl doctor beside a real daemon; tests/test_doctor.c has what a machine may lack."""

import json
import os
import shutil
import socket
import subprocess

import pytest

import tinyserve

POOL = "p:layers=1,kv_heads=1,head_dim=32,block_tokens=4,blocks=64,client_write=all"


def doctor(url, *arguments, **how):
    return subprocess.run([os.environ["TS_TEST_TSCTL"], "-s", url, "doctor", *arguments],
                          check=False, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=60, **how)


def found(result):
    return {f"{f['about']}: {f['text']}": f for f in json.loads(result.stdout)}


def test_a_daemon_that_is_well_has_no_fault(start_daemon):
    daemon = start_daemon(POOL)
    result = doctor(daemon.url)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert any(line.startswith("ok       socket       ") for line in lines)
    version = tinyserve.__version__
    assert f"ok       versions     tsctl {version}, tinyserved {version}" in lines
    assert max(map(len, lines)) <= 80 or len(daemon.url) > 40  # a long path is not cut
    levels = {f["about"]: f["level"] for f in json.loads(doctor(daemon.url, "--json").stdout)}
    assert {"socket", "versions", "descriptors", "mappings", "memory"} <= set(levels)
    assert "fault" not in levels.values()


def test_no_daemon_is_told_once_and_has_its_own_status(tmp_path):
    result = doctor(str(tmp_path / "none"), "--json")
    assert result.returncode == 3
    faults = [f for f in json.loads(result.stdout) if f["level"] == "fault"]
    assert [f["text"] for f in faults] == [f"there is no {tmp_path / 'none'}"]
    assert "tinyserved --pool" in faults[0]["advice"]


def test_a_socket_that_a_killed_daemon_left_is_told_with_what_to_do(tmp_path):
    url = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(url)  # the file stays, and nobody listens
    result = doctor(url, "--json")
    assert result.returncode == 3
    assert json.loads(result.stdout)[0]["level"] == "ok"  # the file is there
    fault, = (f for f in json.loads(result.stdout) if f["level"] == "fault")
    assert fault["text"].startswith(f"cannot reach {url}: ")
    assert "start the daemon again" in fault["advice"]


def test_a_daemon_that_is_stopped_is_found(start_daemon):
    daemon = start_daemon(POOL)
    daemon.pause()
    result = doctor(daemon.url, "--json")
    daemon.resume()
    assert result.returncode == 3
    fault, = (f for f in json.loads(result.stdout) if f["level"] == "fault")
    assert fault["text"].startswith(f"no answer from {daemon.url} within ")
    assert "kill -CONT" in fault["advice"]


def test_a_full_pool_and_a_drained_daemon_are_found(start_daemon):
    daemon = start_daemon(POOL)
    with tinyserve.connect(daemon.url) as client, client.pool("p", writable=True) as kv:
        with kv.step(kv.create(1), [62 * 4], run=False) as step:
            step.commit()
        full = found(doctor(daemon.url, "--json"))[
            "pools: pool p: 2 of 64 blocks are free or cached"]
        assert full["level"] == "warning" and "tsctl frag p" in full["advice"]
        assert doctor(daemon.url).returncode == 0  # a warning isn't a fault
        subprocess.run([os.environ["TS_TEST_TSCTL"], "-s", daemon.url, "-y", "drain"], check=True)
    result = doctor(daemon.url, "--json")
    drained = found(result)[
        "pools: the daemon is drained: it takes no new sessions, but operators'"]
    assert result.returncode == 1 and drained["advice"] == "tsctl drain off"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_who_may_not_connect_is_told_which_group_it_takes(start_daemon, tmp_path):
    daemon = start_daemon(POOL)
    for folder in tmp_path.parents[1], tmp_path.parent:
        folder.chmod(0o755)
    ctl = shutil.copy(os.environ["TS_TEST_TSCTL"], tmp_path / "ctl")
    stranger = {"user": 65534, "group": 65534, "extra_groups": []}

    def ask():
        return subprocess.run([ctl, "-s", daemon.url, "--json", "doctor"], check=False, text=True,
                              stdout=subprocess.PIPE, timeout=60, **stranger)

    tmp_path.chmod(0o755)
    os.chmod(daemon.url, 0o660)
    fault = json.loads(ask().stdout)[0]
    assert fault["text"] == (f"nobody may not connect: {daemon.url} has mode 660 and group root")
    assert fault["advice"] == (  # membership of root's own group is no advice
        f"let the daemon run under group tinyserve; or as root: chgrp tinyserve {daemon.url} and "
        "usermod -aG tinyserve nobody; then log in again")
    os.chown(daemon.url, -1, 1)
    fault = json.loads(ask().stdout)[0]
    assert fault["text"].endswith("has mode 660 and group daemon")
    assert fault["advice"] == "as root: usermod -aG daemon nobody; then log in again"
    os.chown(daemon.url, -1, 0)
    os.chmod(daemon.url, 0o666)
    assert json.loads(ask().stdout)[0]["level"] == "warning"  # open to everybody
    os.chmod(daemon.url, 0o660)
    (tmp_path / "shut").mkdir(mode=0o700)
    daemon.url = str(tmp_path / "shut" / "s")
    fault = json.loads(ask().stdout)[0]
    assert fault["text"].startswith(f"nobody may not connect: {tmp_path / 'shut'} has mode 700")
    assert fault["advice"].startswith("let the daemon's socket lie in a folder that is open to ")
