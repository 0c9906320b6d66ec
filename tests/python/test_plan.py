"""tsctl plan: a model's config.json and a node, and what the daemon itself makes of the answer."""

import json
import os
import re
import subprocess

import pytest

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
         "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
         "torch_dtype": "bfloat16", "max_position_embeddings": 131072}


@pytest.fixture
def plan(tmp_path):
    """Runs tsctl plan for a model and returns the process."""

    def run(model, *arguments, memory="60G", tokens=8192):
        file = tmp_path / "config.json"
        file.write_text(model if isinstance(model, str) else json.dumps(model))
        return subprocess.run(
            [os.environ["TS_TEST_TSCTL"], "plan", "--model", file, "--memory", memory, "--tokens",
             str(tokens), *arguments], check=False, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, timeout=60,
            env={**os.environ, "TINYSERVE_URL": "/nowhere"})  # it asks no daemon

    return run


def figures(result):
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)


def test_figures_are_those_of_the_documents_formula(plan):
    got = figures(plan(LLAMA, "--json"))
    assert (got["layers"], got["kv_heads"], got["head_dim"], got["dtype"]) == (32, 8, 128, "bf16")
    assert got["block_tokens"] == 16 and got["block_bytes"] == 2 * 32 * 8 * 128 * 2 * 16
    assert got["blocks"] == (60 << 30) // got["block_bytes"] == 30720
    assert got["sequence_blocks"] == 512 and got["sequences"] == got["node_sequences"] == 60
    assert [c["block_tokens"] for c in got["choices"]] == [8, 16, 32, 64, 128]
    text = plan(LLAMA).stdout
    assert "             60 sequences\n" in text and " 16 tokens    2.0 MiB     0.0%" in text


def test_a_node_has_a_pool_on_each_gpu_and_a_model_may_take_several(plan):
    got = figures(plan(LLAMA, "--json", "--gpus=8"))
    assert (got["sequences"], got["node_sequences"]) == (60, 480)
    got = figures(plan(LLAMA, "--json", "--gpus=8", "--tensor-parallel=2"))
    assert got["kv_heads"] == 4 and (got["sequences"], got["node_sequences"]) == (120, 480)
    got = figures(plan(LLAMA, "--json", "--tensor-parallel=16"))  # each head twice
    assert got["kv_heads"] == 1 and (got["sequences"], got["node_sequences"]) == (480, 480)


def test_a_shared_beginning_counts_once(plan):
    got = figures(plan(LLAMA, "--json", "--shared=2007"))
    assert got["shared_blocks"] == 125  # full ones
    assert got["sequences"] == (30720 - 125) // (512 - 125) == 79
    # Of a prompt that all is shared of, each computes the last token.
    got = figures(plan(LLAMA, "--json", "--shared=8192", "--block-tokens=16"))
    assert (got["shared_blocks"], got["sequences"]) == (511, 30720 - 511)


@pytest.mark.parametrize("tokens, usual, half, recommended", [
    (16, 640, 640, 16), (24, 320, 426, 8), (104, 91, 98, 8), (136, 71, 75, 8), (264, 37, 38, 16)])
def test_a_block_of_16_is_recommended_unless_tails_waste_a_twentieth(plan, tokens, usual, half,
                                                                     recommended):
    got = figures(plan(LLAMA, "--json", tokens=tokens, memory=f"{640 * 2}M"))
    choice = {c["block_tokens"]: c["sequences"] for c in got["choices"]}
    assert (choice[16], choice[8], got["block_tokens"]) == (usual, half, recommended)
    assert figures(plan(LLAMA, "--json", "--block-tokens=24"))["block_tokens"] == 24


@pytest.mark.parametrize("layers", [32, 40, 61])
def test_the_daemon_makes_the_same_pool_of_the_section(plan, tmp_path, layers):
    model = {**LLAMA, "num_hidden_layers": layers, "num_key_value_heads": 1, "head_dim": 32}
    node = {"tokens": 1200000, "memory": "10G"}
    result = plan(model, **node)
    file = tmp_path / "tinyserved.conf"
    file.write_text(result.stdout[result.stdout.index("[pool llama]"):] + "device = host\n")
    told = subprocess.run([os.environ["TS_TEST_DAEMON"], "--check-config", "--config", file],
                          check=True, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT).stdout
    got = figures(plan(model, "--json", **node))
    assert f"{got['blocks']} blocks of " in told, told
    assert "sequence_tokens = 1200000" in file.read_text()
    assert "\n[pool model]\n" in plan({**LLAMA, "model_type": "a]\nb"}).stdout


@pytest.mark.parametrize("change, expected", [
    ({"head_dim": 64}, (32, 8, 64, "bf16")),
    ({"torch_dtype": None, "dtype": "float16"}, (32, 8, 128, "fp16")),
    ({"num_key_value_heads": None}, (32, 32, 128, "bf16")),
    ({"num_key_value_heads": None, "multi_query": True}, (32, 1, 128, "bf16")),
    ({"layer_types": ["sliding_attention", "full_attention"]}, (32, 8, 128, "bf16")),
    ({"v_head_dim": 128}, (32, 8, 128, "bf16")),
])
def test_models_of_several_makes_are_read(plan, change, expected):
    got = figures(plan({**LLAMA, **change}, "--json"))
    assert tuple(got[k] for k in ("layers", "kv_heads", "head_dim", "dtype")) == expected


