"""A decoder is tuned by the weights that its control is about, and by no others."""

import dataclasses

import jax
import pytest
from flax import linen as nn

from latent_deliberation.errors import UserError
from latent_deliberation.models import count_parameters
from latent_deliberation.sharding import make_mesh
from latent_deliberation.studies.tune import TUNINGS, describe_tuning
from tests import finished

NEEDED = {'joint': 'constant', 'lora': 'lora', 'finetuned': 'full'}


def describe(tmp_path, how, trainable, **overrides):
  experiment = finished.experiment(**overrides)
  deliberation = dataclasses.replace(experiment.deliberation, trainable=trainable, lora_rank=2)
  experiment = dataclasses.replace(experiment, deliberation=deliberation)
  return describe_tuning(experiment, how, tmp_path, make_mesh(experiment.mesh))


@pytest.mark.parametrize('how', TUNINGS)
def test_what_learns_is_what_the_control_is_about(tmp_path, how):
  run = describe(tmp_path, how, NEEDED[how])
  run.check()
  decoder = count_parameters(run.frozen_shapes)
  trained = count_parameters(run.boxed)
  if how == 'lora':
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(nn.unbox(run.boxed))}
    assert names == {'a', 'b'} and trained < decoder / 4
  elif how == 'joint':
    assert set(run.boxed) == {'decoder', 'latents'} and trained > decoder
  else:
    assert trained == decoder


@pytest.mark.parametrize('how, trainable', [('joint', 'full'), ('lora', 'constant')])
def test_a_control_of_other_latents_is_refused(tmp_path, how, trainable):
  with pytest.raises(UserError, match=f"needs deliberation.trainable = '{NEEDED[how]}', this is "
                                       f"'{trainable}'"):
    describe(tmp_path, how, trainable)


def test_adapters_of_some_layers_are_not_put_on_all(tmp_path):
  with pytest.raises(UserError, match="'lora' tuning .* all layers .*num_layers = 1: set 0"):
    describe(tmp_path, 'lora', 'lora', deliberation__num_layers=1)


@pytest.mark.parametrize('how', TUNINGS)
def test_rounded_weights_are_not_tuned(tmp_path, how):
  with pytest.raises(UserError, match=f"'{how}' tuning learns .* 'int8' rounds: use 'float32'"):
    describe(tmp_path, how, NEEDED[how], computation__frozen_dtype='int8')
