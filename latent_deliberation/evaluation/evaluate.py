"""Scores a trained coprocessor against its controls and writes the report."""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from latent_deliberation.array_types import Batch, Params
from latent_deliberation.data.loading import (
  check_vocabulary,
  open_rows,
  validation_batches,
  validation_texts,
)
from latent_deliberation.deliberation.coprocessor_checkpoint import (
  find_coprocessor,
  load_coprocessor,
)
from latent_deliberation.evaluation import plots
from latent_deliberation.evaluation.bootstrap import AheadNLL
from latent_deliberation.evaluation.perplexity import BASELINE, OWN, make_scorer, score_texts
from latent_deliberation.evaluation.plots import plot_visibility
from latent_deliberation.evaluation.report import (
  Report,
  summarise,
)
from latent_deliberation.experiment import Experiment
from latent_deliberation.files import make_writable
from latent_deliberation.model.fingerprint import fingerprint
from latent_deliberation.models import build_deliberator, count_parameters, load_frozen, open_frozen
from latent_deliberation.progress import Progress
from latent_deliberation.provenance import git_commit, peak_memory_bytes
from latent_deliberation.sharding import make_mesh, place_batch
from latent_deliberation.training.metrics import FILE_NAME as METRICS_FILE
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
  mesh = make_mesh(experiment.mesh)
  check_divides('evaluation', experiment.evaluation.batch_size, 1, mesh, experiment)
  make_writable(output)
  checkpoint = open_frozen(experiment, decoder)
  rows = open_rows(experiment, data, 'validation')
  check_vocabulary(rows, checkpoint)
  pauses = constant_variant(experiment)
  vocabulary = rows.manifest.recipe.vocabulary_hash
  coprocessor = find_coprocessor(experiment, coprocessor, vocabulary)
  constant = find_coprocessor(pauses, constant, vocabulary) if constant else None
  curves = _curves(runs or {'coprocessor': coprocessor.parent})
  held_out = scored_batches(experiment, data)
  # All that is read is read before anything is scored.
  frozen, digest = load_frozen(experiment, checkpoint, mesh)
  before = fingerprint(frozen)
  params = load_coprocessor(experiment, coprocessor, digest, mesh)
  soft_tokens = load_coprocessor(pauses, constant, digest, mesh) if constant else None
  arms = score_traces(experiment, (BASELINE, OWN, 'shuffled', 'zero'), params, frozen,
                      held_out, mesh)
  counts = {'frozen decoder': count_parameters(frozen), 'coprocessor': count_parameters(params)}
  if constant:
    arms['constant'] = score_traces(pauses, (OWN,), soft_tokens, frozen, held_out, mesh)[OWN]
    counts['constant soft tokens'] = count_parameters(soft_tokens)
  texts = validation_texts(experiment, data, len(held_out))
  report = Report(
      arms={name: scores.merged(texts) for name, scores in arms.items()},
      positions=experiment.evaluation.positions,
      num_ahead=experiment.deliberation.num_ahead,
      decoder_fingerprints=(before, fingerprint(frozen)),
      parameters=counts,
      seconds={**(seconds or {}), 'evaluation': time.perf_counter() - begun},
      peak_memory_bytes=peak_memory_bytes(), git_commit=git_commit(),
      config=dataclasses.asdict(experiment),
      pictures={name: caption for name, caption in PICTURES.items() if curves or name != LOSSES})
  summary = summarise(report, experiment.evaluation.bootstrap_samples)
  if jax.process_index() == 0:
    plots.plot_changes(summary, output / 'changes.png')
    if curves:
      plots.plot_losses(curves, output / LOSSES)
    plot_visibility(output / 'visibility.png', experiment.deliberation.latents)
    report.write_report(summary, output)
  return summary


def scored_batches(experiment: Experiment, data: Path) -> list[Batch]:
  """The held-out text of the report. Raises: ValueError when there is less than it asks for."""
  wanted = experiment.evaluation
  return validation_batches(experiment, data, wanted.num_texts // wanted.batch_size)


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
