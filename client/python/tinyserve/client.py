"""Connections: a session with the daemon, its pools and its exchange."""

from __future__ import annotations

import itertools
import threading
from ctypes import byref, c_uint32, c_void_p, sizeof
from os import PathLike
from typing import Any, Callable, TypeVar

from . import arguments as check
from ._lib import CErrorInfo, CPoolInfo, Options, lib
from .errors import BY_STATUS, DisconnectedError, Error
from .opened import Memory, OfOneProcess, Opened
from .pool import Pool
from .records import Geometry, PoolInfo
from .view import forget_untaken

_TRANSPORTS = ("auto", "ring", "messages")
_EXECUTIONS = ("daemon", "local", "auto")
_SPIN_NONE = check.U32
_THREADS_MAX = 4096

# A signal that comes just before a wait begins isn't seen by the wait, so waits are this short.
_LOOK_S = 0.2

_T = TypeVar("_T")


class Client(OfOneProcess):
    """A session with the daemon. Used by one thread at a time; connect after fork(), not before.

    Leaving its `with` block ends the session: its sequences, except kept ones and those
    on tickets, are freed.
    """

    _instead = "connect() in the other process, or once more in this one"

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
        self._pools = []
        handle = c_void_p()
        self._opened = Opened(handle, "the client was closed")
        status = lib.ts_connect(byref(options), byref(handle))
        if status != 0:
            try:
                self._check(status)
            finally:
                self.close()

    def _check(self, status: int) -> None:
        """Raises the error of the last call. The caller has been inside since then."""
        if status != 0:
            handle = self._opened.handle
            error = BY_STATUS.get(status, Error)
            name = lib.ts_status_name(status).decode()
            raised = error(lib.ts_error(handle).decode(errors="replace"), status, name)
            info = CErrorInfo()
            if handle and lib.ts_error_read(handle, byref(info)) == 0:
                raised.needed, raised.free, raised.limit = info.needed, info.free, info.limit
                raised.cached, raised.pinned, raised.others = info.cached, info.pinned, info.others
            raise raised

    def _open(self) -> c_void_p:
        return self._opened.get()

    def _call(self, function: Callable[..., int], *arguments: Any) -> None:
        """Calls a function of the client's, and raises its error."""
        with self._opened as handle:
            self._check(function(handle, *arguments))

    def _waiting(self, wait_ms: int, call: Callable[[], _T], undo: Callable[[_T], Any]) -> _T:
        """The result of a call that may wait. Ctrl-C ends its wait; what it has made is undone, by
        a thread that goes on with that if Ctrl-C is pressed again."""
        if wait_ms == 0 or threading.current_thread() is not threading.main_thread():
            with self._opened:
                return call()
        made: list[_T] = []
        failed: list[BaseException] = []
        ended, undone = threading.Event(), threading.Event()

        def run() -> None:
            try:
                with self._opened:
                    made.append(call())
            except BaseException as error:
                failed.append(error)
            finally:
                ended.set()

        def end() -> None:
            try:
                for turn in itertools.count():
                    if ended.wait(0.1) or (turn > 10 and caller.ident is None):  # it never began
                        break
                    self._end_wait()  # its request may not have been sent yet
                for result in made:
                    undo(result)
            finally:
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
        if not failed:
            return made[0]
        try:
            raise failed.pop()
        finally:
            del caller, run, end  # which the error's frames refer to

    def _end_wait(self) -> None:
        with self._opened.calls.ending:
            handle = self._opened.handle
            if handle is not None:
                lib.ts_wait_end(handle)

    def _exchange_of(self, ptr: int) -> Memory:
        """The exchange's memory, with a step's buffer at ptr. While the last one is held, no other
        memory has its addresses. The caller is `looking`, and the step can't end meanwhile."""
        if self._exchange is None or self._exchange[0] != ptr:
            self._exchange = ptr, Memory(self._opened.look(lib.ts_exchange_hold))
        return self._exchange[1]

    @property
    def session(self) -> int:
        """This session's id, as `tsctl sessions` shows it in hexadecimal."""
        return int(self._opened.look(lib.ts_session_id))

    @property
    def transport(self) -> str:
        """How the last step was begun: by "ring" or by "messages", also before the first."""
        return _TRANSPORTS[self._opened.look(lib.ts_client_transport)]

    @property
    def execution(self) -> str:
        """Who attended in the last step: "daemon", "local", or "auto": both, to compare them."""
        return _EXECUTIONS[self._opened.look(lib.ts_client_exec)]

    @property
    def restarts(self) -> int:
        """How often the session has gone on with another daemon."""
        return int(self._opened.look(lib.ts_client_restarts))

    @property
    def daemon_version(self) -> str:
        """The version of the daemon that has the session now, as "0.1.0"."""
        return str(self._opened.look(lib.ts_daemon_version).decode())

    def pool(self, name: str, *, writable: bool = False) -> "Pool":
        """Opens a pool. writable: map slabs writable, where the configuration allows it.

        Raises NotFoundError, DeniedError."""
        return Pool(self, name, writable)

    def pools(self) -> list[PoolInfo]:
        """The daemon's pools, open or not."""
        room, count = 16, c_uint32()
        while True:
            out = (CPoolInfo * room)()
            self._call(lib.ts_pool_list, out, sizeof(CPoolInfo), room, byref(count))
            if count.value <= room:
                return [PoolInfo(p.name.decode(), p.device.decode(), Geometry.of(p.geometry),
                                 p.blocks) for p in out[:count.value]]
            room = count.value

    def create_pool(self, text: str) -> None:
        """Makes a pool, for operators, as the daemon's --pool does: "NAME:key=value,key=value". A
        restart that loses nothing keeps it. Raises DeniedError, ExistsError, InvalidError."""
        self._call(lib.ts_pool_create, check.text("text", text))

    def exchange(self, pool: "Pool", nbytes: int) -> None:
        """Puts the exchange into memory of the pool's GPU. No step may be open."""
        check.integer("nbytes", nbytes, 0, check.U64)
        with self._opened:
            pool._call(lib.ts_exchange_device, nbytes)
            self._registered = self._exchange = None
            self.exchange_device = pool.cuda_device

    def register(self, pool: "Pool", tensor: Any) -> None:
        """Makes a CUDA tensor's memory the exchange, in place. It must be contiguous and was made
        on the pool's GPU by cudaMalloc, as PyTorch's allocator does unless expandable segments are
        on; it is kept alive. The daemon can then read and write all of it. No step may be open."""
        interface = getattr(tensor, "__cuda_array_interface__", None)
        if interface is None:
            raise TypeError(f"register() of a {type(tensor).__name__}, which isn't in a GPU's "
                            f"memory: a CUDA tensor on the GPU of pool {pool.name!r} "
                            f"({pool.device}) is needed")
        if interface.get("strides") is not None:
            raise ValueError("the tensor isn't contiguous")
        nbytes = int(tensor.nbytes) // 4096 * 4096
        with self._opened:
            pool._call(lib.ts_exchange_register, interface["data"][0], nbytes)
            self._registered, self._exchange = tensor, None
            self.exchange_device = pool.cuda_device

    _opened: Opened
    _pools: list["Pool"]
    _exchange: tuple[int, Memory] | None = None  #: a buffer in it, and what holds it
    _registered: Any = None
    exchange_device: int | None = None  #: the CUDA device of the exchange; None: host memory

    def close(self) -> None:
        """Ends the session, and first the pools, steps and frames that are open. Safe to call
        twice. Waits until the call that another thread may be in has returned; its next one raises
        DisconnectedError."""
        self._opened.end(self._disconnect)

    def _disconnect(self) -> None:
        for pool in list(self._pools):
            pool.close()
        self._exchange = None
        forget_untaken()
        with self._opened.calls.ending:
            handle = self._opened.take()
            if handle is not None:
                lib.ts_disconnect(handle)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_opened"):  # else its arguments were refused
            self.close()

    def __repr__(self) -> str:
        try:
            return f"<tinyserve.Client of session {self.session:x}>"
        except DisconnectedError:
            return "<tinyserve.Client, closed>"


def connect(url: str | PathLike[str] | None = None, *, program: str | None = None,
            timeout: float = 30.0, retries: int = 0, wait: float = 0.0, exchange_bytes: int = 0,
            transport: str = "auto", spin_us: int | None = None, execution: str = "daemon",
            threads: int = 0, reconnect: bool = True) -> Client:
    """Connects to the daemon: Client, which says what the arguments mean."""
    return Client(url, program=program, timeout=timeout, retries=retries, wait=wait,
                  exchange_bytes=exchange_bytes, transport=transport, spin_us=spin_us,
                  execution=execution, threads=threads, reconnect=reconnect)
