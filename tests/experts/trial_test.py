"""Experts and routers are judged by what they save on the tokens after a prompt."""

import json

import numpy as np
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.experts.router_trial import (
  AVERAGE,
  BY_HAND,
  BY_TEXT,
  ORACLE,
  SINGLE,
  format_trial,
  judge_pairs,
  judge_routers,
  plot_trial,
  summarise_trial,
)
from latent_deliberation.experts.texts import Cut
from latent_deliberation.experts.trial import (
  Trial,
  compare_experts,
  format_comparison,
  interval_of,
  plot_comparison,
  try_mixes,
)
from latent_deliberation.inference.policy import NEVER, ONCE
from latent_deliberation.inference.session import DecodingOptions, score
from tests import tiny
from tests.experts import small

RANDOM = np.random.default_rng(0)


def cut(domain, number, size):
  ids = RANDOM.integers(1, tiny.CONFIG.vocab_size, size + 4).tolist()
  return Cut(domain, number, f'{domain} {number}', ids[:size], ids[size:])


CUTS = [cut(domain, number, 4 + 3 * number) for domain in ('stars', 'law', 'code')
        for number in range(3)]


@pytest.fixture(scope='module')
def experts():
  return small.experts(stars=small.expert('stars', 1), law=small.expert('law', 2))


def test_saved_nats_are_those_of_decoding(experts):
  """Every way of attaching experts scores as a session does, whatever the batches are."""
  mixes = {'stars': {'stars': 1.0}, 'both': {'stars': 0.5, 'law': 0.5}}
  prompts, ahead = [each.ids for each in CUTS], [each.ahead for each in CUTS]

  def nats(mix):
    options = DecodingOptions(4, policy=ONCE if mix else NEVER)
    source = experts.source([mix] * len(CUTS)) if mix else None
    return np.array([sum(each.logprobs) for each in score(experts.engine, prompts, ahead, options,
                                                          source=source)])

  for batch_size in (4, 9):
    trial = try_mixes(experts, CUTS, mixes, batch_size=batch_size)
    np.testing.assert_allclose(trial.plain, -nats(None), atol=2e-4)
    for column, mix in enumerate(mixes.values()):
      np.testing.assert_allclose(trial.saved[:, column], nats(mix) - nats(None), atol=4e-4)
  assert np.abs(trial.saved).min() > 1e-4
  assert trial.domains == ['stars', 'law', 'code'] and trial.of('law').sum() == 3
  assert {'decoded token', 'expert pass'} <= trial.seconds.keys()


class Named:
  """A router that believes the prompt."""
  names = ['stars', 'law']

  def scores(self, query):
    return np.array([[1.0 if name in text else -1.0 for name in self.names]
                     for text in query.texts])


def test_routers_see_prompts_in_their_order(experts):
  trial = try_mixes(experts, CUTS, {}, {'named': Named()}, batch_size=4)
  np.testing.assert_array_equal(
      trial.scores['named'] > 0,
      [[each.domain == name for name in Named.names] for each in CUTS])


def made_trial():
  """Two experts that save 2 nats at home and lose 1 elsewhere, on 30 prompts of each text."""
  cuts = [Cut(domain, number, '', [1], [1]) for domain in ('stars', 'law', 'code')
          for number in range(30)]
  saved = np.array([{'stars': (2.0, -1.0), 'law': (-1.0, 2.0), 'code': (-1.0, -1.0)}[each.domain]
                    for each in cuts])
  saved[0] = (-3.0, 1.0)  # the oracle sees that the other one is better once
  average = saved.mean(axis=1, keepdims=True)
  return Trial(cuts, ['stars', 'law', AVERAGE], np.concatenate([saved, average], axis=1),
               np.full(90, 5.0), {}, {'decoded token': 1e-3, 'named': 2e-3})


def test_regret_is_against_the_best_choice_of_each_prompt():
  trial = made_trial()
  hand = [each.domain if each.domain != 'code' else None for each in trial.cuts]
  result = json.loads(json.dumps(summarise_trial(trial, ['stars', 'law'], {
      'named': hand, 'always stars': ['stars'] * 90})))
  ways = result['ways']
  best = (29 * 2 + 1 + 30 * 2) / 90
  for name, saved in ((ORACLE, best), ('none', 0.0), (BY_HAND, (29 * 2 - 3 + 60) / 90),
                      (BY_TEXT, (29 * 2 - 3 + 60) / 90),
                      ('named', (29 * 2 - 3 + 60) / 90), (SINGLE, (-29 + 1 + 60 - 30) / 90),
                      ('always stars', (29 * 2 - 3 - 60) / 90)):
    assert ways[name]['saved']['mean'] == pytest.approx(saved), name
    assert ways[name]['regret']['mean'] == pytest.approx(best - saved), name
  assert ways['none']['share_by_text'] == 1 and ways['named']['share_by_text'] == 0
  assert result['each_prompt']['saved']['stars'][:2] == [-3.0, 2.0]
  assert result['each_prompt']['chosen'][BY_TEXT] == hand
  assert result['each_prompt']['document'][30] == 'law/0'
  assert ways['named']['reaches_target'] and not ways['none']['reaches_target']
  assert ways['always stars']['harmed'] == ['law', 'code']
  assert ways['named']['of_no_domain']['mean'] == 0
  assert ways['always stars']['of_no_domain']['mean'] == -1
  assert ways['named']['confusion'] == {
      'stars': {'stars': 30, 'law': 0, 'none': 0}, 'law': {'stars': 0, 'law': 30, 'none': 0},
      'code': {'stars': 0, 'law': 0, 'none': 30}}
  assert ways[AVERAGE]['saved']['mean'] == pytest.approx((29 * 0.5 - 1 + 15 - 30) / 90)
  page = format_trial(result)
  assert '## Chosen by named' in page and '| named | 2.00 | 2.00 |' in page


