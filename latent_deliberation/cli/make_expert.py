"""From a folder of text to an expert: data, adapters, controls, scores and the package.

The phases are those of the quickstart, followed by scores on general text and by what routers need.
Each is kept in the work directory, so that the same command continues where it was stopped.
"""

import contextlib
import dataclasses
import json
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from latent_deliberation.build import count_parameters, frozen_shapes
from latent_deliberation.cli.config_flag import config_arguments
from latent_deliberation.cli.expert_pace import COMPILATIONS, choose_pace, with_most_texts
from latent_deliberation.cli.expert_scores import ScoredText, measure_expert, rows_of
from latent_deliberation.cli.quickstart import prepare_phases, train_phases
from latent_deliberation.data.data_config import split_files
from latent_deliberation.data.loading import open_batches, prepare_data
from latent_deliberation.data.rows import PackedRows
from latent_deliberation.data.text_files import list_files
from latent_deliberation.data.text_sizes import Choices, fit_evaluation, with_choices
from latent_deliberation.deliberation.coprocessor_checkpoint import CoprocessorCheckpoint
from latent_deliberation.errors import UserError, check_number
from latent_deliberation.evaluation.evaluate import check_reach, open_held_out
from latent_deliberation.evaluation.plots import plot_changes
from latent_deliberation.experiment import Experiment
from latent_deliberation.experts.card import GENERAL, Card, check_name, check_printable
from latent_deliberation.experts.measuring import ROUTING_ROWS, base_name, portable
from latent_deliberation.experts.package import PICTURE, check_sample, write_package
from latent_deliberation.experts.texts import (
  STDLIB,
  STDLIB_TITLE,
  data_of,
  documents_of,
  keywords_of,
  read_documents,
  sample_passages,
)
from latent_deliberation.files import is_here, make_writable, write_json, write_whole
from latent_deliberation.paths import GENERAL_DATA, PHASES_FILE, ROWS, RUN_FILE
from latent_deliberation.progress import PhaseClock
from latent_deliberation.provenance import git_commit
from latent_deliberation.sharding import batch_shards, make_mesh
from latent_deliberation.training.run import Run
from latent_deliberation.training.run_identity import hold_workdir
from latent_deliberation.training.train import TIMED_STEPS, open_start, time_step

REQUEST_FILE, PACE_FILE = 'expert_request.json', 'pace.json'
USUAL_TOKEN, WIDEST_TOKEN = 4, 6  # characters of a token on average, for most and for any text


@dataclasses.dataclass(frozen=True)
class ExpertRequest:
  """What an expert is made from.

  Attributes:
    name: its name.
    text: folder, file, glob, or several of them with commas.
    general: the same for text of no domain; '' for the text of Python's standard library.
    minutes: time to spend; 0 for as many steps as the config says.
    description: sentence about it; '' for one made from its text.
    licence: licence of its weights.
    sample: whether held-out rows go into the package, so that others can measure the scores again.
  """
  name: str
  text: str
  general: str = ''
  minutes: float = 0.0
  description: str = ''
  licence: str = ''
  sample: bool = True

  def __post_init__(self):
    check_name(self.name, '--name')
    if self.name == GENERAL:
      raise UserError(f'name = {self.name!r}: this is the name of text of no domain; give another')
    check_number('minutes', self.minutes, 0, 1e6)
    for key in ('description', 'licence'):
      if not getattr(self, key).isprintable():
        raise UserError(f'{key} = {getattr(self, key)!r:.80}: give one line, without tabs')


def make_expert(experiment: Experiment, request: ExpertRequest, workdir: Path, output: Path,
                given: Set[str] = frozenset()) -> Card:
  """Trains, measures and packs an expert, or continues where an earlier launch stopped.

  Args:
    experiment: configuration, with the decoder; its text is replaced by that of the request.
    request: what the expert is made from.
    workdir: directory of all that is trained and prepared on the way.
    output: directory of the package; must not exist yet.
    given: dotted paths of the config's keys that the user gave.

  Raises:
    UserError: text, decoder or a directory do not fit; raised before long work.
  """
  _check_request(experiment, request, workdir, output, given)
  data = dataclasses.replace(experiment.data, source='text', files=request.text,
                             name='', options={}, data_dir='')
  experiment = dataclasses.replace(experiment, data=data)
  general = data_of(request.general or STDLIB)
  if experiment.coprocessor_from and general.source == STDLIB:
    logging.warning("coprocessor_from = %r: if it has read Python's standard library, harm on "
                    'general text looks smaller than it is: give other text as --general',
                    experiment.coprocessor_from)
  for text in (data, general):
    if text.source == 'text':
      list_files(text.files)  # refused before anything is written
  make_writable(output.absolute().parent)
  make_writable(workdir)
  with hold_workdir(workdir), _programs_kept():
    _keep_request(workdir, request)
    return _run_phases(experiment, request, workdir, output, given)


