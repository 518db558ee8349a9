"""The cost of an expert against that of a LoRA on the decoder itself, by PEFT.

Both read the same rows in the same order, and train about as many weights. Both are then scored on
the same places of held-out text: what they save on the tokens ahead. The expert makes latents at
each place. The LoRA changes the decoder everywhere, and so also on general text.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from latent_deliberation.array_types import Batch
from latent_deliberation.benchmarks.expert_speed import check_interpreter, run_other
from latent_deliberation.build import build_deliberator, count_parameters, load_frozen, open_frozen
from latent_deliberation.data.loading import open_batches
from latent_deliberation.data.text_sizes import with_choices
from latent_deliberation.deliberation.traces import evaluation_keys, sample_traces
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.evaluate import HeldOut, open_held_out, score_traces
from latent_deliberation.evaluation.headless import Figure, FigureCanvasAgg
from latent_deliberation.evaluation.perplexity import FROZEN, OWN, AheadNLL
from latent_deliberation.evaluation.plots import save_figure
from latent_deliberation.experiment import Experiment
from latent_deliberation.experts.card import GENERAL
from latent_deliberation.experts.measuring import SCORED_WITH, experiment_of, on_mesh, saved_nats
from latent_deliberation.experts.package import load_package
from latent_deliberation.experts.trial import draw_intervals
from latent_deliberation.files import as_path, write_json, write_whole
from latent_deliberation.host_memory import peak_memory_bytes
from latent_deliberation.paths import COPROCESSOR, GENERAL_DATA
from latent_deliberation.provenance import git_commit
from latent_deliberation.sharding import make_mesh
from latent_deliberation.tables import format_estimate, markdown_table
from latent_deliberation.training.train import describe_training, time_step


def benchmark(decoder: str, package: Path, workdir: Path, output: Path, *, python: str,
              learning_rate: float = 3e-4, steps: int = 0, threads: int = 0) -> dict[str, Any]:
  """Trains a LoRA as the expert was trained, scores both and writes `output`.

  Args:
    decoder: directory, GGUF file or name of the decoder.
    package: the expert.
    workdir: work directory of its training, which has the rows.
    output: JSON file to write, with a table and a picture beside it.
    python: interpreter with torch, transformers and peft.
    learning_rate: of the LoRA.
    steps: steps of the LoRA; 0 for those of the expert.
    threads: threads that torch uses; 0 for its own choice.

  Raises:
    UserError: one of them is absent or does not fit; the interpreter is tried first.
  """
  check_interpreter(python)
  expert = load_package(package)
  experiment = dataclasses.replace(
      experiment_of(expert.card), decoder_from=decoder, coprocessor_from='')
  # All texts of a batch at once, as the LoRA takes them.
  experiment = with_choices(experiment, {'training.accumulation': 1})
  num_steps = experiment.training.loop.num_steps
  mesh = make_mesh(experiment.mesh)
  batches = open_batches(experiment, workdir, 'training', mesh)
  if not batches.num_rows:
    raise UserError(f'{workdir} has no packed rows: give the work directory of the training')
  texts = {expert.card.name: (experiment, workdir),
           GENERAL: (_general(experiment, expert.card.scores), workdir / GENERAL_DATA)}
  held_out = {name: open_held_out(each, place, mesh) for name, (each, place) in texts.items()}
  known = expert.card.recipe.get(GENERAL, {}).get('fingerprint')
  if held_out[GENERAL].rows.fingerprint != known:
    raise UserError(f'{workdir / GENERAL_DATA} is not the general text of {package}: give the work '
                    'directory and the package of one training')
  # Ours first, so that the peak of this process is that of training.
  run = describe_training(experiment, workdir / COPROCESSOR, mesh)
  seconds = time_step(experiment, run, workdir, mesh)
  ours = {'parameters': count_parameters(expert.coprocessor.params), 'seconds_a_step': seconds,
          'seconds': seconds * num_steps, 'peak_memory_bytes': peak_memory_bytes(),
          'whole_command_seconds': expert.card.recipe.get('seconds')}
  checkpoint = open_frozen(experiment.decoder, as_path(decoder))
  decoder_params, found = load_frozen(experiment, checkpoint, mesh)
  if found != expert.card.base['fingerprint']:
    raise UserError(f'the decoder has the fingerprint {found}, and the expert was made for '
                    f'{expert.card.base["fingerprint"]}: give that decoder')
  params = on_mesh(expert.coprocessor.params, mesh)
  arms = {name: score_traces(each, (FROZEN, OWN), params, decoder_params,
                             held_out[name].batches, mesh)
          for name, (each, _) in texts.items()}
  del decoder_params

  rank = max(1, round(ours['parameters'] / _weights_of_a_rank(experiment)))
  steps = steps or num_steps
  arrays = _training_arrays(batches, steps)
  for name, (each, _) in texts.items():
    arrays |= {f'{name}/{part}': value
               for part, value in _places(each, held_out[name], mesh).items()}
  logging.info('a LoRA of rank %d for %d steps', rank, steps)
  theirs, totals = run_other(python, 'train', decoder, {
      'dtype': 'bfloat16', 'threads': threads, 'rank': rank, 'learning_rate': learning_rate,
      'warmup': experiment.training.optimizer.warmup_steps, 'texts': list(texts),
      'score_size': experiment.evaluation.batch_size}, arrays)
  result = {'ours': ours, 'lora': {'rank': rank, 'learning_rate': learning_rate, **theirs},
            'steps': steps, 'tokens': int(arrays['train/tokens'].size),
            'num_ahead': experiment.deliberation.num_ahead, 'git_commit': git_commit(),
            'decoder': found, 'expert': expert.card.address,
            'starts_from': expert.card.recipe.get('starts_from') or {},
            'texts': {name: _compare(arms[name], held_out[name], totals, name,
                                     experiment.deliberation.num_ahead) for name in texts}}
  write_json(output, json.loads(json.dumps(result)))
  write_whole(output.with_suffix('.md'), format_cost(result).encode())
  plot_cost(result, output.with_suffix('.png'))
  return result


def _general(experiment: Experiment, scores: Mapping[str, Any]) -> Experiment:
  """Returns the experiment that scored general text, which may have been smaller."""
  known = {key: value for key, value in scores.get(GENERAL, {}).items() if key in SCORED_WITH}
  config = experiment.evaluation
  if 'num_texts' not in known:  # a card of earlier code
    size = known.get('batch_size', config.batch_size)
    known['num_texts'] = config.num_texts // size * size
  return dataclasses.replace(experiment, evaluation=dataclasses.replace(config, **known))


def _weights_of_a_rank(experiment: Experiment) -> int:
  """Returns the number of weights that a LoRA on every projection has for each of its ranks."""
  c = experiment.decoder
  queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  ends = [(c.embed_dim, queries), (c.embed_dim, keys), (c.embed_dim, keys), (queries, c.embed_dim),
          (c.embed_dim, c.hidden_dim), (c.embed_dim, c.hidden_dim), (c.hidden_dim, c.embed_dim)]
  return c.num_layers * sum(map(sum, ends))


def _training_arrays(batches: Any, steps: int) -> dict[str, np.ndarray]:
  """Returns the rows of each step, [steps, B, T]."""
  rows = [batches(step) for step in range(steps)]
  return {f'train/{part}': np.stack([getattr(batch, part) for batch in rows])
          for part in ('tokens', 'segments', 'positions')}


def _places(experiment: Experiment, held_out: HeldOut, mesh: Mesh) -> dict[str, np.ndarray]:
  """Returns scored rows, and the places in them at which arms were scored."""
  config = experiment.evaluation
  deliberator = build_deliberator(experiment).with_traces(config.num_traces, config.num_ahead)
  found = []
  for index, batch in enumerate(held_out.batches):
    keys = evaluation_keys(experiment.seed, index, batch)
    with jax.set_mesh(mesh):
      traces = sample_traces(keys, Batch(*map(jax.numpy.asarray, (
          batch.tokens, batch.segments, batch.positions))), deliberator.config)
    found.append((batch.tokens, batch.segments, batch.positions, np.asarray(traces.anchors),
                  np.asarray(traces.ahead_valid)))
  names = ('tokens', 'segments', 'positions', 'anchors', 'valid')
  return dict(zip(names, map(np.concatenate, zip(*found, strict=True)), strict=True))


def _compare(arms: Mapping[str, AheadNLL], held_out: HeldOut, totals: Mapping[str, np.ndarray],
             name: str, num_ahead: int) -> dict[str, Any]:
  """Returns what the expert and the LoRA save on a text, and the decoder's loss by both."""
  count = arms[FROZEN].count
  base, lora = (AheadNLL(totals[f'{name}/{arm}'], count).merged(held_out.texts)
                for arm in ('base', 'lora'))
  frozen, own = (arms[arm].merged(held_out.texts) for arm in (FROZEN, OWN))
  return {'texts': len(frozen.count), 'frozen_nats': float(frozen.nll.mean()),
          'frozen_nats_by_torch': float(base.nll.mean()),
          'expert': saved_nats(own, frozen, num_ahead), 'lora': saved_nats(lora, base, num_ahead)}


