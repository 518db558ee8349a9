"""TensorFlow and seqio for the input pipeline: on the CPU, and quiet.

Every module of the pipeline imports them from here. Left alone, TensorFlow would take the memory
of the GPUs that jax needs.
"""

import os

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import seqio  # noqa: E402
import tensorflow as tf  # noqa: E402

tf.config.set_visible_devices([], 'GPU')

__all__ = ['seqio', 'tf']
