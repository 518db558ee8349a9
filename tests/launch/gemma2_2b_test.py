"""The flags that configs/gemma2_2b.py names for each machine."""

import ast
import dataclasses
import math
import re
import runpy
import sys

import pytest
from absl import flags
from jax.sharding import AbstractMesh
from ml_collections import config_flags

from latent_deliberation.errors import UserError
from latent_deliberation.experiment import Experiment, bind
from latent_deliberation.planning.topology import CHIPS
from latent_deliberation.sharding import MESH_AXES
from latent_deliberation.training.train import describe_training
from tests import finished

CONFIG = finished.ROOT / 'configs/gemma2_2b.py'
ROW = re.compile(r'  (\S.*?)  +(\(none\)|--.*(?:\n {20,}--.*)*)')


def machines() -> dict[str, list[str]]:
  """Machine -> flags, from the table in the config's docstring."""
  table = ROW.findall(ast.get_docstring(ast.parse(CONFIG.read_text())))
  return {name: [] if text == '(none)' else text.split() for name, text in table}


def experiment_with(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> Experiment:
  """The experiment as a launch script reads it."""
  arguments = ['script', f'--config={CONFIG}', *overrides]
  monkeypatch.setattr(sys, 'argv', arguments)  # where ml_collections looks for overrides
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', lock_config=True, flag_values=values)
  values(arguments)
  return bind(values.config)


def test_table_has_every_chip():
  names = list(machines())
  assert [name.split(':')[0] for name in names if ':' in name] == [
      chip for chip in CHIPS for _ in range(2)]
  assert sum(name.startswith('one chip') for name in names) == 2


@pytest.mark.parametrize('name', machines())
def test_flags_fit_machine(name, tmp_path, monkeypatch):
  """Each line of the table gives an experiment whose batches and weights divide over the chips."""
  experiment = experiment_with(machines()[name], monkeypatch)
  chips = 1
  if ':' in name:
    kind, shape = name.split(',')[0].split(':')
    assert shape in CHIPS[kind].shapes
    chips = math.prod(map(int, shape.split('x')))
  mesh = experiment.mesh
  assert (mesh.replica, mesh.data, mesh.tensor) == (1, -1, 1)
  sizes = (1, chips // mesh.fsdp, mesh.fsdp, 1)
  assert math.prod(sizes) == chips
  describe_training(experiment, tmp_path, AbstractMesh(sizes, MESH_AXES)).check_sizes()


def test_one_host():
  """Every choice of configs/one_host.py binds, fills its chips and has a row in the guide."""
  module = runpy.run_path(str(finished.ROOT / 'configs/one_host.py'))
  guide = (finished.ROOT / 'docs/planner.md').read_text()
  assert set(re.findall(r'^\| (v\S+-\d+/\w+) \|', guide, re.MULTILINE)) == set(module['SETTINGS'])
  for choice in module['SETTINGS']:
    experiment = bind(module['get_config'](choice))
    assert math.prod(dataclasses.astuple(experiment.mesh)) == int(choice.split('/')[0][4:])
    assert experiment.training.batch_size % (
        experiment.training.accumulation * experiment.mesh.fsdp) == 0
  with pytest.raises(UserError, match='v4-8/gemma3_1b.*one of .*v5e-4/gemma3_1b'):
    module['get_config']('v4-8/gemma3_1b')
