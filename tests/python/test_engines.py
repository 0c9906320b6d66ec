"""What adapters of engines share: rows of a batch, the pool of a configuration, the identity of
weights. No engine is needed. tests/engines/ has the tests with one."""

import importlib.util
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

import tinyserve
from tinyserve.engines import identity
from tinyserve.engines.geometry import Unsupported, needs_of, share_limit
from tinyserve.engines.pools import find_or_make
from tinyserve.engines.rows import Rows, match_columns


# ---- pools ----

class Pools:
    """A client whose pools are names; `made` are those that were asked for."""

    def __init__(self, *names):
        self.names, self.made = list(names), []

    def pools(self):
        return [SimpleNamespace(name=name, geometry=SimpleNamespace(dtype="bf16", block_tokens=16),
                                device="host", blocks=10 * (1 + i))
                for i, name in enumerate(self.names)]

    def create_pool(self, text):
        self.made.append(text)
        self.names.append(text)

    def pool(self, name, writable):
        if name not in self.names:
            raise tinyserve.NotFoundError(f"there is no pool {name!r}")
        return name


def test_the_pool_that_was_opened_last_is_opened_again_or_made_again():
    needs = SimpleNamespace(pool_name="model", dtype="bf16", misfit=lambda geometry: None,
                            stanza=lambda *_: "[pool]", create_text=lambda name, *_: name)

    def find(client, name=None, last=None):
        return find_or_make(client, needs, name, "host", 100, True, last=last)

    assert find(Pools("a", "b")) == "b"  # the largest
    assert find(Pools("a", "b"), last="a") == "a"
    empty = Pools()
    assert find(empty, last="a") == "model" and empty.made == ["model"]
    with pytest.raises(tinyserve.NotFoundError):
        find(Pools("a"), name="b", last="b")  # one that was named is nobody else's to make


# ---- rows ----

def test_padding_is_no_token():
    rows = Rows(0, [0, 0, 0])
    pads = [0, 3, 9]
    assert rows.new_tokens(pads, 5) == [5, 2, 0]
    rows.add(pads, 5)
    assert (rows.columns, rows.pads, rows.lengths()) == (5, [0, 3, 5], [5, 2, 0])
    rows.check_pads(pads)  # of the third row four more columns are padding
    assert rows.new_tokens(pads, 5) == [5, 5, 1]
    rows.add(pads, 5)
    assert rows.lengths() == [10, 7, 1]
    assert rows.lengths(4) == [4, 1, 0]


def test_cutting_takes_columns_of_every_row():
    rows = Rows(10, [0, 3, 9])
    assert rows.cut(2) == [8, 5, 0]
    assert (rows.columns, rows.pads) == (8, [0, 3, 8])
    with pytest.raises(ValueError, match="9 columns to remove; the cache has 8"):
        rows.cut(9)
    assert rows.cut(8) == [0, 0, 0]


def test_rows_are_picked_and_copied():
    rows = Rows(10, [0, 3, 9])
    twin = rows.copy()
    rows.pick([2, 0, 2])
    assert rows.lengths() == [1, 10, 1] and len(rows) == 3
    assert twin.lengths() == [10, 7, 1]


def test_padding_that_changes_is_an_error():
    rows = Rows(10, [0, 3])
    with pytest.raises(ValueError, match="row 1 has 2 columns of padding, and had 3 of its 10"):
        rows.check_pads([0, 2])
    with pytest.raises(ValueError, match="row 0 has 1 columns of padding, and had 0"):
        rows.check_pads([1, 3])


def test_all_rows_go_on_at_the_same_column():
    assert match_columns([0, 3, 9], [8, 4, 0]) == 7
    assert match_columns([0], [39]) == 39
    assert match_columns([], []) == 0


# ---- geometry ----

def config(**changes):
    return SimpleNamespace(**{**dict(model_type="llama", num_hidden_layers=3, hidden_size=128,
                                     num_attention_heads=4, num_key_value_heads=2), **changes})


