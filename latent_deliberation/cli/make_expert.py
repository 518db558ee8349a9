"""From a folder of text to an expert: data, adapters, controls, scores and the package.

The phases are those of the quickstart, followed by scores on general text and by what routers need.
Each is kept in the work directory, so that the same command continues where it was stopped.
"""

import dataclasses
import json
import os
import shlex
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from latent_deliberation.build import (
  count_parameters,
  frozen_shapes,
  load_frozen,
  open_frozen,
)
from latent_deliberation.cli.config_flag import config_arguments
from latent_deliberation.cli.quickstart import prepare_phases, train_phases
from latent_deliberation.data.data_config import DataConfig, split_files
from latent_deliberation.data.loading import open_batches, prepare_data
from latent_deliberation.data.rows import PackedRows
from latent_deliberation.data.text_files import list_files
from latent_deliberation.data.text_sizes import PASSES, Choices, fit_to_rows, with_choices
from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.deliberation.coprocessor_checkpoint import CoprocessorCheckpoint
from latent_deliberation.errors import UserError, check_number
from latent_deliberation.evaluation.evaluate import HeldOut, open_held_out
from latent_deliberation.evaluation.plots import plot_changes
from latent_deliberation.experiment import Experiment
from latent_deliberation.experts.card import GENERAL, Card, check_name, check_printable
from latent_deliberation.experts.measuring import (
  ROUTING_ROWS,
  base_name,
  find_places,
  fit_routing,
  measure,
  on_mesh,
  portable,
)
from latent_deliberation.experts.package import PICTURE, Routing, write_package
from latent_deliberation.experts.texts import STDLIB, STDLIB_TITLE, keywords_of, read_documents
from latent_deliberation.files import as_path, is_here, make_writable, write_json
from latent_deliberation.paths import (
  CONSTANT,
  COPROCESSOR,
  GENERAL_DATA,
  PHASES_FILE,
  ROWS,
  RUN_FILE,
)
from latent_deliberation.progress import PhaseClock, format_duration
from latent_deliberation.provenance import git_commit
from latent_deliberation.sharding import make_mesh
from latent_deliberation.training.run import Run
from latent_deliberation.training.run_identity import hold_workdir
from latent_deliberation.training.train import time_step

REQUEST_FILE, PACE_FILE = 'expert_request.json', 'pace.json'
_FEWEST_STEPS = 20
# Times in training steps, as measured on Gemma 3 270M and SmolLM2-135M.
_OVERHEAD = 1.25  # of a step: compilation, validations and saves
_SCORING_STEPS = 7  # scores and routing of both texts, for each batch of rows that is scored


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
  general = _general_data(experiment, request)
  for text in (data, general):
    if text.source == 'text':
      list_files(text.files)  # refused before anything is written
  make_writable(output.absolute().parent)
  make_writable(workdir)
  with hold_workdir(workdir):
    _keep_request(workdir, request)
    return _run_phases(experiment, request, general, workdir, output, given)


def _check_request(experiment: Experiment, request: ExpertRequest, workdir: Path, output: Path,
                   given: Set[str]) -> None:
  """Raises UserError for what would fail only after the training, or be of no effect."""
  if not experiment.decoder_from:
    raise UserError('--decoder is missing: give a directory, a GGUF file or a name')
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


def _run_phases(experiment: Experiment, request: ExpertRequest, general: DataConfig, workdir: Path,
                output: Path, given: Set[str]) -> Card:
  mesh, clock = make_mesh(experiment.mesh), PhaseClock(workdir / PHASES_FILE)
  pace = _read_pace(workdir)
  experiment = with_choices(experiment, pace)
  given = given | pace.keys()
  experiment, runs = prepare_phases(experiment, workdir, given, mesh, clock)
  with clock.phase('general text'):
    other = _prepare_general(experiment, general, given, workdir, mesh)

  # Only now is there text to measure the speed on.
  if request.minutes and not pace:
    with clock.phase('speed'):
      pace = _choose_steps(experiment, request.minutes, given, runs['coprocessor'], workdir, mesh)
    write_json(workdir / PACE_FILE, pace)
    experiment = with_choices(experiment, pace)
    experiment, runs = prepare_phases(experiment, workdir, given | pace.keys(), mesh, clock)

  train_phases(experiment, runs, workdir, clock)
  scores, routing, sample, trained = _measure(experiment, request.name, other, runs, workdir, mesh,
                                              clock)
  card = _describe(experiment, request, workdir, scores, trained, clock)
  picture = workdir / PICTURE
  plot_changes(scores[request.name], picture)
  card = write_package(output, card, trained, routing=routing,
                       sample=sample if request.sample else None, picture=picture.read_bytes())
  if not card.gains:
    logging.warning('%s: no gain is shown on its own held-out text. The card says so, and publish '
                    'refuses it without --force. Train longer, or on more text.', card.name)
  return card


