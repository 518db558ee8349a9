"""Commands that use experts: ask a folder of documents, measure that, export embeddings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import logging

from latent_deliberation.cli.attached import attach_choice, load_named, parse_expert
from latent_deliberation.errors import UserError
from latent_deliberation.experts.attach import Choice, Experts
from latent_deliberation.experts.card import AUTO
from latent_deliberation.experts.passages import Passage, check_passage_size
from latent_deliberation.experts.prompt_embeds import EMBEDS, embed_prompt, export
from latent_deliberation.experts.retrieval import (
  Library,
  address_of,
  ask,
  check_question,
  open_library,
)
from latent_deliberation.experts.retrieval_trial import (
  SPLITS,
  Question,
  RetrievalTrial,
  check_askable,
  hash_of,
  long_enough,
  passages_of,
  read_questions,
  run_trial,
  summarise,
  write_summary,
)
from latent_deliberation.files import as_path, check_free, is_here, lock, make_writable
from latent_deliberation.inference.engine import LoadedDecoder
from latent_deliberation.inference.tokenizer import check_unicode


def open_choice(decoder_name: str, expert: str, length: int, strict: bool,
                ) -> tuple[LoadedDecoder, Experts, Choice]:
  """Loads a decoder, attaches what --expert names, and returns both with what a text asks for.

  Args:
    expert: see `attached.parse_expert`.
    strict: whether an expert that cannot be attached is an error; else the text is plain.

  Raises:
    UserError: no decoder is given, or --expert is malformed.
  """
  parse_expert(expert)  # before the decoder is loaded
  decoder = load_named(decoder_name)
  experts, choice = attach_choice(decoder, expert, length=length, strict=strict)
  return decoder, experts, choice


def ask_documents(question: str, *, decoder: str, documents: str, expert: str, at: str,
                  passage: int, max_tokens: int, length: int, store: str = '') -> None:
  """Prints the answer to a question, and where it is from.

  Raises:
    UserError: see `read_passages` and `retrieval.ask`.
  """
  if not documents:
    raise UserError('ask: give --documents=DIR, a folder of text')
  if not Path(documents).is_dir():
    raise UserError(f'--documents={documents}: there is no such folder')
  check_unicode(question, 'the question')
  check_question(question, at, max_tokens)
  check_passage_size(passage)
  if passage + max_tokens >= length:
    raise UserError(f'--passage={passage} and --max_tokens={max_tokens} do not fit into '
                    f'--length={length} beside a question: raise --length, or lower one of the two')
  loaded, experts, choice = open_choice(decoder, expert, length, strict=False)
  library = open_library(Path(documents), experts, loaded.tokenizer, size=passage,
                         store=Path(store) if store else None)
  answer = ask(library, experts, loaded.tokenizer, question, choice=choice, at=at,
               max_tokens=max_tokens)
  print(answer.text or '(the answer is empty)')
  print(f'\nfrom {answer.source} (BM25 {answer.score:.2f})' if answer.source else
        '\nNo document has a word of the question, so this is what the decoder says without one.')
  used = ', '.join(f'{name} {weight:g}' for name, weight in answer.experts.items()) or 'none'
  print(f'experts: {used}{f"; {answer.fault}" if answer.fault else ""}')
  print('seconds: ' + ', '.join(f'{part} {taken:.2f}' for part, taken in answer.seconds.items()))


def export_prompt(prompt: str, *, decoder: str, expert: str, output: str, format: str, length: int,
                  overwrite: bool) -> None:
  """Writes a prompt with latents as other engines take it, and prints where.

  Raises:
    UserError: the format is unknown, the output exists, or see `embed_prompt`.
  """
  if format != EMBEDS:
    raise UserError(f'--format={format}: give {EMBEDS}')
  if not prompt or not output:
    raise UserError('export: give --text=PROMPT and --output=DIR')
  directory = as_path(output)
  check_free([directory / f'{EMBEDS}.{end}' for end in ('safetensors', 'json')], overwrite)
  check_unicode(prompt, '--text')
  loaded, experts, choice = open_choice(decoder, expert, length, strict=True)
  make_writable(directory.absolute())
  found = embed_prompt(experts, loaded.tokenizer, prompt, choice)
  paths = export(directory, found, Path(decoder).name, loaded.fingerprint)
  used = ', '.join(found.experts) or 'none'
  print(f'{paths[0]}: {found.values.shape[0]} embeddings, experts: {used}. {paths[1].name} has the '
        'greedy tokens that an engine should give after them; see docs/retrieval.md.')


def measure_retrieval(output: Path, *, decoder: str, expert: str, data: Path, sets: Sequence[str],
                      questions: int, passage: int, length: int, store: str = '') -> str:
  """Measures an expert beside retrieval, and returns the tables; see `retrieval_trial`.

  Raises:
    UserError: --sets or --expert names nothing that can be measured, or there are no questions;
      or --passage is too small, or too large for --length, or --output is in an object store;
      or another process writes it.
  """
  unknown = sorted(set(sets) - SPLITS.keys())
  if unknown or not sets:
    raise UserError(f'--sets={",".join(sets)}: give some of {list(SPLITS)}')
  check_passage_size(passage)
  if not is_here(output):
    raise UserError(f'--output={output}: give a file of this machine, since records and caches '
                    'grow beside it')
  # Files are read before a decoder is loaded.
  asked = {name: read_questions(data, name, 0) for name in sets}
  loaded, experts, choice = open_choice(decoder, expert, length, strict=True)
  mix = experts.mix(choice)
  if not mix or mix == AUTO:
    raise UserError(f"--expert={expert}: give the expert to measure, or 'a:0.5,b:0.5'")
  identity = {
      'decoder': loaded.fingerprint, 'mix': mix, 'passage': passage, 'length': length,
      'experts': [address_of(experts, name) for name in mix]}

  def ask_all(name: str, found: list[Question], passages: list[Passage]) -> dict[str, Any]:
    library = Library(passages, experts, Path(store) if store else output.with_suffix('.caches'))
    return summarise(run_trial(
        RetrievalTrial(experts, loaded.tokenizer, library, mix), found,
        output.with_suffix(f'.{name}.jsonl'), {**identity, 'questions': hash_of(found)}))

  # Whatever can be wrong with a set, before the first question of the first one.
  ready = {}
  for name, known in asked.items():
    usable = long_enough(known, loaded.tokenizer, experts.first_anchor + 1, passage)
    if len(usable) < len(known):
      logging.info('%s: %d questions are too short for latents and are left out', name,
                   len(known) - len(usable))
    found = usable[:questions or None]
    passages = passages_of(usable, loaded.tokenizer, passage)
    check_askable(found, passages, loaded.tokenizer, length)
    ready[name] = found, passages
  with lock(output.with_suffix('.lock'), f'writes {output}'):
    results = {name: ask_all(name, *parts) for name, parts in ready.items()}
    return write_summary(output, results, identity)
