"""Connections, pools, sequences and steps."""

from __future__ import annotations

import itertools
import threading
from ctypes import (POINTER, byref, c_int, c_uint32, c_uint64, c_void_p, cast,
                    create_string_buffer)
from os import PathLike
from typing import Any, Callable, Iterable, Sequence

from . import arguments as check
from ._lib import (CErrorInfo, CFrameOptions, CKeepOptions, CKept, CKv, CPoolInfo, CPoolRoom,
                   CSeqOptions, Options, lib)
from .errors import BY_STATUS, DisconnectedError, Error
from .opened import Memory, Opened
from .records import Geometry, Kept, PoolInfo, Room, Seq
from .step import Frame, Step, step_options
from .view import DTYPES, View

_WRITABLE = 1
_KEPT_PAGE = 256  # kept sequences that one call lists

def seq_options(namespace: bytes | None) -> CSeqOptions:
    space = b"" if namespace is None else check.namespace(namespace)
    return CSeqOptions(space if space else None, len(space))


def _prompts(prompts: Sequence[Iterable[int]]) -> tuple[Any, Any, int]:
    """C arrays of the prompts' ids, one after another, and of each one's count."""
    packed = [check.token_ids("tokens", prompt) for prompt in prompts]
    if len(packed) == 1:
        return packed[0][0], (c_uint32 * 1)(packed[0][1]), 1
    ids = (c_uint32 * max(sum(n for _, n in packed), 1))()
    at = 0
    for values, n in packed:
        ids[at:at + n] = values[:n]
        at += n
    return ids, (c_uint32 * max(len(packed), 1))(*(n for _, n in packed)), len(packed)


_TRANSPORTS = ("auto", "ring", "messages")
_EXECUTIONS = ("daemon", "local", "auto")
_SPIN_NONE = check.U32
_THREADS_MAX = 4096

# A signal that comes just before a wait begins isn't seen by the wait: it is looked for so often.
_LOOK_S = 0.2


