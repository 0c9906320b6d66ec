"""What ts-generate, and tsctl, say of arguments that are none."""

import os
import pathlib
import shutil
import subprocess

import pytest

import tinyserve

MODEL = pathlib.Path(__file__).parents[2] / "tools" / "model"
REFERENCE = MODEL / "reference.json"

pytestmark = pytest.mark.skipif("TS_TEST_GENERATE" not in os.environ,
                                reason="TS_TEST_GENERATE names no worker")


@pytest.mark.parametrize("arguments, sentence", [
    ([f"--verify={REFERENCE}:one"], "reference.json:one: the file has no such prompt"),
    ([f"--verify={REFERENCE}:"], "reference.json:: the file has no such prompt"),
    ([f"--verify={REFERENCE}:-1"], "reference.json:-1: the file has no such prompt"),
    (["--prompt-file=/nonexistent"], "ts-generate: /nonexistent: No such file or directory"),
    ([f"--prompt-file={MODEL}"], f"ts-generate: {MODEL}: Is a directory"),
    (["--tokens="], "--tokens : a number up to 1048576 is needed"),
    (["--socket="], "the daemon's address is empty: ipc:///PATH or /PATH is needed"),
    (["--wait="], "--wait : 0 to 3600 seconds are possible")])
def test_arguments_that_are_none_are_named(tmp_path, arguments, sentence):
    result = subprocess.run([os.environ["TS_TEST_GENERATE"], "-s", str(tmp_path / "s"),
                             "--model", MODEL, *arguments], stderr=subprocess.PIPE, text=True)
    assert result.returncode != 0 and sentence in result.stderr


@pytest.mark.parametrize("name, sentence", [
    ("", "a name has at least 1 byte"),
    (128 * "n", "a name of 128 bytes; the limit is 127"),
    ("a\nb", "name 'a\\x0ab' has control characters, or isn't UTF-8: it must be plain text")])
def test_a_name_that_is_none_is_refused_before_anything_is_generated(start_daemon, name, sentence):
    daemon = start_daemon("tiny:layers=6,kv_heads=2,head_dim=64,dtype=fp32,memory=8M,slab=8M")
    keep = [os.environ["TS_TEST_GENERATE"], "-s", daemon.url, "--model", MODEL, "--tokens=2",
            "--prompt=a"]
    result = subprocess.run([*keep, "--keep", name], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"ts-generate: TS_EINVAL: {sentence}\n"
    result = subprocess.run([*keep, "--keep", 127 * "n"], capture_output=True, text=True)
    assert result.returncode == 0 and len(result.stdout) == 3, result.stderr
    with tinyserve.connect(daemon.url) as c:
        assert [kept.name for kept in c.pool("tiny").kept()] == [127 * "n"]


@pytest.mark.parametrize("command", [["status"], ["restart", "-y"], ["pool", "delete", "p", "-y"]])
@pytest.mark.parametrize("by_environment", [False, True])
def test_no_address_is_not_the_default_daemons(command, by_environment):
    named = "TINYSERVE_URL" if by_environment else "the daemon's address"
    result = subprocess.run(
        [os.environ["TS_TEST_TSCTL"], *([] if by_environment else ["--socket="]), *command],
        env={**os.environ, "TINYSERVE_URL": ""}, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert result.stderr == (f"tsctl: {named} is empty: ipc:///PATH or /PATH is needed, or none at "
                             "all for the user's own daemon or the system's\n")


def test_no_time_is_no_number_for_tsctl_either(tmp_path):
    result = subprocess.run([os.environ["TS_TEST_TSCTL"], "-s", str(tmp_path / "s"), "--wait=",
                             "status"], stderr=subprocess.PIPE, text=True)
    assert result.returncode != 0
    assert "--wait : 0 to 3600 seconds are possible" in result.stderr


def test_without_a_model_it_takes_the_installed_one(tmp_path):
    for folder in "bin", "share/tinyserve/model":
        (tmp_path / folder).mkdir(parents=True)
    program = tmp_path / "bin" / "ts-generate"
    shutil.copy(os.environ["TS_TEST_GENERATE"], program)
    result = subprocess.run([program, "--prompt=a"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith(f"ts-generate: {tmp_path}/share/tinyserve/model: ")
