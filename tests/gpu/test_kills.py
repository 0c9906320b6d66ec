"""Workers that are killed (SIGKILL) while their kernels run: who else notices?

Two bystanders, one that attends itself and one that goes by the daemon, repeat a step and compare
every bit of its results with the first ones. Beside them one worker after another is killed at a
random moment: with short kernels (decode) or long ones (a prefill of 8192 tokens, many of them
queued), attending itself or by the daemon. Under MPS as many are first ended by `tsctl session
kick`, which ends their work on the GPU. Counted are the bystanders and daemons that were lost. Run
it bare and by ./with-mps.

Ends with 1 if anybody was harmed, but by a kill that MPS' clients are known not to stand: of a
worker that attends itself and whose work nobody ended first."""

import random
import signal
import subprocess
import sys
import threading
import time

import common
import tinyserve
import torch

HEADS, KV_HEADS, DIM, LONG = 32, 8, 128, 8192
WATCHERS = ("local", "daemon")  # how a bystander attends


def connect(url, execution, exchange):
    client = tinyserve.connect(url, execution=execution, timeout=60)
    kv = client.pool("kills", writable=True)
    client.exchange(kv, exchange)
    return client, kv


def begin(kv, seqs, tokens):
    """A step whose inputs are the same each time."""
    step = kv.step(seqs, tokens, heads=HEADS)
    torch.manual_seed(7)
    for view in (step.q, step.k, step.v):
        view.torch().normal_()
    return step


def bystander(url, execution):
    """Prints a line after each step that was as the first; ends with 3 when it is lost."""
    try:
        client, kv = connect(url, execution, 64 << 20)
        seqs = kv.create(4)
        first = None
        while True:
            with begin(kv, seqs, [200, 1, 77, 513]) as step:
                for layer in range(kv.geometry.layers):
                    step.run(layer, stream=torch.cuda.current_stream())
                out = step.out.torch().clone()
                torch.cuda.synchronize()
            if first is None:
                first = out
            if not torch.equal(out, first):
                print("WRONG", flush=True)
                return 4
            print("ok", flush=True)
    except (tinyserve.Error, RuntimeError) as error:
        print(f"LOST {type(error).__name__}: {error}".splitlines()[0], flush=True)
        return 3


def victim(url, execution, length):
    """Waits for a line, says when its first kernels are under way; goes on until it is killed."""
    sys.stdin.readline()
    client, kv = connect(url, execution, 1 << 29)
    seqs = kv.create(1)
    step = begin(kv, seqs, [LONG] if length == "long" else [1])
    for _ in range(3):
        step.run(0, stream=torch.cuda.current_stream())
    print(f"ready {client.session:x}", flush=True)
    try:
        while True:
            for _ in range(20):
                step.run(0, stream=torch.cuda.current_stream())
            torch.cuda.synchronize()
    except (tinyserve.Error, RuntimeError):  # kicked
        return 3


