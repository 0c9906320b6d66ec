"""What vLLM's connector supports, its settings and the model's identity, without vLLM."""

import os
import pathlib

import pytest

import tinyserve

pytest.importorskip("numpy")

from tinyserve.vllm import support, weights  # noqa: E402
from tinyserve.vllm.settings import Settings  # noqa: E402

ENGINE = dict(tensor_parallel=1, pipeline_parallel=1, context_parallel=1, groups=1,
              spec="FullAttentionSpec", layers=6, heads=4, kv_heads=2, head_dim=64,
              dtype="torch.float32", page_tokens=32, drafts=None)


@pytest.mark.parametrize("change, told", [
    ({"tensor_parallel": 2}, "tensor_parallel_size = 2: .*namespace has no rank; the limit is 1"),
    ({"pipeline_parallel": 4}, "pipeline_parallel_size = 4"),
    ({"context_parallel": 2}, "context parallelism = 2"),
    ({"groups": 3}, "3 groups of layers .*disable-hybrid-kv-cache-manager"),
    ({"spec": "MLAAttentionSpec"}, "layers of the kind MLAAttentionSpec"),
    ({"dtype": "torch.uint8"}, "a cache of torch.uint8 .kv_cache_dtype.; supported are torch.fl"),
    ({"drafts": "eagle"}, "speculative decoding by 'eagle'"),
])
def test_engines_that_are_refused(change, told):
    with pytest.raises(support.Unsupported, match=told):
        support.Engine(**{**ENGINE, **change}).needs()


def test_engines_that_are_served():
    needs = support.Engine(**{**ENGINE, "dtype": "torch.bfloat16", "drafts": "ngram"}).needs()
    assert (needs.layers, needs.kv_heads, needs.head_dim, needs.dtype) == (6, 2, 64, "bf16")


def test_versions():
    for good in "0.29.0", "0.32.0", "0.32.1rc2", "0.30.0+cpu":
        support.check_version(good)
    for bad in "0.28.9", "0.33.0", "1.0", "dev":
        with pytest.raises(support.Unsupported, match="connector supports 0.29 to 0.32"):
            support.check_version(bad)


@pytest.mark.parametrize("extra, told", [
    ({"pol": "kv"}, "no key 'pol'; known are url, pool, "),
    ({"identity": "abc"}, "identity 'abc'; it has 32 hexadecimal digits"),
    ({"identity": "0" * 32, "namespace": "a"}, "identity and namespace"),
    ({"namespace": "n" * 48}, "namespace of 48 bytes; the limits are 1..47"),
    ({"tokens": 0}, "tokens 0; the least is 1"),
    ({"timeout": 0}, "timeout 0 seconds"),
    ({"ticket_ttl": 3601}, "ticket_ttl 3601 seconds"),
    ({"on_load_failure": "stop"}, "on_load_failure 'stop'; known are"),
    ({"tokens": "9"}, "tokens must be of type int, not str"),
    ({"pool": 7}, "pool must be of type str, not int"),
])
def test_settings_that_are_refused(extra, told):
    with pytest.raises((ValueError, TypeError), match=told):
        Settings.of(extra)


def test_settings():
    settings = Settings.of({"pool": "kv", "timeout": 1, "url": None})
    assert (settings.pool, settings.timeout, settings.url, settings.salt) == ("kv", 1, None, "")


def test_the_identity_is_that_of_the_files_and_the_configuration(tmp_path):
    pytest.importorskip("xxhash")
    memory = weights.Remembered(tmp_path / "cache")
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    (tmp_path / "b.bin").write_bytes(b"an older form")
    files = weights.files_of(str(tmp_path))
    assert files == [tmp_path / "a.safetensors"]
    first = weights.digest(files, {"layers": 2}, memory)
    assert weights.digest(files, {"layers": 2}, memory) == first
    assert weights.digest(files, {"layers": 3}, memory) != first
    (tmp_path / "a.safetensors").write_bytes(b"Weights")
    os.utime(tmp_path / "a.safetensors", ns=(1, 1))
    assert weights.digest(files, {"layers": 2}, memory) != first
    assert weights.files_of(str(tmp_path / "b.bin")) == [tmp_path / "b.bin"]
    with pytest.raises(ValueError, match="no weights of model .*set \"identity\""):
        weights.files_of(str(tmp_path / "nothing"))


def test_a_remembered_identity_is_not_read_again(tmp_path, monkeypatch):
    pytest.importorskip("xxhash")
    memory = weights.Remembered(tmp_path / "cache")
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    files = weights.files_of(str(tmp_path))
    first = weights.digest(files, {}, memory)
    monkeypatch.setattr(weights, "_pieces", lambda files: 1 / 0)
    assert weights.digest(files, {}, memory) == first


def test_nothing_of_vllm_is_imported_unless_it_asks(run_worker):
    assert run_worker("import tinyserve.vllm, sys; print('vllm' in sys.modules, "
                      "'torch' in sys.modules)") == "False False\n"


def test_vllm_finds_it_by_the_package():
    sources = pathlib.Path(tinyserve.__file__).parents[1] / "pyproject.toml"
    if not sources.exists():
        from importlib.metadata import distribution
        found, = [p for p in distribution("tinyserve").entry_points
                  if p.group == "vllm.general_plugins"]
        assert found.load() is tinyserve.vllm.register
        return
    assert '[project.entry-points."vllm.general_plugins"]\ntinyserve = "tinyserve.vllm:register"' \
        in sources.read_text()
