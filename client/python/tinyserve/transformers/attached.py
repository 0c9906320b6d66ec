"""A model whose K and V lie in a pool: what attach() gives."""

from __future__ import annotations

import functools
import inspect
import threading
from dataclasses import dataclass
from typing import Any, Callable

import torch
from transformers.cache_utils import Cache

from ..client import Client, connect
from ..engines.geometry import Needs, Unsupported, needs_of, share_limit
from ..engines.identity import namespace_of
from ..engines.rows import Rows, match_columns
from ..errors import DeniedError, DisconnectedError
from ..pool import Pool
from . import attention, weights
from .cache import PooledCache
from .inputs import check_mask, pads_of, refuse_others
from ..engines.pools import find_or_make
from .sessions import Session, Sessions

_DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_PROMPT = frozenset(("input_ids", "attention_mask", "position_ids"))
_DIGESTS_KEPT = 16
_EXCHANGE_BYTES = 16 << 20  #: in a GPU's memory, to begin with
_RESTART = 2.0  # seconds: a daemon that is restarted is there again by then


@dataclass(frozen=True)
class Stats:
    """Tokens since the model was attached, of all its caches."""
    found: int = 0  #: that the pool had when a cache was made
    computed: int = 0  #: that forward passes have stored
    caches: int = 0  #: that were made with a prompt

    def __str__(self) -> str:
        return f"{self.found} tokens found, {self.computed} computed"