def test_what_a_configuration_needs():
    needs = needs_of(config(), "fp32")
    assert (needs.layers, needs.heads, needs.kv_heads, needs.head_dim) == (3, 4, 2, 32)
    assert needs.pool_name == "hf-3x2x32-fp32"
    assert needs_of(config(head_dim=64, num_key_value_heads=None), "bf16").kv_heads == 4
    g = tinyserve.Geometry(3, 2, 32, 16, "fp32", "nhd")
    assert needs.misfit(g) is None
    assert needs.misfit(tinyserve.Geometry(3, 2, 32, 16, "fp8_e4m3", "hnd")) is None
    assert needs.misfit(tinyserve.Geometry(3, 2, 32, 16, "fp16", "nhd")) == \
        "dtype = fp16, and the model's is fp32"
    assert needs.misfit(tinyserve.Geometry(3, 4, 32, 16, "fp32", "nhd")) == \
        "kv_heads = 4, and the model has 2"


@pytest.mark.parametrize("changes, why", [
    ({"is_encoder_decoder": True}, "encoder-decoder"),
    ({"layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'"),
    ({"layer_types": ["linear_attention"]}, "'linear_attention'"),
    ({"attention_chunk_size": 8}, "chunked attention"),
    ({"num_kv_shared_layers": 1}, "K and V of other layers"),
    ({"kv_lora_rank": 512}, "latent attention"),
    ({"v_head_dim": 64}, "v_head_dim differs"),
    ({"global_head_dim": 512}, "global_head_dim differs"),
    ({"head_dim": 16}, "head_dim 16; the limits are 32..256"),
    ({"head_dim": 512}, "head_dim 512; the limits are 32..256"),
    ({"num_key_value_heads": [1, 2]}, "different numbers of heads"),
    ({"is_causal": False}, "later tokens"),
    ({"get_text_config": lambda: None}, "text and other inputs"),
])
def test_what_cant_be_served_is_refused_by_name(changes, why):
    with pytest.raises(Unsupported, match=f"llama: .*{why}"):
        needs_of(config(**changes), "fp32")


def test_windows_are_served():
    needs_of(config(layer_types=["full_attention", "sliding_attention"], sliding_window=8), "fp32")
    needs_of(config(sliding_window=8), "fp32")


def test_up_to_which_length_k_is_shared():
    assert share_limit(config()) is None
    assert share_limit(config(rope_parameters={"rope_type": "llama3", "factor": 8})) is None
    assert share_limit(config(rope_scaling={"type": "longrope"},
                              original_max_position_embeddings=4096)) == 4096
    assert share_limit(config(rope_parameters={
        "rope_type": "dynamic", "original_max_position_embeddings": 2048})) == 2048
    assert share_limit(config(rope_parameters={
        "full_attention": {"rope_type": "default"},
        "sliding_attention": {"rope_type": "dynamic"}}, max_position_embeddings=512)) == 512


# ---- pools ----

def test_the_stanza_and_the_text_make_the_pool_that_is_needed(client, daemon):
    needs = needs_of(config(), "bf16")
    assert needs.stanza("x", "host", 100, False) == (
        "[pool x]\nlayers = 3\nkv_heads = 2\nhead_dim = 32\ndtype = bf16\nblock_tokens = 16\n"
        "blocks = 7\ndevice = host\n")
    client.create_pool(needs.create_text("x", "host", 100, True))
    assert [p.name for p in client.pools()] == ["tiny", "x"]
    made = client.pools()[1]
    assert (made.device, made.blocks) == ("host", 7)
    assert made.geometry == tinyserve.Geometry(3, 2, 32, 16, "bf16", "nhd")
    with client.pool("x", writable=True) as pool:
        assert needs.misfit(pool.geometry) is None
    with pytest.raises(tinyserve.ExistsError, match="x"):
        client.create_pool(needs.create_text("x", "host", 100, True))
    with pytest.raises(tinyserve.InvalidError, match="layers"):
        client.create_pool("y:layers=0")
    with pytest.raises(ValueError, match="NUL"):
        client.create_pool("y:\0")
    for i in range(20):  # more than one question's room
        client.create_pool(needs.create_text(f"y{i}", "host", 16, False))
    assert len(client.pools()) == 22


def test_the_stanza_is_a_configuration(start_daemon, tmp_path):
    needs = needs_of(config(), "fp32")
    (tmp_path / "conf").write_text("[daemon]\n" + needs.stanza("x", "host", 100, True))
    said = subprocess.run([os.environ["TS_TEST_DAEMON"], "--check-config", "--config",
                           tmp_path / "conf"], check=True, text=True, stdout=subprocess.PIPE).stdout
    assert "x" in said


# ---- the identity of weights ----

DIGEST = "4efaa862df557e6ac4599fc8b7b64b99"
needs_xxhash = pytest.mark.skipif(importlib.util.find_spec("xxhash") is None,
                                  reason="no python3-xxhash")


def pieces(**content):
    return [(label, lambda data=data: data) for label, data in content.items()]


@needs_xxhash
def test_the_digest_is_of_labels_bytes_and_configuration():
    base = identity.digest_of(pieces(a=b"1", b=b"2"), {"x": 1})
    assert len(base) == 16
    assert identity.digest_of(reversed(pieces(a=b"1", b=b"2")), {"x": 1}, threads=1) == base
    assert identity.digest_of(pieces(a=b"1", b=b"2"), {"x": 1, "_name_or_path": "/m"}) == base
    others = [identity.digest_of(pieces(a=b"1", b=b"3"), {"x": 1}),
              identity.digest_of(pieces(a=b"2", b=b"1"), {"x": 1}),
              identity.digest_of(pieces(a=b"1", c=b"2"), {"x": 1}),
              identity.digest_of(pieces(a=b"1"), {"x": 1}),
              identity.digest_of(pieces(a=b"1", b=b"2"), {"x": 2}),
              identity.digest_of(pieces(a=b"1", b=b"2"), {})]
    assert len({base, *others}) == 7


@needs_xxhash
def test_the_digest_is_what_it_was():
    """What processes of several versions share must not change by accident."""
    assert identity.digest_of(pieces(a=b"1", b=b"2"), {"x": 1}).hex() == DIGEST



@needs_xxhash
def test_each_piece_is_read_once_and_by_several_threads():
    calls, both = [], threading.Barrier(2, timeout=30)

    def content():
        both.wait()  # nobody goes on alone
        calls.append(1)
        return b"x"
    identity.digest_of([("a", content), ("b", content)], {}, threads=2)
    assert len(calls) == 2


@needs_xxhash
def test_namespaces():
    digest = bytes(range(16))
    assert identity.namespace_of(digest) == b"hf-000102030405060708090a0b0c0d0e0f"
    salted = identity.namespace_of(digest, b"tenant")
    assert salted.startswith(identity.namespace_of(digest) + b"-") and len(salted) <= 64
    assert salted != identity.namespace_of(digest, b"other")


def test_without_xxhash(monkeypatch):
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(ImportError, match="pip install xxhash"):
        identity.digest_of([], {})


@needs_xxhash
def test_a_digest_is_remembered_by_the_files(tmp_path):
    model, memory = tmp_path / "model", identity.Remembered(tmp_path / "cache")
    model.mkdir()
    file = model / "a.safetensors"
    file.write_bytes(b"1")
    key = identity.files_key([file], b"s")
    assert memory.get(key) is None
    memory.put(key, bytes(16))
    assert identity.Remembered(tmp_path / "cache").get(key) == bytes(16)
    assert identity.files_key([file], b"t") != key
    os.utime(file, ns=(1, 1))
    changed = identity.files_key([file], b"s")
    file.unlink()
    file.write_bytes(b"1")
    os.utime(file, ns=(1, 1))
    assert len({key, changed, identity.files_key([file, file], b"s")}) == 3
    for i in range(70):
        memory.put(f"{i}", bytes([i] * 16))
    assert memory.get(key) is None and memory.get("69") == bytes([69] * 16)
    for broken in ("", "[]", '{"69": 1}', '{"69": "00"}'):
        (tmp_path / "cache/tinyserve/weights.json").write_text(broken)
        assert memory.get("69") is None
    nowhere = identity.Remembered("/proc/nowhere")
    nowhere.put("69", bytes(16))
    assert nowhere.get("69") is None
