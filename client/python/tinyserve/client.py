"""Connections, pools, sequences and steps."""

from __future__ import annotations

import array
import ctypes
from ctypes import POINTER, byref, c_int, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any, Iterable, Sequence

from ._lib import CFrameOptions, CKv, CRunOptions, CStepOptions, Options, lib
from .errors import BY_STATUS, DisconnectedError, Error
from .view import DTYPES, View

_DTYPE_NAMES = ("fp32", "fp16", "bf16", "fp8_e4m3")
_LAYOUT_NAMES = ("nhd", "hnd")
_WRITABLE = 1

Seq = int  #: a sequence's id: never 0, never used again once it is freed


@dataclass(frozen=True)
class Geometry:
    """Shape of a pool's cache: a block is [layers][2 (K, V)][one layer's tokens]."""
    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: str  #: "fp32", "fp16" or "bf16"
    layout: str  #: "nhd": [block_tokens][kv_heads][head_dim] in a layer; "hnd": heads first

    @property
    def element_bytes(self) -> int:
        return DTYPES[self.dtype][0]

    @property
    def plane_bytes(self) -> int:
        """Bytes of one layer's K (or V) in one block."""
        return self.block_tokens * self.kv_heads * self.head_dim * self.element_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes from one block to the next: as ts_geometry_block_bytes (tinyserve_types.h) has it."""
        size = self.plane_bytes * 2 * self.layers
        more = 1 << ((size // 32).bit_length() - 1)
        while size % (80 << 10) == 0 or size % (376 << 10) == 0:
            size += more
        return size


def _array(ctype: type, values: Iterable[int]) -> Any:
    """A C array of the numbers; a contiguous NumPy array of the right type is not copied."""
    interface = getattr(values, "__array_interface__", None)
    size = ctypes.sizeof(ctype)
    if interface is not None and interface["typestr"] == f"<u{size}" and \
            interface.get("strides") is None and len(interface["shape"]) == 1:
        pointer = ctypes.cast(interface["data"][0], POINTER(ctype))
        pointer.keeps = values  # type: ignore[attr-defined]
        return pointer, interface["shape"][0]
    numbers = list(values)
    try:
        packed = array.array("I" if size == 4 else "Q", numbers)  # many times quicker than ctypes
    except OverflowError:
        wrong = next(v for v in numbers if not 0 <= int(v) < 1 << (8 * size))
        raise OverflowError(f"{wrong} doesn't fit into {8 * size} bits without sign") from None
    return (ctype * len(packed)).from_buffer(packed), len(packed)


def _pair(name: str, seqs: Iterable[Seq], numbers: Iterable[int]) -> tuple[Any, Any, int]:
    ids, n = _array(c_uint64, seqs)
    values, m = _array(c_uint32, numbers)
    if n != m:
        raise ValueError(f"{n} sequences, but {m} {name}")
    return ids, values, n


_TRANSPORTS = ("auto", "ring", "messages")
_EXECUTIONS = ("daemon", "local", "auto")
_SPIN_NONE = 2**32 - 1


class Client:
    """A session with the daemon. Used by one thread at a time; connect after fork(), not before.

    Leaving its `with` block ends the session: its sequences, except kept ones, are freed.
    """

    def __init__(self, url: str | None = None, *, program: str | None = None, timeout: float = 30.0,
                 retries: int = 0, wait: float = 0.0, exchange_bytes: int = 0,
                 transport: str = "auto", spin_us: int | None = None, execution: str = "daemon",
                 threads: int = 0) -> None:
        """url: "ipc:///path" or "/path"; None: TINYSERVE_URL, or the system's daemon.
        timeout: seconds for one call; wait: seconds to wait for a daemon to appear.
        exchange_bytes: of shared memory for q, k, v and out to start with.
        transport: how steps reach the daemon, "ring", "messages", or "auto": rings if there are any.
        spin_us: microseconds that a call through a ring polls before it sleeps (None: 50).
        execution: who attends, "daemon", "local" (this process; pools opened writable, on a GPU with
        exchange() or register() in its memory), or "auto": where it can be, the first step goes both
        ways, and the quicker is taken from then on. The results are the same. threads: of local
        execution on the host (0: one for each processor).

        Raises DisconnectedError where there is no daemon."""
        if transport not in _TRANSPORTS:
            raise ValueError(f"transport {transport!r}; known are {', '.join(_TRANSPORTS)}")
        if execution not in _EXECUTIONS:
            raise ValueError(f"execution {execution!r}; known are {', '.join(_EXECUTIONS)}")
        spin = 0 if spin_us is None else _SPIN_NONE if spin_us == 0 else spin_us
        options = Options(url.encode() if url else None, program.encode() if program else None,
                          max(1, int(timeout * 1000)), retries, int(wait * 1000), exchange_bytes,
                          _TRANSPORTS.index(transport), spin, _EXECUTIONS.index(execution),
                          threads)
        self._handle: c_void_p | None = c_void_p()
        self._pools: list[Pool] = []
        status = lib.ts_connect(byref(options), byref(self._handle))
        if status != 0:
            try:
                self._check(status)
            finally:
                lib.ts_disconnect(self._handle)
                self._handle = None

    def _check(self, status: int) -> None:
        if status != 0:
            error = BY_STATUS.get(status, Error)
            name = lib.ts_status_name(status).decode()
            raise error(lib.ts_error(self._handle).decode(errors="replace"), status, name)

    def _open(self) -> c_void_p:
        if self._handle is None:
            raise DisconnectedError("the client was closed", 11, "TS_ECONN")
        return self._handle

    @property
    def session(self) -> int:
        """This session's id, as `tsctl sessions` shows it in hexadecimal."""
        return lib.ts_session_id(self._open())

    @property
    def transport(self) -> str:
        """What the last step went by: "ring" or "messages"."""
        return _TRANSPORTS[lib.ts_client_transport(self._open())]

    @property
    def execution(self) -> str:
        """Who attended in the last step: "daemon", "local", or "auto": both, to compare them."""
        return _EXECUTIONS[lib.ts_client_exec(self._open())]

    @property
    def daemon_version(self) -> str:
        return lib.ts_daemon_version(self._open()).decode()

    def pool(self, name: str, *, writable: bool = False) -> "Pool":
        """Opens a pool. writable: map slabs writable, where the configuration allows it.

        Raises NotFoundError, DeniedError."""
        return Pool(self, name, writable)

    def exchange(self, pool: "Pool", nbytes: int) -> None:
        """Puts the exchange into memory of the pool's GPU. No step may be open."""
        self._check(lib.ts_exchange_device(pool._open(), nbytes))
        self._registered = None
        self.exchange_device = pool.cuda_device

    def register(self, pool: "Pool", tensor: Any) -> None:
        """Makes a CUDA tensor's memory the exchange, in place. It must be contiguous and was made on
        the pool's GPU by cudaMalloc, as PyTorch's allocator does unless expandable segments are on;
        it is kept alive. The daemon can then read and write all of it. No step may be open."""
        interface = tensor.__cuda_array_interface__
        nbytes = int(tensor.nbytes) // 4096 * 4096
        self._check(lib.ts_exchange_register(pool._open(), interface["data"][0], nbytes))
        self._registered = tensor
        self.exchange_device = pool.cuda_device

    _registered: Any = None
    exchange_device: int | None = None  #: the CUDA device of the exchange; None: host memory

    def close(self) -> None:
        """Ends the session. Safe to call twice."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        for pool in list(self._pools):
            pool._close()
        lib.ts_disconnect(handle)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()


def connect(url: str | None = None, **options: Any) -> Client:
    """Connects to the daemon: Client(url, **options)."""
    return Client(url, **options)


def _step_options(heads: int | None, io_dtype: str, scale: float, run: bool,
                  kernel: str | None) -> CStepOptions:
    if io_dtype not in _DTYPE_NAMES[:3]:
        raise ValueError(f"io_dtype {io_dtype!r}; known are {', '.join(_DTYPE_NAMES[:3])}")
    return CStepOptions(heads or 0, _DTYPE_NAMES.index(io_dtype), scale, not run,
                        kernel.encode() if kernel else None)


class Pool:
    """A paged KV cache on one device, shared with other processes."""

    def __init__(self, client: Client, name: str, writable: bool = False) -> None:
        handle = c_void_p()
        client._check(lib.ts_pool_open(client._open(), name.encode(), _WRITABLE if writable else 0,
                                       byref(handle)))
        self.client, self.name, self.writable = client, name, writable
        self._handle: c_void_p | None = handle
        self._steps: list[Step] = []
        self._frames: list[Frame] = []
        g = lib.ts_pool_geometry(handle).contents
        self.geometry = Geometry(g.layers, g.kv_heads, g.head_dim, g.block_tokens,
                                 _DTYPE_NAMES[g.dtype], _LAYOUT_NAMES[g.layout])
        self.blocks: int = lib.ts_pool_blocks(handle)  #: that the pool has
        self.sequence_max: int = lib.ts_pool_sequence_max(handle)  #: tokens a sequence may have
        self.device: str = lib.ts_pool_device(handle).decode()  #: "host", "cuda:0" (the daemon's)
        self.memory: str = lib.ts_pool_memory(handle).decode()  #: "host", "cuda-vmm", "cuda-ipc"
        client._pools.append(self)

    def _open(self) -> c_void_p:
        self.client._open()
        if self._handle is None:
            raise DisconnectedError(f"pool '{self.name}' was closed", 11, "TS_ECONN")
        return self._handle

    def _check(self, status: int) -> None:
        self.client._check(status)

    @property
    def cuda_device(self) -> int | None:
        """The pool's GPU as this process counts them; None: host memory."""
        if self.memory == "host":
            return None
        ordinal = c_int()
        self._check(lib.ts_pool_cuda_device(self._open(), byref(ordinal)))
        return ordinal.value

    # ---- sequences ----

    def create(self, count: int = 1) -> list[Seq]:
        """Makes empty sequences. Raises QuotaError."""
        out = (c_uint64 * max(count, 1))()
        self._check(lib.ts_seq_create(self._open(), count, out))
        return list(out)

    def fork(self, parent: Seq, count: int = 1, *, length: int | None = None) -> list[Seq]:
        """Makes sequences that share all of the parent's blocks, or its first `length` tokens'.
        Nothing is copied until one of them writes into a shared tail."""
        out = (c_uint64 * max(count, 1))()
        if length is None:
            self._check(lib.ts_seq_fork(self._open(), parent, count, out))
        else:
            self._check(lib.ts_seq_fork_at(self._open(), parent, length, count, out))
        return list(out)

    def truncate(self, seqs: Iterable[Seq], lengths: Iterable[int]) -> None:
        """Cuts each sequence down to so many tokens; all or none."""
        ids, numbers, n = _pair("lengths", seqs, lengths)
        self._check(lib.ts_seq_truncate(self._open(), ids, numbers, n))

    def free(self, seqs: Iterable[Seq]) -> None:
        """Frees the sequences; all or none. Raises BusyError where one is in an open step."""
        ids, n = _array(c_uint64, seqs)
        self._check(lib.ts_seq_free(self._open(), ids, n))

    def keep(self, seq: Seq, name: str | None) -> None:
        """Keeps the sequence under a name: it outlives this session, and any session of the same
        tenant may attach to it. None forgets the name. Raises ExistsError."""
        self._check(lib.ts_seq_keep(self._open(), seq, name.encode() if name is not None else None))

    def attach(self, name: str) -> tuple[Seq, int]:
        """Finds a kept sequence: its id and its length. Raises NotFoundError."""
        seq, length = c_uint64(), c_uint32()
        self._check(lib.ts_seq_attach(self._open(), name.encode(), byref(seq), byref(length)))
        return seq.value, length.value

    def lengths(self, seqs: Iterable[Seq]) -> list[int]:
        """Tokens of each sequence."""
        ids, n = _array(c_uint64, seqs)
        out = (c_uint32 * max(n, 1))()
        self._check(lib.ts_seq_lengths(self._open(), ids, n, out))
        return list(out)[:n]

    def append(self, seqs: Iterable[Seq], new_tokens: Iterable[int]) -> list[int]:
        """Appends tokens whose K and V this process writes itself (writable pools) and returns their
        slots, in order. They are part of the sequences at once. Raises NoSpaceError."""
        ids, numbers, n = _pair("new_tokens", seqs, new_tokens)
        slots = (c_uint64 * max(sum(numbers[:n]), 1))()
        self._check(lib.ts_seq_append(self._open(), ids, numbers, n, slots))
        return list(slots)

    # ---- where tokens lie ----

    def slots(self, seq: Seq, first: int, count: int) -> list[int]:
        """Slots (block * block_tokens + offset) of tokens first .. first + count - 1."""
        out = (c_uint64 * max(count, 1))()
        self._check(lib.ts_seq_slots(self._open(), seq, first, count, out))
        return list(out)

    def kv(self, slot: int, layer: int) -> tuple[View, View]:
        """One token's K and V at one layer: two views [kv_heads, head_dim] of the pool's memory,
        read-only unless the pool was opened writable. The slot must come from this session's last
        answer about its sequence."""
        g, at = self.geometry, CKv()
        self._check(lib.ts_slot_kv(self._open(), slot, layer, byref(at)))
        shape, strides = (g.kv_heads, g.head_dim), (at.head_stride, g.element_bytes)
        return tuple(View(ptr, shape, g.dtype, self.cuda_device, self, strides, self.writable)
                     for ptr in (at.k, at.v))  # type: ignore[return-value]

    def layer(self, layer: int, slots: Iterable[int]) -> tuple[View, View]:
        """K and V of one layer of the whole pool: two views [blocks, block_tokens, kv_heads,
        head_dim] (strided; both layouts look the same), for kernels that take a block table. Only
        the slabs of the given slots, and what was mapped before, may be read."""
        g, base = self.geometry, c_void_p()
        numbers, n = _array(c_uint64, slots)
        if not 0 <= layer < g.layers:
            raise IndexError(f"layer {layer}; the pool has {g.layers}")
        self._check(lib.ts_pool_map(self._open(), numbers, n, byref(base)))
        size, row = g.element_bytes, g.head_dim * g.element_bytes
        token = row * g.kv_heads if g.layout == "nhd" else row
        head = row if g.layout == "nhd" else row * g.block_tokens
        shape = (self.blocks, g.block_tokens, g.kv_heads, g.head_dim)
        k = (base.value or 0) + layer * 2 * g.plane_bytes
        return tuple(View(ptr, shape, g.dtype, self.cuda_device, self,
                          (g.block_bytes, token, head, size), self.writable)
                     for ptr in (k, k + g.plane_bytes))  # type: ignore[return-value]

    # ---- steps ----

    def step(self, seqs: Sequence[Seq], new_tokens: Sequence[int], *, heads: int | None = None,
             io_dtype: str = "fp32", scale: float = 0.0, run: bool = True,
             kernel: str | None = None) -> "Step":
        """Begins a step that adds new_tokens[i] tokens to sequence i: all of them get their slots, or
        NoSpaceError is raised and nothing was taken. A sequence may get 0, as long as another gets
        some: it takes no block, and nothing is attended for it.

        heads: query heads, a multiple of kv_heads (None: kv_heads); io_dtype: of q, k, v and out,
        "fp32" or the pool's (beside an fp8 pool "fp16" or "bf16"); scale: of q·k (0: 1/sqrt(head_dim)); run False: no layer will be run;
        kernel: of a GPU pool, "v1" and so on (None: the pool's)."""
        ids, numbers, n = _pair("new_tokens", seqs, new_tokens)
        options = _step_options(heads, io_dtype, scale, run, kernel)
        handle = c_void_p()
        self._check(lib.ts_step_begin(self._open(), ids, numbers, n, byref(options), byref(handle)))
        return Step(self, handle, n, heads, io_dtype, run)

    def frame(self, seqs: int, *, new_tokens: int = 1, tokens: int = 0, heads: int | None = None,
              io_dtype: str = "fp32", scale: float = 0.0, kernel: str | None = None) -> "Frame":
        """Where steps lie, one after the other, so that a CUDA graph of one step's runs serves the
        later ones too: steps of up to `seqs` sequences with `new_tokens` new tokens each, and up to
        `tokens` in all, new ones included (0: as many as the pool has slots). Its steps are executed
        in this process, whatever the session's execution. The rest: as step()."""
        options = CFrameOptions(seqs, new_tokens, tokens,
                                _step_options(heads, io_dtype, scale, True, kernel))
        handle = c_void_p()
        self._check(lib.ts_frame_new(self._open(), byref(options), byref(handle)))
        return Frame(self, handle, seqs * (new_tokens or 1), heads, io_dtype)

    def _close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is None:
            return
        for step in list(self._steps):
            step._drop(handle)
        for frame in list(self._frames):
            frame.close()
        lib.ts_pool_close(handle)
        self.client._pools.remove(self)

    def close(self) -> None:
        """Unmaps the pool and drops its open steps; sequences stay. Safe to call twice."""
        self._close()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Step:
    """A transaction that adds tokens to a batch of sequences; nobody sees them before commit().
    Leaving its `with` block without a commit drops them."""

    def __init__(self, pool: Pool, handle: c_void_p, count: int, heads: int | None, io_dtype: str,
                 run: bool, rows: int | None = None) -> None:
        self.pool, self.io_dtype = pool, io_dtype
        self.heads = heads or pool.geometry.kv_heads
        self._handle: c_void_p | None = handle
        self._count = count
        self._runs = run
        self.tokens: int = lib.ts_step_tokens(handle)  #: new tokens of all its sequences
        self.rows: int = rows or self.tokens  #: of q, k, v, out and lse; of a frame's, a full step's
        pool._steps.append(self)

    def _open(self) -> c_void_p:
        self.pool._open()
        if self._handle is None:
            raise DisconnectedError("the step has ended", 11, "TS_ECONN")
        return self._handle

    def _view(self, function: Any, heads: int, writable: bool = True) -> View:
        handle = self._open()
        if not self._runs:
            raise ValueError("the step was begun with run=False: it has no buffers")
        return View(function(handle), (self.rows, heads, self.pool.geometry.head_dim),
                    self.io_dtype, self.pool.client.exchange_device, self, None, writable)

    @property
    def q(self) -> View:
        """[rows, heads, head_dim] in the exchange, tokens in the order of the sequences."""
        return self._view(lib.ts_step_q, self.heads)

    @property
    def k(self) -> View:
        """[rows, kv_heads, head_dim] in the exchange."""
        return self._view(lib.ts_step_k, self.pool.geometry.kv_heads)

    @property
    def v(self) -> View:
        """[rows, kv_heads, head_dim] in the exchange."""
        return self._view(lib.ts_step_v, self.pool.geometry.kv_heads)

    @property
    def out(self) -> View:
        """[rows, heads, head_dim] in the exchange."""
        return self._view(lib.ts_step_out, self.heads)

    def _floats(self, function: Any, *shape: int, writable: bool = True) -> View:
        view = self._view(function, self.heads, writable)
        return View(view.ptr, shape, "fp32", view.device, self, None, writable)

    @property
    def sinks(self) -> View:
        """fp32 [heads] in the exchange: logits that join the softmax, for run(..., sinks=True)."""
        return self._floats(lib.ts_step_sinks, self.heads)

    @property
    def alibi(self) -> View:
        """fp32 [heads] in the exchange: slopes, for run(..., alibi=True)."""
        return self._floats(lib.ts_step_alibi, self.heads)

    @property
    def scales(self) -> View:
        """fp32 [2, kv_heads] in the exchange: what a stored element of K, then of V, of an fp8 pool is
        to be multiplied by, for run(..., scales=True)."""
        return self._floats(lib.ts_step_scales, 2, self.pool.geometry.kv_heads)

    @property
    def lse(self) -> View:
        """fp32 [rows, heads] in the exchange: the natural log of the sum of exponentials of each
        token's scores, sinks left out, after run(..., lse=True)."""
        return self._floats(lib.ts_step_lse, self.rows, self.heads, writable=False)

    def start(self, i: int) -> int:
        """Tokens that sequence i had: the position of its first new token."""
        if not 0 <= i < self._count:
            raise IndexError(f"sequence {i}; the step has {self._count}")
        return lib.ts_step_start(self._open(), i)

    @property
    def slots(self) -> list[int]:
        """Slots of all new tokens, in order."""
        out = (c_uint64 * self.tokens)()
        lib.ts_step_slots(self._open(), out)
        return list(out)

    def run(self, layer: int, *, stream: Any = None, scale: float = 0.0, soft_cap: float = 0.0,
            window: int = 0, alibi: bool = False, sinks: bool = False, lse: bool = False,
            scales: bool = False, rope_theta: float = 0.0, rope_dims: int = 0, rope_interleaved: bool = False) -> None:
        """Writes k and v into the step's slots of this layer and attends: a token sees its sequence's
        tokens up to and including itself.

        Without a stream, out is ready when this returns (and what a GPU is to read must have been
        written by then). With one, a torch.cuda.Stream or a CUstream's integer, the order is kept on
        the GPU and nothing waits.

        What becomes of a score, in this order: it is scaled (0: as the step says), becomes
        soft_cap * tanh(score / soft_cap) (0: no), gets the head's slope in `self.alibi` times the
        distance to the key (a negative number) with alibi=True, and is hidden if the key is further
        than `window` tokens away, the token itself included (0: all are seen). sinks=True: the
        logits in `self.sinks` join the softmax. lse=True: `self.lse` gets the log-sum-exps.
        scales=True, of an fp8 pool: `self.scales` has this layer's; else all are 1.

        rope_theta: q, and k before it is written, are turned by their tokens' positions (rotary
        embedding; 0: not): the first rope_dims dimensions of each head (0: all), in pairs of
        dimensions i and i + rope_dims / 2, or of neighbours with rope_interleaved=True."""
        handle = getattr(stream, "cuda_stream", stream)
        options = CRunOptions(scale, soft_cap, alibi, window, sinks, lse, scales, rope_theta,
                              rope_dims, rope_interleaved, stream is not None, handle)
        self.pool._check(lib.ts_step_run_with(self._open(), layer, byref(options)))

    def commit(self, accepted: Iterable[int] | None = None) -> None:
        """Makes the first accepted[i] new tokens part of sequence i (None: all) and drops the rest.
        Waits for runs that are under way."""
        numbers = None
        if accepted is not None:
            numbers, n = _array(c_uint32, accepted)
            if n != self._count:
                raise ValueError(f"{n} accepted counts for a step of {self._count} sequences")
        self.pool._check(lib.ts_step_commit(self._open(), numbers))
        self._end()

    def abort(self) -> None:
        """Drops the step: every sequence is as it was."""
        handle = self._open()
        self._end()
        self.pool._check(lib.ts_step_abort(handle))

    def _end(self) -> None:
        self._handle = None
        self.pool._steps.remove(self)

    def _drop(self, _pool: c_void_p) -> None:
        handle = self._handle
        self._end()
        if handle is not None:
            lib.ts_step_abort(handle)

    def __enter__(self) -> "Step":
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is None:
            return
        try:
            self.abort()
        except DisconnectedError:
            pass  # the step went with the session


