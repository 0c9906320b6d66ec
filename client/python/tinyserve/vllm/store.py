"""The worker's side: K and V between the engine's pages and the pool's blocks.

Used by the worker's thread alone. Nothing here needs an engine.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Sequence

from ..client import Client
from ..errors import Error, NoSpaceError, QuotaError
from ..pool import Pool
from .plan import Load, Save, StepPlan
from .sessions import SESSION_ENDS, Connecting

log = logging.getLogger("vllm.tinyserve")
_ANY_ID = 0  #: a match finds all but the last token


@dataclass
class StoreStats:
    loaded: int = 0  #: tokens
    stored: int = 0  #: tokens
    failed_loads: int = 0
    dropped_saves: int = 0  #: because of a failed load, no room, or no daemon
    sessions: int = 0


class Store:
    """connect: gives a session and its pool, opened to be written. pages: HostPages or
    DevicePages."""

    def __init__(self, connect: Callable[[], tuple[Client, Pool]], pages: Any) -> None:
        self._connecting, self._pages = Connecting(connect), pages
        self._session: tuple[Client, Pool] | None = None
        self._failures = 0  # steps with failed loads
        self._bad: set[int] = set()
        self._step_failed = False
        self.stats = StoreStats()

    def take_session(self, session: tuple[Client, Pool]) -> None:
        self._session = session
        self.stats.sessions += 1

    def close(self) -> None:
        self._connecting.close()
        session, self._session = self._session, None
        if session is not None:
            session[0].close()

    def _pool(self) -> Pool | None:
        """None: there is no daemon, or was none a moment ago."""
        if self._session is None:
            session = self._connecting.poll()
            if session is not None:
                self.take_session(session)
                if self.stats.sessions > 1:
                    log.warning("TinyServe: connected again")
        return self._session[1] if self._session is not None else None

    def _lost(self, error: Error) -> None:
        log.warning("TinyServe: %s; K and V are neither loaded nor stored until the daemon is "
                    "there again", error)
        session, self._session = self._session, None
        if session is not None:
            self._connecting.lost(session)

    # ---- loads ----

    def load(self, plan: StepPlan) -> None:
        """Loads what the step needs. failed_pages() tells what could not be."""
        self._step_failed = False
        for load in plan.loads:
            if self._load_one(load):
                self.stats.loaded += load.count
                continue
            self.stats.failed_loads += 1
            self._bad.update(load.pages)
            if not self._step_failed:
                self._step_failed = True
                self._failures += 1

    def failed_pages(self) -> set[int]:
        """Pages whose load has failed since the last call."""
        bad, self._bad = self._bad, set()
        return bad

    def _load_one(self, load: Load) -> bool:
        pool = self._pool()
        if pool is None:
            return False
        try:
            seq = pool.redeem(load.ticket)
            with _freed(pool, [seq]):
                self._copy_in(pool, seq, load)
        except SESSION_ENDS as error:
            self._lost(error)
            return False
        except Error as error:
            log.warning("TinyServe: %d tokens of request %s weren't loaded and are computed: %s",
                        load.count, load.request, error)
            return False
        return True

    def _copy_in(self, pool: Pool, seq: int, load: Load) -> None:
        import numpy as np
        slots = pool.slots(seq, load.first, load.count)
        block, offset = _split(slots, pool.geometry.block_tokens)
        a = self._pages.layout
        rows = len(load.pages) * a.page_tokens
        numbers = np.array(load.pages)
        for layer in range(pool.geometry.layers):
            new = []
            for stored in _bits(pool, layer, slots):
                row = np.zeros((rows, a.kv_heads, a.head_dim), stored.dtype)
                row[:load.count] = stored[block, offset]
                new.append(row)
            self._pages.write(layer, numbers, new)

    # ---- saves ----

    def save(self, plan: StepPlan) -> None:
        """Stores what the step has computed. Nothing is stored from a failed load on until the
        scheduler knows of it: what was computed from those pages is wrong, and so is what other
        requests of the step, or of steps made before it was known, took from them."""
        if not plan.saves:
            return
        if self._failures > plan.failures_known:
            self.stats.dropped_saves += len(plan.saves)
            return
        pool = self._pool()
        if pool is None:
            self.stats.dropped_saves += len(plan.saves)
            return
        try:
            for namespace in {save.namespace for save in plan.saves}:
                self._save_some(pool, namespace,
                                [s for s in plan.saves if s.namespace == namespace])
        except SESSION_ENDS as error:
            self._lost(error)
            self.stats.dropped_saves += len(plan.saves)
        except Error as error:  # nothing that the engine could do about it
            self.stats.dropped_saves += len(plan.saves)
            log.warning("TinyServe: %d requests' tokens weren't stored: %s", len(plan.saves), error)

    def _save_some(self, pool: Pool, namespace: bytes, saves: list[Save]) -> None:
        import numpy as np
        longest = pool.sequence_max - 1  # one more token is asked for
        if any(len(save.ids) > longest for save in saves):
            self.stats.dropped_saves += sum(len(save.ids) > longest for save in saves)
            saves = [save for save in saves if len(save.ids) <= longest]
            if not saves:
                return
        prompts = [np.append(save.ids, np.uint32(_ANY_ID)) for save in saves]
        try:
            matched = pool.match_many(prompts, namespace)
        except (NoSpaceError, QuotaError) as error:
            self._no_room(len(saves), error)
            return
        new = [(save, seq, found) for save, (seq, found) in zip(saves, matched)
               if found < len(save.ids)]
        with _freed(pool, [seq for seq, _ in matched]):
            try:
                self._store(pool, new)
            except (NoSpaceError, QuotaError):  # not all at once: as many as fit
                self._store_singly(pool, new)

    def _store_singly(self, pool: Pool, new: list[tuple[Save, int, int]]) -> None:
        for one in new:
            try:
                self._store(pool, [one])
            except (NoSpaceError, QuotaError) as error:
                self._no_room(1, error)

    def _no_room(self, saves: int, error: Error) -> None:
        self.stats.dropped_saves += saves
        log.debug("TinyServe: %d requests' tokens weren't stored: %s", saves, error)

    def _store(self, pool: Pool, new: list[tuple[Save, int, int]]) -> None:
        """new: with the sequence that has the first tokens, and how many."""
        import numpy as np
        if not new:
            return
        counts = [len(save.ids) - found for save, _, found in new]
        ids = np.concatenate([save.ids[found:] for save, _, found in new])
        with pool.step([seq for _, seq, _ in new], counts, tokens=ids, run=False) as step:
            self._copy_out(pool, step.slots, new)
            step.commit()
        self.stats.stored += sum(counts)

    def _copy_out(self, pool: Pool, slots: list[int], new: list[tuple[Save, int, int]]) -> None:
        import numpy as np
        block, offset = _split(slots, pool.geometry.block_tokens)
        size = self._pages.layout.page_tokens
        pages: list[int] = []
        rows = []  # of all those pages' rows, which are new
        for save, _, found in new:
            first = found // size
            start = len(pages) * size - first * size
            rows.append(np.arange(start + found, start + len(save.ids)))
            pages += save.pages[first:]
        numbers, picked = np.array(pages), np.concatenate(rows)
        for layer in range(pool.geometry.layers):
            computed = self._pages.read(layer, numbers)
            for stored, row in zip(_bits(pool, layer, slots), computed):
                stored[block, offset] = row[picked]


@contextmanager
def _freed(pool: Pool, seqs: list[int]) -> Iterator[None]:
    """Frees the sequences at its end; they go with the session if that ends."""
    try:
        yield
    except SESSION_ENDS:
        raise
    except BaseException:
        pool.free(seqs)
        raise
    pool.free(seqs)


def _split(slots: Sequence[int], block_tokens: int) -> tuple[Any, Any]:
    import numpy as np
    return np.divmod(np.array(slots, np.int64), block_tokens)


def _bits(pool: Pool, layer: int, slots: Sequence[int]) -> list[Any]:
    """K and V of a layer, [blocks][block_tokens][kv_heads][head_dim], as unsigned integers. The
    first layer's call maps the slots' slabs."""
    return [view.bits() for view in pool.layer(layer, slots if layer == 0 else slots[:1])]
