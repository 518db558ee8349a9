"""Speed with many experts loaded, mixed in a batch and not, against PEFT's adapter_names.

Experts here are adapters with random weights, since speed does not depend on them. PEFT runs in an
interpreter of its own, after ours, on the same weights and prompts.
"""

import functools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import linen as nn

from latent_deliberation.api import load_decoder
from latent_deliberation.benchmarks.baseline import alternate, seconds_of
from latent_deliberation.deliberation.coprocessor import Coprocessor
from latent_deliberation.deliberation.coprocessor_checkpoint import CoprocessorCheckpoint
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.headless import Figure, FigureCanvasAgg
from latent_deliberation.evaluation.plots import save_figure, trim_axes
from latent_deliberation.experts.attach import Experts
from latent_deliberation.files import write_json, write_whole
from latent_deliberation.host_memory import peak_memory_bytes
from latent_deliberation.inference.engine import LoadedDecoder
from latent_deliberation.inference.passes import State
from latent_deliberation.inference.session import DecodingOptions, generate
from latent_deliberation.model import weights
from latent_deliberation.model.decoder import boxed_shapes
from latent_deliberation.provenance import git_commit
from latent_deliberation.tables import markdown_table

OTHER = Path(__file__).with_name('peft_side.py')


def benchmark(decoder: str, output: Path, *, counts: Sequence[int] = (1, 10, 100), batch: int = 8,
              prompt: int = 128, decoded: int = 64, rank: int = 16, repeats: int = 5,
              dtype: str = 'float32', python: str = '', threads: int = 0) -> dict[str, Any]:
  """Times everything and writes `output`, with a table and a picture beside it.

  Args:
    decoder: directory, GGUF file or name of the decoder.
    output: JSON file to write.
    counts: numbers of experts that are loaded.
    batch: prompts that are decoded together.
    prompt, decoded: tokens of a prompt and after it.
    rank: rank of the adapters.
    repeats: runs of which the median counts.
    dtype: dtype of the computation, ours and PEFT's.
    python: interpreter with torch, transformers and peft; '' leaves PEFT out.
    threads: threads that torch uses; 0 for its own choice.

  Raises:
    UserError: decoder or interpreter do not work; the interpreter is tried first. `output` has our
      measurements where PEFT fails later.
  """
  if python:
    check_interpreter(python)
  loaded = load_decoder(decoder, dtype=dtype)
  prompts = np.random.default_rng(0).integers(
      4, loaded.config.vocab_size, (batch, prompt)).tolist()
  experts = Experts(loaded, {}, length=prompt + decoded + 1, strict=True)
  result: dict[str, Any] = {
      'batch': batch, 'prompt': prompt, 'decoded': decoded, 'rank': rank, 'repeats': repeats,
      'dtype': dtype, 'decoder': loaded.fingerprint, 'git_commit': git_commit(),
      'devices': f'{jax.device_count()} {jax.default_backend()}', 'ours': {}}
  for count in sorted(counts):
    while len(experts.names) < count:
      number = len(experts.names)
      experts.attach(f'e{number}', random_expert(loaded, rank, seed=number))
    logging.info('%d experts', count)
    result['ours'][f'{count} loaded'] = _time_ours(experts, prompts, decoded, repeats)
  write_json(output, result)  # first ours alone, since PEFT may fail
  if python:
    result['peft'] = run_other(python, 'speed', decoder, {
        'dtype': dtype, 'threads': threads, 'decoded': decoded, 'repeats': repeats,
        'experts': list(counts), 'rank': rank}, {'prompts': np.array(prompts)})[0]
    write_json(output, result)
  write_whole(output.with_suffix('.md'), format_speed(result).encode())
  plot_speed_of_experts(result, output.with_suffix('.png'))
  return result


def random_expert(decoder: LoadedDecoder, rank: int, seed: int) -> CoprocessorCheckpoint:
  """Returns adapters with random weights, none of which are zero."""
  config = DeliberationConfig(num_latents=4, num_ahead=8, num_traces=1, trainable='lora',
                              lora_rank=rank)
  shapes = nn.unbox(jax.eval_shape(Coprocessor(decoder.config, config).init, jax.random.key(0),
                                   nn.unbox(boxed_shapes(decoder.config))))
  random = np.random.default_rng(seed)
  params = jax.tree.map(lambda leaf: 0.01 * random.standard_normal(leaf.shape, np.float32), shapes)
  return CoprocessorCheckpoint(decoder.config, config, decoder.fingerprint, decoder.tokenizer.hash,
                               steps=0, params=jax.device_put(params))


def _time_ours(experts: Experts, prompts: list[list[int]], decoded: int,
               repeats: int) -> dict[str, Any]:
  """Returns tokens per second of whole generations, and seconds of their parts."""
  engine, names, rows = experts.engine, experts.names, len(prompts)
  ways = {'plain': [{}] * rows, 'one for all': [{names[-1]: 1.0}] * rows,
          'mixed': [{names[row % len(names)]: 1.0} for row in range(rows)]}
  options = DecodingOptions(decoded)
  work: dict[tuple[str, str], Callable[[], Any]] = {}  # by way and part
  for name, mixes in ways.items():
    def attached(mixes: list[Mapping[str, float]] = mixes) -> State:
      state = engine.read(prompts)
      if any(mixes):
        state = engine.attach(state, experts.augment(state, mixes))
      return jax.block_until_ready(state)

    work[name, 'read and make latents'] = attached
    work[name, 'decode'] = functools.partial(generate, engine, attached(), options)
  taken = alternate({name: functools.partial(seconds_of, do) for name, do in work.items()}, repeats)

  found: dict[str, Any] = {'peak_memory_bytes': peak_memory_bytes(), 'experts_in_batch': {
      name: len({key for mix in mixes for key in mix}) for name, mixes in ways.items()}}
  for name in ways:
    seconds = {part: statistics.median(taken[name, part])
               for part in ('read and make latents', 'decode')}
    found[name] = {'tokens_per_second': rows * decoded / sum(seconds.values()),
                   'seconds': seconds, 'decoded_tokens_per_second':
                       rows * decoded / seconds['decode']}
  return found


