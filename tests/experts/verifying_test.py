"""A package is verified whatever the size of its latents."""

import pytest

from latent_deliberation.experts.package import write_package
from latent_deliberation.experts.verifying import verify
from tests.experts import small


@pytest.mark.parametrize('number', [3, 60])
def test_prompts_have_room_for_the_latents(tmp_path, number):
  card = small.card(latents={**small.card().latents, 'number': number})
  write_package(tmp_path / 'stars', card, small.lora(1, num_latents=number))
  checks = list(verify(tmp_path / 'stars', small.decoder()))
  assert [check.passed for check in checks] == [True] * len(checks), '\n'.join(map(str, checks))
