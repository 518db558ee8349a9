"""Kills runs, damages files and fills disks, and counts what a run survives.

  python launch/fault_campaign.py --workdir=runs/faults --output=runs/faults.json --kills=20 \\
      --mutations=1000 --scenarios=2
  python launch/fault_campaign.py --output=runs/faults.json --page=docs/reliability.md

All runs are of the smallest decoder, in processes of their own. The same command goes on where it
was stopped. Another --seed adds to the counts. A kill takes some seconds, a damaged file a tenth of
one, a case of the five scenarios a minute. Next, render the page with --page.
"""

from pathlib import Path

from absl import flags

from latent_deliberation.benchmarks.fault_campaign import run_campaign
from latent_deliberation.benchmarks.fault_page import write_page
from latent_deliberation.cli import app
from latent_deliberation.errors import UserError
from latent_deliberation.files import as_path

_WORKDIR = app.define_directory('workdir', 'Directory for runs and results so far.', '',
                               on_disk=True)
_OUTPUT = app.define_file('output', 'JSON file of the counts; each seed adds to it.')
_PAGE = app.define_file('page', 'Markdown page to render from --output. Default: none.', '')
_KILLS = flags.DEFINE_integer('kills', 0, 'Number of launches to kill.', lower_bound=0)
_MUTATIONS = flags.DEFINE_integer('mutations', 0, 'Number of files to damage.', lower_bound=0)
_SCENARIOS = flags.DEFINE_integer('scenarios', 0, 'Cases of each other kind of bad luck.',
                                  lower_bound=0)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of all cases.', lower_bound=0)


def main() -> None:
  output = as_path(_OUTPUT.value)
  if not (_KILLS.value or _MUTATIONS.value or _SCENARIOS.value or _PAGE.value):
    raise UserError('nothing is asked: give --kills, --mutations, --scenarios or --page')
  if _KILLS.value or _MUTATIONS.value or _SCENARIOS.value:
    if not _WORKDIR.value:
      raise UserError("--workdir = '': give a directory for the runs of the campaign")
    result = run_campaign(Path(_WORKDIR.value).absolute(), output, kills=_KILLS.value,
                          mutations=_MUTATIONS.value, scenarios=_SCENARIOS.value, seed=_SEED.value)
    print(f'{result["num_faults"]} faults. Counts: {output}')
  if _PAGE.value:
    if not output.is_file():
      raise UserError(f'--output={output} does not exist: run a campaign first')
    write_page(output, as_path(_PAGE.value))
    print(f'Page: {_PAGE.value}')


if __name__ == '__main__':
  app.run(main)
