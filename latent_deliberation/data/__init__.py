"""Text to batches: sources, vocabularies, seqio tasks, packed rows, streams."""
