"""The data pipeline: SeqIO tasks that retrieve, decide, assemble and tokenise, and the batches made of them.

Needs TensorFlow and SeqIO; nothing of the core imports this room.
"""
