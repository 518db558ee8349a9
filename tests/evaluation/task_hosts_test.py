"""Two processes have the results of one, and process 0 alone has the tasks.

Run as a script, this file is one of the two.
"""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip('lm_eval')

from latent_deliberation import distributed
from latent_deliberation.evaluation.found_arm_model import open_arm_model
from latent_deliberation.evaluation.task_answers import Settings
from latent_deliberation.evaluation.task_run import Plan, run_tasks
from tests import finished
from tests.evaluation import task_examples
from tests.training.hosts_test import end_both, free_address, start_two

TASKS, ARMS = ('piqa', 'triviaqa'), ('frozen', 'own', 'shuffled')


def run(quickstart: Path, data: Path, output: Path) -> None:
  model = open_arm_model(quickstart / 'pretraining/decoder', quickstart / 'coprocessor',
                         max_length=256)
  run_tasks(model, Plan(TASKS, ARMS, str(data)), Settings(batch_size=2), output)


@pytest.mark.slow
def test_two_processes(quickstart, tmp_path):
  """Scores are those of one process, and texts are the same."""
  data, address = task_examples.write(tmp_path / 'data', 'piqa', 'triviaqa'), free_address()
  logs = tmp_path / 'logs'
  end_both(start_two([[sys.executable, __file__, address, str(index), str(quickstart), str(data),
                       str(tmp_path / 'two')] for index in range(2)], logs), logs)
  run(quickstart, data, tmp_path / 'one')
  one, two = (json.loads((tmp_path / name / 'results.json').read_bytes())['tasks']
              for name in ('one', 'two'))
  for task in TASKS:
    for arm in ARMS:
      assert two[task]['arms'][arm]['nats'] == pytest.approx(one[task]['arms'][arm]['nats'],
                                                             abs=1e-3)
      assert two[task]['arms'][arm]['texts'] == one[task]['arms'][arm]['texts']


if __name__ == '__main__':
  distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
  assert finished.ROOT
  run(*map(Path, sys.argv[3:]))
