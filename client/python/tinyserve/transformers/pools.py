"""The pool that a model is attached to: named, found, or made."""

from __future__ import annotations

from ..client import Client, Pool
from ..engines.geometry import Needs
from ..errors import InvalidError


def find_or_make(client: Client, needs: Needs, name: str | None, device: str, tokens: int,
                 writable: bool) -> Pool:
    pool = client.pool(name or "", writable=writable)
    misfit = needs.misfit(pool.geometry)
    if misfit is not None:
        pool.close()
        raise InvalidError(f"pool {pool.name!r} has {misfit}; this one would fit:\n"
                           + needs.stanza(needs.pool_name, device, tokens, writable))
    return pool
