"""Commands read and write in a store: benchmarks go on there, and no result is lost at the end."""

import json

import pytest
from absl import flags

from latent_deliberation.cli import app
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.found_arm_model import open_arm_model
from latent_deliberation.evaluation.task_answers import Settings
from latent_deliberation.evaluation.task_run import Plan, run_tasks
from latent_deliberation.files import list_directory
from tests.evaluation import task_examples
from tests.stores.contents_test import is_written, upload
from tests.stores.object_store import Fault


@pytest.mark.usefixtures('one_device')
def test_benchmarks(place, quickstart, tmp_path):
  """A coprocessor is read from a store. Results are written there, and answers are kept."""
  pytest.importorskip('lm_eval')
  upload(quickstart / 'coprocessor/coprocessor', place / 'coprocessor')
  model = open_arm_model(quickstart / 'pretraining/decoder', str(place / 'coprocessor'),
                         max_length=512)
  plan = Plan(('piqa',), ('frozen', 'own'), str(task_examples.write(tmp_path / 'data')), limit=3)
  output = place / 'results'
  summary = run_tasks(model, plan, Settings(), output)
  assert json.loads((output / 'results.json').read_bytes()) == summary
  assert (output / 'results.png').read_bytes().startswith(b'\x89PNG')
  # A run that was stopped before the end of its task takes its answers from the store.
  answers = (output / 'answers.jsonl').read_bytes()
  (output / 'tasks/piqa.json').unlink()
  again = run_tasks(model, plan, Settings(), output)
  assert (output / 'answers.jsonl').read_bytes() == answers
  assert again['tasks']['piqa']['arms']['own']['nats'] == summary['tasks']['piqa']['arms']['own'][
      'nats']
  run_tasks(model, plan, Settings(), output, overwrite=True)
  assert [path.name for path in list_directory(output / 'samples/own')] == ['samples_piqa.jsonl']


def test_gate(place):
  """The gate of the harness is looked for in the store."""
  pytest.importorskip('lm_eval')
  from latent_deliberation.evaluation.harness import DeliberationLM
  with pytest.raises(UserError, match=f'{place}/gate'):
    DeliberationLM('no-decoder', 'no-coprocessor', gate=f'{place}/gate')


def test_output_without_permission(store, place):
  """--output in a bucket that may only be read is refused while flags are parsed."""
  holder = app.define_json('commands_test_output', 'Meaning.')
  try:
    store.faults['refuse'] = Fault(is_written, status=403)
    with pytest.raises(flags.Error, match=f'{place}.*no permission'):
      flags.FLAGS(['test', f'--{holder.name}={place}/plan.json'])
    store.faults.clear()
    flags.FLAGS(['test', f'--{holder.name}={place}/plan.json'])
    assert not (place / 'plan.json').exists()
  finally:
    for name in (holder.name, 'overwrite'):
      delattr(flags.FLAGS, name)
