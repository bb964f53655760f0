"""Everything of a pipeline is reachable from gin with dynamic registration."""

import itertools
import json

import gin
import pytest

from expertrag_jax.data.pipeline import Pipeline

CONFIG = """
from __gin__ import dynamic_registration
from expertrag_jax.data import interleave
from expertrag_jax.data import pipeline
from expertrag_jax.data import vocabularies
from tasks import questions

TASK_FEATURE_LENGTHS = {{"inputs": 24, "targets": 8, "query": 24}}

vocabularies.Vocabularies.reader = "{vocabulary}"
questions.register_questions:
  name = "from_gin"
  path = "{questions}"
  vocabularies = @vocabularies.Vocabularies()
pipeline.Pipeline:
  mixture_or_task = @questions.register_questions()
  task_feature_lengths = %TASK_FEATURE_LENGTHS
  batch_size = 2
  process_index = 0
  process_count = 1
interleave.Interleave.pipelines = [@pipeline.Pipeline(), @pipeline.Pipeline()]
interleave.Interleave.weights = [1, 2]
"""


@pytest.fixture
def parsed(tmp_path, vocabulary):
    path = tmp_path / "questions.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"red {i}", "answers": ["stone"]}) + "\n" for i in range(5))
    )
    gin.clear_config()  # a job that another test ran in this process leaves its bindings
    with gin.unlock_config():
        gin.parse_config(CONFIG.format(vocabulary=vocabulary.path, questions=path))
    yield
    gin.clear_config()


def test_a_gin_file_makes_a_pipeline(parsed):
    from expertrag_jax.data.interleave import Interleave

    pipeline = gin.get_configurable(Pipeline)()
    assert isinstance(pipeline, Pipeline)
    batch = next(pipeline(0))
    assert batch.encoder_input_tokens.shape == (2, 24)
    mixed = gin.get_configurable(Interleave)()
    assert len(list(itertools.islice(mixed(0), 7))) == 7
