"""Steps, and the frames that they may lie in."""

from __future__ import annotations

import warnings
from ctypes import POINTER, byref, c_uint32, c_uint64, c_void_p, cast
from typing import TYPE_CHECKING, Any, Callable, Iterable, Sequence

from . import arguments as check
from ._lib import CRunOptions, CStepOptions, lib
from .errors import DisconnectedError, NotFoundError, TimedOutError
from .opened import Memory, OfOneProcess, Opened
from .records import DTYPE_NAMES
from .view import View

if TYPE_CHECKING:
    from .pool import Pool
    from .records import Seq

_BUFFERS = {name: getattr(lib, f"ts_step_{name}")
            for name in ("q", "k", "v", "out", "sinks", "alibi", "scales", "lse")}


def step_options(heads: int | None, io_dtype: str, scale: float, run: bool,
                 kernel: str | None) -> CStepOptions:
    return CStepOptions(check.integer("heads", heads) if heads is not None else 0,
                        check.choice("io_dtype", io_dtype, DTYPE_NAMES[:3]),
                        check.real("scale", scale), not run,
                        check.text("kernel", kernel) if kernel is not None else None)


def add_options(options: CStepOptions, count: int, tokens: Iterable[int] | None, wait: float,
                priority: int) -> CStepOptions:
    """With those that each step of a frame may have of its own; count: of new tokens."""
    if tokens is not None:
        given, _ = check.token_ids("tokens", tokens, count)
        options.tokens = cast(given, POINTER(c_uint32))
    options.wait_ms = check.milliseconds("wait", wait, may_be_0=True)
    options.priority = check.integer("priority", priority, -1, 1)
    return options


