"""What the connector refuses, with vLLM's own configurations, and what it says."""

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.v1.kv_cache_interface import (FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec,
                                        SlidingWindowSpec)

import tinyserve
from conftest import HERE, POOL, Daemon
from tinyserve.engines.geometry import Unsupported

MODEL = HERE.parents[2] / "tools/model"
SHAPE = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
SMALL = "small:layers=1,kv_heads=1,head_dim=64,dtype=fp32,blocks=8,device=host,client_write=all"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    daemon = Daemon(tmp_path_factory.mktemp("refusals"), POOL, SMALL,
                    POOL.replace("kv:", "eight:").replace("fp32", "fp8_e4m3"),
                    POOL.replace("kv:", "locked:").replace(",client_write=all", ""))
    yield daemon
    daemon.stop()


@pytest.fixture
def connect(daemon):
    """Makes the connector of a scheduler."""
    load_general_plugins()
    made = []

    def connect_(specs=None, change=lambda config: None, policy=None, **extra):
        transfer = {"kv_connector": "TinyServeConnector", "kv_role": "kv_both",
                    "kv_connector_extra_config": {"url": daemon.url, **extra}}
        config = EngineArgs(model=str(MODEL), skip_tokenizer_init=True, dtype="float32",
                            kv_transfer_config=transfer).create_engine_config()
        change(config)
        names = [f"model.layers.{i}.self_attn.attn" for i in range(6)]
        specs = specs or [FullAttentionSpec(**SHAPE)]
        made.append(KVConnectorFactory.create_connector(
            config, KVConnectorRole.SCHEDULER,
            KVCacheConfig(64, [], [KVCacheGroupSpec(names, spec) for spec in specs])))
        return made[-1]

    yield connect_
    for connector in made:
        connector.shutdown()


def test_the_entry_point_makes_the_connector_known(connect):
    connector = connect()
    assert type(connector).__name__ == "TinyServeConnector"
    # vLLM's own default ends a request whose load fails.
    assert connector._vllm_config.kv_transfer_config.kv_load_failure_policy == "recompute"


def test_a_load_failure_may_end_the_request(connect):
    connector = connect(on_load_failure="fail")
    assert connector._vllm_config.kv_transfer_config.kv_load_failure_policy == "fail"


@pytest.mark.parametrize("name, told", [
    ("tensor_parallel_size", "tensor_parallel_size = 2: each rank has K and V of other heads"),
    ("pipeline_parallel_size", "pipeline_parallel_size = 2: each rank has K and V of other layers"),
    ("decode_context_parallel_size", "context parallelism = 2"),
])
def test_ranks(connect, name, told):
    with pytest.raises(Unsupported, match=told):
        connect(change=lambda config: setattr(config.parallel_config, name, 2))


def test_kinds_of_layers(connect):
    window = SlidingWindowSpec(**SHAPE, sliding_window=128)
    with pytest.raises(Unsupported, match="2 groups of layers with page tables of their own"):
        connect([FullAttentionSpec(**SHAPE), window])
    with pytest.raises(Unsupported, match="layers of the kind SlidingWindowSpec"):
        connect([window])


def test_types(connect):
    eight = FullAttentionSpec(**{**SHAPE, "dtype": torch.float8_e4m3fn})
    with pytest.raises(Unsupported, match="a cache of torch.float8_e4m3fn .kv_cache_dtype."):
        connect([eight])


def test_a_pool_of_another_geometry(connect):
    with pytest.raises(tinyserve.InvalidError) as raised:
        connect(pool="small")
    assert str(raised.value).splitlines() == [
        "pool 'small' has layers = 1, and the model has 6; this one would fit:", "[pool small]",
        "layers = 6", "kv_heads = 2", "head_dim = 64", "dtype = fp32", "block_tokens = 16",
        "blocks = 4096", "device = host", "client_write = all"]


def test_a_pool_that_rounds(connect):
    with pytest.raises(tinyserve.InvalidError, match="dtype = fp8_e4m3, and the engine's is fp32"):
        connect(pool="eight")


def test_a_pool_that_may_not_be_written(connect):
    with pytest.raises(tinyserve.DeniedError, match="(?s)locked.*client_write = none.*this one "
                                                    "would do:\n.pool locked.\n.*client_write = "
                                                    "all"):
        connect(pool="locked")


def test_a_pool_that_is_not_there(connect):
    with pytest.raises(tinyserve.NotFoundError, match="none"):
        connect(pool="none")


def test_settings(connect):
    with pytest.raises(ValueError, match="no key 'pol'; known are url, pool, "):
        connect(pol="kv")


def test_weights_that_are_not_in_files(connect):
    with pytest.raises(ValueError, match="set \"identity\""):
        connect(change=lambda config: setattr(config.load_config, "load_format", "dummy"))


def test_without_a_daemon_the_engine_starts(connect, tmp_path):
    connector = connect(url=str(tmp_path / "nobody"))
    assert connector._finder is not None
