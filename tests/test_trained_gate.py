"""The gate of a trained model as a pipeline asks it."""

import numpy as np
import pytest

from expertrag_jax.answering import SystemPrograms
from expertrag_jax.errors import UserError
from expertrag_jax.trained_gate import open_gate
from expertrag_jax.trained_model import open_model


def test_it_equals_the_program_for_any_number_and_width(tiny, tiny_model):
    model = open_model(tiny.model_dir)
    length = model.settings.question_length
    tokens = np.zeros((70, length), np.int32)
    tokens[:, :5] = np.random.default_rng(0).integers(5, 50, (70, 5))
    wanted = np.asarray(SystemPrograms(model.system, model.params).question(tokens)[1])
    p_ret = open_gate(tiny.model_dir)
    np.testing.assert_allclose(p_ret(tokens[:, :5]), wanted, rtol=1e-5)
    np.testing.assert_allclose(p_ret(np.pad(tokens, ((0, 0), (0, 3)))), wanted, rtol=1e-5)
    assert p_ret(tokens[:1]).shape == (1,)


def test_a_longer_question_is_refused(tiny):
    length = open_model(tiny.model_dir).settings.question_length
    with pytest.raises(UserError, match="shorten it"):
        open_gate(tiny.model_dir)(np.ones((1, length + 1), np.int32))
