"""Meshes and changes of the rules, as flags write them."""

import dataclasses
import re

from latent_deliberation.sharding import MeshConfig


def read_mesh(text: str) -> MeshConfig:
  """A mesh from 'data=1,fsdp=256,tensor=1'; axes that are left out have the default size.

  Raises:
    ValueError: it names an axis that there is not, or a size that is no integer.
  """
  names = [field.name for field in dataclasses.fields(MeshConfig)]
  sizes = {}
  for part in text.split(','):
    name, _, size = part.partition('=')
    if name not in names or not re.fullmatch(r'-1|\d+', size) or name in sizes:
      raise ValueError(f'--mesh={text}: {part!r} must be AXIS=SIZE, each of {names} once at most, '
                       'such as data=16,fsdp=16')
    sizes[name] = int(size)
  return MeshConfig(**sizes)


def read_rules(text: str) -> dict[str, tuple[str, ...]]:
  """Changes of the rules from 'embed=fsdp+tensor,vocab=': logical axis = mesh axes.

  Raises:
    ValueError: a part is of another form.
  """
  rules = {}
  for part in text.split(','):
    name, equals, axes = part.partition('=')
    if not name or not equals or name in rules:
      raise ValueError(f'--rules={text}: {part!r} must be LOGICAL_AXIS=MESH_AXIS+MESH_AXIS, each '
                       'logical axis once, such as embed=fsdp+tensor,vocab=')
    rules[name] = tuple(axes.split('+')) if axes else ()
  return rules
