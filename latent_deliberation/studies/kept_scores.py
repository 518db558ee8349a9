"""The scores of a run on disk, so that a study that was stopped does not score it again."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from latent_deliberation.array_types import Params
from latent_deliberation.data.rows import fingerprint_of
from latent_deliberation.distributed import from_process_zero, run_on_process_zero
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.perplexity import AheadNLL
from latent_deliberation.experiment import Experiment
from latent_deliberation.files import seal, unseal, write_whole
from latent_deliberation.model.decoder import fingerprint
from latent_deliberation.provenance import git_commit
from latent_deliberation.studies.study_result import ChainOutcomes, Outcomes

Scores = Mapping[str, Outcomes | AheadNLL]  # by control
KINDS = {'questions': Outcomes, 'chains': ChainOutcomes, 'text': AheadNLL}
# Keys of `evaluation` that change the scores of a run.
SCORED = ('num_texts', 'batch_size', 'num_traces', 'num_ahead', 'delay', 'rows_per_text')


def scores_identity(experiment: Experiment, arms: Sequence[str], params: Params,
                    decoder_fingerprint: str, data_identity: str) -> str:
  """Returns a hash of everything that scores depend on, except the program.

  Args:
    experiment: the experiment of the arm.
    arms: what is scored, 'frozen' and names of controls.
    params: parameters of the coprocessor.
    decoder_fingerprint: fingerprint of the decoder's weights.
    data_identity: `identity` of the scorer.
  """
  evaluation = dataclasses.asdict(experiment.evaluation)
  return fingerprint_of({
      'arms': list(arms), 'params': fingerprint(params), 'weights': decoder_fingerprint,
      'data': data_identity, 'evaluation': {key: evaluation[key] for key in SCORED},
      'computation': dataclasses.asdict(experiment.computation.on(jax.default_backend())),
      **{part: dataclasses.asdict(getattr(experiment, part))
         for part in ('decoder', 'deliberation')}})


def keep_scores(path: Path, identity: str, score: Callable[[], Scores]) -> Scores:
  """Returns the scores in a file, if they have this identity. Else it computes and writes them.

  Args:
    path: the file, which need not exist.
    identity: see `scores_identity`.
    score: computes the scores; all processes call it.

  Raises:
    UserError: the file is damaged, or cannot be written.
  """
  kept = _read(path) if path.exists() else {}
  # All processes score together, or none: they may see the file at different times.
  if not from_process_zero(kept.get('identity') != identity):
    if kept.get('identity') != identity:
      raise UserError(f'{path}: process 0 reads scores that this process does not see. Put the '
                      'work directory on a disk that all processes share')
    commit, now = kept.get('git_commit'), git_commit()
    say = logging.info if commit == now else logging.warning
    say('%s has the scores of git commit %s, and this is %s', path, commit, now)
    return {arm: _from_json(fields) for arm, fields in kept['scores'].items()}
  scores = score()
  content = seal({'identity': identity, 'git_commit': git_commit(),
                  'scores': {arm: _to_json(each) for arm, each in scores.items()}})
  run_on_process_zero(
      f'write {path}', lambda: write_whole(path, json.dumps(content).encode()))
  return scores


def _read(path: Path) -> dict[str, Any]:
  remedy = f'{path} is damaged: remove it, and the arm is scored again'
  try:
    kept = unseal(path.read_bytes(), path)
  except (ValueError, UserError) as error:
    raise UserError(remedy) from error
  if not isinstance(kept, dict) or not {'identity', 'scores'} <= set(kept):
    raise UserError(remedy)
  return kept


def _to_json(scores: Outcomes | AheadNLL) -> dict[str, Any]:
  kind = next(name for name, each in KINDS.items() if type(scores) is each)
  return {'kind': kind, **{field.name: getattr(scores, field.name).tolist()
                           for field in dataclasses.fields(scores)}}


def _from_json(fields: Mapping[str, Any]) -> Outcomes | AheadNLL:
  return KINDS[fields['kind']](**{
      name: np.array(values) for name, values in fields.items() if name != 'kind'})
