"""What the journal gets: a socket in its place, where there is none."""

import os
import pathlib
import socket
import subprocess

import pytest

import tinyserve

JOURNAL = pathlib.Path("/run/systemd/journal/socket")


@pytest.fixture
def journal():
    if os.getuid() != 0 or JOURNAL.exists():
        pytest.skip("needs root, and a machine without a journal")
    JOURNAL.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.bind(str(JOURNAL))
        s.settimeout(60)
        yield s
    JOURNAL.unlink()


def entry(journal, beginning):
    """The fields of the next entry whose message begins so."""
    while True:
        fields = dict(line.split("=", 1) for line in journal.recv(65536).decode().splitlines())
        if fields["MESSAGE"].startswith(beginning):
            return fields


def test_lines_carry_priority_and_what_they_are_about(journal, tmp_path):
    stderr = tmp_path / "stderr"
    with stderr.open("wb") as out:
        st = os.fstat(out.fileno())
        environment = {**os.environ, "JOURNAL_STREAM": f"{st.st_dev}:{st.st_ino}"}
        daemon = subprocess.Popen(
            [os.environ["TS_TEST_DAEMON"], "--socket", str(tmp_path / "s"), "--pool",
             "tiny:layers=1,kv_heads=1,head_dim=32,blocks=4,device=host"],
            stderr=out, env=environment)
    try:
        pool = entry(journal, "pool 'tiny' on host: ")
        assert (pool["PRIORITY"], pool["TINYSERVE_POOL"]) == ("6", "tiny")
        with tinyserve.connect(str(tmp_path / "s"), wait=60, program="me") as client:
            opened = entry(journal, "session ")
            assert opened["MESSAGE"].endswith(f" opened: me (uid 0, pid {os.getpid()})")
            session = opened["TINYSERVE_SESSION"]
            assert int(session, 16) == client.session
            assert opened["TINYSERVE_PEER_UID"] == "0"
            assert opened["TINYSERVE_PEER_PID"] == str(os.getpid())
            subprocess.run([os.environ["TS_TEST_TSCTL"], "-s", str(tmp_path / "s"), "--yes",
                            "session", "kick", session], check=True)
            ended = entry(journal, f"session {session} is ended by uid 0")
            assert (ended["PRIORITY"], ended["TINYSERVE_SESSION"]) == ("4", session)
    finally:
        daemon.terminate()
        assert daemon.wait() == 0
    assert stderr.read_bytes() == b""
