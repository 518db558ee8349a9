"""A coprocessor works with the decoder, the choices and the vocabulary that it was trained with."""

import shutil

import jax
import pytest

from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.deliberation.coprocessor_checkpoint import (
  Description,
  describe,
  find_coprocessor,
  load_coprocessor,
)
from latent_deliberation.errors import UserError
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, make_mesh
from tests import finished


@pytest.fixture
def described(quickstart) -> Description:
  return describe(quickstart / 'coprocessor/coprocessor')


def find(experiment, directory, vocabulary):
  return find_coprocessor(
      directory, decoder_config=experiment.decoder, config=experiment.deliberation,
      steps=experiment.training.loop.num_steps, vocabulary=vocabulary)


def read(directory, decoder_fingerprint, frozen_dtype='float32'):
  return load_coprocessor(
      directory, decoder_fingerprint=decoder_fingerprint, frozen_dtype=frozen_dtype,
      mesh=make_mesh(MeshConfig(2, 2, 2)), rules=DEFAULT_RULES)


def test_the_directory_of_a_run_and_that_of_its_coprocessor_name_the_same(quickstart, described):
  expected = quickstart / 'coprocessor/coprocessor'
  for directory in (expected, expected.parent):
    assert find(finished.experiment(), directory, described.vocabulary) == expected


def test_a_run_that_has_not_ended_is_refused(quickstart, tmp_path, described):
  run = shutil.copytree(quickstart / 'coprocessor', tmp_path / 'run',
                        ignore=lambda *_: ['coprocessor'])
  with pytest.raises(UserError, match=f'{run} holds no trained coprocessor: name a .*'
                     'has ended .where it was stopped, the same command goes on'):
    find(finished.experiment(), run, described.vocabulary)


@pytest.mark.parametrize('change, message', [
    ({'deliberation__gate': 'channel'}, "config.deliberation.gate: 'matrix' there, 'channel' now"),
    ({'deliberation__num_latents': 1}, 'config.deliberation.num_latents: 2 there, 1 now'),
    ({'decoder__window': 9}, 'config.decoder.window: 8 there, 9 now'),
    ({'training__loop__num_steps': 4}, 'config.training.loop.num_steps: 2 there, 4 now')])
def test_another_config_is_refused_with_the_key_and_both_values(
    quickstart, described, change, message):
  with pytest.raises(UserError, match=f'coprocessor is another one:\n  {message}\nUse the config'):
    find(finished.experiment(**change), quickstart / 'coprocessor', described.vocabulary)


def test_how_it_is_scored_and_was_optimised_may_change(quickstart, described):
  experiment = finished.experiment(
      evaluation__num_traces=3, evaluation__num_ahead=9, training__batch_size=16, seed=5,
      deliberation__lora_rank=3)  # of adapters, and there are none
  assert find(experiment, quickstart / 'coprocessor', described.vocabulary)


def test_text_of_another_vocabulary_is_refused_with_both(quickstart, described):
  with pytest.raises(UserError, match=f'with the vocabulary {described.vocabulary}, these rows '
                     'were made with another: prepare'):
    find(finished.experiment(), quickstart / 'coprocessor', 'another')


def test_it_is_loaded_onto_the_mesh_for_its_own_decoder_alone(quickstart, described):
  directory = quickstart / 'coprocessor/coprocessor'
  params = read(directory, described.decoder_fingerprint)
  assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(params))
  assert fingerprint(params) == fingerprint(coprocessor_checkpoint.load(directory).params)
  with pytest.raises(UserError, match=f'{directory}: the coprocessor was trained on a decoder '
                     f'with fingerprint {described.decoder_fingerprint}, this one has another'):
    read(directory, 'another')


def test_int8_weights_beside_one_that_was_trained_without_are_warned_of(
    quickstart, described, caplog):
  read(quickstart / 'coprocessor/coprocessor', described.decoder_fingerprint, 'int8')
  assert any('in float32, and reads those of int8 now' in text for text in caplog.messages)
