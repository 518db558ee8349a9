"""Decoder, coprocessor and tokenizer from disk, checked against each other."""

from pathlib import Path

from latent_deliberation.data.data_config import VOCABULARY_FILE
from latent_deliberation.deliberation import package
from latent_deliberation.deliberation.coprocessors import locate_package
from latent_deliberation.deliberation.description import (
  check_decoder,
  compare_frozen_dtype,
  describe,
)
from latent_deliberation.inference import tokenizer as tokenizers
from latent_deliberation.inference.gates import FittedGate
from latent_deliberation.inference.generator import Generator
from latent_deliberation.inference.tokenizer import Tokenizer
from latent_deliberation.model import weights
from latent_deliberation.model.fingerprint import fingerprint

NONE = 'none'  # in the place of a coprocessor


def open_generator(decoder: Path, coprocessor: str = '', vocabulary: str = '',
                   length: int = 2048,
                   gate: FittedGate | None = None) -> tuple[Generator, Tokenizer]:
  """A decoder and its coprocessor from disk; all that can be checked without weights is, first.

  Args:
    decoder: a directory of any format that `model.weights` reads.
    coprocessor: a trained package, or the work directory that holds it; '' or 'none' for none.
    vocabulary: path of a SentencePiece model, or 'byte'; '' for the decoder's own.
    length: tokens that a text may have.
    gate: to be checked against the decoder.

  Raises:
    FileNotFoundError: there is no decoder, coprocessor or vocabulary.
    ValueError: one of them is damaged, or they do not belong together.
  """
  checkpoint = weights.open_checkpoint(decoder)
  tokenizer = open_tokenizer(checkpoint, vocabulary)
  trained = None
  if coprocessor not in ('', NONE):
    place = locate_package(Path(coprocessor))
    trained = describe(place)
    if trained.model != checkpoint.config:
      raise ValueError(f'the coprocessor in {place} is for a decoder with {trained.model}, the one '
                       f'in {decoder} has {checkpoint.config}: give the decoder that it was '
                       'trained on')

  def check_digest(digest: str) -> None:
    if trained is not None:
      check_decoder(trained, digest)
    if gate is not None:
      gate.check_decoder(digest)

  if checkpoint.fingerprint:
    check_digest(checkpoint.fingerprint)
  params = checkpoint.load()
  digest = checkpoint.fingerprint or fingerprint(params)
  check_digest(digest)
  if trained is not None:
    compare_frozen_dtype(trained, params['embedder']['table'].dtype.name)
    trained = (trained.config, package.load(place).params)
  return Generator(checkpoint.config, params, length=length, coprocessor=trained,
                   fingerprint=digest), tokenizer


def open_tokenizer(checkpoint: weights.Checkpoint, vocabulary: str = '') -> Tokenizer:
  """The tokenizer that is asked for, or the one that lies beside a decoder or its run.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is not the one that the decoder was trained with.
  """
  if not vocabulary and checkpoint.vocabulary == tokenizers.ByteTokenizer.hash:
    vocabulary = tokenizers.BYTES
  if not vocabulary:
    directory = checkpoint.directory.absolute()
    places = [place / VOCABULARY_FILE for place in (directory, *directory.parents[:2])]
    found = checkpoint.tokenizer or next((path for path in places if path.is_file()), None)
    if found is None:
      raise FileNotFoundError(f'no vocabulary beside the decoder in {directory}: give --vocabulary='
                              f'PATH, its SentencePiece model, or --vocabulary={tokenizers.BYTES}')
    vocabulary = str(found)
  tokenizer = tokenizers.open_tokenizer(vocabulary)
  if checkpoint.vocabulary and tokenizer.hash != checkpoint.vocabulary:
    raise ValueError(f'the decoder in {checkpoint.directory} was trained with the vocabulary '
                     f'{checkpoint.vocabulary}, {vocabulary} is {tokenizer.hash}: give the '
                     'vocabulary.model of its data')
  if tokenizer.size > checkpoint.config.vocab_size:
    raise ValueError(f'{vocabulary} has {tokenizer.size} pieces, the decoder in '
                     f'{checkpoint.directory} has {checkpoint.config.vocab_size} embeddings: give '
                     'the vocabulary that it was trained with')
  return tokenizer
