"""What attach() gives: pools, the identity of weights, other processes, threads, the end."""

import json
import threading

import pytest
import torch

import tinyserve
import tinyserve.transformers as ts
from models import FAMILIES, cache_name, generate, llama, make, prompts, reference

POOL = "p:layers=3,kv_heads=2,head_dim=32,dtype=fp32,block_tokens=16,blocks=4096"


# ---- pools ----

def test_a_pool_is_made_once_and_found_again(attach, start_daemon):
    daemon = start_daemon()
    a, b = attach(llama(), url=daemon.url, tokens=1000), attach(llama(), url=daemon.url)
    assert a.pool_name == b.pool_name == "hf-3x2x32-fp32"
    with tinyserve.connect(daemon.url, wait=60) as client:
        made = {p.name: p for p in client.pools()}["hf-3x2x32-fp32"]
    assert (made.blocks, made.device) == (63, "host")
    assert made.geometry == tinyserve.Geometry(3, 2, 32, 16, "fp32", "nhd")


def test_a_pool_that_fits_is_found(attach, start_daemon):
    daemon = start_daemon("a:layers=2,kv_heads=2,head_dim=32,dtype=fp32,blocks=8",
                          "b:layers=3,kv_heads=2,head_dim=32,dtype=fp16,blocks=8",
                          "c:layers=3,kv_heads=2,head_dim=32,dtype=fp8_e4m3,blocks=9999", POOL,
                          "q:layers=3,kv_heads=2,head_dim=32,dtype=fp32,blocks=8")
    assert attach(llama(), url=daemon.url).pool_name == "p"
    # fp8 rounds: that is taken by its name alone
    model, inputs = llama(), prompts(30)
    kv = attach(model, url=daemon.url, pool="c")
    with torch.no_grad():
        plain = model(**inputs).logits
        rounded = model(**inputs, **{cache_name(model): kv.cache()}).logits
    assert 1e-3 < (rounded - plain).abs().max() < plain.abs().max() / 2


def test_a_named_pool_of_another_shape_is_refused(attach, start_daemon):
    daemon = start_daemon("a:layers=2,kv_heads=2,head_dim=32,dtype=fp32,blocks=8")
    with pytest.raises(tinyserve.InvalidError) as error:
        attach(llama(), url=daemon.url, pool="a", tokens=100)
    assert str(error.value) == (
        "pool 'a' has layers = 2, and the model has 3; this one would fit:\n[pool a]\nlayers = 3\n"
        "kv_heads = 2\nhead_dim = 32\ndtype = fp32\nblock_tokens = 16\nblocks = 7\ndevice = host\n")
    with pytest.raises(tinyserve.NotFoundError, match="nowhere"):
        attach(llama(), url=daemon.url, pool="nowhere")


def test_without_a_daemon(tmp_path):
    model = llama()
    with pytest.raises(tinyserve.DisconnectedError, match="is tinyserved running"):
        ts.attach(model, url=tmp_path / "s")
    assert model.config._attn_implementation == "sdpa" and "forward" not in vars(model.model)


# ---- the identity of weights ----

def found_by(attach, first, second, salts=(b"", b""), **how):
    """What a model finds of what another one has stored."""
    inputs = prompts(40)
    generate(first, inputs, attach(first, salt=salts[0], **how).cache(**inputs))
    return attach(second, salt=salts[1], **how).cache(**inputs).found


def test_equal_models_share(attach, start_daemon):
    assert found_by(attach, llama(), llama(), url=start_daemon(POOL).url) == 39


def one_weight(model):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3


def configuration(model):
    model.config.rms_norm_eps *= 2


@pytest.mark.parametrize("change", [one_weight, configuration])
def test_other_models_dont(attach, start_daemon, change):
    other = llama()
    change(other)
    assert found_by(attach, llama(), other, url=start_daemon(POOL).url) == 0


def test_salts_keep_equal_models_apart(attach, start_daemon):
    url = start_daemon(POOL).url
    assert found_by(attach, llama(), llama(), (b"x", b"y"), url=url) == 0
    assert found_by(attach, llama(), llama(), (b"x", b"x"), url=url) == 39


