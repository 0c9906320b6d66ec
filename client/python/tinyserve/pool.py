"""Pools: their sequences, where tokens lie, and steps."""

from __future__ import annotations

from ctypes import byref, c_int, c_uint32, c_uint64, c_void_p, create_string_buffer, sizeof
from typing import TYPE_CHECKING, Any, Callable, Iterable, Sequence

from . import arguments as check
from ._lib import CFrameOptions, CKeepOptions, CKept, CKv, CPoolRoom, CSeqOptions, lib
from .opened import Memory, OfOneProcess, Opened
from .records import Geometry, Kept, Room, Seq
from .step import Frame, Step, add_options, step_options
from .view import View

if TYPE_CHECKING:
    from .client import Client

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


class Pool(OfOneProcess):
    """A paged KV cache on one device, shared with other processes."""

    _instead = "open it from the other process's client, by its name"

    def __init__(self, client: Client, name: str, writable: bool = False) -> None:
        handle, encoded = c_void_p(), check.text("pool name", name)
        self.client, self.name, self.writable = client, name, writable
        self._steps: set[Opened] = set()
        self._frames: list[Frame] = []
        self._slabs: Memory | None = None
        with client._opened:
            client._call(lib.ts_pool_open, encoded, _WRITABLE if writable else 0, byref(handle))
            self._opened = Opened(handle, f"pool '{name}' was closed", client._opened)
            client._pools.append(self)
            self._describe(handle)

    def _describe(self, handle: c_void_p) -> None:
        self.geometry = Geometry.of(lib.ts_pool_geometry(handle, 0).contents)
        self.blocks: int = lib.ts_pool_blocks(handle)  #: that the pool has
        self.sequence_max: int = lib.ts_pool_sequence_max(handle)  #: tokens a sequence may have
        self.device: str = lib.ts_pool_device(handle).decode()  #: "host", "cuda:0" (the daemon's)
        self.memory: str = lib.ts_pool_memory(handle).decode()  #: "host", "cuda-vmm", "cuda-ipc"

    def _open(self) -> c_void_p:
        return self._opened.get()

    def _call(self, function: Callable[..., int], *arguments: Any) -> None:
        """Calls a function of the pool's, and raises its error."""
        with self._opened as handle:
            self.client._check(function(handle, *arguments))

    @property
    def cuda_device(self) -> int | None:
        """The pool's GPU as this process counts them; None: host memory."""
        if self.memory == "host":
            return None
        ordinal = c_int()
        self._call(lib.ts_pool_cuda_device, byref(ordinal))
        return ordinal.value

    # ---- sequences ----

    def create(self, count: int = 1, namespace: bytes | None = None) -> list[Seq]:
        """Makes empty sequences. The namespace names what their K and V depend on beside their
        tokens: the model, its adapter (at most 64 bytes; None: the pool's `model`). Raises
        QuotaError."""
        out = (c_uint64 * check.integer("count", count, 1, check.BATCH_MAX))()
        options = seq_options(namespace)
        self._call(lib.ts_seq_create_with, count, byref(options), out)
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
        self.client._waiting(
            options.wait_ms,
            lambda: self._call(lib.ts_seq_match, ids, counts, n, byref(options), out, matched),
            lambda _: self._undo(lib.ts_seq_free, out, n))
        if twins is not None:
            twins[:] = found[:n] if options.wait_ms > 0 else range(n)
        return list(zip(out, matched))[:n]

    def _undo(self, function: Callable[..., int], *arguments: Any) -> None:
        with self._opened.calls.lock:
            handle = self._opened.handle
            if handle is not None:  # else what is undone went with it
                function(handle, *arguments)

    def matching(self, prompts: Sequence[Iterable[int]],
                 namespace: bytes | None = None) -> list[int]:
        """How many tokens match() would find of each prompt; makes no sequences."""
        ids, counts, n = _prompts(prompts)
        matched = (c_uint32 * max(n, 1))()
        options = seq_options(namespace)
        self._call(lib.ts_seq_match, ids, counts, n, byref(options), None, matched)
        return list(matched)[:n]

    def fork(self, parent: Seq, count: int = 1, *, length: int | None = None) -> list[Seq]:
        """Makes sequences that share all of the parent's blocks, or its first `length` tokens'.
        Nothing is copied until one of them writes into a shared tail."""
        out = (c_uint64 * check.integer("count", count, 1, check.BATCH_MAX))()
        check.integer("parent", parent, 0, check.U64)
        if length is None:
            self._call(lib.ts_seq_fork, parent, count, out)
        else:
            self._call(lib.ts_seq_fork_at, parent, check.integer("length", length), count, out)
        return list(out)

    def truncate(self, seqs: Iterable[Seq], lengths: Iterable[int]) -> None:
        """Cuts seqs[i] down to lengths[i] tokens; all or none."""
        ids, numbers, n = check.pair("lengths", seqs, lengths)
        self._call(lib.ts_seq_truncate, ids, numbers, n)

    def shorten(self, seqs: Iterable[Seq], counts: Iterable[int]) -> None:
        """Drops the last counts[i] tokens of seqs[i]; all or none."""
        ids, numbers, n = check.pair("counts", seqs, counts)
        self._call(lib.ts_seq_shorten, ids, numbers, n)

    def select(self, seqs: Iterable[Seq], picks: Iterable[int]) -> list[Seq]:
        """Goes on with some of the sequences, in one call: the i-th that is returned continues
        seqs[picks[i]]. The first that does is that sequence itself, others are forks; sequences
        that none continues are freed. It takes no block, so beam search goes on in a full pool."""
        ids, n = check.integers("seqs", c_uint64, seqs)
        numbers, picked = check.integers("picks", c_uint32, picks)
        out = (c_uint64 * max(picked, 1))()
        self._call(lib.ts_seq_select, ids, n, numbers, picked, out)
        return list(out)[:picked]

    def forget(self, seqs: Iterable[Seq]) -> None:
        """Frees the sequences, and what no other sequence uses of them isn't cached."""
        ids, n = check.integers("seqs", c_uint64, seqs)
        self._call(lib.ts_seq_forget, ids, n)

    def free(self, seqs: Iterable[Seq]) -> None:
        """Frees the sequences; all or none. What was committed with token ids stays cached. Raises
        BusyError where one is in an open step."""
        ids, n = check.integers("seqs", c_uint64, seqs)
        self._call(lib.ts_seq_free, ids, n)

    def keep(self, seq: Seq, name: str | None, *, ttl: float | None = None,
             replace: bool = False) -> None:
        """Keeps the sequence under a name: it outlives this session, and any session of the same
        tenant may attach to it. None forgets the name. ttl: seconds after its last use (it was
        kept, attached to, forked, or a step with it ended) at which it is freed; None: never.
        replace: a sequence that has the name loses it and is freed, in the same instant; otherwise
        ExistsError is raised."""
        options = CKeepOptions(0 if ttl is None else check.milliseconds(
            "ttl", ttl, may_be_0=False, most=check.TTL_SECONDS_MAX), replace)
        self._call(lib.ts_seq_keep_with, check.integer("seq", seq, 0, check.U64),
                   check.text("name", name) if name is not None else None, byref(options))

    def attach(self, name: str) -> tuple[Seq, int]:
        """Finds a kept sequence: its id and its length. Raises NotFoundError."""
        seq, length = c_uint64(), c_uint32()
        self._call(lib.ts_seq_attach, check.text("name", name), byref(seq), byref(length))
        return seq.value, length.value

    def kept(self, prefix: str = "") -> list[Kept]:
        """This tenant's kept sequences whose names begin with the prefix, in the order of their
        names' UTF-8. What others keep or free meanwhile may be in the list or not."""
        begin, after = check.text("prefix", prefix), b""
        room, count = _KEPT_PAGE, c_uint32()
        page = (CKept * room)()
        found: list[Kept] = []
        while True:
            self._call(lib.ts_seq_list, begin, after, page, sizeof(CKept), room, byref(count))
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
        self._call(lib.ts_seq_ticket, check.integer("seq", seq, 0, check.U64), ms, out)
        return out.raw

    def redeem(self, ticket: bytes) -> Seq:
        """Makes the ticket's sequence this session's own, once. Raises NotFoundError where the pool
        has no such ticket, it was redeemed, its time is over, or it is another user's."""
        seq, length = c_uint64(), c_uint32()
        self._call(lib.ts_seq_redeem, check.ticket(ticket), byref(seq), byref(length))
        return seq.value

    def lengths(self, seqs: Iterable[Seq]) -> list[int]:
        """Tokens of each sequence."""
        ids, n = check.integers("seqs", c_uint64, seqs)
        out = (c_uint32 * max(n, 1))()
        self._call(lib.ts_seq_lengths, ids, n, out)
        return list(out)[:n]

    def append(self, seqs: Iterable[Seq], new_tokens: Iterable[int]) -> list[int]:
        """Appends tokens whose K and V this process writes itself (writable pools) and returns
        their slots, in order. They are part of the sequences at once. Raises NoSpaceError."""
        ids, numbers, n = check.pair("new_tokens", seqs, new_tokens)
        total = min(sum(numbers[:n]), self.blocks * self.geometry.block_tokens)  # more are refused
        slots = (c_uint64 * max(total, 1))()
        self._call(lib.ts_seq_append, ids, numbers, n, slots)
        return list(slots)

    def stats(self) -> Room:
        """What this user has of the pool."""
        room = CPoolRoom()
        self._call(lib.ts_pool_stats, byref(room))
        return Room(**{name: getattr(room, name) for name in Room.__annotations__})

    # ---- where tokens lie ----

    def slots(self, seq: Seq, first: int, count: int) -> list[int]:
        """Slots (block * block_tokens + offset) of tokens first .. first + count - 1."""
        check.integer("first", first)
        out = (c_uint64 * check.integer("count", count, 1, self.sequence_max))()
        self._call(lib.ts_seq_slots, check.integer("seq", seq, 0, check.U64), 0, first, count, out)
        return list(out)

    def kv(self, slot: int, layer: int) -> tuple[View, View]:
        """One token's K and V at one layer: two views [kv_heads, head_dim] of the pool's memory,
        read-only unless the pool was opened writable. The slot must come from this session's last
        answer about its sequence."""
        g, at = self.geometry, CKv()
        check.integer("slot", slot, 0, check.U64)
        check.integer("layer", layer)
        with self._opened:
            self._call(lib.ts_slot_kv, slot, layer, byref(at))
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
        size, row = g.element_bytes, g.head_dim * g.element_bytes
        token = row * g.kv_heads if g.layout == "nhd" else row
        head = row if g.layout == "nhd" else row * g.block_tokens
        shape = (self.blocks, g.block_tokens, g.kv_heads, g.head_dim)
        with self._opened:
            self._call(lib.ts_pool_map, numbers, n, layer, byref(base))
            if base.value is None:
                raise ValueError("no slab of the pool is mapped yet, and slots names none")
            k = base.value + layer * 2 * g.plane_bytes
            return self._views((k, k + g.plane_bytes), shape, (g.block_bytes, token, head, size))

    def _views(self, at: tuple[int, int], shape: tuple[int, ...],
               strides: tuple[int, ...]) -> tuple[View, View]:
        if self._slabs is None:
            self._slabs = Memory(self._opened.look(lib.ts_pool_hold))
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
        options = add_options(step_options(heads, io_dtype, scale, run, kernel), sum(numbers[:n]),
                              tokens, wait, priority)

        def begin(handle: c_void_p) -> None:
            self._call(lib.ts_step_begin, ids, numbers, n, byref(options), byref(handle))

        return self.client._waiting(options.wait_ms,
                                    lambda: Step(self, begin, n, heads, io_dtype, run), Step._drop)

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
        with self._opened:
            self._call(lib.ts_frame_new, byref(options), byref(handle))
            return Frame(self, handle, seqs * (new_tokens or 1), new_tokens or 1, heads, io_dtype)

    def _abort(self, step: Opened) -> int:
        """Ends the step, unless it has ended. The caller has the lock."""
        self._steps.discard(step)
        handle = step.take()
        return int(lib.ts_step_abort(handle)) if handle is not None else 0

    def close(self) -> None:
        """Unmaps the pool and drops its open steps; sequences stay. Safe to call twice. Waits until
        the call that another thread may be in has returned; its next one raises
        DisconnectedError."""
        self._opened.end(self._close)

    def _close(self) -> None:
        for step in list(self._steps):
            self._abort(step)
        for frame in list(self._frames):
            frame.close()
        if self in self.client._pools:
            self.client._pools.remove(self)
        handle = self._opened.take()
        if handle is not None:
            lib.ts_pool_close(handle)

    def __repr__(self) -> str:
        closed = ", closed" if self._opened.closed else ""
        return (f"<tinyserve.Pool {self.name!r} of {self.blocks} blocks of {self.geometry.dtype} "
                f"on {self.device}{closed}>")

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
