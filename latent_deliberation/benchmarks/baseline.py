"""Programs timed in turns: ours, and those of another library in a process of its own.

Two libraries in one process disturb each other: threads that wait by spinning take the cores of the
other's. In turns, a machine that is slow for a while is slow for all. Only ratios may be quoted.
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
THREADS = 2  # of torch


def check_libraries() -> None:
  """Raises ImportError where what transformers runs on is not installed."""
  missing = [name for name in LIBRARIES if not importlib.util.find_spec(name)]
  if missing:
    raise UserError(f"the baseline of this benchmark needs {missing}: pip install -e '.[parity]'")


def describe_turns(repeats: int) -> dict[str, Any]:
  """What a benchmark against transformers was run with, as its JSON says it."""
  return {'versions': {name: importlib.metadata.version(name) for name in (*LIBRARIES, 'jax')},
          'devices': f'{jax.device_count()} {jax.default_backend()}', 'threads_of_torch': THREADS,
          'repeats': repeats, 'git_commit': git_commit()}


class Baseline:
  """Programs in a process of their own, which ends with the `with` block.

  Args:
    build: called there with the arguments, returns the programs by name. A function that can be
      imported, since it is sent by its name; so are the arguments, as values.

  Raises:
    UserError: `build` failed.
  """

  def __init__(self, build: Callable[..., Mapping[str, Program]], *arguments: Any):
    context = multiprocessing.get_context('spawn')  # a fork would take our threads' locks with it
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
    """Time that one run of the program takes; RuntimeError where it fails."""
    with contextlib.suppress(BrokenPipeError):  # what it said before it ended may be there
      self._pipe.send(name)
    return self._receive()

  def _receive(self) -> float:
    try:
      answer = self._pipe.recv()
    except (EOFError, ConnectionResetError):
      self._process.join()
      raise UserError('the process of the baseline ended without an answer, exit code '
                         f'{self._process.exitcode}: is there memory for it?') from None
    if isinstance(answer, str):
      raise UserError(f'the baseline failed: {answer}')
    return answer


def _serve(pipe: Connection, build: Callable[..., Mapping[str, Program]],
           arguments: tuple[Any, ...]) -> None:
  try:
    programs = build(*arguments)
    pipe.send(0.0)
    while True:
      pipe.send(seconds_of(programs[pipe.recv()]))
  except EOFError:
    pass  # the other end is closed: no more is wanted
  except Exception as error:  # whatever it is, it is told over there
    pipe.send(f'{type(error).__name__}: {error}')


def seconds_of(program: Program) -> float:
  """Wall-clock time of one run."""
  begun = time.perf_counter()
  program()
  return time.perf_counter() - begun


def alternate(programs: Mapping[str, Callable[[], float]],
              repeats: int) -> dict[str, list[float]]:
  """Seconds of each program at every turn, after each has run once.

  Args:
    programs: by name, each runs once and returns what it took.
  """
  for run in programs.values():
    run()
  turns = [{name: run() for name, run in programs.items()} for _ in range(repeats)]
  return {name: [turn[name] for turn in turns] for name in programs}


CACHES = {'dynamic': None, 'static': 'static'}  # as its `generate` calls them


def build_programs(directory: Path, prompts: Mapping[str, Sequence[Sequence[int]]],
                   num_tokens: int, threads: int) -> dict[str, Program]:
  """Prefill and greedy generation of each batch of prompts, of the model in `directory`.

  Returns: programs '<batch> prefill', '<batch> dynamic' and '<batch> static', the latter two with
    their kind of cache.
  """
  import torch
  import transformers
  torch.set_num_threads(threads)
  model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()

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


def build_steps(directory: Path, tokens: Sequence[Sequence[int]],
                threads: int) -> dict[str, Program]:
  """Eager programs 'forward' and 'forward_backward' (of all weights) of the model in `directory`.

  Args:
    tokens: B texts of T ids.
  """
  import torch
  import transformers
  torch.set_num_threads(threads)
  # Eager attention is the one that has Gemma 2's soft-cap.
  model = transformers.AutoModelForCausalLM.from_pretrained(
      directory, attn_implementation='eager')
  ids = torch.tensor(tokens)

  def forward() -> None:
    with torch.inference_mode():
      model(ids, use_cache=False)

  def forward_backward() -> None:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()

  return {'forward': forward, 'forward_backward': forward_backward}
