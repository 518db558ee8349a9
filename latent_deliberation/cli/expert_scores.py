"""Scores of a trained expert on its own text and on general text, and what routers need.

Each is kept in the work directory, so that a launch that was stopped measures nothing again.
"""

import dataclasses
import functools
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jax.sharding import Mesh

from latent_deliberation.build import load_frozen, open_frozen
from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.deliberation.coprocessor_checkpoint import CoprocessorCheckpoint
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.evaluate import HeldOut
from latent_deliberation.evaluation.gating import Places
from latent_deliberation.experiment import Experiment
from latent_deliberation.experts.measuring import find_places, fit_routing, measure, on_mesh
from latent_deliberation.experts.package import Routing
from latent_deliberation.files import as_path, write_whole
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.paths import CONSTANT, COPROCESSOR, EXPERT_SCORES
from latent_deliberation.progress import PhaseClock

ScoredText = tuple[Experiment, HeldOut]  # how held-out text is scored, and the text


def measure_expert(texts: Mapping[str, ScoredText], workdir: Path, mesh: Mesh, clock: PhaseClock,
                   ) -> tuple[CoprocessorCheckpoint, dict[str, Any], Routing | None]:
  """Scores an expert that was trained in `workdir`, and fits what routers need.

  Args:
    texts: the expert's own text and general text, in this order, by name.
    workdir: work directory of its training.
    mesh: devices.
    clock: takes the time of each phase.

  Returns: the trained coprocessor, the scores by text, and the routing.
  """
  experiment, _ = next(iter(texts.values()))
  checkpoint = open_frozen(experiment.decoder, as_path(experiment.decoder_from))
  trained, constant = (coprocessor_checkpoint.load(workdir / place / COPROCESSOR)
                       for place in (COPROCESSOR, CONSTANT))
  params, soft_tokens = (on_mesh(each.params, mesh) for each in (trained, constant))
  weights = [fingerprint(each.params) for each in (trained, constant)]
  # Loaded only if something is left to measure.
  load = functools.cache(lambda: load_frozen(experiment, checkpoint, mesh)[0])

  def score(scored: Experiment, held_out: HeldOut) -> dict[str, Any]:
    found = measure(scored, params, soft_tokens, load(), held_out, mesh)
    return {'scores': json.dumps(found)}

  def route(scored: Experiment, held_out: HeldOut) -> dict[str, Any]:
    return vars(find_places(scored, params, load(), held_out, mesh))

  scores, places = {}, []
  for name, (scored, held_out) in texts.items():
    key = json.dumps([weights, held_out.rows.fingerprint, scored.seed, *map(dataclasses.asdict, (
        scored.evaluation, scored.deliberation, scored.computation))])
    directory = workdir / EXPERT_SCORES
    with clock.phase(f'scores on {name} text'):
      found = _keep(directory / f'{name}_scores.npz', key, score, scored, held_out)
      scores[name] = json.loads(str(found['scores']))
    with clock.phase(f'routing on {name} text'):
      found = _keep(directory / f'{name}_places.npz', key, route, scored, held_out)
      places.append(Places(**found))
  try:
    return trained, scores, fit_routing(*places)
  except UserError as error:
    logging.warning('the expert has no centroid and no gain head: %s', error)
    return trained, scores, None


def _keep(path: Path, key: str, make: Callable[..., Mapping[str, Any]],
          *arguments: Any) -> dict[str, np.ndarray]:
  """Returns the arrays that an earlier launch kept for the same key, or makes and keeps them."""
  try:
    with np.load(io.BytesIO(path.read_bytes())) as kept:
      if str(kept['key']) == key:
        return {name: kept[name] for name in kept if name != 'key'}
  except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    pass  # there is none, or it is damaged
  arrays = {name: np.asarray(value) for name, value in make(*arguments).items()}
  content = io.BytesIO()
  np.savez(content, key=np.asarray(key), **arrays)
  write_whole(path, content.getvalue())
  return arrays


def rows_of(held_out: HeldOut) -> dict[str, np.ndarray]:
  """Returns the scored rows as the sample of a package has them."""
  rows = {part: np.concatenate([getattr(batch, part) for batch in held_out.batches])
          for part in ('tokens', 'segments')}
  return {**rows, 'texts': held_out.texts}
