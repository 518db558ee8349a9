"""Fits a gate that says where latents are worth their time, and compares it with simpler ones."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save

from latent_deliberation.data.loading import check_vocabulary, open_rows, validation_texts
from latent_deliberation.deliberation.coprocessors import find_coprocessor, load_coprocessor
from latent_deliberation.directories import make_writable
from latent_deliberation.evaluation import gating, plots
from latent_deliberation.evaluation.controls import BASELINE, OWN
from latent_deliberation.evaluation.evaluate import placed, scored_batches
from latent_deliberation.experiment import Experiment
from latent_deliberation.files import whole_directory
from latent_deliberation.inference.gates import RESULT, WEIGHTS
from latent_deliberation.models import build_deliberator, load_frozen, open_frozen
from latent_deliberation.provenance import git_commit
from latent_deliberation.sharding import make_mesh
from latent_deliberation.training.fit import check_divides

FRACTIONS = tuple(np.round(np.linspace(0, 1, 21), 2).tolist())
PICTURE = 'gate.png'


def fit_gate(experiment: Experiment, *, decoder: Path, coprocessor: Path, data: Path,
             output: Path) -> dict[str, Any]:
  """Measures gains on held-out text, fits a gate on one half of the texts, compares on the other.

  Args:
    decoder: directory of the frozen decoder.
    coprocessor: directory of the trained one.
    data: directory of prepared data.
    output: for gate.json, gate.safetensors and gate.png; must not exist yet.

  Returns: the content of gate.json.

  Raises:
    FileExistsError: there is something at `output`.
    OSError: it cannot be written.
    ValueError: the held-out texts are too few, or see `evaluate`.
  """
  if output.exists():
    raise FileExistsError(f'{output} exists already and is not written over: give another')
  make_writable(output.absolute().parent)
  mesh = make_mesh(experiment.mesh)
  check_divides('evaluation', experiment.evaluation.batch_size, 1, mesh, experiment)
  checkpoint = open_frozen(experiment, decoder)
  rows = open_rows(experiment, data, 'validation')
  check_vocabulary(rows, checkpoint)
  found = find_coprocessor(experiment, coprocessor, rows.manifest.recipe.vocabulary_hash)
  held_out = scored_batches(experiment, data)
  texts = validation_texts(experiment, data, len(held_out))
  fitted_on = np.unique(texts)[::2]
  gating.check_texts(fitted_on)
  frozen, digest = load_frozen(experiment, checkpoint, mesh)
  params = load_coprocessor(experiment, found, digest, mesh)
  deliberator = build_deliberator(experiment).with_traces(
      experiment.evaluation.num_traces, experiment.deliberation.num_ahead)
  places = gating.measure_places(
      deliberator, params, frozen, placed(experiment, held_out, (BASELINE, OWN), mesh),
      texts, loss_chunk=experiment.computation.loss_chunk, seed=experiment.seed, mesh=mesh,
      rules=experiment.rules)
  first = np.isin(places.text, fitted_on)
  fitted, others = gating.fit_gate(places.where(first)), places.where(~first)
  curves = gating.compare_gates(fitted, others, FRACTIONS,
                                experiment.evaluation.bootstrap_samples)
  result = {
      'places': len(others.gain), 'texts': len(np.unique(others.text)),
      'num_ahead': experiment.deliberation.num_ahead, 'decoder': digest,
      'curves': {name: {field: np.where(np.isfinite(values), values, None).tolist()
                        for field, values in vars(curve).items()}
                 for name, curve in curves.items()},
      'git_commit': git_commit()}
  with whole_directory(output) as partial:
    if jax.process_index() == 0:
      plots.plot_gates(curves, partial / PICTURE)
      (partial / WEIGHTS).write_bytes(save({'weight': fitted.weight.astype(np.float32),
                                            'bias': np.array([fitted.bias], np.float32)}))
      (partial / RESULT).write_text(json.dumps(result, indent=2) + '\n')
  return result
