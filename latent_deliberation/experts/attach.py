"""Experts attached to one frozen decoder at run time, and detached again.

The decoder reads a prompt once, whichever experts follow. An expert reads the cache and adds its
part to the latents of the texts that asked for it, in one pass for all of them. The decoder then
reads the latents of the whole batch and decodes it as any other. So experts cost their own weights
in memory, one pass where latents are made, and nothing for a decoded token.

What a text asks for:
  'astronomy'                        one expert
  {'astronomy': 0.5, 'law': 0.5}     several: z = base + sum of weight * gate(output)
  'auto'                             the one that the router expects to help most, or none
  None or 'none'                     none, which is the plain decoder
"""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from latent_deliberation.array_types import Array
from latent_deliberation.deliberation.coprocessor_checkpoint import CoprocessorCheckpoint
from latent_deliberation.deliberation.deliberation_config import DeliberationConfig
from latent_deliberation.errors import UserError, check_number
from latent_deliberation.experts.card import AUTO, NONE, Card, check_name
from latent_deliberation.experts.package import Expert, Routing, load_package, read_card
from latent_deliberation.experts.routing import Known, Query, Router, choose, make_router
from latent_deliberation.inference import passes
from latent_deliberation.inference.engine import (
  Engine,
  LoadedDecoder,
  check_coprocessor,
  check_match,
)
from latent_deliberation.inference.passes import Augmentation, Model, State, Weights
from latent_deliberation.inference.prompt_arrays import check_anchors
from latent_deliberation.model.weights import round_matrices

Choice = str | Mapping[str, float] | None  # what a text asks for
Mix = Mapping[str, float]  # weight by name of an attached expert; empty for none
_NO_EXPERT: Mix = {}


@dataclasses.dataclass(frozen=True)
class Attached:
  """An expert on the decoder. Its adapters are its own, and all other weights are the decoder's.

  Attributes:
    model, weights: what the programs of `inference.passes` take.
    card, routing: see `Expert`; None for a coprocessor without a card.
  """
  model: Model
  weights: Weights
  card: Card | None = None
  routing: Routing | None = None


