"""A fingerprint changes with any bit, name or place, and with nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from latent_deliberation.model import decoder as module
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.sharding import MeshConfig, make_mesh

VALUES = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)


def tree(values=VALUES, name='w'):
  return {'layer': {name: jnp.asarray(values)}, 'scale': jnp.ones(3, jnp.bfloat16)}


def swapped():
  values = VALUES.copy()
  values[1, 2], values[3, 4] = VALUES[3, 4], VALUES[1, 2]
  return values


def flipped(bit):
  bits = VALUES.view(np.uint32).copy()
  bits[5, 1] ^= np.uint32(1 << bit)
  return bits.view(np.float32)


@pytest.mark.parametrize('other', [
    tree(flipped(0)), tree(flipped(31)), tree(swapped()), tree(VALUES[::-1]), tree(name='v'),
    tree(VALUES.reshape(6, 8)), tree(VALUES.astype(jnp.bfloat16)), tree()['layer'],
    {**tree(), 'scale': tree()['scale'].at[0].set(-0.0)},
], ids=['lowest bit', 'sign', 'swapped', 'reversed', 'renamed', 'reshaped', 'rounded', 'fewer',
        'bfloat16 bit'])
def test_any_change_of_bits_names_or_shapes_changes_it(other):
  assert fingerprint(other) != fingerprint(tree())


def test_zeros_of_either_sign_differ():
  assert fingerprint({'w': jnp.zeros(3)}) != fingerprint({'w': -jnp.zeros(3)})


@pytest.mark.parametrize('mesh, spec', [
    (MeshConfig(8), PartitionSpec('data')), (MeshConfig(1, 4, 2), PartitionSpec('fsdp', 'tensor')),
    (MeshConfig(2, 2, 2), PartitionSpec(('data', 'fsdp'), 'tensor')),
    (MeshConfig(2, 2, 2), PartitionSpec())])
def test_it_does_not_depend_on_the_sharding(mesh, spec):
  sharding = NamedSharding(make_mesh(mesh), spec)
  sharded = {**tree(), 'layer': jax.device_put(tree()['layer'], sharding)}
  assert fingerprint(sharded) == fingerprint(tree())


def test_it_is_the_same_for_numpy_and_does_not_depend_on_the_order_of_a_dict():
  reordered = dict(reversed(tree().items()))
  assert fingerprint(jax.tree.map(np.asarray, reordered)) == fingerprint(tree())


def test_large_leaves_are_summed_in_blocks_as_they_are_at_once(monkeypatch):
  leaf = jax.random.normal(jax.random.key(0), (7, 5, 3))
  at_once = fingerprint({'w': leaf})
  monkeypatch.setattr(module, '_BLOCK', 31)  # two rows at a time, and one
  assert fingerprint({'w': leaf}) == at_once
  assert fingerprint({'w': leaf.at[6, 4, 2].add(1)}) != at_once
