"""Scores a trained coprocessor against its controls and writes the report."""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from latent_deliberation.array_types import Batch, Params
from latent_deliberation.data.loading import (
  check_vocabulary,
  open_rows,
  validation_batches,
  validation_texts,
)
from latent_deliberation.data.rows import PackedRows
from latent_deliberation.deliberation.coprocessor_checkpoint import (
  find_coprocessor,
  load_coprocessor,
)
from latent_deliberation.evaluation.perplexity import (
  BASELINE,
  OWN,
  AheadNLL,
  make_scorer,
  score_texts,
)
from latent_deliberation.evaluation.plots import plot_changes, plot_losses, plot_visibility
from latent_deliberation.evaluation.report import Report, summarise, write_report
from latent_deliberation.experiment import Experiment
from latent_deliberation.files import make_writable
from latent_deliberation.models import build_deliberator, count_parameters, load_frozen, open_frozen
from latent_deliberation.paths import METRICS_FILE
from latent_deliberation.progress import Progress
from latent_deliberation.provenance import git_commit, peak_memory_bytes
from latent_deliberation.sharding import make_mesh, place_batch
from latent_deliberation.training.metrics import read_metrics
from latent_deliberation.training.run import check_divides

LOSSES = 'losses.png'
PICTURES = {
    'changes.png': 'Change of perplexity by ahead position, with 95% intervals.',
    LOSSES: 'Losses in training.',
    'visibility.png': 'Who may attend to whom: a small trunk of two documents with three traces.',
}


def constant_variant(experiment: Experiment) -> Experiment:
  """The pause-token baseline: soft tokens alone, as many and trained as long."""
  deliberation = dataclasses.replace(experiment.deliberation, trainable='constant')
  return dataclasses.replace(experiment, deliberation=deliberation)


