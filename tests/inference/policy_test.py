"""Where texts deliberate, and gates from disk."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from latent_deliberation.errors import UserError
from latent_deliberation.evaluation import gating
from latent_deliberation.evaluation.gating import fit_gate
from latent_deliberation.inference.engine import open_engine
from latent_deliberation.inference.policy import (
  NEVER,
  ONCE,
  Gate,
  Policy,
  combine,
  fraction_of_places,
  open_gate,
)
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


@pytest.mark.parametrize('policy, stops', [
    (NEVER, []), (ONCE, [0]), (Policy(at=(5, 2, 5)), [2, 5]), (Policy(every=4), [0, 4, 8, 12]),
    (Policy(at=(3,), every=6), [0, 3, 6, 12]), (Policy(threshold=1.0), [])])
def test_next_stop(policy, stops):
  found, count = [], 0
  while (stop := policy.next_stop(count)) is not None and stop < 14:
    assert stop >= count
    found.append(stop)
    count = stop + 1
  assert found == stops


def test_repeats():
  assert [policy.repeats for policy in (
      NEVER, ONCE, Policy(at=(7,)), Policy(at=(0, 7)), Policy(every=3), Policy(threshold=2.0))] == [
          False, False, False, True, True, True]


@pytest.mark.parametrize('call, message', [
    (lambda: Policy(at=(-1, 2)), 'at = -1'), (lambda: Policy(every=0), 'every = 0'),
    (lambda: Policy(min_gap=0), 'min_gap = 0'), (lambda: Policy(min_gap=2**31), 'min_gap = 2147'),
    (lambda: Policy(every=2.5), 'every = 2.5'), (lambda: Policy(every=10**30), 'every = 1000'),
    (lambda: Policy(at=(1, 2.5)), 'at = 2.5'), (lambda: Policy(at=(10**30,)), 'at = 1000'),
    (lambda: Policy(threshold=-1.0), 'threshold = -1.0'),
    (lambda: Policy(threshold=float('nan')), 'threshold = nan'),
    (lambda: Policy(gate=Gate(np.zeros(2), 0.0)), 'gate .* threshold')])
def test_bad_policies_are_refused(call, message):
  with pytest.raises(UserError, match=message):
    call()


@pytest.mark.parametrize('at, every, gated, expected', [
    ([], 0, False, ONCE), ([3], 0, False, Policy(at=(3,))), ([], 4, False, Policy((0,), 4)),
    ([3], 4, False, Policy((3,), 4)), ([], 0, True, Policy(threshold=2.0)),
    ([0], 0, True, Policy((0,), threshold=2.0)), ([], 4, True, Policy((), 4, threshold=2.0))])
def test_combine(directory, at, every, gated, expected):
  gate = open_gate(directory, 'entropy', 0.75, min_gap=1) if gated else None
  assert combine(at, every, gate) == dataclasses.replace(expected, min_gap=1 if gated else 8)


@pytest.mark.parametrize('budget, threshold', [(0.5, 0.2), (0.75, -0.1), (1.0, -0.4)])
def test_budget_gives_threshold_of_curve(directory, budget, threshold):
  policy = open_gate(directory, 'learned', budget, min_gap=1).policy
  assert policy.threshold == pytest.approx(threshold)
  assert policy.gate.score(np.array([[2.0, 1.0]])) == pytest.approx(-0.75)


def test_entropy_curve_needs_no_weights(directory):
  assert open_gate(directory, 'entropy', 0.75, min_gap=1).policy == Policy(threshold=2.0, min_gap=1)


@pytest.mark.parametrize('budget, min_gap, message', [
    (-0.1, 1, '0'), (float('nan'), 1, '0'), (0.0, 1, '0.5 to 1,'), (0.49, 1, '0.5 to 1,'),
    (0.1, 8, '0.1111 to 0.125, at min_gap = 8'), (1.2, 1, 'min_gap = 1 '),
    (0.25, 8, 'min_gap = 8 .* 0.125 .*--min_gap'), (float('inf'), 1, '0'), (10**400, 1, '0')])
def test_budget_that_cannot_be_spent_is_refused(directory, budget, min_gap, message):
  with pytest.raises(UserError, match=f'budget = {budget}: .*{message}'):
    open_gate(directory, 'learned', budget, min_gap)


def test_unknown_score_is_refused(directory):
  with pytest.raises(UserError, match="gate_score = 'learnt': .*'learned', 'entropy'"):
    open_gate(directory, 'learnt', 0.5, min_gap=1)


@pytest.mark.parametrize('budget, min_gap', [
    (0.02, 8), (0.05, 8), (0.1, 8), (0.125, 8), (0.3, 2), (0.7, 1)])
def test_budget_is_a_fraction_of_tokens(budget, min_gap):
  """A gate with this threshold and gap opens at the budgeted fraction of tokens."""
  scores = np.random.default_rng(0).random(100_000)
  threshold = 1 - fraction_of_places(budget, min_gap)
  opened, gate_from = 0, 0
  for count, score in enumerate(scores):
    if count >= gate_from and score > threshold:
      opened, gate_from = opened + 1, count + min_gap
  assert opened / len(scores) == pytest.approx(budget, rel=0.05)


def test_gate_of_another_decoder_is_refused(directory):
  gate = open_gate(directory, 'learned', 0.5, min_gap=1)
  gate.check_decoder('abc')
  with pytest.raises(UserError, match='fingerprint abc, .* abd'):
    gate.check_decoder('abd')


@pytest.mark.parametrize('name', ['gate.json', 'gate.safetensors'])
def test_damaged_or_missing_gate_is_refused(directory, name):
  path = directory / name
  path.write_bytes(path.read_bytes()[:20])
  with pytest.raises(UserError, match='damaged .*launch/gate.py'):
    open_gate(directory, 'learned', 0.1)
  path.unlink()
  with pytest.raises(UserError, match=f'no {name}: .*launch/gate.py'):
    open_gate(directory, 'learned', 0.1)


@pytest.mark.usefixtures('one_device')
def test_fitted_gate_opens_above_its_threshold(quickstart, tmp_path):
  decoder, coprocessor = quickstart / 'pretraining/decoder', quickstart / 'coprocessor'
  fit_gate(finished.experiment(evaluation__num_texts=16), decoder_dir=decoder,
           coprocessor_dir=coprocessor, prepared_dir=quickstart, output=tmp_path / 'gate')
  assert len({path.stat().st_mode for path in (tmp_path / 'gate').iterdir()}) == 1
  fitted = open_gate(tmp_path / 'gate', 'learned', 0.1)
  engine, tokenizer = open_engine(decoder, str(coprocessor), length=64, gate=fitted)
  prompts = [tokenizer.encode(f'Document {number}: the') for number in range(8)]
  scores = fitted.policy.gate.score(engine.read(prompts).hidden)
  policy = dataclasses.replace(fitted.policy, threshold=float(np.median(scores)))
  completions = generate(engine, prompts, DecodingOptions(1, policy=policy))
  opened = [completion.latents_at == [0] for completion in completions]
  assert opened == list(scores > policy.threshold) and sum(opened) == 4


@pytest.mark.usefixtures('one_device')
def test_bad_gate_request_scores_nothing(quickstart, tmp_path, monkeypatch):
  """Too few texts, or no place for the result, are noticed before any text is scored."""
  monkeypatch.setattr(gating, 'score_places', lambda *unused, **more: pytest.fail('scored'))
  (tmp_path / 'file').touch()
  for num_texts, output, message in (
      (8, 'gate', '4 texts.* 5'), (16, 'file', 'file .*exists'),
      (16, 'file/gate', 'file cannot')):
    with pytest.raises(UserError, match=message):
      fit_gate(finished.experiment(evaluation__num_texts=num_texts),
               decoder_dir=quickstart / 'pretraining/decoder',
               coprocessor_dir=quickstart / 'coprocessor',
               prepared_dir=quickstart, output=tmp_path / output)