def test_weights_that_change_while_attached(attach):
    model, inputs = llama(), prompts(40)
    kv = attach(model)
    generate(model, inputs, kv.cache(**inputs))
    before, old = kv.namespace, model.lm_head.weight[0, 0].item()
    assert kv.cache(**inputs).found == 39
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert kv.cache(**inputs).found == 0 and kv.namespace != before
    with torch.no_grad():
        model.lm_head.weight[0, 0] = old
    assert kv.namespace == before
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    spaces = {before, kv.namespace}
    assert len(spaces) == 2
    for factor in (2, 3, 4):  # new memory may lie where the old one lay
        for _ in range(2):
            model.lm_head.weight.data = model.lm_head.weight.detach() * factor
        spaces.add(kv.namespace)
    assert len(spaces) == 5
    model.lm_head.weight.data.mul_(2)  # which torch doesn't tell
    kv.reread()
    assert kv.namespace not in spaces


def test_weights_that_change_beside_an_open_cache(attach):
    """What they come to isn't found by those who have the weights of before."""
    model, inputs = llama(), prompts(40)
    kv = attach(model)
    cache, weight = kv.cache(), model.model.layers[0].self_attn.k_proj.weight
    with torch.no_grad():
        weight[0, 0] += 1
        generate(model, inputs, cache)
        weight[0, 0] -= 1
    assert not cache.known and kv.cache(**inputs).found == 0

    cache, tokens = kv.cache(), inputs["input_ids"]
    with torch.no_grad():
        model(input_ids=tokens[:, :32], past_key_values=cache)
        model(input_ids=tokens[:, 32:33], past_key_values=cache)
        assert cache.known
        weight[0, 0] += 1
        for i in range(33, 40):
            model(input_ids=tokens[:, i:i + 1], past_key_values=cache)
        weight[0, 0] -= 1
    assert not cache.known and kv.cache(**inputs).found == 32

    cache = kv.cache()
    with torch.no_grad():
        model(input_ids=tokens[:, :34], past_key_values=cache)
        model(input_ids=tokens[:, 34:35], past_key_values=cache)
        weight.data[0, 0] += 1
        kv.reread()
        model(input_ids=tokens[:, 35:36], past_key_values=cache)
    assert not cache.known


def other_data(attention):
    attention.k_proj.weight.data = attention.k_proj.weight.data + 1


def other_module(attention):
    old = attention.k_proj
    attention.k_proj = torch.nn.Linear(old.in_features, old.out_features, bias=False)


def other_adapter(attention):
    attention.k_proj.active_adapters = ["another"]


@pytest.mark.parametrize("change", [other_data, other_module, other_adapter])
def test_what_is_replaced_beside_an_open_cache(attach, change):
    """Between two passes of one token each, before which weights are only glanced at."""
    model, inputs = llama(), prompts(40)
    model.model.layers[0].self_attn.k_proj.active_adapters = ["default"]
    kv, tokens = attach(model), inputs["input_ids"]
    first, cache = kv.namespace, kv.cache()
    with torch.no_grad():
        for i in range(34):
            model(input_ids=tokens[:, i:i + 1], past_key_values=cache)
        assert cache.known
        change(model.model.layers[0].self_attn)
        model(input_ids=tokens[:, 34:35], past_key_values=cache)
    assert not cache.known and kv.namespace != first


def test_a_model_that_was_made_in_inference_mode(attach):
    with torch.inference_mode():
        model = llama()
        inputs = prompts(40)
        kv = attach(model)
        want = reference(model, inputs)
        assert torch.equal(generate(model, inputs, kv.cache(**inputs)), want)
        assert kv.cache(**inputs).found == 39


def test_an_emptied_cache_takes_embeddings(attach):
    model, inputs = llama(), prompts(40)
    kv = attach(model)
    generate(model, inputs, kv.cache(**inputs))
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        want = model(inputs_embeds=embeds).logits
        for empty in (lambda c: c.reset(), lambda c: c.crop(-c.get_seq_length())):
            cache = kv.cache(**inputs)
            assert cache.found == 39
            empty(cache)
            got = model(inputs_embeds=embeds, past_key_values=cache).logits
            assert (got - want).abs().max() <= 1e-4 and not cache.known


