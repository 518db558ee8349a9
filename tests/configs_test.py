"""Every file in configs/ gives a whole experiment, whose keys can be set and are the only ones."""

import ast
import contextlib
import dataclasses
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh

from latent_deliberation.build import count_parameters
from latent_deliberation.errors import UserError
from latent_deliberation.experiment import Experiment, as_config, bind
from latent_deliberation.files import write_json
from latent_deliberation.model.decoder import boxed_shapes
from latent_deliberation.model.transformer_config import PRESETS
from latent_deliberation.paths import arm_directory
from latent_deliberation.sharding import MESH_AXES, MeshConfig, make_mesh
from latent_deliberation.studies.study import check_results, choose_arms
from latent_deliberation.studies.study_config import LATENT_ARM, Study
from latent_deliberation.training.pretrain import describe_pretraining
from latent_deliberation.training.run import Run
from latent_deliberation.training.run_identity import claim_workdir
from latent_deliberation.training.train import describe_training
from tests import finished

CONFIGS = sorted(path.stem for path in (finished.ROOT / 'configs').glob('*.py'))
STUDIES = sorted(path.stem for path in (finished.ROOT / 'configs' / 'study').glob('*.py'))
ARGUMENTS = {'word_problems': ('directory',)}  # of studies that need one


def leaves(tree: Mapping[str, Any], path: str = '') -> Iterator[tuple[str, Any]]:
  for key in tree:
    if isinstance(tree[key], Mapping) or hasattr(tree[key], 'to_dict'):
      yield from leaves(tree[key], f'{path}{key}.')
    else:
      yield f'{path}{key}', tree[key]


@pytest.mark.parametrize('name', CONFIGS)
def test_config_binds_and_comes_back(name):
  """With every key."""
  config = finished.config_of(name)
  experiment = bind(config)
  assert isinstance(experiment, Experiment)
  assert bind(as_config(experiment)) == experiment
  assert dict(leaves(as_config(experiment))) == dict(leaves(config))
  assert {key.split('.')[0] for key, _ in leaves(config)} == {
      field.name for field in dataclasses.fields(Experiment)}


@pytest.mark.parametrize('name', STUDIES)
def test_study_config_binds_and_comes_back(name):
  """With every key."""
  config = finished.config_of(f'study/{name}', *ARGUMENTS.get(name, ()))
  study = bind(config, Study)
  assert bind(as_config(study), Study) == study
  for arm in study.arms:
    for seed in study.seeds:
      assert study.variant(arm, seed).seed == seed


def test_study_of_files_needs_a_directory():
  with pytest.raises(UserError, match='word_problems.py:DIRECTORY.*train_no_aug.txt'):
    finished.config_of('study/word_problems')


def commands_of(name: str) -> Iterator[tuple[dict[str, str], Study]]:
  """The flags of each command in the docstring of a study, and the study that it runs."""
  tree = ast.parse((finished.ROOT / f'configs/study/{name}.py').read_text())
  whole = ast.get_docstring(tree).replace('\\\n', ' ')
  for line in re.findall(r'^ *python launch/study.py (.*)$', whole, re.MULTILINE):
    flags = dict(word.removeprefix('--').partition('=')[::2] for word in shlex.split(line))
    path, _, argument = flags.pop('config').partition(':')
    assert path == f'configs/study/{name}.py'
    config = finished.config_of(f'study/{name}', *filter(None, [argument]))
    known = dict(leaves(config))
    config.update_from_flattened_dict({
        key: type(known[key])(flags[f'config.{key}']) for key in known if f'config.{key}' in flags})
    yield flags, bind(config, Study)


@pytest.mark.parametrize('name', STUDIES)
def test_commands_of_a_study_follow_each_other(name, tmp_path):
  """Commands with one work directory keep its trained arms, and results go by --overwrite alone."""
  mesh = make_mesh(MeshConfig())
  found = list(commands_of(name))
  assert found
  for flags, study in found:
    workdir = tmp_path / flags['workdir']
    names = choose_arms(study, [flags['arm']] if 'arm' in flags else [])
    results = workdir / 'results.json'
    if results.exists():
      with (pytest.raises(UserError, match='--overwrite') if 'overwrite' in flags
            else contextlib.nullcontext()):
        check_results(study, names, results)
    # As a study does it, but for weights.
    for arm in names:
      learns, experiment = study.arms[arm].learns, study.variant(arm, study.seeds[0])
      run = Run('train' if learns == LATENT_ARM else learns, experiment,
                arm_directory(workdir, arm, study.seeds[0]), mesh, init=None, frozen_shapes={})
      claim_workdir(run.workdir, run.identity('decoder', 'data'), run.changeable)
    decoder = Run('pretrain', study.experiment, workdir / 'decoder', mesh, init=None,
                  frozen_shapes={})
    claim_workdir(decoder.workdir, decoder.identity('', 'data'), decoder.changeable)
    write_json(results, json.loads(json.dumps({
        'config': dataclasses.asdict(study), 'arms': dict.fromkeys(('frozen', *names))},
        default=str)))


def test_configs_import_their_neighbours():
  """No config file runs another one by its path."""
  for path in (finished.ROOT / 'configs').rglob('*.py'):
    assert 'runpy' not in path.read_text(), path


@pytest.mark.parametrize('choice, name', [
    ('graphs.py', 'study/graphs'), ('offline.py', 'study/offline'),
    ('state_tracking.py', 'study/state_tracking'), ('addition.py', 'study/addition'),
    ('pointer_chasing.py', 'study/pointer_chasing')])
def test_unknown_size_is_refused(choice, name):
  with pytest.raises(UserError, match=f"{choice}:huge.*'quick'"):
    finished.config_of(name, 'huge')


@pytest.mark.parametrize('name', CONFIGS)
def test_every_key_can_be_set(name):
  """And no other key."""
  config = finished.config_of(name)
  for key, value in leaves(config):
    config.update_from_flattened_dict({key: value})
  config.update_from_flattened_dict({'decoder.query_scale': 0.5})  # None by default
  assert bind(config).decoder.query_scale == 0.5
  with pytest.raises(AttributeError, match='learning_rat'):
    config.training.optimizer.learning_rat = 1.0
  with pytest.raises(KeyError, match='trainin'):
    config['trainin'] = {}
  with pytest.raises(TypeError, match='batch_size'):
    config.training.batch_size = 'eight'


def test_gemma2_2b_matches_the_paper(tmp_path):
  """Everything but arrays is made: 2.6 billion parameters, their optimizer and their shardings."""
  experiment = bind(finished.config_of('gemma2_2b'))
  assert experiment.decoder == PRESETS['gemma2_2b']
  assert (experiment.deliberation.num_latents, experiment.deliberation.num_ahead,
          experiment.deliberation.num_traces) == (16, 16, 128)
  assert (experiment.deliberation.latents, experiment.deliberation.soft_tokens) == ('paper', 'free')
  assert (experiment.training.batch_size, experiment.data.length) == (1024, 2048)
  assert experiment.training.loop.num_steps == 100_000
  shapes = nn.unbox(boxed_shapes(experiment.decoder))
  assert count_parameters(shapes) == 2_614_341_888
  mesh = AbstractMesh((1, 16, 16, 1), MESH_AXES)
  run = describe_training(experiment, tmp_path, mesh)
  run.check()
  describe_pretraining(experiment, tmp_path, mesh).check()
  embed = run.abstract.params['transformer']['blocks']['attention']['query']
  assert 'fsdp' in str(jax.tree.leaves(embed)[0].sharding.spec)
  assert 1.9e9 < count_parameters(run.abstract.params) < 2.1e9  # without the embedder
