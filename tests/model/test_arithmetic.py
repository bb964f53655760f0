"""T5's arithmetic against numpy in float64, written from the papers and not from our code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expertrag_jax.model.attention import relative_bucket

# T5's published buckets (32 of them, distance 128): first distance of every bucket from 8 or 16 on.
BIDIRECTIONAL_STARTS = [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]
CAUSAL_STARTS = [*range(16), 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]


def bucket(distance, bidirectional):
    """Bucket of key position - query position by table look-up."""
    starts = BIDIRECTIONAL_STARTS if bidirectional else CAUSAL_STARTS
    offset = 16 if bidirectional and distance > 0 else 0
    distance = abs(distance) if bidirectional else max(-distance, 0)
    return offset + sum(start <= distance for start in starts) - 1


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_buckets_are_the_published_ones(bidirectional):
    distance = np.arange(-400, 401)
    ours = relative_bucket(jnp.asarray(distance), bidirectional, 32, 128)
    np.testing.assert_array_equal(ours, [bucket(d, bidirectional) for d in distance])


class Reference:
    """One layer of each stack, single example, no batching."""

    def __init__(self, params, heads, names):
        self.p, self.heads, self.names = params, heads, names

    def norm(self, x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale["scale"]

    def bias(self, table, queries, keys, bidirectional):
        rows = [[bucket(m - q, bidirectional) for m in range(keys)] for q in range(queries)]
        return table["rel_embedding"][:, np.array(rows)]

    def attention(self, p, x, source, bias):
        """No division by sqrt(A): T5 does not scale."""
        mixed = []
        width = p["query"]["kernel"].shape[1] // self.heads
        for head in range(self.heads):
            part = slice(head * width, (head + 1) * width)
            query = x @ p["query"]["kernel"][:, part]
            scores = query @ (source @ p["key"]["kernel"][:, part]).T + bias[head]
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            mixed.append(weights @ (source @ p["value"]["kernel"][:, part]))
        return np.concatenate(mixed, -1) @ p["out"]["kernel"]

    def feed_forward(self, p, x):
        if self.names == ("relu",):
            return np.maximum(x @ p["wi"]["kernel"], 0) @ p["wo"]["kernel"]
        a = x @ p["wi_0"]["kernel"]
        gelu = 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
        return (gelu * (x @ p["wi_1"]["kernel"])) @ p["wo"]["kernel"]

    def encode(self, tokens):
        p = self.p["encoder"]
        x = self.p["token_embedder"]["embedding"][tokens]
        bias, layer = self.bias(p["relpos_bias"], len(x), len(x), True), p["layers_0"]
        y = self.norm(x, layer["pre_attention_layer_norm"])
        x = x + self.attention(layer["attention"], y, y, bias)
        x = x + self.feed_forward(layer["mlp"], self.norm(x, layer["pre_mlp_layer_norm"]))
        return self.norm(x, p["encoder_norm"])

    def decode(self, tokens, encoded):
        p = self.p["decoder"]
        y = self.p["token_embedder"]["embedding"][tokens]
        bias, layer = self.bias(p["relpos_bias"], len(y), len(y), False), p["layers_0"]
        bias = bias + np.triu(np.full((len(y), len(y)), -np.inf), 1)
        normal = self.norm(y, layer["pre_self_attention_layer_norm"])
        y = y + self.attention(layer["self_attention"], normal, normal, bias)
        normal = self.norm(y, layer["pre_cross_attention_layer_norm"])
        y = y + self.attention(layer["encoder_decoder_attention"], normal, encoded, np.zeros(self.heads))
        y = y + self.feed_forward(layer["mlp"], self.norm(y, layer["pre_mlp_layer_norm"]))
        y = self.norm(y, p["decoder_norm"])
        if "logits_dense" in p:
            return y @ p["logits_dense"]["kernel"]
        return y @ self.p["token_embedder"]["embedding"].T / np.sqrt(y.shape[-1])


@pytest.mark.parametrize("names, tied", [(("gelu", "linear"), False), (("relu",), True)])
def test_one_encoder_and_one_decoder_layer(names, tied, tiny):
    settings = tiny.config(num_encoder_layers=1, num_decoder_layers=1, mlp_activations=names, logits_via_embedding=tied)
    params = tiny.initial(settings)
    reference = Reference(jax.tree.map(lambda x: np.asarray(x, np.float64), params), settings.num_heads, names)
    questions, targets = tiny.tokens(2, 30), tiny.tokens(2, 25, seed=1, padded=False)
    ours = jax.jit(lambda p: tiny.logits(settings, p, questions, targets))(params)
    assert ours.dtype == jnp.float32
    for row, question in enumerate(questions):
        encoded = reference.encode(question[question > 0])  # padding must not matter
        np.testing.assert_allclose(ours[row], reference.decode(targets[row], encoded), rtol=2e-4, atol=2e-5)
