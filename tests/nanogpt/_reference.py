"""A slow float64 twin of the GPT: NumPy, one sequence, one head and one query at a time."""

import math

import numpy as np


def rms_norm(x):
    return x / math.sqrt(sum(float(value) ** 2 for value in x) / len(x) + 1e-6)


def rotate(x, position, config):
    """Turn the pair (x[i], x[i + half]) by position * frequency(i) radians, as a complex product."""
    half = len(x) // 2
    turned = np.empty(len(x))
    for i in range(half):
        if config.rotary_frequencies == "full":
            frequency = config.rotary_base ** (-2 * i / len(x))
        else:
            frequency = 1024 ** (-i / (half // 2 - 1)) if i < half // 2 else 0
        z = complex(x[i], x[i + half]) * np.exp(1j * position * frequency)
        turned[i], turned[i + half] = z.real, z.imag
    return turned


def sees(query, key, tokens, config, layer, window):
    """Whether the token at one position sees that at another."""
    if key > query:
        return False
    if config.document_mask and config.eos_token in tokens[key + 1 : query + 1]:
        return False
    if window is None:
        return True
    if config.window_pattern == "long_short":
        pattern = ["long", "short", "short", "short"] * config.num_layers
        if pattern[min(layer, config.num_layers - 1 - layer)] == "short":
            window = max(window // 2, 1)
    if config.mask_block is not None:
        return query // config.mask_block - key // config.mask_block < math.ceil(window / config.mask_block)
    return query - key < window


def value_table(config, layer):
    """The number of the table that is mixed into a layer's values."""
    if config.value_mix == "layer":
        return layer
    if config.value_mix == "mirrored":
        return min(layer, config.num_layers - 1 - layer)
    if config.value_mix == "sparse":
        tables = {1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 6: 2}.get(config.num_layers, 3)
        left = config.num_layers - layer
        return layer if layer < tables else tables - left if left <= tables else None
    return None


def attention(x, weights, config, layer, tokens, window, mixed_in):
    """Attention over the rows of x, `(tokens, width)`, each already normalised; also its values before mixing."""
    if config.fused_qkv:
        w_q, w_k, w_v = np.split(weights["qkv.weight"], 3)
    else:
        w_q, w_k, w_v = weights["q.weight"], weights["k.weight"], weights["v.weight"]
    values = np.array([w_v @ row for row in x])
    mixed_values = values
    if mixed_in is not None:
        a = weights["value_weights"]
        own = a[0] if config.value_weights == "two" else 1 - a[0]
        mixed_values = own * values + a[-1] * mixed_in
    size = config.width // config.num_heads
    scale = 1 / math.sqrt(size) if config.attention_scale is None else config.attention_scale
    mixed = np.zeros_like(x)
    for head in range(config.num_heads):
        part = slice(head * size, (head + 1) * size)
        q, k = ([(w @ row)[part] for row in x] for w in (w_q, w_k))
        if config.qk_norm:
            q, k = [rms_norm(row) for row in q], [rms_norm(row) for row in k]
        if config.positions == "rotary":
            q, k = ([rotate(row, t, config) for t, row in enumerate(rows)] for rows in (q, k))
        for t in range(len(x)):
            seen = [s for s in range(len(x)) if sees(t, s, tokens, config, layer, window)]
            scores = [math.exp(q[t] @ k[s] * scale) for s in seen]
            mixed[t, part] = sum(score * mixed_values[s, part] for score, s in zip(scores, seen, strict=True))
            mixed[t, part] /= sum(scores)
    return mixed @ weights["out.weight"].T, values


def float8(x, mantissa, smallest, largest):
    """Round to so many bits of mantissa, halves to even, with steps no finer than those at 2^smallest."""
    exponent = np.maximum(np.floor(np.log2(np.abs(x) + 1e-300)), smallest)
    step = 2.0 ** (exponent - mantissa)
    return np.clip(np.round(x / step) * step, -largest, largest)


def e4m3(x):
    return float8(x, 3, -6, 448)


def e5m2(x):
    return float8(x, 2, -14, 57344)


def head(x, weights, config):
    """Logits of one token."""
    matrix = weights["embedding.weight"] if config.tied_head else weights["head.weight"]
    logits = matrix @ x if config.fp8 == "off" else e4m3(32 * matrix) @ e4m3(2 * x) / 64
    c = config.softcap
    if c is None:
        return logits
    if config.softcap_kind == "tanh":
        return np.array([c * math.tanh(z / c) for z in logits])
    return np.array([2 * c / (1 + math.exp(-z / (0.5 * c * math.sqrt(config.width)))) for z in logits])


def gpt(input_ids, weights, config, window=None):
    """Logits `(tokens, vocab_size)` of one sequence; `weights` is the model's state as float64 arrays."""
    x = np.array([weights["embedding.weight"][token] for token in input_ids])
    if config.positions == "learned":
        x += weights["positions.weight"][: len(x)]
    if config.embedding_norm:
        x = np.array([rms_norm(row) for row in x])
    x0, outputs, first = x, [], None
    without = {4: 2, 5: 3, 12: 7, 36: 19, 48: 25}[config.num_layers] if config.skip_attention else None
    for layer in range(config.num_layers):
        twin = config.num_layers - 1 - layer
        if config.unet and layer > twin:
            x = x + weights["skip_weights"][config.num_layers // 2 - 1 - twin] * outputs[twin]
        if config.x0_mix:
            a = weights[f"blocks.{layer}.x0_weights"]
            x = a[0] * x + a[1] * x0
        if layer != without:
            prefix = f"blocks.{layer}.attention."
            own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            table = value_table(config, layer)
            mixed_in = first if config.value_mix == "first" else None
            if table is not None:
                mixed_in = np.array([weights[f"value_tables.{table}.weight"][token] for token in input_ids])
            normed = np.array([rms_norm(row) for row in x])
            update, values = attention(normed, own, config, layer, input_ids, window, mixed_in)
            first, x = values if layer == 0 else first, x + update
        for t in range(len(x)):
            hidden = weights[f"blocks.{layer}.mlp.up.weight"] @ rms_norm(x[t])
            x[t] = x[t] + weights[f"blocks.{layer}.mlp.down.weight"] @ np.maximum(hidden, 0) ** 2
        outputs.append(x.copy())
    return np.array([head(rms_norm(row), weights, config) for row in x])
