"""Continues prompts: the frozen decoder alone, or with the latents of a coprocessor.

  python launch/generate.py --decoder=runs/decoder/decoder --coprocessor=runs/coprocessor --compare

Without a prompt it asks for one after the other. With --chat these are the turns of one
conversation. Latents are made at the end of a prompt, --at other places, --every so many tokens, or
where a --gate opens. With a --cache they are there already. Next, measure with launch/evaluate.py.
"""


from absl import flags

from latent_deliberation.cli import app, generate
from latent_deliberation.cli.prompts import read_prompts, read_stop
from latent_deliberation.files import as_path
from latent_deliberation.inference.background import BACKGROUND_SECONDS, LatentTiming
from latent_deliberation.inference.decode import Sampling
from latent_deliberation.inference.policy import MIN_GAP, NEVER, SCORES, combine, open_gate
from latent_deliberation.inference.session import DecodingOptions

_DECODER = app.define_decoder(
    'decoder',
    'Directory, GGUF file or name of the decoder; launch/convert.py --list has the names.')
_COPROCESSOR = app.define_directory(
    'coprocessor',
    "Work directory of a finished training, the coprocessor/ that it wrote, or 'none'. "
    'Default: none.', '')
_EXPERT = flags.DEFINE_string(
    'expert', '', "Expert: a name or a package, several as 'a:0.5,b:0.5', 'auto' or 'none'.")
_STRICT = flags.DEFINE_bool(
    'strict', False, 'End with an error where an expert cannot be attached.')
_VOCABULARY = app.define_vocabulary()
_DTYPE = app.define_dtype()
_PROMPT = flags.DEFINE_multi_string('prompt', [], 'Text to continue')
_PROMPTS_FILE = app.define_file(
    'prompts_file', "File with a prompt on each line, or JSON lines with a key 'prompt'.", '')
_CHAT = flags.DEFINE_bool(
    'chat', False, "Put prompts into the chat template of the decoder's model.")
_BATCH_SIZE = flags.DEFINE_integer(
    'batch_size', 0, 'Prompts to decode together. Default: as many as fit 2 GiB.')
_STOP = flags.DEFINE_multi_string(
    'stop', [], r'String that ends a text; \n is a new line and \\ a backslash')
_MAX_TOKENS = flags.DEFINE_integer('max_tokens', 64, 'Largest number of tokens to decode.')
_LENGTH = flags.DEFINE_integer('length', 2048, 'Room in the cache, in tokens, prompt included.')
_TEMPERATURE = flags.DEFINE_float(
    'temperature', 0.0, 'Sampling temperature; 0 takes the likeliest token.')
_TOP_K = flags.DEFINE_integer('top_k', 0, 'Keep this many of the likeliest tokens; 0 keeps all.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Keep the likeliest tokens up to this probability mass.')
_MIN_P = flags.DEFINE_float(
    'min_p', 0.0, 'Keep tokens with at least this share of the largest probability.')
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the first prompt; each next prompt adds 1.')
_AT = flags.DEFINE_multi_integer(
    'at', [], 'Number of decoded tokens after which to make latents. Default: 0; none with '
    '--gate or --cache')
_EVERY = flags.DEFINE_integer('every', 0, 'Make latents after every so many tokens; 0 for never.')
_GATE = app.define_directory(
    'gate', 'Directory that launch/gate.py wrote; latents are made where the gate opens.', '')
_BUDGET = flags.DEFINE_float(
    'budget', 0.05, 'Fraction of decoded tokens at which the gate opens, as it is expected.')
_MIN_GAP = flags.DEFINE_integer(
    'min_gap', MIN_GAP, 'Tokens that a text decodes before its gate may open again.')
_SCORE = flags.DEFINE_enum('gate_score', SCORES[0], SCORES, 'Score that opens the gate.')
_CACHE = app.define_directory(
    'cache', 'Directory that launch/augment.py wrote; prompts continue its text.', '')
_BACKGROUND = flags.DEFINE_bool(
    'background', False, 'Make latents in the background and decode on meanwhile.')
_JSON = flags.DEFINE_bool('json', False, 'Print one line of JSON for each prompt.')
_STREAM = flags.DEFINE_bool('stream', False, 'Print the text while it is decoded.')
_COMPARE = flags.DEFINE_bool(
    'compare', False, 'Print plain and augmented text side by side, each scored both ways.')


def main() -> None:
  augments = generate.check_coprocessor(
      _EXPERT.value or _COPROCESSOR.value, at=_AT.value, every=_EVERY.value, gate=_GATE.value,
      background=_BACKGROUND.value)
  prompts = read_prompts(_PROMPT.value, _PROMPTS_FILE.value)
  gate = None
  if _GATE.value:
    gate = open_gate(as_path(_GATE.value), _SCORE.value, _BUDGET.value, _MIN_GAP.value)
  policy = combine(_AT.value, _EVERY.value, gate, () if _CACHE.value else (0,))
  sampling = Sampling(_TEMPERATURE.value, _TOP_K.value or None, _TOP_P.value, _MIN_P.value)
  timing = LatentTiming(None, BACKGROUND_SECONDS) if _BACKGROUND.value else LatentTiming()
  options = DecodingOptions(_MAX_TOKENS.value, sampling, policy=policy if augments else NEVER,
                            timing=timing)
  stop = tuple(map(read_stop, _STOP.value))
  request = generate.Request(options, stop, _SEED.value, _JSON.value, _STREAM.value,
                             _COMPARE.value, _CACHE.value, _CHAT.value, _BATCH_SIZE.value)
  generate.answer(generate.open_writer(
      request, _DECODER.value, _COPROCESSOR.value, _EXPERT.value, _STRICT.value, _VOCABULARY.value,
      _LENGTH.value, gate, _DTYPE.value), prompts)


if __name__ == '__main__':
  app.run(main)
