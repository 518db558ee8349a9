"""Kinds of coprocessors, precisions and meshes that the quickstart does not cover."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.deliberation.coprocessor_checkpoint import describe
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.evaluate import constant_variant
from latent_deliberation.model import weights
from latent_deliberation.model.checkpoints import source
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.paths import METRICS_FILE
from latent_deliberation.training import train
from latent_deliberation.training.metrics import read_metrics
from latent_deliberation.training.run import fit
from latent_deliberation.training.train import open_start, train_coprocessor
from tests import finished


def losses(workdir):
  rows = read_metrics(workdir / METRICS_FILE)
  return np.array([[row['loss'], row['grad_norm'], row['validation/loss']] for row in rows[1:]])


@pytest.mark.usefixtures('one_device')
@pytest.mark.parametrize('dtype', ['float32', 'int8'])
def test_decoder_that_is_too_large(tmp_path, quickstart, monkeypatch, dtype):
  """A decoder that memory cannot hold is refused before the text is packed."""
  monkeypatch.setattr(source, 'free_memory', lambda: 1)
  experiment = finished.experiment(computation__frozen_dtype=dtype)
  with pytest.raises(UserError, match='the weights take .* and 1 are free'):
    train_coprocessor(experiment, quickstart / 'pretraining/decoder', tmp_path / 'run',
                      tmp_path / 'data')
  assert not (tmp_path / 'data').exists()


@pytest.mark.usefixtures('one_device')
def test_lora(tmp_path, quickstart):
  """Low-rank adapters are trained and nothing else."""
  experiment = finished.experiment(deliberation__trainable='lora', deliberation__lora_rank=2)
  params = train_coprocessor(
      experiment, quickstart / 'pretraining/decoder', tmp_path / 'lora', quickstart)
  assert set(params) == {'soft_tokens', 'gate', 'lora'}
  assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(params))
  written = coprocessor_checkpoint.load(tmp_path / 'lora/coprocessor')
  assert fingerprint(written.params) == fingerprint(params)
  assert written.config == experiment.deliberation
  assert np.isfinite(losses(tmp_path / 'lora')).all()


@pytest.mark.slow
def test_bfloat16_remat_accumulation(tmp_path, quickstart):
  """bfloat16, remat and accumulation on a mesh stay near float32 on one device."""
  experiment = finished.experiment(
      computation__dtype='bfloat16', computation__frozen_dtype='bfloat16',
      computation__remat='full', mesh__data=2, mesh__fsdp=2, mesh__tensor=2,
      training__accumulation=2)
  params = train_coprocessor(
      experiment, quickstart / 'pretraining/decoder', tmp_path / 'run', quickstart)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
  query = params['transformer']['blocks']['attention']['query']
  assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(query))
  assert not any(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(query))
  saved = coprocessor_checkpoint.load(tmp_path / 'run/coprocessor').params
  assert fingerprint(saved) == fingerprint(params)
  np.testing.assert_allclose(
      losses(tmp_path / 'run')[:, [0, 2]], losses(quickstart / 'coprocessor')[:, [0, 2]],
      rtol=0.02)


@pytest.mark.parametrize('dtype, mesh', [
    ('int8', {}), ('w8a8', {}),
    *(pytest.param(dtype, {'mesh__data': 2, 'mesh__fsdp': 2, 'mesh__tensor': 2},
                   marks=pytest.mark.slow) for dtype in ('int8', 'w8a8'))])
def test_int8_decoder(tmp_path, quickstart, monkeypatch, request, dtype, mesh):
  """A coprocessor trains on an int8 decoder and starts from unrounded weights."""
  if not mesh:
    request.getfixturevalue('one_device')
  decoder, started = quickstart / 'pretraining/decoder', []

  def look(run, *others, frozen, create_state, **more):
    started.append((frozen, create_state().params))
    return fit(run, *others, frozen=frozen, create_state=create_state, **more)

  monkeypatch.setattr(train, 'fit', look)
  train_coprocessor(finished.experiment(computation__frozen_dtype=dtype, **mesh), decoder,
                    tmp_path / 'run', quickstart)
  frozen, params = started[0]
  _, stored = weights.load(decoder)
  assert frozen['embedder']['table'].values.dtype == jnp.int8
  assert frozen['transformer']['blocks']['feed_forward']['up']['w'].rounds_inputs == (
      dtype == 'w8a8')
  assert fingerprint(params['transformer']) == fingerprint(stored['transformer'])
  said = describe(tmp_path / 'run/coprocessor')
  assert (said.frozen_dtype, said.decoder_fingerprint) == (dtype, fingerprint(stored))
  np.testing.assert_allclose(
      losses(tmp_path / 'run')[:, [0, 2]], losses(quickstart / 'coprocessor')[:, [0, 2]],
      rtol=0.02)


@pytest.mark.usefixtures('one_device')
def test_starts_from_a_coprocessor(tmp_path, quickstart):
  """A new coprocessor starts as a trained one; its steps count, and it must stay the same."""
  decoder, start = quickstart / 'pretraining/decoder', tmp_path / 'start'
  shutil.copytree(quickstart / 'coprocessor/coprocessor', start)
  experiment = finished.experiment(coprocessor_from=str(start), training__loop__num_steps=1,
                                   training__optimizer__learning_rate=1e-30)

  def train_on(experiment=experiment):
    return train_coprocessor(experiment, decoder, tmp_path / 'run', quickstart)

  # With such a learning rate nothing changes.
  assert fingerprint(train_on()) == fingerprint(coprocessor_checkpoint.load(start).params)
  assert describe(tmp_path / 'run/coprocessor').steps == 3
  # The place may change, and the parameters may not.
  moved = start.rename(tmp_path / 'moved')
  train_on(dataclasses.replace(experiment, coprocessor_from=str(moved)))
  with pytest.raises(UserError, match='coprocessor_from: another coprocessor than'):
    train_on(dataclasses.replace(experiment, coprocessor_from=''))
  assert open_start(constant_variant(experiment)) is None  # the control starts anew
  with pytest.raises(UserError, match=f"coprocessor_from = '{start}': .*no trained coprocessor"):
    train_on()


@pytest.mark.usefixtures('one_device')
@pytest.mark.parametrize('changes, message', [
    ({'deliberation__num_latents': 3}, "coprocessor_from = .*num_latents: "),
    ({'decoder_fingerprint': 'd1'}, 'trained with decoder weights d1'),
    ({'vocabulary_hash': 'v1'}, 'trained with vocabulary v1')])
def test_starts_from_another_kind(tmp_path, quickstart, changes, message):
  """A coprocessor of another config, decoder or vocabulary is refused before the first step."""
  trained = coprocessor_checkpoint.load(quickstart / 'coprocessor/coprocessor')
  settings = {key: value for key, value in changes.items() if '__' in key}
  coprocessor_checkpoint.save(tmp_path / 'start', dataclasses.replace(
      trained, **{key: value for key, value in changes.items() if key not in settings}))
  experiment = finished.experiment(coprocessor_from=str(tmp_path / 'start'), **settings)
  with pytest.raises(UserError, match=f'(?s){message}'):
    train_coprocessor(experiment, quickstart / 'pretraining/decoder', tmp_path / 'run', quickstart)
  assert not (tmp_path / 'run/run.json').exists()  # the right one may come next


def test_description(quickstart):
  """The checkpoint describes its decoder, vocabulary and number of steps."""
  said = describe(quickstart / 'coprocessor/coprocessor')
  decoder = weights.open_checkpoint(quickstart / 'pretraining/decoder')
  assert (said.decoder_fingerprint, said.vocabulary_hash) == (
      decoder.fingerprint, decoder.vocabulary_hash)
  assert said.steps == 2
  assert said.decoder_config == decoder.config


@pytest.mark.slow
@pytest.mark.usefixtures('one_device')
def test_write_again(tmp_path, quickstart):
  """A finished run writes a missing coprocessor again, and overwrites nothing."""
  run = shutil.copytree(quickstart / 'constant', tmp_path / 'run')
  experiment = constant_variant(finished.experiment())
  written = run / 'coprocessor'
  trained = coprocessor_checkpoint.load(written)

  def go_on():
    train_coprocessor(experiment, quickstart / 'pretraining/decoder', run, quickstart)

  (written / 'note').touch()
  go_on()
  assert (written / 'note').exists()
  shutil.rmtree(written)
  go_on()
  again = coprocessor_checkpoint.load(written)
  assert fingerprint(again.params) == fingerprint(trained.params)
  assert describe(written) == describe(quickstart / 'constant/coprocessor')
  (written / 'coprocessor.json').unlink()
  with pytest.raises(UserError, match=f'{written}.*--workdir'):
    go_on()
