"""Load on a server: many clients at once, with faults injected into experts.

The same requests are sent three times: all plain, half of them with healthy experts, and half with
experts that fail, hang, give NaN or are removed meanwhile. No request may be lost, and no plain
text may change, whatever happens to experts.
"""

import collections
import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from latent_deliberation.api import load_decoder
from latent_deliberation.benchmarks.expert_speed import random_expert
from latent_deliberation.deliberation.coprocessor_checkpoint import CoprocessorCheckpoint
from latent_deliberation.errors import UserError
from latent_deliberation.evaluation.headless import Figure, FigureCanvasAgg
from latent_deliberation.evaluation.plots import COLOURS, save_figure, trim_axes
from latent_deliberation.experts.attach import Experts, Mix
from latent_deliberation.files import write_json, write_whole
from latent_deliberation.inference.engine import LoadedDecoder
from latent_deliberation.inference.passes import Augmentation, State
from latent_deliberation.serving.server import RunningServer
from latent_deliberation.serving.server_options import ServerOptions
from latent_deliberation.tables import markdown_table

PHASES = ('plain', 'healthy', 'faulty')
WORDS = ('The river', 'A comet', 'In the morning', 'Water is', 'The court held that', 'Once upon',
         'def read(', 'Yesterday the old')
_NAMES, _RANK = ('one', 'two'), 128  # of the experts
_FAULTS = ('fails', 'hangs', 'nan')


class UnreliableExperts(Experts):
  """Two experts that misbehave in a share of their passes, by a fixed random order.

  Attributes:
    share: share of passes that have a fault.
    hang_seconds: time for which a pass hangs.
    injected: number of faults by kind.
  """

  def __init__(self, decoder: LoadedDecoder, made: Mapping[str, CoprocessorCheckpoint],
               length: int):
    self.share, self.hang_seconds = 0.0, 3.0
    self.injected: collections.Counter[str] = collections.Counter()
    self._random, self._drawing = np.random.default_rng(0), threading.Lock()
    self.made = made
    super().__init__(decoder, made, length=length, strict=True)

  def augment(self, state: State, mixes: Sequence[Mix]) -> Augmentation:
    """Makes latents as `Experts.augment`, but for the faults."""
    with self._drawing:
      fault = ''
      if self._random.random() < self.share:
        fault = str(self._random.choice(_FAULTS))
        self.injected[fault] += 1
    if fault == 'fails':
      raise RuntimeError('an injected fault')
    if fault == 'hangs':
      time.sleep(self.hang_seconds)
    found = super().augment(state, mixes)
    if fault == 'nan':
      found = found.replace(finite=jnp.zeros_like(found.finite))
    return found


@dataclasses.dataclass(frozen=True)
class LoadOptions:
  """Size of a load test.

  Attributes:
    clients: clients at once.
    requests: requests of each client.
    max_tokens: tokens of a text.
    rows, length: see `ServerOptions`.
    share: share of passes of experts that have a fault, in the last phase.
    latent_seconds: see `ServerOptions`.
  """
  clients: int = 64
  requests: int = 4
  max_tokens: int = 32
  rows: int = 16
  length: int = 256
  share: float = 0.4
  latent_seconds: float = 2.0

  def __post_init__(self):
    if self.max_tokens >= self.length:
      raise UserError(f'max_tokens = {self.max_tokens}: a text has room for length = {self.length} '
                      'tokens, prompt included: lower max_tokens, or raise length')


