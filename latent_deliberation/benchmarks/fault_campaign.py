"""The fault campaign: counts how many faults a run survives, and writes the page about it.

Cases are numbered, and a seed and a number decide what happens in one. Results are kept one by one,
so that a campaign that was stopped goes on where it was. Campaigns of other seeds, on any machine,
are added to the same counts.
"""

import collections
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from latent_deliberation.benchmarks.fault_kills import jobs, prepare_base, run_case
from latent_deliberation.benchmarks.fault_launches import Launcher, launcher
from latent_deliberation.benchmarks.fault_mutations import (
  OUTCOMES,
  REFUSED,
  UNCHANGED,
  run_mutations,
)
from latent_deliberation.benchmarks.fault_page import read_campaigns
from latent_deliberation.benchmarks.fault_scenarios import SCENARIOS
from latent_deliberation.errors import UserError
from latent_deliberation.files import make_writable, read_lines, write_json
from latent_deliberation.progress import Progress
from latent_deliberation.provenance import git_commit

# Jobs that are killed, in turn. One of two processes is the more work, so it comes less often.
KILLED = ('pack', 'pretrain', 'train', 'pack', 'pretrain', 'train', 'train on two',
          'pretrain on two', 'quickstart')
_KILLS, _MUTATIONS = 'kills', 'mutations'  # kinds of cases; a scenario is a kind of its own
_SHOWN_FAULTS = 20