class Process:
    """One of the roles above, as a process of its own; counts its lines."""

    def __init__(self, *words):
        self.process = subprocess.Popen([sys.executable, __file__, *words], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        self.lines, self.last, self.changed = 0, "", threading.Condition()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            with self.changed:
                self.lines, self.last = self.lines + 1, line.strip()
                self.changed.notify_all()
        self.process.wait()
        with self.changed:
            self.changed.notify_all()

    def await_lines(self, count, seconds):
        """Whether it says `count` lines more, and nothing bad, within `seconds` seconds."""
        with self.changed:
            wanted = self.lines + count
            self.changed.wait_for(
                lambda: self.lines >= wanted or self.process.poll() is not None, seconds)
            return self.lines >= wanted and self.last.split()[0] in ("ok", "ready")

    def begin(self):
        """Lets a victim go; whether its kernels are under way within two minutes."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.await_lines(1, 120)

    def kick(self, url):
        """A victim's session is ended by an operator."""
        session = self.last.split()[1]
        subprocess.run([common.TSCTL, "--socket", url, "--yes", "session", "kick", session],
                       check=True, timeout=60)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Scene:
    """A daemon and its bystanders; those that are lost are counted and started again."""

    def __init__(self, pool):
        self.pool, self.daemon, self.bystanders = pool, None, {}

    def prepare(self):
        if self.daemon is None:
            self.daemon = common.Daemon(self.pool)
        for execution in WATCHERS:
            if execution not in self.bystanders:
                self.bystanders[execution] = Process("bystander", self.daemon.url, execution)
        for execution, process in self.bystanders.items():
            if process.lines < 2 and not process.await_lines(2, 120):
                sys.exit(f"the bystander ({execution}) doesn't start: {process.last}")

    def after_a_kill(self):
        """(how the lost bystanders attended, the daemon's status or None, what the lost said)."""
        lost = [e for e, process in self.bystanders.items() if not process.await_lines(2, 20)]
        said = [self.bystanders[e].last for e in lost]
        for execution in lost:
            self.bystanders.pop(execution).kill()
        try:  # a daemon that rests looks at its devices every second
            status = self.daemon.process.wait(10 if lost else 0)
        except subprocess.TimeoutExpired:
            return lost, None, said
        self.end()
        return lost, status, said

    def end(self):
        for process in self.bystanders.values():
            process.kill()
        self.bystanders = {}
        if self.daemon is not None:
            if self.daemon.process.poll() is None:
                self.daemon.stop()
            self.daemon.folder.cleanup()
            self.daemon = None


def count(scene, execution, length, kicked, kills):
    """Kills `kills` victims; a row of the table, and whether anybody was harmed."""
    lost, daemons, first = dict.fromkeys(WATCHERS, 0), 0, "-"
    rng = random.Random(f"{execution} {length}")
    waiting = []
    for left in range(kills, 0, -1):
        scene.prepare()
        while len(waiting) < min(left, 6):  # their imports take longest: some at once
            waiting.append(Process("victim", scene.daemon.url, execution, length))
        worker = waiting.pop(0)
        if not worker.begin():
            sys.exit(f"the worker ({execution}, {length}) doesn't start: {worker.last}")
        time.sleep(rng.random() * 0.4)  # a moment of any kind
        if kicked:
            worker.kick(scene.daemon.url)
        worker.kill()
        gone, status, said = scene.after_a_kill()
        for watcher in gone:
            lost[watcher] += 1
        if said and first == "-":
            first = said[0]
        if status is not None:
            daemons += 1
            if "status" not in first:
                first += f"; the daemon ended with status {status}"
            for process in waiting:  # theirs was the daemon that is gone
                process.kill()
            waiting = []
    row = [execution, length, "yes" if kicked else "no", kills, *lost.values(), daemons, first]
    return row, sum(lost.values()) + daemons > 0


def main():
    parser = common.arguments(__doc__)
    parser.add_argument("--kills", type=int, default=12, help="of each kind")
    options = parser.parse_args()
    pool = (f"kills:layers=2,kv_heads={KV_HEADS},head_dim={DIM},dtype=bf16,memory=4G,"
            f"block_tokens=16,client_write=all,device={options.device},provider={options.provider}")
    print(f"{'with' if common.MPS else 'without'} MPS, {common.device_line()}\n", flush=True)
    scene, rows, harm = Scene(pool), [], False
    kinds = [(execution, length, False) for execution in WATCHERS for length in ("short", "long")]
    if common.MPS:
        kinds[:0] = [("local", "short", True), ("local", "long", True)]
    for execution, length, kicked in kinds:
        row, harmed = count(scene, execution, length, kicked, options.kills)
        rows.append(row)
        harm |= harmed and (execution == "daemon" or kicked or not common.MPS)
        print(*row, flush=True)
    scene.end()
    print()
    common.table(["killed", "kernels", "kicked first", "kills", "lost: attending itself",
                  "lost: by the daemon", "daemons lost", "first said"], rows)
    return 1 if harm else 0


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] == "bystander":
        sys.exit(bystander(*sys.argv[2:]))
    if len(sys.argv) > 2 and sys.argv[1] == "victim":
        sys.exit(victim(*sys.argv[2:]))
    sys.exit(main())
