"""The commands of launch/experts.py but for train: the marketplace, and routers."""

import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from latent_deliberation.api import load_decoder
from latent_deliberation.cli.attached import attach_named, fitting, load_named
from latent_deliberation.cli.expert_use import ask_documents, export_prompt
from latent_deliberation.errors import UserError
from latent_deliberation.experts.added import (
  add,
  added_directory,
  index_of,
  locate,
  remove,
)
from latent_deliberation.experts.attach import Experts
from latent_deliberation.experts.card import GENERAL, NONE, render
from latent_deliberation.experts.index import COLUMNS, Entry, publish, read_index, search
from latent_deliberation.experts.package import read_card
from latent_deliberation.experts.passages import PASSAGE
from latent_deliberation.experts.prompt_embeds import EMBEDS
from latent_deliberation.experts.retrieval import DOCUMENT
from latent_deliberation.experts.router_trial import (
  format_trial,
  judge_pairs,
  judge_routers,
  plot_trial,
)
from latent_deliberation.experts.routing import ROUTERS, Query, choose, make_router
from latent_deliberation.experts.texts import (
  STDLIB,
  STDLIB_TITLE,
  Cut,
  CutSizes,
  cut_documents,
  documents_of,
)
from latent_deliberation.experts.trial import (
  compare_experts,
  format_comparison,
  plot_comparison,
  try_mixes,
)
from latent_deliberation.experts.verifying import verify
from latent_deliberation.files import (
  as_path,
  check_free,
  make_writable,
  read_text,
  write_json,
  write_whole,
)
from latent_deliberation.inference.engine import LoadedDecoder
from latent_deliberation.inference.prompt_arrays import check_room
from latent_deliberation.inference.tokenizer import check_unicode
from latent_deliberation.tables import text_table


@dataclasses.dataclass(frozen=True)
class Options:
  """Flags of launch/experts.py that these commands read; see its --help.

  Attributes are the flags.
  """
  decoder: str = ''
  index: str = ''
  text: str = ''
  domain: tuple[str, ...] = ()
  pair: tuple[str, ...] = ()
  router: tuple[str, ...] = ()
  output: str = ''
  prompts: int = 64
  batch_size: int = 8
  length: int = 512
  expert: str = NONE
  documents: str = ''
  store: str = ''
  latents_at: str = DOCUMENT
  passage: int = PASSAGE
  max_tokens: int = 64
  format: str = EMBEDS
  scores: bool = False
  force: bool = False
  overwrite: bool = False


def run(command: str, words: Sequence[str], options: Options) -> None:
  """Runs a command with its words.

  Raises:
    UserError: there is no such command, or it needs other words or flags.
  """
  if command not in COMMANDS:
    raise UserError(f'{command or "no command"}: give one of train, {", ".join(COMMANDS)}')
  COMMANDS[command](list(words), options)


def _only(words: list[str], what: str) -> str:
  if len(words) != 1:
    raise UserError(f'{" ".join(words) or "nothing is named"}: give one {what}')
  return words[0]


# --- The marketplace ---


def _list(words: list[str], options: Options) -> None:
  if words:
    raise UserError(f'{words}: list takes no words; search does')
  _print_entries(_entries(options), options)


def _search(words: list[str], options: Options) -> None:
  if not words:
    raise UserError('search: give words')
  _print_entries(search(_entries(options), words), options)


def _entries(options: Options) -> list[Entry]:
  return read_index(options.index) if options.index else index_of(added_directory())


def _print_entries(entries: Sequence[Entry], options: Options) -> None:
  if not entries:
    print(f'No expert in {options.index or added_directory()}.')
    return
  print(text_table(COLUMNS, [entry.row for entry in entries], '<'))


def _show(words: list[str], options: Options) -> None:
  name = _only(words, 'expert, as a name or a directory')
  if options.index:
    raise UserError('show reads added experts: add it first, or open its README.md in the index')
  directory = locate(name, added_directory())
  print(render(read_card(directory)) + f'\nPackage: {directory}')