class Attached:
    """What attach() gives. cache() may be called by any thread; each has a session of its own.
    Leaving its `with` block, or close(), makes the model what it was."""

    def __init__(self, model: Any, how: "Options") -> None:
        self._model, self._how = _unwrap(model), how
        module = self._module = self._model.base_model
        config = self.config = module.config
        if attention.before_of(config._attn_implementation) is not None:
            raise ValueError("the model is attached already: close() what the first attach() gave")
        tensors = list(self._model.parameters())
        devices = {t.device for t in tensors}
        if len(devices) != 1:
            raise Unsupported(f"{config.model_type}: a model on several devices "
                              f"({', '.join(sorted(map(str, devices)))})")
        self.device: torch.device = devices.pop()
        if self.device.type not in ("cpu", "cuda"):
            raise Unsupported(f"{config.model_type}: a model on {self.device}")
        dtype = self._model.dtype
        if dtype not in _DTYPE_NAMES:
            raise Unsupported(f"{config.model_type}: a model of {dtype}")
        self.needs: Needs = needs_of(config, _DTYPE_NAMES[dtype])
        if not getattr(self._model, "_supports_attention_backend", False):
            raise Unsupported(f"{config.model_type}: it doesn't attend through the attention "
                              "interface of Transformers")
        self.share_limit = share_limit(config)
        self.crop_to_length, self.wait = how.crop_to_length, how.wait
        self.pool_name = ""
        self._namespaces: list[tuple[weights.Fingerprint, bytes]] = []
        self._glance: weights.Glance | None = None
        self._as_loaded = True  # for all that is known: no namespace was made yet
        self._stats, self._lock = Stats(), threading.Lock()
        self._replaced: list[tuple[Any, str, Any]] = []
        self._sessions = Sessions(self._connect)
        self._sessions.mine()  # the daemon and the pool are there, or an error is
        try:
            self._find_namespace()
            self._before: str = config._attn_implementation
            self._model.set_attn_implementation(attention.register(self._before))
            self._replace(module, "forward", _PooledForward(self, module.forward))
            if hasattr(self._model, "prepare_inputs_for_generation"):
                self._replace(self._model, "prepare_inputs_for_generation",
                              _NewInputs(self._model.prepare_inputs_for_generation))
            if how.prefills_whole and hasattr(self._model, "_prefill"):
                self._replace(self._model, "_prefill",
                              _WholePrefill(self, self._model._prefill))
        except BaseException:
            self._sessions.close()
            raise
        self.closed = False

    def _replace(self, thing: Any, name: str, function: Any) -> None:
        """Until close(). Others (accelerate) may have put functions of their own there."""
        self._replaced.append((thing, name, vars(thing).get(name)))
        setattr(thing, name, function)

    # ---- what it needs of the pool ----

    @property
    def on_gpu(self) -> bool:
        return bool(self.device.type == "cuda")

    def _connect(self) -> tuple[Client, Pool]:
        """Where no execution is named, the daemon attends in host memory. On a GPU it is tried
        whether this process is quicker, if the pool lets it write."""
        how = self._how
        execution = how.execution or ("auto" if self.on_gpu else "daemon")
        try:
            return self._open(execution)
        except DeniedError:
            if how.execution is not None or execution == "daemon":
                raise
            return self._open("daemon")

    def _open(self, execution: str) -> tuple[Client, Pool]:
        how = self._how
        client = connect(how.url, execution=execution, timeout=how.timeout, threads=how.threads,
                         program="transformers", wait=_RESTART)
        try:
            pool = find_or_make(client, self.needs, how.pool,
                                "host" if not self.on_gpu else f"cuda:{self.device.index or 0}",
                                how.tokens, execution != "daemon", last=self.pool_name)
            if self.on_gpu:
                client.exchange(pool, _EXCHANGE_BYTES)
        except BaseException:
            client.close()
            raise
        self.pool_name = pool.name
        return client, pool

    def _find_namespace(self) -> bytes:
        """The namespace of the weights as they are; they are read only if they have changed."""
        seen = weights.Fingerprint(self._model)
        with self._lock:
            for known, namespace in self._namespaces:
                if known == seen:
                    return namespace
        how = self._how
        if isinstance(how.identity, bytes):
            digest = how.identity
        elif how.identity == "files" and self._as_loaded:
            digest = weights.remembered_digest(self._model, self.config)
        else:
            digest = weights.digest(self._model, self.config)
        namespace = namespace_of(digest, how.salt)
        self._as_loaded = False
        with self._lock:
            self._namespaces = [(seen, namespace), *self._namespaces][:_DIGESTS_KEPT]
        return namespace

    def reread(self) -> None:
        """Has all weights read again: call it after writing some by `.data`, which isn't seen."""
        with self._lock:
            self._namespaces, self._glance = [], None

    @property
    def namespace(self) -> bytes:
        """What K and V depend on beside token ids: the weights and the configuration."""
        return self._find_namespace()

    def has_namespace(self, namespace: bytes, glances: bool) -> bool:
        """Whether the weights are those of a namespace that was made. glances: looked at as a
        weights.Glance does."""
        if isinstance(self._how.identity, bytes):
            return True  # whatever they are
        before = self._glance
        if glances and before is not None and before.is_as_it_was(namespace):
            return True
        self._glance = None
        seen, glance = weights.Fingerprint(self._model), weights.Glance(self._model, namespace)
        with self._lock:
            if (seen, namespace) not in self._namespaces:
                return False
            self._glance = glance
        return True

    # ---- caches ----

    def other_session(self, session: Session) -> Session:
        """A new session of this thread's, in place of one that has ended."""
        self._sessions.lost(session)
        return self._sessions.anew()

    def cache(self, input_ids: Any = None, attention_mask: Any = None, *, wait: float | None = None,
              **inputs: Any) -> PooledCache:
        """A cache for one generate(), or for a conversation; call it with the inputs that
        generate() gets. It has the longest beginning of the prompt that the pool has, of any
        process of this user that serves the same weights, and generate() goes on from there.
        Without input_ids it is empty.

        In a left-padded batch all rows go on at the same column: what is found of each row counts
        as far as it covers that. wait: seconds to wait while another process computes what is
        missing (None: attach()'s)."""
        refuse_others(inputs, _PROMPT)
        namespace = self.namespace
        if input_ids is None:
            return PooledCache(self, self._sessions.mine(), namespace, [], Rows())
        ids = torch.as_tensor(input_ids)
        if ids.ndim != 2:
            raise ValueError(f"input_ids of {ids.ndim} dimensions; they are [rows, columns]")
        rows, columns = ids.shape
        pads = _pads(attention_mask, rows, columns)
        prompts = [row[pad:] for row, pad in zip(ids.tolist(), pads)]
        if self.share_limit is not None and columns - min(pads, default=0) > self.share_limit:
            return PooledCache(self, self._sessions.mine(), namespace, [], Rows(), known=False)
        wait = self._how.share_wait if wait is None else wait
        session, matched = self._match(prompts, namespace, wait)
        seqs, found = [seq for seq, _ in matched], [n for _, n in matched]
        try:
            start = match_columns(pads, found)
            state = Rows(start, [min(pad, start) for pad in pads])
            lengths = state.lengths()
            cut = [i for i in range(rows) if found[i] != lengths[i]]
            if cut:
                with session.lock:
                    session.pool.truncate([seqs[i] for i in cut], [lengths[i] for i in cut])
        except BaseException:
            session.drop(seqs)
            raise
        self.count(found=sum(lengths), caches=1)
        return PooledCache(self, session, namespace, seqs, state, found=sum(lengths))

    def _match(self, prompts: list[list[int]], namespace: bytes,
               wait: float) -> tuple[Session, list[tuple[int, int]]]:
        for attempt in range(2):
            session = self._sessions.mine() if attempt == 0 else self._sessions.anew()
            try:
                with session.lock:
                    session.sweep()
                    return session, session.pool.match_many(prompts, namespace, wait)
            except DisconnectedError:
                self._sessions.lost(session)  # the daemon was replaced: once more, with the new one
                if attempt == 1:
                    raise
        raise AssertionError

    def count(self, found: int = 0, computed: int = 0, caches: int = 0) -> None:
        with self._lock:
            s = self._stats
            self._stats = Stats(s.found + found, s.computed + computed, s.caches + caches)

    @property
    def stats(self) -> Stats:
        """Tokens found and computed since attach()."""
        return self._stats

    # ---- the end ----

    def close(self) -> None:
        """Detaches the model: it attends as before, and the caches are closed. Safe to call
        twice."""
        if self.closed:
            return
        self.closed = True
        for thing, name, before in self._replaced:
            if before is None:
                delattr(thing, name)  # the class's is there again
            else:
                setattr(thing, name, before)
        self._model.set_attn_implementation(self._before)
        self._sessions.close()

    closed = True

    def __enter__(self) -> "Attached":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else str(self.stats)
        return f"<tinyserve: {self.config.model_type} in pool {self.pool_name!r}, {state}>"