def test_weights_are_read_once(attach, monkeypatch):
    """Also of models that write frequencies of their rotary embeddings in each pass."""
    reads, digest = [], ts.attached.weights.digest
    monkeypatch.setattr(ts.attached.weights, "digest", lambda *a: reads.append(1) or digest(*a))
    for family in ("llama", "phi3 longrope"):
        model, inputs = make(FAMILIES[family]()), prompts(40)
        kv = attach(model)
        for _ in range(3):
            generate(model, inputs, kv.cache(**inputs))
    assert len(reads) == 2


def test_what_others_have_put_there_stays(attach):
    """As accelerate does: functions of a module replaced by others."""
    model, calls, inputs = llama(), [], prompts(20)
    want, inner = reference(model, inputs), model.model.forward
    model.model.forward = own = lambda *a, **k: calls.append(1) or inner(*a, **k)
    with attach(model) as kv:
        assert torch.equal(generate(model, inputs, kv.cache(**inputs)), want)
    assert model.model.forward is own and len(calls) == 24


def test_adapters(attach):
    peft = pytest.importorskip("peft")
    inputs, kv, spaces = prompts(40), None, []
    model = peft.get_peft_model(llama(), peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), "a")
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["k_proj"], lora_alpha=3,
                                           init_lora_weights=False))
    model.eval()
    base = model.get_base_model()
    kv = attach(model)
    for adapter in ("a", "b", "a"):
        model.set_adapter(adapter)
        want = reference(base, inputs)
        found = kv.stats.found
        assert torch.equal(generate(base, inputs, kv.cache(**inputs)), want)
        spaces.append(kv.namespace)
        assert kv.stats.found - found == (39 if len(spaces) == 3 else 0)
    assert spaces[0] == spaces[2] != spaces[1]
    with model.disable_adapter():
        assert kv.namespace not in spaces
    prefix = peft.get_peft_model(llama(), peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ts.Unsupported, match="PREFIX_TUNING puts K and V of its own"):
        attach(prefix)


def test_an_identity_of_ones_own(attach):
    assert attach(llama(), identity=bytes(16), salt=b"").namespace == b"hf-" + b"0" * 32
    with pytest.raises(ValueError, match="16 bytes"):
        ts.attach(llama(), identity=b"x")


def test_an_identity_that_is_remembered_by_files(attach, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    llama().save_pretrained(tmp_path / "model")
    exact = attach(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), salt=b"").namespace
    reads = []
    digest = ts.attached.weights.digest
    monkeypatch.setattr(ts.attached.weights, "digest", lambda *a: reads.append(1) or digest(*a))

    def space(change=lambda model: None):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        change(model)
        kv = attach(model, identity="files", salt=b"")
        before = kv.namespace
        one_weight(model)  # once attached it is looked at exactly
        assert kv.namespace != before
        return before

    assert [space(), space()] == [exact, exact]
    assert len(reads) == 1 + 2  # the first time, and after each change

    def other_layer(model):
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(2)

    assert space(other_layer) != exact
    llama(seed=1).save_pretrained(tmp_path / "model")
    assert space() != exact
    with pytest.raises(ValueError, match="no files of"):
        attach(llama(), identity="files")


# ---- other processes ----

WORKER = """
import sys, json, torch
from models import *
import tinyserve.transformers as ts
torch.set_num_threads(1)
model, inputs = llama(), prompts(200)
inputs["input_ids"][:, 160:] += int(sys.argv[2])
with ts.attach(model, url=sys.argv[1], wait=60) as kv:
    sys.stdin.readline()
    out = generate(model, inputs, kv.cache(**inputs))
    print(json.dumps({"tokens": out[0].tolist(), "found": kv.stats.found}))
"""


def test_a_prefix_of_another_process(run_worker, start_daemon):
    url = start_daemon(POOL).url
    first = json.loads(run_worker(WORKER, url, "0").communicate("go\n", timeout=120)[0])
    second = json.loads(run_worker(WORKER, url, "1").communicate("go\n", timeout=120)[0])
    model, inputs = llama(), prompts(200)
    for n, got, found in ((0, first, 0), (1, second, 160)):
        inputs["input_ids"][:, 160:] += n
        assert got == {"tokens": reference(model, inputs)[0].tolist(), "found": found}


