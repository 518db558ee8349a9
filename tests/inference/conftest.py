"""The engine with a coprocessor that most of these tests share."""

import pytest

from latent_deliberation.array_types import Params
from latent_deliberation.deliberation.forward import Deliberator
from latent_deliberation.inference.background import AugmentationStats
from latent_deliberation.inference.engine import Engine
from tests.inference.small import augmented


@pytest.fixture(scope='session')
def made(decoder_params) -> tuple[Engine, Deliberator, Params]:
  """An engine with refining latents, and the same as training knows it."""
  return augmented(decoder_params)


@pytest.fixture
def engine(made) -> Engine:
  """The engine of `made`, which has counted nothing and warned of nothing."""
  made[0].stats, made[0]._warned = AugmentationStats(), False
  return made[0]
