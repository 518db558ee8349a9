"""A gate from disk opens at the threshold that its curve has for a budget."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from latent_deliberation.errors import UserError
from latent_deliberation.evaluation import gating
from latent_deliberation.evaluation.gating import fit_gate
from latent_deliberation.inference.generator import open_generator
from latent_deliberation.inference.policy import ONCE, Policy, combine, open_gate
from latent_deliberation.inference.session import DecodingOptions, generate
from tests import finished

CURVES = {'learned': dict(fractions=[0.0, 0.5, 1.0], thresholds=[None, 0.2, -0.4]),
          'entropy': dict(fractions=[0.0, 0.5, 1.0], thresholds=[None, 3.0, 1.0])}
WEIGHT = np.array([0.5, -2.0], np.float32)


@pytest.fixture
def directory(tmp_path):
  (tmp_path / 'gate.json').write_text(json.dumps({'decoder': 'abc', 'curves': CURVES}))
  save_file({'weight': WEIGHT, 'bias': np.array([0.25], np.float32)},
            tmp_path / 'gate.safetensors')
  return tmp_path


@pytest.mark.parametrize('budget, threshold', [(0.5, 0.2), (0.75, -0.1), (1.0, -0.4)])
def test_a_budget_has_the_threshold_of_its_curve(directory, budget, threshold):
  policy = open_gate(directory, 'learned', budget).policy
  assert policy.threshold == pytest.approx(threshold)
  assert policy.gate.score(np.array([[2.0, 1.0]])) == pytest.approx(-0.75)


def test_entropy_has_a_curve_of_its_own_and_no_weights(directory):
  assert open_gate(directory, 'entropy', 0.75).policy == Policy(threshold=2.0)


@pytest.mark.parametrize('budget', [-0.1, 0.0, 0.49, 1.2, float('nan')])
def test_a_budget_without_a_threshold_is_refused(directory, budget):
  with pytest.raises(UserError, match=f'budget = {budget}: .* for fractions from 0.5 to 1.0'):
    open_gate(directory, 'learned', budget)


def test_a_gate_of_another_decoder_is_refused(directory):
  gate = open_gate(directory, 'learned', 0.5)
  gate.check_decoder('abc')
  with pytest.raises(UserError, match='with fingerprint abc, this one has abd: fit one'):
    gate.check_decoder('abd')


@pytest.mark.usefixtures('one_device')
def test_a_gate_that_was_fitted_opens_where_it_should(quickstart, tmp_path):
  decoder, coprocessor = quickstart / 'pretraining/decoder', quickstart / 'coprocessor'
  fit_gate(finished.experiment(evaluation__num_texts=16), decoder=decoder, coprocessor=coprocessor,
           data=quickstart, output=tmp_path / 'gate')
  assert len({path.stat().st_mode for path in (tmp_path / 'gate').iterdir()}) == 1
  fitted = open_gate(tmp_path / 'gate', 'learned', 0.5)
  generator, tokenizer = open_generator(decoder, str(coprocessor), length=64, gate=fitted)
  prompts = [tokenizer.encode(f'Document {number}: the') for number in range(8)]
  scores = fitted.policy.gate.score(generator.read(prompts).hidden)
  policy = dataclasses.replace(fitted.policy, threshold=float(np.median(scores)))
  completions = generate(generator, prompts, DecodingOptions(1, policy=policy))
  opened = [completion.latents_at == [0] for completion in completions]
  assert opened == list(scores > policy.threshold) and sum(opened) == 4


@pytest.mark.usefixtures('one_device')
def test_nothing_is_scored_where_the_texts_are_too_few_or_the_result_has_no_place(
    quickstart, tmp_path, monkeypatch):
  monkeypatch.setattr(gating, 'measure_places', lambda *unused, **more: pytest.fail('scored'))
  (tmp_path / 'file').touch()
  for num_texts, output, error, message in (
      (8, 'gate', ValueError, '4 texts: a gate is fitted on 5 at least'),
      (16, 'file', FileExistsError, 'exists already'),
      (16, 'file/gate', OSError, 'cannot be written to')):
    with pytest.raises(error, match=message):
      fit_gate(finished.experiment(evaluation__num_texts=num_texts),
               decoder=quickstart / 'pretraining/decoder', coprocessor=quickstart / 'coprocessor',
               data=quickstart, output=tmp_path / output)


@pytest.mark.parametrize('at, every, gated, expected', [
    ([], 0, False, ONCE), ([3], 0, False, Policy(at=(3,))), ([], 4, False, Policy((0,), 4)),
    ([3], 4, False, Policy((3,), 4)), ([], 0, True, Policy(threshold=2.0)),
    ([0], 0, True, Policy((0,), threshold=2.0)), ([], 4, True, Policy((), 4, threshold=2.0))])
def test_places_and_a_gate_are_asked_for_together(directory, at, every, gated, expected):
  assert combine(at, every, open_gate(directory, 'entropy', 0.75) if gated else None) == expected


@pytest.mark.parametrize('name', ['gate.json', 'gate.safetensors'])
def test_a_damaged_or_missing_gate_is_refused(directory, name):
  path = directory / name
  path.write_bytes(path.read_bytes()[:20])
  with pytest.raises(UserError, match='is damaged .*: fit it again with launch/gate.py'):
    open_gate(directory, 'learned', 0.5)
  path.unlink()
  with pytest.raises(UserError, match=f'holds no {name}: give the output of launch/gate'):
    open_gate(directory, 'learned', 0.5)
