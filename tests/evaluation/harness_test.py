"""lm-evaluation-harness finds the model, and has from it what the public API says."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('lm_eval')

from lm_eval.api.instance import Instance

import latent_deliberation as ld
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.harness import NAME, DeliberationLM, simple_evaluate
from latent_deliberation.evaluation.task_catalog import open_tasks
from latent_deliberation.evaluation.task_files import TASKS
from tests import finished
from tests.evaluation import task_examples

PAIRS = [('Document 1: the', ' 1th of the forty.'), ('Document 1: the', ' end'),
         ('Document 2: the number', ' 2th')]


def instances(kind, *arguments):
  return [Instance(kind, {}, each, 0, ('task', number, 1))
          for number, each in enumerate(arguments)]


@pytest.fixture(scope='module')
def paths(quickstart):
  return {'decoder': str(quickstart / 'pretraining/decoder'),
          'coprocessor': str(quickstart / 'coprocessor'), 'max_length': 256}


@pytest.fixture
def lm(paths, one_device):
  return DeliberationLM(**paths)


@pytest.fixture
def generator(paths):
  return ld.Generator(ld.load_decoder(paths['decoder']),
                      ld.load_coprocessor(paths['coprocessor']), length=257)


def test_loglikelihood(lm, generator):
  """Log-likelihoods, in the order of the requests, with latents at the end of the context."""
  answers = lm.loglikelihood(instances('loglikelihood', *PAIRS))
  expected = generator.score(*zip(*PAIRS, strict=True), augment=True)
  np.testing.assert_allclose([nats for nats, _ in answers], [each.nats for each in expected],
                             atol=1e-3)
  assert all(isinstance(greedy, bool) for _, greedy in answers)


def test_rolling(lm, generator):
  """A whole text, in windows that begin with the first token; latents have no room in the first."""
  text = 'the 3th of the forty. ' * 20
  with pytest.raises(UserError, match='too short'):
    lm.loglikelihood_rolling(instances('loglikelihood_rolling', (text,)))
  lm.arm, lm.answers.arms = 'frozen', ('frozen',)
  whole, short = lm.loglikelihood_rolling(instances('loglikelihood_rolling', (text,), ('the',)))
  windows = [('', text[:256]), (text[len(text) - 256:256], text[256:])]
  expected = generator.score(*zip(*windows, strict=True), augment=False)
  assert whole == pytest.approx(sum(each.nats for each in expected), abs=1e-2)
  one, = generator.score([''], ['the'], augment=False)
  assert short == pytest.approx(one.nats, abs=1e-3)


def test_generate(lm, generator):
  """Greedy texts end before a stop string; those with other options are apart."""
  options = {'until': ['.'], 'max_gen_toks': 6, 'do_sample': False, 'temperature': 0.0}
  prompts = [('Document 3: the', options), ('Document 4', {**options, 'max_gen_toks': 3})]
  texts = lm.generate_until(instances('generate_until', *prompts))
  for text, (prompt, given) in zip(texts, prompts, strict=True):
    expected, = generator.generate([prompt], max_tokens=given['max_gen_toks'], stop=['.'])
    assert text == expected.text


def test_common_prompt(lm, generator):
  """Texts after a long common prompt are those of prompts that are read one by one."""
  examples = 'Document 5: the 5th of the forty. ' * 4
  prompts = [examples + end for end in ('Document 6:', 'Document 7: the', 'Document 8: the 8')]
  texts = lm.generate_until(instances('generate_until', *(
      (prompt, {'until': [], 'max_gen_toks': 6}) for prompt in prompts)))
  expected = generator.generate(prompts, max_tokens=6, augment=True)
  assert texts == [each.text for each in expected]


def test_repeats(lm):
  """lm-evaluation-harness repeats a request for each text that it wants drawn."""
  options = {'until': [], 'do_sample': True, 'temperature': 2.0, 'max_gen_toks': 8}
  instance, = instances('generate_until', ('Document 3: the', options))
  assert len(set(lm.generate_until([instance] * 4))) > 1


@pytest.mark.parametrize('generation, said', [
    ({'num_beams': 2}, 'num_beams'), ({'max_gen_toks': 300}, 'max_gen_toks'),
    ({'max_gen_toks': 0}, 'max_tokens')])
def test_bad_generation(lm, generation, said):
  with pytest.raises(UserError, match=said):
    lm.generate_until(instances('generate_until', ('Document', generation)))


@pytest.mark.parametrize('options, said', [
    ({'arm': 'best'}, "'best'"), ({'coprocessor': '', 'arm': 'own'}, "'own'"),
    ({'dtype': 'float8'}, 'float8'), ({'place': 'before:x', 'every': 4}, 'place'),
    ({'arm': 'constant'}, 'constant'), ({'batch_size': 'many'}, 'batch_size'),
    ({'at': '0+x'}, "at = 'x'"), ({'arm': 'shuffled', 'every': 4}, 'shuffled')])
def test_bad_arguments(paths, options, said, one_device):
  with pytest.raises(UserError, match=said):
    DeliberationLM(**{**paths, **options})


@pytest.mark.parametrize('batch_size, texts', [
    ('auto:4', 0), ('auto', 0), (1, 0), (None, 0), ('3', 3)])
def test_batch_size(paths, batch_size, texts, one_device):
  """Every value that lm-evaluation-harness takes is a number of texts, or as many as fit."""
  lm = DeliberationLM(**paths, arm='frozen', batch_size=batch_size)
  assert lm.answers._settings.batch_size == texts


def test_wrong_kind(paths, quickstart):
  """Constant soft tokens are no coprocessor, and a coprocessor is none of them."""
  with pytest.raises(UserError, match='holds constant soft tokens'):
    DeliberationLM(**{**paths, 'coprocessor': str(quickstart / 'constant')})
  with pytest.raises(UserError, match='holds a coprocessor'):
    DeliberationLM(**{**paths, 'constant': str(quickstart / 'coprocessor')})


def test_other_decoder(paths, tmp_path, one_device):
  """A coprocessor of another decoder is refused."""
  from latent_deliberation.model import weights
  config, params = weights.load(paths['decoder'])
  params['embedder']['table'] = params['embedder']['table'] + 1
  checkpoint = weights.open_checkpoint(paths['decoder'])
  weights.save(tmp_path / 'other', config, params, checkpoint.vocabulary_hash)
  with pytest.raises(UserError, match='fingerprint'):
    DeliberationLM(**{**paths, 'decoder': str(tmp_path / 'other'), 'vocabulary': 'byte'})


def test_simple_evaluate(paths, tmp_path, one_device):
  """lm-evaluation-harness makes the model from its name and arguments."""
  data = task_examples.write(tmp_path, 'boolq')
  results = simple_evaluate(NAME, ','.join(f'{name}={value}' for name, value in {
      **paths, 'arm': 'frozen'}.items()), tasks=['boolq'], bootstrap_iters=0, batch_size=1,
                            task_manager=open_tasks('boolq', str(data), None))
  assert 0 <= results['results']['boolq']['acc,none'] <= 1
  assert results['config']['arm'] == 'frozen' and results['n-samples']['boolq']['effective'] == 6


@pytest.mark.slow
@pytest.mark.parametrize('program', [
    [str(Path(sys.executable).with_name('lm_eval'))],
    [sys.executable, '-m', 'latent_deliberation.evaluation']])
def test_command(paths, tmp_path, program):
  """Both commands of the guide evaluate a local task."""
  data = task_examples.write(tmp_path / 'data', 'piqa')
  process = subprocess.run(
      [*program, '--model', NAME, '--tasks', str(TASKS / 'piqa.yaml'), '--metadata', f'data={data}',
       '--model_args', ','.join(f'{name}={value}' for name, value in paths.items()) + ',arm=own',
       '--output_path', str(tmp_path / 'out'), '--log_samples'], cwd=tmp_path,
      env={**finished.environment(), 'HF_HUB_OFFLINE': '1', 'HOME': str(tmp_path)},
      capture_output=True, text=True, timeout=300)
  assert process.returncode == 0, process.stderr
  results, = (tmp_path / 'out').rglob('results_*.json')
  assert json.loads(results.read_text())['config']['model_args']['arm'] == 'own'
  assert '|piqa' in process.stdout.replace(' ', '')
