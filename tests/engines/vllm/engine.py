#!/usr/bin/env python3
"""engine.py SETTINGS: a vLLM with the demo's model, that obeys its standard input.

SETTINGS is JSON: "url" of the daemon (none: without the connector), "llm" arguments of vllm.LLM,
"extra" keys of kv_connector_extra_config. Each line of the input is JSON: {"do": command, ...};
each answer is a line of JSON on the standard output."""

import json
import os
import pathlib
import sys
import time

MODEL = pathlib.Path(__file__).parents[3] / "tools/model"


class Engine:
    def __init__(self, settings):
        from vllm import LLM
        more = dict(settings.get("llm", {}))
        if settings.get("url"):
            more["kv_transfer_config"] = {
                "kv_connector": "TinyServeConnector", "kv_role": "kv_both",
                "kv_connector_extra_config": {"url": settings["url"], **settings.get("extra", {})}}
        self.llm = LLM(**{
            "model": str(MODEL), "skip_tokenizer_init": True, "dtype": "float32",
            "enforce_eager": True, "max_model_len": 1536, "max_num_seqs": 8, "block_size": 32,
            "enable_prefix_caching": True, "disable_log_stats": True, **more})

    def _scheduler(self):
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    def generate(self, prompts, tokens, salt=None):
        """Of each prompt the ids that come, how many of its tokens weren't computed, and the
        seconds of all together."""
        from vllm import SamplingParams
        how = SamplingParams(temperature=0, max_tokens=tokens, detokenize=False, ignore_eos=True)
        given = [{"prompt_token_ids": p, **({"cache_salt": salt} if salt else {})} for p in prompts]
        begun = time.perf_counter()
        outputs = self.llm.generate(given, how, use_tqdm=False)
        seconds = time.perf_counter() - begun
        return {"ids": [list(o.outputs[0].token_ids) for o in outputs],
                "found": [o.num_cached_tokens for o in outputs], "seconds": seconds}

    def forget(self):
        """Empties the engine's own cache, so that it must ask the pool."""
        return self.llm.reset_prefix_cache()

    def reset(self):
        """The same with reset_connector, as after a change of weights."""
        return self.llm.reset_prefix_cache(reset_connector=True)

    def stats(self):
        from vllm.distributed.kv_transfer import get_kv_transfer_group
        connector = self._scheduler().connector
        waits = sorted(connector._finder.waits)
        return {"finder": vars(connector._finder.stats), "waits": waits,
                "store": vars(get_kv_transfer_group()._store.stats)}

    def clear_waits(self):
        self._scheduler().connector._finder.waits.clear()

    def lose_pins(self, count):
        """The next tickets are good for nothing when the worker has them: as if their time were
        over, or the daemon another one."""
        finder = self._scheduler().connector._finder
        take = finder.take

        def lost(key):
            nonlocal count
            least, ticket = take(key)
            if count > 0:
                count -= 1
                ticket = bytes(len(ticket))
            return least, ticket

        finder.take = lost


def main():
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints is no answer
    try:
        engine = Engine(json.loads(sys.argv[1]))
    except Exception as error:  # the test says which it expects
        print(json.dumps({"refused": f"{type(error).__name__}: {error}"}), file=out)
        return
    print(json.dumps({"ready": True}), file=out)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(getattr(engine, asked.pop("do"))(**asked)), file=out)


if __name__ == "__main__":  # vLLM's own processes import this file
    main()