def measure_load(output: Path, decoder: str, options: LoadOptions) -> dict[str, Any]:
  """Runs the three phases, and writes `output` with a table and a PNG beside it; returns it.

  Args:
    decoder: directory, GGUF file or name of the decoder.

  Raises:
    UserError: a request was lost, or a plain text changed.
  """
  loaded = load_decoder(decoder)
  made = {name: random_expert(loaded, _RANK, seed) for seed, name in enumerate(_NAMES)}
  experts = UnreliableExperts(loaded, made, options.length)
  server = RunningServer(
      ServerOptions(decoder, name='load', port=0, rows=options.rows, length=options.length,
                    most_queued=options.clients * options.requests, request_seconds=600.0,
                    latent_seconds=options.latent_seconds), loaded, experts)
  thread = threading.Thread(target=server.serve, daemon=True)
  thread.start()
  server.warm_up()
  expected = _reference(server, options)
  result: dict[str, Any] = {
      'options': dataclasses.asdict(options), 'decoder': loaded.fingerprint,
      'device': str(jax.devices()[0]), 'phases': {}}
  try:
    for phase in PHASES:
      logging.info('%s: %d clients with %d requests each', phase, options.clients,
                   options.requests)
      result['phases'][phase] = _run_phase(server, experts, options, phase, expected)
      logging.info('%s: %s', phase, json.dumps(result['phases'][phase]['all']))
  finally:
    server.stop()
    thread.join(60)
  result['faults'] = dict(experts.injected)
  write_json(output, result)
  check_load(result)  # before the page, which has no place for a phase that lost everything
  write_whole(output.with_suffix('.md'), format_load(result).encode())
  plot_load(result, output.with_suffix('.png'))
  return result


def _bodies(options: LoadOptions, phase: str) -> list[list[dict[str, Any]]]:
  """Returns the requests of each client: the same prompts in every phase, half with experts."""
  models = ('load', 'load+one', 'load', 'load+one:0.5,two:0.5')
  return [[{'model': 'load' if phase == 'plain' else models[(client + number) % len(models)],
            'prompt': f'{WORDS[(client + 3 * number) % len(WORDS)]} {client % 4} and then',
            'max_tokens': options.max_tokens, 'temperature': 0, 'logprobs': 0}
           for number in range(options.requests)] for client in range(options.clients)]


def _reference(server: RunningServer, options: LoadOptions) -> dict[str, str]:
  """Returns the plain text of each prompt, asked for alone."""
  prompts = sorted({body['prompt'] for bodies in _bodies(options, 'plain') for body in bodies})
  found = _send(server, [[{'model': 'load', 'prompt': prompt, 'temperature': 0, 'logprobs': 0,
                           'max_tokens': options.max_tokens} for prompt in prompts]])
  return {each['prompt']: each['text'] for each in found}


