"""TinyServeConnector: vLLM's KV connector.

vLLM makes one in the scheduler's process and one in each worker's. The scheduler's asks the daemon
what it has of a prompt (.finder) and plans the steps' loads and saves (.plan); the worker's copies
K and V (.store). Whole pages are copied before and after a step, not layer by layer: calls from
within layers are skipped when a CUDA graph is replayed.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (KVConnectorBase_V1,
                                                               KVConnectorMetadata,
                                                               KVConnectorRole)

from ..client import Client, connect
from ..engines.geometry import Needs, share_limit
from ..engines.identity import namespace_of, salted
from ..engines.pools import find_or_make
from ..errors import DisconnectedError, InvalidError, TimedOutError
from ..pool import Pool
from . import weights
from .finder import Finder
from .plan import Planner, StepPlan
from .settings import Settings
from .store import Store
from .support import Engine, check_version

log = logging.getLogger("vllm.tinyserve")
_FINDER_TIMEOUT = 1.0  #: seconds of one call of the scheduler's thread


class Metadata(KVConnectorMetadata):  # type: ignore[misc]
    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan


class TinyServeConnector(KVConnectorBase_V1):  # type: ignore[misc]
    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        check_version(vllm.__version__)
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._settings = Settings.of(transfer.kv_connector_extra_config)
        self._config = vllm_config
        self._engine = _engine_of(vllm_config, kv_cache_config)
        self._needs: Needs = self._engine.needs()
        self._pool_name: str | None = None  # that was opened last
        self._loads, self._saves = transfer.is_kv_consumer, transfer.is_kv_producer
        if role == KVConnectorRole.SCHEDULER:
            self._start_scheduler(transfer)

    # ---- both ----

    def _open(self, program: str, timeout: float) -> tuple[Client, Pool]:
        client = connect(self._settings.url, program=program, timeout=timeout)
        try:
            pool = find_or_make(client, self._needs, self._settings.pool, "host",
                                self._settings.tokens, True, last=self._pool_name)
            if pool.geometry.dtype != self._needs.dtype:
                raise InvalidError(
                    f"pool {pool.name!r} has dtype = {pool.geometry.dtype}, and the engine's is "
                    f"{self._needs.dtype}; this one would fit:\n" + self._needs.stanza(
                        pool.name, "host", self._settings.tokens, True))
        except BaseException:
            client.close()
            raise
        self._pool_name = pool.name
        return client, pool

    def shutdown(self) -> None:
        for part in (self._finder, self._store):
            if part is not None:
                part.close()

    _finder: Finder | None = None
    _store: Store | None = None

    # ---- the scheduler ----

    def _start_scheduler(self, transfer: Any) -> None:
        if transfer.kv_load_failure_policy != self._settings.on_load_failure:
            log.info("TinyServe: kv_load_failure_policy is %r now: a request whose K and V can't "
                     "be loaded %s (on_load_failure in kv_connector_extra_config)",
                     self._settings.on_load_failure,
                     "is computed" if self._settings.on_load_failure == "recompute" else "fails")
            transfer.kv_load_failure_policy = self._settings.on_load_failure
        self._base = self._find_namespace()
        self._share_limit = share_limit(self._config.model_config.hf_text_config)
        self._generation = b""
        session = self._first_session("scheduler", _FINDER_TIMEOUT)
        block = session[1].geometry.block_tokens if session is not None else 1
        self._planner = Planner(self._engine.page_tokens, block, self._saves)
        self._finder = Finder(self._connect_finder, ttl=self._settings.ticket_ttl)
        self._finder.start(session)

    def _first_session(self, role: str, timeout: float) -> tuple[Client, Pool] | None:
        """None: there is no daemon yet; it is looked for as long as the engine lives. What doesn't
        fit is an error now."""
        try:
            return self._open(f"vllm {role}", timeout)
        except (DisconnectedError, TimedOutError) as error:
            log.warning("TinyServe: %s; nothing is shared until there is a daemon at %s", error,
                        self._settings.where)
            return None

    def _connect_finder(self) -> tuple[Client, Pool]:
        session = self._open("vllm scheduler", _FINDER_TIMEOUT)
        self._planner.block_tokens = session[1].geometry.block_tokens
        return session

    def _find_namespace(self) -> bytes:
        if self._settings.namespace is not None:
            return self._settings.namespace.encode()
        if self._settings.identity is not None:
            return namespace_of(bytes.fromhex(self._settings.identity))
        model = self._config.model_config
        said = dict(model.hf_config.to_dict())
        said["tinyserve vllm"] = [str(model.dtype), str(model.quantization)]
        if share_limit(model.hf_text_config) is not None:  # then vLLM's rotary embedding may differ
            said["tinyserve vllm"].append(model.max_model_len)
        if self._config.load_config.load_format == "dummy":
            raise ValueError("load_format \"dummy\" has no weights in files: set \"identity\" in "
                             "kv_connector_extra_config (32 hexadecimal digits)")
        return namespace_of(weights.digest(weights.files_of(model.model, model.revision), said))

    def _namespace(self, request: Any) -> bytes | None:
        """None: K and V of this request depend on more than token ids, weights and salts."""
        if request.mm_features or request.lora_request is not None or \
                getattr(request, "prompt_embeds", None) is not None or \
                getattr(request, "resumable", False) or request.pooling_params is not None:
            return None
        if self._share_limit is not None and \
                request.num_prompt_tokens + request.max_tokens > self._share_limit:
            return None
        salts = [s for s in (self._settings.salt.encode(), (request.cache_salt or "").encode(),
                             self._generation) if s]
        return salted(self._base, b"\0".join(salts))

    def get_num_new_matched_tokens(self, request: Any,
                                   num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self._finder is not None
        if not self._loads or getattr(request, "skip_reading_prefix_cache", False):
            return 0, False
        namespace = self._namespace(request)
        if namespace is None or request.num_tokens - 1 <= num_computed_tokens:
            return 0, False
        found = self._finder.ask(request.request_id, request.all_token_ids[:], namespace,
                                 num_computed_tokens)
        if found is None:
            return None, False
        return max(0, found - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self._finder is not None
        name = request.request_id
        namespace = self._namespace(request)
        if namespace is None:
            return
        pages, = blocks.get_block_ids()
        self._planner.scheduled(name, namespace, request.all_token_ids, pages)
        if num_external_tokens == 0:
            self._finder.drop(name)
            return
        first, ticket = self._finder.take(name)
        self._planner.load(name, ticket, first, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        assert self._finder is not None
        self._finder.begin_pass()
        scheduled = scheduler_output.num_scheduled_tokens
        computed = {}
        for new in scheduler_output.scheduled_new_reqs:
            self._planner.pages(new.req_id, new.block_ids[0], replaced=True)
            computed[new.req_id] = new.num_computed_tokens + scheduled[new.req_id]
        cached = scheduler_output.scheduled_cached_reqs
        for name, pages, before in zip(cached.req_ids, cached.new_block_ids,
                                       cached.num_computed_tokens):
            if pages is not None:
                self._planner.pages(name, pages[0], name in cached.resumed_req_ids)
            computed[name] = before + scheduled[name]
        return Metadata(self._planner.step(computed))

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._block_pool = gpu_block_pool

    def update_connector_output(self, connector_output: Any) -> None:
        failed = connector_output.invalid_block_ids
        if failed:
            self._planner.load_failed()
            # vLLM computes these pages again, but meanwhile other requests might find them by their
            # hash, or find them later if the request ends before.
            self._block_pool.evict_blocks(failed)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        assert self._finder is not None
        self._finder.drop(request.request_id)
        self._planner.finished(request.request_id)
        return False, None

    def reset_cache(self) -> bool:
        """From now on nothing is found that was stored before, as after a change of weights."""
        if self._finder is not None:
            self._generation = os.urandom(8)
        return True

    # ---- the worker ----

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        from .engine_pages import pages_of
        layers = self._config.compilation_config.static_forward_context
        pages = pages_of(kv_caches, layers, self._needs, self._engine.page_tokens)
        self._store = Store(lambda: self._open("vllm worker", self._settings.timeout), pages)
        session = self._first_session("worker", self._settings.timeout)
        if session is not None:
            self._store.take_session(session)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._store is not None:
            self._store.load(self._plan())

    def wait_for_save(self) -> None:
        if self._store is not None:
            self._store.save(self._plan())

    def _plan(self) -> StepPlan:
        plan: StepPlan = self._get_connector_metadata().plan
        return plan

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._store.failed_pages() if self._store is not None else set()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: start_load_kv() has loaded all layers."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any,
                      **kwargs: Any) -> None:
        """Nothing: wait_for_save() stores all layers."""


def _engine_of(config: Any, cache: Any) -> Engine:
    parallel, group = config.parallel_config, cache.kv_cache_groups[0]
    spec, drafts = group.kv_cache_spec, config.speculative_config
    return Engine(
        tensor_parallel=parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
        context_parallel=getattr(parallel, "decode_context_parallel_size", 1)
        * getattr(parallel, "prefill_context_parallel_size", 1),
        groups=len(cache.kv_cache_groups), spec=type(spec).__name__,
        layers=len(group.layer_names),
        heads=config.model_config.get_num_attention_heads(parallel),
        kv_heads=getattr(spec, "num_kv_heads", 0), head_dim=getattr(spec, "head_size", 0),
        dtype=str(getattr(spec, "dtype", None)), page_tokens=spec.block_size,
        drafts=drafts.method if drafts is not None else None)