class Client:
    """A session with the daemon. Used by one thread at a time; connect after fork(), not before.

    Leaving its `with` block ends the session: its sequences, except kept ones, are freed.
    """

    def __init__(self, url: str | PathLike[str] | None = None, *, program: str | None = None,
                 timeout: float = 30.0, retries: int = 0, wait: float = 0.0,
                 exchange_bytes: int = 0, transport: str = "auto", spin_us: int | None = None,
                 execution: str = "daemon", threads: int = 0, reconnect: bool = True) -> None:
        """url: "ipc:///path" or "/path", or a Path; None: TINYSERVE_URL, or the user's daemon,
        or the system's.
        timeout: seconds for one call; wait: seconds to wait for a daemon to appear.
        exchange_bytes: of shared memory for q, k, v and out to start with.
        transport: how steps reach the daemon, "ring", "messages", or "auto": rings if it can.
        spin_us: microseconds that a call through a ring polls before it sleeps (None: 50).
        execution: who attends, "daemon", "local" (this process; pools opened writable, on a GPU
        with exchange() or register() in its memory), or "auto": where it can be, the first step
        goes both ways, and the quicker is taken from then on. The results are the same. threads: of
        local execution on the host (0: one for each processor).
        reconnect: where the daemon is restarted with what it had, calls go on with the next one,
        within their time; else they raise DisconnectedError.

        Raises DisconnectedError where there is no daemon."""
        spin = 0 if spin_us is None else \
            check.integer("spin_us", spin_us, 0, _SPIN_NONE - 1) or _SPIN_NONE
        options = Options(
            url=check.path("url", url) if url is not None else None,
            program=check.text("program", program) if program else None,
            timeout_ms=check.milliseconds("timeout", timeout, may_be_0=False),
            retries=check.integer("retries", retries),
            wait_ms=check.milliseconds("wait", wait, may_be_0=True),
            exchange_bytes=check.integer("exchange_bytes", exchange_bytes, 0, check.U64),
            transport=check.choice("transport", transport, _TRANSPORTS),
            spin_us=spin,
            exec=check.choice("execution", execution, _EXECUTIONS),
            threads=check.integer("threads", threads, 0, _THREADS_MAX),
            reconnect=0 if reconnect else 1)
        self._handle = c_void_p()
        self._pools = []
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
            raised = error(lib.ts_error(self._handle).decode(errors="replace"), status, name)
            info = CErrorInfo()
            if lib.ts_error_read(self._handle, byref(info)) == 0:
                raised.needed, raised.free, raised.limit = info.needed, info.free, info.limit
                raised.cached, raised.pinned, raised.others = info.cached, info.pinned, info.others
            raise raised

    def _open(self) -> c_void_p:
        if self._handle is None:
            raise DisconnectedError("the client was closed", 11, "TS_ECONN")
        return self._handle

    def _interruptible(self, wait_ms: int, call: Callable[[], int],
                       undo: Callable[[], Any]) -> int:
        """The status of a call that may wait. Ctrl-C ends its wait; what it has made is undone, by
        a thread that goes on with that if Ctrl-C is pressed again."""
        if wait_ms == 0 or threading.current_thread() is not threading.main_thread():
            return call()
        handle, status = self._open(), [-1]
        ended, undone = threading.Event(), threading.Event()

        def run() -> None:
            status[0] = call()
            ended.set()

        def end() -> None:
            for turn in itertools.count():
                if ended.wait(0.1) or (turn > 10 and caller.ident is None):  # it never began
                    break
                lib.ts_wait_end(handle)  # its request may not have been sent yet
            if status[0] == 0:
                undo()
            undone.set()

        caller = threading.Thread(target=run, daemon=True)
        try:
            caller.start()
            while not ended.wait(_LOOK_S):  # a signal's handler runs here, and not in a call into C
                pass
        except BaseException:
            undoing = threading.Thread(target=end, name="tinyserve-undo", daemon=True)
            try:
                undoing.start()
            except KeyboardInterrupt:  # pressed again already
                if undoing.ident is None:
                    undoing.start()
                raise
            while not undone.wait(_LOOK_S):  # a join that is interrupted takes it for ended
                pass
            raise
        return status[0]

    def _exchange_of(self, ptr: int) -> Memory:
        """The exchange's memory, with a step's buffer at ptr. While the last one is held, no other
        memory has its addresses."""
        if self._exchange is None or self._exchange[0] != ptr:
            self._exchange = ptr, Memory(lib.ts_exchange_hold, self._open())
        return self._exchange[1]

    @property
    def session(self) -> int:
        """This session's id, as `tsctl sessions` shows it in hexadecimal."""
        return int(lib.ts_session_id(self._open()))

    @property
    def transport(self) -> str:
        """What the last step went by: "ring" or "messages"."""
        return _TRANSPORTS[lib.ts_client_transport(self._open())]

    @property
    def execution(self) -> str:
        """Who attended in the last step: "daemon", "local", or "auto": both, to compare them."""
        return _EXECUTIONS[lib.ts_client_exec(self._open())]

    @property
    def restarts(self) -> int:
        """How often the session has gone on with another daemon."""
        return int(lib.ts_client_restarts(self._open()))

    @property
    def daemon_version(self) -> str:
        return str(lib.ts_daemon_version(self._open()).decode())

    def pool(self, name: str, *, writable: bool = False) -> "Pool":
        """Opens a pool. writable: map slabs writable, where the configuration allows it.

        Raises NotFoundError, DeniedError."""
        return Pool(self, name, writable)

    def pools(self) -> list[PoolInfo]:
        """The daemon's pools, open or not."""
        room, count = 16, c_uint32()
        while True:
            out = (CPoolInfo * room)()
            self._check(lib.ts_pool_list(self._open(), out, room, byref(count)))
            if count.value <= room:
                return [PoolInfo(p.name.decode(), p.device.decode(), Geometry.of(p.geometry),
                                 p.blocks) for p in out[:count.value]]
            room = count.value

    def create_pool(self, text: str) -> None:
        """Makes a pool, for operators, as the daemon's --pool does: "NAME:key=value,key=value". A
        restart that loses nothing keeps it. Raises DeniedError, ExistsError, InvalidError."""
        self._check(lib.ts_pool_create(self._open(), check.text("text", text)))

    def exchange(self, pool: "Pool", nbytes: int) -> None:
        """Puts the exchange into memory of the pool's GPU. No step may be open."""
        check.integer("nbytes", nbytes, 0, check.U64)
        self._check(lib.ts_exchange_device(pool._open(), nbytes))
        self._registered = self._exchange = None
        self.exchange_device = pool.cuda_device

    def register(self, pool: "Pool", tensor: Any) -> None:
        """Makes a CUDA tensor's memory the exchange, in place. It must be contiguous and was made
        on the pool's GPU by cudaMalloc, as PyTorch's allocator does unless expandable segments are
        on; it is kept alive. The daemon can then read and write all of it. No step may be open."""
        interface = tensor.__cuda_array_interface__
        if interface.get("strides") is not None:
            raise ValueError("the tensor isn't contiguous")
        nbytes = int(tensor.nbytes) // 4096 * 4096
        self._check(lib.ts_exchange_register(pool._open(), interface["data"][0], nbytes))
        self._registered, self._exchange = tensor, None
        self.exchange_device = pool.cuda_device

    _handle: c_void_p | None = None
    _pools: list["Pool"]
    _exchange: tuple[int, Memory] | None = None  #: a buffer in it, and what holds it
    _registered: Any = None
    exchange_device: int | None = None  #: the CUDA device of the exchange; None: host memory

    def close(self) -> None:
        """Ends the session. Safe to call twice."""
        handle, self._handle = self._handle, None
        self._exchange = None
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
        self.close()

    def __repr__(self) -> str:
        if self._handle is None:
            return "<tinyserve.Client, closed>"
        return f"<tinyserve.Client of session {self.session:x}>"


