"""Options of sparse layers through the whole model: what is refused, and that all of them train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.systems import generator
from expertrag_jax.training import parameters


def test_expert_choice_is_refused_in_a_decoder_with_the_reason(tiny):
    with pytest.raises(UserError, match="decoder_routing cannot be 'expert_choice'.* sees later ones"):
        tiny.config(decoder_routing="expert_choice")
    assert tiny.config(encoder_routing="expert_choice").encoder_routing == "expert_choice"


@pytest.mark.parametrize("field", ["expert_dispatch", "encoder_routing", "decoder_routing"])
def test_an_unknown_name_is_refused_with_the_known_ones(tiny, field):
    with pytest.raises(UserError, match=f"{field} is 'magic'; use '[a-z_]+' or '[a-z_]+'"):
        tiny.config(**{field: "magic"})


def test_all_options_together_give_gradients_to_every_parameter(tiny):
    """Experts that choose in the encoder; dropless, balanced by a bias, in the decoder."""
    config = tiny.config(
        num_experts=4, encoder_routing="expert_choice", expert_dispatch="dropless", loss_free_balancing=True,
        batch_prioritised_routing=True, scan_layers=True, router_jitter=0.01,
    )  # fmt: skip
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 20, (4, 8)), jnp.int32)

    @jax.jit
    def gradients(rng):
        params = generator.plain(generator.initial_parameters(config, rng))

        def loss(params):
            encoded, encoder = generator.apply(config, params, tokens, None, False, method="encode", rng=rng)
            memory, _ = generator.apply(config, params, encoded, tokens > 0, method="memory")
            logits, decoder = generator.apply(
                config, params, tokens, jnp.ones_like(tokens), memory, False, method="logits", rng=rng
            )
            extra, metrics = generator.router_losses((encoder, decoder), 0.01, 0.001)
            return generator.cross_entropy(logits, tokens).mean() + extra, metrics

        return jax.grad(loss, has_aux=True)(params)

    gradient, metrics = gradients(jax.random.key(0))
    flat = parameters.flatten(gradient)
    (bias,) = [name for name in flat if name.endswith("selection_bias")]
    assert bias.startswith("decoder/layers") and flat[bias].shape == (4, 1)
    silent = [name for name, leaf in flat.items() if not float(jnp.abs(leaf).max()) > 0]
    assert silent == []
    load, count = metrics["router/load"]
    np.testing.assert_allclose((load / count).sum(-1), [1.0, 1.0], rtol=1e-5)
    np.testing.assert_allclose(load[0] / count[0], 0.25, rtol=1e-5)  # the encoder's experts are even by themselves
    assert metrics["router/layer_dropped"][0].shape == (2,) and not metrics["router/layer_dropped"][0][1]
