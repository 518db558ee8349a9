"""Machines to plan for; what is none is refused, with those that are."""

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
def test_what_is_no_topology_is_refused_with_a_list_of_those_that_are(name):
  known = r"(?s:.*)v5e: 2x2, .*16x16\n  v5p: 2x2x1"
  with pytest.raises(UserError, match=f"--topology={name}: {known}"):
    find_topology(name)


def test_without_libtpu_it_is_said_how_to_get_it(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"v5e:16x16 .*libtpu.* pip install -e '.\[tpu\]'.*cpu:8"):
    find_topology('v5e:16x16')


def test_virtual_devices_are_as_many_as_asked_for_and_have_no_links():
  topology = find_topology('cpu:4')
  assert list(topology.devices) == jax.devices()[:4]
  assert topology.chip is None and topology.shape == (4,)
  with pytest.raises(UserError, match='cpu:9: this process has 8 virtual CPU devices'):
    find_topology('cpu:9')


@pytest.mark.parametrize('name', ['cpu:0', 'cpu:many', 'cpu:²'])
def test_a_number_of_devices_is_checked_before_jax_starts(name):
  with pytest.raises(UserError, match=f'--topology={name}: a topology is'):
    prepare(name, RECIPE)


@pytest.mark.parametrize('given, flags', [(None, '--xla_tpu_'), ('--mine', '--mine')])
def test_the_compiler_gets_the_flags_that_training_gets_unless_it_is_given_others(
    given, flags, monkeypatch):
  monkeypatch.setenv('LIBTPU_INIT_ARGS', given or '')
  if given is None:
    monkeypatch.delenv('LIBTPU_INIT_ARGS')
  with pytest.raises(UserError, match='--topology=cpu:0'):
    prepare('cpu:0', RECIPE)
  assert os.environ['LIBTPU_INIT_ARGS'].startswith(flags)


def test_the_shape_of_a_slice_is_that_of_its_links():
  assert slice_of((4, 8))[0].shape == (4, 8)


@needs_libtpu
@pytest.mark.parametrize('kind', CHIPS)
def test_libtpu_knows_every_slice_that_is_listed(kind):
  for shape in CHIPS[kind].shapes:
    topology = find_topology(f'{kind}:{shape}')
    sizes = topology.shape + (1,) * (3 - len(topology.shape))
    assert len(topology.devices) == sizes[0] * sizes[1] * sizes[2]
    assert tuple(topology.devices[-1].coords) == tuple(size - 1 for size in sizes)


@needs_libtpu
def test_a_shape_that_libtpu_refuses_is_answered_with_the_list():
  with pytest.raises(UserError, match=r'v5e:3x3: .*not divisible(?s:.*)Slices that are offered'):
    find_topology('v5e:3x3')
