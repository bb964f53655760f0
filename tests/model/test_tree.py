"""The parameter tree is T5X's: names, shapes and logical axes, written out."""

import jax
import pytest

from expertrag_jax.systems import generator
from expertrag_jax.training import parameters

D, F, H, J, V, E = 8, 12, 2, 8, 20, 4  # J: heads * head_dim


def attention(prefix):
    into = {f"{prefix}/{name}/kernel": ((D, J), ("embed", "joined_kv")) for name in ("query", "key", "value")}
    return into | {f"{prefix}/out/kernel": ((J, D), ("joined_kv", "embed"))}


def norm(name):
    return {f"{name}/scale": ((D,), ("embed",))}


def dense_mlp(prefix, names):
    into = {f"{prefix}/{name}/kernel": ((D, F), ("embed", "mlp")) for name in names}
    return into | {f"{prefix}/wo/kernel": ((F, D), ("mlp", "embed"))}


def sparse_mlp(prefix, names):
    into = {f"{prefix}/expert/{n}/kernel": ((E, D, F), ("expert", "embed", "expert_mlp")) for n in names}
    return into | {
        f"{prefix}/expert/wo/kernel": ((E, F, D), ("expert", "expert_mlp", "embed")),
        f"{prefix}/router/router_weights/w/kernel": ((D, E), ("embed", "unmodeled")),
    }


def golden(names=("wi_0", "wi_1"), sparse=False, tied=False, layers=2):
    tree = {"token_embedder/embedding": ((V, D), ("vocab", "embed"))}
    for stack in ("encoder", "decoder"):
        tree |= {f"{stack}/relpos_bias/rel_embedding": ((H, 32), ("heads", "relpos_buckets"))}
        tree |= norm(f"{stack}/{stack}_norm")
    for i in range(layers):
        encoder, decoder = f"encoder/layers_{i}", f"decoder/layers_{i}"
        tree |= attention(f"{encoder}/attention")
        tree |= attention(f"{decoder}/self_attention") | attention(f"{decoder}/encoder_decoder_attention")
        for name in (f"{encoder}/pre_attention_layer_norm", f"{encoder}/pre_mlp_layer_norm"):
            tree |= norm(name)
        for kind in ("self_attention", "cross_attention", "mlp"):
            tree |= norm(f"{decoder}/pre_{kind}_layer_norm")
        for stack in (encoder, decoder):
            tree |= (sparse_mlp if sparse and i % 2 == 1 else dense_mlp)(f"{stack}/mlp", names)
    if not tied:
        tree |= {"decoder/logits_dense/kernel": ((D, V), ("embed", "vocab"))}
    return tree


def scanned(tree, blocks, block_size):
    """T5X's stacked form of ``golden``: axis 1 under encoder/layers and decoder/layers."""
    stacked = {}
    for path, (shape, axes) in tree.items():
        parts = path.split("/")
        if not parts[1].startswith("layers_"):
            stacked[path] = (shape, axes)
            continue
        index = int(parts[1].removeprefix("layers_"))
        if index < block_size:
            inner = [f"layers_{index}"] if block_size > 1 else []
            path = "/".join([parts[0], "layers", *inner, *parts[2:]])
            stacked[path] = ((shape[0], blocks, *shape[1:]), (axes[0], "layers", *axes[1:]))
    return stacked


CASES = {
    "dense, gated": ({}, golden()),
    "dense, ungated": ({"mlp_activations": ("relu",)}, golden(("wi",))),
    "dense, tied": ({"logits_via_embedding": True}, golden(tied=True)),
    "switch": ({"num_experts": E, "mlp_activations": ("relu",)}, golden(("wi",), sparse=True)),
    "switch, gated": ({"num_experts": E}, golden(sparse=True)),
    "dense, scanned": ({"scan_layers": True}, scanned(golden(), 2, 1)),
    "switch, scanned": (
        {"num_experts": E, "scan_layers": True, "num_encoder_layers": 4, "num_decoder_layers": 4},
        scanned(golden(sparse=True, layers=4), 2, 2),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_tree(case, tiny):
    changes, expected = CASES[case]
    boxed = jax.eval_shape(lambda rng: generator.initial_parameters(tiny.config(**changes), rng), jax.random.key(0))
    shapes = {name: leaf.shape for name, leaf in parameters.flatten(generator.plain(boxed)).items()}
    axes = jax.tree_util.tree_flatten_with_path(generator.axes_of(boxed), is_leaf=lambda node: isinstance(node, tuple))[
        0
    ]
    axes = {"/".join(key.key for key in path): leaf for path, leaf in axes}
    assert shapes == {name: shape for name, (shape, _) in expected.items()}
    assert axes == {name: names for name, (_, names) in expected.items()}
