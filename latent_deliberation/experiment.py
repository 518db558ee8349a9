"""The configuration of an experiment, and its binding to ml_collections.

Each section is a frozen dataclass that checks its values, and the docstring of a section describes
its keys. A config file returns `as_config` of an Experiment: a ConfigDict, any key of which a flag
can override (cli/config_flag.py). `bind` makes it an Experiment again.
"""

import dataclasses
import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_dict

from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.data.rows import ALL_ROWS, check_row_range
from latent_deliberation.deliberation.coprocessor import PARTS
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.errors import (
  UserError,
  check_integer,
  check_number,
  check_types,
  problem_of_type,
  problems_of,
  raise_problems,
)
from latent_deliberation.model.products import DTYPES, INT8_DTYPES
from latent_deliberation.model.transformer import ATTENTIONS, REMAT_POLICIES
from latent_deliberation.model.transformer_config import TransformerConfig
from latent_deliberation.sharding import DEFAULT_RULES, MeshConfig, check_rules
from latent_deliberation.training.loop import LoopConfig
from latent_deliberation.training.metrics import AUTO, parse_trackers
from latent_deliberation.training.optimizer import OptimizerConfig
from latent_deliberation.training.profiling import parse_range

CPU_INFO = Path('/proc/cpuinfo')
FAST_BFLOAT16 = {'amx_bf16', 'avx512_bf16'}  # instruction sets of CPUs
FROZEN_DTYPES = (*DTYPES, *INT8_DTYPES)
LAST_SEED = 2**30 - 2  # of an experiment; the order of its rows takes twice as much


@dataclasses.dataclass(frozen=True)
class Computation:
  """How the same mathematics is computed: precision, memory and kernels.

  Attributes:
    dtype: dtype of matrix products: 'float32', 'bfloat16' or 'auto'.
      'auto' is bfloat16 on TPUs, GPUs, and CPUs with instructions for it (AMX, AVX-512-BF16). A run
      that began with one of the two is resumed with the same.
    activations: dtype of the activations between products: 'float32', 'bfloat16' or 'auto'.
      'auto' is `dtype`, and float32 on CPUs, which emulate bfloat16 outside of products.
    frozen_dtype: dtype that the frozen decoder's weights are kept in, also 'int8' or 'w8a8'.
      'int8' has a float32 scale for each output channel, and keeps norms as stored. Trainable
      parameters are always float32, and start from weights that were not rounded to int8. 'w8a8'
      is for TPUs (v5e, v5p, v6e), which multiply int8 up to twice as fast. It also rounds, token by
      token, the activations that are multiplied with these weights, and their gradients.
    remat: activations of a block that the backward pass keeps: 'none' keeps all, 'full' nothing.
      Rematerialisation computes the others again. REMAT_POLICIES lists all values. For unrolled
      layers on a CPU 'full' saves nothing, since XLA computes the others too early.
    scan: loop over stacked layers, which compiles fast at any depth; otherwise unroll them.
      Unrolled layers run faster on a CPU.
    loss_chunk: number of targets of a text whose logits exist at the same time.
    attention: implementation of attention: 'plain', 'fused' or 'auto'.
      'fused' uses kernels for TPUs and NVIDIA GPUs that keep no scores in memory. On TPUs they also
      rotate heads by their positions in one pass. 'auto' is 'fused' on TPUs and 'plain' elsewhere,
      since our kernels have not run on a GPU yet.
    replicate_frozen: keep the frozen weights whole on every device, but for the axis 'tensor'.
      Otherwise each pass gathers them from the shards of 'fsdp', one layer at a time.
  """
  dtype: str = 'float32'
  activations: str = 'auto'
  frozen_dtype: str = 'float32'
  remat: str = 'none'
  scan: bool = True
  loss_chunk: int = 256
  attention: str = 'plain'
  replicate_frozen: bool = False

  def __post_init__(self):
    check_types(self)
    raise_problems(self._problems())

  def _problems(self) -> Iterator[str]:
    for name, known in (('dtype', (*DTYPES, 'auto')), ('activations', (*DTYPES, 'auto')),
                        ('frozen_dtype', FROZEN_DTYPES), ('remat', sorted(REMAT_POLICIES)),
                        ('attention', sorted((*ATTENTIONS, 'auto')))):
      if getattr(self, name) not in known:
        yield f'computation.{name} = {getattr(self, name)!r}: it must be one of {known}'
    if self.loss_chunk < 1:
      yield f'computation.loss_chunk = {self.loss_chunk}: it must be 1 or more'

  def on(self, platform: str) -> 'Computation':
    """Returns a copy with every 'auto' resolved for a platform ('tpu', 'gpu' or 'cpu')."""
    dtype, activations, attention = self.dtype, self.activations, self.attention
    if dtype == 'auto':
      dtype = 'bfloat16' if platform != 'cpu' or _has_fast_bfloat16() else 'float32'
    if attention == 'auto':
      attention = 'fused' if platform == 'tpu' else 'plain'
    if activations == 'auto':
      activations = 'float32' if platform == 'cpu' and attention == 'plain' else dtype
    return dataclasses.replace(self, dtype=dtype, activations=activations, attention=attention)


