"""An experiment as typed values, checked before anything runs."""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.data.rows import ALL_ROWS, check_row_range
from latent_deliberation.deliberation.coprocessor import PARTS
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.errors import UserError
from latent_deliberation.model.transformer import ATTENTIONS, REMAT_POLICIES
from latent_deliberation.model.transformer_config import TransformerConfig
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, check_rules
from latent_deliberation.training.loop import LoopConfig
from latent_deliberation.training.optimizer import OptimizerConfig

# --help of a launch script shows the flags that are defined here as its own.
flags.disclaim_key_flags()

DTYPES = ('float32', 'bfloat16')
FROZEN_DTYPES = (*DTYPES, 'int8')


@dataclasses.dataclass(frozen=True)
class Computation:
  """How the same mathematics is computed.

  Attributes:
    dtype: of activations, and of the weights inside matrix products.
    frozen_dtype: what the frozen decoder's weights are kept in; 'int8' has a float32 scale for each
      output channel, and norms as stored. What learns is always float32, and starts from weights
      that were not rounded to int8.
    remat: what the backward pass keeps of a block: 'none' all, 'full' nothing; see REMAT_POLICIES.
    scan: loop over stacked layers (compiles fast at any depth) or unroll them (runs faster on CPU).
    loss_chunk: targets of a text whose logits exist at the same time.
    attention: 'plain', or 'fused' in kernels for TPUs and NVIDIA GPUs that keep no scores in
      memory, and on TPUs turn heads by positions in one pass; 'auto' is 'fused' on TPUs and 'plain'
      elsewhere: on a GPU no kernel of ours ran yet.
    replicate_frozen: every device keeps the frozen weights whole (but for its share of the axis
      'tensor') and need not gather them, a layer at a time in each pass, from the shards of 'fsdp'.
  """
  dtype: str = 'float32'
  frozen_dtype: str = 'float32'
  remat: str = 'none'
  scan: bool = True
  loss_chunk: int = 256
  attention: str = 'plain'
  replicate_frozen: bool = False

  def __post_init__(self):
    for name, known in (('dtype', DTYPES), ('frozen_dtype', FROZEN_DTYPES)):
      if getattr(self, name) not in known:
        raise UserError(f'computation.{name} = {getattr(self, name)!r}: must be one of {known}')
    if self.remat not in REMAT_POLICIES:
      raise UserError(f'computation.remat = {self.remat!r}: must be one of '
                       f'{sorted(REMAT_POLICIES)}')
    known = sorted((*ATTENTIONS, 'auto'))
    if self.attention not in known:
      raise UserError(f'computation.attention = {self.attention!r}: must be one of {known}')
    if self.loss_chunk < 1:
      raise UserError(f'computation.loss_chunk = {self.loss_chunk}: at least 1 is needed')

  def on(self, platform: str) -> 'Computation':
    """The same with what 'auto' means on this platform ('tpu', 'gpu', 'cpu')."""
    if self.attention != 'auto':
      return self
    return dataclasses.replace(self, attention='fused' if platform == 'tpu' else 'plain')


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """One training run.

  Attributes:
    batch_size: B, texts of a global batch.
    optimizer: see OptimizerConfig.
    loop: see LoopConfig.
    accumulation: microbatches that a batch is split into, one after the other.
    multipliers: top-level key of the trainable parameters -> factor on its learning rate; a key
      that this variant's parameters lack (a gate, with 'paper' latents) is without effect.
    row_range_percent: percent of the packed training rows that are read, from and to: (0, 50) for a decoder
      and (50, 100) for its coprocessor give the coprocessor text that the decoder has not read.
  """
  batch_size: int
  optimizer: OptimizerConfig
  loop: LoopConfig
  accumulation: int = 1
  multipliers: Mapping[str, float] = dataclasses.field(default_factory=dict)
  row_range_percent: tuple[int, int] = ALL_ROWS

  def __post_init__(self):
    object.__setattr__(self, 'row_range_percent', check_row_range(self.row_range_percent))
    for name in ('batch_size', 'accumulation'):
      if getattr(self, name) < 1:
        raise UserError(f'{name} = {getattr(self, name)}: at least 1 is needed')


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """Attributes:
    num_texts: validation rows of the report.
    batch_size: rows at a time.
    num_traces: M, traces of a row.
    num_ahead: ahead positions scored; may exceed what training had a loss on.
    positions: ahead positions of the table, from 1.
    eval_batches: batches that training looks at every eval_every steps.
    bootstrap_samples: resamplings behind an interval.
    delay: ahead tokens that are read before latents join the cache, in the report.
    rows_per_text: consecutive packed rows that count as one text when texts are resampled, since
      rows of one document are no independent witnesses.
  """
  num_texts: int
  batch_size: int
  num_traces: int
  num_ahead: int
  positions: tuple[int, ...]
  eval_batches: int
  bootstrap_samples: int = 2000
  rows_per_text: int = 1
  delay: int = 0

  def __post_init__(self):
    object.__setattr__(self, 'positions', tuple(self.positions))
    increasing = list(self.positions) == sorted(set(self.positions))
    if not self.positions or not increasing or not (
        1 <= self.positions[0] <= self.positions[-1] <= self.num_ahead):
      raise UserError(f'evaluation.positions = {self.positions}: must increase, from 1 on up to '
                       f'num_ahead = {self.num_ahead}')
    if self.batch_size < 2:
      raise UserError(f'evaluation.batch_size = {self.batch_size}: latents of another text of the '
                       'batch are one of the controls; at least 2 is needed')
    if self.num_texts < self.batch_size or self.num_texts % self.batch_size:
      raise UserError(f'evaluation.num_texts = {self.num_texts} is not a multiple of batch_size = '
                       f'{self.batch_size}: change one of the two')
    if not 0 <= self.delay < self.num_ahead:
      raise UserError(f'evaluation.delay = {self.delay}: it must lie between 0 and num_ahead - 1, '
                       f'{self.num_ahead - 1}')
    for name in ('num_traces', 'eval_batches', 'bootstrap_samples', 'rows_per_text'):
      if getattr(self, name) < 1:
        raise UserError(f'evaluation.{name} = {getattr(self, name)}: at least 1 is needed')


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Everything that a run depends on, beside its directories. See configs/quickstart.py."""
  decoder: TransformerConfig
  data: DataConfig
  pretraining: TrainingConfig
  deliberation: DeliberationConfig
  training: TrainingConfig
  evaluation: EvaluationConfig
  computation: Computation = Computation()
  mesh: MeshConfig = MeshConfig()
  rules: Mapping[str, tuple[str, ...]] = dataclasses.field(
      default_factory=lambda: dict(DEFAULT_RULES))
  seed: int = 0

  def __post_init__(self):
    object.__setattr__(self, 'rules', check_rules(self.rules))
    if not 0 <= self.seed < 2**30 - 1:
      raise UserError(f'seed = {self.seed}: it must lie between 0 and {2**30 - 2}')
    self._check_multipliers()
    for section in ('pretraining', 'training'):
      row_range_percent = getattr(self, section).row_range_percent
      if self.data.mode == 'online' and row_range_percent != ALL_ROWS:
        raise UserError(f"{section}.row_range_percent = {row_range_percent}, but a stream (data.mode = 'online') has "
                         f"no rows to count: set it to {ALL_ROWS}, or data.mode = 'packed'")
    for axis in ('trace', 'length'):
      if self.computation.attention != 'plain' and axis in self.rules and self.rules[axis]:
        raise UserError(
            f'rule {axis!r} -> {self.rules[axis]} with computation.attention = '
            f'{self.computation.attention!r}: the fused kernels have all traces of a text in one '
            "row and do not divide it; leave the rule out, or set attention = 'plain'")
    self.deliberation.check_trunk(self.data.length)
    try:
      scored = self.deliberation.with_traces(self.evaluation.num_traces, self.evaluation.num_ahead)
      scored.check_trunk(self.data.length)
    except UserError as error:
      raise UserError(f'evaluation: {error}') from error

  def _check_multipliers(self) -> None:
    for section, parts in (('pretraining', ('embedder', 'transformer')), ('training', PARTS)):
      unknown = sorted(set(getattr(self, section).multipliers) - set(parts))
      if unknown:
        raise UserError(f'{section}.multipliers names {unknown}: what learns there is among '
                         f'{parts}')


def as_config(experiment: Any) -> ConfigDict:
  """Every key of an experiment, or a study, with its value, locked, for flags to override."""

  def fill(tree: Mapping[str, Any]) -> ConfigDict:
    # A bare None could not be overridden by a flag; all our optional values are floats. Keys stay
    # in order, since a report has a study's arms as they were listed.
    return ConfigDict({key: fill(value) if isinstance(value, Mapping)
                       else config_dict.placeholder(float) if value is None else value
                       for key, value in tree.items()}, sort_keys=False)

  return fill(dataclasses.asdict(experiment)).lock()


def defaults_of(kind: type) -> dict[str, Any]:
  """The defaults of a dataclass, as nested dicts without the keys that have none."""
  defaults = {}
  for field in dataclasses.fields(kind):
    if field.default is not dataclasses.MISSING:
      value = field.default
      defaults[field.name] = (
          dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value)
    elif field.default_factory is not dataclasses.MISSING:
      defaults[field.name] = field.default_factory()
    elif dataclasses.is_dataclass(field.type):
      defaults[field.name] = defaults_of(field.type)
  return defaults


def bind(config: Mapping[str, Any], kind: type = Experiment, where: str = 'config') -> Any:
  """A frozen dataclass of `kind` from a nested mapping such as a ConfigDict.

  Raises:
    UserError: a key is unknown (the nearest known one is suggested) or missing, or a value is not
      allowed; names the key by its dotted path.
  """
  fields = {field.name: field for field in dataclasses.fields(kind)}
  for key in config:
    if key not in fields:
      near = difflib.get_close_matches(key, fields, n=1)
      hint = f'did you mean {near[0]!r}?' if near else f'known keys: {sorted(fields)}'
      raise UserError(f'{where}.{key} is not a key of this project: {hint}')
  missing = sorted(name for name, field in fields.items() if name not in config
                   and field.default is dataclasses.MISSING
                   and field.default_factory is dataclasses.MISSING)
  if missing:
    raise UserError(f'{where} has no {missing}: give a value, as configs/quickstart.py does')
  values = {}
  for key in config:
    value, field = config[key], fields[key]
    if dataclasses.is_dataclass(field.type):
      value = bind(value, field.type, f'{where}.{key}')
    elif isinstance(value, Mapping) or hasattr(value, 'to_dict'):
      value = {name: value[name] for name in value}
    values[key] = value
  try:
    return kind(**values)
  except UserError as error:
    raise UserError(f'{where}: {error}') from error


def define_config(launch_script: str, default: str | None = None) -> None:
  """Defines the flag --config of a launch script.

  Args:
    launch_script: path of the script, which lies in launch/.
    default: path of a config file, relative to the root of the source tree; the flag is required
      without one.
  """
  root = Path(launch_script).resolve().parents[1]
  config_flags.DEFINE_config_file(
      'config', str(root / default) if default else None,
      'Config file. Any key can be overridden, as in --config.training.batch_size=16.',
      lock_config=True)
  if default is None:
    flags.mark_flag_as_required('config')


def read_config(kind: type = Experiment) -> Any:
  """The value of --config and its overrides, as a checked dataclass of `kind`."""
  return bind(flags.FLAGS.config, kind)
