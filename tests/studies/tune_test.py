"""A decoder is tuned by the weights that its control is about, and by no others."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest
from flax import linen as nn

from latent_deliberation.build import count_parameters
from latent_deliberation.errors import UserError
from latent_deliberation.model.products import INT8_DTYPES
from latent_deliberation.sharding import make_mesh
from latent_deliberation.studies.tune import TUNINGS, describe_tuning
from latent_deliberation.training.run import log_sizes
from tests import finished

NEEDED = {'joint': 'constant', 'lora': 'lora', 'finetuned': 'full'}


def describe(tmp_path, method, trainable, **overrides):
  experiment = finished.experiment(**overrides)
  deliberation = dataclasses.replace(experiment.deliberation, trainable=trainable, lora_rank=2)
  experiment = dataclasses.replace(experiment, deliberation=deliberation)
  return describe_tuning(experiment, method, tmp_path, make_mesh(experiment.mesh))


@pytest.mark.parametrize('method', TUNINGS)
def test_trained_weights_of_each_method(tmp_path, method):
  run = describe(tmp_path, method, NEEDED[method])
  run.check()
  decoder = count_parameters(run.frozen_shapes)
  trained = count_parameters(run.boxed)
  if method == 'lora':
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(nn.unbox(run.boxed))}
    assert names == {'a', 'b'} and trained < decoder / 4
  elif method == 'joint':
    assert set(run.boxed) == {'decoder', 'latents'} and trained > decoder
  else:
    assert trained == decoder


@pytest.mark.parametrize('method, said', [
    ('joint', 'all there are'), ('finetuned', 'all there are'), ('lora', 'the others are frozen')])
def test_log_of_sizes(tmp_path, caplog, method, said):
  """Weights that train, from a copy of the decoder, are not frozen ones."""
  with caplog.at_level('INFO', logger='absl'):
    log_sizes(describe(tmp_path, method, NEEDED[method]), SimpleNamespace(num_rows=None))
  assert said in caplog.text


@pytest.mark.parametrize('method, trainable', [('joint', 'full'), ('lora', 'constant')])
def test_other_latents_are_refused(tmp_path, method, trainable):
  with pytest.raises(UserError, match=f"trainable = '{trainable}'.*'{NEEDED[method]}'"):
    describe(tmp_path, method, trainable)


def test_adapters_need_all_layers(tmp_path):
  with pytest.raises(UserError, match='deliberation.num_layers = 1'):
    describe(tmp_path, 'lora', 'lora', deliberation__num_layers=1)


@pytest.mark.parametrize('dtype', INT8_DTYPES)
@pytest.mark.parametrize('method', TUNINGS)
def test_rounded_weights_are_not_tuned(tmp_path, method, dtype):
  with pytest.raises(UserError, match=f"frozen_dtype = '{dtype}'.*'{method}'"):
    describe(tmp_path, method, NEEDED[method], computation__frozen_dtype=dtype)
