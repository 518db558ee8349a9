"""What a study is scored on has room for the latents of all its arms."""

import jax
import pytest

from latent_deliberation.errors import UserError
from latent_deliberation.sharding import make_mesh
from latent_deliberation.studies.scoring import check_same_signs, open_scorer
from latent_deliberation.studies.study_config import ArmConfig
from tests import tiny
from tests.studies.tiny_study import study


@pytest.mark.parametrize('latents, count', [('anchored', 20), ('refining', 12)])
def test_latents_have_room_behind_a_question_or_in_its_tokens(tmp_path, latents, count):
  measured(tmp_path, latents, count)


def test_more_refining_latents_than_the_shortest_question_has_tokens_are_refused(tmp_path):
  with pytest.raises(UserError, match='arms.wide: 13 refining .* shortest question has 12'):
    measured(tmp_path, 'refining', 13)


def test_text_is_scored_behind_the_same_signs_in_every_arm():
  choices = {name: tiny.deliberator(anchor_tokens=signs).config
             for name, signs in (('one', (3,)), ('other', (3, 4)))}
  with pytest.raises(UserError, match=r'arms.other has anchor_tokens = \(3, 4\), arms.one \(3,\)'):
    check_same_signs(choices)
  check_same_signs({'one': choices['one']})


def measured(data, latents, num_latents):
  """The scorer of a study on questions of 12 tokens."""
  wide = ArmConfig(changes={'deliberation': {'latents': latents, 'num_latents': num_latents}})
  asked = study({'wide': wide})
  return open_scorer(asked, data, make_mesh(asked.experiment.mesh, jax.devices()[:1]))
