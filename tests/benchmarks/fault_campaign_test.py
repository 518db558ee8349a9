"""A campaign counts what happened, goes on where it was, and its page is what its JSON gives."""

import json
import re
import shutil

import numpy as np
import pytest

from latent_deliberation.benchmarks import fault_campaign, fault_kills
from latent_deliberation.benchmarks.fault_campaign import run_campaign
from latent_deliberation.benchmarks.fault_kills import digest, jobs, phase_of, run_case
from latent_deliberation.benchmarks.fault_launches import launcher
from latent_deliberation.benchmarks.fault_mutations import CRASH, REFUSED, UNCHANGED
from latent_deliberation.benchmarks.fault_page import format_page, write_page
from latent_deliberation.benchmarks.fault_scenarios import SCENARIOS
from latent_deliberation.errors import UserError
from tests import finished

PAGE = finished.ROOT / 'docs/reliability.md'


class FakeLauncher:
  """Launches nothing."""

  def __init__(self, variables):
    pass

  def close(self):
    pass


@pytest.fixture
def cases(monkeypatch):
  """The cases that a campaign ran, which do nothing."""
  ran = []

  def mutations(opened, place, seed, numbers):
    for number in numbers:
      ran.append(('mutations', number))
      yield {'case': number, 'subject': f'subject {number % 2}', 'file': 'f', 'damage': 'd',
             'outcome': CRASH if number == 3 else REFUSED if number % 2 else UNCHANGED,
             'note': 'a note', 'seconds': number / 10}

  def kill(opened, job, place, seed):
    ran.append((job.name, seed))
    return {'job': job.name, 'kills': 2, 'phases': {'train': 2},
            'faults': ['lost'] if seed[-1] == 1 else []}

  def scenario(opened, place, seed):
    ran.append(('scenario', seed))
    return {'faults': [], 'kills': 1, 'phases': {'start': 1}, 'refused': True, 'told': True,
            'ended': True,
            'signal': 'SIGKILL', 'seconds': 3.0}

  monkeypatch.setattr('latent_deliberation.benchmarks.fault_launches.Launcher', FakeLauncher)
  monkeypatch.setattr(fault_campaign, 'prepare_base', lambda opened, place: None)
  monkeypatch.setattr(fault_campaign, 'run_mutations', mutations)
  monkeypatch.setattr(fault_campaign, 'run_case', kill)
  monkeypatch.setattr(fault_campaign, 'SCENARIOS', dict.fromkeys(SCENARIOS, scenario))
  return ran


def test_counts(tmp_path, cases):
  """Kills by job, files by subject and outcome, scenarios by name; every fault is told."""
  result = run_campaign(tmp_path / 'work', tmp_path / 'out.json', kills=6, mutations=5, scenarios=2)
  assert json.loads((tmp_path / 'out.json').read_text()) == {'campaigns': [result]}
  assert result['kills']['jobs']['pretrain'] == {'runs': 1, 'kills': 2, 'faulty': 1}
  assert sum(counts['kills'] for counts in result['kills']['jobs'].values()) == 6
  assert result['mutations']['subjects']['subject 1'] == {
      **dict.fromkeys(fault_campaign.OUTCOMES, 0), REFUSED: 1, CRASH: 1}
  assert result['mutations']['slowest_seconds'] == 0.4
  assert {name: counts['cases'] for name, counts in result['scenarios'].items()} == dict.fromkeys(
      SCENARIOS, 2)
  assert result['num_faults'] == 2 and 'lost' in result['faults']
  assert any('subject 1, f, d: crash a note' in fault for fault in result['faults'])


