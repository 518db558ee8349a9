"""Reads a text and makes latents for its end, once, for prompts that come later.

  python launch/augment.py --decoder=runs/quickstart/pretraining/decoder \\
      --coprocessor=runs/quickstart/coprocessor --document=docs/gpu.md --output=runs/cache \\
      --length=8192

Writes the decoder's kv-cache and the latents as safetensors, with a JSON file that names the
decoder. No other decoder can use them. Next, launch/generate.py continues them, with the
flags that this command prints.
"""

from shlex import quote

from absl import flags

from latent_deliberation.cli import app
from latent_deliberation.files import as_path
from latent_deliberation.inference.engine import open_engine
from latent_deliberation.inference.prefix_cache import check_context, save_context

_DECODER = app.define_decoder(
    'decoder',
    'Directory, GGUF file or name of the decoder; launch/convert.py --list has the names.')
_COPROCESSOR = app.define_directory(
    'coprocessor', 'Work directory of a finished training, or the coprocessor/ that it wrote.')
_VOCABULARY = app.define_vocabulary()
_DTYPE = app.define_dtype()
_DOCUMENT = app.define_file('document', 'File with the text to read, in UTF-8.')
_LENGTH = flags.DEFINE_integer('length', 2048, 'Largest number of tokens that the text may have.')
_OUTPUT = app.define_directory('output', 'Directory to write the cache to; must not exist yet.')


def main() -> None:
  output = as_path(_OUTPUT.value)
  text = check_context(output, as_path(_DOCUMENT.value), _COPROCESSOR.value)
  engine, tokenizer = open_engine(
      as_path(_DECODER.value), _COPROCESSOR.value, _VOCABULARY.value, _LENGTH.value,
      dtype=_DTYPE.value)
  tokens = save_context(text, output, engine, tokenizer)
  print(f'{output}: {tokens} tokens and {engine.model.coprocessor.config.num_latents} latents. '
        f'Next: python launch/generate.py --decoder={quote(_DECODER.value)} '
        f'--coprocessor={quote(_COPROCESSOR.value)} --cache={quote(str(output))} '
        f'--length={_LENGTH.value}'
        + (f' --vocabulary={quote(_VOCABULARY.value)}' if _VOCABULARY.value else '')
        + (f' --dtype={_DTYPE.value}' if _DTYPE.value != _DTYPE.default else ''))


if __name__ == '__main__':
  app.run(main)
