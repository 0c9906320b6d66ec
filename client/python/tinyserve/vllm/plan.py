"""What the scheduler's side tells the workers: which tokens to load, and which to store.

Used by the scheduler's thread alone. Nothing here needs an engine, or talks to a daemon.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any, Iterable, Sequence


@dataclass(frozen=True)
class Load:
    """Tokens first .. first + count - 1 of the sequence on the ticket go into these pages, of which
    the first begins with token `first`."""
    request: str
    ticket: bytes
    first: int
    count: int
    pages: list[int]


@dataclass(frozen=True)
class Save:
    """The request's first len(ids) tokens are computed when this step ends; pages has where."""
    request: str
    namespace: bytes
    ids: Any  #: an array of uint32
    pages: list[int]


@dataclass
class StepPlan:
    """Of one step of the engine. failures_known: how many steps with failed loads the scheduler has
    taken into account when it made this one."""
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    failures_known: int = 0


@dataclass
class _Tracked:
    namespace: bytes
    ids: Sequence[int]  #: grows as the request does
    pages: list[int] = field(default_factory=list)
    saved: int = 0  #: tokens that a worker was told to store
    load: tuple[bytes, int, int] | None = None  #: ticket, first token, count
    packed: array[int] = field(default_factory=lambda: array("I"))  #: ids, as far as told

    def first_ids(self, count: int) -> Any:
        """A copy of the first ids, as an array of uint32. Each id is converted once."""
        import numpy as np
        self.packed.extend(self.ids[len(self.packed):count])
        return np.frombuffer(self.packed, np.uint32, count).copy()


class Planner:
    """Follows the requests that may be shared. page_tokens: of the engine; block_tokens: of the
    pool; saves, loads: whether this engine does."""

    def __init__(self, page_tokens: int, block_tokens: int, saves: bool = True) -> None:
        self.page_tokens, self.block_tokens = page_tokens, block_tokens
        self._saves = saves
        self._requests: dict[str, _Tracked] = {}
        self._failures = 0

    def scheduled(self, request: str, namespace: bytes, ids: Sequence[int],
                  pages: Iterable[int]) -> None:
        """The request begins, or begins again after a preemption, with these pages."""
        before = self._requests.get(request)
        saved = before.saved if before is not None and before.namespace == namespace else 0
        self._requests[request] = _Tracked(namespace, ids, list(pages), saved)

    def load(self, request: str, ticket: bytes, first: int, count: int) -> None:
        """The request's tokens from `first` on come from the ticket's sequence."""
        self._requests[request].load = ticket, first, count

    def pages(self, request: str, pages: Iterable[int], replaced: bool) -> None:
        """The request got more pages, or others."""
        tracked = self._requests.get(request)
        if tracked is not None:
            tracked.pages = list(pages) if replaced else tracked.pages + list(pages)

    def finished(self, request: str) -> None:
        self._requests.pop(request, None)

    def load_failed(self) -> None:
        """Workers have told of a failed load. What the step computed was not stored, so that what
        was told since then is told again."""
        self._failures += 1
        for tracked in self._requests.values():
            tracked.saved = 0

    def step(self, computed: dict[str, int]) -> StepPlan:
        """computed: of each request in this step, how many tokens will be computed after it."""
        plan = StepPlan(failures_known=self._failures)
        for request, tokens in computed.items():
            tracked = self._requests.get(request)
            if tracked is None:
                continue
            if tracked.load is not None:
                ticket, first, count = tracked.load
                tracked.load = None
                at = first // self.page_tokens
                plan.loads.append(Load(request, ticket, first, count, tracked.pages[
                    at:at - (-count // self.page_tokens)]))
                tracked.saved = max(tracked.saved, self._whole(first + count))
            save = self._save(request, tracked, tokens) if self._saves else None
            if save is not None:
                plan.saves.append(save)
        return plan

    def _whole(self, tokens: int) -> int:
        """Tokens in whole pages of the engine that fill whole blocks of the pool."""
        tokens = tokens // self.page_tokens * self.page_tokens
        return tokens // self.block_tokens * self.block_tokens

    def _save(self, request: str, tracked: _Tracked, computed: int) -> Save | None:
        # Ids may not be known yet of tokens that are computed already: the engine samples ahead.
        upto = self._whole(min(computed, len(tracked.ids)))
        if upto <= tracked.saved:
            return None
        tracked.saved = upto
        pages = tracked.pages[:-(-upto // self.page_tokens)]
        return Save(request, tracked.namespace, tracked.first_ids(upto), pages)
