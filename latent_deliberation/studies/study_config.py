"""A study as typed values: arms, each with a change of one experiment, over several seeds."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.perplexity import BASELINE, CONTROLS, OWN
from latent_deliberation.experiment import Experiment, bind
from latent_deliberation.studies.synthetic.documents import build
from latent_deliberation.studies.tune import TUNINGS

LATENTS = 'latents'
CHAIN = 'chain'  # the frozen decoder, answering behind a chain that it has written itself
SHARED = ('decoder', 'data', 'computation', 'pretraining', 'evaluation', 'mesh', 'rules', 'seed')


@dataclasses.dataclass(frozen=True)
class ArmConfig:
  """What one arm trains.

  Attributes:
    learns: 'latents' of a frozen decoder (a coprocessor, or constant soft tokens: see
      deliberation.trainable), or a way to tune the decoder itself: 'joint', 'finetuned' or
      'lora' (see studies/tune.py).
    changes: of the study's experiment, as nested mappings: {'deliberation': {'num_latents': 4}}.
  """
  learns: str = LATENTS
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    object.__setattr__(self, 'changes', _merged({}, self.changes))
    if self.learns not in (LATENTS, *TUNINGS):
      raise UserError(f'learns = {self.learns!r}: must be one of {(LATENTS, *TUNINGS)}')


@dataclasses.dataclass(frozen=True)
class QuestionsConfig:
  """What is asked of every arm; only where data.source is 'synthetic'.

  Attributes:
    per_difficulty: questions of each difficulty, about a context each (a file may have fewer); 0
      for a study on text, which is scored by ahead position as `evaluation` says.
    batch_size: questions at a time.
    seed: of the questions, which are drawn apart from the training text.
    offline: latents come behind the context, before the question is known.
    options: of the synthetic task, where what is asked differs from the text, such as
      {'asked': 'test.txt'}.
    chain_tokens: tokens that the frozen decoder may write before it answers, in an arm of its own
      called 'chain'; 0 for no such arm. Only the task 'word_problems' teaches chains.
  """
  per_difficulty: int = 0
  batch_size: int = 250
  seed: int = 1_000_000_007
  offline: bool = False
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  chain_tokens: int = 0

  def __post_init__(self):
    object.__setattr__(self, 'options', dict(self.options))
    for name, least in (('per_difficulty', 0), ('batch_size', 2), ('seed', 0),
                        ('chain_tokens', 0)):
      if getattr(self, name) < least:
        raise UserError(f'{name} = {getattr(self, name)}: at least {least} is needed')


@dataclasses.dataclass(frozen=True)
class Study:
  """Attributes:
    name: of the report.
    experiment: what every arm starts from; its decoder is pretrained once, with its seed.
    arms: what is trained beside the frozen decoder, by name. Of an arm called 'own' the controls
      are called 'shuffled', 'zero' and 'mean', of any other NAME 'NAME/shuffled' and so on.
    seeds: of what the arms train; each has its own initialisation, traces and order of text.
    questions: see QuestionsConfig.
    arm_data_options: options of the synthetic task by which the text that arms train on differs from the
      decoder's, such as {'skew': 0.0} for hard questions as often as easy ones. The same for every
      arm (which part of those rows an arm reads may be its change, training.row_range_percent); what is asked
      in the end does not depend on it.
  """
  name: str
  experiment: Experiment
  arms: Mapping[str, ArmConfig]
  seeds: tuple[int, ...] = (0, 1, 2)
  questions: QuestionsConfig = QuestionsConfig()
  arm_data_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    object.__setattr__(self, 'seeds', tuple(self.seeds))
    object.__setattr__(self, 'arm_data_options', dict(self.arm_data_options))
    if not self.seeds or len(set(self.seeds)) < len(self.seeds):
      raise UserError(f'seeds = {self.seeds}: give one or more, all different')
    if self.questions.per_difficulty and self.experiment.data.source != 'synthetic':
      raise UserError(f'questions.per_difficulty = {self.questions.per_difficulty}, but '
                       f'data.source = {self.experiment.data.source!r} asks no questions: set 0, '
                       "or choose 'synthetic'")
    self._check_options('arm_data_options', self.arm_data_options)
    self._check_options('questions.options', self.questions.options)
    asked, name = self.questions, self.experiment.data.name
    if asked.chain_tokens and not (asked.per_difficulty and name == 'word_problems'):
      raise UserError(f'questions.chain_tokens = {asked.chain_tokens}, but chains are for '
                       f"questions of the task 'word_problems', and here data.name = {name!r} and "
                       f'questions.per_difficulty = {asked.per_difficulty}: set 0')
    if asked.chain_tokens and not build(name, self.experiment.data.options).chains:
      raise UserError(f'questions.chain_tokens = {asked.chain_tokens}, but with '
                       'data.options.chains = 0 the decoder reads no chain: raise it, or set '
                       'questions.chain_tokens to 0')
    if asked.chain_tokens and self.experiment.computation.frozen_dtype == 'int8':
      raise UserError(f'questions.chain_tokens = {asked.chain_tokens}, but generation takes no '
                       "weights of computation.frozen_dtype = 'int8': set one of them otherwise")
    reserved = {BASELINE, CHAIN, *CONTROLS} & set(self.arms)
    if not self.arms or reserved or any('/' in name or not name for name in self.arms):
      raise UserError(f'arms are called {sorted(self.arms)}: there must be one, none without a '
                       f'name or with a slash in it, and none of {(BASELINE, CHAIN, *CONTROLS)}')
    object.__setattr__(self, 'arms', {
        name: arm if isinstance(arm, ArmConfig) else bind(arm, ArmConfig, f'arms.{name}')
        for name, arm in sorted(self.arms.items(), key=lambda item: item[0] != OWN)})
    for name in self.arms:
      self.variant(name, self.seeds[0])

  def _check_options(self, key: str, options: Mapping[str, Any]) -> None:
    data = self.experiment.data
    if not options:
      return
    if data.source != 'synthetic':
      raise UserError(f'{key} = {options}, but data.source = {data.source!r} has no options: '
                       "leave them out, or choose 'synthetic'")
    try:
      build(data.name, {**data.options, **options})
    except UserError as error:
      raise UserError(f'{key} = {options}: {error}') from error

  def variant(self, arm: str, seed: int) -> Experiment:
    """The experiment of one arm with one seed, on the text of `arm_data_options`.

    Raises:
      UserError: a change names what is not there, is not allowed, or would give the arm another
        decoder or other packed rows than the others have.
    """
    changes = self.arms[arm].changes
    shared = sorted(set(changes) & set(SHARED))
    if shared:
      raise UserError(f'arms.{arm}.changes: {shared} must be the same in every arm; change the '
                       "study's experiment")
    config = _merged(dataclasses.asdict(self.experiment), changes)
    config['data']['options'] |= self.arm_data_options
    return dataclasses.replace(bind(config, where=f'arms.{arm}'), seed=seed)


def _merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
  """Plain dicts of the tree with the changes, which may be ConfigDicts, in the place of its own."""
  merged = dict(tree)
  for key in changes:
    change, old = changes[key], tree[key] if key in tree else {}
    merged[key] = _merged(old, change) if hasattr(change, 'items') else change
  return merged
