"""A study for tests: two steps of every arm, on a mesh of one device."""

import dataclasses
from types import MappingProxyType

from latent_deliberation.data.data_config import DataConfig, encode_bytes
from latent_deliberation.experiment import as_config, bind
from latent_deliberation.studies.study_config import ArmConfig, QuestionsConfig, Study
from tests import finished

CONSTANT = {'deliberation': {'trainable': 'constant'}}
ADAPTERS = {'deliberation': {'trainable': 'lora', 'lora_rank': 2}}
ARMS = {'own': ArmConfig(), 'constant': ArmConfig(changes=CONSTANT),
        'joint': ArmConfig('joint', CONSTANT), 'finetuned': ArmConfig('finetuned'),
        'lora': ArmConfig('lora', ADAPTERS)}
DATA = DataConfig(
    source='synthetic', name='pointer_chasing', options={'nodes': 4, 'hops': 3}, documents=100,
    questions=6, vocabulary='byte', length=29, validation_percent=20)


def study(arms=ARMS, seeds=(0,), per_difficulty=3, data=DATA,
          arm_data_options=MappingProxyType({})):
  """The study with some arms and seeds; on text where there are no questions."""
  config = finished.config_of('tiny')
  config.update_from_flattened_dict({
      'training.loop.num_steps': 2, 'pretraining.loop.num_steps': 2, 'evaluation.num_texts': 16,
      'evaluation.num_ahead': 2, 'evaluation.positions': (1, 2), 'deliberation.num_latents': 1,
      'evaluation.bootstrap_samples': 100, 'deliberation.num_ahead': 2,
      'deliberation.num_traces': 6})
  experiment = dataclasses.replace(bind(config), data=data)
  anchors = dataclasses.replace(
      experiment.deliberation, anchor_tokens=tuple(encode_bytes('ABCD')))
  return Study(name='test', experiment=dataclasses.replace(experiment, deliberation=anchors),
               arms=arms, seeds=seeds, arm_data_options=arm_data_options,
               questions=QuestionsConfig(per_difficulty=per_difficulty, batch_size=4))


def word_problems():
  """A study of generated stories, in pieces of a vocabulary that is trained, with a chain arm."""
  start = study({'own': ARMS['own']})
  experiment = dataclasses.replace(
      start.experiment,
      decoder=dataclasses.replace(start.experiment.decoder, vocab_size=400),
      data=DataConfig(
          source='synthetic', name='word_problems', options={'stories': 1.0, 'steps': 2},
          documents=400, questions=1, vocabulary_size=400, length=48, validation_percent=30),
      deliberation=dataclasses.replace(start.experiment.deliberation, anchor_tokens=(4,)))
  return dataclasses.replace(
      start, experiment=experiment, arm_data_options={'chains': 0.0},
      questions=dataclasses.replace(start.questions, chain_tokens=12))


def get_config(which='all'):
  """'all' arms, 'own' alone, an arm on 'arm_data_options', or 'word_problems'."""
  if which == 'word_problems':
    return as_config(word_problems())
  if which == 'arm_data_options':
    return as_config(study({'taught': ArmConfig()}, arm_data_options={'skew': 2.0}))
  return as_config(study({'all': ARMS, 'own': {'own': ARMS['own']}}[which]))
