"""Mixture-of-experts: routing (who goes where), dispatch (moving tokens), layer (the two joined, sharded)."""
