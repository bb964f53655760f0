"""T5-style encoder-decoder with mixture-of-experts layers, the dual encoder, and fusion of passages."""