def _add(words: list[str], options: Options) -> None:
  card, directory = add(_only(words, 'address of an expert'), added_directory(), options.index)
  print(f'{card.address} is in {directory}\nNext: python launch/generate.py '
        f'--decoder={shlex.quote(options.decoder or card.base["name"])} '
        f'--expert={card.address} --compare')


def _verify(words: list[str], options: Options) -> None:
  directory = locate(_only(words, 'expert, as a name or a directory'), added_directory())
  decoder = load_decoder(options.decoder) if options.decoder else None
  failed = 0
  for check in verify(directory, decoder, options.decoder, options.scores):
    print(check, flush=True)
    failed += check.passed is False
  if failed:
    raise UserError(f'{directory}: {failed} checks failed; do not use it')


def _remove(words: list[str], options: Options) -> None:
  print(f'{remove(_only(words, "expert"), added_directory())} is removed.')


def _publish(words: list[str], options: Options) -> None:
  if not options.index:
    raise UserError('publish: give --index=FOLDER')
  card = publish(Path(_only(words, 'directory of a package')), Path(options.index), options.force)
  print(f'{card.address} is listed in {options.index}.')


# --- On text ---


def _open(words: Sequence[str], options: Options) -> tuple[LoadedDecoder, Experts]:
  """Loads the decoder and attaches experts: those named, or all that were added for it."""
  if options.expert != NONE:
    raise UserError(f'--expert={options.expert}: give experts as words after the command')
  decoder = load_named(options.decoder)
  experts, _ = attach_named(decoder, list(words) or fitting(decoder.fingerprint),
                            length=options.length, strict=True)
  return decoder, experts


def _check_output(options: Options) -> Path | None:
  if not options.output:
    return None
  output = as_path(options.output)
  if output.suffix != '.json':
    raise UserError(f'--output={output}: give a path that ends in .json; a table and a picture go '
                    'beside it')
  check_free([output.with_suffix(end) for end in ('.json', '.md', '.png')], options.overwrite)
  make_writable(output.absolute().parent)
  return output


def _check_length(options: Options, sizes: CutSizes, passages: int = 1) -> None:
  if options.length < (needed := passages * sizes.longest + sizes.ahead + 8):
    raise UserError(f'--length={options.length}: prompts and their answers need {needed}')


def _fit_cuts(sizes: CutSizes, experts: Experts) -> CutSizes:
  """Returns sizes of prompts that have room for the latents of the experts."""
  shortest = max(sizes.shortest, experts.first_anchor + 1)
  return dataclasses.replace(sizes, shortest=shortest, longest=max(sizes.longest, shortest))


def _compare(words: list[str], options: Options) -> None:
  if not options.text:
    raise UserError('compare: give --text, the text to compare experts on')
  output, sizes = _check_output(options), CutSizes(count=options.prompts)
  _check_length(options, sizes)
  documents = documents_of(options.text)
  decoder, experts = _open(words, options)
  cuts = cut_documents('text', documents, decoder.tokenizer, _fit_cuts(sizes, experts))
  trial = try_mixes(experts, cuts, {name: {name: 1.0} for name in experts.names},
                    batch_size=options.batch_size)
  result = compare_experts(trial)
  page = format_comparison(result)
  print(page)
  if output is not None:
    write_json(output, result)
    write_whole(output.with_suffix('.md'), page.encode() + b'\n')
    plot_comparison(result, output.with_suffix('.png'))


def _route(words: list[str], options: Options) -> None:
  if not options.text:
    raise UserError('route: give --text, the prompt to route or a file with it')
  prompt, file = options.text, Path(os.path.expanduser(options.text))
  try:
    is_file = file.is_file()
  except OSError:  # longer than a name may be
    is_file = False
  if is_file:
    prompt = read_text(file, 'the prompt')
  check_unicode(prompt, '--text')
  decoder, experts = _open(words, options)
  ids = decoder.tokenizer.encode(prompt)
  check_room(np.array([len(ids)]), 1, options.length, ['--text'])
  state = experts.engine.read([ids])
  query = Query([prompt], state.hidden, state)
  for name in options.router or ROUTERS:
    router = make_router(name, experts.known())
    scores = router.scores(query)
    chosen, = choose(router, scores)
    shown = ', '.join(f'{expert} {score:+.3f}' for score, expert in sorted(
        zip(scores[0], router.names, strict=True), reverse=True))
    print(f'{name}: {chosen or NONE}   ({shown})')