def format_cost(result: Mapping[str, Any]) -> str:
  """Returns the comparison as a page of GitHub Markdown."""
  ours, lora = result['ours'], result['lora']
  rows = [
      ['trained weights', f'{ours["parameters"]:,}', f'{lora["parameters"]:,}'],
      ['seconds a step', f'{ours["seconds_a_step"]:.2f}', f'{lora["seconds_a_step"]:.2f}'],
      ['seconds of all steps', f'{ours["seconds"]:.0f}', f'{lora["seconds"]:.0f}'],
      ['peak memory, GiB', *(f'{each["peak_memory_bytes"] / 2**30:.2f}' for each in (ours, lora))],
      *([f'nats saved on {name} text', *(format_estimate(found[key]['nats'], found[key]['ci95'])
                                         for key in ('expert', 'lora'))]
        for name, found in result['texts'].items()),
      ['decoder while it is not asked for', 'the same to the bit', 'merged or not, another model']]
  return '\n\n'.join([
      '# An expert and a LoRA', markdown_table(['what', 'expert', 'LoRA of PEFT'], rows),
      f'{result["steps"]} steps on the same {result["tokens"]:,} tokens. Nats are summed over the '
      f'next {result["num_ahead"]} tokens at the same places, with 95% intervals over texts. Above '
      'zero is better. The loss of the frozen decoder, in nats a token, is by us and by torch: '
      + ', '.join(f'{name} {found["frozen_nats"]:.4f} and {found["frozen_nats_by_torch"]:.4f}'
                  for name, found in result['texts'].items()) + '.',
      *([f'The expert starts from {start["name"]}, whose {start["steps"]} steps are not counted. '
         'The LoRA starts anew.'] if (start := result.get('starts_from')) else [])]) + '\n'


def plot_cost(result: Mapping[str, Any], path: Path) -> None:
  """Draws what both save on each text, with intervals, as a PNG."""
  figure = Figure(figsize=(7, 2.6), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  draw_intervals(axes, {
      f'{kind}, {name} text': {'mean': found[key]['nats'], 'ci95': found[key]['ci95']}
      for name, found in result['texts'].items()
      for key, kind in (('expert', 'expert'), ('lora', 'LoRA'))})
  axes.set_xlabel(f'nats saved on {result["num_ahead"]} tokens (above 0 is better)')
  save_figure(figure, path)
