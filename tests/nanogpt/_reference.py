"""A slow float64 twin of the GPT: NumPy, one sequence, one head and one query at a time."""

import math

import numpy as np


def rms_norm(x):
    return x / math.sqrt(sum(float(value) ** 2 for value in x) / len(x) + 1e-6)


def rotate(x, position, base):
    """Turn the pair (x[i], x[i + half]) by position * base^(-2i / size) radians, as a complex product."""
    half = len(x) // 2
    turned = np.empty(len(x))
    for i in range(half):
        z = complex(x[i], x[i + half]) * np.exp(1j * position * base ** (-2 * i / len(x)))
        turned[i], turned[i + half] = z.real, z.imag
    return turned


def attention(x, weights, config):
    """Causal attention over the rows of x, `(tokens, width)`, each already normalised."""
    if config.fused_qkv:
        w_q, w_k, w_v = np.split(weights["qkv.weight"], 3)
    else:
        w_q, w_k, w_v = weights["q.weight"], weights["k.weight"], weights["v.weight"]
    size = config.width // config.num_heads
    mixed = np.zeros_like(x)
    for head in range(config.num_heads):
        part = slice(head * size, (head + 1) * size)
        q, k, v = ([(w @ row)[part] for row in x] for w in (w_q, w_k, w_v))
        if config.qk_norm:
            q, k = [rms_norm(row) for row in q], [rms_norm(row) for row in k]
        if config.positions == "rotary":
            q = [rotate(row, t, config.rotary_base) for t, row in enumerate(q)]
            k = [rotate(row, t, config.rotary_base) for t, row in enumerate(k)]
        for t in range(len(x)):
            scores = [math.exp(q[t] @ k[s] / math.sqrt(size)) for s in range(t + 1)]
            mixed[t, part] = sum(score * v[s] for s, score in enumerate(scores)) / sum(scores)
    return mixed @ weights["out.weight"].T


def gpt(input_ids, weights, config):
    """Logits `(tokens, vocab_size)` of one sequence; `weights` is the model's state as float64 arrays."""
    x = np.array([weights["embedding.weight"][token] for token in input_ids])
    if config.positions == "learned":
        x += weights["positions.weight"][: len(x)]
    for layer in range(config.num_layers):
        prefix = f"blocks.{layer}.attention."
        own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        x = x + attention(np.array([rms_norm(row) for row in x]), own, config)
        for t in range(len(x)):
            hidden = weights[f"blocks.{layer}.mlp.up.weight"] @ rms_norm(x[t])
            x[t] = x[t] + weights[f"blocks.{layer}.mlp.down.weight"] @ np.maximum(hidden, 0) ** 2
    return np.array([weights["embedding.weight"] @ rms_norm(row) for row in x])
