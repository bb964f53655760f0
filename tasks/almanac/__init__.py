"""The almanac: a world generated from a seed, to train and measure when retrieval is worth it.

``builder`` (which imports TensorFlow Datasets) is left to its users to import.
"""

from tasks.almanac.config import STRATA, AlmanacConfig, AlmanacError, Lesson
from tasks.almanac.world import Corpus, World

__all__ = ["STRATA", "AlmanacConfig", "AlmanacError", "Corpus", "Lesson", "World"]
