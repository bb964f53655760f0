"""Both arms measured: whatever the buckets, and however few questions are left for the last one."""

import jax
import numpy as np
import pytest

from expertrag_jax import gate_training
from expertrag_jax.assembly import tokenise_answers
from expertrag_jax.service import service_from_model
from expertrag_jax.trained_model import open_model


@pytest.mark.usefixtures("fast_compile")
def test_the_last_questions_fill_a_smaller_bucket(tiny, tiny_model):
    def measured(buckets, count):
        service = service_from_model(open_model(tiny.model_dir, buckets=buckets))
        questions = service.tokenise(tiny_model.QUESTIONS[:count])
        targets = tokenise_answers(["Arlen"] * count, tiny.vocabulary, tiny.settings.answer_length)
        return gate_training.measure_arms(tiny.system, tiny.params, service.answerer, questions, targets)

    found, expected = measured((2, 4), 6), measured((4,), 8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[:6], rtol=1e-5, atol=1e-6), found, expected)
    assert len(np.unique(found.gain)) > 1