class Experts:
  """The experts of one decoder, by name.

  Attributes:
    engine: runs the decoder, and has room for the latents of the experts.
    strict: whether an expert that cannot be attached, or is not known, is an error. Otherwise the
      text is the plain decoder's, and one warning says why.
  """

  def __init__(self, decoder: LoadedDecoder, experts: Mapping[str, Expert | CoprocessorCheckpoint |
                                                              str | Path] | None = None, *,
               length: int = 2048, strict: bool = False, router: str | Router = 'gain'):
    """Attaches experts.

    Args:
      decoder: the frozen decoder.
      experts: by name: what `load_expert` or `load_coprocessor` returned, or the directory of a
        package.
      length: largest number of tokens of a text, prompt included.
      strict: see above.
      router: what 'auto' means: a name in `routing.ROUTERS`, or a Router.

    Raises:
      UserError: `length` or `router` is bad; with `strict`, see `attach`.
    """
    self.strict, self._decoder, self._length = strict, decoder, length
    self._attached: dict[str, Attached] = {}
    self._latents: DeliberationConfig | None = None  # what all experts have in common
    self._router = router
    self._made_router: tuple[Mapping[str, Attached] | None, Router | None] = None, None
    self._said: dict[str, str] = {}  # what was warned of, by name
    self.engine = self._build(None)
    for name, expert in (experts or {}).items():
      self.attach(name, expert)
    if isinstance(router, str):
      make_router(router, {})  # an unknown name is noticed now

  @property
  def names(self) -> tuple[str, ...]:
    """Names of the attached experts."""
    return tuple(self._attached)

  @property
  def first_anchor(self) -> int:
    """Least index of a token that latents may follow; 0 without experts."""
    return self._latents.first_anchor if self._latents else 0

  def card(self, name: str) -> Card | None:
    """Returns the card of an attached expert; None where it has none, or is not attached."""
    attached = self._attached.get(name)
    return None if attached is None else attached.card

  def attach(self, name: str, expert: Expert | CoprocessorCheckpoint | str | Path) -> bool:
    """Attaches an expert, and returns whether it is attached now.

    Raises:
      UserError: the name is attached already. With `strict` also: the package is absent or damaged,
        was made for another decoder or vocabulary, or its latents differ from those of the others.
    """
    check_name(name)
    if name in self._attached:
      raise UserError(f'an expert {name!r} is attached already: give another name, or detach that '
                      'one first')
    try:
      expert = self._check(name, expert)
    except UserError as error:
      if self.strict:
        raise
      self._warn(name, str(error))
      return False
    latents = _common(expert.coprocessor.config)
    if self._latents != latents:
      self._latents, self.engine = latents, self._build(latents)
    self._attached = {**self._attached, name: self._assemble(expert)}
    self._said.pop(name, None)
    return True

  def detach(self, name: str) -> None:
    """Detaches an expert. Texts that hold its latents keep them.

    Raises:
      UserError: there is no such expert.
    """
    if name not in self._attached:
      raise UserError(f'no expert {name!r} is attached, but {list(self._attached)}: give one of '
                      'these')
    self._attached = {other: each for other, each in self._attached.items() if other != name}
    self._made_router = None, None  # it holds what it knows of the expert

  def mix(self, choice: Choice) -> Mix | str:
    """Returns weights by name for what a text asks for; 'auto' stays.

    Raises:
      UserError: it is malformed, or several experts do not add up. With `strict` also: an expert is
        unknown.
    """
    if choice is None or choice == NONE:
      return _NO_EXPERT
    if choice == AUTO:
      return AUTO
    weights = {choice: 1.0} if isinstance(choice, str) else choice
    if not isinstance(weights, Mapping) or not weights:
      raise UserError(f'expert = {choice!r:.80}: give a name, a mapping from names to weights, '
                      f'{AUTO!r} or None')
    for name, weight in weights.items():
      check_number(f'weight of the expert {name!r}', weight, -math.inf)
      if name not in self._attached:
        if self.strict:
          raise UserError(f'no expert {name!r} is attached, but {list(self._attached)}: give one '
                          'of these')
        if name not in self._said:  # else it was told why it could not be attached
          self._warn(name, f'it is none of the attached experts {list(self._attached)}')
        return _NO_EXPERT
    # A weight of zero is no expert.
    mix = {name: weight for name, weight in weights.items() if weight}
    if not self.add_up and list(mix.values()) not in ([], [1.0]):
      raise UserError(f'expert = {choice!r:.80}: only refining latents have weights and add up, '
                      f'and these experts have {self._latents.latents} latents: give one name')
    return mix

  @property
  def add_up(self) -> bool:
    """Whether several of these experts may be attached to a text, or one by a weight."""
    return self._latents is None or self._latents.latents == 'refining'

  def source(self, choices: Sequence[Choice], texts: Sequence[str] = ()) -> 'ExpertSource':
    """Returns the source of latents for one batch, for `session.stream` and its callers.

    Args:
      choices: what each text asks for.
      texts: the prompts, which some routers read; needed for 'auto' alone.

    Raises:
      UserError: see `mix`.
    """
    return ExpertSource(self, [self.mix(choice) for choice in choices], texts)

  def check_lengths(self, mixes: Sequence[Mix | str], lengths: np.ndarray,
                    names: Sequence[str] = ()) -> None:
    """Raises UserError where a text that names an expert is too short for latents.

    Args:
      mixes: what `mix` returned for each text.
      lengths: number of tokens of each text.
      names: see `check_anchors`.
    """
    needing = [number for number, mix in enumerate(mixes) if mix and mix != AUTO]
    titles = names or [f'text {number}' for number in range(len(lengths))]
    if needing:
      check_anchors(np.asarray(lengths)[needing], self.first_anchor,
                    [titles[number] for number in needing])

  def route(self, query: Query) -> list[Mix]:
    """Returns the mix that the router chooses for each text. A router that fails chooses none."""
    try:
      router = self.router()
      names = choose(router, router.scores(query))
      if unknown := set(names) - {None, *self._attached}:
        raise ValueError(f'it chose {sorted(unknown)}, which are not attached')
      return [_NO_EXPERT if name is None else {name: 1.0} for name in names]
    except Exception as error:  # whatever it is, it must not stop the decoder
      if self.strict:
        raise
      self._warn(AUTO, f'the router failed ({type(error).__name__}: {error})')
      return [_NO_EXPERT] * len(query.hidden)

  def router(self) -> Router:
    """Returns the router over the experts that are attached now."""
    if not isinstance(self._router, str):
      return self._router
    # A server attaches in one thread and routes in others, so a router knows for whom it was made.
    attached, (made_for, router) = self._attached, self._made_router
    if made_for is not attached:
      router = make_router(self._router, _known(attached))
      self._made_router = attached, router
    return router

  def known(self) -> dict[str, Known]:
    """Returns what routers may know of the experts that are attached now."""
    return _known(self._attached)

  def augment(self, state: State, mixes: Sequence[Mix]) -> Augmentation:
    """Makes latents for the end of every text; those of texts without an expert mean nothing.

    Args:
      state: the texts, which stay as they are.
      mixes: weights by name for each text. Texts beyond them get no expert.
    """
    return self.read_latents(state, self.outputs(state, mixes))

  def outputs(self, state: State, mixes: Sequence[Mix]) -> Array:
    """Returns what the experts add to the embeddings of base tokens, [B, Z, D]; see `augment`.

    Texts are grouped by expert: each expert reads the caches of its texts in one pass.
    """
    config, batch = self._latents, len(state.position)
    added = jnp.zeros((batch, config.num_latents, state.hidden.shape[1]), state.hidden.dtype)
    for name in dict.fromkeys(name for mix in mixes for name in mix):
      each = self._attached[name]
      scale = np.zeros(batch, np.float32)
      scale[:len(mixes)] = [mix.get(name, 0.0) for mix in mixes]
      rows = np.flatnonzero([name in mix for mix in mixes])
      if len(rows) == batch:
        added = _add(each.model, each.weights, state, None, scale, added)
      elif len(rows):
        # Padded to a power of two, so that few programs are compiled. Padding is written nowhere.
        padding = min(batch, 1 << (len(rows) - 1).bit_length()) - len(rows)
        chosen = np.concatenate([rows, np.full(padding, batch)])
        added = _add(each.model, each.weights, state, chosen,
                     np.concatenate([scale[rows], np.zeros(padding, np.float32)]), added)
    return added

  def read_latents(self, state: State, outputs: Array) -> Augmentation:
    """The decoder reads latents for the end of every text; `outputs` as the method gives them."""
    return passes.read_latents(self.reader, self.engine.weights, state, outputs)

  @property
  def latents(self) -> DeliberationConfig | None:
    """Number, form and place of the latents of all experts; None while there are none."""
    return self._latents

  @property
  def reader(self) -> Model:
    """The static part of programs that read latents of these experts."""
    return self.engine.model.with_coprocessor(self._latents)

  def _build(self, room: DeliberationConfig | None) -> Engine:
    decoder = self._decoder
    return Engine(decoder.config, decoder.params, length=self._length, dtype=decoder.dtype,
                  decoder_fingerprint=decoder.fingerprint, room=room)

  def _check(self, name: str, expert: Expert | CoprocessorCheckpoint | str | Path) -> Expert:
    """Returns an expert that fits the decoder and the experts attached before."""
    if isinstance(expert, str | Path):
      # The card is small. So nothing of another decoder is loaded, however large it is.
      directory = Path(os.path.expanduser(expert))
      card = read_card(directory)
      if card.base['fingerprint'] != self._decoder.fingerprint:
        raise UserError(f'the expert {name!r} was made for {card.base["name"]}, weights '
                        f'{card.base["fingerprint"]}, and this decoder has '
                        f'{self._decoder.fingerprint}: attach it to that decoder')
      expert = load_package(directory)
    if isinstance(expert, CoprocessorCheckpoint):
      expert = Expert(None, expert)
    if not isinstance(expert, Expert):
      raise UserError(f'experts[{name!r}] = {expert!r:.80}: give what load_expert returns, or the '
                      'directory of a package')
    decoder, trained = self._decoder, expert.coprocessor
    try:
      check_match(decoder.config, decoder.fingerprint, trained, None)
      check_coprocessor(decoder.config, trained.config, trained.params)
    except UserError as error:
      raise UserError(f'expert {name!r}: {error}') from error
    if trained.vocabulary_hash != decoder.tokenizer.hash:
      raise UserError(f'the expert {name!r} was trained with vocabulary '
                      f'{trained.vocabulary_hash}, and this decoder reads '
                      f'{decoder.tokenizer.hash}: give the vocabulary that it was trained with')
    config = _common(trained.config)
    if self._attached and self._latents != config:
      raise UserError(
          f'the expert {name!r} has {config.num_latents} {config.latents} latents, and those '
          f'attached before have {self._latents.num_latents} {self._latents.latents} ones: all '
          'experts of a generator need the same number, form and positions of latents. Use two '
          'generators, which may share the decoder')
    return expert

  def _assemble(self, expert: Expert) -> Attached:
    decoder, trained, engine = self._decoder, expert.coprocessor, self.engine
    # What only training reads is left out, so that experts of one rank share their programs.
    config = dataclasses.replace(self._latents, **{
        key: getattr(trained.config, key) for key in (
            'trainable', 'num_layers', 'gate', 'soft_tokens', 'lora_rank', 'lora_alpha')})
    model = engine.model.with_coprocessor(config)
    weights = passes.assemble(
        decoder.params, trained.config, round_matrices(trained.params, decoder.dtype))
    return Attached(model, weights, expert.card, expert.routing)

  def _warn(self, name: str, reason: str) -> None:
    """Logs once for each name and reason why there are no latents."""
    if self._said.get(name) != reason:
      logging.warning('No latents of the expert %r: %s. The decoder continues without them. This '
                      'is logged once.', name, reason)
    self._said[name] = reason


