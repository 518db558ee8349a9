"""Meshes and rules are read from flags as they were meant, or refused."""

import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.sharding import MeshConfig, parse_mesh, parse_rules


def test_a_mesh_and_rules_are_read_from_flags():
  assert parse_mesh('data=1,fsdp=256') == MeshConfig(data=1, fsdp=256)
  assert parse_mesh('fsdp=-1,data=2') == MeshConfig(data=2, fsdp=-1)
  assert parse_rules('embed=fsdp+tensor,vocab=') == {'embed': ('fsdp', 'tensor'), 'vocab': ()}


@pytest.mark.parametrize('read, text, part', [
    (parse_mesh, 'model=2', 'model=2'), (parse_mesh, 'fsdp', 'fsdp'), (parse_mesh, 'fsdp=x', 'fsdp=x'),
    (parse_mesh, 'fsdp=2,fsdp=4', 'fsdp=4'), (parse_mesh, '', ''), (parse_rules, 'embed', 'embed'),
    (parse_rules, 'embed=,embed=fsdp', 'embed=fsdp')])
def test_a_mesh_or_rules_of_another_form_are_refused(read, text, part):
  with pytest.raises(UserError, match=f"={text}: '{part}' must be"):
    read(text)