def connect(url: str | PathLike[str] | None = None, *, program: str | None = None,
            timeout: float = 30.0, retries: int = 0, wait: float = 0.0, exchange_bytes: int = 0,
            transport: str = "auto", spin_us: int | None = None, execution: str = "daemon",
            threads: int = 0, reconnect: bool = True) -> Client:
    """Connects to the daemon: Client, which says what the arguments mean."""
    return Client(url, program=program, timeout=timeout, retries=retries, wait=wait,
                  exchange_bytes=exchange_bytes, transport=transport, spin_us=spin_us,
                  execution=execution, threads=threads, reconnect=reconnect)


class Pool:
    """A paged KV cache on one device, shared with other processes."""

    def __init__(self, client: Client, name: str, writable: bool = False) -> None:
        handle = c_void_p()
        client._check(lib.ts_pool_open(client._open(), check.text("pool name", name),
                                       _WRITABLE if writable else 0, byref(handle)))
        self.client, self.name, self.writable = client, name, writable
        self._opened = Opened(handle, f"pool '{name}' was closed")
        self._steps: set[Opened] = set()
        self._frames: list[Frame] = []
        self._slabs: Memory | None = None
        self.geometry = Geometry.of(lib.ts_pool_geometry(handle).contents)
        self.blocks: int = lib.ts_pool_blocks(handle)  #: that the pool has
        self.sequence_max: int = lib.ts_pool_sequence_max(handle)  #: tokens a sequence may have
        self.device: str = lib.ts_pool_device(handle).decode()  #: "host", "cuda:0" (the daemon's)
        self.memory: str = lib.ts_pool_memory(handle).decode()  #: "host", "cuda-vmm", "cuda-ipc"
        client._pools.append(self)

    def _open(self) -> c_void_p:
        self.client._open()
        return self._opened.get()

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

    def create(self, count: int = 1, namespace: bytes | None = None) -> list[Seq]:
        """Makes empty sequences. The namespace names what their K and V depend on beside their
        tokens: the model, its adapter (at most 64 bytes; None: the pool's `model`). Raises
        QuotaError."""
        out = (c_uint64 * check.integer("count", count, 1, check.BATCH_MAX))()
        options = seq_options(namespace)
        self._check(lib.ts_seq_create_with(self._open(), count, byref(options), out))
        return list(out)

    def match(self, tokens: Iterable[int], namespace: bytes | None = None,
              wait: float = 0.0) -> tuple[Seq, int]:
        """Makes a sequence that shares the longest beginning of the prompt that the pool holds, and
        tells how many tokens that is: at most all but the last. Nothing is copied. What is in the
        pool was committed by a step with tokens= in the same namespace by sessions of this user.

        wait: seconds to wait while another session of this user computes what is missing, or has
        matched it with a wait and is going to. So of many workers with one prompt that all match
        with a wait, one computes it, and the others get it from the pool."""
        return self.match_many([tokens], namespace, wait)[0]

    def match_many(self, prompts: Sequence[Iterable[int]], namespace: bytes | None = None,
                   wait: float = 0.0, twins: list[int] | None = None) -> list[tuple[Seq, int]]:
        """match() of many prompts, in one call. twins: with a wait, is filled with the number of
        the earlier prompt in this call that lacks the same and so should be computed first, or the
        prompt's own."""
        ids, counts, n = _prompts(prompts)
        out, matched = (c_uint64 * max(n, 1))(), (c_uint32 * max(n, 1))()
        options = seq_options(namespace)
        options.wait_ms = check.milliseconds("wait", wait, may_be_0=True)
        found = (c_uint32 * max(n, 1))()
        if twins is not None:
            options.twins = found
        self._check(self.client._interruptible(
            options.wait_ms,
            lambda: int(lib.ts_seq_match(self._open(), ids, counts, n, byref(options), out,
                                         matched)),
            lambda: lib.ts_seq_free(self._open(), out, n)))
        if twins is not None:
            twins[:] = found[:n] if options.wait_ms > 0 else range(n)
        return list(zip(out, matched))[:n]

    def matching(self, prompts: Sequence[Iterable[int]],
                 namespace: bytes | None = None) -> list[int]:
        """How many tokens match() would find of each prompt; makes no sequences."""
        ids, counts, n = _prompts(prompts)
        matched = (c_uint32 * max(n, 1))()
        options = seq_options(namespace)
        self._check(lib.ts_seq_match(self._open(), ids, counts, n, byref(options), None, matched))
        return list(matched)[:n]

    def fork(self, parent: Seq, count: int = 1, *, length: int | None = None) -> list[Seq]:
        """Makes sequences that share all of the parent's blocks, or its first `length` tokens'.
        Nothing is copied until one of them writes into a shared tail."""
        out = (c_uint64 * check.integer("count", count, 1, check.BATCH_MAX))()
        check.integer("parent", parent, 0, check.U64)
        if length is None:
            self._check(lib.ts_seq_fork(self._open(), parent, count, out))
        else:
            self._check(lib.ts_seq_fork_at(self._open(), parent, check.integer("length", length),
                                           count, out))
        return list(out)

    def truncate(self, seqs: Iterable[Seq], lengths: Iterable[int]) -> None:
        """Cuts each sequence down to so many tokens; all or none."""
        ids, numbers, n = check.pair("lengths", seqs, lengths)
        self._check(lib.ts_seq_truncate(self._open(), ids, numbers, n))

    def shorten(self, seqs: Iterable[Seq], counts: Iterable[int]) -> None:
        """Drops so many of each sequence's last tokens; all or none."""
        ids, numbers, n = check.pair("counts", seqs, counts)
        self._check(lib.ts_seq_shorten(self._open(), ids, numbers, n))

    def select(self, seqs: Iterable[Seq], picks: Iterable[int]) -> list[Seq]:
        """Goes on with some of the sequences, in one call: the i-th that is returned continues
        seqs[picks[i]]. The first that does is that sequence itself, others are forks; sequences
        that none continues are freed. It takes no block, so beam search goes on in a full pool."""
        ids, n = check.integers("seqs", c_uint64, seqs)
        numbers, picked = check.integers("picks", c_uint32, picks)
        out = (c_uint64 * max(picked, 1))()
        self._check(lib.ts_seq_select(self._open(), ids, n, numbers, picked, out))
        return list(out)[:picked]

    def forget(self, seqs: Iterable[Seq]) -> None:
        """Frees the sequences, and what no other sequence uses of them isn't cached."""
        ids, n = check.integers("seqs", c_uint64, seqs)
        self._check(lib.ts_seq_forget(self._open(), ids, n))

    def free(self, seqs: Iterable[Seq]) -> None:
        """Frees the sequences; all or none. What was committed with token ids stays cached. Raises
        BusyError where one is in an open step."""
        ids, n = check.integers("seqs", c_uint64, seqs)
        self._check(lib.ts_seq_free(self._open(), ids, n))

    def keep(self, seq: Seq, name: str | None, *, ttl: float | None = None,
             replace: bool = False) -> None:
        """Keeps the sequence under a name: it outlives this session, and any session of the same
        tenant may attach to it. None forgets the name. ttl: seconds after its last use (it was
        kept, attached to, forked, or a step with it ended) at which it is freed; None: never.
        replace: a sequence that has the name loses it and is freed, in the same instant; otherwise
        ExistsError is raised."""
        options = CKeepOptions(0 if ttl is None else check.milliseconds(
            "ttl", ttl, may_be_0=False, most=check.TTL_SECONDS_MAX), replace)
        self._check(lib.ts_seq_keep_with(self._open(), check.integer("seq", seq, 0, check.U64),
                                         check.text("name", name) if name is not None else None,
                                         byref(options)))

    def attach(self, name: str) -> tuple[Seq, int]:
        """Finds a kept sequence: its id and its length. Raises NotFoundError."""
        seq, length = c_uint64(), c_uint32()
        self._check(lib.ts_seq_attach(self._open(), check.text("name", name), byref(seq),
                                      byref(length)))
        return seq.value, length.value

    def kept(self, prefix: str = "") -> list[Kept]:
        """This tenant's kept sequences whose names begin with the prefix, in the order of their
        names' UTF-8. What others keep or free meanwhile may be in the list or not."""
        begin, after = check.text("prefix", prefix), b""
        room, count = _KEPT_PAGE, c_uint32()
        page = (CKept * room)()
        found: list[Kept] = []
        while True:
            self._check(lib.ts_seq_list(self._open(), begin, after, page, room, byref(count)))
            found += [Kept(k.name.decode(), k.seq, k.length, k.blocks,
                           k.left_ms / 1000 if k.left_ms else None) for k in page[:count.value]]
            if count.value < room:
                return found
            after = page[room - 1].name

    def ticket(self, seq: Seq, ttl: float = 30.0) -> bytes:
        """Hands the sequence on: the bytes by which another session of this user, also in another
        process, makes it its own with redeem(). `seq` names nothing from now on. After ttl seconds
        (at most an hour) without a redeem() it is freed, whether this session still lives or not.
        Raises BusyError where it is in an open step, QuotaError at 1024 tickets of this user."""
        out = create_string_buffer(check.TICKET_BYTES)
        ms = check.milliseconds("ttl", ttl, may_be_0=False, most=check.TICKET_SECONDS_MAX)
        self._check(lib.ts_seq_ticket(self._open(), check.integer("seq", seq, 0, check.U64), ms,
                                      out))
        return out.raw

    def redeem(self, ticket: bytes) -> Seq:
        """Makes the ticket's sequence this session's own, once. Raises NotFoundError where the pool
        has no such ticket, it was redeemed, its time is over, or it is another user's."""
        seq, length = c_uint64(), c_uint32()
        self._check(lib.ts_seq_redeem(self._open(), check.ticket(ticket), byref(seq),
                                      byref(length)))
        return seq.value

    def lengths(self, seqs: Iterable[Seq]) -> list[int]:
        """Tokens of each sequence."""
        ids, n = check.integers("seqs", c_uint64, seqs)
        out = (c_uint32 * max(n, 1))()
        self._check(lib.ts_seq_lengths(self._open(), ids, n, out))
        return list(out)[:n]

    def append(self, seqs: Iterable[Seq], new_tokens: Iterable[int]) -> list[int]:
        """Appends tokens whose K and V this process writes itself (writable pools) and returns
        their slots, in order. They are part of the sequences at once. Raises NoSpaceError."""
        ids, numbers, n = check.pair("new_tokens", seqs, new_tokens)
        total = min(sum(numbers[:n]), self.blocks * self.geometry.block_tokens)  # more are refused
        slots = (c_uint64 * max(total, 1))()
        self._check(lib.ts_seq_append(self._open(), ids, numbers, n, slots))
        return list(slots)

    def stats(self) -> Room:
        """What this user has of the pool."""
        room = CPoolRoom()
        self._check(lib.ts_pool_stats(self._open(), byref(room)))
        return Room(**{name: getattr(room, name) for name in Room.__annotations__})

    # ---- where tokens lie ----

    def slots(self, seq: Seq, first: int, count: int) -> list[int]:
        """Slots (block * block_tokens + offset) of tokens first .. first + count - 1."""
        check.integer("first", first)
        out = (c_uint64 * check.integer("count", count, 1, self.sequence_max))()
        self._check(lib.ts_seq_slots(self._open(), check.integer("seq", seq, 0, check.U64), first,
                                     count, out))
        return list(out)

    def kv(self, slot: int, layer: int) -> tuple[View, View]:
        """One token's K and V at one layer: two views [kv_heads, head_dim] of the pool's memory,
        read-only unless the pool was opened writable. The slot must come from this session's last
        answer about its sequence."""
        g, at = self.geometry, CKv()
        self._check(lib.ts_slot_kv(self._open(), check.integer("slot", slot, 0, check.U64),
                                   check.integer("layer", layer), byref(at)))
        return self._views((at.k, at.v), (g.kv_heads, g.head_dim),
                           (at.head_stride, g.element_bytes))

    def layer(self, layer: int, slots: Iterable[int]) -> tuple[View, View]:
        """K and V of one layer of the whole pool: two views [blocks, block_tokens, kv_heads,
        head_dim] (strided; both layouts look the same), for kernels that take a block table. Only
        the slabs of the given slots, and what was mapped before, may be written; in host memory the
        rest reads as zeros."""
        g, base = self.geometry, c_void_p()
        numbers, n = check.integers("slots", c_uint64, slots)
        if not 0 <= check.integer("layer", layer, -check.U32) < g.layers:
            raise IndexError(f"layer {layer}; the pool has {g.layers}")
        self._check(lib.ts_pool_map(self._open(), numbers, n, byref(base)))
        if base.value is None:
            raise ValueError("no slab of the pool is mapped yet, and slots names none")
        size, row = g.element_bytes, g.head_dim * g.element_bytes
        token = row * g.kv_heads if g.layout == "nhd" else row
        head = row if g.layout == "nhd" else row * g.block_tokens
        shape = (self.blocks, g.block_tokens, g.kv_heads, g.head_dim)
        k = base.value + layer * 2 * g.plane_bytes
        return self._views((k, k + g.plane_bytes), shape, (g.block_bytes, token, head, size))

    def _views(self, at: tuple[int, int], shape: tuple[int, ...],
               strides: tuple[int, ...]) -> tuple[View, View]:
        if self._slabs is None:
            self._slabs = Memory(lib.ts_pool_hold, self._open())
        device, dtype = self.cuda_device, self.geometry.dtype
        k, v = (View(ptr, shape, dtype, device, self._opened, self._slabs, strides, self.writable)
                for ptr in at)
        return k, v

    # ---- steps ----

    def step(self, seqs: Sequence[Seq], new_tokens: Sequence[int], *, heads: int | None = None,
             io_dtype: str = "fp32", scale: float = 0.0, run: bool = True,
             kernel: str | None = None, tokens: Iterable[int] | None = None,
             wait: float = 0.0, priority: int = 0) -> "Step":
        """Begins a step that adds new_tokens[i] tokens to sequence i: all of them get their slots,
        or NoSpaceError is raised and nothing was taken. A sequence may get 0, as long as another
        gets some: it takes no block, and nothing is attended for it.

        heads: query heads, a multiple of kv_heads (None: kv_heads); io_dtype: of q, k, v and out,
        "fp32" or the pool's (beside an fp8 pool "fp16" or "bf16"); scale: of q·k (0:
        1/sqrt(head_dim)); run False: no layer will be run, and this process writes K and V
        (writable pools); kernel: of a GPU pool, "v1" and so on (None: the pool's); tokens: the ids
        of all new tokens, in order, -1 where one isn't known: what is committed with them can be
        found by match(); wait: seconds to wait for room, in the order of those who wait; priority:
        what is cached of it is evicted before the user's other content (-1), or after it (1)."""
        ids, numbers, n = check.pair("new_tokens", seqs, new_tokens)
        options = step_options(heads, io_dtype, scale, run, kernel)
        if tokens is not None:
            given, _ = check.token_ids("tokens", tokens, sum(numbers[:n]))
            options.tokens = cast(given, POINTER(c_uint32))
        options.wait_ms = check.milliseconds("wait", wait, may_be_0=True)
        options.priority = check.integer("priority", priority, -1, 1)
        handle = c_void_p()
        self._check(self.client._interruptible(
            options.wait_ms,
            lambda: int(lib.ts_step_begin(self._open(), ids, numbers, n, byref(options),
                                          byref(handle))),
            lambda: lib.ts_step_abort(handle)))
        return Step(self, handle, n, heads, io_dtype, run)

    def frame(self, seqs: int, *, new_tokens: int = 1, tokens: int = 0, heads: int | None = None,
              io_dtype: str = "fp32", scale: float = 0.0, kernel: str | None = None) -> "Frame":
        """Where steps lie, one after the other, so that a CUDA graph of one step's runs serves the
        later ones too: steps of up to `seqs` sequences with `new_tokens` new tokens each, and up to
        `tokens` in all, new ones included (0: as many as the pool has slots). Its steps are
        executed in this process, whatever the session's execution. The rest: as step()."""
        options = CFrameOptions(check.integer("seqs", seqs),
                                check.integer("new_tokens", new_tokens),
                                check.integer("tokens", tokens, 0, check.U64),
                                step_options(heads, io_dtype, scale, True, kernel))
        handle = c_void_p()
        self._check(lib.ts_frame_new(self._open(), byref(options), byref(handle)))
        return Frame(self, handle, seqs * (new_tokens or 1), new_tokens or 1, heads, io_dtype)

    def _close(self) -> None:
        handle = self._opened.take()
        if handle is None:
            return
        for step in list(self._steps):
            self._abort(step)
        for frame in list(self._frames):
            frame.close()
        lib.ts_pool_close(handle)
        self.client._pools.remove(self)

    def _end(self, step: Opened) -> c_void_p | None:
        self._steps.discard(step)
        return step.take()

    def _abort(self, step: Opened) -> None:
        handle = self._end(step)
        if handle is not None:
            lib.ts_step_abort(handle)

    def close(self) -> None:
        """Unmaps the pool and drops its open steps; sequences stay. Safe to call twice."""
        self._close()

    def __repr__(self) -> str:
        closed = "" if self._opened.handle is not None else ", closed"
        return (f"<tinyserve.Pool {self.name!r} of {self.blocks} blocks of {self.geometry.dtype} "
                f"on {self.device}{closed}>")

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