def test_goes_on_where_it_was(tmp_path, cases):
  """A launch runs what is left, and the same cases get the same seeds."""
  counts = dict(kills=6, mutations=5, scenarios=2)
  run_campaign(tmp_path / 'whole', tmp_path / 'whole.json', **counts)
  whole = list(cases)
  cases.clear()
  run_campaign(tmp_path / 'parts', tmp_path / 'parts.json', kills=2, mutations=3, scenarios=1)
  first = list(cases)
  run_campaign(tmp_path / 'parts', tmp_path / 'parts.json', **counts)
  assert sorted(map(str, cases)) == sorted(map(str, whole)) and 0 < len(first) < len(whole)
  assert (tmp_path / 'parts.json').read_text() == (tmp_path / 'whole.json').read_text()


def test_goes_on_after_a_cut_line(tmp_path, cases):
  """A case whose result was being written when the campaign was killed runs again."""
  counts = dict(kills=2, mutations=3, scenarios=1)
  run_campaign(tmp_path / 'whole', tmp_path / 'whole.json', **counts)
  run_campaign(tmp_path / 'work', tmp_path / 'out.json', **counts)
  last, path = cases[-1], tmp_path / 'work/results-0.jsonl'
  path.write_bytes(path.read_bytes()[:-9])
  (tmp_path / 'out.json').unlink()
  cases.clear()
  run_campaign(tmp_path / 'work', tmp_path / 'out.json', **counts)
  assert cases == [last]
  assert (tmp_path / 'out.json').read_text() == (tmp_path / 'whole.json').read_text()


def test_seeds_add_up(tmp_path, cases):
  """Campaigns of several seeds stand side by side, and the page has their sums."""
  output, counts = tmp_path / 'out.json', dict(kills=6, mutations=5, scenarios=2)
  for seed in (0, 1):
    run_campaign(tmp_path / 'work', output, seed=seed, **counts)
  # More cases of a seed take the place of the fewer ones.
  result = run_campaign(tmp_path / 'work', output, seed=0, kills=6, mutations=9, scenarios=2)
  campaigns = json.loads(output.read_text())['campaigns']
  assert [each['seed'] for each in campaigns] == [1, 0] and campaigns[1] == result
  page = format_page(campaigns)
  assert '12 kills and 14 damaged files left 4 faults. Seed 1, commit' in page
  assert '| pretrain | 2 | 4 | 2 |' in page and '| subject 1 | 6 | 4 | 0 |' in page
  assert 'The slowest took 0.8 s' in page and '- lost' in page
  # Another work directory cannot lose them.
  before = output.read_bytes()
  with pytest.raises(UserError, match='has 22 cases of --seed=0, and --workdir has 0'):
    run_campaign(tmp_path / 'empty', output, seed=0, kills=1, mutations=0, scenarios=0)
  assert output.read_bytes() == before
  # Another script's JSON is refused.
  output.write_text('{"kills": 1}')
  with pytest.raises(UserError, match='no JSON of this script'):
    run_campaign(tmp_path / 'work', output, seed=2, kills=1, mutations=0, scenarios=0)


def test_page(tmp_path, cases):
  """The page has every count, and no placeholder is left."""
  run_campaign(tmp_path / 'work', tmp_path / 'out.json', kills=6, mutations=5, scenarios=2)
  write_page(tmp_path / 'out.json', tmp_path / 'page.md')
  page = (tmp_path / 'page.md').read_text()
  assert '6 kills and 5 damaged files left 2 faults' in page
  assert '| pretrain | 1 | 2 | 1 |' in page and '| subject 1 | 2 | 1 | 0 |' in page
  assert not re.search(r'[{}]', page)


def test_committed_page():
  """docs/reliability.md is what its JSON gives."""
  campaigns = json.loads(PAGE.with_suffix('.json').read_text())['campaigns']
  assert PAGE.read_text() == format_page(campaigns)


@pytest.mark.parametrize('said, phase', [
    ('', 'start'), ('the corpus has 4 documents', 'pack'), ('27 parameters train', 'prepare a run'),
    ('the first step of a launch compiles', 'compile'),
    ('the first step of a launch compiles\nstep 1/2  loss 3', 'train'),
    ('step 2/2  loss 3\nstep 2/2  validation/loss 2', 'evaluate'),
    ('step 2/2  validation/loss 2\ngoodput 3%', 'finish')])
