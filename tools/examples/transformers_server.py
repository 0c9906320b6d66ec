#!/usr/bin/env python3
"""transformers_server.py MODEL [PORT]: serves a Transformers model over HTTP, with K and V in a
pool of TinyServe: what other requests, and other servers of the same model, have computed of a
prompt's beginning isn't computed again.

    curl -d '{"prompt": "Once upon a time", "tokens": 20}' http://localhost:8000/
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from transformers import AutoModelForCausalLM, AutoTokenizer

import tinyserve.transformers as ts


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        inputs = tokenizer(asked["prompt"], return_tensors="pt").to(model.device)
        with kv.cache(**inputs) as cache:
            found = cache.found
            out = model.generate(**inputs, past_key_values=cache, do_sample=False,
                                 max_new_tokens=asked.get("tokens", 50))
        text = tokenizer.decode(out[0, inputs["input_ids"].shape[1]:])
        body = json.dumps({"text": text, "found": found}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with ts.attach(model) as kv:  # the daemon is the user's own, or TINYSERVE_URL's
    server = ThreadingHTTPServer(("localhost", int(sys.argv[2]) if sys.argv[2:] else 8000), Handler)
    print(f"http://localhost:{server.server_port}/", flush=True)
    server.serve_forever()