def test_harm_needs_its_whole_interval():
  """A domain of few documents has no interval, and so neither harm nor its absence is shown."""
  trial = made_trial()
  few = [number for number, each in enumerate(trial.cuts) if each.document < 5]
  smaller = Trial([trial.cuts[number] for number in few], trial.names, trial.saved[few],
                  trial.plain[few], {}, trial.seconds)
  hand = [each.domain if each.domain != 'code' else None for each in smaller.cuts]
  result = summarise_trial(smaller, ['stars', 'law'], {'stars': ['stars'] * 15, 'hand': hand})
  assert result['ways']['hand']['reaches_target'] is None
  assert '| not shown |' in format_trial(result)
  assert result['ways']['stars']['harmed'] == []
  assert result['ways']['stars']['by_domain']['law']['ci95'] is None


def test_interval_is_over_documents():
  """Prompts of one document count as one draw."""
  values = np.repeat(np.arange(25.0), 4)
  found = interval_of(values, np.repeat(np.arange(25), 4))
  means = [np.random.default_rng(seed).choice(25, 25).mean() for seed in range(2000)]
  assert found['mean'] == 12 and found['prompts'] == 100
  np.testing.assert_allclose(found['ci95'], np.percentile(means, (2.5, 97.5)), atol=0.25)


def test_whole_judgement(experts, tmp_path):
  """Numbers, page and picture of real routers; sums of two experts on mixed text."""
  trial, result = judge_routers(experts, CUTS, ('centroid', 'gain', 'arrow'), batch_size=4)
  assert set(result['ways']) == {'none', ORACLE, BY_TEXT, BY_HAND, SINGLE, AVERAGE, 'centroid',
                                 'gain', 'arrow'}
  np.testing.assert_allclose(result['ways'][ORACLE]['saved']['mean'],
                             np.maximum(trial.saved[:, :2].max(axis=1), 0).mean())

  class Tokenizer:
    def encode_more(self, text):
      return [5]

  by_domain = {name: [each for each in CUTS if each.domain == name] for name in ('stars', 'law')}
  result['pairs'] = judge_pairs(experts, by_domain, [('stars', 'law')], Tokenizer(), batch_size=4)
  found = result['pairs']['stars+law']
  better = max(found['stars']['mean'], found['law']['mean'])
  assert found['above the better one']['stars + law']['mean'] == pytest.approx(
      found['stars + law']['mean'] - better)
  json.dumps(result)
  plot_trial(result, tmp_path / 'trial.png')
  assert '## Two experts on mixed text' in format_trial(result)
  assert (tmp_path / 'trial.png').read_bytes().startswith(b'\x89PNG')


def test_comparison(experts, tmp_path):
  result = compare_experts(made_trial())
  assert result['saved']['law']['law']['mean'] == 2 and result['plain_nats']['code'] == 5
  assert '| law | ' in format_comparison(result)
  plot_comparison(result, tmp_path / 'x.png')
  assert (tmp_path / 'x.png').stat().st_size > 1000


def test_experts_that_do_not_add_up():
  """Only refining experts may be averaged or summed; the others are judged without an average."""
  anchored = small.experts(**{name: small.lora(seed, latents='anchored')
                              for seed, name in ((1, 'stars'), (2, 'law'))})
  with pytest.raises(UserError, match='only refining latents'):
    try_mixes(anchored, CUTS, {'both': {'stars': 0.5, 'law': 0.5}})
  _, result = judge_routers(anchored, CUTS, (), batch_size=4)
  assert set(result['ways']) == {'none', ORACLE, BY_TEXT, BY_HAND, SINGLE}
  assert 'nan' not in format_trial(result | {'pairs': {}})


def test_short_prompts_are_refused(experts):
  """A prompt without room for latents would be scored with latents that mean nothing."""
  with pytest.raises(UserError, match='2 tokens'):
    try_mixes(experts, [*CUTS, cut('stars', 9, 2)], {'stars': {'stars': 1.0}})


def test_unknown_router(experts):
  with pytest.raises(UserError, match="router = 'best'"):
    judge_routers(experts, CUTS, ('best',))