class Step(OfOneProcess):
    """A transaction that adds tokens to a batch of sequences; nobody sees them before commit().
    Leaving its `with` block without a commit drops them. A step that is forgotten without either is
    dropped too, with a ResourceWarning."""

    _opened: Opened
    _instead = "begin another step"

    def __init__(self, pool: Pool, begin: Callable[[c_void_p], None], count: int,
                 heads: int | None, io_dtype: str, run: bool, rows: int | None = None) -> None:
        """begin: puts the step that it begins into what it is given. The caller has the lock."""
        self.pool, self.io_dtype = pool, io_dtype
        self.heads = heads or pool.geometry.kv_heads
        self._memory: Memory | None = None
        self._views: dict[str, View] = {}
        self._count = count
        self._runs = run
        handle = c_void_p()
        opened = Opened(handle, "the step has ended", pool._opened)
        try:
            begin(handle)
            self.tokens: int = lib.ts_step_tokens(handle)  #: new tokens of all its sequences
            self.rows: int = rows or self.tokens  #: of q, k, v, out, lse; a frame: a full step's
            pool._steps.add(opened)
            self._opened = opened
        except BaseException:  # also Ctrl-C, once it has begun
            pool._abort(opened)
            raise

    def _open(self) -> c_void_p:
        return self._opened.get()

    def _view(self, name: str, shape: tuple[int, ...], dtype: str | None = None,
              writable: bool = True) -> View:
        """The buffer of this name, which is made a view once for each step."""
        view = self._views.get(name)
        if view is not None:
            return view
        with self._opened.calls.looking:
            handle = self._open()
            if not self._runs:
                raise ValueError("the step was begun with run=False: it has no buffers")
            ptr: int = _BUFFERS[name](handle)
            if self._memory is None:
                self._memory = self.pool.client._exchange_of(ptr)
            view = View(ptr, shape, dtype or self.io_dtype, self.pool.client.exchange_device,
                        self._opened, self._memory, None, writable)
            self._views[name] = view
            return view

    def _rows(self, heads: int) -> tuple[int, int, int]:
        return self.rows, heads, self.pool.geometry.head_dim

    @property
    def q(self) -> View:
        """[rows, heads, head_dim] in the exchange, tokens in the order of the sequences."""
        return self._view("q", self._rows(self.heads))

    @property
    def k(self) -> View:
        """[rows, kv_heads, head_dim] in the exchange."""
        return self._view("k", self._rows(self.pool.geometry.kv_heads))

    @property
    def v(self) -> View:
        """[rows, kv_heads, head_dim] in the exchange."""
        return self._view("v", self._rows(self.pool.geometry.kv_heads))

    @property
    def out(self) -> View:
        """[rows, heads, head_dim] in the exchange."""
        return self._view("out", self._rows(self.heads))

    @property
    def sinks(self) -> View:
        """fp32 [heads] in the exchange: logits that join the softmax, for run(..., sinks=True)."""
        return self._view("sinks", (self.heads,), "fp32")

    @property
    def alibi(self) -> View:
        """fp32 [heads] in the exchange: slopes, for run(..., alibi=True)."""
        return self._view("alibi", (self.heads,), "fp32")

    @property
    def scales(self) -> View:
        """fp32 [2, kv_heads] in the exchange: what a stored element of K, then of V, of an fp8 pool
        is to be multiplied by, for run(..., scales=True)."""
        return self._view("scales", (2, self.pool.geometry.kv_heads), "fp32")

    @property
    def lse(self) -> View:
        """fp32 [rows, heads] in the exchange: the natural log of the sum of exponentials of each
        token's scores, sinks left out, after run(..., lse=True)."""
        return self._view("lse", (self.rows, self.heads), "fp32", writable=False)

    def start(self, i: int) -> int:
        """Tokens that sequence i had: the position of its first new token."""
        if not 0 <= i < self._count:
            raise IndexError(f"sequence {i}; the step has {self._count}")
        return int(self._opened.look(lib.ts_step_start, check.integer("i", i)))

    @property
    def slots(self) -> list[int]:
        """Slots of all new tokens, in order."""
        out = (c_uint64 * self.tokens)()
        self._opened.look(lib.ts_step_slots, 0, out)
        return list(out)

    def run(self, layer: int, *, stream: Any = None, scale: float = 0.0, soft_cap: float = 0.0,
            window: int = 0, alibi: bool = False, sinks: bool = False, lse: bool = False,
            scales: bool = False, rope_theta: float = 0.0, rope_dims: int = 0,
            rope_interleaved: bool = False) -> None:
        """Writes k and v into the step's slots of this layer and attends: a token sees its
        sequence's tokens up to and including itself.

        Without a stream, out is ready when this returns (and what a GPU is to read must have been
        written by then). With one, a torch.cuda.Stream or a CUstream's integer, the order is kept
        on the GPU and nothing waits.

        What becomes of a score, in this order: it is scaled (0: as the step says), becomes
        soft_cap * tanh(score / soft_cap) (0: no), gets the head's slope in `self.alibi` times the
        distance to the key (a negative number) with alibi=True, and is hidden if the key is further
        than `window` tokens away, the token itself included (0: all are seen). sinks=True: the
        logits in `self.sinks` join the softmax. lse=True: `self.lse` gets the log-sum-exps.
        scales=True, of an fp8 pool: `self.scales` has this layer's; else all are 1.

        rope_theta: q, and k before it is written, are turned by their tokens' positions (rotary
        embedding; 0: not): the first rope_dims dimensions of each head (0: all), in pairs of
        dimensions i and i + rope_dims / 2, or of neighbours with rope_interleaved=True."""
        where = getattr(stream, "cuda_stream", stream)
        if where is not None:
            check.integer("stream", where, 0, check.U64)
        options = CRunOptions(scale=check.real("scale", scale),
                              soft_cap=check.real("soft_cap", soft_cap),
                              window=check.integer("window", window), alibi=alibi, sinks=sinks,
                              lse=lse, scales=scales,
                              rope_theta=check.real("rope_theta", rope_theta),
                              rope_dims=check.integer("rope_dims", rope_dims),
                              rope_interleaved=rope_interleaved, on_stream=where is not None,
                              stream=where)
        self._run(check.integer("layer", layer), options)

    def _run(self, layer: int, options: CRunOptions) -> None:
        with self._opened as handle:
            status = lib.ts_step_run_with(handle, layer, byref(options))
            if status != 0:
                self.pool.client._check(status)

    def commit(self, accepted: Iterable[int] | None = None) -> None:
        """Makes the first accepted[i] new tokens part of sequence i (None: all) and drops the rest.
        Waits for runs that are under way."""
        numbers = None
        if accepted is not None:
            numbers, n = check.integers("accepted", c_uint32, accepted)
            if n != self._count:
                raise ValueError(f"{n} accepted counts for a step of {self._count} sequences")
        with self._opened as handle:
            status, called = -1, False  # Ctrl-C in the call, and it isn't known which
            try:
                self._opened.take()  # which is gone if this succeeds: nobody looks at it
                called = True
                status = lib.ts_step_commit(handle, numbers)
            finally:
                if status > 0 or not called:
                    self._opened.handle = handle
                else:
                    self.pool._steps.discard(self._opened)
            self.pool.client._check(status)

    def abort(self) -> None:
        """Drops the step: every sequence is as it was. Waits until the call that another thread may
        be in has returned."""
        self._open()
        self._opened.end(self._abort)

    def _abort(self) -> None:
        if self._opened.handle is None:  # another thread was quicker
            raise DisconnectedError("the step has ended", 11, "TS_ECONN")
        self.pool.client._check(self.pool._abort(self._opened))

    def _drop(self) -> None:
        """The same, whether it has ended or not."""
        with self._opened.calls.lock:
            self.pool._abort(self._opened)

    def __del__(self) -> None:
        opened = getattr(self, "_opened", None)  # none if it never was one
        if opened is None or opened.handle is None:
            return
        pool = self.pool
        opened.calls.drop(lambda: pool._abort(opened))
        warnings.warn(f"a step of {self.tokens} tokens in {self.pool.name!r} was dropped without "
                      "commit() or abort(): it is aborted", ResourceWarning, source=self)

    def __repr__(self) -> str:
        ended = ", ended" if self._opened.closed else ""
        return (f"<tinyserve.Step of {self.tokens} tokens in {self.pool.name!r}, io_dtype "
                f"{self.io_dtype}{ended}>")

    def __enter__(self) -> "Step":
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if self._opened.handle is None:
            return
        try:
            self.abort()
        except DisconnectedError:
            pass  # the step went with the session
        except NotFoundError:
            if not isinstance(error, TimedOutError):
                raise
            # the commit that wasn't answered in time has ended it


