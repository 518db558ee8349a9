"""A study as typed values: one experiment, and arms that each change it, over several seeds.

To add a study, write a config file with a Study in configs/study/; docs/studies.md shows how. A new
kind of question also needs a task in studies/synthetic/.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from latent_deliberation.errors import UserError, check_integer, check_types, raise_problems
from latent_deliberation.evaluation.perplexity import CHAIN, CONTROLS, FROZEN, OWN
from latent_deliberation.experiment import LAST_SEED, Experiment, bind
from latent_deliberation.model.products import INT8_DTYPES
from latent_deliberation.studies.synthetic.documents import build
from latent_deliberation.studies.tune import TUNINGS

LATENT_ARM = 'latents'  # ArmConfig.learns of an arm that trains latents for the frozen decoder
# Sections of the experiment that no arm may change.
SHARED = ('decoder', 'data', 'computation', 'pretraining', 'evaluation', 'mesh', 'rules', 'seed',
          'decoder_from')


@dataclasses.dataclass(frozen=True)
class ArmConfig:
  """The training of one arm.

  Attributes:
    learns: 'latents' trains a coprocessor or constant soft tokens for the frozen decoder, as
      deliberation.trainable says. 'joint', 'finetuned' and 'lora' tune the decoder itself; see
      studies/tune.py.
    changes: changes to the study's experiment, nested: {'deliberation': {'num_latents': 4}}.
  """
  learns: str = LATENT_ARM
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    check_types(self)
    object.__setattr__(self, 'changes', _merged({}, self.changes))
    if self.learns not in (LATENT_ARM, *TUNINGS):
      raise UserError(f'learns = {self.learns!r}: choose one of {(LATENT_ARM, *TUNINGS)}')


@dataclasses.dataclass(frozen=True)
class QuestionsConfig:
  """The questions that every arm answers; they need data.source = 'synthetic'.

  Attributes:
    per_difficulty: number of questions of each difficulty, each with its own context. A file may
      have fewer. 0 makes a study on text, which is scored by ahead position.
    batch_size: questions at a time.
    seed: seed of the questions; it is independent of the training text.
    offline: put latents after the context, before the question is known.
    options: options of the synthetic task in which the questions differ from the text, such as
      {'asked': 'test.txt'}.
    chain_tokens: tokens that the frozen decoder may write before it answers, in an arm called
      'chain'. 0 leaves the arm out. Only the task 'word_problems' teaches chains.
  """
  per_difficulty: int = 0
  batch_size: int = 250
  seed: int = 1_000_000_007
  offline: bool = False
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  chain_tokens: int = 0

  def __post_init__(self):
    check_types(self)
    object.__setattr__(self, 'options', dict(self.options))
    least = {'per_difficulty': 0, 'batch_size': 2, 'seed': 0, 'chain_tokens': 0}
    raise_problems(f'questions.{name} = {getattr(self, name)}: it must be {number} or more'
                   for name, number in least.items() if getattr(self, name) < number)


@dataclasses.dataclass(frozen=True)
class Study:
  """A study: one frozen decoder, and arms that are compared with it.

  Attributes:
    name: title of the report.
    experiment: starting point of every arm; its decoder is pretrained once, with its seed, unless
      `decoder_from` names one that exists.
    arms: trained arms by name. The controls of the arm 'own' are called 'shuffled', 'zero' and
      'mean'; the controls of any other arm NAME are called 'NAME/shuffled' and so on.
    seeds: seeds of the arms; each gives another initialisation, other traces and another order of
      text.
    questions: questions that every arm answers; see QuestionsConfig.
    arm_data_options: options of the synthetic task in which the text of the arms differs from the
      decoder's text, such as {'skew': 0.0} for hard questions as often as easy ones. They are the
      same for every arm, and do not change the questions. An arm may read a part of this text
      alone, by the change training.row_range_percent.
  """
  name: str
  experiment: Experiment
  arms: Mapping[str, ArmConfig]
  seeds: tuple[int, ...] = (0, 1, 2)
  questions: QuestionsConfig = QuestionsConfig()
  arm_data_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    # 'own' comes first in every report.
    object.__setattr__(self, 'arms', {
        name: arm if isinstance(arm, ArmConfig) else bind(arm, ArmConfig, f'arms.{name}')
        for name, arm in sorted(self.arms.items(), key=lambda item: item[0] != OWN)})
    check_types(self)
    object.__setattr__(self, 'seeds', tuple(self.seeds))
    for seed in self.seeds:
      check_integer('seeds', seed, 0, LAST_SEED)
    object.__setattr__(self, 'arm_data_options', dict(self.arm_data_options))
    if not self.seeds or len(set(self.seeds)) < len(self.seeds):
      raise UserError(f'seeds = {self.seeds}: give one or more, all different')
    # Questions and their options need a synthetic task.
    if self.questions.per_difficulty and self.experiment.data.source != 'synthetic':
      raise UserError(f'questions.per_difficulty = {self.questions.per_difficulty}, but '
                      f'data.source = {self.experiment.data.source!r} has no questions. Set 0, or '
                      "choose 'synthetic'.")
    self._check_options('arm_data_options', self.arm_data_options)
    self._check_options('questions.options', self.questions.options)
    # Chains need a task that teaches them, text that holds some, and weights to generate with.
    asked, name = self.questions, self.experiment.data.name
    if asked.chain_tokens and not (asked.per_difficulty and name == 'word_problems'):
      raise UserError(f'questions.chain_tokens = {asked.chain_tokens}, but data.name = {name!r} '
                      f'and questions.per_difficulty = {asked.per_difficulty}. Chains are for '
                      "questions of the task 'word_problems'. Set 0.")
    if asked.chain_tokens and not build(name, self.experiment.data.options).chains:
      raise UserError(f'questions.chain_tokens = {asked.chain_tokens}, but data.options.chains = '
                      '0: the decoder reads no chain. Raise the second, or set the first to 0.')
    frozen_dtype = self.experiment.computation.frozen_dtype
    if asked.chain_tokens and frozen_dtype in INT8_DTYPES:
      raise UserError(f'questions.chain_tokens = {asked.chain_tokens}, but '
                      f'computation.frozen_dtype = {frozen_dtype!r}: generation takes no int8 '
                      'weights. Change one of them.')
    # A name becomes a directory, and a prefix of the names of controls.
    reserved = {FROZEN, CHAIN, *CONTROLS} & set(self.arms)
    if not self.arms or reserved or any('/' in name or not name for name in self.arms):
      raise UserError(f'arms = {sorted(self.arms)}: give at least one. A name must not be empty, '
                      f'contain a slash or be one of {(FROZEN, CHAIN, *CONTROLS)}.')
    # Binding every arm finds a wrong change before any long work.
    for name in self.arms:
      self.variant(name, self.seeds[0])

  def _check_options(self, key: str, options: Mapping[str, Any]) -> None:
    data = self.experiment.data
    if not options:
      return
    if data.source != 'synthetic':
      raise UserError(f'{key} = {options}, but data.source = {data.source!r} has no options. Leave '
                      "them out, or choose 'synthetic'.")
    try:
      build(data.name, {**data.options, **options})
    except UserError as error:
      raise UserError(f'{key} = {options}: {error}') from error

  def variant(self, arm: str, seed: int) -> Experiment:
    """Returns the experiment of one arm with one seed, on the text of `arm_data_options`.

    Raises:
      UserError: a change names an unknown key, has a value that is not allowed, or is of a section
        that all arms share.
    """
    changes = self.arms[arm].changes
    shared = sorted(set(changes) & set(SHARED))
    if shared:
      raise UserError(f'arms.{arm}.changes has {shared}, which must be the same in every arm. '
                      "Change the study's experiment.")
    # Bound again, so that the changed values are checked.
    config = _merged(dataclasses.asdict(self.experiment), changes)
    config['data']['options'] |= self.arm_data_options
    return dataclasses.replace(bind(config, where=f'arms.{arm}'), seed=seed)


def _merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
  """Returns plain dicts of the tree with the changes applied, which may be ConfigDicts."""
  merged = dict(tree)
  for key in changes:
    change, old = changes[key], tree[key] if key in tree else {}
    merged[key] = _merged(old, change) if hasattr(change, 'items') else change
  return merged
