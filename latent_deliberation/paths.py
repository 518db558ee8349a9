"""Names on disk: the files that the commands write, and the old names that they may contain.

  a run (--workdir)
    run.json                  identity of the run, which a resumed run must have; place of its data
    metrics.jsonl             logged numbers, one line for each logged step
    tensorboard/, wandb/      the same numbers for trackers
    profile/                  profiles of steps, for xprof
    checkpoints/STEP/         states that training resumes from
    checkpoints/data/STEP/    the position of the data at each of them
    decoder/                  written by pretraining
    coprocessor/              written by training: coprocessor.json, coprocessor.safetensors
    decoder_STEPS/, coprocessor_STEPS/        the same of fewer steps, before it was trained further
    run.lock                  while a process works in the directory
  prepared data (--data)      may be the work directory of a run
    vocabulary.model          SentencePiece model of the rows; or else
    tokenizer.json            Hugging Face's tokenizer, with tokenizer_config.json
    rows/train, rows/validation
    data.lock                 while a process prepares them
    rows/source.json          what the rows were packed from, to explain a difference
  a quickstart                also holds its prepared data and its report
    run.json                  config of the last launch, and sizes that were chosen for its text
    pretraining/, coprocessor/, constant/     work directories of its runs
    phases.json               seconds of each phase
  an expert's training        as a quickstart without its report, and also
    general/                  prepared general text
    scores/                   what was measured
    expert_request.json, pace.json            what was asked for, and how many steps fit the minutes
  a study                     also holds its prepared data
    run.json                  as in a quickstart
    decoder/, arms/NAME/seedN/                work directories of its runs
    scores.json               scores of the frozen decoder; those of other runs are in theirs
    chain_scores.json         scores of the frozen decoder after chains of its own
    lessons/                  prepared data of the arms, where they read other text
    phases.json
    results.json, results.md, results.png, diagnostics.png
  a report (--output)
    report.json, report.md, changes.png, losses.png, visibility.png
  benchmarks (--output)
    run.json, answers.jsonl, tasks/, samples/, results.json, results.md, results.png
  a gate (--output)
    gate.json, gate.safetensors, gate.png
  the user's cache (CACHE_VARIABLE, or ~/.cache/latent_deliberation)
    models/, tokenizers/      what was made of installed packages and GGUF files
    stores/                   copies from object stores
    experts/                  added experts
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_deliberation.errors import UserError

RUN_FILE = 'run.json'
METRICS_FILE = 'metrics.jsonl'
TENSORBOARD = 'tensorboard'
WANDB_ID = 'wandb/id'  # in the folder that wandb makes
PROFILE = 'profile'
CHECKPOINTS = 'checkpoints'
DATA_STATES = 'data'  # in `CHECKPOINTS`
STEP_METADATA = '_CHECKPOINT_METADATA'  # orbax's description of a step, JSON, in its directory
DECODER = 'decoder'
COPROCESSOR = 'coprocessor'
RUN_LOCK, DATA_LOCK = 'run.lock', 'data.lock'

VOCABULARY_FILE = 'vocabulary.model'
# Hugging Face's tokenizer, and the file beside it that names the tokens which begin and end a text.
TOKENIZER_JSON, TOKENIZER_CONFIG = 'tokenizer.json', 'tokenizer_config.json'
# In a decoder's directory: its SentencePiece model, and the ending of a file of llama.cpp.
TOKENIZER, GGUF = 'tokenizer.model', '.gguf'
ROWS = 'rows'
ARM_DATA = 'lessons'  # in a study's directory: the arms' own text, where they have some

PRETRAINING, CONSTANT = 'pretraining', 'constant'  # in a quickstart's directory
GENERAL_DATA, EXPERT_SCORES = 'general', 'scores'  # in the directory of an expert's training
PHASES_FILE = 'phases.json'
REPORT, RESULTS = 'report', 'results'  # .json and .md
SCORES_FILE = 'scores.json'  # in the directory of a run of a study
CHAIN_SCORES_FILE = 'chain_scores.json'  # in a study's directory
GATE_FILE, GATE_WEIGHTS_FILE = 'gate.json', 'gate.safetensors'
CACHE_VARIABLE = 'LATENT_DELIBERATION_CACHE'


def cache_directory(kind: str) -> Path:
  """Returns the directory of the user's cache for one kind of files, such as 'models'.

  Raises:
    UserError: the variable has a URL.
  """
  root = os.environ.get(CACHE_VARIABLE) or '~/.cache/latent_deliberation'
  if ':/' in root:
    raise UserError(f'{CACHE_VARIABLE} is {root}, a URL: set it to a directory of this machine')
  return Path(os.path.expanduser(root)) / kind


def arm_directory(workdir: Path, arm: str, seed: int) -> Path:
  """Work directory of one run of a study."""
  return workdir / 'arms' / arm / f'seed{seed}'


def kept_vocabulary(prepared_dir: Path) -> Path:
  """Vocabulary of prepared data, whether it is there yet or not."""
  tokenizer = prepared_dir / TOKENIZER_JSON
  return tokenizer if tokenizer.is_file() else prepared_dir / VOCABULARY_FILE


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
