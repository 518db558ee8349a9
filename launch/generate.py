"""Writes on behind prompts: the frozen decoder alone, or with the latents of a coprocessor.

  python launch/generate.py --decoder=runs/decoder/decoder --coprocessor=runs/coprocessor --compare

Without a prompt it asks for one after the other. Latents come at its end, --at other places,
--every so many tokens, where a --gate opens, or with a --cache. Next, measure: launch/evaluate.py.
"""

from pathlib import Path

from latent_deliberation.cli import app, flags, generate
from latent_deliberation.inference import prefix_cache
from latent_deliberation.inference.background import Arrival
from latent_deliberation.inference.decode import Sampling
from latent_deliberation.inference.generator import open_generator
from latent_deliberation.inference.policy import NEVER, SCORES, combine, open_gate
from latent_deliberation.inference.session import Decoding

_DECODER = flags.define_directory('decoder', 'Of the decoder, in any format we read.')
_COPROCESSOR = flags.define_directory('coprocessor', "Of a trained one; or 'none'.", '')
_VOCABULARY = flags.define_text('vocabulary', '', "SentencePiece model, or 'byte'.")
_PROMPT = flags.define_texts('prompt', 'What to write on behind; may be repeated.')
_PROMPTS_FILE = flags.define_text('prompts_file', '', 'With a prompt a line, or .jsonl.')
_STOP = flags.define_texts('stop', 'String that ends a text; may be repeated.')
_MAX_TOKENS = flags.define_number('max_tokens', 64, 'To decode.')
_LENGTH = flags.define_number('length', 2048, 'Tokens of a text, prompt and all.')
_TEMPERATURE = flags.define_number('temperature', 0.0, 'Divides logits; 0 is greedy.')
_TOP_K = flags.define_number('top_k', 0, 'Likeliest tokens to keep; 0 keeps all.')
_TOP_P = flags.define_number('top_p', 1.0, 'Mass of the likeliest tokens to keep.')
_MIN_P = flags.define_number('min_p', 0.0, 'Least probability over the greatest.')
_SEED = flags.define_number('seed', 0, 'Of the first prompt; the others count on.')
_AT = flags.define_numbers('at', [], 'Tokens after which to deliberate; 0 without a gate.')
_EVERY = flags.define_number('every', 0, 'Deliberate after every so many tokens; 0: not.')
_GATE = flags.define_directory('gate', 'Written by gate.py: deliberate where it opens.', '')
_BUDGET = flags.define_number('budget', 0.25, 'Fraction of tokens at which it opens.')
_SCORE = flags.define_choice('gate_score', SCORES, 'What opens it.')
_CACHE = flags.define_directory('cache', 'Of augment.py: prompts go on behind it.', '')
_BACKGROUND = flags.define_switch('background', 'Do not wait for latents.')
_JSON = flags.define_switch('json', 'Print a line of JSON for each prompt.')
_STREAM = flags.define_switch('stream', 'Print tokens as they come.')
_COMPARE = flags.define_switch('compare', 'Print plain and augmented side by side.')


def main() -> None:
  augments = generate.check_coprocessor(_COPROCESSOR.value, at=_AT.value, every=_EVERY.value,
                                        gate=_GATE.value, background=_BACKGROUND.value)
  prompts = generate.read_prompts(_PROMPT.value, _PROMPTS_FILE.value)
  gate = open_gate(Path(_GATE.value), _SCORE.value, _BUDGET.value) if _GATE.value else None
  policy = combine(_AT.value, _EVERY.value, gate, () if _CACHE.value else (0,))
  sampling = Sampling(_TEMPERATURE.value, _TOP_K.value or None, _TOP_P.value, _MIN_P.value)
  arrival = Arrival(None if _BACKGROUND.value else 0)
  how = Decoding(_MAX_TOKENS.value, sampling, policy=policy if augments else NEVER, arrival=arrival)
  request = generate.Request(how, tuple(_STOP.value), _SEED.value, _JSON.value, _STREAM.value,
                             _COMPARE.value, _CACHE.value)
  generator, tokenizer = open_generator(
      Path(_DECODER.value), _COPROCESSOR.value, _VOCABULARY.value, _LENGTH.value, gate)
  behind = prefix_cache.open_context(Path(_CACHE.value), generator) if _CACHE.value else None
  generate.answer(generate.Writer(generator, tokenizer, request, behind), prompts)


if __name__ == '__main__':
  app.run(main)
