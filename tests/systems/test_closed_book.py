"""The closed-book baseline is ExpertRAG's closed-book arm."""

import jax
import numpy as np

from expertrag_jax.systems.closed_book import ClosedBook


def test_closed_book_is_the_closed_book_arm(tiny):
    rag = tiny.system(label_smoothing=0.1, z_loss=1e-3, balance_loss_factor=0.5)
    system = ClosedBook(
        rag.model, max_target_length=tiny.target, label_smoothing=0.1, z_loss=1e-3, balance_loss_factor=0.5
    )
    params, batch = tiny.initial(system), tiny.batch(4)
    assert set(params) == {"token_embedder", "encoder", "decoder"}
    ours = jax.jit(system.loss)(params, batch, jax.random.key(0))
    theirs = jax.jit(rag.generator_loss)(params, batch.replace(passage_tokens=None), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    question = jax.jit(system.encode_question)(params, batch.encoder_input_tokens)
    assert not system.decide(params, question).any()
    first, cache = jax.jit(system.begin)(params, question.memory)
    np.testing.assert_allclose(first, question.first_log_probs, rtol=1e-5)
    log_probs, _ = jax.jit(system.decode_step)(params, question.memory, cache, np.full(4, 3, np.int32))
    np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1, rtol=1e-5)
    assert [phase.name for phase in system.phases] == ["generator"]
