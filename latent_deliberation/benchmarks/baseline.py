"""Times programs in turns: ours, and those of the baseline, transformers, in a process of its own.

Two libraries in one process disturb each other, since threads that wait by spinning take cores from
the other library. A machine that is slow for a while is slow for every program of a turn. So quote
ratios only, never seconds.
"""

import contextlib
import importlib.metadata
import importlib.util
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import jax

from latent_deliberation.errors import UserError
from latent_deliberation.provenance import git_commit

Program = Callable[[], None]
LIBRARIES = ('torch', 'transformers')
THREADS = 2  # that torch uses
CACHES = {'dynamic': None, 'static': 'static'}  # name -> cache_implementation of its `generate`


def check_libraries() -> None:
  """Raises UserError if a library of the baseline is not installed."""
  missing = [name for name in LIBRARIES if not importlib.util.find_spec(name)]
  if missing:
    raise UserError(f'{missing} are not installed, and the baseline of this benchmark needs them: '
                    "pip install -e '.[parity]'")


def describe_turns(repeats: int) -> dict[str, Any]:
  """Returns versions, devices and turns of a benchmark against transformers, for its JSON."""
  return {'versions': {name: importlib.metadata.version(name) for name in (*LIBRARIES, 'jax')},
          'devices': f'{jax.device_count()} {jax.default_backend()}', 'threads_of_torch': THREADS,
          'repeats': repeats, 'git_commit': git_commit()}


class Baseline:
  """Programs in a process of their own, which ends with the `with` block.

  Args:
    build: called in that process with the arguments; returns the programs by name. It is pickled,
      so it must be a function of a module.
    arguments: arguments of `build`, which are pickled too.

  Raises:
    UserError: `build` failed.
  """

  def __init__(self, build: Callable[..., Mapping[str, Program]], *arguments: Any):
    context = multiprocessing.get_context('spawn')  # a fork would copy locks that our threads hold
    self._pipe, other_end = context.Pipe()
    self._process = context.Process(
        target=_serve, args=(other_end, build, arguments), daemon=True)
    self._process.start()
    other_end.close()
    self._receive()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self._pipe.close()
    self._process.join()

  def seconds(self, name: str) -> float:
    """Returns the seconds of one run of the program.

    Raises:
      UserError: the program failed, or its process ended.
    """
    # A process that has ended may have sent its error before.
    with contextlib.suppress(BrokenPipeError):
      self._pipe.send(name)
    return self._receive()

  def _receive(self) -> float:
    try:
      answer = self._pipe.recv()
    except (EOFError, ConnectionResetError):
      self._process.join()
      raise UserError('The process of the baseline ended with exit code '
                      f'{self._process.exitcode}. It may need more memory.') from None
    if isinstance(answer, str):
      raise UserError(f'The baseline failed: {answer}')
    return answer


def _serve(pipe: Connection, build: Callable[..., Mapping[str, Program]],
           arguments: tuple[Any, ...]) -> None:
  """Sends 0 when the programs are built, then the seconds of each program that is named."""
  try:
    programs = build(*arguments)
    pipe.send(0.0)
    while True:
      pipe.send(seconds_of(programs[pipe.recv()]))
  except EOFError:
    pass  # the other end is closed
  except Exception as error:  # any error is sent, and raised by the other process
    pipe.send(f'{type(error).__name__}: {error}')


def seconds_of(program: Program) -> float:
  """Returns the wall-clock time of one run."""
  begun = time.perf_counter()
  program()
  return time.perf_counter() - begun


def alternate(programs: Mapping[str, Callable[[], float]],
              repeats: int) -> dict[str, list[float]]:
  """Returns the seconds of each program in each turn. Before the turns, each runs once.

  Args:
    programs: functions by name; each runs a program once and returns its seconds.
    repeats: number of turns.
  """
  for run in programs.values():
    run()
  turns = [{name: run() for name, run in programs.items()} for _ in range(repeats)]
  return {name: [turn[name] for turn in turns] for name in programs}


def build_programs(directory: Path, prompts: Mapping[str, Sequence[Sequence[int]]],
                   num_tokens: int, threads: int, dtype: str = 'float32') -> dict[str, Program]:
  """Builds prefill and greedy generation of transformers for each batch of prompts.

  Args:
    directory: directory of the model.
    prompts: batches by name; a batch is a list of token ids for each prompt.
    num_tokens: number of tokens to generate.
    threads: threads that torch uses.
    dtype: dtype of weights and computation.

  Returns: programs '<batch> prefill', and '<batch> dynamic' and '<batch> static', which generate
    with that kind of cache.
  """
  import torch
  import transformers
  torch.set_num_threads(threads)
  model = transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype=getattr(torch, dtype)).eval()

  def prefill(ids: torch.Tensor) -> None:
    with torch.inference_mode():
      model(ids, use_cache=True, logits_to_keep=1)

  def generate(ids: torch.Tensor, cache: str | None) -> None:
    with torch.inference_mode():
      model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                     max_new_tokens=num_tokens, min_new_tokens=num_tokens,
                     cache_implementation=cache)

  programs = {}
  for name, batch in prompts.items():
    ids = torch.tensor(batch)
    programs[f'{name} prefill'] = lambda ids=ids: prefill(ids)
    for kind, cache in CACHES.items():
      programs[f'{name} {kind}'] = lambda ids=ids, cache=cache: generate(ids, cache)
  return programs


def build_steps(directory: Path, tokens: Sequence[Sequence[int]], threads: int,
                dtype: str = 'float32') -> dict[str, Program]:
  """Builds transformers' programs: 'forward', 'loss', and 'forward_backward' with all gradients.

  Args:
    directory: directory of the model.
    tokens: B texts of T ids.
    threads: threads that torch uses.
    dtype: dtype of weights and computation.
  """
  import torch
  import transformers
  torch.set_num_threads(threads)
  # Only eager attention has Gemma 2's soft-cap. The others take the library's own choice.
  config = transformers.AutoConfig.from_pretrained(directory)
  options = {'attn_implementation': 'eager'} if getattr(
      config, 'attn_logit_softcapping', None) else {}
  model = transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype=getattr(torch, dtype), **options)
  ids = torch.tensor(tokens)

  def forward() -> None:
    with torch.inference_mode():
      model(ids, use_cache=False)

  def loss() -> None:
    with torch.inference_mode():
      model(ids, labels=ids, use_cache=False)

  def forward_backward() -> None:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()

  return {'forward': forward, 'loss': loss, 'forward_backward': forward_backward}
