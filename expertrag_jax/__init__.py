"""expertrag_jax: sharded training of retrieval-augmented mixture-of-experts models in JAX."""

__version__ = "0.1.0"
