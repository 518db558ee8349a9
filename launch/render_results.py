"""Renders the pages and plots of docs/results/ from the JSON files in it.

  python launch/render_results.py
  python launch/render_results.py --check
  python launch/render_results.py --add=runs/chasing --name=my_chasing \\
      --set="summary=What it shows, in two sentences."

--check compares the pages and writes nothing. --add copies the figures of a finished study or
quickstart first; --set gives a key of its JSON. Next, open docs/results/README.md.
"""

from pathlib import Path

from absl import flags

from latent_deliberation.cli import app
from latent_deliberation.errors import UserError
from latent_deliberation.files import as_path
from latent_deliberation.studies.results_pages import add_result, check_pages, write_pages

_DIRECTORY = app.define_directory(
    'directory', 'Directory of the JSON files and their pages.',
    str(Path(__file__).resolve().parents[1] / 'docs' / 'results'), on_disk=True)
_CHECK = flags.DEFINE_bool('check', False, 'Compare the pages with their JSON; write nothing.')
_ADD = app.define_directory(
    'add', 'Work directory of a finished study or quickstart to add. Default: none.', '')
_NAME = flags.DEFINE_string('name', '', 'Name of the page to add; needed with --add.')
_SET = flags.DEFINE_multi_string(
    'set', [], 'KEY=VALUE to set in the JSON to add: summary, command, machine or name')

_OVERWRITE = app.define_overwrite('the figures of a page that is there already')


def main() -> None:
  directory = Path(_DIRECTORY.value)
  if _CHECK.value:
    check_pages(directory)
    print(f'{directory}: every page is what its JSON gives')
    return
  if bool(_ADD.value) != bool(_NAME.value):
    raise UserError('--add and --name belong together: give both or neither')
  if _ADD.value:
    values = dict(item.partition('=')[::2] for item in _SET.value)
    add_result(directory, _NAME.value, as_path(_ADD.value), values, _OVERWRITE.value)
  for page in write_pages(directory):
    print(page)


if __name__ == '__main__':
  app.run(main)
