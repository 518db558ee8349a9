"""--expert of the command line: which experts to attach, and which each prompt gets."""

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging

from latent_deliberation.api import load_coprocessor, load_decoder
from latent_deliberation.cli.generate import Request, Writer
from latent_deliberation.deliberation.coprocessor_checkpoint import (
  DESCRIPTION,
  CoprocessorCheckpoint,
)
from latent_deliberation.errors import UserError
from latent_deliberation.experts.added import added_directory, list_added, locate
from latent_deliberation.experts.attach import Choice, Experts
from latent_deliberation.experts.card import AUTO, NONE
from latent_deliberation.experts.package import read_card
from latent_deliberation.experts.routing import ROUTERS
from latent_deliberation.files import as_path
from latent_deliberation.inference.background import LatentSource
from latent_deliberation.inference.engine import LoadedDecoder
from latent_deliberation.inference.policy import NEVER, FittedGate


def load_named(decoder: str) -> LoadedDecoder:
  """Loads the decoder of --decoder. Raises UserError where it is missing or damaged."""
  if not decoder:
    raise UserError('--decoder is missing: give a directory, a GGUF file or a name')
  return load_decoder(decoder)


def parse_expert(written: str) -> tuple[Choice, str]:
  """Returns what --expert asks for, with packages as they were written, and the router's name.

  Args:
    written: 'none'; 'auto', or 'auto:ROUTER'; or packages with commas, each with ':WEIGHT' or not.

  Raises:
    UserError: it is malformed.
  """
  if written == NONE:
    return None, ''
  word, _, router = written.partition(':')
  if word == AUTO:
    if router and router not in ROUTERS:
      raise UserError(f'--expert={written}: choose one of {[f"auto:{name}" for name in ROUTERS]}')
    return AUTO, router or 'gain'
  mix = {}
  for part in filter(None, map(str.strip, written.split(','))):
    found = re.fullmatch(r'(.+?)(?::(-?\d+(?:\.\d*)?(?:e-?\d+)?))?', part)
    package, weight = found[1], float(found[2] or 1)
    if package in mix:
      raise UserError(f'--expert={written}: {package} is there twice: give one weight for it')
    mix[package] = weight
  if not mix:
    raise UserError(f"--expert={written}: give a name, a package, 'a:0.5,b:0.5', 'auto' or 'none'")
  return mix, ''


def attach_named(decoder: LoadedDecoder, packages: Sequence[str], *, length: int, strict: bool,
                 router: str = 'gain') -> tuple[Experts, dict[str, str]]:
  """Attaches packages by name or directory; returns the experts, and package -> name.

  A directory may also hold a coprocessor without a card, which is named after its directory.

  Raises:
    UserError: two packages have one name; with `strict`, one cannot be attached.
  """
  experts = Experts(decoder, {}, length=length, strict=strict, router=router)
  names: dict[str, str] = {}
  for package in packages:
    try:
      place: Path | CoprocessorCheckpoint = as_path(os.path.expanduser(package))
      if (place / DESCRIPTION).is_file():
        name, place = _name_directory(place, experts.names), load_coprocessor(place)
      else:
        place = locate(package, added_directory())
        name = read_card(place).name
    except UserError as error:
      if strict:
        raise
      logging.warning('No latents of the expert %r: %s. The decoder continues without them.',
                      package, error)
      continue
    if experts.attach(name, place):
      names[package] = name
  return experts, names


def _name_directory(directory: Path, taken: Sequence[str]) -> str:
  """Returns a name for the expert in a directory, which none of those that are `taken` has."""
  name = re.sub('[^a-z0-9]+', '-', directory.absolute().name.lower())[:32].strip('-')
  name = 'own' if name in ('', AUTO, NONE) else name
  return next(each for number in itertools.count(1)
              if (each := name if number == 1 else f'{name}-{number}') not in taken)


def fitting(decoder_fingerprint: str) -> list[str]:
  """Returns the directories of a decoder's added experts; of several with one name, the newest.

  Raises:
    UserError: there are none.
  """
  directory = added_directory()
  added = sorted(list_added(directory), key=lambda each: each[1].stat().st_mtime)
  found = {card.name: str(path) for card, path in added
           if card.base['fingerprint'] == decoder_fingerprint}
  if not found:
    raise UserError(f'{directory} has no expert of this decoder: add some with launch/experts.py '
                    'add')
  return list(found.values())


def attach_choice(decoder: LoadedDecoder, expert: str, *, length: int, strict: bool,
                  ) -> tuple[Experts, Choice]:
  """Attaches what --expert names; returns the experts, and what a text asks of them.

  Args:
    expert: see `parse_expert`.
    strict: whether an expert that cannot be attached is an error; else the text is plain.

  Raises:
    UserError: --expert is malformed, or 'auto' without an added expert of this decoder.
  """
  choice, router = parse_expert(expert)
  packages = fitting(decoder.fingerprint) if choice == AUTO else list(choice or ())
  experts, names = attach_named(decoder, packages, length=length, strict=strict,
                                router=router or 'gain')
  if choice not in (None, AUTO):
    # Without one of several, the text is the plain decoder's.
    choice = {names[package]: weight for package, weight in choice.items()
              } if len(names) == len(packages) else None
  return experts, choice


def open_writer(request: Request, decoder: str, coprocessor: str, expert: str, strict: bool,
                vocabulary: str, length: int, gate: FittedGate | None,
                dtype: str = 'float32') -> Writer:
  """Returns a writer with experts; see `generate.open_writer`."""
  if coprocessor not in ('', NONE):
    raise UserError(f'--coprocessor={coprocessor} and --expert={expert}: give one of the two')
  if request.cache:
    raise UserError(f'--cache={request.cache} has the latents of a coprocessor, and --expert makes '
                    'others: leave one of them out')
  parse_expert(expert)  # before the decoder is loaded
  loaded = load_decoder(as_path(decoder), vocabulary=vocabulary, dtype=dtype)
  if gate is not None:
    gate.check_decoder(loaded.fingerprint)
  experts, choice = attach_choice(loaded, expert, length=length, strict=strict)

  def sources(prompts: Sequence[str]) -> LatentSource:
    return experts.source([choice] * len(prompts), prompts)

  def check_experts(lengths: np.ndarray, names: Sequence[str]) -> None:
    experts.check_lengths([experts.mix(choice)] * len(lengths), lengths, names)

  sources(['x'])  # a mix that does not add up is noticed now
  return Writer(experts.engine, loaded.tokenizer, request, sources=sources,
                check_experts=check_experts if request.options.policy != NEVER else None)