def evaluate(experiment: Experiment, *, decoder: Path, coprocessor: Path, data: Path, output: Path,
             constant: Path | None = None, seconds: Mapping[str, float] | None = None,
             runs: Mapping[str, Path] | None = None) -> dict[str, Any]:
  """Scores all arms on the same traces of held-out text; writes report.json, report.md, PNGs.

  Args:
    decoder: directory of the frozen decoder.
    coprocessor: work directory in which it was trained, or the package that was written there.
    data: directory of prepared data; its text need not be that of the training.
    output: where the report goes; created.
    constant: the same for the constant soft tokens; their arm is left out without it.
    seconds: wall-clock time of earlier phases, for the report.
    runs: work directories whose losses are drawn, by name; default that of the coprocessor, where
      its package still lies in one.

  Returns: the content of report.json.
  """
  begun = time.perf_counter()
  # Everything that can be wrong is checked, and all that is read is read, before anything is scored.
  mesh = make_mesh(experiment.mesh)
  check_divides('evaluation', experiment.evaluation.batch_size, 1, mesh, experiment)
  make_writable(output)
  checkpoint = open_frozen(experiment, decoder)
  held_out = open_held_out(experiment, data, mesh)
  check_vocabulary(held_out.rows, checkpoint)
  constant_experiment = constant_variant(experiment)
  coprocessor = find_trained(experiment, coprocessor, held_out.rows)
  constant = find_trained(constant_experiment, constant, held_out.rows) if constant else None
  curves = _curves(runs or {'coprocessor': coprocessor.parent})
  frozen, decoder_fingerprint = load_frozen(experiment, checkpoint, mesh)
  loading = dict(decoder_fingerprint=decoder_fingerprint, mesh=mesh, rules=experiment.rules,
                 frozen_dtype=experiment.computation.frozen_dtype)
  params = load_coprocessor(coprocessor, **loading)
  soft_tokens = load_coprocessor(constant, **loading) if constant else None

  arms = score_traces(experiment, (BASELINE, OWN, 'shuffled', 'zero'), params, frozen,
                      held_out.batches, mesh)
  counts = {'frozen decoder': count_parameters(frozen), 'coprocessor': count_parameters(params)}
  if constant:
    arms['constant'] = score_traces(constant_experiment, (OWN,), soft_tokens, frozen,
                                    held_out.batches, mesh)[OWN]
    counts['constant soft tokens'] = count_parameters(soft_tokens)
  summary = summarise(Report(
      arms={name: scores.merged(held_out.texts) for name, scores in arms.items()},
      positions=experiment.evaluation.positions,
      num_ahead=experiment.deliberation.num_ahead,
      decoder_fingerprint=decoder_fingerprint,
      parameters=counts,
      seconds={**(seconds or {}), 'evaluation': time.perf_counter() - begun},
      peak_memory_bytes=peak_memory_bytes(), git_commit=git_commit(),
      config=dataclasses.asdict(experiment),
      pictures={name: caption for name, caption in PICTURES.items() if curves or name != LOSSES}),
      experiment.evaluation.bootstrap_samples)
  if jax.process_index() == 0:
    plot_changes(summary, output / 'changes.png')
    if curves:
      plot_losses(curves, output / LOSSES)
    plot_visibility(output / 'visibility.png', experiment.deliberation.latents)
    write_report(summary, output)
  return summary


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Held-out text that arms are scored on.

  Attributes:
    rows: packed rows of the validation split.
    batches: this process's share of each batch.
    texts: int [rows of all batches], the text that each row belongs to.
  """
  rows: PackedRows
  batches: list[Batch]
  texts: np.ndarray


def open_held_out(experiment: Experiment, data: Path, mesh: Mesh) -> HeldOut:
  """The held-out text that `experiment.evaluation` asks for.

  Raises:
    UserError: there is less of it.
  """
  config = experiment.evaluation
  rows = open_rows(data, 'validation', length=experiment.data.length,
                   vocab_size=experiment.decoder.vocab_size)
  batches = validation_batches(rows, config.num_texts // config.batch_size, config.batch_size,
                               mesh, experiment.rules)
  texts = validation_texts(rows, len(batches) * config.batch_size, config.rows_per_text)
  return HeldOut(rows, batches, texts)


def find_trained(experiment: Experiment, directory: Path, rows: PackedRows) -> Path:
  """`find_coprocessor`, for the coprocessor that the experiment trains, to read these rows."""
  return find_coprocessor(
      directory, decoder_config=experiment.decoder, config=experiment.deliberation,
      steps=experiment.training.loop.num_steps,
      vocabulary=rows.manifest.recipe.vocabulary_hash)


def score_traces(experiment: Experiment, arms: tuple[str, ...], params: Params, frozen: Params,
                 held_out: list[Batch], mesh: Mesh, first_anchor: int = 0) -> dict[str, AheadNLL]:
  """Scores of the arms with these parameters, on the same traces for any parameters.

  Experiments are scored on the same traces if seed, `first_anchor` and `anchor_tokens` are the
  same, and `first_anchor` is no lower than that of each: see `sample_traces`.
  """
  scorer = make_scorer(
      build_deliberator(experiment), arms, num_traces=experiment.evaluation.num_traces,
      num_ahead=experiment.evaluation.num_ahead, loss_chunk=experiment.computation.loss_chunk,
      seed=experiment.seed, mesh=mesh, rules=experiment.rules, delay=experiment.evaluation.delay,
      first_anchor=first_anchor)
  return score_texts(scorer, params, frozen, placed(experiment, held_out, arms, mesh))


def placed(experiment: Experiment, held_out: list[Batch], arms: tuple[str, ...],
           mesh: Mesh) -> Iterator[Batch]:
  """The batches on devices, one at a time, with a line of progress every ten seconds."""
  progress = Progress(f'scoring {", ".join(arms)}', 'batches', len(held_out))
  for done, batch in enumerate(held_out):
    progress.update(done)
    yield place_batch(batch, mesh, experiment.rules)


def _curves(runs: Mapping[str, Path]) -> dict[str, dict[str, tuple[list, list]]]:
  """Training and validation losses of each run that has any, as (steps, values)."""
  curves = {}
  for name, workdir in runs.items():
    if not (workdir / METRICS_FILE).exists():  # a package that was moved to another place
      continue
    rows = read_metrics(workdir / METRICS_FILE)
    curves[name] = {
        label: ([row['step'] for row in rows if key in row],
                [row[key] for row in rows if key in row])
        for label, key in (('training', 'loss'), ('validation', 'validation/loss'))}
  return curves
