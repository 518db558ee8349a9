"""Machines to plan for; an unknown one is refused with a list of those that exist."""

import importlib.util
import os

import jax
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.planning.topology import CHIPS, find_topology, prepare
from tests import finished
from tests.planning.machines import slice_of

RECIPE = finished.ROOT / 'launch/recipes/tpu.env'

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason="pip install -e '.[tpu]'")


@pytest.mark.parametrize('name', ['v9:2x2', 'v5e', 'v5e-256', 'gpu:8', 'cpu:', 'cpu:x', '',
                                  'v5p:16x16', 'v5e:4x4x4'])
def test_unknown_topology(name):
  """An unknown topology is refused with a list of those that exist."""
  known = r"(?s:.*)v5e: 2x2, .*16x16\n  v5p: 2x2x1"
  with pytest.raises(UserError, match=f"--topology={name}: {known}"):
    find_topology(name)


def test_without_libtpu(monkeypatch):
  """Without libtpu, the error names the command that installs it."""
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"v5e:16x16 .*libtpu.*'.\[tpu\]'.*cpu:8"):
    find_topology('v5e:16x16')


def test_virtual_devices():
  """Virtual devices are as many as asked for, and have no links."""
  topology = find_topology('cpu:4')
  assert list(topology.devices) == jax.devices()[:4]
  assert topology.chip is None and topology.shape == (4,)
  with pytest.raises(UserError, match='cpu:9: .* 8 virtual'):
    find_topology('cpu:9')


@pytest.mark.parametrize('name', ['cpu:0', 'cpu:many', 'cpu:²'])
def test_number_of_devices(name):
  """The number of devices is checked before jax starts."""
  with pytest.raises(UserError, match=f'--topology={name}: .*cpu:8'):
    prepare(name, RECIPE)


@pytest.mark.parametrize('given, flags', [(None, '--xla_tpu_'), ('--mine', '--mine')])
def test_compiler_flags(given, flags, monkeypatch):
  """The compiler for TPUs gets the flags of training, unless the environment has flags."""
  monkeypatch.setattr(jax.config, 'update', lambda *option: None)  # jax has started here
  monkeypatch.setenv('LIBTPU_INIT_ARGS', given or '')
  if given is None:
    monkeypatch.delenv('LIBTPU_INIT_ARGS')
  prepare('cpu:8', RECIPE)
  assert os.environ.get('LIBTPU_INIT_ARGS') == given
  prepare('v5e:16x16', RECIPE)
  assert os.environ['LIBTPU_INIT_ARGS'].startswith(flags)


def test_shape_of_slice():
  """The shape of a slice is that of its links."""
  assert slice_of((4, 8))[0].shape == (4, 8)


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize('kind', CHIPS)
def test_libtpu_knows_slices(kind):
  """libtpu knows every slice that is listed."""
  for shape in CHIPS[kind].shapes:
    topology = find_topology(f'{kind}:{shape}')
    sizes = topology.shape + (1,) * (3 - len(topology.shape))
    assert len(topology.devices) == sizes[0] * sizes[1] * sizes[2]
    assert tuple(topology.devices[-1].coords) == tuple(size - 1 for size in sizes)


@pytest.mark.tpu
@needs_libtpu
def test_libtpu_refuses_shape():
  """A shape that libtpu refuses is answered with the list."""
  with pytest.raises(UserError, match=r'v5e:3x3: .*not divisible(?s:.*)v5p: '):
    find_topology('v5e:3x3')
