"""tools/examples/vllm_twice.py, as its first lines say."""

import os
import subprocess
import sys

from conftest import HERE

ROOT = HERE.parents[2]


def test_vllm_twice(daemon):
    environment = dict(os.environ, TINYSERVE_URL=daemon.url, VLLM_LOGGING_LEVEL="ERROR",
                       VLLM_CPU_KVCACHE_SPACE="1")
    done = subprocess.run([sys.executable, ROOT / "tools/examples/vllm_twice.py",
                           ROOT / "tools/model"], check=True, text=True, stdout=subprocess.PIPE,
                          timeout=240, env=environment)
    assert done.stdout.splitlines()[-2:] == [
        "engine 1: 0 of 253 tokens of its prompt found",
        "engine 2: 250 of 254 tokens of its prompt found"]
