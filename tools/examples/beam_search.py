"""Beam search by forks: beams share the blocks of all that they have in common.

    beam_search.py [WIDTH [TOKENS]]        4 beams, 24 tokens

Each step computes one token for every beam, in one call for all layers' K and V. The winners' new
beams then go on from their parents (`kv.select`): nothing is copied but a shared last block when it
is written, and losers are freed in the same call. At the end the best beam's score is computed anew
in one go, without forks, to show that it is the same.
"""

import sys

import numpy as np

import tinyserve

VOCABULARY = 50
NAMESPACE = b"tinyserve/examples/beam_search"
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]


class Model:
    """A stand-in for a language model: random weights, and attention in the pool."""

    def __init__(self, kv):
        self.kv, g = kv, kv.geometry
        self.heads, self.dim = 2 * g.kv_heads, g.head_dim
        random = np.random.default_rng(7)
        size = self.heads * g.head_dim
        self.embedding = random.standard_normal((VOCABULARY, size), np.float32)
        self.head = random.standard_normal((size, VOCABULARY), np.float32) / np.float32(size ** 0.5)
        self.keys, self.values = (
            random.standard_normal((g.layers, size, g.kv_heads * g.head_dim), np.float32)
            / np.float32(size ** 0.5) for _ in range(2))

    def logprobs(self, seqs, tokens):
        """Adds the tokens (a list for each sequence) and returns the logarithms of the
        probabilities of what follows each: [all tokens][VOCABULARY]."""
        flat = [token for own in tokens for token in own]
        state = self.embedding[flat]
        counts = [len(own) for own in tokens]
        with self.kv.step(seqs, counts, heads=self.heads, tokens=flat) as step:
            for layer in range(self.kv.geometry.layers):
                step.q[...] = state.reshape(len(flat), self.heads, self.dim)
                step.k[...] = (state @ self.keys[layer]).reshape(len(flat), -1, self.dim)
                step.v[...] = (state @ self.values[layer]).reshape(len(flat), -1, self.dim)
                step.run(layer, rope_theta=10000.0)
                state = state / 2 + step.out.numpy().reshape(state.shape)
            step.commit()
        logits = state @ self.head
        highest = logits.max(axis=1, keepdims=True)
        return logits - highest - np.log(np.exp(logits - highest).sum(axis=1, keepdims=True))


def search(model, width, tokens):
    """The best `width` continuations, as (score, tokens), the best first."""
    kv = model.kv
    first, = kv.create(1, NAMESPACE)
    next_token = model.logprobs([first], [PROMPT])[-1:]
    seqs, scores, texts = [first], np.zeros(1), [[]]
    for i in range(tokens):
        total = scores[:, None] + next_token
        best = np.argsort(-total, axis=None, kind="stable")[:width]
        parents, chosen = np.unravel_index(best, total.shape)
        seqs = kv.select(seqs, parents.tolist())
        scores = total[parents, chosen]
        texts = [texts[p] + [int(t)] for p, t in zip(parents, chosen)]
        if i + 1 < tokens:
            next_token = model.logprobs(seqs, [[text[-1]] for text in texts])
    room = kv.stats()
    alone = len(seqs) * -(-(len(PROMPT) + tokens - 1) // kv.geometry.block_tokens)
    kv.forget(seqs)
    return list(zip(scores, texts)), room.used, alone


def score(model, text):
    """What the continuation is worth, computed in one go."""
    seq, = model.kv.create(1, NAMESPACE)
    after = model.logprobs([seq], [PROMPT + text[:-1]])[len(PROMPT) - 1:]
    model.kv.forget([seq])
    return sum(row[token] for row, token in zip(after, text))


def main():
    width, tokens = (int(a) for a in (sys.argv[1:] + ["4", "24"][len(sys.argv) - 1:]))
    with tinyserve.connect() as client, client.pool("") as kv:
        model = Model(kv)
        beams, used, alone = search(model, width, tokens)
        for worth, text in beams:
            print(f"{worth:9.4f}  {' '.join(map(str, text))}")
        print(f"{used} blocks hold what {alone} would without sharing")
        again = score(model, beams[0][1])
        if abs(again - beams[0][0]) > 1e-3:
            sys.exit(f"computed without forks, the best beam is worth {again:.4f}")


if __name__ == "__main__":
    main()