class Frame(OfOneProcess):
    """Where steps lie, one after the other: Pool.frame().

    A CUDA graph of one step's run(..., stream=...) runs the same layers of whichever step is open
    when it is replayed, and changes nothing while none is. Wait for a replay before the step
    ends."""

    _instead = "make another one by Pool.frame()"

    def __init__(self, pool: Pool, handle: c_void_p, rows: int, new_tokens: int,
                 heads: int | None, io_dtype: str) -> None:
        self.pool, self.rows, self.heads, self.io_dtype = pool, rows, heads, io_dtype
        self.new_tokens = new_tokens  #: of each sequence in a step
        self._opened = Opened(handle, "the frame was closed", pool._opened)
        self._step: Opened | None = None  # the last one
        pool._frames.append(self)

    def step(self, seqs: Sequence[Seq], tokens: Iterable[int] | None = None, *,
             wait: float = 0.0, priority: int = 0) -> Step:
        """Begins a step that adds the frame's new_tokens to each sequence; tokens, wait and
        priority are as in Pool.step(). q, k, v and out lie where those of the steps before it lay,
        and have a full step's rows, of which the first `step.tokens` count. Raises BusyError while
        another one is open, NoSpaceError."""
        self._opened.get()
        ids, n = check.integers("seqs", c_uint64, seqs)
        options = add_options(CStepOptions(), n * self.new_tokens, tokens, wait, priority)

        def begin(handle: c_void_p) -> None:
            with self._opened as frame:
                self.pool.client._check(lib.ts_frame_begin(frame, ids, n, byref(options),
                                                           byref(handle)))

        def made() -> Step:
            step = Step(self.pool, begin, n, self.heads, self.io_dtype, True, self.rows)
            self._step = step._opened
            return step

        return self.pool.client._waiting(options.wait_ms, made, Step._drop)

    def close(self) -> None:
        """Drops its open step, if there is one, and gives its memory back. Safe to call twice.
        Waits until the call that another thread may be in has returned."""
        self._opened.end(self._close)

    def _close(self) -> None:
        if self._step is not None:
            self.pool._abort(self._step)
        if self in self.pool._frames:
            self.pool._frames.remove(self)
        handle = self._opened.take()
        if handle is not None:
            lib.ts_frame_free(handle)

    def __repr__(self) -> str:
        closed = ", closed" if self._opened.closed else ""
        return (f"<tinyserve.Frame of {self.rows} rows in {self.pool.name!r}, io_dtype "
                f"{self.io_dtype}{closed}>")

    def __enter__(self) -> "Frame":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
