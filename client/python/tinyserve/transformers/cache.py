"""The cache that a model is given: sequences of the pool, one for each row of the batch."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from ..engines.geometry import Unsupported
from ..engines.rows import Rows
from ..errors import DisconnectedError
from . import attention
from .forward import Forward
from .inputs import Inputs

if TYPE_CHECKING:
    from .attached import Attached
    from .sessions import Session

UNKNOWN = 2**32 - 1  #: a token whose id isn't known: TS_TOKEN_UNKNOWN


class _Layer:
    """What code that walks over a cache's layers may ask. K and V lie in the pool."""

    is_sliding = is_compileable = record_past = False
    is_croppable = is_initialized = supports_early_init = True

    def __init__(self, cache: "PooledCache") -> None:
        self._cache = weakref.ref(cache)  # a cache goes at once when nobody has it any more

    def get_seq_length(self) -> int:
        cache = self._cache()
        return cache.get_seq_length() if cache is not None else 0

    def get_max_length(self) -> int:
        return -1

    def __getattr__(self, name: str) -> Any:
        if name in ("keys", "values"):
            raise Unsupported(f"cache.layers[...].{name}: K and V lie in the pool, in blocks; "
                              "tinyserve.Pool.layer() has views of them")
        raise AttributeError(name)


class PooledCache(Cache):
    """Made by Attached.cache(). Used by one forward pass at a time, of any thread; the other
    caches of the thread that made it wait meanwhile.

    get_seq_length() counts columns of the batch, padding included, as other caches do. The pool has
    no padding."""

    def __init__(self, kv: "Attached", session: "Session", namespace: bytes, seqs: list[int],
                 rows: Rows, *, known: bool = True, found: int = 0) -> None:
        self.kv, self.session, self.namespace = kv, session, namespace
        self.seqs, self.rows = seqs, rows
        self.known = known  # whether ids and positions say all that K and V depend on
        self.found = found  #: tokens that the pool had when the cache was made
        self.closed = False
        super().__init__(layers=[_Layer(self) for _ in range(kv.needs.layers)])

    # ---- what Transformers asks ----

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.rows.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.rows.columns + int(query_length), 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.rows.columns

    def __len__(self) -> int:
        return self.kv.needs.layers

    @property
    def batch_size(self) -> int:
        return len(self.rows) or -1

    is_compileable = property(lambda self: False)
    is_initialized = property(lambda self: True)
    is_croppable = property(lambda self: True)
    is_sliding = property(lambda self: [False] * len(self))
    is_linear = property(lambda self: [False] * len(self))
    is_dummy = property(lambda self: [False] * len(self))

    def activate_past_recording(self) -> None:
        """Nothing is dropped before its time: there is nothing to do."""

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def has_previous_state(self, layer_idx: int | None = None,
                           state_idx: int | None = None) -> bool:
        return self.rows.columns > 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int,
               *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives back the new K and V: the attention function stores them."""
        forward = attention.current()
        if forward is None or forward.cache is not self:
            raise Unsupported("a cache of tinyserve outside the forward pass of the model that it "
                              "was made for (kv.cache() of another model, or of one that was "
                              "detached? a model that calls its layers past its base_model, as OPT "
                              "does, can't be served)")
        return key_states, value_states

    # ---- what changes the sequences ----

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last -tokens_to_remove columns of every row. Where Transformers still allows
        it (5.17), a positive number is the number of columns to keep."""
        count = -int(tokens_to_remove)
        if count < 0:
            if not self.kv.crop_to_length:
                raise ValueError(f"crop({tokens_to_remove}): give a negative number, of columns to "
                                 "remove")
            count = max(0, self.rows.columns - int(tokens_to_remove))
        if count == 0:
            return
        rows = self.rows.copy()
        lengths = rows.cut(count)
        with self._using() as pool:
            if self.seqs:
                pool.truncate(self.seqs, lengths)
        self.rows = rows

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Goes on with these rows: beams that are continued twice are forks."""
        self._pick([int(i) for i in beam_idx.tolist()])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        picks = torch.as_tensor(indices)
        if picks.dtype is torch.bool:
            picks = picks.nonzero().flatten()
        self._pick([int(i) % len(self.rows) for i in picks.tolist()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._pick([row for row in range(len(self.rows)) for _ in range(repeats)])

    def _pick(self, picks: list[int]) -> None:
        if not self.seqs or picks == list(range(len(self.seqs))):
            return
        with self._using() as pool:
            self.seqs = pool.select(self.seqs, picks)
        self.rows.pick(picks)

    def reset(self) -> None:
        """Empties it: the next forward pass begins anew, with any batch."""
        seqs, self.seqs = self.seqs, []
        self.rows, self.known = Rows(), True
        self.session.drop(seqs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PooledCache":
        """A cache that shares what there is: each goes on by itself, and nothing is copied."""
        n = len(self.seqs)
        with self._using() as pool:
            # One call: the first n that go on are the sequences themselves, the others forks.
            seqs = pool.select(self.seqs, [*range(n), *range(n)])[n:] if n else []
        copy = PooledCache(self.kv, self.session, self.namespace, seqs, self.rows.copy(),
                           known=self.known, found=self.found)
        memo[id(self)] = copy
        return copy

    def __copy__(self) -> "PooledCache":
        return self.__deepcopy__({})

    def __reduce__(self) -> Any:
        raise TypeError("a cache of tinyserve can't be pickled: its sequences belong to a session "
                        "of this process; Pool.keep() and Pool.ticket() pass them on")

    # ---- a forward pass ----

    def begin(self, given: dict[str, Any]) -> Forward:
        """Opens the step of a forward pass with these arguments, and the session until end().
        Nothing has changed if it raises."""
        self._check_open()
        try:
            forward = self._begin_in_session(given)
        except DisconnectedError:
            if self.seqs:  # they went with the session
                raise
            self.session = self.kv.other_session(self.session)
            forward = self._begin_in_session(given)
        forward.before = attention.enter(forward)
        return forward

    def _begin_in_session(self, given: dict[str, Any]) -> Forward:
        session = self.session
        session.lock.acquire()
        try:
            return self._begin(Inputs.of(given, self.rows.columns, self.rows.pads))
        except BaseException:
            session.lock.release()
            raise

    def _begin(self, inputs: Inputs) -> Forward:
        self.session.sweep()
        copies = self._copies(inputs)
        leaders = inputs.every(copies)
        seqs, rows = self.seqs, self.rows
        if not seqs:
            rows = Rows(0, [0] * leaders.rows)
        rows.check_pads(leaders.pads)
        self._check_positions(leaders, rows)
        counts = rows.new_tokens(leaders.pads, inputs.columns)
        pool = self.session.pool
        if not self.seqs:
            seqs = pool.create(leaders.rows, self.namespace)
        step = None
        try:
            index = None
            total = sum(counts)
            if total > 0:
                ids = leaders.tokens(counts) if self.known else [UNKNOWN] * total
                step = pool.step(seqs, counts, heads=self.kv.needs.heads,
                                 io_dtype=self.kv.needs.dtype, tokens=ids, wait=self.kv.wait)
                if total < leaders.rows * inputs.columns:
                    index = leaders.index(counts)
            forward = Forward(self, inputs.rows, inputs.columns, step, index, copies)
        except BaseException:
            if step is not None:
                step.abort()
            if not self.seqs:
                self.session.drop(seqs)
            raise
        forward.new, forward.first = (leaders.pads, counts), not self.seqs
        self.seqs, self.rows = seqs, rows
        return forward

    def _copies(self, inputs: Inputs) -> int:
        """How many equal rows of the batch each sequence stands for until this pass is over: beams
        and returned sequences begin as copies of their prompt."""
        if not self.seqs:
            return inputs.copies
        if len(self.seqs) == inputs.rows:
            return 1
        copies = inputs.rows // len(self.seqs)
        if copies > 1 and inputs.same(copies):
            return copies
        self.batch_repeat_interleave(copies)
        return 1

    def _check_positions(self, inputs: Inputs, rows: Rows) -> None:
        if self.known and not self.kv.has_namespace(self.namespace, inputs.columns == 1):
            self.known = False  # K and V come of other weights from now on
        if self.known and not inputs.known:
            if self.found > 0:
                raise Unsupported(
                    "position_ids, or inputs_embeds: the cache has tokens that the pool had, whose "
                    "positions count from the first token that isn't padding; pass such inputs "
                    "with kv.cache() of no input_ids")
            self.known = False
        limit = self.kv.share_limit
        if limit is not None and rows.columns + inputs.columns - min(inputs.pads) > limit:
            self.known = False

    def end(self, forward: Forward, complete: bool) -> None:
        """Commits the step, if the pass is complete and all layers took part; else drops it."""
        attention.enter(forward.before)
        try:
            if not complete:
                self._drop(forward)
                return
            layers = self.kv.needs.layers
            if forward.ran != (1 << layers) - 1:
                missing = [i for i in range(layers) if not forward.ran >> i & 1]
                self._drop(forward)
                raise Unsupported(f"layers {missing} didn't attend through the attention "
                                  "interface: the model has an attention of its own")
            pads, counts = forward.new
            if forward.step is not None:
                try:
                    forward.step.commit()
                except BaseException:
                    self._drop(forward)
                    raise
            self.rows.add(pads, forward.shape[1])
            self.kv.count(computed=sum(counts))
            if forward.copies > 1:
                self.batch_repeat_interleave(forward.copies)
        finally:
            self.session.lock.release()

    def _drop(self, forward: Forward) -> None:
        if forward.step is not None and forward.step._opened.handle is not None:
            try:
                forward.step.abort()
            except DisconnectedError:
                pass  # the step went with the session
        if forward.first:  # the next pass may have another batch
            self.reset()

    # ---- the end ----

    def _check_open(self) -> None:
        if self.closed:
            raise DisconnectedError("the cache was closed", 11, "TS_ECONN")

    def _using(self) -> "_Using":
        self._check_open()
        return _Using(self.session)

    def close(self) -> None:
        """Frees its sequences; what they hold may be found again. Safe to call twice."""
        if not self.closed:
            self.closed = True
            self.session.drop(self.seqs)

    def __enter__(self) -> "PooledCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "closed", True):
            self.close()

    def __repr__(self) -> str:
        state = ", closed" if self.closed else ""
        return (f"<tinyserve cache of {len(self.seqs)} sequences, {self.rows.columns} columns "
                f"in {self.kv.pool_name!r}{state}>")


class _Using:
    """The session's lock, and what others dropped is freed."""

    def __init__(self, session: "Session") -> None:
        self._session = session

    def __enter__(self) -> Any:
        self._session.lock.acquire()
        try:
            self._session.sweep()
        except BaseException:
            self._session.lock.release()
            raise
        return self._session.pool

    def __exit__(self, *_: object) -> None:
        self._session.lock.release()