def test_processes_at_once_compute_a_prefix_once(run_worker, start_daemon):
    url = start_daemon(POOL).url
    workers = [run_worker(WORKER, url, str(n)) for n in range(3)]
    for worker in workers:  # all have their model before the first goes on
        worker.stdin.write("go\n")
        worker.stdin.flush()
    results = [json.loads(worker.communicate(timeout=120)[0]) for worker in workers]
    model = llama()
    for n, got in enumerate(results):
        inputs = prompts(200)
        inputs["input_ids"][:, 160:] += n
        assert got["tokens"] == reference(model, inputs)[0].tolist()


# ---- threads ----

def test_threads_of_a_server(attach):
    """Each has a session; all of them generate with one model at once."""
    model, connected = llama(), []
    kv = attach(model)
    connect = kv._sessions._connect
    kv._sessions._connect = lambda: connected.append(1) or connect()
    asked = {n: prompts(20 + n, seed=n % 3) for n in range(8)}
    want = {n: reference(model, inputs) for n, inputs in asked.items()}
    got, errors = {}, []

    def serve(n):
        try:
            for _ in range(3):
                got[n] = model.generate(**asked[n], max_new_tokens=24, do_sample=False,
                                        **{cache_name(model): kv.cache(**asked[n])})
                assert torch.equal(got[n], want[n])
        except BaseException as error:
            errors.append(error)

    for round_ in range(2):
        threads = [threading.Thread(target=serve, args=(n,)) for n in asked]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not errors and len(got) == len(asked)
    with tinyserve.connect(kv._how.url, wait=60) as client:
        assert client.pool(kv.pool_name).stats().sequences == 0
    assert len(connected) <= len(asked)  # ended threads' sessions are used again


def test_a_cache_of_another_thread(attach):
    model, inputs = llama(), prompts(30)
    kv, out = attach(model), []
    want, cache = reference(model, inputs), kv.cache(**inputs)
    thread = threading.Thread(target=lambda: out.append(
        model.generate(**inputs, max_new_tokens=24, do_sample=False,
                       **{cache_name(model): cache})))
    thread.start()
    thread.join()
    assert torch.equal(out[0], want)


# ---- the end ----

def test_closing(attach, daemon):
    model, inputs = llama(), prompts(30)
    want = reference(model, inputs)
    with attach(model) as kv:
        cache = kv.cache(**inputs)
        generate(model, inputs, cache)
    assert torch.equal(reference(model, inputs), want)
    with pytest.raises(tinyserve.DisconnectedError, match="attach it again"):
        kv.cache(**inputs)
    with pytest.raises(NotImplementedError, match="outside the forward pass"):
        generate(model, inputs, cache)
    kv.close()
    with attach(model) as kv:
        assert torch.equal(generate(model, inputs, kv.cache(**inputs)), want)


def test_a_first_pass_that_failed_leaves_the_cache_empty(attach, monkeypatch):
    model, inputs = llama(), prompts(30)
    want, cache = reference(model, inputs), attach(model).cache()
    with monkeypatch.context() as patched:
        patched.setattr(model.model.layers[1].mlp, "forward", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            generate(model, prompts(20, 25, 30), cache)
    assert cache.seqs == [] and cache.batch_size == -1
    assert torch.equal(generate(model, inputs, cache), want)


def test_a_daemon_that_was_replaced(attach, start_daemon):
    daemon, model, inputs = start_daemon(POOL), llama(), prompts(30)
    want = reference(model, inputs)
    kv = attach(model, url=daemon.url)
    cache, empty = kv.cache(**inputs), kv.cache()
    generate(model, inputs, kv.cache(), max_new_tokens=1)
    daemon.stop()
    with pytest.raises(tinyserve.Error):
        generate(model, inputs, cache)
    daemon.start()
    assert torch.equal(generate(model, inputs, empty), want)
    assert torch.equal(generate(model, inputs, kv.cache(**inputs)), want)
    with pytest.raises(tinyserve.DisconnectedError):
        generate(model, inputs, cache)


def test_compiled_models(attach):
    """torch.compile() leaves the attention and what is around a pass as it is."""
    model, inputs = llama(), prompts(30, 12)
    want, kv = reference(model, inputs), attach(model)
    inner = model.forward
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(generate(model, inputs, kv.cache(**inputs)), want)
    model.forward = inner
    with torch.no_grad():
        plain = model(**prompts(30)).logits
        compiled = torch.compile(model, backend="eager")
        got = compiled(**prompts(30), **{cache_name(model): kv.cache()}).logits
    assert (got - plain).abs().max() <= 1e-4
