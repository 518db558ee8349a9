"""Meshes and rules are read from flags as they were meant, or refused."""

import pytest

from latent_deliberation.cli.flags import read_mesh, read_rules
from latent_deliberation.sharding import MeshConfig


def test_a_mesh_and_rules_are_read_from_flags():
  assert read_mesh('data=1,fsdp=256') == MeshConfig(data=1, fsdp=256)
  assert read_mesh('fsdp=-1,data=2') == MeshConfig(data=2, fsdp=-1)
  assert read_rules('embed=fsdp+tensor,vocab=') == {'embed': ('fsdp', 'tensor'), 'vocab': ()}


@pytest.mark.parametrize('read, text, part', [
    (read_mesh, 'model=2', 'model=2'), (read_mesh, 'fsdp', 'fsdp'), (read_mesh, 'fsdp=x', 'fsdp=x'),
    (read_mesh, 'fsdp=2,fsdp=4', 'fsdp=4'), (read_mesh, '', ''), (read_rules, 'embed', 'embed'),
    (read_rules, 'embed=,embed=fsdp', 'embed=fsdp')])
def test_a_mesh_or_rules_of_another_form_are_refused(read, text, part):
  with pytest.raises(ValueError, match=f"={text}: '{part}' must be"):
    read(text)