@contextlib.contextmanager
def _programs_kept() -> Iterator[None]:
  """Compiles each program once, though phases make it anew: the block has a cache of programs.

  The cache is of this launch alone: its programs are trusted, and a work directory may be of
  somebody else. A cache that the user has set is used as it is.
  """
  if jax.config.jax_compilation_cache_dir:
    yield
    return
  with tempfile.TemporaryDirectory(prefix='programs-') as directory:
    jax.config.update('jax_compilation_cache_dir', directory)
    try:
      yield
    finally:
      jax.config.update('jax_compilation_cache_dir', None)
      compilation_cache.reset_cache()  # it reads its directory once


def _check_request(experiment: Experiment, request: ExpertRequest, workdir: Path, output: Path,
                   given: Set[str]) -> None:
  """Raises UserError for what would fail only after the training, or be of no effect."""
  if not experiment.decoder_from:
    raise UserError('--decoder is missing: give a directory, a GGUF file or a name')
  if jax.process_count() > 1:
    raise UserError(f'{jax.process_count()} processes: an expert is made by one process; start the '
                    'command on one host')
  if not is_here(output):
    raise UserError(f'--output={output}: a package is written on this machine; give a path here, '
                    'and copy the package to the bucket')
  if output.exists():
    raise UserError(f'{output} exists already and is not overwritten: give another --output')
  if is_here(workdir):
    one, other = output.resolve(), workdir.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
      raise UserError(f'--output={output} and --workdir={workdir}: one holds the other; give two '
                      'directories beside each other')
  if experiment.data.mode != 'packed':
    raise UserError(f'data.mode = {experiment.data.mode!r}: an expert is trained on packed rows; '
                    "leave data.mode at 'packed'")
  if request.minutes and 'training.loop.num_steps' in given:
    raise UserError(f'--minutes={request.minutes:g} and training.loop.num_steps = '
                    f'{experiment.training.loop.num_steps}: the minutes choose the steps; give one '
                    'of the two')
  check_printable({'--text': request.text, '--general': request.general,
                   'command': _command(request, experiment.decoder_from),
                   'settings': portable(experiment, request.name)}, 'the request')


def _run_phases(experiment: Experiment, request: ExpertRequest, workdir: Path, output: Path,
                given: Set[str]) -> Card:
  mesh, clock = make_mesh(experiment.mesh), PhaseClock(workdir / PHASES_FILE)
  num_texts, kept = experiment.evaluation.num_texts, _read_pace(workdir)
  pace = {key: value for key, value in kept.items() if key not in given}
  experiment = with_choices(experiment, pace)
  experiment, runs = prepare_phases(experiment, workdir, given | pace.keys(), mesh, clock,
                                    job='expert')
  with clock.phase('general text'):
    other = with_choices(experiment, {'evaluation.num_texts': num_texts})
    other = _prepare_general(other, request, given, workdir, mesh)
  texts = _open_texts(request.name, experiment, other, workdir, mesh)
  check_reach(*texts[GENERAL], f'{GENERAL} text')

  # Only now is there text to measure the speed on.
  if request.minutes and not kept:
    pace = _find_pace(experiment, request.minutes, texts, runs['coprocessor'], given, workdir, mesh,
                      clock)
    write_json(workdir / PACE_FILE, pace)
    experiment = with_choices(experiment, pace)
    experiment, runs = prepare_phases(experiment, workdir, given | pace.keys(), mesh, clock,
                                      job='expert')
  # General text has a number of texts of its own, which the pace only bounds.
  bounded = with_most_texts(other, pace.get('evaluation.num_texts', num_texts)).evaluation
  other = with_choices(other, {**pace, 'evaluation.num_texts': bounded.num_texts,
                               'evaluation.batch_size': bounded.batch_size})
  texts = _open_texts(request.name, experiment, other, workdir, mesh)
  check_reach(*texts[GENERAL], f'{GENERAL} text')  # fewer texts reach less
  sample = {}
  if request.sample:
    sample = {name: rows_of(held_out) for name, (_, held_out) in texts.items()}
    check_sample(sample)

  train_phases(experiment, runs, workdir, clock)
  trained, scores, routing = measure_expert(texts, workdir, mesh, clock)
  card = _describe(experiment, request, workdir, scores, trained, clock)
  picture = workdir / PICTURE
  plot_changes(scores[request.name], picture)
  card = write_package(output, card, trained, routing=routing,
                       sample=sample, picture=picture.read_bytes())
  if not card.gains:
    logging.warning('%s: no gain is shown on its own held-out text. The card says so, and publish '
                    'refuses it without --force. Train longer, or on more text.', card.name)
  return card


