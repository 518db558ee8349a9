"""Our own format keeps what others leave out; see weights_test.py for the round trip."""

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
  """Norms in float32, the rest rounded, as trainers keep them."""
  def rounded(path, leaf):
    return leaf if path[-1].key == 'scale' else leaf.astype(jnp.bfloat16)
  return jax.tree_util.tree_map_with_path(rounded, foreign.params_of('gemma3'))


@pytest.fixture(scope='module')
def saved(tmp_path_factory, params):
  directory = tmp_path_factory.mktemp('native') / 'decoder'
  weights.save(directory, CONFIG, params, vocabulary='of the text')
  return directory


def test_the_description_holds_config_fingerprint_and_vocabulary(saved, params):
  assert native.describe(saved) == native.Description(CONFIG, fingerprint(params), 'of the text')
  checkpoint = weights.open_checkpoint(saved)
  assert (checkpoint.format, checkpoint.config, checkpoint.fingerprint, checkpoint.vocabulary) == (
      'native', CONFIG, fingerprint(params), 'of the text')


def test_weights_are_read_straight_onto_a_mesh_each_in_its_dtype(saved, params):
  loaded = weights.open_checkpoint(saved).load(foreign.mesh_shardings)
  expected = foreign.mesh_shardings(boxed_shapes(CONFIG))
  assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == expected
  foreign.assert_same(loaded, params)


def test_weights_of_a_mesh_are_saved_as_those_of_one_device(tmp_path, saved, params):
  spread = jax.device_put(params, foreign.mesh_shardings(boxed_shapes(CONFIG)))
  weights.save(tmp_path / 'decoder', CONFIG, spread)
  one, other = native.open_weights(tmp_path / 'decoder'), native.open_weights(saved)
  foreign.assert_same(foreign.read_all(one, one.tensors), foreign.read_all(other, other.tensors))
  assert native.describe(tmp_path / 'decoder').fingerprint == native.describe(saved).fingerprint


def test_tensors_are_listed_by_the_paths_of_our_parameters(saved):
  source = native.open_weights(saved)
  assert {name: stored.shape for name, stored in source.tensors.items()} == native.shapes(CONFIG)
  assert {stored.dtype for stored in source.tensors.values()} == {'float32', 'bfloat16'}


def test_opening_reads_no_weights(saved, monkeypatch):
  monkeypatch.setattr(native.OrbaxSource, 'read', None)
  weights.open_checkpoint(saved).check()


@pytest.mark.parametrize('key', ['format', 'config', 'fingerprint', 'vocabulary'])
def test_a_description_that_leaves_something_out_is_refused(saved, tmp_path, key):
  content = json.loads((saved / 'decoder.json').read_text())
  del content[key]
  (tmp_path / 'decoder.json').write_text(json.dumps(content))
  with pytest.raises(UserError, match=f'{tmp_path}/decoder.json is damaged .*{key}'):
    weights.open_checkpoint(tmp_path)
