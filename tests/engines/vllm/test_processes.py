"""One engine whose scheduler and worker are processes of their own, with chunked prefill, and pages
of another size than the programs beside it: ts-generate, and the Transformers adapter."""

import json
import os
import subprocess
import sys

import pytest
import xxhash

import tinyserve
from conftest import HERE, REFERENCE, wait_until

PROMPTS = [p["prompt_ids"] for p in REFERENCE]
GENERATED = [p["output_ids"] for p in REFERENCE]
MODEL = HERE.parents[2] / "tools/model"
IDENTITY = "0123456789abcdef" * 2
# The namespace that ts-generate has for this model.
NAMESPACE = "generate:" + xxhash.xxh3_64_hexdigest((MODEL / "model.safetensors").read_bytes())
TRANSFORMERS = """
import json, sys, torch, transformers, tinyserve.transformers as ts
torch.set_num_threads(2)
url, model, identity, prompt = sys.argv[1:5]
model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
ids = torch.tensor([json.loads(prompt)])
with ts.attach(model, url=url, pool="kv", identity=bytes.fromhex(identity)) as kv:
    cache = kv.cache(ids)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=192, do_sample=False,
                         attention_mask=torch.ones_like(ids), eos_token_id=None)
    print(json.dumps([cache.found, out[0, ids.shape[1]:].tolist()]))
"""


@pytest.fixture(scope="module")
def engines(daemon, start_engine):
    """Chunks of 64 tokens and pages of 32, so few that requests are preempted; pages of 64, and
    ts-generate's namespace; and one that schedules ahead and whose tickets' time is over at
    once."""
    apart = {"distributed_executor_backend": "mp"}
    pair = [start_engine(daemon.url, processes=True, extra={"identity": IDENTITY},
                         llm={**apart, "max_num_batched_tokens": 64,
                              "num_gpu_blocks_override": 50}),
            start_engine(daemon.url, processes=True, extra={"namespace": NAMESPACE},
                         llm={**apart, "block_size": 64}),
            start_engine(daemon.url, processes=True,
                         extra={"identity": IDENTITY, "ticket_ttl": 0.001},
                         llm={**apart, "async_scheduling": True, "max_num_batched_tokens": 128})]
    for engine in pair:
        assert engine.ready() is None
    return pair


def transformers(daemon, prompt):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", TRANSFORMERS, daemon.url,
                           str(MODEL), IDENTITY, json.dumps(prompt)], check=True, text=True,
                          stdout=subprocess.PIPE, timeout=120)
    return json.loads(done.stdout.splitlines()[-1])


def ts_generate(daemon, index):
    """How many tokens of this prompt ts-generate finds; it compares all bytes with the
    reference."""
    done = subprocess.run([os.environ["TS_TEST_GENERATE"], "--socket", daemon.url, "--pool", "kv",
                           "--model", str(MODEL), "--verify", f"{MODEL}/reference.json:{index}"],
                          check=True, text=True, stderr=subprocess.PIPE,
                          stdout=subprocess.DEVNULL, timeout=120)
    words = done.stderr.split()
    return int(words[words.index("them") - 2])


def test_worker_processes_chunked_prefill_and_preemptions(daemon, engines):
    first = engines[0]
    assert first.generate(PROMPTS, tokens=192)["ids"] == GENERATED
    assert first.ask("forget")
    again = first.generate(PROMPTS, tokens=192)
    assert again["ids"] == GENERATED
    assert again["found"][:4] == [len(p) - 1 for p in PROMPTS[:4]]


def test_lost_pins_of_an_engine_that_schedules_ahead(daemon, engines):
    """A step is scheduled before it is known that the loads of the one before it have failed."""
    first, ahead = engines[0], engines[2]
    long = (PROMPTS[0] + GENERATED[0] + PROMPTS[1] + GENERATED[1])[:900]
    cold = first.generate([long], salt="reference")["ids"]
    first.generate([long[:600]], tokens=1, salt="ahead")
    first.generate(PROMPTS[:4], tokens=1, salt="ahead")
    want = cold + [g[:48] for g in GENERATED]
    assert ahead.generate([long] + PROMPTS, salt="ahead")["ids"] == want
    assert first.ask("forget")
    again = first.generate([long] + PROMPTS, salt="ahead")
    assert again["ids"] == want and again["found"][0] > 600
    assert "weren't loaded and are computed" in ahead.log()


def test_transformers_reads_what_vllm_stored_and_the_other_way_round(daemon, engines):
    first = engines[0]
    first.generate(PROMPTS[:1], tokens=192)
    found, ids = transformers(daemon, PROMPTS[0] + GENERATED[0][:50])
    assert found >= 320 and ids[:142] == GENERATED[0][50:]
    prompt = PROMPTS[7] * 20
    found, ids = transformers(daemon, prompt)
    assert first.ask("forget")
    done = first.generate([prompt], tokens=192)
    assert done["found"] == [len(prompt) - 1] and done["ids"] == [ids]


def test_ts_generate_reads_what_vllm_stored_and_the_other_way_round(daemon, engines):
    second = engines[1]
    assert second.generate(PROMPTS[:1], tokens=192)["ids"] == GENERATED[:1]
    assert ts_generate(daemon, 0) == len(PROMPTS[0]) - 1
    ts_generate(daemon, 1)
    done = second.generate(PROMPTS[1:2], tokens=192)
    assert done["ids"] == GENERATED[1:2] and done["found"] == [len(PROMPTS[1]) - 1]


def test_an_engine_that_is_killed_leaves_nothing_behind(daemon, engines):
    first = engines[0]
    with tinyserve.connect(daemon.url) as client, client.pool("kv") as pool:
        before = pool.stats().cached
        first.begin("generate", prompts=PROMPTS, tokens=192, salt="killed")
        wait_until(lambda: pool.stats().cached > before)  # it generates, and has stored some
        first.kill()
        wait_until(lambda: pool.stats().used == 0)  # tickets end with their time
        assert pool.stats().pinned == 0
