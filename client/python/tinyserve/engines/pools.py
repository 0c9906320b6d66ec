"""The pool that a model is attached to: named, found, or made."""

from __future__ import annotations

from ..client import Client
from .geometry import Needs
from ..errors import DeniedError, ExistsError, InvalidError, NotFoundError
from ..pool import Pool
from ..records import PoolInfo


def find_or_make(client: Client, needs: Needs, name: str | None, device: str, tokens: int,
                 writable: bool, last: str | None = None) -> Pool:
    """Opens the pool of this name; or the one that was opened last, if it is there; or one that
    fits, if there is one on the device ("host", or "cuda"); or one that is made. InvalidError: the
    named one doesn't fit, and what would. NotFoundError: none fits, and none may be made.
    DeniedError: it may not be written."""
    pools = client.pools()
    if name is None and any(p.name == last for p in pools):
        name = last
    stanza = needs.stanza(name or needs.pool_name, device, tokens, writable)
    if name is None:
        name = _fitting(pools, needs, device)
        if name is None:
            _make(client, needs, device, tokens, writable, pools)
            name = needs.pool_name
    else:
        _check(next((p for p in pools if p.name == name), None), needs, device, stanza)
    try:
        return client.pool(name, writable=writable)
    except DeniedError as error:
        raise DeniedError(f"{error}; this one would do:\n{stanza}", error.status,
                          error.name) from error


def _check(pool: PoolInfo | None, needs: Needs, device: str, stanza: str) -> None:
    """Of a pool that was named. None: there is none, as opening it will tell."""
    if pool is None:
        return
    misfit = needs.misfit(pool.geometry)
    if misfit is None and pool.device.split(":")[0] != device.split(":")[0]:
        misfit = f"device = {pool.device}, and the model is on {device}"
    if misfit is not None:
        raise InvalidError(f"pool {pool.name!r} has {misfit}; this one would fit:\n{stanza}")


def _fitting(pools: list[PoolInfo], needs: Needs, device: str) -> str | None:
    """The largest that fits; fp8 rounds, and so is taken by name alone."""
    fitting = [p for p in pools if needs.misfit(p.geometry) is None and
               p.geometry.dtype == needs.dtype and
               p.device.split(":")[0] == device.split(":")[0]]
    best = max(fitting, key=lambda p: p.blocks * p.geometry.block_tokens, default=None)
    return best.name if best is not None else None


def _make(client: Client, needs: Needs, device: str, tokens: int, writable: bool,
          pools: list[PoolInfo]) -> None:
    try:
        client.create_pool(needs.create_text(needs.pool_name, device, tokens, writable))
    except ExistsError:
        pass  # another process was first
    except DeniedError as error:
        names = ", ".join(p.name for p in pools) or "none"
        raise NotFoundError(f"no pool fits the model (there are: {names}), and making one is for "
                            "operators; add this to tinyserved.conf:\n" +
                            needs.stanza(needs.pool_name, device, tokens, writable)) from error
