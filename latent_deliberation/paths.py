"""Names on disk: the files of a run's directory, and the old names that they may contain.

  WORKDIR/
    run.json              identity of the run, which a resumed run must have
    metrics.jsonl         logged numbers, one line for each logged step
    checkpoints/          states that training resumes from
    decoder/              written by pretraining
    coprocessor/          written by training: coprocessor.json, coprocessor.safetensors
  DATA/                   may be the same directory
    vocabulary.model      SentencePiece model of the rows
    rows/train, rows/validation
  quickstart and studies
    pretraining/, coprocessor/, constant/     work directories of the quickstart's runs
    decoder/, arms/NAME/seedN/                work directories of a study's runs
    phases.json           seconds of each phase
    report.json, report.md, results.json, results.md, and pictures
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

RUN_FILE = 'run.json'
METRICS_FILE = 'metrics.jsonl'
CHECKPOINTS = 'checkpoints'
DECODER = 'decoder'
COPROCESSOR = 'coprocessor'

VOCABULARY_FILE = 'vocabulary.model'
ROWS = 'rows'
ARM_DATA = 'lessons'  # in a study's directory: the arms' own text, where they have some

PRETRAINING, CONSTANT = 'pretraining', 'constant'  # in a quickstart's directory
PHASES_FILE = 'phases.json'
REPORT, RESULTS = 'report', 'results'  # .json and .md


def arm_directory(workdir: Path, arm: str, seed: int) -> Path:
  """Work directory of one run of a study."""
  return workdir / 'arms' / arm / f'seed{seed}'


# Old keys and values of saved configurations, with their current names.
OLD_KEYS = {'portion': 'row_range_percent', 'watch_batches': 'eval_batches',
            'lessons': 'arm_data_options'}
OLD_VALUES = {
    'soft_tokens': {'rested': 'additive'},
    'name': {'hops': 'pointer_chasing', 'groups': 'state_tracking', 'carries': 'addition',
             'written': 'word_problems'},
    'learns': {'unified': 'joint', 'continued': 'finetuned', 'adapted': 'lora'},
    'job': {'unified': 'joint', 'continued': 'finetuned', 'adapted': 'lora'},
}


def with_current_names(saved: Any) -> Any:
  """Returns a saved configuration, as nested dicts, with current names for old ones."""
  if not isinstance(saved, Mapping):
    return saved
  renamed = {}
  for key, value in saved.items():
    if isinstance(value, str):
      value = OLD_VALUES.get(key, {}).get(value, value)
    renamed[OLD_KEYS.get(key, key)] = with_current_names(value)
  return renamed
