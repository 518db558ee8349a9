"""The native format keeps more than others: a fingerprint and a vocabulary; see weights_test.py."""

import json

import jax
import jax.numpy as jnp
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.model import weights
from latent_deliberation.model.checkpoints import native
from latent_deliberation.model.decoder import boxed_shapes, fingerprint
from tests.model.checkpoints import foreign

CONFIG = foreign.FAMILIES['gemma3']


@pytest.fixture(scope='module')
def params():
  """Parameters with norms in float32 and the rest in bfloat16, as in training."""
  def rounded(path, leaf):
    return leaf if path[-1].key == 'scale' else leaf.astype(jnp.bfloat16)
  return jax.tree_util.tree_map_with_path(rounded, foreign.params_of('gemma3'))


@pytest.fixture(scope='module')
def saved(tmp_path_factory, params):
  directory = tmp_path_factory.mktemp('native') / 'decoder'
  weights.save(directory, CONFIG, params, vocabulary_hash='of the text')
  return directory


def test_description_content(saved, params):
  """decoder.json holds config, fingerprint and vocabulary."""
  assert native.describe(saved) == native.Description(CONFIG, fingerprint(params), 'of the text')
  checkpoint = weights.open_checkpoint(saved)
  assert (checkpoint.format, checkpoint.config, checkpoint.fingerprint,
          checkpoint.vocabulary_hash) == (
      'native', CONFIG, fingerprint(params), 'of the text')


def test_native_onto_mesh(saved, params):
  """Weights are read straight onto a mesh, each in its dtype."""
  loaded = weights.open_checkpoint(saved).load(foreign.mesh_shardings)
  expected = foreign.mesh_shardings(boxed_shapes(CONFIG))
  assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == expected
  foreign.assert_same(loaded, params)


def test_native_from_mesh(tmp_path, saved, params):
  """Weights on a mesh are saved like those on one device."""
  spread = jax.device_put(params, foreign.mesh_shardings(boxed_shapes(CONFIG)))
  weights.save(tmp_path / 'decoder', CONFIG, spread)
  one, other = native.open_weights(tmp_path / 'decoder'), native.open_weights(saved)
  foreign.assert_same(foreign.read_all(one, one.tensors), foreign.read_all(other, other.tensors))
  assert native.describe(tmp_path / 'decoder').fingerprint == native.describe(saved).fingerprint


def test_native_tensor_names(saved):
  """Tensors are named by the paths of our parameters."""
  source = native.open_weights(saved)
  assert {name: stored.shape for name, stored in source.tensors.items()} == native.shapes(CONFIG)
  assert {stored.dtype for stored in source.tensors.values()} == {'float32', 'bfloat16'}


def test_open_reads_no_weights(saved, monkeypatch):
  """Opening a checkpoint reads no weights."""
  monkeypatch.setattr(native.OrbaxSource, 'read', None)
  weights.open_checkpoint(saved).check()


@pytest.mark.parametrize('key', ['format', 'config', 'fingerprint', 'vocabulary'])
def test_description_lacks_a_key(saved, tmp_path, key):
  """A decoder.json that lacks a key is refused."""
  content = json.loads((saved / 'decoder.json').read_text())
  del content[key], content['checksum']
  (tmp_path / 'decoder.json').write_text(json.dumps(content))
  with pytest.raises(UserError, match=f'{tmp_path}/decoder.json .*{key}'):
    weights.open_checkpoint(tmp_path)
