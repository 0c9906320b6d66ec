"""What lies where the daemon's sockets are to be made: only a stale socket of its own makes way."""

import os
import socket
import stat
import subprocess

import pytest

import tinyserve

POOL = "p:layers=1,kv_heads=1,head_dim=32,memory=1M,device=host"


def start(path, *arguments):
    return subprocess.run([os.environ["TS_TEST_DAEMON"], "--socket", str(path), *arguments],
                          text=True, stderr=subprocess.PIPE, check=False, timeout=60)


@pytest.mark.parametrize("ending", ["", ".handles", ".lock"])
def test_a_file_at_a_sockets_path_is_refused_and_left(tmp_path, ending):
    victim = tmp_path / f"s{ending}"
    victim.write_text("[pool p]\nlayers = 1\nkv_heads = 1\nhead_dim = 32\nmemory = 1M\n")
    before = victim.read_text()
    result = start(tmp_path / "s", "--config", victim)
    assert result.returncode == 1
    assert f"{victim} is" in result.stderr and "left as it is" in result.stderr
    assert victim.read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir() if p != victim) == []


@pytest.mark.parametrize("kind, make", [
    ("a folder", lambda p: p.mkdir()),
    ("a symbolic link", lambda p: p.symlink_to("/etc/passwd")),
    ("neither a file nor a socket", os.mkfifo),
])
def test_what_is_no_socket_is_named(tmp_path, kind, make):
    make(tmp_path / "s")
    mode = (tmp_path / "s").lstat().st_mode
    result = start(tmp_path / "s", "--pool", POOL)
    assert result.returncode == 1
    assert f"{tmp_path}/s is {kind}: a socket can't be made there" in result.stderr
    assert stat.S_IFMT((tmp_path / "s").lstat().st_mode) == stat.S_IFMT(mode)


def test_a_folder_that_is_missing_is_told(tmp_path):
    result = start(tmp_path / "none" / "s", "--pool", POOL)
    assert result.returncode == 1
    assert (f"{tmp_path}/none/s: its folder is missing; make it, or name another socket (--socket)"
            in result.stderr)


def test_a_folder_that_takes_no_file_isnt_called_missing():
    result = start("/proc/s", "--pool", POOL)
    assert result.returncode == 1
    assert "/proc/s.lock: the socket's lock can't be made: No such file" in result.stderr


@pytest.mark.parametrize("ending", ["", ".handles"])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_socket_that_answers_is_left(tmp_path, ending, kind):
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(str(tmp_path / f"s{ending}"))
        other.listen()
        result = start(tmp_path / "s", "--pool", POOL)
        assert result.returncode == 1
        assert f"s{ending} is a socket in use: another program listens there" in result.stderr
        assert (tmp_path / f"s{ending}").is_socket()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
def test_a_stale_socket_of_another_user_is_left(tmp_path):
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "s"))
    os.chown(tmp_path / "s", 65534, 65534)
    result = start(tmp_path / "s", "--pool", POOL)
    assert result.returncode == 1
    assert "s is a socket of uid 65534, and this daemon is uid 0" in result.stderr
    assert (tmp_path / "s").is_socket()


def test_stale_sockets_of_a_killed_daemon_make_way(start_daemon):
    daemon = start_daemon()
    daemon.process.kill()
    daemon.process.wait()
    assert os.path.exists(daemon.url) and os.path.exists(daemon.url + ".handles")
    again = start_daemon()
    with tinyserve.connect(again.url) as client, client.pool("tiny") as kv:
        assert len(kv.create(2)) == 2
