"""The page about a fault campaign, docs/reliability.md, from the campaign's JSON."""

import functools
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latent_deliberation.benchmarks.fault_mutations import CHANGED, OUTCOMES, REFUSED, UNCHANGED
from latent_deliberation.errors import UserError
from latent_deliberation.files import write_whole
from latent_deliberation.tables import markdown_table

_PAGE = """\
# Reliability

`launch/fault_campaign.py` hurts small runs on purpose, and counts what they survive. This page is
rendered from its JSON; do not edit it.

{kills:,} kills and {files:,} damaged files left {faults:,} faults. {origin}.
{found}
```
{commands}
python launch/fault_campaign.py --output=runs/faults.json --page=docs/reliability.md
```

A command goes on where it was stopped. A case depends on `--seed` and its number alone.
Another seed adds to the counts.

## Kills

A run is killed with SIGKILL at random moments, up to six times, and resumed each time. Half of the
moments are anywhere in a launch, half while it trains, saves and evaluates.
Its results must then be those of a run that nobody touched: the same bytes of the coprocessor, the
same fingerprint of the decoder, the same rows, the same number in every line of the metrics.

{jobs_table}

What the launches were at: {phases}. With two processes, one of them is killed. The other must end
by itself within a minute, with a message. It may wait five minutes for one that has not come yet.

## Damaged files

One file is damaged: a bit is flipped, bytes are replaced, removed, repeated or added, a number in
the text is another one, the file is cut off, emptied, removed, or holds its neighbour's content.
Reading must then refuse it with a message for people, or give what the whole file gives.
"{changed}" would be the worst: other content, without a word.

{subjects_table}

The slowest took {slowest:.1f} s. Decoders of others state no fingerprint. They are opened as a
coprocessor's decoder, whose fingerprint is known from the training.

## Other bad luck

{scenarios_table}

- A full disk refuses files above a random size, between 512 bytes and 1 MB. The quickstart must
  end with a message, and with its results once there is room.
- The clock on the wall jumps by up to ten years, at each tenth look. orbax waits by that clock, so
  a save may be given up, and the run ends with a message. Once the clock stands, the same command
  must resume and give the undisturbed result.
- A lost host is killed (SIGKILL) or hangs (SIGSTOP) while two processes train.

## What makes it so

- What is written gets its name when it is whole: directories are renamed, files are replaced. See
  [design](design.md#runs).
- Checkpoints, decoders and coprocessors state a fingerprint of their values, which is compared
  when they are read. Packed rows have a checksum each.
- `run.json` and other descriptions hold a checksum of themselves. To change one on purpose,
  remove its checksum line.
- A process that is lost ends the others: jax's heartbeat has a limit of 45 seconds.
- Files of earlier code have no checksums, and are read as they are.
"""


def format_page(campaigns: Sequence[Mapping[str, Any]]) -> str:
  """Returns docs/reliability.md from the counts of campaigns."""
  result = functools.reduce(_add, campaigns)
  killed, damaged = result['kills'], result['mutations']
  kills = sum(counts['kills'] for counts in killed['jobs'].values())
  files = sum(sum(counts.values()) for counts in damaged['subjects'].values())
  jobs_table = markdown_table(
      ['job', 'runs', 'kills', 'lost, or another result'],
      [[name, f'{counts["runs"]:,}', f'{counts["kills"]:,}', f'{counts["faulty"]:,}']
       for name, counts in killed['jobs'].items()])
  others = [name for name in OUTCOMES if name not in (REFUSED, UNCHANGED)]
  subjects_table = markdown_table(
      ['files', 'damaged', REFUSED, UNCHANGED, *others],
      [[name, *(f'{value:,}' for value in (
          sum(counts.values()), *(counts[outcome] for outcome in (REFUSED, UNCHANGED, *others))))]
       for name, counts in damaged['subjects'].items()])
  scenarios_table = markdown_table(
      ['what happened', 'cases', 'faults', 'more'],
      [[name, f'{counts["cases"]:,}', f'{counts["faulty"]:,}', _tell(name, counts)]
       for name, counts in result['scenarios'].items()]) if result['scenarios'] else (
           'No case of these was run for this page.')
  phases = ', '.join(f'{name} {count:,}' for name, count in killed['phases'].items())
  origin = '; '.join(
      f'Seed {campaign["seed"]}, commit '
      + ', '.join(commit[:12] for commit in campaign['git_commit'].split(', '))
      for campaign in campaigns)
  found = '\n'.join(f'- {fault}' for fault in result['faults'])
  if found:
    found = (f'\nThe [log](log.md#2026-11-30-faults) says how each was mended. Campaigns of later '
             f'commits ran on mended code. The first ones:\n\n{found}\n')
  return _PAGE.format(
      commands='\n'.join(map(_command, campaigns)), origin=origin, found=found, kills=kills,
      files=files, faults=result['num_faults'],
      jobs_table=jobs_table, subjects_table=subjects_table, scenarios_table=scenarios_table,
      phases=phases, slowest=damaged['slowest_seconds'], changed=CHANGED)


def _command(campaign: Mapping[str, Any]) -> str:
  """Returns the command that runs as many cases as a campaign has."""
  counts = {
      'seed': campaign['seed'],
      'kills': sum(counts['kills'] for counts in campaign['kills']['jobs'].values()),
      'mutations': sum(sum(counts.values())
                       for counts in campaign['mutations']['subjects'].values()),
      'scenarios': max((counts['cases'] for counts in campaign['scenarios'].values()), default=0)}
  flags = ' '.join(f'--{name}={count}' for name, count in counts.items() if count)
  return ('python launch/fault_campaign.py --workdir=runs/faults --output=runs/faults.json \\\n'
          f'    {flags}')


def _add(one: Any, other: Any, join: Callable[[Any, Any], Any] = operator.add) -> Any:
  """Adds two campaigns: numbers add up, the slowest time is the larger one, lists are joined."""
  if one is None or other is None:
    return other if one is None else one
  if isinstance(one, Mapping):
    return {key: _add(one.get(key), other.get(key), max if key == 'slowest_seconds' else join)
            for key in {**one, **other}}
  return join(one, other)


def _tell(name: str, counts: Mapping[str, Any]) -> str:
  if 'signals' in counts:
    phases = ', '.join(f'{phase} {count}' for phase, count in counts['phases'].items())
    return f'{counts["signals"]} signals: {phases}'
  if 'ended' in counts:
    return f'{counts["ended"]} of them ended by it, with a message'
  if 'refused' in counts:
    return f'{counts["refused"]} of them too full for the run'
  if 'told' in counts:
    return f'{counts["told"]} second launches were told of the first'
  if 'slowest_seconds' in counts:
    return '; '.join(f'{number}: the other ended in {seconds:.0f} s or less' for number, seconds
                     in counts['slowest_seconds'].items() if seconds)
  return ''


def read_campaigns(output: Path) -> list[dict[str, Any]]:
  """Returns the counts of all campaigns in a JSON file.

  Raises:
    UserError: the file is none of `launch/fault_campaign.py`.
  """
  try:
    return json.loads(output.read_bytes())['campaigns']
  except (ValueError, TypeError, KeyError) as error:
    raise UserError(f'--output={output} is no JSON of this script: move it away, or give another '
                    'file') from error


def write_page(output: Path, page: Path) -> None:
  """Writes the page of the campaigns in a JSON file, over an earlier one."""
  write_whole(page, format_page(read_campaigns(output)).encode())