def _known(attached: Mapping[str, Attached]) -> dict[str, Known]:
  return {name: Known(each.card, each.routing, each.model, each.weights)
          for name, each in attached.items()}


def _common(config: DeliberationConfig) -> DeliberationConfig:
  """Returns a config with nothing but the place, the form and the number of latents."""
  return DeliberationConfig(config.num_latents, num_ahead=1, num_traces=1, latents=config.latents,
                            positions=config.positions)


@functools.partial(jax.jit, static_argnums=0)
def _add(model: Model, weights: Weights, state: State, rows: Array | None, scale: Array,
         added: Array) -> Array:
  """Adds an expert's part, times `scale`, to the latents of the texts `rows`; None for all.

  Numbers beyond the batch are padding: the last text is read for them, and nothing is written.
  """
  if rows is None:
    return added + scale[:, None, None].astype(added.dtype) * passes.coprocess(
        model, weights, state)
  own = jax.tree.map(lambda leaf: leaf.at[rows].get(mode='clip') if leaf.ndim else leaf, state)
  part = scale[:, None, None].astype(added.dtype) * passes.coprocess(model, weights, own)
  return added.at[rows].add(part, mode='drop')


class ExpertSource:
  """The experts of the texts of one batch: a `background.LatentSource`.

  Attributes:
    mixes: weights by name for each text; 'auto' until the text's prompt is read.
  """

  def __init__(self, experts: Experts, mixes: Sequence[Mix | str], texts: Sequence[str] = ()):
    self.mixes, self._experts, self._texts = list(mixes), experts, texts

  @property
  def is_plain(self) -> bool:
    """Whether no text may get latents."""
    return not any(self.mixes)

  def wants(self, state: State) -> np.ndarray:
    """Routes the texts that are 'auto', on the first call; returns the texts with experts."""
    undecided = [number for number, mix in enumerate(self.mixes) if mix == AUTO]
    if undecided:
      routed = self._experts.route(Query(self._texts, np.asarray(state.hidden), state))
      for number in undecided:
        self.mixes[number] = routed[number]
    wanted = np.zeros(len(state.position), bool)
    wanted[:len(self.mixes)] = [bool(mix) for mix in self.mixes]
    # Only 'auto' may meet a text that is too short for latents.
    return wanted & (np.asarray(state.lengths) > self._experts.first_anchor)

  def augment(self, state: State) -> Augmentation:
    """See `Experts.augment`."""
    return self._experts.augment(state, self.mixes)