# --- Text ---


def _general_data(experiment: Experiment, request: ExpertRequest) -> DataConfig:
  """Returns the data of general text: as many held-out rows as are scored and routed on."""
  config = experiment.evaluation
  tokens = 2 * ROUTING_ROWS * config.num_texts * experiment.data.length
  source = dict(source=STDLIB, files=())
  if request.general not in ('', STDLIB):
    source = dict(source='text', files=request.general)
  return dataclasses.replace(experiment.data, **source, max_tokens=tokens, validation_percent=30)


def _prepare_general(experiment: Experiment, general: DataConfig, given: Set[str], workdir: Path,
                     mesh: Mesh) -> Experiment:
  """Packs general text in a folder of the work directory; returns the experiment that scores it."""
  place = workdir / GENERAL_DATA
  # With the vocabulary of the expert's own text.
  prepare_data(general, experiment.decoder.vocab_size, place)
  other = dataclasses.replace(experiment, data=general)
  if general.source == 'text':
    choices = fit_to_rows(other, given, place)
    other = with_choices(other, {key: value for key, value in choices.items()
                                 if key.startswith('evaluation.')})
  open_held_out(other, place, mesh)  # fails now if there is too little
  return other


# --- Speed ---


def _choose_steps(experiment: Experiment, minutes: float, given: Set[str], run: Run, workdir: Path,
                  mesh: Mesh) -> Choices:
  """Returns the number of steps, and cadences that follow from it, that fit the minutes."""
  seconds = time_step(experiment, run, workdir, mesh)
  # The constant soft tokens train for as many steps, which take no longer.
  config = experiment.evaluation
  scoring = _SCORING_STEPS * (config.num_texts // config.batch_size)
  steps = int((60 * minutes / seconds - scoring) / (2 * _OVERHEAD))
  batches = open_batches(experiment, workdir, run.section, mesh)
  most = max(1, PASSES * batches.num_rows // experiment.training.batch_size)
  chosen = max(min(_FEWEST_STEPS, most), min(steps, most))
  logging.info('%.2f s a step: %d steps for %g minutes%s', seconds, chosen, minutes,
               f'; more than {PASSES} passes over the text gain little' if chosen < steps else '')
  if steps < _FEWEST_STEPS:
    logging.warning('%d steps take about %s, and not %g minutes; fewer teach nothing', chosen,
                    format_duration((2 * _OVERHEAD * chosen + scoring) * seconds), minutes)
  loop, optimizer = experiment.training.loop, experiment.training.optimizer
  choices = {'training.loop.num_steps': chosen,
             'training.loop.eval_every': min(loop.eval_every, max(1, chosen // 4)),
             'training.optimizer.warmup_steps': min(optimizer.warmup_steps, chosen // 10)}
  return {key: value for key, value in choices.items() if key not in given}


def _read_pace(workdir: Path) -> Choices:
  """Returns the steps that an earlier launch chose; {} if none did."""
  path = workdir / PACE_FILE
  return _read_object(path) if path.exists() else {}


def _keep_request(workdir: Path, request: ExpertRequest) -> None:
  """Keeps the request in the work directory, or compares it with the one that is there.

  Words about the expert may change, and what it is made from may not.
  """
  path = workdir / REQUEST_FILE
  current = {key: value for key, value in dataclasses.asdict(request).items()
             if key in ('name', 'text', 'general', 'minutes')}
  if path.exists():
    saved = _read_object(path)
    lines = [f'  {key}: {saved.get(key)!r} saved, {value!r} now'
             for key, value in current.items() if _normal(saved.get(key)) != _normal(value)]
    if lines:
      raise UserError('\n'.join([f'{workdir} belongs to another expert:', *lines,
                                 'Use another --workdir, or give the saved values.']))
  elif (workdir / RUN_FILE).exists():
    raise UserError(f'{workdir} belongs to another job: use another --workdir')
  else:
    write_json(path, current)


def _normal(value: Any) -> Any:
  """Returns a value of a request as it is compared: 'notes' and 'notes/' are the same files."""
  return [os.path.normpath(part) for part in split_files(value)] if isinstance(value, str) else (
      value)


def _read_object(path: Path) -> dict[str, Any]:
  """Returns the JSON object in a file of the work directory. Raises UserError for anything else."""
  try:
    content = json.loads(path.read_bytes())
  except ValueError as error:
    raise UserError(f'{path} is damaged ({error}): use another --workdir') from error
  if not isinstance(content, dict):
    raise UserError(f'{path} is damaged (no object): use another --workdir')
  return content


# --- Scores and card ---


def _measure(experiment: Experiment, name: str, other: Experiment, runs: Mapping[str, Run],
             workdir: Path, mesh: Mesh, clock: PhaseClock,
             ) -> tuple[dict[str, Any], Routing | None, dict[str, Any], CoprocessorCheckpoint]:
  """Scores own and general text, and fits what routers need.

  Returns: the scores, the routing, the scored rows by text, and the trained coprocessor.
  """
  checkpoint = open_frozen(experiment.decoder, as_path(experiment.decoder_from))
  trained, constant = (coprocessor_checkpoint.load(workdir / place / COPROCESSOR)
                       for place in (COPROCESSOR, CONSTANT))
  params, soft_tokens = (on_mesh(each.params, mesh) for each in (trained, constant))
  scores, places, sample = {}, [], {}
  decoder_params, _ = load_frozen(experiment, checkpoint, mesh)
  for text, scored, prepared in ((name, experiment, workdir),
                                 (GENERAL, other, workdir / GENERAL_DATA)):
    with clock.phase(f'scores on {text} text'):
      held_out = open_held_out(scored, prepared, mesh)
      scores[text] = measure(scored, params, soft_tokens, decoder_params, held_out, mesh)
    with clock.phase(f'routing on {text} text'):
      places.append(find_places(scored, params, decoder_params, held_out, mesh))
    sample[text] = _rows_of(held_out)
  try:
    routing = fit_routing(*places)
  except UserError as error:
    logging.warning('the expert has no centroid and no gain head: %s', error)
    routing = None
  return scores, routing, sample, trained


def _rows_of(held_out: HeldOut) -> dict[str, np.ndarray]:
  rows = {part: np.concatenate([getattr(batch, part) for batch in held_out.batches])
          for part in ('tokens', 'segments')}
  return {**rows, 'texts': held_out.texts}


def _describe(experiment: Experiment, request: ExpertRequest, workdir: Path,
              scores: Mapping[str, Any], trained: CoprocessorCheckpoint, clock: PhaseClock) -> Card:
  """Returns the card, but for its files."""
  config, texts = trained.config, {}
  for text, place in ((request.name, workdir), (GENERAL, workdir / GENERAL_DATA)):
    texts[text] = _describe_text(experiment, place)
  keywords = keywords_of(read_documents(experiment.data, 'train'),
                         read_documents(_general_data(experiment, request), 'train'))
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
              'seed': experiment.seed, 'seconds': {
                  name: round(seconds, 1) for name, seconds in clock.seconds.items()},
              'machine': f'{os.cpu_count()} cores, {jax.devices()[0].device_kind}',
              'command': _command(request, experiment.decoder_from), 'git_commit': git_commit()},
      scores=scores, keywords=tuple(keywords), files={})


def _describe_text(experiment: Experiment, prepared_dir: Path) -> dict[str, Any]:
  rows = {split: PackedRows(prepared_dir / ROWS / split) for split in ('train', 'validation')}
  return {'fingerprint': rows['train'].fingerprint, 'rows': len(rows['train']),
          'held_out': len(rows['validation']), 'tokens': rows['train'].manifest.tokens}


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
