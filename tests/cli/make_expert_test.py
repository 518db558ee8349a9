"""From a folder of text to an expert, and on to its use: the whole path, on the tiny decoder."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import latent_deliberation as ld
from latent_deliberation.benchmarks import lora_cost
from latent_deliberation.build import with_decoder
from latent_deliberation.cli import expert_scores
from latent_deliberation.cli import make_expert as module
from latent_deliberation.cli.expert_commands import Options, run
from latent_deliberation.cli.make_expert import ExpertRequest, make_expert
from latent_deliberation.cli.quickstart import quickstart as run_quickstart
from latent_deliberation.data.data_config import BYTE_VOCABULARY_HASH
from latent_deliberation.deliberation.coprocessor_checkpoint import describe
from latent_deliberation.errors import UserError
from latent_deliberation.experts.card import GENERAL
from latent_deliberation.experts.measuring import measure_again
from latent_deliberation.experts.package import (
  MOST_BYTES,
  SAMPLE,
  load_package,
  read_sample,
  write_package,
)
from latent_deliberation.experts.verifying import _prompts, verify
from latent_deliberation.model import weights
from latent_deliberation.training import train
from latent_deliberation.training.train import describe_training
from tests import finished, tiny

GIVEN = frozenset({'training.loop.num_steps', 'training.batch_size'})


def experiment_of(decoder, **overrides):
  return with_decoder(finished.experiment(
      decoder_from='', deliberation__trainable='lora', deliberation__lora_rank=2,
      data__validation_percent=30, **overrides), str(decoder))


@pytest.fixture(scope='module')
def place(tmp_path_factory, quickstart, module_on_one_device):
  """A folder with the text of a domain, and of none."""
  place = tmp_path_factory.mktemp('expert')
  finished.write_texts(place / 'acts', [
      f'Page {number}. ' + f'WHEREAS clause {number} of the act holds; ' * 20
      for number in range(40)])
  return place


@pytest.fixture(scope='module')
def made(place, quickstart):
  """An expert of two steps."""
  experiment = experiment_of(quickstart / 'pretraining/decoder')
  request = ExpertRequest('acts', str(place / 'acts'), str(finished.TEXTS),
                          description='Acts', licence='CC0-1.0')
  card = make_expert(experiment, request, place / 'work', place / 'package', GIVEN)
  return card, experiment, request


def test_package(made, place, quickstart):
  """Card, controls, routing and sample: all that the package promises."""
  card, experiment, _ = made
  expert = load_package(place / 'package')
  assert expert.card == card and expert.coprocessor.steps == card.recipe['steps'] == 2
  assert card.scores.keys() == {'acts', GENERAL}
  for scores in card.scores.values():
    assert scores['gain'].keys() == {'own', 'shuffled', 'zero', 'constant'}
    assert abs(scores['gain']['zero']['nats']) < 1e-4
  assert not card.gains  # eight texts give no interval
  assert 'whereas' in card.keywords and card.licence == 'CC0-1.0'
  assert expert.routing.centroid.shape == (experiment.decoder.embed_dim,)
  np.testing.assert_allclose(np.linalg.norm(expert.routing.centroid), 1, rtol=1e-5)
  assert read_sample(place / 'package')['acts']['tokens'].shape[1] == experiment.data.length
  assert card.recipe['text']['rows'] > 0
  # Nothing is trained on general text, so none of its rows is packed for that.
  assert card.recipe[GENERAL]['held_out'] > 0 and card.recipe[GENERAL]['rows'] == 0
  assert not (place / 'work/general/rows/train').exists()
  written = (place / 'package/expert.json').read_text()
  assert str(place) not in written and str(quickstart) not in written


def test_quickstart_in_its_directory(made, place):
  """A quickstart does not take what was chosen for an expert."""
  with pytest.raises(UserError, match=f"{place}/work .*'expert'.*'quickstart'.*--workdir"):
    run_quickstart(made[1], place / 'work')


@pytest.mark.slow
def test_starts_from_another_expert(made, place, tmp_path):
  """An expert may start as another one; the control of constant soft tokens starts anew."""
  _, experiment, request = made
  experiment = dataclasses.replace(experiment, coprocessor_from=str(place / 'package'))
  card = make_expert(experiment, request, tmp_path / 'work', tmp_path / 'second', GIVEN)
  assert card.recipe['steps'] == 4
  assert (start := card.recipe['starts_from'])['name'] == 'package' and start['steps'] == 2
  assert f'| starts from | package, weights `{start["fingerprint"]}`' in (
      tmp_path / 'second/README.md').read_text()
  assert describe(tmp_path / 'work/constant/coprocessor').steps == 2


def test_everything_is_verified(made, place, quickstart):
  """Files, decoder, traces and scores; another decoder fails."""
  decoder_dir = quickstart / 'pretraining/decoder'
  decoder = ld.load_decoder(decoder_dir)
  checks = list(verify(place / 'package', decoder, str(decoder_dir), scores=True))
  assert [check.passed for check in checks] == [True] * 9, '\n'.join(map(str, checks))
  assert [check.passed for check in verify(place / 'package', None)] == [True, None]
  other = dataclasses.replace(decoder, fingerprint='d1')
  *_, last = verify(place / 'package', other)
  assert last.passed is False and 'this decoder has d1' in last.found


def test_any_name_is_verified(made, place, quickstart, tmp_path):
  """Also the one that verifying itself gives to an expert with a gate of zero."""
  decoder = ld.load_decoder(quickstart / 'pretraining/decoder')
  expert, sample = load_package(place / 'package'), read_sample(place / 'package')
  card = dataclasses.replace(made[0], name='closed', scores={}, files={})
  write_package(tmp_path / 'closed', card, expert.coprocessor)
  assert all(check.passed for check in verify(tmp_path / 'closed', decoder))
  assert _prompts(expert, {GENERAL: sample[GENERAL], 'acts': sample['acts']}) == (
      sample['acts']['tokens'][:4, :48].tolist())


def test_scores_of_a_changed_card(made, place, quickstart):
  """The coprocessor says how latents are made, any machine scores, and no card takes all memory."""
  expert, sample = load_package(place / 'package'), read_sample(place / 'package')
  decoder_dir = quickstart / 'pretraining/decoder'

  def measured(section, **changes):
    settings = made[0].recipe['settings']
    settings = {**settings, section: {**settings[section], **changes}}
    card = dataclasses.replace(made[0], recipe={**made[0].recipe, 'settings': settings})
    return measure_again(dataclasses.replace(expert, card=card), {'acts': sample['acts']},
                         decoder_dir)

  assert measured('deliberation', lora_rank=5, gate='channel')['acts']['holds']
  assert measured('mesh', data=3)['acts']['holds']  # of a machine with other devices
  for key in ('bootstrap_samples', 'num_traces', 'num_ahead'):
    with pytest.raises(UserError, match=f'{key}'):
      measured('evaluation', **{key: 10**9})


def test_finished_work_is_not_done_again(made, place, monkeypatch):
  """The same command packs again what is there, to the same weights; another one is refused."""
  card, experiment, request = made
  for name in ('measure', 'find_places', 'load_frozen'):
    monkeypatch.setattr(expert_scores, name, lambda *unused, name=name: pytest.fail(name))
  monkeypatch.setattr('latent_deliberation.training.run.train',
                      lambda state, *unused, **options: state)
  again = make_expert(experiment, request, place / 'work', place / 'again', GIVEN)
  weights = 'coprocessor/coprocessor.safetensors'
  assert again.files[weights] == card.files[weights]
  assert again.scores == card.scores
  routing = 'routing.safetensors'
  assert again.files[routing] == card.files[routing]
  for change, message in (({'name': 'law'}, "name: 'acts' saved, 'law' now"),
                          ({'general': ''}, 'general: '), ({'minutes': 3.0}, 'minutes: 0.0 saved')):
    with pytest.raises(UserError, match=message):
      make_expert(experiment, dataclasses.replace(request, **change), place / 'work',
                  place / 'other')
  with pytest.raises(UserError, match='exists already'):
    make_expert(experiment, request, place / 'work', place / 'again', GIVEN)


def test_sample_that_is_too_large(made, place, tmp_path, monkeypatch):
  """Rows that no package takes are refused before the training, and not with --nosample."""
  _, experiment, request = made
  monkeypatch.setitem(MOST_BYTES, SAMPLE, 999)
  monkeypatch.setattr(module, 'train_phases', lambda *unused: pytest.fail('it was trained'))
  with pytest.raises(UserError, match='at most 999: give --nosample'):
    make_expert(experiment, request, place / 'work', tmp_path / 'package', GIVEN)
  with pytest.raises(pytest.fail.Exception, match='it was trained'):
    make_expert(experiment, dataclasses.replace(request, sample=False), place / 'work',
                tmp_path / 'package', GIVEN)


def test_other_general_text(made, place, tmp_path, monkeypatch):
  """A trained expert is measured on other general text where the prepared one was deleted."""
  card, experiment, request = made
  monkeypatch.setattr('latent_deliberation.training.run.train',
                      lambda state, *unused, **options: state)
  work = tmp_path / 'work'
  shutil.copytree(place / 'work', work)
  finished.write_texts(tmp_path / 'pages', [f'Once, in {year}, a ship sailed east. ' * 40
                                            for year in range(1700, 1740)])
  other = dataclasses.replace(request, general=str(tmp_path / 'pages'))
  with pytest.raises(UserError, match=f'Or delete {work}/general: the training has not read it'):
    make_expert(experiment, other, work, tmp_path / 'package', GIVEN)
  shutil.rmtree(work / 'general')
  again = make_expert(experiment, other, work, tmp_path / 'package', GIVEN)
  weights = 'coprocessor/coprocessor.safetensors'
  assert again.files[weights] == card.files[weights] and again.scores['acts'] == card.scores['acts']
  assert again.scores[GENERAL] != card.scores[GENERAL]
  assert again.recipe[GENERAL]['name'] == 'pages'
  # A LoRA is compared on the text that the expert was measured on.
  monkeypatch.setattr(lora_cost, 'check_interpreter', lambda python: None)
  with pytest.raises(UserError, match=f'{work}/general is not the general text of'):
    lora_cost.benchmark(experiment.decoder_from, place / 'package', work, tmp_path / 'lora.json',
                        python='python')
  # Rows of the same files with other contents.
  for path in (tmp_path / 'pages').iterdir():
    path.write_text(path.read_text().replace('east', 'west'))
  with pytest.raises(UserError, match=f'about general text.*delete {work}/general'):
    make_expert(experiment, other, work, tmp_path / 'second', GIVEN)


def test_minutes_are_what_is_left(monkeypatch, tmp_path):
  """Data, timing and later compilation are part of the minutes."""
  taken = {}
  clock = module.PhaseClock(tmp_path / 'phases.json')
  clock.seconds['data'] = 30.0

  def time_step(*unused):
    clock.seconds['speed'] = 5.0  # of an earlier launch, which was stopped
    return 2.0

  monkeypatch.setattr(module, 'time_step', time_step)
  monkeypatch.setattr(module, 'open_batches', lambda *unused: SimpleNamespace(num_rows=7))
  monkeypatch.setattr(module, 'choose_pace', lambda *unused, **options: taken.update(options))
  module._find_pace(finished.experiment(), 5.0, {}, SimpleNamespace(section='training'),
                    frozenset(), tmp_path, None, clock)
  compiling = 5 - 2 * 2  # the two timed steps apart
  assert taken['seconds_left'] == pytest.approx(
      300 - 30 - 5 - module.COMPILATIONS * compiling, abs=1)
  assert taken['step_seconds'] == 2.0 and taken['minutes'] == 5.0


def test_pace_is_that_of_every_launch(monkeypatch, tmp_path):
  """Steps and texts are chosen once, also for general text, whose rows say how many it has."""
  config = finished.experiment().decoder
  weights.save(tmp_path / 'decoder', config, tiny.decoder_params(config), BYTE_VOCABULARY_HASH)
  for name in ('acts', 'others'):
    finished.write_texts(tmp_path / name, [
        f'Page {number} of {name}. ' + f'Clause {number} holds; ' * 40 for number in range(40)])
  experiment = experiment_of(tmp_path / 'decoder', evaluation__num_texts=48)
  request = ExpertRequest('acts', str(tmp_path / 'acts'), str(tmp_path / 'others'), minutes=0.1)
  seen = []

  def stop(texts, *unused):
    seen.append({name: (scored.evaluation, scored.training, len(held_out.texts))
                 for name, (scored, held_out) in texts.items()})
    raise InterruptedError

  monkeypatch.setattr(module, 'time_step', lambda *unused: 1.0)
  monkeypatch.setattr(module, 'train_phases', lambda experiment, *unused: None)
  monkeypatch.setattr(module, 'measure_expert', stop)
  for _ in range(2):
    with pytest.raises(InterruptedError):
      make_expert(experiment, request, tmp_path / 'work', tmp_path / 'package',
                  frozenset({'training.batch_size'}))
    monkeypatch.setattr(module, 'time_step', lambda *unused: pytest.fail('timed again'))
  assert seen[0] == seen[1]
  for evaluation, training, rows in seen[0].values():
    assert evaluation.num_texts == rows == 24 and evaluation.eval_batches == 1
    assert training.loop.num_steps == training.loop.eval_every == 20
  # A key that is given later goes before what was chosen.
  with pytest.raises(InterruptedError):
    make_expert(experiment_of(tmp_path / 'decoder', evaluation__num_texts=48,
                              training__loop__eval_every=10), request, tmp_path / 'work',
                tmp_path / 'package', frozenset({'training.loop.eval_every'}))
  assert {training.loop.eval_every for _, training, _ in seen[2].values()} == {10}


def test_step_is_timed(made, place, monkeypatch):
  """One step compiles, and two are timed."""
  _, experiment, _ = made
  mesh = module.make_mesh(experiment.mesh)
  run = describe_training(experiment, place / 'work/coprocessor', mesh)
  steps = []
  monkeypatch.setattr(train, 'counted', lambda numbers, work: steps.extend(numbers) or numbers)
  assert 0 < train.time_step(experiment, run, place / 'work', mesh) < 60
  assert len(steps) == 3


def test_marketplace_commands(made, place, quickstart, monkeypatch, capsys, tmp_path):
  """publish, list, search, add, show, route, compare, remove: as words of the command line."""
  monkeypatch.setenv('LATENT_DELIBERATION_EXPERTS', str(tmp_path / 'added'))
  index = str(tmp_path / 'index')
  decoder = str(quickstart / 'pretraining/decoder')

  def said(command, *words, **options):
    run(command, words, Options(**options))
    return capsys.readouterr().out

  with pytest.raises(UserError, match='no gain.*--force'):
    run('publish', [str(place / 'package')], Options(index=index))
  address = made[0].address
  assert address in said('publish', str(place / 'package'), index=index, force=True)
  assert address in said('list', index=index) and address in said('search', 'whereas', index=index)
  assert 'No expert' in said('search', 'banana', index=index)
  assert 'No expert' in said('list')
  assert address in said('add', 'acts', index=index) and address in said('list')
  assert '# acts: a latent expert' in said('show', 'acts')
  assert 'ok: ' in said('verify', 'acts', decoder=decoder)
  routed = said('route', decoder=decoder, text='the clause of the act', router=('gain', 'centroid'))
  assert routed.startswith('gain: ') and 'acts' in routed
  bare = str(place / 'work/coprocessor/coprocessor')  # the same expert, without its card
  table = said('compare', 'acts', bare, decoder=decoder, text=str(place / 'acts'), prompts=2,
               batch_size=2, length=200, output=str(tmp_path / 'compare.json'))
  assert '| acts |' in table and (tmp_path / 'compare.png').exists()
  compared = json.loads((tmp_path / 'compare.json').read_text())
  assert compared['saved']['text']['acts']['prompts'] == 2
  assert compared['saved']['text']['coprocessor'] == compared['saved']['text']['acts']
  page = said('evaluate', decoder=decoder, domain=(f'acts={place}/acts', f'x={finished.TEXTS}'),
              prompts=2, batch_size=2, length=200, router=('gain',), pair=(),
              output=str(tmp_path / 'evaluate.json'))
  assert '## Chosen by gain' in page and (tmp_path / 'evaluate.png').exists()
  assert 'is removed' in said('remove', 'acts') and 'No expert' in said('list')


def test_generate_with_an_expert(made, place, quickstart):
  """launch/generate.py attaches a package; an unknown one leaves the plain text and a warning."""
  *launched, (status, _, refused) = finished.launch_in_forks([
      [sys.executable, 'launch/generate.py', f'--decoder={quickstart}/pretraining/decoder',
       '--prompt=the clause of', '--json', '--max_tokens=4', *arguments]
      for arguments in ([], [f'--expert={place}/package'], ['--expert=moon'],
                        ['--expert=moon', '--strict'])])
  plain, own, unknown = (json.loads(printed) for _, printed, _ in launched)
  assert own['experts'] == {'acts': 1.0} and own['latents_at'] == [0]
  assert unknown['experts'] == {} and unknown['logprobs'] == plain['logprobs']
  assert status == 1 and 'no expert moon' in refused


def test_bad_text(made, place, tmp_path):
  """An empty folder, and a text too small, are refused before long work."""
  _, experiment, request = made
  (tmp_path / 'empty').mkdir()
  finished.write_texts(tmp_path / 'tiny', ['one', 'two', 'three', 'four'])
  # In every held-out row, but never 8 tokens after a place for latents.
  finished.write_texts(tmp_path / 'short', [f'{number:04}567' for number in range(800)])
  for text, message in ((tmp_path / 'empty', 'no file matches'), (tmp_path / 'tiny', 'rows|row'),
                        (tmp_path / 'short', 'of the data reach ahead position .*too short')):
    with pytest.raises(UserError, match=message):
      make_expert(experiment, dataclasses.replace(request, text=str(text)), tmp_path / 'work',
                  tmp_path / 'out', GIVEN)
    assert not (tmp_path / 'out').exists()
    shutil.rmtree(tmp_path / 'work', ignore_errors=True)


def test_kept_measurements(tmp_path):
  """They are of one key, and damaged ones are made again."""
  made = []

  def keep(key):
    found = expert_scores._keep(tmp_path / 'a/x.npz', key, lambda value: made.append(key) or {
        'scores': json.dumps({'nats': value}), 'part': np.array([value, np.nan])}, 0.1)
    assert json.loads(str(found['scores'])) == {'nats': 0.1}
    np.testing.assert_array_equal(found['part'], [0.1, np.nan])

  for key in ('one', 'one', 'other', 'other', 'one'):
    keep(key)
  assert made == ['one', 'other', 'one']
  content = (tmp_path / 'a/x.npz').read_bytes()
  for damaged in (b'', content[:-30], b'[]', content[:80] + b'?' + content[81:]):
    (tmp_path / 'a/x.npz').write_bytes(damaged)
    made.clear()
    keep('one')
    keep('one')
    assert made == ['one']


def test_programs_are_compiled_once(monkeypatch):
  """By a cache of this launch, unless the user has set one."""
  before = jax.config.jax_compilation_cache_dir
  with module._programs_kept():
    assert jax.config.jax_compilation_cache_dir == before
  least = 'jax_persistent_cache_min_compile_time_secs'
  settings = {'jax_compilation_cache_dir': None, least: 0.0}
  kept = {name: getattr(jax.config, name) for name in settings}
  try:
    for name, value in settings.items():
      jax.config.update(name, value)
    module.compilation_cache.reset_cache()
    with module._programs_kept():
      directory = Path(jax.config.jax_compilation_cache_dir)
      for _ in range(2):  # a program that is made anew each time
        jax.jit(lambda x: x * 3 + 2)(np.arange(3.0))
      programs = [path for path in directory.iterdir() if path.name.endswith('-cache')]
      assert len(programs) == 1
    assert jax.config.jax_compilation_cache_dir is None and not directory.exists()
  finally:
    for name, value in kept.items():
      jax.config.update(name, value)
    module.compilation_cache.reset_cache()