# --- Text ---


def _prepare_general(experiment: Experiment, request: ExpertRequest, given: Set[str],
                     workdir: Path, mesh: Mesh) -> Experiment:
  """Packs general text in a folder of the work directory; returns the experiment that scores it."""
  place, length = workdir / GENERAL_DATA, experiment.data.length
  tokens = (1 + ROUTING_ROWS) * experiment.evaluation.num_texts * length
  # A passage of words is about as long as a row, so that rows show many documents.
  passages = sample_passages(request.general or STDLIB, WIDEST_TOKEN * tokens,
                             USUAL_TOKEN * length, experiment.data.text_key)
  with tempfile.TemporaryDirectory(prefix='passages-') as directory:
    path = Path(directory) / 'passages.jsonl'
    write_whole(path, ''.join(json.dumps({'text': each}) + '\n' for each in passages).encode())
    # With the vocabulary of the expert's own text.
    data = dataclasses.replace(experiment.data, files=(str(path),), text_key='text',
                               max_tokens=tokens, validation_percent=99)
    other = dataclasses.replace(experiment, data=data)
    try:
      # Only held-out rows are packed, as for a stream, since no training reads general text.
      prepare_data(dataclasses.replace(data, mode='online'), experiment.decoder.vocab_size, place)
      other = with_choices(other, fit_evaluation(
          other, given, place, batch_shards(mesh, experiment.rules)))
      open_held_out(other, place, mesh)  # fails now if there is too little
    except UserError as error:
      raise UserError(
          f'{error}\nThis is about general text: {len(passages)} passages of --general. To prepare '
          f'it again, delete {place} and repeat the command; the training has not read it, and is '
          'kept. If it is too short, give more text as --general.') from error
  return other


def _open_texts(name: str, experiment: Experiment, other: Experiment, workdir: Path,
                mesh: Mesh) -> dict[str, ScoredText]:
  """Opens the held-out rows of the expert's own text and of general text."""
  return {name: (experiment, open_held_out(experiment, workdir, mesh)),
          GENERAL: (other, open_held_out(other, workdir / GENERAL_DATA, mesh))}


# --- Speed ---


def _find_pace(experiment: Experiment, minutes: float, texts: Mapping[str, ScoredText], run: Run,
               given: Set[str], workdir: Path, mesh: Mesh, clock: PhaseClock) -> Choices:
  """Times a few steps; returns the number of steps that fits the minutes, and what follows."""
  with clock.phase('speed'):
    seconds = time_step(experiment, run, workdir, mesh)
  compiling = max(0.0, clock.seconds['speed'] - TIMED_STEPS * seconds)
  left = 60 * minutes - sum(clock.seconds.values()) - COMPILATIONS * compiling
  batches = open_batches(experiment, workdir, run.section, mesh)
  return choose_pace(
      experiment, [(scored, held_out.rows) for scored, held_out in texts.values()],
      batches.num_rows, given, minutes=minutes, seconds_left=left, step_seconds=seconds)


def _read_pace(workdir: Path) -> Choices:
  """Returns the steps that an earlier launch chose; {} if none did."""
  path = workdir / PACE_FILE
  return _read_object(path) if path.exists() else {}


def _keep_request(workdir: Path, request: ExpertRequest) -> None:
  """Keeps the request in the work directory, or compares it with the one that is there.

  Words about the expert may change, and what it is made from may not. General text may change when
  its folder was deleted.
  """
  path = workdir / REQUEST_FILE
  current = {key: value for key, value in dataclasses.asdict(request).items()
             if key in ('name', 'text', 'general', 'minutes')}
  if path.exists():
    saved = _read_object(path)
    changed = [key for key, value in current.items() if _normal(saved.get(key)) != _normal(value)]
    general = workdir / GENERAL_DATA
    if changed == ['general'] and not general.exists():
      write_json(path, current)
    elif changed:
      raise UserError('\n'.join([
          f'{workdir} belongs to another expert:',
          *(f'  {key}: {saved.get(key)!r} saved, {current[key]!r} now' for key in changed),
          'Use another --workdir, or give the saved values.',
          *([f'Or delete {general}: the training has not read it, and is kept.']
            if changed == ['general'] else [])]))
  elif (workdir / RUN_FILE).exists():
    raise UserError(f'{workdir} belongs to another job: use another --workdir')
  else:
    write_json(path, current)


