"""What the GPU tests share: where the programs are, a daemon of their own, and tables.

The programs are taken from TS_TEST_DAEMON and TINYSERVE_LIBRARY, or from build/ of this checkout,
or from the bundle that this file lies in. torch is needed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def first(*paths):
    for path in paths:
        if path.exists():
            return str(path)
    sys.exit(f"none of {', '.join(map(str, paths))} is there: build first (see tests/README.md)")


ROOT = HERE.parents[1]
if "TS_TEST_DAEMON" not in os.environ:
    os.environ["TS_TEST_DAEMON"] = first(ROOT / "sbin/tinyserved",
                                          ROOT / "build/daemon/tinyserved")
if "TINYSERVE_LIBRARY" not in os.environ:
    os.environ["TINYSERVE_LIBRARY"] = first(ROOT / "lib/libtinyserve.so.0",
                                             ROOT / "build/client/libtinyserve.so.0")
TSCTL = os.environ.get("TS_TEST_TSCTL") or first(ROOT / "bin/tsctl", ROOT / "build/tools/tsctl")
PACKAGE = next((p for p in (ROOT / "client/python", ROOT / "share/tinyserve/python")
                if p.exists()), None)
if PACKAGE is not None:
    sys.path.insert(0, str(PACKAGE))
    os.environ["PYTHONPATH"] = f"{PACKAGE}:{os.environ.get('PYTHONPATH', '')}"

import tinyserve  # noqa: E402


class Daemon:
    """A tinyserved of the test's own, in a folder that goes with it."""

    def __init__(self, *pools, **settings):
        self.folder = tempfile.TemporaryDirectory(prefix="tinyserve-gpu.")
        self.url = f"{self.folder.name}/s"
        command = [os.environ["TS_TEST_DAEMON"], "--socket", self.url]
        for key, value in {"log_level": "warning", "exchange_max": "8G", **settings}.items():
            command += ["--set", f"{key}={value}"]
        for pool in pools:
            command += ["--pool", pool]
        self.process = subprocess.Popen(command)
        tinyserve.connect(self.url, wait=60).close()

    def stop(self):
        self.process.terminate()
        status = self.process.wait(30)
        self.folder.cleanup()
        return status

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            status = self.stop()
            assert status == 0, f"the daemon ended with {status}"
        self.folder.cleanup()


#: whether this runs under CUDA's multi-process service (with-mps)
MPS = "CUDA_MPS_PIPE_DIRECTORY" in os.environ


def arguments(description):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--provider", default="auto", choices=["auto", "cuda-vmm", "cuda-ipc"])
    parser.add_argument("--device", default="cuda:0")
    return parser


def device_line():
    """The GPU and the driver, for a table's heading."""
    out = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
                         text=True, stdout=subprocess.PIPE, check=False).stdout
    return out.splitlines()[0] if out else "unknown GPU"


def table(head, rows):
    """Prints rows under their heads, numbers to the right."""
    cells = [[str(c) for c in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for n, row in enumerate(cells):
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w)
                        for i, (c, w) in enumerate(zip(row, widths))).rstrip())
        if n == 0:
            print("  ".join("-" * w for w in widths))
    print(flush=True)


KERNELS = ["v1", "v2", "v3", "v4", "v5", "auto"]