def parse_counts(written: Sequence[str]) -> tuple[int, ...]:
  """Returns numbers of experts. Raises UserError unless all are integers of 1 or more."""
  if not written or not all(each.strip().isdecimal() and int(each) for each in written):
    raise UserError(f'--experts={",".join(written)}: give integers of 1 or more, with commas')
  return tuple(map(int, written))


def check_interpreter(python: str) -> None:
  """Raises UserError unless an interpreter runs, and has torch, transformers and peft."""
  try:
    process = subprocess.run([python, '-c', 'import torch, transformers, peft'],
                             capture_output=True, text=True, check=False)
  except OSError as error:
    raise UserError(f'--python={python} cannot be run ({error}): give an interpreter with torch, '
                    'transformers and peft') from error
  if process.returncode:
    said = (process.stderr.strip().splitlines() or ['it says nothing'])[-1]
    raise UserError(f'--python={python} cannot import torch, transformers and peft ({said}): '
                    'install them there, or give another interpreter')


def run_other(python: str, job: str, decoder: str, request: Mapping[str, Any],
              arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Runs a job of peft_side.py in another interpreter; returns its result and its arrays.

  The decoder is written for it as a Hugging Face checkpoint.

  Raises:
    UserError: the job failed.
  """
  with tempfile.TemporaryDirectory() as place:
    directory = Path(place)
    checkpoint = weights.open_checkpoint(decoder)
    logging.info('writing the decoder for %s', python)
    weights.save(directory / 'decoder', checkpoint.config, checkpoint.load(), format='huggingface')
    (directory / 'request.json').write_text(json.dumps(request))
    np.savez(directory / 'arrays.npz', **arrays)
    process = subprocess.run([python, str(OTHER), job, place], stderr=sys.stderr, check=False)
    if process.returncode:
      raise UserError(f'--python={python}: {OTHER.name} ended with code {process.returncode}; its '
                      'error is above')
    result = json.loads((directory / 'result.json').read_text())
    with np.load(directory / 'result.npz') as found:
      return result, dict(found)


def format_speed(result: Mapping[str, Any]) -> str:
  """Returns the speeds as a page of GitHub Markdown."""
  rows = []
  for loaded, found in result['ours'].items():
    for name in ('plain', 'one for all', 'mixed'):
      each = found[name]
      rows.append(['ours', loaded, name, f'{each["tokens_per_second"]:.1f}',
                   f'{each["decoded_tokens_per_second"]:.1f}',
                   f'{found["peak_memory_bytes"] / 2**30:.2f}'])
  for loaded, found in result.get('peft', {}).get('tokens_per_second', {}).items():
    for name, speed in found.items():
      if name != 'peak_memory_bytes':
        memory = found.get('peak_memory_bytes')
        rows.append(['PEFT', loaded, name, f'{speed:.1f}', '-',
                     f'{memory / 2**30:.2f}' if memory else '-'])
  return '\n\n'.join([
      '# Speed with experts loaded', markdown_table(
          ['library', 'experts', 'in a batch', 'tokens/s', 'tokens/s of decoding alone', 'GiB'],
          rows),
      f'Batches of {result["batch"]} prompts of {result["prompt"]} tokens, {result["decoded"]} '
      f'tokens each, greedy, in {result["dtype"]}. "Mixed" gives each row an expert of its own, as '
      'far as there are enough. Memory is the peak of the process so far.']) + '\n'


def plot_speed_of_experts(result: Mapping[str, Any], path: Path) -> None:
  """Draws tokens per second by the number of experts loaded, as a PNG."""
  figure = Figure(figsize=(6.5, 4.2), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  lines = {'ours': ({loaded: {name: each['tokens_per_second'] for name, each in found.items()
                              if isinstance(each, Mapping) and 'tokens_per_second' in each}
                     for loaded, found in result['ours'].items()}, '-'),
           'PEFT': (result.get('peft', {}).get('tokens_per_second', {}), '--')}
  for library, (found, style) in lines.items():
    for name, colour in (('plain', '#666666'), ('one for all', '#0072B2'), ('mixed', '#D55E00')):
      points = [(int(loaded.split()[0]), speeds[name]) for loaded, speeds in found.items()
                if name in speeds]
      if points:
        axes.plot(*zip(*points, strict=True), style, color=colour, marker='o',
                  label=f'{library}, {name}')
  axes.set_xscale('symlog', linthresh=1)
  axes.set_ylim(bottom=0)
  axes.set_xlabel('experts loaded')
  axes.set_ylabel('tokens/s, prompts and latents included')
  axes.legend(frameon=False, fontsize=8)
  trim_axes(axes)
  save_figure(figure, path)
