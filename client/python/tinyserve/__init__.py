"""The worker's side of TinyServe, the node-local KV-cache service.

    with tinyserve.connect() as client, client.pool("llama-8b") as kv:
        chat, = kv.create(1)
        with kv.step([chat], [5]) as step: ...

Errors are exceptions below tinyserve.Error with the daemon's own sentence.
"""

from ._version import __version__
from .client import Client, connect
from .errors import (BusyError, DeniedError, DeviceError, DisconnectedError, Error, ExistsError,
                     InternalError, InvalidError, NoSpaceError, NotFoundError, OutOfMemoryError,
                     ProtocolError, QuotaError, StaleError, TimedOutError)
from .pool import Pool
from .records import Geometry, Kept, PoolInfo, Room, Seq
from .step import Frame, Step
from .view import View

__all__ = [
    "BusyError", "Client", "DeniedError", "DeviceError", "DisconnectedError", "Error",
    "ExistsError", "Frame", "Geometry", "InternalError", "InvalidError", "Kept", "NoSpaceError",
    "NotFoundError", "OutOfMemoryError", "Pool", "PoolInfo", "ProtocolError", "QuotaError", "Seq",
    "Room", "StaleError", "Step", "TimedOutError", "View", "__version__", "connect",
]
