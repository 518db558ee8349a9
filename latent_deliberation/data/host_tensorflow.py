"""TensorFlow and seqio for the input pipeline, on the CPU and with few log lines.

Every module of the pipeline imports them from here. Otherwise TensorFlow would reserve the memory
of the GPUs, which jax needs.
"""

import os

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import seqio  # noqa: E402
import tensorflow as tf  # noqa: E402

tf.config.set_visible_devices([], 'GPU')

__all__ = ['seqio', 'tf']