def test_phases(said, phase):
  """The last thing that a log tells is what a launch was at."""
  assert phase_of(said) == phase


def test_digest_leaves_out_the_clock(tmp_path, quickstart):
  """Two runs of one config differ in nothing but the clock; another number shows."""
  job, run = jobs(tmp_path)['train'], tmp_path / 'run'
  shutil.copytree(quickstart / 'coprocessor', run)
  path = run / 'metrics.jsonl'
  before, lines = digest(job, run), path.read_text()
  assert {'coprocessor/coprocessor.json', 'coprocessor/coprocessor.safetensors',
          'metrics.jsonl'} == set(before)
  path.write_text(re.sub(r'"(seconds|tokens_per_second)": [\d.]+', r'"\1": 7.0', lines))
  assert digest(job, run) == before
  path.write_text(re.sub(r'"loss": (\d)', r'"loss": 9\1', lines, count=1))
  assert [name for name, value in digest(job, run).items() if value != before[name]] == [
      'metrics.jsonl']


@pytest.mark.slow
def test_killed_run(tmp_path, monkeypatch):
  """A killed run is resumed to the same result; one that lost a checkpoint is a fault."""
  with launcher(finished.environment()) as opened:
    fault_kills.prepare_base(opened, tmp_path)
    job = jobs(tmp_path)['pretrain']
    found = run_case(opened, job, tmp_path, [0, 0, 1], kills=2)
    assert found['faults'] == [] and found['job'] == 'pretrain'
    # As if the run had been at a later step.
    monkeypatch.setattr(fault_kills, 'newest_checkpoint', lambda workdir, seen=[]: (
        seen.append(0) or -len(seen)))
    found = run_case(opened, job, tmp_path, [0, 0, 2], kills=1)
    assert any('is lost' in fault for fault in found['faults'])


class EndedLaunch:
  """A launch that ends when it is waited for long enough, and what it says until then and after."""

  def __init__(self, code, before='', after='', seconds=1.0):
    self.code, self._before, self._after, self._left = None, before, after, seconds
    self._end = code

  def poll(self):
    return self.code

  def wait(self, seconds):
    self._left -= seconds
    self.code = self._end if self._left <= 0 else None
    return self.code

  def said(self):
    return self._before + (self._after if self.code is not None else '')

  def kill(self, number=0):
    self.code = -9


def test_phase_before_the_signal():
  """What a run says as it stops is not what it was at."""
  launch = EndedLaunch(0, before='step 1/9  loss 3', after='goodput 9%', seconds=9)
  random, seconds = np.random.default_rng(0), {'all': 2.0, 'until steps': 1.0}
  ended, phase = fault_kills._end_somewhere([launch], random, seconds, 15, from_first=0.5)
  assert ended is launch and phase == 'train' and phase_of(launch.said()) == 'finish'


WAITS = 'process 0 of 2: waiting for all of them at 127.0.0.1:1\n'


@pytest.mark.parametrize('left, fault', [
    (dict(code=134, before=WAITS, after='Segmentation fault'), 'ended with code 134 and without'),
    (dict(code=134, before=WAITS, after='another task died'), ''),
    (dict(code=134, before=f'{WAITS}step 1/9', after='another task died', seconds=90), 'still ran'),
    (dict(code=134, before=WAITS, after='Some timed out task names: 1', seconds=300), ''),
    (dict(code=134, before=WAITS, after='Some timed out task names: 1', seconds=900), 'still ran')])
def test_process_that_is_left(left, fault):
  """It ends in a minute with a message; in some more if it waits for the other to come."""
  killed = EndedLaunch(-9)
  faults = fault_kills.judge([EndedLaunch(**left), killed], killed, 9)
  assert [fault in found for found in faults] == [True] * bool(fault), faults
