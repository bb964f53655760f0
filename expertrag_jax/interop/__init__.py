"""Checkpoints and programs in and out of this code: formats that others read."""
