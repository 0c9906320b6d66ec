"""tools/examples/transformers_server.py with the tiny real model of tools/model."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import urllib.request

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model, with a tokenizer: its tokens are bytes."""
    folder = tmp_path_factory.mktemp("model")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ROOT / "tools/model" / name, folder)
    letters = pre_tokenizers.ByteLevel.alphabet()
    plain = [chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    others = sorted(set(letters) - set(plain))
    of_byte = {ord(c): c for c in plain}
    of_byte |= dict(zip((b for b in range(256) if b not in of_byte), others))
    tokenizer = Tokenizer(models.BPE(vocab={c: b for b, c in of_byte.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def ask(url, prompt):
    data = json.dumps({"prompt": prompt, "tokens": 20}).encode()
    with urllib.request.urlopen(url, data, timeout=60) as reply:
        return json.loads(reply.read())


def test_two_servers_share_what_their_prompts_have_in_common(daemon, folder):
    prefix = (ROOT / "tools/model/prefix.txt").read_text()
    prompts = [prefix + end for end in (" Anna", " The dog", " One day", " But")]
    servers = [subprocess.Popen(
        [sys.executable, "-W", "ignore", ROOT / "tools/examples/transformers_server.py", folder,
         "0"], stdout=subprocess.PIPE, text=True, env={**os.environ, "TINYSERVE_URL": daemon.url})
        for _ in range(2)]
    try:
        urls = [s.stdout.readline().strip() for s in servers]
        first = ask(urls[0], prompts[0])
        answers = {}
        threads = [threading.Thread(target=lambda i=i: answers.update({i: ask(urls[i % 2],
                                                                              prompts[i])}))
                   for i in range(1, 4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        for s in servers:
            s.terminate()
            s.wait()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for i, answer in {0: first, **answers}.items():
        ids = torch.tensor([list(prompts[i].encode())])
        want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20,
                              do_sample=False)[0, ids.shape[1]:]
        common = len(os.path.commonprefix(prompts))
        assert answer == {"text": bytes(want.tolist()).decode(), "found": common if i else 0}