def run_campaign(workdir: Path, output: Path, *, kills: int, mutations: int, scenarios: int,
                 seed: int = 0) -> dict[str, Any]:
  """Runs what is left of a campaign, and writes its counts beside those of other seeds.

  Args:
    workdir: directory for runs, logs and the results so far.
    output: JSON file of all campaigns; that of this seed is written anew.
    kills: number of launches to kill.
    mutations: number of files to damage.
    scenarios: number of cases of each scenario.
    seed: seed of all cases.

  Returns: the counts of this seed's campaign.

  Raises:
    UserError: the directory cannot be written to.
    UserError: `output` has cases of this seed that are not in `workdir`.
  """
  make_writable(workdir)
  results = _Results(workdir / f'results-{seed}.jsonl')
  _read_others(output, results, seed)
  variables = {'JAX_COMPILATION_CACHE_DIR': str(workdir / 'compiled'),
               'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  with launcher(variables) as opened:
    if mutations > len(results.of(_MUTATIONS)):
      _mutate(opened, workdir, results, seed, mutations)
    if kills or scenarios:
      prepare_base(opened, workdir)
    if kills:
      _kill(opened, workdir, results, seed, kills)
    for number, name in enumerate(SCENARIOS):
      _repeat(opened, workdir, results, name, SCENARIOS[name], [seed, 2 + number], scenarios)
  counts = {'seed': seed, 'git_commit': ', '.join(results.commits()), 'cases': results.count(),
            **summarise(results)}
  # Another seed may have ended meanwhile.
  write_json(output, {'campaigns': [*_read_others(output, results, seed), counts]})
  return counts


def _read_others(output: Path, results: '_Results', seed: int) -> list[dict[str, Any]]:
  """Returns the campaigns of other seeds in `output`; see `run_campaign`."""
  campaigns = read_campaigns(output) if output.is_file() else []
  for campaign in campaigns:
    if campaign['seed'] == seed and campaign['cases'] > results.count():
      raise UserError(
          f'--output={output} has {campaign["cases"]} cases of --seed={seed}, and --workdir has '
          f'{results.count()}: go on in the directory of that campaign, or give another --seed')
  return [campaign for campaign in campaigns if campaign['seed'] != seed]


class _Results:
  """Results of cases, one line each, by kind."""

  def __init__(self, path: Path):
    self._path, self._found = path, collections.defaultdict(list)
    self._commit = git_commit()  # once, since it asks git several times
    if path.exists():
      for result in read_lines(path):
        self._found[result['kind']].append(result)

  def of(self, kind: str) -> list[dict[str, Any]]:
    """Returns the results of a kind of cases, in their order."""
    return self._found[kind]

  def count(self) -> int:
    """Returns the number of all cases."""
    return sum(map(len, self._found.values()))

  def commits(self) -> list[str]:
    """Returns the commits that cases ran on, in their order; those of earlier code name none."""
    named = [result.get('git_commit', '') for found in self._found.values() for result in found]
    return list(dict.fromkeys(filter(None, named))) or [self._commit]

  def add(self, kind: str, result: Mapping[str, Any]) -> None:
    """Keeps a result."""
    result = {'kind': kind, 'git_commit': self._commit, **result}
    self._found[kind].append(result)
    with self._path.open('a') as file:
      file.write(json.dumps(result) + '\n')
    for fault in result.get('faults', ()):
      logging.warning('%s, case %d: %s', kind, len(self._found[kind]) - 1, fault)


def _mutate(opened: Launcher, workdir: Path, results: _Results, seed: int, mutations: int) -> None:
  done = len(results.of(_MUTATIONS))
  progress = Progress('damaging files', 'files', mutations, first=done)
  for result in run_mutations(opened, workdir / 'mutations', seed, range(done, mutations)):
    results.add(_MUTATIONS, result)
    if result['outcome'] not in (REFUSED, UNCHANGED):
      logging.warning('file %(case)d: %(subject)s, %(file)s, %(damage)s: %(outcome)s %(note)s',
                      result)
    progress.update(len(results.of(_MUTATIONS)))


def _kill(opened: Launcher, workdir: Path, results: _Results, seed: int, kills: int) -> None:
  def killed() -> int:
    return sum(result['kills'] for result in results.of(_KILLS))

  progress = Progress('killing runs', 'kills', kills, first=killed())
  while killed() < kills:
    number = len(results.of(_KILLS))
    job = jobs(workdir)[KILLED[number % len(KILLED)]]
    results.add(_KILLS, run_case(opened, job, workdir, [seed, 0, number]))
    progress.update(killed())


def _repeat(opened: Launcher, workdir: Path, results: _Results, name: str,
            scenario: Callable[[Launcher, Path, Sequence[int]], dict[str, Any]],
            seed: Sequence[int], count: int) -> None:
  progress = Progress(name, 'cases', count, first=len(results.of(name)))
  for number in range(len(results.of(name)), count):
    results.add(name, scenario(opened, workdir, [*seed, number]))
    progress.update(number + 1)


def summarise(results: _Results) -> dict[str, Any]:
  """Returns the counts of a campaign, and messages of its faults."""
  killed, damaged = results.of(_KILLS), results.of(_MUTATIONS)
  by_job = collections.defaultdict(lambda: {'runs': 0, 'kills': 0, 'faulty': 0})
  phases = collections.Counter()
  for result in killed:
    counts = by_job[result['job']]
    counts['runs'] += 1
    counts['kills'] += result['kills']
    counts['faulty'] += bool(result['faults'])
    phases.update(result['phases'])
  by_subject = collections.defaultdict(lambda: dict.fromkeys(OUTCOMES, 0))
  for result in damaged:
    by_subject[result['subject']][result['outcome']] += 1
  scenarios = {name: {'cases': len(found), 'faulty': sum(bool(each['faults']) for each in found),
                      **_details(name, found)}
               for name in SCENARIOS if (found := results.of(name))}
  faults = [fault for kind in (_KILLS, *SCENARIOS) for result in results.of(kind)
            for fault in result['faults']]
  faults += [f'{each["subject"]}, {each["file"]}, {each["damage"]}: {each["outcome"]} '
             f'{each["note"]}' for each in damaged if each['outcome'] not in (REFUSED, UNCHANGED)]
  return {
      'kills': {'jobs': dict(by_job), 'phases': dict(phases)},
      'mutations': {'subjects': dict(by_subject),
                    'slowest_seconds': max((each['seconds'] for each in damaged), default=0.0)},
      'scenarios': scenarios, 'faults': faults[:_SHOWN_FAULTS], 'num_faults': len(faults)}


def _details(name: str, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns what the page tells of a scenario besides its cases."""
  if name == 'SIGTERM in every phase':
    phases = collections.Counter()
    for each in found:
      phases.update(each['phases'])
    return {'signals': sum(each['kills'] for each in found), 'phases': dict(phases)}
  if name == 'clock that jumps':
    return {'ended': sum(each['ended'] for each in found)}
  if name == 'full disk':
    return {'refused': sum(each['refused'] for each in found)}
  if name == 'two runs in one directory':
    return {'told': sum(each['told'] for each in found)}
  if name == 'lost host':
    return {'slowest_seconds': {number: max(
        (each['seconds'] or 0.0 for each in found if each['signal'] == number), default=None)
        for number in ('SIGKILL', 'SIGSTOP')}}
  return {}
