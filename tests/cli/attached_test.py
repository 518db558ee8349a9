"""--expert of the command line: what it attaches, and what a comparison says of it."""

from pathlib import Path

import pytest

from latent_deliberation.cli import attached
from latent_deliberation.cli.generate import Request
from latent_deliberation.cli.prompts import Prompt
from latent_deliberation.errors import UserError
from latent_deliberation.experts.card import check_name
from latent_deliberation.experts.package import write_package
from latent_deliberation.inference.policy import ONCE
from latent_deliberation.inference.session import DecodingOptions
from tests.serving import small_server

REQUEST = Request(DecodingOptions(4, policy=ONCE), compared=True)


@pytest.fixture
def stars(tmp_path, monkeypatch):
  """The directory of an expert; a decoder of any name is the tiny one."""
  monkeypatch.setattr(attached, 'load_decoder', lambda *name, **more: small_server.decoder())
  expert = small_server.expert('stars', 1)
  write_package(tmp_path / 'stars', expert.card, expert.coprocessor, routing=expert.routing)
  return str(tmp_path / 'stars')


def open_writer(expert, strict=False):
  return attached.open_writer(REQUEST, 'tiny', '', expert, strict, '', 96, None)


def test_compared_text_names_its_experts(stars):
  """Only the text with latents has experts, and each text scores as it was written."""
  result, = open_writer(f'{stars}:0.5').compare(['A comet is'])
  assert 'experts' not in result['plain'] and result['augmented']['experts'] == {'stars': 0.5}
  for way in ('plain', 'augmented'):
    assert result[way]['nats'][way] == pytest.approx(sum(result[way]['logprobs']), abs=1e-3)
  assert result['plain']['nats']['augmented'] != result['plain']['nats']['plain']


@pytest.mark.parametrize('directory, name', [
    ('runs/gemma3-270m-latents-16-refining-lora', 'gemma3-270m-latents-16-refining'),
    ('auto', 'own'), ('none', 'own'), ('__', 'own'), ('law', 'law-2')])
def test_name_of_a_directory(directory, name):
  """It is one that an expert may have, and no other expert's."""
  check_name(name)
  assert attached._name_directory(Path(directory), ['law']) == name


def test_a_missing_expert_leaves_plain_text(stars, tmp_path):
  """A mix of which one is missing is none, unless that is an error."""
  mix = f'{stars},{tmp_path / "absent"}'
  result, = open_writer(mix).compare(['A comet is'])
  assert result['augmented']['experts'] == {}
  assert result['augmented']['text'] == result['plain']['text']
  with pytest.raises(UserError, match='absent'):
    open_writer(mix, strict=True)


def test_a_short_prompt_is_refused(stars):
  """A text that names an expert and has no room for its latents is no plain text in silence."""
  with pytest.raises(UserError, match='the prompt'):
    open_writer(stars).check([Prompt('A', 'the prompt')])
  open_writer(stars).check([Prompt('A comet is', 'the prompt')])


@pytest.mark.parametrize('written, message', [
    ('auto:luck', 'choose one of'), ('a,a', 'a is there twice'), (',', "'auto' or 'none'")])
def test_malformed(written, message):
  """It is refused before the decoder is loaded."""
  with pytest.raises(UserError, match=message):
    open_writer(written)