def _normal(value: Any) -> Any:
  """Returns a value of a request as it is compared.

  'notes' and 'notes/' are the same files, and 'stdlib' is the general text without a flag.
  """
  if not isinstance(value, str):
    return value
  return [os.path.normpath(part) for part in split_files(value) if part != STDLIB]


def _read_object(path: Path) -> dict[str, Any]:
  """Returns the JSON object in a file of the work directory. Raises UserError for anything else."""
  try:
    content = json.loads(path.read_bytes())
  except ValueError as error:
    raise UserError(f'{path} is damaged ({error}): use another --workdir') from error
  if not isinstance(content, dict):
    raise UserError(f'{path} is damaged (no object): use another --workdir')
  return content


# --- Card ---


def _describe(experiment: Experiment, request: ExpertRequest, workdir: Path,
              scores: Mapping[str, Any], trained: CoprocessorCheckpoint, clock: PhaseClock) -> Card:
  """Returns the card, but for its files."""
  config, texts = trained.config, {}
  for text, place in ((request.name, workdir), (GENERAL, workdir / GENERAL_DATA)):
    texts[text] = _describe_text(place)
  keywords = keywords_of(read_documents(experiment.data, 'train'),
                         documents_of(request.general or STDLIB, experiment.data.text_key))
  description = request.description or f'Text about {", ".join(keywords[:6]) or request.name}.'
  return Card(
      name=request.name, description=description, licence=request.licence,
      base={'name': base_name(experiment.decoder_from),
            'fingerprint': trained.decoder_fingerprint},
      vocabulary=trained.vocabulary_hash,
      latents={'number': config.num_latents, 'form': config.latents, 'trainable': config.trainable,
               'parameters': count_parameters(trained.params),
               'decoder_parameters': count_parameters(
                   frozen_shapes(experiment, make_mesh(experiment.mesh)))},
      recipe={'text': {'name': request.name, **texts[request.name]},
              GENERAL: {'name': _name_text(request.general), **texts[GENERAL]},
              'settings': portable(experiment, request.name), 'steps': trained.steps,
              'starts_from': _describe_start(experiment),
              'seed': experiment.seed, 'seconds': {
                  name: round(seconds, 1) for name, seconds in clock.seconds.items()},
              'machine': f'{os.cpu_count()} cores, {jax.devices()[0].device_kind}',
              'command': _command(request, experiment.decoder_from), 'git_commit': git_commit()},
      scores=scores, keywords=tuple(keywords), files={})


def _describe_start(experiment: Experiment) -> dict[str, Any]:
  """Returns what a card says of the coprocessor that training started from; {} for none."""
  start = open_start(experiment)
  return {} if start is None else {
      'name': base_name(start.place), 'fingerprint': start.fingerprint,
      'steps': start.description.steps}


def _describe_text(prepared_dir: Path) -> dict[str, Any]:
  """Returns what a card says of a text; of general text, no row is trained on."""
  rows = [PackedRows(path) for split in ('train', 'validation')
          if (path := prepared_dir / ROWS / split).exists()]
  return {'fingerprint': rows[0].fingerprint, 'rows': len(rows[0]) if len(rows) > 1 else 0,
          'held_out': len(rows[-1]), 'tokens': rows[0].manifest.tokens}


def _name_text(general: str) -> str:
  """Returns what to call general text, without the directories of this machine."""
  if general in ('', STDLIB):
    return STDLIB_TITLE
  return ', '.join(_without_directories(general))


def _without_directories(files: str) -> list[str]:
  """Returns the names of files, with the folder of each where names alone are equal."""
  paths = [Path(part) for part in split_files(files)]
  names = [path.name or str(path) for path in paths]
  if len(set(names)) < len(names):
    names = ['/'.join(path.parts[-2:]) for path in paths]
  return names


def _command(request: ExpertRequest, decoder: str) -> str:
  """Returns the command that makes such an expert, with names of files and not where they are."""
  flags = {'decoder': base_name(decoder), 'text': request.text, 'general': request.general,
           'name': request.name, 'minutes': f'{request.minutes:g}' if request.minutes else ''}
  words = [f'--{flag}={value}' for flag, value in flags.items() if value]
  words += shlex.split(config_arguments())
  for number, word in enumerate(words):
    flag, equals, value = word.partition('=')
    if '/' in value and '://' not in value:
      words[number] = flag + equals + ','.join(_without_directories(value))
  return shlex.join(['python', 'launch/experts.py', 'train', *words])