class Frame:
    """Where steps lie, one after the other: Pool.frame().

    A CUDA graph of one step's run(..., stream=...) runs the same layers of whichever step is open when
    it is replayed, and changes nothing while none is. Wait for a replay before the step ends."""

    def __init__(self, pool: Pool, handle: c_void_p, rows: int, heads: int | None,
                 io_dtype: str) -> None:
        self.pool, self.rows, self.heads, self.io_dtype = pool, rows, heads, io_dtype
        self._handle: c_void_p | None = handle
        pool._frames.append(self)

    def step(self, seqs: Sequence[Seq]) -> Step:
        """Begins a step that adds the frame's new_tokens to each sequence. q, k, v and out lie where
        those of the steps before it lay, and have a full step's rows, of which the first
        `step.tokens` count. Raises BusyError while another one is open, NoSpaceError."""
        self.pool._open()
        if self._handle is None:
            raise DisconnectedError("the frame was closed", 11, "TS_ECONN")
        ids, n = _array(c_uint64, seqs)
        handle = c_void_p()
        self.pool._check(lib.ts_frame_begin(self._handle, ids, n, byref(handle)))
        return Step(self.pool, handle, n, self.heads, self.io_dtype, True, self.rows)

    def close(self) -> None:
        """Gives its memory back. Its step must have ended. Safe to call twice."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self.pool._frames.remove(self)
            lib.ts_frame_free(handle)

    def __enter__(self) -> "Frame":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