@dataclass(frozen=True)
class Options:
    """attach()'s arguments."""
    url: Any
    pool: str | None
    execution: str | None
    tokens: int
    identity: bytes | str | None
    salt: bytes
    wait: float
    share_wait: float
    timeout: float
    threads: int
    crop_to_length: bool
    prefills_whole: bool


class _PooledForward:
    """The forward() of an attached model's decoder."""

    def __init__(self, kv: Attached, forward: Callable[..., Any]) -> None:
        self._kv, self._forward = kv, forward
        self._signature = inspect.signature(forward)
        functools.update_wrapper(self, forward)

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self._cache_of(args, kwargs)
        if not isinstance(cache, PooledCache):
            outer = attention.current()
            try:
                self._enter(None)
                return self._forward(*args, **kwargs)
            finally:
                self._enter(outer)
        for last in (False, True):
            with cache.session.lock:  # Ctrl-C comes before it or behind it, not in between
                outer = cache.forward
                try:
                    if self._begin(cache, args, kwargs, last):
                        result = self._forward(*args, **kwargs)
                        self._complete(cache)
                        return result
                finally:
                    if cache.forward is not outer:
                        self._end(cache)
        raise AssertionError

    def _cache_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for name in ("cache", "past_key_values"):
            if kwargs.get(name) is not None:
                return kwargs[name]
        return next((a for a in args if isinstance(a, Cache)), None)

    @torch.compiler.disable
    def _begin(self, cache: PooledCache, args: tuple[Any, ...], kwargs: dict[str, Any],
               last: bool) -> bool:
        if cache.kv is not self._kv:
            raise ValueError(f"{cache!r} was made for another model")
        if self._kv.on_gpu and torch.cuda.is_current_stream_capturing():
            raise Unsupported("a CUDA graph of a forward pass: its token ids are told to the "
                              "daemon by the processor, in each pass")
        given = dict(self._signature.bind_partial(*args).arguments, **kwargs) if args else kwargs
        if given.get("output_attentions") is None and \
                getattr(self._kv.config, "output_attentions", False):
            given = dict(given, output_attentions=True)
        return cache.begin(given, last)

    @torch.compiler.disable
    def _enter(self, forward: Any) -> None:
        attention.enter(forward)

    @torch.compiler.disable
    def _complete(self, cache: PooledCache) -> None:
        cache.complete()

    @torch.compiler.disable
    def _end(self, cache: PooledCache) -> None:
        cache.end()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise Unsupported("a copy of an attached model: close() what attach() gave, copy, and "
                          "attach both")


