"""M2-BERT written out from its published tensors, densely and in float64: every convolution a sum over all pairs.

Names and shapes are those of the official state dict. Nothing of ours is used, and nothing is fast.
"""

import math

import numpy as np

erf = np.vectorize(math.erf)


def layer_norm(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


class Tensors(dict):
    """A state dict, or the part of one below a prefix."""

    def __getitem__(self, name):
        return super().__getitem__(name).astype(np.float64)

    def below(self, prefix):
        return Tensors({name.removeprefix(prefix): x for name, x in self.items() if name.startswith(prefix)})


def taps(t, network, length, *, w_mod):
    """The taps of one direction, (length, d): the network at each position's features, times the decay."""
    h, freq = t["pos_emb.z"][0, :length], t[f"{network}.1.freq"]
    for i in (0, 2, 4):
        h = np.sin(w_mod * freq * (h @ t[f"{network}.{i}.weight"].T + t[f"{network}.{i}.bias"]))
    h = h @ t[f"{network}.6.weight"].T
    # What the file holds as buffers, in more digits.
    time = np.linspace(0, 1, len(t["pos_emb.z"][0]))[:length, None]
    return h * np.exp(time * np.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, h.shape[1]))


def long_convolution(t, u, *, bidirectional, w_mod):
    length = u.shape[1]
    forward = taps(t, "implicit_filter", length, w_mod=w_mod)
    y = t["bias"] * u
    for i in range(length):
        for j in range(i + 1):
            y[:, i] += forward[i - j] * u[:, j]
    if bidirectional:
        backward = taps(t, "implicit_filter_rev", length, w_mod=w_mod)
        for i in range(length):
            for j in range(i + 1, length):
                y[:, i] += backward[j - i - 1] * u[:, j]
    return y


def sequence_mixer(t, u, config):
    kinds = {"bidirectional": config.get("bidirectional", True), "w_mod": config.get("hyena_w_mod", 1)}
    if config.get("hyena_training_additions"):
        u = layer_norm(u, t["layernorm.weight"], t["layernorm.bias"], 1e-5)
    p = u @ t["in_linear.weight"].T + t["in_linear.bias"]
    w, length = t["short_filter.weight"][:, 0], u.shape[1]  # the last tap is the current position's
    padded = np.pad(p, ((0, 0), (2, 0), (0, 0)))
    p = sum(w[:, j] * padded[:, j : j + length] for j in range(3)) + t["short_filter.bias"]
    x1, x2, v = np.split(p, 3, axis=-1)
    y = x2 * long_convolution(t.below("filter_fn."), x1 * v, **kinds)
    if config.get("residual_long_conv"):
        y = y + long_convolution(t.below("filter_fn2."), u, **kinds)
    return y @ t["out_linear.weight"].T + t["out_linear.bias"]


def block_diagonal(weight, x):
    """x times a weight (blocks, out, in), or a dense one (out, in)."""
    if weight.ndim == 2:
        return x @ weight.T
    blocks, _, width = weight.shape
    x = np.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, blocks * width - x.shape[-1]),))
    return np.concatenate([part @ w.T for part, w in zip(np.split(x, blocks, axis=-1), weight, strict=True)], axis=-1)


def channel_mixer(t, x, config):
    hidden = block_diagonal(t["gated_layers.weight"], x)
    if config.get("use_glu_mlp", True):
        hidden = hidden[..., : 2 * config["intermediate_size"]]
        activated, gate = np.split(hidden, 2, axis=-1)
        hidden = gelu(activated) * gate
    else:
        hidden = gelu(hidden[..., : config["intermediate_size"]])
    y = block_diagonal(t["wo.weight"], hidden)[..., : x.shape[-1]] + t["wo.bias"]
    return layer_norm(y + x, t["layernorm.weight"], t["layernorm.bias"], config["layer_norm_eps"])


def hidden(tensors, config, ids, token_type_ids):
    """The encoder's output, b l d."""
    t = Tensors(tensors).below("bert.")
    x = t["embeddings.word_embeddings.weight"][ids]
    x = x + t["embeddings.token_type_embeddings.weight"][token_type_ids]
    if config.get("use_positional_encodings"):
        x = x + t["embeddings.position_embeddings.weight"][: ids.shape[1]]
    norm = t.below("embeddings.LayerNorm.")
    x = layer_norm(x, norm["weight"], norm["bias"], config["layer_norm_eps"])
    for i in range(config["num_hidden_layers"]):
        layer = t.below(f"encoder.layer.{i}.")
        x = channel_mixer(layer.below("mlp."), sequence_mixer(layer.below("attention."), x, config), config)
    return x


def logits(tensors, config, x):
    """The masked language model's head on the encoder's output."""
    t = Tensors(tensors)
    head = t.below("cls.predictions.")
    x = gelu(x @ head["transform.dense.weight"].T + head["transform.dense.bias"])
    norm = head.below("transform.LayerNorm.")
    x = layer_norm(x, norm["weight"], norm["bias"], config["layer_norm_eps"])
    return x @ t["bert.embeddings.word_embeddings.weight"].T + head["decoder.bias"]


def pooled(tensors, x, mask=None):
    """A row's vector: of the first token, or of the mean where a mask is given."""
    pooler = Tensors(tensors).below("bert.pooler.dense.")
    x = x[:, 0] if mask is None else (x * mask[..., None]).sum(1) / mask.sum(1)[:, None]
    return np.tanh(x @ pooler["weight"].T + pooler["bias"])
