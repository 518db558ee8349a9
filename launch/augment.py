"""Reads a text and makes latents for its end, once, for prompts that come another day.

  python launch/augment.py --decoder=runs/quickstart/pretraining/decoder \\
      --coprocessor=runs/quickstart/coprocessor --document=docs/gpu.md --output=runs/cache \\
      --length=8192

Writes the decoder's kv-cache and the latents as safetensors, with a JSON file that names the
decoder, which alone can use them. Next, go on behind it: launch/generate.py --cache=runs/cache.
"""

from pathlib import Path

from latent_deliberation.cli import app, flags
from latent_deliberation.inference import prefix_cache
from latent_deliberation.inference.generator import open_generator

_DECODER = flags.define_directory('decoder', 'Of the decoder, in any format we read.')
_COPROCESSOR = flags.define_directory('coprocessor', 'Of a trained coprocessor.')
_VOCABULARY = flags.define_text('vocabulary', '', "SentencePiece model, or 'byte'.")
_DOCUMENT = flags.define_text('document', None, 'File with the text, UTF-8.')
_LENGTH = flags.define_number('length', 2048, 'Tokens that the text may have.')
_OUTPUT = flags.define_directory('output', 'To be written; must not exist yet.')


def main() -> None:
  output = Path(_OUTPUT.value)
  text = prefix_cache.check_context(output, Path(_DOCUMENT.value), _COPROCESSOR.value)
  generator, tokenizer = open_generator(
      Path(_DECODER.value), _COPROCESSOR.value, _VOCABULARY.value, _LENGTH.value)
  tokens = prefix_cache.save_context(text, output, generator, tokenizer)
  print(f'{output}: {tokens} tokens and {generator.model.coprocessor.config.num_latents} latents. '
        f'Go on behind them: launch/generate.py --cache={output}')


if __name__ == '__main__':
  app.run(main)