class _NewInputs:
    """generate()'s preparation of a forward pass. Assisted decoding passes the whole prompt in its
    first pass, whatever the cache has; what it has is left out here, as in other ways of
    generate()."""

    def __init__(self, prepare: Callable[..., Any]) -> None:
        self._prepare = prepare
        functools.update_wrapper(self, prepare)

    def __call__(self, input_ids: Any, next_sequence_length: int | None = None,
                 **kwargs: Any) -> Any:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if isinstance(cache, PooledCache) and next_sequence_length is None and \
                self._is_whole(input_ids.shape[1], kwargs):
            past = cache.get_seq_length()
            if 0 < past < input_ids.shape[1]:
                next_sequence_length = input_ids.shape[1] - past
        return self._prepare(input_ids, next_sequence_length=next_sequence_length, **kwargs)

    @staticmethod
    def _is_whole(columns: int, given: dict[str, Any]) -> bool:
        """Whether `columns` ids are the whole prompt, and not only what is new in it. A mask of
        ones may have been left out; then the positions tell."""
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if mask is not None:
            return bool(mask.shape[-1] == columns)
        return positions is not None and positions.shape[-1] == columns and \
            int(positions[..., 0].max()) == 0

    __deepcopy__ = _PooledForward.__deepcopy__


class _WholePrefill:
    """generate()'s prefill where Transformers (before 5.21) computes all of a prompt again if it
    does so in chunks, whatever the cache has: then it begins with nothing."""

    def __init__(self, kv: Attached, prefill: Callable[..., Any]) -> None:
        self._kv, self._prefill = kv, prefill

    def __call__(self, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any],
                 *args: Any, **kwargs: Any) -> Any:
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, PooledCache) and generation_config.prefill_chunk_size is not None:
            self._kv.count(found=-cache.found)
            cache.found = 0
            cache.crop(-cache.get_seq_length())
        return self._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    __deepcopy__ = _PooledForward.__deepcopy__


def _unwrap(model: Any) -> Any:
    """The Transformers model of a PEFT one, or the model itself."""
    peft = getattr(model, "peft_config", None)
    if peft and hasattr(model, "get_base_model"):
        for name, config in peft.items():
            if getattr(config, "is_prompt_learning", False):
                raise Unsupported(f"adapter {name!r}: {config.peft_type} puts K and V of its own "
                                  "into the cache")
        model = model.get_base_model()
    if not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"attach() takes a model of Transformers, not {type(model).__name__}")
    return model


def _pads(mask: Any, rows: int, columns: int) -> list[int]:
    """Of each row of a prompt, how many columns are padding."""
    if mask is None:
        return [0] * rows
    mask = torch.as_tensor(mask)
    check_mask(mask, rows, columns)
    pads = pads_of(mask.cpu())
    for row, pad in enumerate(pads):
        if pad == columns:
            raise ValueError(f"row {row} of input_ids is all padding")
    return pads
