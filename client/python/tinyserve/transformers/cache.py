"""The cache that a model is given: sequences of the pool, one for each row of the batch."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from ..engines.geometry import Unsupported
from ..engines.rows import Rows
from ..errors import BusyError, DisconnectedError, Error, TimedOutError
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
        self.forward: Forward | None = None  #: the pass that it is in
        # Rows that the sequences have if a change was carried out that had no answer (Ctrl-C, or
        # the daemon stood still); None: there was none such.
        self._doubt: Rows | None = None
        self._lost = False  # the same of a change of which rows there are: nobody knows their ids
        super().__init__(layers=[_Layer(self) for _ in range(kv.needs.layers)])

    # ---- what Transformers asks ----

    @property
    def _columns(self) -> int:
        if self._doubt is not None:
            with self.session.lock:
                self._ready()
        return self.rows.columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._columns + int(query_length), 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._columns

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
        return self._columns > 0

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
        if count < 0 and not self.kv.crop_to_length:
            raise ValueError(f"crop({tokens_to_remove}): give a negative number, of columns to "
                             "remove")
        with self.session.lock:
            pool = self._ready()
            if count < 0:
                count = max(0, self.rows.columns - int(tokens_to_remove))
            rows = self.rows.copy()
            lengths = rows.cut(count)
            if self.seqs and count > 0:
                self._doubt = rows
                pool.truncate(self.seqs, lengths)
            self.rows, self._doubt = rows, None

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
        with self.session.lock:
            self._ready()
            if not self.seqs or picks == list(range(len(self.seqs))):
                return
            rows = self.rows.copy()
            rows.pick(picks)
            self.seqs, self.rows = self._select(picks), rows

    def _select(self, picks: list[int]) -> list[int]:
        """The sequences of these rows. In the session's lock."""
        try:
            return list(self.session.pool.select(self.seqs, picks))
        except BaseException as error:
            self._lost = isinstance(error, TimedOutError) or not isinstance(error, Exception)
            raise

    def reset(self) -> None:
        """Empties it: the next forward pass begins anew, with any batch."""
        seqs, self.seqs = self.seqs, []
        self.rows, self.known, self.found = Rows(), True, 0
        self._doubt, self._lost = None, False
        self.session.drop(seqs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PooledCache":
        """A cache that shares what there is: each goes on by itself, and nothing is copied."""
        with self.session.lock:
            self._ready()
            n = len(self.seqs)
            # One call: the first n that go on are the sequences themselves, the others forks.
            seqs = self._select([*range(n), *range(n)])[n:] if n else []
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

    def begin(self, given: dict[str, Any], last: bool) -> bool:
        """Opens the step of a forward pass with these arguments; complete() ends it, or else end().
        The caller has the session's lock until then. If it raises, nothing has changed once end()
        was called. False: the session had ended, and there is another, with which it can be tried
        once more; not if this is the last time."""
        self._check_open()
        if self.forward is not None:
            raise BusyError("the cache is in a forward pass", 6, "TS_EBUSY")
        try:
            self._settle()
            self._begin(Inputs.of(given, self.rows.columns, self.rows.pads))
        except DisconnectedError:
            if self.seqs or last:  # they went with the session
                raise
            self.session = self.kv.other_session(self.session)
            return False
        return True

    def _begin(self, inputs: Inputs) -> None:
        self.session.sweep()
        had, known = len(self.seqs), self.known
        seqs, step = self.seqs, None
        try:
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
            index = None
            total = sum(counts)
            if total > 0:
                ids = leaders.tokens(counts) if self.known else [UNKNOWN] * total
                step = pool.step(seqs, counts, heads=self.kv.needs.heads,
                                 io_dtype=self.kv.needs.dtype, tokens=ids, wait=self.kv.wait)
                if total < leaders.rows * inputs.columns:
                    index = leaders.index(counts)
            forward = Forward(self, inputs.rows, inputs.columns, step, index, copies)
            forward.new, forward.had, forward.known = (leaders.pads, counts), had, known
            forward.before = attention.current()
            self.seqs, self.rows, self.forward = seqs, rows, forward
        except BaseException:
            if step is not None:
                step.abort()
            if not self.seqs:
                self.session.drop(seqs)
            self._repeat_less(had)
            self.known = known
            raise
        attention.enter(forward)

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
            if self.found > 0 and rows.columns > 0:
                raise Unsupported(
                    "position_ids, or inputs_embeds: the cache has tokens that the pool had, whose "
                    "positions count from the first token that isn't padding; pass such inputs "
                    "with kv.cache() of no input_ids")
            self.known = False
        limit = self.kv.share_limit
        if limit is not None and rows.columns + inputs.columns - min(inputs.pads) > limit:
            self.known = False

    def complete(self) -> None:
        """Commits the step, if all layers took part: the pass has ended."""
        forward = self.forward
        assert forward is not None
        layers = self.kv.needs.layers
        if forward.ran != (1 << layers) - 1:
            missing = [i for i in range(layers) if not forward.ran >> i & 1]
            raise Unsupported(f"layers {missing} didn't attend through the attention interface: "
                              "the model has an attention of its own")
        attention.enter(forward.before)
        pads, counts = forward.new
        seqs, rows = self.seqs, self.rows.copy()
        rows.add(pads, forward.shape[1])
        if forward.step is not None:
            self._doubt = rows.copy()
            forward.step.commit()
        if forward.copies > 1:
            picks = [row for row in range(len(rows)) for _ in range(forward.copies)]
            rows.pick(picks)
            seqs = self._select(picks)
        self.seqs, self.rows, self._doubt, self.forward = seqs, rows, None, None
        self.kv.count(computed=sum(counts))

    def end(self) -> None:
        """Drops the pass that complete() didn't end, if there is one: the cache is as it was."""
        forward = self.forward
        if forward is None:
            return
        attention.enter(forward.before)
        try:
            if forward.step is not None and forward.step._opened.handle is not None:
                forward.step.abort()
        except Error:
            pass  # it went with the session, its commit has ended it, or the daemon is told later
        finally:
            self.forward, self.known = None, forward.known
            self._undo(forward.had)

    def _undo(self, had: int) -> None:
        if had == 0:  # the next pass may have another batch
            self.reset()
            return
        try:
            self._settle()
        except Error:
            pass  # the next use does
        self._repeat_less(had)

    def _repeat_less(self, had: int) -> None:
        """Goes on with as many rows as it had before each was repeated."""
        if 0 < had < len(self.seqs) and not self._lost:
            try:
                self._pick(list(range(0, len(self.seqs), len(self.seqs) // had)))
            except Error:
                pass  # then it has them all

    def _settle(self) -> None:
        """Finds out what became of a change that had no answer: a pass is undone, a crop is
        done. In the session's lock."""
        rows = self._doubt
        if rows is None or self._lost:
            return
        has = self.session.pool.lengths(self.seqs)
        if has == rows.lengths() and has != self.rows.lengths():
            if rows.columns > self.rows.columns:
                self.session.pool.truncate(self.seqs, self.rows.lengths())
            else:
                self.rows = rows
        self._doubt = None

    # ---- the end ----

    def _check_open(self) -> None:
        if self.closed:
            raise DisconnectedError("the cache was closed", 11, "TS_ECONN")
        if self._lost:
            raise DisconnectedError("which rows the cache has isn't known, since a call that picks "
                                    "some had no answer: reset() it, or make another", 11,
                                    "TS_ECONN")

    def _ready(self) -> Any:
        """The pool. What others dropped is freed, and what is in doubt is settled. In the session's
        lock."""
        self._check_open()
        self.session.sweep()
        self._settle()
        return self.session.pool

    def close(self) -> None:
        """Frees its sequences; what they hold may be found again. Safe to call twice."""
        if not self.closed:
            self.closed = True
            seqs, self.seqs = self.seqs, []
            self.session.drop(seqs)

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