def _evaluate(words: list[str], options: Options) -> None:
  """Judges routers on the texts of --domain, and sums of experts on mixed text."""
  if not options.domain:
    raise UserError('evaluate: give --domain=NAME=TEXT for each text; a NAME that is no expert is '
                    'text of no domain')
  if not options.output:
    raise UserError('evaluate: give --output=FILE.json')
  output, texts, sizes = _check_output(options), _domains(options), CutSizes(count=options.prompts)
  decoder, experts = _open(words, options)
  pairs = _pairs(options, experts, texts)
  # A mixed prompt holds two passages, and a break between them.
  _check_length(options, sizes, 2 if pairs else 1)
  sizes = _fit_cuts(sizes, experts)
  _warn_of_seen_text(options, experts)
  cuts: dict[str, list[Cut]] = {
      name: cut_documents(name, documents, decoder.tokenizer, sizes)
      for name, documents in texts.items()}
  everything = [cut for found in cuts.values() for cut in found]
  _, result = judge_routers(experts, everything, options.router or tuple(ROUTERS),
                            options.batch_size)
  result['pairs'] = judge_pairs(experts, cuts, pairs, decoder.tokenizer, options.batch_size)
  result |= {'decoder': decoder.fingerprint, 'cut_sizes': vars(sizes)}
  page = format_trial(result)
  print(page)
  write_json(output, json.loads(json.dumps(result)))
  write_whole(output.with_suffix('.md'), page.encode())
  plot_trial(result, output.with_suffix('.png'))
  logging.info('written: %s, and .md and .png beside it', output)


def _warn_of_seen_text(options: Options, experts: Experts) -> None:
  """Warns where a text of no expert is one that routers were fitted on."""
  seen = [name for name in experts.names if (card := experts.card(name)) is not None
          and (card.recipe.get(GENERAL) or {}).get('name') == STDLIB_TITLE]
  for written in options.domain:
    if written.partition('=')[2] == STDLIB and seen:
      logging.warning('--domain=%s is the general text of %s, on which their routing was fitted: '
                      'results on it are too good', written, ', '.join(seen))


def _ask(words: list[str], options: Options) -> None:
  ask_documents(_only(words, 'question, in quotation marks'), decoder=options.decoder,
                documents=options.documents, expert=options.expert, at=options.latents_at,
                passage=options.passage, max_tokens=options.max_tokens, length=options.length,
                store=options.store)


def _export(words: list[str], options: Options) -> None:
  if words:
    raise UserError(f'{words}: export takes its prompt as --text')
  export_prompt(options.text, decoder=options.decoder, expert=options.expert,
                output=options.output, format=options.format, length=options.length,
                overwrite=options.overwrite)


def _domains(options: Options) -> dict[str, list[str]]:
  texts = {}
  for written in options.domain:
    name, equals, text = written.partition('=')
    if not equals or not name or not text or name in texts:
      raise UserError(f'--domain={written}: give NAME=TEXT, each name once')
    texts[name] = documents_of(text)
  return texts


def _pairs(options: Options, experts: Experts, texts: Mapping[str, list[str]],
           ) -> list[tuple[str, str]]:
  """Returns pairs of experts to add up: those of --pair, or each expert with the next one."""
  known = [name for name in experts.names if name in texts]
  if not options.pair:
    if not experts.add_up:
      return []
    return list(zip(known, known[1:], strict=False))
  pairs = []
  for written in options.pair:
    one, plus, other = written.partition('+')
    if not plus or one not in known or other not in known or one == other:
      raise UserError(f'--pair={written}: give two experts that have a --domain, as A+B: {known}')
    pairs.append((one, other))
  return pairs


COMMANDS: Mapping[str, Callable[[list[str], Options], None]] = {
    'list': _list, 'search': _search, 'show': _show, 'add': _add, 'verify': _verify,
    'remove': _remove, 'compare': _compare, 'publish': _publish, 'route': _route,
    'evaluate': _evaluate, 'ask': _ask, 'export': _export}