def _has_fast_bfloat16() -> bool:
  """Whether this machine's CPU has instructions for products of bfloat16; known on Linux only."""
  try:
    flags = set(CPU_INFO.read_text().split())
  except OSError:
    return False
  return bool(flags & FAST_BFLOAT16)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """One training run.

  Attributes:
    batch_size: B, number of packed rows in a global batch.
    optimizer: optimizer and schedule; see OptimizerConfig.
    loop: length and cadences; see LoopConfig.
    accumulation: number of microbatches that a batch is split into, one after the other.
    multipliers: factors on learning rates, by top-level key of the trainable parameters.
      A key that the parameters lack (such as 'gate' with 'paper' latents) has no effect.
    row_range_percent: range of the packed training rows that are read, in percent.
      (0, 50) for pretraining and (50, 100) for training give the coprocessor text that the decoder
      has not read.
    profile: steps to profile, START:END for START up to END - 1; '' for none.
      The trace is in <workdir>/profile, for xprof.
    trackers: where metrics go besides metrics.jsonl: 'tensorboard', 'wandb', or both with a comma.
      'auto' is TensorBoard where tensorboardX is installed, and '' is none.
  """
  batch_size: int
  optimizer: OptimizerConfig
  loop: LoopConfig
  accumulation: int = 1
  multipliers: Mapping[str, float] = dataclasses.field(default_factory=dict)
  row_range_percent: tuple[int, int] = ALL_ROWS
  profile: str = ''
  trackers: str = AUTO

  def __post_init__(self):
    object.__setattr__(self, 'row_range_percent', check_row_range(self.row_range_percent))
    check_types(self)
    raise_problems(self.problems_in(vars(self)))

  @staticmethod
  def problems_in(values: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong with the keys of a run; one that could not be made is absent."""
    for name in ('batch_size', 'accumulation'):
      yield from problems_of(check_integer, name, values.get(name, 1), 1)
    for name, factor in values.get('multipliers', {}).items():
      yield from problems_of(check_number, f'multipliers.{name}', factor, 0)
    if 'loop' in values:
      yield from problems_of(parse_range, values.get('profile', ''), values['loop'].num_steps)
    yield from problems_of(parse_trackers, values.get('trackers', AUTO))


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """How a decoder and a coprocessor are scored on held-out text.

  Attributes:
    num_texts: number of packed validation rows that the report scores; it counts rows, not texts.
      There are fewer texts than rows where `rows_per_text` is above 1.
    batch_size: number of rows that are scored at a time.
    num_traces: M, number of traces of a row.
    num_ahead: number of ahead positions that are scored; may exceed the training's.
    positions: ahead positions that the report's table shows, counted from 1.
    eval_batches: number of batches that training evaluates every eval_every steps.
    bootstrap_samples: number of bootstrap resamplings for each interval.
    rows_per_text: number of consecutive packed rows that count as one text in a resampling.
      Rows of one document are not independent. The report shows intervals for 20 texts or more.
    delay: number of ahead tokens that the report reads before latents join the cache.
    tasks: benchmarks that training scores every eval_every steps; see docs/benchmarks.md.
    task_data: directory with the data of these tasks.
    task_items: number of items of each task, the first ones.
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
  tasks: tuple[str, ...] = ()
  task_data: str = ''
  task_items: int = 100

  def __post_init__(self):
    check_types(self)
    for name in ('positions', 'tasks'):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    raise_problems(self._problems())

  def _problems(self) -> Iterator[str]:
    # Positions index the scored ahead tokens, in the order of the table.
    increasing = list(self.positions) == sorted(set(self.positions))
    if not self.positions or not increasing or not (
        1 <= self.positions[0] <= self.positions[-1] <= self.num_ahead):
      yield (f'evaluation.positions = {self.positions}: they must increase, from 1 or more to at '
             f'most num_ahead = {self.num_ahead}')
    if self.batch_size < 2:
      yield (f'evaluation.batch_size = {self.batch_size}: it must be 2 or more, since one control '
             'takes the latents of another text of the batch')
    # All batches have one shape, so the program is compiled once.
    elif self.num_texts < self.batch_size or self.num_texts % self.batch_size:
      yield (f'evaluation.num_texts = {self.num_texts} is not a multiple of batch_size = '
             f'{self.batch_size}, both in rows: change one of the two')
    if not 0 <= self.delay < self.num_ahead:
      yield (f'evaluation.delay = {self.delay}: it must be between 0 and num_ahead - 1 = '
             f'{self.num_ahead - 1}')
    for name in ('num_traces', 'eval_batches', 'bootstrap_samples', 'rows_per_text', 'task_items'):
      if getattr(self, name) < 1:
        yield f'evaluation.{name} = {getattr(self, name)}: it must be 1 or more'


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The whole configuration of a run, except for its directories. See configs/quickstart.py.

  Attributes:
    decoder: architecture of the decoder; see TransformerConfig.
      With `decoder_from` it is that of the decoder there.
    data: text, vocabulary and rows; see DataConfig.
    pretraining: training run of the decoder; see TrainingConfig.
    deliberation: latents and coprocessor; see DeliberationConfig.
    training: training run of the coprocessor; see TrainingConfig.
    evaluation: scores of the report and during training; see EvaluationConfig.
    computation: dtypes, memory and kernels; see Computation.
    mesh: number of devices along each mesh axis; see MeshConfig.
    rules: mesh axes that each logical axis of a tensor is split over.
    seed: seed of parameters, traces and the order of training rows.
    decoder_from: decoder that exists already: a directory, a GGUF file or a name; '' pretrains one.
      Its vocabulary is used too, unless `data` has a vocabulary_path. The flag --decoder sets it.
    coprocessor_from: trained coprocessor that a new one starts as; '' starts anew.
      It is the coprocessor/ of a run, the work directory of that run, or the package of an expert,
      with the latents of this config. Constant soft tokens, the control, start anew.
  """
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
  decoder_from: str = ''
  coprocessor_from: str = ''

  def __post_init__(self):
    check_types(self)
    object.__setattr__(self, 'rules', check_rules(self.rules))
    raise_problems(self.problems_in(vars(self)))

  @property
  def start(self) -> str:
    """The coprocessor that training starts from; '' for none. Constant soft tokens start anew."""
    return '' if self.deliberation.trainable == 'constant' else self.coprocessor_from

  @staticmethod
  def problems_in(values: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong between the values; what needs one that is absent is not checked."""
    yield from problems_of(lambda: check_integer('seed', values.get('seed', 0), 0, LAST_SEED))
    for section, parts in (('pretraining', ('embedder', 'transformer')), ('training', PARTS)):
      if section not in values:
        continue
      unknown = sorted(set(values[section].multipliers) - set(parts))
      if unknown:
        yield (f'{section}.multipliers names {unknown}: the trainable parameters are among '
               f'{parts}')
      # A stream has no rows to take a range of.
      percent = values[section].row_range_percent
      if 'data' in values and values['data'].mode == 'online' and percent != ALL_ROWS:
        yield (f'{section}.row_range_percent = {percent}, but a stream has no rows to count '
               f"(data.mode = 'online'): set it to {ALL_ROWS}, or set data.mode = 'packed'")
    # The fused kernels keep all traces of a text in one row.
    rules = values.get('rules', {})
    for axis in ('trace', 'length'):
      if 'computation' in values and values['computation'].attention != 'plain' and (
          rules.get(axis)):
        yield (f'rule {axis!r} -> {rules[axis]} with computation.attention = '
               f'{values["computation"].attention!r}: the fused kernels do not divide this axis. '
               "Leave the rule out, or set attention = 'plain'")
    yield from _problems_of_trunks(values)


def _problems_of_trunks(sections: Mapping[str, Any]) -> Iterator[str]:
  """Yields where a trunk cannot hold the traces of training, or those of the evaluation."""
  if not {'deliberation', 'data'} <= set(sections):
    return
  deliberation, length = sections['deliberation'], sections['data'].length
  yield from (f'deliberation.{problem}'
              for problem in problems_of(lambda: deliberation.check_trunk(length)))
  if 'evaluation' in sections:
    scored = sections['evaluation']
    traces = deliberation.with_traces(scored.num_traces, scored.num_ahead)
    yield from (f'evaluation.{problem}'
                for problem in problems_of(lambda: traces.check_trunk(length)))


def as_config(experiment: Any) -> ConfigDict:
  """Returns an experiment, or a study, as a locked ConfigDict that flags can override.

  Args:
    experiment: the dataclass, or nested dicts of its values.
  """

  def fill(tree: Mapping[str, Any]) -> ConfigDict:
    # A flag cannot override a bare None; all our optional values are floats. Keys keep their
    # order, since a report lists a study's arms in it.
    return ConfigDict({key: fill(value) if isinstance(value, Mapping)
                       else config_dict.placeholder(float) if value is None
                       else tuple(value) if isinstance(value, list) else value  # as read from JSON
                       for key, value in tree.items()}, sort_keys=False)

  tree = dataclasses.asdict(experiment) if dataclasses.is_dataclass(experiment) else experiment
  return fill(tree).lock()


def defaults_of(kind: type) -> dict[str, Any]:
  """Returns the defaults of a dataclass as nested dicts, without the keys that have none."""
  defaults = {}
  for field in dataclasses.fields(kind):
    if field.default is not dataclasses.MISSING:
      # A section as a default is given by all its values.
      value = field.default
      defaults[field.name] = (
          dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value)
    elif field.default_factory is not dataclasses.MISSING:
      defaults[field.name] = field.default_factory()
    elif dataclasses.is_dataclass(field.type):
      defaults[field.name] = defaults_of(field.type)
  return defaults


def keys_of(kind: type, path: str = '') -> Iterator[str]:
  """Yields the dotted path of every section and key of a dataclass."""
  for field in dataclasses.fields(kind):
    inside = f'{path}.{field.name}' if path else field.name
    yield inside
    if dataclasses.is_dataclass(field.type):
      yield from keys_of(field.type, inside)


def nearest_key(key: str, known: Collection[str]) -> str:
  """Returns the known dotted path that a misspelt one is most like, or '' if it is like none."""
  def ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()

  def likeness(candidate: str) -> tuple[float, float]:
    # The name decides, where 'steps' may stand for 'num_steps'. Sections decide between names.
    (*place, name), (*other_place, other) = key.split('.'), candidate.split('.')
    named = max(ratio(name, part) for part in (other, *other.split('_')))
    return named, named + 0.2 * ratio(name, other) + 0.3 * ratio(
        '.'.join(place), '.'.join(other_place))

  near = [candidate for candidate in known if likeness(candidate)[0] >= 0.6]
  return max(near, key=lambda candidate: likeness(candidate)[1], default='')


def bind(config: Mapping[str, Any], kind: type = Experiment, where: str = 'config') -> Any:
  """Makes a frozen dataclass of `kind` from a nested mapping such as a ConfigDict.

  Args:
    config: the values.
    kind: the dataclass.
    where: dotted path of `config`, for error messages.

  Raises:
    UserError: keys are unknown or missing, or values are not allowed. The message has a line for
      each, in all sections. It names the key by its dotted path, and suggests the nearest known
      key.
  """
  problems: list[str] = []
  bound = _bind(config, kind, '', where, tuple(keys_of(kind)), problems)
  raise_problems(problems)
  return bound


def _bind(config: Mapping[str, Any], kind: type, path: str, where: str, known: Collection[str],
          problems: list[str]) -> Any:
  """Returns `kind` bound, or appends to `problems` and returns None.

  Args:
    config: the values.
    kind: the dataclass.
    path: dotted path of `config` inside the outermost one; '' for that one.
    where: path of the outermost one, for error messages.
    known: all keys of the outermost dataclass.
    problems: messages of what is wrong; more are appended.
  """
  fields, before = {field.name: field for field in dataclasses.fields(kind)}, len(problems)
  place = f'{where}.{path}' if path else where
  for key in config:
    # A misspelt key must not fall back to a default silently.
    if key not in fields:
      near = nearest_key(f'{path}.{key}' if path else key, known)
      hint = f'did you mean {near!r}?' if near else f'known keys: {sorted(fields)}'
      problems.append(f'{place}.{key} is not a key of this project: {hint}')
  missing = sorted(name for name, field in fields.items() if name not in config
                   and field.default is dataclasses.MISSING
                   and field.default_factory is dataclasses.MISSING)
  if missing:
    problems.append(f'{place} has no {missing}: give a value, as configs/quickstart.py does')
  # Sections become dataclasses themselves, other mappings plain dicts.
  values = {}
  for key in (key for key in config if key in fields):
    value, field = config[key], fields[key]
    if dataclasses.is_dataclass(field.type):
      value = _bind(value, field.type, f'{path}.{key}' if path else key, where, known, problems)
      if value is None:
        continue
    elif isinstance(value, Mapping) or hasattr(value, 'to_dict'):
      value = {name: value[name] for name in value}
    values[key] = value
  # What is whole is also checked where a section is not.
  if len(problems) > before:
    wrong = {key: problem_of_type(key, value, fields[key].type) for key, value in values.items()}
    found = list(filter(None, wrong.values()))
    if hasattr(kind, 'problems_in'):
      found += kind.problems_in({key: values[key] for key in values if not wrong[key]})
    problems += [_placed(problem, place, fields) for problem in found]
    return None
  try:
    return kind(**values)
  except UserError as error:
    problems += [_placed(problem, place, fields) for problem in str(error).splitlines()]
    return None


def _placed(problem: str, place: str, keys: Collection[str]) -> str:
  """Returns a message with the place of its section, as one path where it begins with a key."""
  problem = problem.removeprefix(f'{place.rpartition(".")[2]}.')
  is_key = re.split('[ .]', problem, maxsplit=1)[0] in keys
  return f'{place}{"." if is_key else ": "}{problem}'
