"""The public API: text in, text out.

  import latent_deliberation as ld

  decoder = ld.load_decoder('runs/quickstart/pretraining/decoder')
  coprocessor = ld.load_coprocessor('runs/quickstart/coprocessor')
  generator = ld.Generator(decoder, coprocessor)
  completion, = generator.generate(['Once upon a time'], max_tokens=32)
  print(completion.text, completion.finish_reason)
  (nats, num_tokens), = generator.score(['2 + 2 ='], [' 4'])

  generator = ld.Generator(decoder, experts={'astronomy': ld.load_expert('experts/astronomy')})
  generator.generate(['The orbit of a comet', 'Dear'], expert=['astronomy', None])

A call runs on the first device, in batches whose caches fit 2 GiB, with jax set as launch scripts
set it. `inference.engine` and `inference.session` have more: meshes, latents at other places,
gates, and the background.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latent_deliberation.cli.app import settled_jax
from latent_deliberation.deliberation import coprocessor_checkpoint
from latent_deliberation.deliberation.coprocessor_checkpoint import (
  CoprocessorCheckpoint,
  locate_coprocessor,
)
from latent_deliberation.errors import UserError
from latent_deliberation.experts.added import added_directory, locate
from latent_deliberation.experts.attach import Choice, Experts, ExpertSource
from latent_deliberation.experts.package import Expert, load_package
from latent_deliberation.experts.routing import Router
from latent_deliberation.files import as_path
from latent_deliberation.inference import passes, session
from latent_deliberation.inference.background import LatentSource
from latent_deliberation.inference.decode import Sampling, check_seeds
from latent_deliberation.inference.engine import (
  Engine,
  LoadedDecoder,
  build_engine,
  read_decoder,
)
from latent_deliberation.inference.policy import NEVER, ONCE
from latent_deliberation.inference.prompt_arrays import (
  Prompts,
  check_anchors,
  check_prompts,
  check_room,
)
from latent_deliberation.inference.session import (
  Completion,
  DecodingOptions,
  batches,
  text_of,
  with_ends,
)
from latent_deliberation.inference.tokenizer import check_unicode, encode_chat, tokenizer_of
from latent_deliberation.model import weights
from latent_deliberation.model.products import DTYPES
from latent_deliberation.paths import GGUF

__all__ = ['Generator', 'Score', 'TextCompletion', 'UserError', 'load_coprocessor', 'load_decoder',
           'load_expert', 'score']


@settled_jax()
def load_decoder(path: str | Path, *, vocabulary: str | Path = '',
                 dtype: str = 'float32') -> LoadedDecoder:
  """Loads a frozen decoder: weights, config and tokenizer.

  Args:
    path: directory of a decoder in our format, Hugging Face's or Google's; a file in it; a GGUF
      file, or the directory that holds one; a name such as 'gemma3-270m'; or hf://ORG/NAME.
    vocabulary: path of a SentencePiece model or tokenizer.json, or 'byte'; '' for the one next to
      the decoder.
    dtype: dtype of the computation and the kv-cache, to which wider matrices are rounded.

  Raises:
    UserError: decoder or vocabulary is absent or damaged, they do not belong together, or dtype is
      unknown.
  """
  if dtype not in DTYPES:
    raise UserError(f'dtype = {dtype!r}: set one of {DTYPES}')
  path = as_path(os.path.expanduser(path))
  # A GGUF file is a whole decoder. Any other file stands for its directory.
  in_directory = path.is_file() and path.suffix != GGUF
  checkpoint = weights.open_checkpoint(path.parent if in_directory else path)
  return read_decoder(checkpoint, tokenizer_of(checkpoint, str(vocabulary)), dtype)


@settled_jax()
def load_coprocessor(directory: str | Path) -> CoprocessorCheckpoint:
  """Loads a trained coprocessor, with its transformer unstacked.

  Args:
    directory: the coprocessor/ that launch/train.py wrote, or the work directory of that run.

  Raises:
    UserError: it is absent or damaged.
  """
  loaded = coprocessor_checkpoint.load(locate_coprocessor(as_path(directory)))
  if 'transformer' not in loaded.params:
    return loaded
  unstacked = passes.unstack(loaded.params['transformer'])
  return dataclasses.replace(loaded, params={**loaded.params, 'transformer': unstacked})


@settled_jax()
def load_expert(package: str | Path) -> Expert:
  """Loads an expert, after all files of its package are checked.

  Args:
    package: directory that launch/experts.py train wrote; or NAME, or NAME@FINGERPRINT, of an
      expert that launch/experts.py add downloaded.

  Raises:
    UserError: it is absent, damaged or hostile.
  """
  return load_package(locate(str(package), added_directory()))


@dataclasses.dataclass
class TextCompletion(Completion):
  """Continuation of a prompt: text, tokens, logprobs (nats), finish_reason and latents_at.

  Attributes:
    experts: weight by name of the experts that made latents; empty for none.
  """
  text: str = ''
  experts: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Score(NamedTuple):
  """Log-likelihood of a continuation, in nats, and its number of tokens."""
  nats: float
  num_tokens: int


class Generator:
  """A decoder, with a coprocessor, with experts or alone, that continues and scores text.

  Attributes:
    tokenizer: turns text into ids and back.
    experts: the experts, which `experts.attach` and `experts.detach` change at any time; None for
      a generator without.
  """

  @settled_jax()
  def __init__(self, decoder: LoadedDecoder, coprocessor: CoprocessorCheckpoint | None = None, *,
               experts: Mapping[str, Expert | CoprocessorCheckpoint | str | Path] | None = None,
               router: str | Router = 'gain', strict: bool = False, length: int = 2048):
    """Puts them together; several generators may share a decoder.

    Args:
      experts: by name: what load_expert or load_coprocessor returned, or the directory of a
        package. They take the place of a coprocessor.
      router: what expert='auto' means; see `experts.routing`.
      strict: whether an expert that is damaged, foreign or unknown is an error. Otherwise its texts
        are the plain decoder's, and one warning says why.
      length: largest number of tokens of a text, prompt included.

    Raises:
      UserError: the coprocessor was trained on another decoder, or `length` is below 1 or does not
        fit the memory. With `strict`, see `Experts.attach`.
    """
    if not isinstance(decoder, LoadedDecoder):
      raise UserError(f'decoder = {decoder!r:.80}: give what load_decoder returns')
    if not isinstance(coprocessor, CoprocessorCheckpoint | None):
      raise UserError(f'coprocessor = {coprocessor!r:.80}: give what load_coprocessor returns')
    if coprocessor is not None and experts is not None:
      raise UserError('coprocessor and experts are both given: give one of the two; experts may '
                      'hold a coprocessor')
    self.experts = None
    if experts is not None:
      self.experts = Experts(decoder, experts, length=length, strict=strict, router=router)
    else:
      self._engine = build_engine(decoder, coprocessor, length)
    self.tokenizer = decoder.tokenizer

  @property
  def engine(self) -> Engine:
    """The engine that runs the decoder on ids."""
    return self._engine if self.experts is None else self.experts.engine

  @settled_jax()
  def generate(self, prompts: Sequence[str], *, max_tokens: int = 64, augment: bool | None = None,
               expert: Choice | Sequence[Choice] = None,
               stop: Sequence[str] = (), temperature: float = 0.0, top_k: int | None = None,
               top_p: float = 1.0, min_p: float = 0.0, seeds: Sequence[int] | None = None,
               chat: bool = False, batch_size: int = 0) -> list[TextCompletion]:
    """Continues each prompt.

    Args:
      prompts: texts. An empty one is continued from the beginning of a text.
      max_tokens: largest number of tokens to decode for a prompt.
      augment: whether latents are made at the end of each prompt; None if there is a coprocessor.
      expert: expert of all prompts, or a list with one for each prompt: a name, a mapping from
        names to weights, 'auto' for what the router chooses, or None for none.
      stop: strings that end a text and are not part of it.
      temperature, top_k, top_p, min_p: see `inference.decode.Sampling`; 0 is greedy.
      seeds: one for each prompt; default 0, 1, 2, ...
      chat: whether each prompt is the first turn of a conversation, which the chat template of the
        decoder's model frames.
      batch_size: prompts that are decoded together; 0 for as many as fit 2 GiB. Only
        rounding depends on it.

    Raises:
      UserError: a prompt is too long or too short, an option is out of range, or there is no chat
        template.
    """
    options = with_ends(
        DecodingOptions(max_tokens, Sampling(temperature, top_k, top_p, min_p)),
        self.tokenizer, _texts('stop', stop))
    if chat:
      ids = [encode_chat(self.tokenizer, [{'role': 'user', 'content': prompt}])
             for prompt in _texts('prompts', prompts)]
    else:
      ids = [self.tokenizer.encode(prompt) for prompt in _texts('prompts', prompts)]
    # Check everything before the first batch is decoded.
    seeds = check_seeds(seeds, len(ids))
    self._check_prompts(ids)
    lengths = np.array(list(map(len, ids)))
    sources = self._sources(augment, expert, prompts, lengths)
    check_room(lengths, max_tokens, self.engine.model.plan.global_slots)
    completions, taken = [], []
    for batch in batches(self.engine, len(ids), batch_size):
      source = sources(batch)
      # The same latents as in `score`: once, at the end of the prompt.
      completions += session.generate(
          self.engine, ids[batch], dataclasses.replace(options, policy=ONCE if source else NEVER),
          seeds[batch], source)
      taken += getattr(source, 'mixes', [{}] * (batch.stop - batch.start))
    return [TextCompletion(**vars(completion),
                           text=text_of(completion, self.tokenizer, stop, prompt),
                           experts=mix if completion.latents_at else {})
            for completion, prompt, mix in zip(completions, ids, taken, strict=True)]

  @settled_jax()
  def score(self, prompts: Sequence[str], continuations: Sequence[str], *,
            augment: bool | None = None, expert: Choice | Sequence[Choice] = None,
            batch_size: int = 0) -> list[Score]:
    """Scores one given continuation of each prompt (teacher forcing).

    Latents are made once, at the end of the prompt. Prompt and continuation are tokenised apart.

    Args:
      augment, expert, batch_size: see `generate`.

    Raises:
      UserError: there is not one continuation for each prompt, or a text is too long or too short.
    """
    engine, encode_more = self.engine, self.tokenizer.encode_more
    before = [self.tokenizer.encode(text) for text in _texts('prompts', prompts)]
    after = [encode_more(text) for text in _texts('continuations', continuations)]
    if len(before) != len(after):
      raise UserError(f'{len(before)} prompts and {len(after)} continuations: give one for each')
    if [] in after:
      raise UserError(f'continuation {after.index([])} is empty: there is nothing to score')
    # Check all texts before the first batch is read.
    self._check_prompts(before)
    lengths = np.array(list(map(len, before)))
    check_room(lengths + list(map(len, after)), 0, engine.model.plan.global_slots)
    sources = self._sources(augment, expert, prompts, lengths)
    scores = []
    for batch in batches(engine, len(before), batch_size):
      state, source = engine.read(before[batch]), sources(batch)
      rows = np.zeros(0, bool) if source is None else source.wants(state)
      if rows.any():
        # Latents that are not finite are left out by `attach`.
        latents = source.augment(state)
        if not np.asarray(latents.finite)[rows].all():
          engine.warn('some are not finite')
        state = engine.attach(state, latents, rows)
      scores += [Score(float(logprobs.sum(dtype=np.float64)), len(logprobs))
                 for logprobs in engine.score_on(state, after[batch])]
    return scores

  def _sources(self, augment: bool | None, expert: Choice | Sequence[Choice],
               texts: Sequence[str], lengths: np.ndarray,
               ) -> Callable[[slice], LatentSource | None]:
    """Returns what makes the latents of a batch; the function returns None for the plain decoder.

    Raises:
      UserError: nothing makes the requested latents, or a text is too short for them.
    """
    is_one = expert is None or isinstance(expert, str | Mapping)
    choices = [expert] * len(texts) if is_one else list(expert)
    if len(choices) != len(texts):
      raise UserError(f'expert = {expert!r:.80}: {len(choices)} for {len(texts)} prompts: give '
                      'one, or one for each')
    if self.experts is None:
      if any(choices):
        raise UserError(f'expert = {expert!r:.80} without experts: give them to Generator')
      if not self._augments(augment):
        return lambda batch: None
      check_anchors(lengths, self.engine.first_anchor)
      return lambda batch: self.engine
    if augment not in (None, False):
      raise UserError(f'augment = {augment!r}: with experts, give None, or False for none at all')
    mixes = [self.experts.mix(None if augment is False else choice) for choice in choices]
    self.experts.check_lengths(mixes, lengths)

    def source(batch: slice) -> LatentSource | None:
      found = ExpertSource(self.experts, mixes[batch], texts[batch])
      return None if found.is_plain else found

    return source

  def _augments(self, augment: bool | None) -> bool:
    """Returns whether to make latents, by default if there is a coprocessor."""
    if augment not in (None, True, False):
      raise UserError(f'augment = {augment!r}: give True, False or None')
    available = self.engine.model.coprocessor is not None
    if augment and not available:
      raise UserError('augment = True without a coprocessor, which makes the latents: give one to '
                      'Generator')
    return available if augment is None else augment

  def _check_prompts(self, ids: Prompts) -> None:
    check_prompts(ids, np.zeros(len(ids)), self.engine.model.decoder.config.vocab_size)


def score(generator: Generator, prompts: Sequence[str], continuations: Sequence[str],
          **options: Any) -> list[Score]:
  """Scores one given continuation of each prompt; the same as `Generator.score`."""
  return generator.score(prompts, continuations, **options)


def _texts(name: str, texts: Sequence[str]) -> Sequence[str]:
  if isinstance(texts, str):
    raise UserError(f'{name} = {texts!r}: give a list of texts, not one')
  for text in texts:
    if not isinstance(text, str):
      raise UserError(f'{name} holds {text!r}: give texts')
    check_unicode(text, f'one of {name}')
  return texts
