"""Names on disk: the files of a run's directory, and old names inside of them.

  WORKDIR/
    run.json              what the run is; a resumption is compared with it
    metrics.jsonl         logged numbers, a line for each logged step
    checkpoints/          what training goes on from
    decoder/              written by pretraining
    coprocessor/          written by training: coprocessor.json, coprocessor.safetensors
  DATA/                   may be the same directory
    vocabulary.model      SentencePiece model that the rows were made with
    rows/train, rows/validation
  quickstart and studies
    pretraining/, coprocessor/, constant/     work directories of the quickstart's runs
    decoder/, arms/NAME/seedN/                work directories of a study's runs
    phases.json           seconds of each phase
    report.json, report.md; results.json, results.md; pictures beside them
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
ARM_DATA = 'lessons'  # in a study's directory: text of the arms, where it differs

PRETRAINING, CONSTANT = 'pretraining', 'constant'  # in a quickstart's directory
PHASES_FILE = 'phases.json'
REPORT, RESULTS = 'report', 'results'  # .json and .md


def arm_directory(workdir: Path, arm: str, seed: int) -> Path:
  """Work directory of one run of a study."""
  return workdir / 'arms' / arm / f'seed{seed}'


# Keys and values that configurations were saved with, and what they are called now.
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
  """A saved configuration, as nested dicts and lists, under the names of today."""
  if not isinstance(saved, Mapping):
    return saved
  renamed = {}
  for key, value in saved.items():
    if isinstance(value, str):
      value = OLD_VALUES.get(key, {}).get(value, value)
    renamed[OLD_KEYS.get(key, key)] = with_current_names(value)
  return renamed
