"""Scores a trained coprocessor against its controls, and writes the report."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from latent_deliberation.array_types import Batch, Params
from latent_deliberation.build import build_deliberator, count_parameters, load_frozen, open_frozen
from latent_deliberation.data.loading import (
  check_rows_vocabulary,
  open_validation,
  validation_texts,
)
from latent_deliberation.data.rows import PackedRows
from latent_deliberation.deliberation.coprocessor_checkpoint import (
  describe,
  find_coprocessor,
  load_coprocessor,
)
from latent_deliberation.deliberation.traces import evaluation_keys, sample_traces
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.perplexity import (
  CONSTANT,
  FEWEST_TEXTS,
  FROZEN,
  OWN,
  SHUFFLED,
  ZERO,
  AheadNLL,
  make_scorer,
  score_texts,
)
from latent_deliberation.evaluation.plots import plot_attention, plot_changes, plot_training
from latent_deliberation.evaluation.report import Report, summarise, write_report
from latent_deliberation.experiment import Computation, Experiment
from latent_deliberation.files import check_free, make_writable
from latent_deliberation.host_memory import peak_memory_bytes
from latent_deliberation.paths import METRICS_FILE, REPORT
from latent_deliberation.progress import counted
from latent_deliberation.provenance import git_commit
from latent_deliberation.sharding import check_batch, make_mesh, place_batch
from latent_deliberation.training.metrics import read_metrics
from latent_deliberation.training.run_identity import read_record

CHANGES, LOSSES, ATTENTION = 'changes.png', 'losses.png', 'visibility.png'


def constant_variant(experiment: Experiment) -> Experiment:
  """Returns the experiment of the pause-token control: soft tokens without a coprocessor."""
  deliberation = dataclasses.replace(experiment.deliberation, trainable='constant')
  return dataclasses.replace(experiment, deliberation=deliberation)


def evaluate(experiment: Experiment, *, decoder_dir: Path, coprocessor_dir: Path,
             prepared_dir: Path, output: Path, constant_dir: Path | None = None,
             seconds: Mapping[str, float] | None = None,
             runs: Mapping[str, Path] | None = None,
             overwrite: bool = False) -> dict[str, Any]:
  """Scores all arms on the same traces of held-out text; writes report.json, report.md and PNGs.

  Args:
    experiment: configuration of the training, with the `evaluation` to do.
    decoder_dir: directory of the frozen decoder.
    coprocessor_dir: work directory of a training, or the coprocessor checkpoint that it wrote.
    prepared_dir: directory of prepared data; its text may differ from the text of the training.
    output: directory of the report; created.
    constant_dir: like `coprocessor_dir`, for the constant soft tokens; None leaves them out.
    seconds: wall-clock time of earlier phases by name, for the report.
    runs: work directories by name, whose training is drawn. Default: the one of the coprocessor.
    overwrite: whether to overwrite a report that is there already.

  Returns: the content of report.json.

  Raises:
    UserError: there is too little text, a directory holds something else, or one cannot be written.
    UserError: there is a report already, and it is not to be overwritten.
  """
  begun = time.perf_counter()
  # Check everything that can be wrong before the long part, without loading any weights.
  mesh = make_mesh(experiment.mesh)
  check_batch(experiment.evaluation.batch_size, 1, mesh, experiment.rules, 'evaluation')
  make_writable(output)
  names = (f'{REPORT}.json', f'{REPORT}.md', CHANGES, LOSSES, ATTENTION)
  check_free([output / name for name in names], overwrite)
  checkpoint = open_frozen(experiment.decoder, decoder_dir)
  held_out = open_held_out(experiment, prepared_dir, mesh)
  check_rows_vocabulary(held_out.rows, checkpoint)
  check_reach(experiment, held_out, str(prepared_dir))
  constant_experiment = constant_variant(experiment)
  coprocessor_dir, notes = find_trained(experiment, coprocessor_dir, held_out.rows), []
  if constant_dir:
    constant_dir = find_trained(constant_experiment, constant_dir, held_out.rows)
    steps = [describe(directory).steps for directory in (coprocessor_dir, constant_dir)]
    if len(set(steps)) > 1:
      notes.append(f'The coprocessor was trained for {steps[0]:,} steps, and the constant soft '
                   f'tokens for {steps[1]:,}: their comparison favours the longer training.')
      logging.warning('%s', notes[-1])
  curves = _read_training(runs or {'coprocessor': coprocessor_dir.parent})

  decoder_params, decoder_fingerprint = load_frozen(experiment, checkpoint, mesh)
  params, soft_tokens = _load_trained(
      (coprocessor_dir, constant_dir), decoder_fingerprint, experiment, mesh)
  arms = score_arms(experiment, params, soft_tokens, decoder_params, held_out.batches, mesh)
  counts = {'frozen decoder': count_parameters(decoder_params),
            'coprocessor': count_parameters(params)}
  if constant_dir:
    counts['constant soft tokens'] = count_parameters(soft_tokens)

  # Summarise and write.
  summary = summarise(Report(
      arms={name: scores.merged(held_out.texts) for name, scores in arms.items()},
      positions=experiment.evaluation.positions,
      num_ahead=experiment.deliberation.num_ahead,
      decoder_fingerprint=decoder_fingerprint,
      parameters=counts,
      seconds={**(seconds or {}), 'evaluation': time.perf_counter() - begun},
      peak_memory_bytes=_peak_memory(runs or {}), git_commit=git_commit(),
      config=dataclasses.asdict(experiment), rows=len(held_out.texts),
      pictures=_captions(experiment, len(set(held_out.texts)), bool(curves)),
      documents=held_out.rows.manifest.documents, notes=tuple(notes)),
      experiment.evaluation.bootstrap_samples)
  if jax.process_index() == 0:
    plot_changes(summary, output / CHANGES)
    if curves:
      plot_training(curves, output / LOSSES)
    plot_attention(output / ATTENTION, experiment.deliberation.latents)
    write_report(summary, output)
  return summary


def _captions(experiment: Experiment, texts: int, is_drawn: bool) -> dict[str, str]:
  """Returns the captions of the pictures; `is_drawn` says whether there are curves of training."""
  bands = ' Bands are 95% intervals.' if texts >= FEWEST_TEXTS else ''
  window, config = experiment.decoder.window, experiment.deliberation
  is_local = 'local' in experiment.decoder.layer_kinds
  layers = f'{window} tokens in local layers' if is_local else 'none'
  return {
      CHANGES: 'Change of perplexity by ahead position, in percent. Below zero is better.' + bands,
      **({LOSSES: 'Training by step: the loss, or what latents gain on validation text.'}
         if is_drawn else {}),
      ATTENTION: 'Illustration of who may attend to whom, on a short text with 2 latents and 3 '
                 f'ahead tokens. This run has {config.num_latents} latents and {config.num_ahead} '
                 f'ahead tokens; its window is: {layers}.'}


def _load_trained(directories: Sequence[Path | None], decoder_fingerprint: str,
                  experiment: Experiment, mesh: Mesh) -> list[Params | None]:
  """Loads the coprocessors that were trained on this decoder; None stays None."""
  return [
      load_coprocessor(directory, decoder_fingerprint=decoder_fingerprint, mesh=mesh,
                       rules=experiment.rules, frozen_dtype=experiment.computation.frozen_dtype)
      if directory else None for directory in directories]


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Held-out text to score arms on.

  Attributes:
    rows: packed rows of the validation split.
    batches: this process's share of each batch.
    texts: int [rows of all batches], number of the text that each row belongs to.
  """
  rows: PackedRows
  batches: list[Batch]
  texts: np.ndarray


