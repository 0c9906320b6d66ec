"""Two processes that don't know each other compute their common prefix once.

    shared_prefix.py QUESTION & shared_prefix.py ANOTHER & wait

Each has the same long instructions and a question of its own. Whoever asks first for the
instructions computes them; the other waits for that, and finds them by their tokens. There is no
agreement between the two but the pool and the namespace, which names the model.
"""

import sys

import numpy as np

import tinyserve

NAMESPACE = b"tinyserve/examples/shared_prefix"
INSTRUCTIONS = 8 * (b"You are a helpful assistant. Answer in one sentence, and say if you don't "
                    b"know. ")


def compute(kv, seq, tokens, first):
    """Stands for a model: K, V and q are made of the tokens' ids and positions."""
    place = np.arange(first, first + len(tokens), dtype=np.float32)[:, None, None]
    rows = np.sin(np.asarray(tokens, np.float32)[:, None, None] + place)
    with kv.step([seq], [len(tokens)], tokens=tokens) as step:
        for layer in range(kv.geometry.layers):
            step.q[...] = step.k[...] = step.v[...] = np.broadcast_to(rows, step.k.shape)
            step.run(layer)
        answer = float(step.out.numpy()[-1].sum())
        step.commit()
    return answer


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: shared_prefix.py QUESTION")
    prompt = list(INSTRUCTIONS + sys.argv[1].encode())  # a token for each byte
    with tinyserve.connect() as client, client.pool("") as kv:
        chat, found = kv.match(prompt, NAMESPACE, wait=30)
        answer = compute(kv, chat, prompt[found:], found)
        print(f"{len(prompt)} tokens: {found} found, {len(prompt) - found} computed; "
              f"answer {answer:.6f}")


if __name__ == "__main__":
    main()
