"""TensorFlow and seqio for the input pipeline, on the CPU and with few log lines.

Every module of the pipeline imports them from here. Otherwise TensorFlow would reserve the memory
of the GPUs, which jax needs.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

# TensorFlow's greetings: INFO lines without a date, and what it says about GPUs, which it is not to
# use. Its SentencePiece logs a line for each data set that begins.
_GREETINGS = re.compile(rb'I0000 |WARNING: All log messages before absl::InitializeLog'
                        rb'|\w+\.cc\(\d+\) LOG\(INFO\)'
                        rb'|.*(failed call to cuInit|Unable to register cu\w+ factory)')


@contextlib.contextmanager
def without_greetings() -> Iterator[None]:
  """Leaves out TensorFlow's greetings, which its C++ writes before it reads any log level.

  Every other line of stderr comes out at the end of the block.
  """
  if sys.stderr is None:  # closed, as by 2>&-
    yield
    return
  with tempfile.TemporaryFile() as kept:
    sys.stderr.flush()
    stderr = os.dup(2)
    os.dup2(kept.fileno(), 2)
    try:
      yield
    finally:
      os.dup2(stderr, 2)
      os.close(stderr)
      kept.seek(0)
      os.write(2, b''.join(line for line in kept if not _GREETINGS.match(line)))


os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
with without_greetings():
  import seqio
  import tensorflow as tf

  tf.config.set_visible_devices([], 'GPU')

__all__ = ['seqio', 'tf', 'without_greetings']
