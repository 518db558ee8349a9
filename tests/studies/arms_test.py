"""An arm of the report has the names, the costs and the scores of its runs."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from latent_deliberation.deliberation import flops
from latent_deliberation.studies.arms import (
  ScoredRun,
  describe_arm,
  describe_chain,
  describe_frozen,
  read_diagnostics,
)
from latent_deliberation.studies.study_config import ArmConfig
from latent_deliberation.studies.study_result import Outcomes
from latent_deliberation.training.metrics import MetricsWriter
from tests.studies.tiny_study import ARMS, study

SCORER = SimpleNamespace(prompt_tokens=20.0, answer_tokens=2.0)


def outcomes(nll):
  return Outcomes(np.full(3, float(nll)), np.ones(3, bool))


def test_arm_and_controls_hold_all_seeds():
  asked = study({'own': ARMS['own'], 'small': ARMS['own']}, seeds=(0, 1))
  runs = [ScoredRun(5, 12, {'own': outcomes(seed), 'zero': outcomes(seed + 0.5)})
          for seed in asked.seeds]
  arms = describe_arm(asked, 'small', runs, SCORER, (3.0, 4.0))
  assert list(arms) == ['small', 'small/zero']
  for arm, start in zip(arms.values(), (0.0, 0.5), strict=True):
    assert (arm.trained, arm.total, arm.seeds, arm.seconds) == (5, 12, (0, 1), (3.0, 4.0))
    assert [scores.nll[0] for scores in arm.outcomes] == [start, start + 1]
  assert list(describe_arm(asked, 'own', runs, SCORER, (3.0, 4.0))) == ['own', 'zero']


def test_other_steps_are_not_matched():
  longer = ArmConfig(changes={'training': {'loop': {'num_steps': 3}}})
  asked = study({'own': ARMS['own'], 'longer': longer})
  runs = [ScoredRun(5, 12, {'own': outcomes(0.5)})]
  notes = [describe_arm(asked, name, runs, SCORER, (3.0,))[name].note for name in asked.arms]
  assert notes == ['matched in tokens and steps: 2 steps of 8 texts',
                   'not matched: 3 steps of 8 texts']


def test_start_of_latents_alone():
  """Only a coprocessor starts from a trained one; tuned decoders have the budget of the study."""
  asked = study({name: ARMS[name] for name in ('own', 'finetuned', 'lora')})
  asked = dataclasses.replace(asked, experiment=dataclasses.replace(
      asked.experiment, coprocessor_from='somewhere'))
  runs = [ScoredRun(5, 12, {'own': outcomes(0.5)})]
  notes = [describe_arm(asked, name, runs, SCORER, (3.0,))[name].note for name in asked.arms]
  assert 'not matched' in notes[0] and 'starts from' in notes[0]
  assert notes[1:] == ['matched in tokens and steps: 2 steps of 8 texts'] * 2


def test_costs_of_latents_and_chains():
  """Latents cost more than the decoder alone; a chain costs its tokens."""
  asked = study({'own': ARMS['own']})
  run = ScoredRun(7, 7, {'frozen': outcomes(1.0)})
  frozen = describe_frozen(asked.experiment, run, SCORER, 9.0)
  assert (frozen.seconds, frozen.outcomes[0].nll[0]) == ((9.0,), 1.0)
  own = describe_arm(asked, 'own', [ScoredRun(5, 12, {'own': outcomes(0.5)})], SCORER, (3.0,))
  config = asked.experiment.deliberation
  assert own['own'].flops_per_token - frozen.flops_per_token == pytest.approx(
      flops.latents_flops(asked.experiment.decoder, config, 20.0) / 2)
  decoder = asked.experiment.decoder
  short, long = (describe_chain(decoder, frozen, SCORER, outcomes(0.2), tokens, 5.0)
                 for tokens in (4.0, 8.0))
  assert long.flops_per_token > short.flops_per_token > frozen.flops_per_token
  assert (long.kind, long.trained, long.seconds) == (
      'decoder with its own chain, 8 tokens', 7, (5.0,))


def test_training_costs_of_each_kind():
  asked = study(ARMS)
  variants = {name: asked.variant(name, 0) for name in asked.arms}
  spent = {name: describe_arm(asked, name, [ScoredRun(5, 12, {'own': outcomes(0.5)})], SCORER,
                              (3.0,))[name].train_flops for name in asked.arms}
  for name, variant in variants.items():
    decoder_config, length = variant.decoder, variant.data.length
    texts = variant.training.loop.num_steps * variant.training.batch_size
    learns = asked.arms[name].learns
    rank = variant.deliberation.lora_rank if learns == 'lora' else 0
    expected = (
        flops.text_flops(decoder_config, length, rank) if learns in ('finetuned', 'lora') else
        flops.traces_flops(decoder_config, variant.deliberation, length, tuned=learns == 'joint'))
    assert spent[name] == texts * expected, name
  assert len({asked.arms[name].learns for name in asked.arms}) > 2


def test_diagnostics_are_read_from_metrics(tmp_path):
  metrics = MetricsWriter(tmp_path)
  metrics.write(2, {'loss': 1.0})
  metrics.write(4, {'validation/gain': 0.1, 'validation/content': 0.2,
                    'latents/effective_rank': 3.0, 'other': 5.0})
  metrics.close()
  assert read_diagnostics(tmp_path) == [
      {'step': 4, 'gain': 0.1, 'content': 0.2, 'effective_rank': 3.0}]
