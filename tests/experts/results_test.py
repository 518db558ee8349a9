"""Pages of docs/results/experts/ say what their JSON says."""

import json

import pytest

from latent_deliberation.benchmarks.expert_speed import format_speed
from latent_deliberation.benchmarks.lora_cost import format_cost
from latent_deliberation.benchmarks.serving_load import check_load, format_load
from latent_deliberation.experts.card import from_json, render
from latent_deliberation.experts.retrieval_trial import format_results
from latent_deliberation.experts.router_trial import format_trial
from tests import finished

DIRECTORY = finished.ROOT / 'docs/results/experts'
FORMATS = {'biomedicine': lambda content: render(from_json(content)),
           'retrieval': lambda content: format_results(content['results']),
           'routers': format_trial, 'routers_smollm2': format_trial,
           'expert_speed': format_speed, 'lora': format_cost,
           'law': lambda content: render(from_json(content)),
           'serving': format_load}


@pytest.mark.parametrize('name', FORMATS)
def test_page_is_rendered(name):
  content = json.loads((DIRECTORY / f'{name}.json').read_text())
  assert (DIRECTORY / f'{name}.md').read_text() == FORMATS[name](content)
  assert (DIRECTORY / f'{name}.png').is_file()


def test_every_result_is_rendered():
  assert {path.stem for path in DIRECTORY.iterdir()} == set(FORMATS)


def test_no_request_was_lost():
  check_load(json.loads((DIRECTORY / 'serving.json').read_text()))
