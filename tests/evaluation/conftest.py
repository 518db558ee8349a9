"""Fixtures of the tests of benchmarks: made-up documents, and a decoder with its coprocessor."""

from pathlib import Path

import pytest

from latent_deliberation.evaluation.arm_model import ArmModel
from latent_deliberation.evaluation.found_arm_model import open_arm_model
from tests.evaluation import task_examples


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A directory of local data."""
  return task_examples.write(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def model(quickstart: Path, module_on_one_device: None) -> ArmModel:
  """The quickstart's decoder, its coprocessor and its constant soft tokens, on one device."""
  return open_arm_model(quickstart / 'pretraining/decoder', quickstart / 'coprocessor',
                        quickstart / 'constant', max_length=512)