def _send(server: RunningServer, clients: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
  process = subprocess.run(
      [sys.executable, '-m', 'latent_deliberation.benchmarks.load_clients'], text=True,
      input=json.dumps({'port': server.port, 'clients': clients}), capture_output=True)
  if process.returncode:
    raise RuntimeError(f'the clients ended with {process.returncode}: {process.stderr[-2000:]}')
  return [json.loads(line) for line in process.stdout.splitlines()]


def _run_phase(server: RunningServer, experts: UnreliableExperts, options: LoadOptions, phase: str,
               expected: Mapping[str, str]) -> dict[str, Any]:
  experts.share = options.share if phase == 'faulty' else 0.0
  experts.hang_seconds = 1.5 * options.latent_seconds
  ended = threading.Event()
  remover = threading.Thread(target=_remove_and_add, args=(experts, ended), daemon=True)
  if phase == 'faulty':
    remover.start()
  begun = time.perf_counter()
  found = _send(server, _bodies(options, phase))
  seconds = time.perf_counter() - begun
  ended.set()
  if phase == 'faulty':
    remover.join()
  return summarise_phase(found, expected, seconds, options.clients * options.requests)


def _remove_and_add(experts: UnreliableExperts, ended: threading.Event) -> None:
  """Removes an expert and adds it again, over and over."""
  name = _NAMES[1]
  while not ended.wait(0.2):
    experts.detach(name)
    experts.injected['removed'] += 1
    ended.wait(0.05)
    experts.attach(name, experts.made[name])


def summarise_phase(found: Sequence[Mapping[str, Any]], expected: Mapping[str, str],
                    seconds: float, sent: int) -> dict[str, Any]:
  """Returns counts, latencies and tokens/s of the answers of one phase.

  A text counts as lost if it has no answer, or none with an end. An expert that is unknown at the
  time of its request is refused with 404, which is an answer.

  Args:
    expected: plain text of each prompt.
    seconds: time of the phase.
    sent: number of requests.
  """
  whole = [each for each in found if each['status'] == 200 and each['ended'] in (
      'eos', 'length', 'stop')]
  refused = [each for each in found if each['status'] == 404 and '+' in each['model']]
  plain = [each for each in whole if '+' not in each['model']]
  reports = [each['latents'] for each in whole if '+' in each['model']]
  faults = [report['fault'] for report in reports if report['fault']]
  # A text without latents is the plain decoder's, for whatever reason it has none.
  as_plain = plain + [each for each in whole if '+' in each['model']
                      and not each['latents']['experts']]
  return {
      'sent': sent, 'whole': len(whole), 'unknown_expert': len(refused),
      'lost': sent - len(whole) - len(refused), 'seconds': seconds,
      'errors': [each.get('error', each['ended']) for each in found
                 if each not in whole and each not in refused][:5],
      'changed': sum(each['text'] != expected[each['prompt']] for each in as_plain),
      'with_latents': sum(bool(report['experts']) for report in reports), 'faults': len(faults),
      'tokens_per_second': sum(each['tokens'] for each in whole) / seconds,
      'all': _times(whole), 'plain': _times(plain)}


def _times(answers: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
  """Returns the 50th, 90th and 99th percentiles of times to the first token and the end."""
  if not answers:
    return {}
  return {name: np.percentile([each[key] for each in answers], (50, 90, 99)).round(4).tolist()
          for name, key in (('first_token_seconds', 'first'), ('seconds', 'seconds'))}


def check_load(result: Mapping[str, Any]) -> None:
  """Raises UserError where a request was lost, or a plain text changed."""
  for phase, found in result['phases'].items():
    if found['lost'] or found['changed']:
      raise UserError(f'{phase}: {found["lost"]} of {found["sent"]} requests were lost '
                      f'({found["errors"]}), and {found["changed"]} plain texts changed')


def format_load(result: Mapping[str, Any]) -> str:
  """Returns the phases as a page of GitHub Markdown."""
  options, rows = result['options'], []
  for phase, found in result['phases'].items():
    first, whole = (['{:.2f}, {:.2f}, {:.2f}'.format(*found['plain'][key])]
                    for key in ('first_token_seconds', 'seconds'))
    rows.append([phase, str(found['sent']), f'{found["tokens_per_second"]:.1f}', *first, *whole,
                 *(str(found[key]) for key in (
                     'with_latents', 'faults', 'unknown_expert', 'lost', 'changed'))])
  faults = ', '.join(f'{kind} {count}' for kind, count in sorted(result['faults'].items()))
  return '\n\n'.join([
      '# Load on a server', markdown_table(
          ['phase', 'requests', 'tokens/s', 'first token, s', 'whole text, s', 'with latents',
           'plain for a fault', 'unknown expert', 'lost', 'plain texts changed'], rows),
      f'{options["clients"]} clients at once send {options["requests"]} requests each, of '
      f'{options["max_tokens"]} tokens; up to {options["rows"]} texts are decoded together. Times '
      'are the 50th, 90th and 99th percentile of plain texts, from the request on, so they hold '
      f'the wait in the queue. Faults that were injected: {faults}. Device: '
      f'{result["device"]}.']) + '\n'


def plot_load(result: Mapping[str, Any], path: Path) -> None:
  """Draws tokens/s, and the percentiles of both times of plain texts, by phase."""
  figure = Figure(figsize=(11, 3.8), layout='constrained')
  FigureCanvasAgg(figure)
  speed, first, whole = figure.subplots(1, 3)
  phases = list(result['phases'])
  speed.bar(phases, [result['phases'][phase]['tokens_per_second'] for phase in phases],
            color=COLOURS['own'])
  speed.set_title('tokens/s, all texts', fontsize=10)
  for axes, key, title in ((first, 'first_token_seconds', 'time to the first token'),
                           (whole, 'seconds', 'time of a text')):
    for place, (percent, colour) in enumerate(zip((50, 90, 99), (
        COLOURS['own'], COLOURS['constant'], COLOURS['shuffled']), strict=True)):
      axes.bar(np.arange(len(phases)) + 0.27 * (place - 1), [
          result['phases'][phase]['plain'][key][place] for phase in phases], 0.25, color=colour,
          label=f'{percent}th percentile')
    axes.set_xticks(range(len(phases)), phases)
    axes.set_title(f'{title} of plain texts, s', fontsize=10)
  whole.legend(frameon=False, fontsize=8)
  for axes in (speed, first, whole):
    trim_axes(axes)
  save_figure(figure, path)
