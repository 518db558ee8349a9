"""From text to batches.

data_config: what to read. sources, corpus: documents. vocabularies: ids. tasks: a stream of
tokenised documents. packing, rows: rows on disk and their batches. online: batches of the stream.
loading: the data of an experiment, for training and evaluation.
"""
