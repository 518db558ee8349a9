"""Pages of results, rendered from the JSON of finished runs: docs/results/.

  NAME.json      figures of a study (results.json) or of the quickstart (report.json), and a summary
  NAME.md        its page, rendered
  NAME.png       its plot, rendered
  README.md      an index, rendered: a row for each of them

No table is typed. A run enters with `add_result`, which keeps what pages and plots need.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from latent_deliberation.errors import MissingError, UserError
from latent_deliberation.evaluation import report
from latent_deliberation.evaluation.perplexity import CONSTANT, FROZEN, OWN, SHUFFLED
from latent_deliberation.evaluation.plots import plot_changes
from latent_deliberation.files import check_free, list_directory, write_whole
from latent_deliberation.paths import OLD_VALUES, REPORT, RESULTS, with_current_names
from latent_deliberation.studies import study_report
from latent_deliberation.studies.study_plots import plot_study
from latent_deliberation.studies.tune import TUNINGS
from latent_deliberation.tables import markdown_table

FAILS_BELOW = 0.8  # the frozen decoder begins to fail at the first difficulty below this accuracy
POSITION = 4  # ahead position of the index, for text
INDEX = 'README.md'
# Keys that --set may give. They stay when a result is added again without them.
SETTABLE = ('summary', 'command', 'machine', 'name')  # the name is the title of the page
# Keys that neither a page nor a plot uses.
LEFT_OUT = ('diagnostics', 'pictures', 'decoder_unchanged')

# Arms of runs that were made under old names.
OLD_ARMS = {
    'continued': 'finetuned', 'unified': 'joint', 'adapted': 'lora', 'lora': 'lora coprocessor',
    '16 by adapters': '16, lora coprocessor', 'continued gently': 'finetuned gently',
    'continued at rest': 'finetuned at the final rate'}
OLD_CONFIGS = {'hops.py': 'pointer_chasing.py', 'groups.py': 'state_tracking.py',
               'arithmetic.py': 'addition.py', 'gsm8k.py': 'word_problems.py'}

Result = dict[str, Any]  # the content of NAME.json


def add_result(directory: Path, name: str, workdir: Path, values: Mapping[str, str],
               overwrite: bool = False) -> None:
  """Copies the figures of a finished run to <directory>/<name>.json, under current names.

  Args:
    directory: directory of the pages.
    name: name of the page.
    workdir: work directory of a study or a quickstart.
    values: values for keys of SETTABLE.
    overwrite: whether to replace the figures of a page that is there already.

  Raises:
    UserError: the page is there already, `workdir` has no figures, a key is unknown, or there is no
      summary.
  """
  found = [path for path in (workdir / f'{RESULTS}.json', workdir / f'{REPORT}.json')
           if path.is_file()]
  if not found:
    raise MissingError(f'{workdir} has no {RESULTS}.json or {REPORT}.json: name the work directory '
                       'of a finished study or quickstart')
  unknown = sorted(set(values) - set(SETTABLE))
  if unknown:
    raise UserError(f'--set={unknown[0]}=...: the key must be one of {SETTABLE}')
  # Figures under current names, rounded, and without what no page shows.
  path = directory / f'{name}.json'
  check_free([path], overwrite)
  earlier = _read(path) if path.is_file() else {}
  result = _shorten(_rename_old(_read(found[0]), name))
  # Values given now win over those of the run, and these over earlier ones.
  result = {key: earlier[key] for key in SETTABLE if key in earlier} | result | dict(values)
  if 'summary' not in result:
    raise UserError(f'{name} has no summary: give --set="summary=..." with two sentences')
  write_whole(path, json.dumps(result, indent=1, allow_nan=False).encode() + b'\n')


def load_results(directory: Path) -> dict[str, Result]:
  """Returns the content of every NAME.json, by name.

  Raises:
    UserError: there is none, or one is damaged.
  """
  results = {path.stem: _read(path) for path in list_directory(directory)
             if path.suffix == '.json'}
  if not results:
    raise MissingError(f'{directory} has no results: give a folder of NAME.json files, or add a '
                       'finished study with --add')
  return results


def render_pages(results: Mapping[str, Result]) -> dict[str, str]:
  """Returns the text of every page by file name: one for each result, and the index."""
  pages = {f'{name}.md': _render_page(name, result) for name, result in results.items()}
  return {**pages, INDEX: _render_index(results)}


def write_pages(directory: Path) -> list[Path]:
  """Writes every page and its plot; returns the pages."""
  results = load_results(directory)
  for name, result in results.items():
    plot = plot_changes if _is_report(result) else plot_study
    plot(result, directory / f'{name}.png')
  pages = render_pages(results)
  for file, text in pages.items():
    write_whole(directory / file, text.encode())
  return [directory / file for file in pages]


def check_pages(directory: Path) -> None:
  """Compares the pages with what `write_pages` would write, and asks for their plots.

  Raises:
    UserError: a page or a plot is missing, differs, or has no JSON.
  """
  results = load_results(directory)
  pages = render_pages(results)
  # Pages that are missing or differ, missing plots, and pages that nothing renders.
  wrong = [file for file, text in pages.items()
           if not (directory / file).is_file() or (directory / file).read_text() != text]
  wrong += [f'{name}.png' for name in results if not (directory / f'{name}.png').is_file()]
  wrong += [path.name for path in list_directory(directory)
            if path.suffix == '.md' and path.name not in pages]
  if wrong:
    raise UserError(f'{directory} has {wrong}, which are not rendered from its JSON: run '
                    'launch/render_results.py, or remove them')


def _read(path: Path) -> Result:
  try:
    result = json.loads(path.read_bytes())
  except ValueError as error:
    raise UserError(f'{path} is not JSON ({error}): restore it, or remove it') from error
  # Benchmarks write a results.json, too.
  if not isinstance(result, dict) or not result.keys() & {
      'all_positions', 'by_position', 'by_difficulty'}:
    raise UserError(f'{path} has no result of a study or a quickstart: name the work directory of '
                    'one, or remove the file')
  return result


def _is_report(result: Result) -> bool:
  """Returns whether a result is of an evaluation (report.json), not of a study (results.json)."""
  return 'all_positions' in result


def _shorten(value: Any) -> Any:
  """Returns the value without keys of LEFT_OUT and places of files, its floats at six digits."""
  if isinstance(value, Mapping):
    return {key: _shorten(item) for key, item in value.items() if key not in LEFT_OUT}
  if isinstance(value, list):
    return [_shorten(item) for item in value]
  if isinstance(value, str) and value.startswith('/') and '\n' not in value:
    return Path(value).name  # where a file was on the machine of the run tells a reader nothing
  return float(f'{value:.6g}') if isinstance(value, float) else value


def _rename_old(result: Result, name: str) -> Result:
  """Returns the result under current names, and with --workdir=runs/<name> in its command."""
  config = with_current_names(result['config'])
  if config != result['config']:  # a run under old names
    result = _rename_arms({**result, 'config': config})
    for arm in result['arms'].values():
      if 'kind' in arm:
        arm['kind'] = OLD_VALUES['learns'].get(arm['kind'], arm['kind'])
    if 'name' in result:
      result['name'] = OLD_VALUES['name'].get(result['name'], result['name'])
    if isinstance(result.get('decoder_fingerprint'), Mapping):
      result['decoder_fingerprint'] = result['decoder_fingerprint']['before']
  if 'command' in result:
    # The page names a work directory that any reader can use.
    words = [f'--workdir=runs/{name}' if word.startswith('--workdir=') else word
             for word in result['command'].removeprefix('python ').split()]
    command = ' '.join(['python', *words])
    for old, current in OLD_CONFIGS.items():
      command = command.replace(f'/{old}', f'/{current}')
    result['command'] = command
  return result


def _rename_arms(value: Any) -> Any:
  """Returns the value with current names of arms in its keys.

  Such a key is like 'x', 'x/shuffled', 'x vs y' or 'x_only'.
  """
  if isinstance(value, list):
    return [_rename_arms(item) for item in value]
  if not isinstance(value, Mapping):
    return value
  renamed = {}
  for key, item in value.items():
    # A key names one arm or two, each perhaps with a control, and perhaps an ending.
    stem = key.removesuffix('_only')
    pair = [slash.partition('/') for slash in stem.split(' vs ')]
    names = [OLD_ARMS.get(arm, arm) + slash + control for arm, slash, control in pair]
    renamed[' vs '.join(names) + key[len(stem):]] = _rename_arms(item)
  return renamed


def _render_page(name: str, result: Result) -> str:
  kind = report if _is_report(result) else study_report
  pictures = {f'{name}.png': 'Change of perplexity by ahead position' if _has_text(result)
              else 'Accuracy by difficulty'}
  parts = [f'# {_title(name, result)}', result['summary'], *kind.format_parts(result, pictures),
           f'[All results]({INDEX}). Rendered from [{name}.json]({name}.json) by '
           '`python launch/render_results.py`.']
  return '\n\n'.join(parts) + '\n'


def _title(name: str, result: Result) -> str:
  title = result['name'] if 'name' in result else name.replace('_', ' ')
  return title[:1].upper() + title[1:]


def _has_text(result: Result) -> bool:
  return _is_report(result) or 'by_position' in result


def _render_index(results: Mapping[str, Result]) -> str:
  header = ['study', 'at', 'frozen decoder', 'own latents', "another example's latents",
            'constant soft tokens', 'decoder tuned', 'seeds']
  rows = [_index_row(name, result) for name, result in results.items()]
  return '\n\n'.join([
    '# Results',
    'The table has one row for each study. For questions the row is at the first difficulty at '
    f'which the frozen decoder is right less than {FAILS_BELOW:.0%} of the time, or at the last '
    f'one. For text it is at ahead position {POSITION}.',
    markdown_table(header, rows, align='---'),
    'Questions: accuracy in percent, mean over seeds. Text: perplexity of the frozen decoder, and '
    'its relative change. Own latents come from a coprocessor. Those of another example come from '
    'the same coprocessor, and show whether content matters. Constant soft tokens are trained '
    'without a coprocessor. "Decoder tuned" trains the decoder itself on the same text. A dash is '
    'an arm that was not run. Intervals are on each page. They are over questions or texts, with '
    'one decoder: another decoder or seed may differ by more.',
    'Rendered from the JSON files in this folder by `python launch/render_results.py`. To add a '
    'finished run: `python launch/render_results.py --add=WORKDIR --name=NAME '
    '--set="summary=..."`. Commands have current names of files; the code of an earlier commit may '
    'have others.',
  ]) + '\n'


def _index_row(name: str, result: Result) -> list[str]:
  at, cells = _frontier(result)
  arms, kinds = list(cells), {} if _is_report(result) else result['arms']
  # A study may have no arm 'own'. The row then has its last arm with a shuffled control.
  own = OWN if OWN in arms else next(
      (arm for arm in reversed(arms) if f'{arm}/{SHUFFLED}' in arms), None)
  shuffled = SHUFFLED if own == OWN else f'{own}/{SHUFFLED}'
  constant = next((arm for arm in arms if arm.split()[-1] == CONSTANT), None)
  tuned = [f'{cells[arm]} {arm}' for arm in arms if kinds.get(arm, {}).get('kind') in TUNINGS]
  seeds = max(len(seeds) for seeds in result['seeds'].values()) if 'seeds' in result else 1
  label = '' if own in (OWN, None) else f' ({own})'
  return [f'[{_title(name, result)}]({name}.md)', at, cells[FROZEN],
          f'**{cells[own]}**{label}' if own else '-', cells.get(shuffled, '-'),
          cells.get(constant, '-'), ', '.join(tuned) or '-', str(seeds)]


def _frontier(result: Result) -> tuple[str, dict[str, str]]:
  """Returns the place of the index row, in words, and the figure of every arm there."""
  if _is_report(result):
    # Text: at the usual position, or in the middle of those that were scored.
    positions = result['positions']
    column = positions.index(POSITION) if POSITION in positions else len(positions) // 2
    arms = {name: {key: values[column] for key, values in arm.items()}
            for name, arm in result['arms'].items()}
    return f'position {positions[column]}', dict(_text_cells(arms))
  if 'by_position' in result:
    rows = result['by_position']
    position = str(POSITION) if str(POSITION) in rows else list(rows)[len(rows) // 2]
    return f'position {position}', dict(_text_cells(rows[position]))
  # Questions: the first difficulty at which the frozen decoder fails, or the last one.
  rows = result['by_difficulty'] or {'overall': result['overall']}
  level = next((level for level, arms in rows.items()
                if arms[FROZEN]['accuracy'] < FAILS_BELOW), list(rows)[-1])
  cells = {name: f'{100 * arm["accuracy"]:.1f}' for name, arm in rows[level].items()}
  return level if level == 'overall' else f'difficulty {level}', cells


def _text_cells(arms: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[str, str]]:
  for name, arm in arms.items():
    yield name, (f'{arm["perplexity"]:.2f}' if name == FROZEN else f'{arm["change_pct"]:+.2f}%')