def test_old_names_and_a_part_for_text_are_read(plan):
    gpt2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "model_type": "gpt2"}
    result = plan(gpt2)
    assert "12 layers, 12 KV heads of 64, bf16" in result.stdout
    assert "the file says no type; bf16 is assumed" in result.stdout
    sees = {"architectures": ["Gemma3ForConditionalGeneration"], "torch_dtype": "bfloat16",
            "model_type": "gemma3", "vision_config": {"num_hidden_layers": 27},
            "text_config": {"num_hidden_layers": 48, "num_attention_heads": 16, "head_dim": 256,
                            "num_key_value_heads": 8, "sliding_window": 1024}}
    result = plan(sees)
    assert "48 layers, 8 KV heads of 256, bf16" in result.stdout
    assert "layers with a window of 1024 tokens keep all tokens" in result.stdout


@pytest.mark.parametrize("change, told", [
    ({"kv_lora_rank": 512}, r"latent row .*\(kv_lora_rank\)"),
    ({"layers_block_type": ["mamba"]}, r"keep a state .*\(layers_block_type\)"),
    ({"layer_types": ["full_attention", "linear_attention"]}, "layer 1 is 'linear_attention'"),
    ({"v_head_dim": 64}, "v_head_dim is 64 where other heads have 128"),
    ({"global_head_dim": 512}, "global_head_dim is 512"),
    ({"is_encoder_decoder": True}, "has an encoder"),
    ({"num_key_value_heads": [8, 4]}, "num_key_value_heads differs from layer to layer"),
    ({"num_hidden_layers": 257}, "layers is 257; 1..256|257"),
    ({"head_dim": 512}, "head_dim"),
    ({"num_hidden_layers": -1}, "num_hidden_layers is not a whole number of 1 to 4294967295"),
    ({"num_hidden_layers": None}, "there is no num_hidden_layers: is it the config.json"),
    ({"hidden_size": 4097}, "hidden_size is 4097, which 32 heads can't share"),
])
def test_what_no_pool_can_hold_is_refused_by_name(plan, change, told):
    result = plan({**LLAMA, **change})
    assert result.returncode == 1 and result.stdout == ""
    assert re.search(told, result.stderr), result.stderr
    assert result.stderr.startswith("tsctl: ") and "config.json: " in result.stderr


def test_files_and_requests_that_make_no_sense_are_refused(plan, tmp_path):
    assert "is no JSON object: " in plan("{").stderr
    assert "is no JSON object: another value" in plan("[]").stderr
    tsctl = os.environ["TS_TEST_TSCTL"]

    def error(*arguments):
        result = subprocess.run([tsctl, *arguments], check=False, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
        return result.returncode, result.stderr.splitlines()[0]

    assert error("plan") == (2, "tsctl: plan needs --model FILE, --memory SIZE and --tokens N")
    assert error("plan", "--model", tmp_path / "none", "--memory=1G", "--tokens=1") == (
        1, f"tsctl: {tmp_path / 'none'}: No such file or directory")
    assert error("status", "--tokens=1")[0] == 2
    for wrong in "0", "-1", "1X", "", "99999999999999999999", "17179869184T":
        code, told = error("plan", f"--memory={wrong}")
        assert code == 2 and f"--memory {wrong}: a whole number of 1 to" in told
    assert error("plan", "--dtype=int8")[1].startswith("tsctl: --dtype int8: known are fp32, ")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    of_folder = ("plan", "--model", tmp_path, "--tokens=8192")
    assert error(*of_folder, "--memory=1023M") == (
        1, "tsctl: not one sequence of 8192 tokens fits: it takes 1.0 GiB")
    assert error(*of_folder, "--memory=1G", "--shared=8193") == (
        2, "tsctl: --shared 8193 is more than --tokens 8192")
    assert error(*of_folder, "--memory=1G", "--gpus=8", "--tensor-parallel=3") == (
        2, "tsctl: 8 GPUs can't be shared by models that take 3 each")
    assert error(*of_folder, "--memory=1G", "--tensor-parallel=3") == (
        2, "tsctl: 8 KV heads can't be shared by 3 GPUs")
    assert error(*of_folder[:3], "--tokens=5000000", "--memory=1T", "--block-tokens=16") == (
        1, "tsctl: --tokens 5000000 makes 312500 blocks of 16; a sequence has 262144 at most")


def test_a_long_sequence_gets_blocks_that_its_table_has_room_for(plan):
    got = figures(plan(LLAMA, "--json", memory="2T", tokens=5000000))
    assert got["block_tokens"] == 32 and got["sequence_blocks"] == 156250