def open_held_out(experiment: Experiment, prepared_dir: Path, mesh: Mesh) -> HeldOut:
  """Reads the amount of held-out text that `experiment.evaluation` names.

  Raises:
    UserError: there is less text.
  """
  config = experiment.evaluation
  rows, batches = open_validation(experiment, prepared_dir, mesh,
                                  config.num_texts // config.batch_size)
  texts = validation_texts(rows, len(batches) * config.batch_size, config.rows_per_text)
  return HeldOut(rows, batches, texts)


def check_reach(experiment: Experiment, held_out: HeldOut, name: str,
                first_anchor: int = 0) -> None:
  """Raises UserError where the drawn places leave an ahead position without an interval.

  Scoring would find the same, but only after the training. Weights are not needed. Of several
  processes each has a share of the text, so there it is left to the scoring.

  Args:
    experiment: configuration with the `evaluation` to do.
    held_out: the text.
    name: what to call it.
    first_anchor: see `sample_traces`.
  """
  if jax.process_count() > 1:
    return
  config = experiment.deliberation.with_traces(
      experiment.evaluation.num_traces, experiment.evaluation.num_ahead)
  draw = jax.jit(lambda keys, batch: sample_traces(
      keys, batch, config, first_anchor).ahead_valid.any(axis=1))
  found = []
  for index, batch in enumerate(held_out.batches):
    found.append(draw(evaluation_keys(experiment.seed, index, batch), batch))
  reached, texts = np.concatenate(found), held_out.texts
  by_text = [len(np.unique(texts[column])) for column in reached.T]
  worst = int(np.argmin(by_text))
  if by_text[worst] < 2:
    raise UserError(
        f'{by_text[worst]} of {len(set(texts))} held-out texts of {name} reach ahead position '
        f'{worst + 1}, and an interval needs 2: its documents are too short. Give longer ones, or '
        'lower evaluation.num_ahead, and evaluation.positions with it')


def find_trained(experiment: Experiment, directory: Path, rows: PackedRows) -> Path:
  """Finds the checkpoint of the coprocessor that the experiment trains, to score on these rows.

  Logs a warning where it was trained in another dtype.

  Raises:
    UserError: see `find_coprocessor`.
  """
  found = find_coprocessor(
      directory, decoder_config=experiment.decoder, config=experiment.deliberation,
      vocabulary_hash=rows.manifest.recipe.vocabulary_hash)
  _compare_dtype(experiment, found)
  return found


def _compare_dtype(experiment: Experiment, coprocessor_dir: Path) -> None:
  """Logs a warning where the run of a coprocessor computed in another dtype."""
  try:
    computed = read_record(coprocessor_dir.parent)['config'].get('computation', {})
  except (FileNotFoundError, UserError):  # the checkpoint was moved out of its run
    return
  trained = computed.get('dtype', Computation.dtype)
  scored = experiment.computation.on(jax.default_backend()).dtype  # a run keeps what 'auto' was
  if trained != scored:
    logging.warning(
        'the coprocessor in %s was trained with computation.dtype = %r and is scored with %r: '
        'zero latents then differ slightly from the frozen decoder', coprocessor_dir, trained,
        scored)


def score_traces(experiment: Experiment, arms: tuple[str, ...], params: Params,
                 decoder_params: Params, batches: list[Batch], mesh: Mesh, first_anchor: int = 0,
                 constant: bool = False) -> dict[str, AheadNLL]:
  """Scores the arms with these parameters; any other parameters get the same traces.

  Two experiments get the same traces if `seed`, `first_anchor` and `anchor_tokens` are equal, and
  `first_anchor` is at least the first anchor of each experiment: see `sample_traces`. With
  `constant`, constant soft tokens are an arm, and `params` is the pair that `make_scorer` says.
  """
  scorer = make_scorer(
      build_deliberator(experiment), arms, num_traces=experiment.evaluation.num_traces,
      num_ahead=experiment.evaluation.num_ahead, loss_chunk=experiment.computation.loss_chunk,
      seed=experiment.seed, mesh=mesh, rules=experiment.rules, delay=experiment.evaluation.delay,
      first_anchor=first_anchor,
      constant=build_deliberator(constant_variant(experiment)) if constant else None)
  placed = place_batches(batches, ', '.join(arms), mesh, experiment.rules)
  return score_texts(scorer, params, decoder_params, placed)


def score_arms(experiment: Experiment, params: Params, soft_tokens: Params | None,
               decoder_params: Params, batches: list[Batch], mesh: Mesh) -> dict[str, AheadNLL]:
  """Scores a coprocessor and all its controls on the same traces.

  Args:
    params: parameters of the coprocessor.
    soft_tokens: parameters of constant soft tokens; None leaves them out.
  """
  arms = (FROZEN, OWN, SHUFFLED, ZERO)
  if soft_tokens is None:
    return score_traces(experiment, arms, params, decoder_params, batches, mesh)
  # Constant soft tokens have parameters of their own. They are read after the same prefill.
  scores = score_traces(experiment, (*arms, CONSTANT), (params, soft_tokens), decoder_params,
                        batches, mesh, constant=True)
  # jit sorts keys. The pictures of experts have their arms in this order.
  return {arm: scores[arm] for arm in (*arms, CONSTANT)}


def place_batches(batches: list[Batch], arms: str, mesh: Mesh,
                  rules: Mapping[str, Sequence[str]]) -> Iterator[Batch]:
  """Yields the batches on devices, one at a time, and logs progress every ten seconds.

  `arms` names the scored arms in the log.
  """
  for batch in counted(batches, f'scoring {arms}'):
    yield place_batch(batch, mesh, rules)


def _peak_memory(runs: Mapping[str, Path]) -> int:
  """Returns the peak memory in bytes of this process, and of earlier launches of these runs."""
  if jax.default_backend() != 'cpu':  # these log the memory of their devices
    return peak_memory_bytes()
  logged = (row['memory_gib'] for workdir in runs.values() if (workdir / METRICS_FILE).exists()
            for row in read_metrics(workdir / METRICS_FILE) if 'memory_gib' in row)
  return max(peak_memory_bytes(), int(2**30 * max(logged, default=0)))


def _read_training(runs: Mapping[str, Path]) -> dict[str, dict[str, tuple[list, list]]]:
  """Returns losses and gains, as (steps, values), of each run that logged any."""
  curves = {}
  for name, workdir in runs.items():
    if not (workdir / METRICS_FILE).exists():  # the checkpoint was moved out of its run
      continue
    rows = read_metrics(workdir / METRICS_FILE)
    curves[name] = {
        label: ([row['step'] for row in rows if key in row],
                [row[key] for row in rows if key in row])
        for label, key in (('training', 'loss'), ('validation', 'validation/loss'),
                           ('gain', 'validation/gain'), ('content', 'validation/content'))}
  return curves
