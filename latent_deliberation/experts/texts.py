"""Texts that people name: to documents, to the words that set them apart, and to prompts.

A prompt is cut out of a document at a random place, together with the tokens that follow it. What
an expert saves on these tokens is its gain there.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from absl import logging

from latent_deliberation.data.corpus import open_corpus
from latent_deliberation.data.data_config import DataConfig
from latent_deliberation.data.text_files import list_files
from latent_deliberation.errors import UserError, check_integer
from latent_deliberation.experts.card import words_of
from latent_deliberation.inference.tokenizer import Tokenizer

STDLIB = 'stdlib'  # said in the place of files: the text of Python's standard library
STDLIB_TITLE = "Python's standard library"  # its name in cards
_TELLING = 8  # times as frequent as in general text
_MOST_BYTES = 8 << 20  # of a text whose documents are read
_MOST_CHARACTERS = 50_000  # of a document that is cut


def read_documents(data: DataConfig, split: str = '') -> list[str]:
  """Returns documents in a fixed random order, up to _MOST_BYTES.

  Args:
    data: where the text is.
    split: 'train' or 'validation'; '' for both.

  Raises:
    UserError: see `open_corpus`.
  """
  corpus, documents, size = open_corpus(data), [], 0
  for number in _shuffled(corpus.numbers(split) if split else np.arange(len(corpus.size))):
    if size >= _MOST_BYTES:
      break
    documents.append(corpus.read(number))
    size += int(corpus.size[number])
  return documents


def _shuffled(numbers: np.ndarray) -> np.ndarray:
  return np.random.default_rng(0).permutation(numbers)


def data_of(text: str, text_key: str = 'text') -> DataConfig:
  """Returns the data config that reads files, globs and folders, or 'stdlib'.

  Args:
    text: what to read, with commas between parts.
    text_key: field of a JSON line that holds its text.

  Raises:
    UserError: there is no part.
  """
  return (DataConfig(source=STDLIB) if text == STDLIB
          else DataConfig(source='text', files=text, text_key=text_key))


def documents_of(text: str, text_key: str = 'text') -> list[str]:
  """Returns the documents of a text; see `data_of` and `read_documents`."""
  return read_documents(data_of(text, text_key))


def sample_passages(text: str, characters: int, longest: int, text_key: str = 'text') -> list[str]:
  """Returns passages of many documents, as much of each part of a text.

  Whole documents would not do: a few long ones fill all rows, and a large folder most of them.

  Args:
    text, text_key: see `data_of`. A file that two parts name is of the first.
    characters: of all passages together; fewer where the text has no more.
    longest: characters of a passage.

  Raises:
    UserError: see `open_corpus`.
  """
  data = data_of(text, text_key)
  corpus = open_corpus(data)
  paths, piles = [file.path.resolve() for file in corpus.files], []
  most = math.ceil(characters / longest)  # documents of a part, and pieces of a document
  for part in data.files or ('',):
    mine = {file.path.resolve() for file in list_files((part,))} if part else set(paths)
    files = [index for index, path in enumerate(paths) if path in mine]
    paths = [None if path in mine else path for path in paths]
    numbers = _shuffled(np.flatnonzero(np.isin(corpus.file_of, files)))
    piles.append(_pile(map(corpus.read, numbers[:most]), longest, most))
  passages, sizes = [], [0] * len(piles)
  while any(piles) and sum(sizes) < characters:
    least = min((number for number, pile in enumerate(piles) if pile), key=sizes.__getitem__)
    passages.append(piles[least].popleft())
    sizes[least] += len(passages[-1])
  for part, size in zip(data.files, sizes, strict=False):
    logging.info('%d characters are of %s', size, part)
  return passages


def _pile(documents: Iterable[str], longest: int, most: int) -> collections.deque[str]:
  """Returns one passage of every document, then a second one of every document, and so on."""
  random, turns = np.random.default_rng(0), collections.defaultdict(list)
  for document in documents:
    pieces = math.ceil(len(document) / longest)
    ends = [len(document) * piece // pieces for piece in range(pieces + 1)]
    for turn, piece in enumerate(random.permutation(pieces)[:most]):
      turns[turn].append(document[ends[piece]:ends[piece + 1]])
  return collections.deque(itertools.chain.from_iterable(turns[turn] for turn in sorted(turns)))


def keywords_of(own: Sequence[str], general: Sequence[str], number: int = 64) -> list[str]:
  """Returns the words that set a text apart from general text, the most telling ones first.

  A word's weight is p log(p / q), with p its share of all words in `own` and q, smoothed, in
  `general`: its part of the divergence of the two (Kullback and Leibler 1951). Words with p below
  _TELLING q are left out, since general text of another style lacks many common words.

  Args:
    own, general: documents.
    number: largest number of words.
  """
  counts, others = (collections.Counter(word for text in texts for word in words_of(text))
                    for texts in (own, general))
  total, total_others = max(sum(counts.values()), 1), sum(others.values())
  vocabulary = len(counts.keys() | others.keys())

  def ratio(word: str) -> float:
    return counts[word] / total * (total_others + vocabulary) / (others[word] + 1)

  # A word that occurs once may be a name.
  telling = [word for word in counts if counts[word] > 1 and ratio(word) >= _TELLING]
  return sorted(telling, key=lambda word: (-counts[word] * math.log(ratio(word)), word))[:number]


# --- Prompts ---


@dataclasses.dataclass(frozen=True)
class Cut:
  """A prompt from a document, and what follows it there.

  Attributes:
    domain: name of the text.
    document: number of the document in its text. Cuts of one document are not independent.
    prompt: the prompt as text.
    ids: its ids, with the one that begins a text.
    ahead: ids of the tokens after it.
  """
  domain: str
  document: int
  prompt: str
  ids: list[int]
  ahead: list[int]


@dataclasses.dataclass(frozen=True)
class CutSizes:
  """Sizes of cuts, in tokens.

  Attributes:
    shortest, longest: of a prompt.
    ahead: tokens after a prompt.
    count: number of cuts of a text.
  """
  shortest: int = 32
  longest: int = 160
  ahead: int = 16
  count: int = 64

  def __post_init__(self):
    for name, value in vars(self).items():
      check_integer(name, value, 1)
    check_integer('longest', self.longest, self.shortest)


def cut_documents(domain: str, documents: Sequence[str], tokenizer: Tokenizer, sizes: CutSizes,
                  seed: int = 0) -> list[Cut]:
  """Cuts prompts out of documents: one of each, and more where there are too few.

  Raises:
    UserError: no document is long enough.
  """
  random = np.random.default_rng(seed)
  # A long document is read in part, which saves its tokenizer time.
  tokens = [tokenizer.encode(document[:_MOST_CHARACTERS])[1:]
            for document in documents[:4 * sizes.count]]
  usable = [number for number, ids in enumerate(tokens)
            if len(ids) >= sizes.shortest + sizes.ahead]
  if not usable:
    raise UserError(f'the text {domain!r} has no document of {sizes.shortest + sizes.ahead} tokens '
                    f'among {len(documents)}: give more text')
  cuts = []
  for turn in range(sizes.count):
    document = usable[turn % len(usable)]
    ids = tokens[document]
    length = int(random.integers(sizes.shortest, min(sizes.longest, len(ids) - sizes.ahead) + 1))
    start = int(random.integers(0, len(ids) - length - sizes.ahead + 1))
    prompt = ids[start:start + length]
    cuts.append(Cut(domain, document, tokenizer.decode(prompt), [tokenizer.bos, *prompt],
                    ids[start + length:start + length + sizes.ahead]))
  return cuts


def mix_cuts(first: Sequence[Cut], second: Sequence[Cut], tokenizer: Tokenizer) -> list[Cut]:
  """Returns prompts with a passage of each of two texts, of which the later one goes on.

  Which of the two is later alternates. Prompts count as of one document where they share that of
  the text with fewer documents.
  """
  mixed = []
  between = tokenizer.encode_more('\n\n')
  fewer = min((first, second), key=lambda cuts: len({cut.document for cut in cuts}))
  for number, pair in enumerate(zip(first, second, strict=False)):
    before, after = pair if number % 2 else pair[::-1]
    ids = [*before.ids, *between, *after.ids[1:]]
    mixed.append(Cut(f'{first[0].domain}+{second[0].domain}', fewer[number].document,
                     f'{before.prompt}\n\n{after.prompt}', ids, after.ahead))
  return mixed
