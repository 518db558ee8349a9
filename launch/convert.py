"""Describes a decoder on disk, lists its tensors, or writes it in another format.

  python launch/convert.py --list
  python launch/convert.py --source=gemma3-270m
  python launch/convert.py --source=gemma-2-2b --list
  python launch/convert.py --source=gemma-2-2b --target=decoder
  python launch/convert.py --source=gemma-2-2b-Q4_K_M.gguf --target=decoder_q4
  python launch/convert.py --source=runs/decoder/decoder --target=exported --format=huggingface
  python launch/convert.py --coprocessor=runs/coprocessor --target=small --dtype=bfloat16

It reads our own directories, those of Hugging Face (safetensors: Gemma, Llama, Mistral and Qwen),
and the orbax checkpoints of Google's gemma library. It also reads GGUF files, which need
pip install -e '.[gguf]'; give the file, or the directory that holds one. Some models have a name,
which --list alone shows. hf://ORG/NAME downloads one from Hugging Face. Training reads them all, so
nothing has to be converted first. A decoder's tokenizer comes with it. Without --target, no weights
are loaded. A coprocessor is written again in another dtype, to share it. Next, train a coprocessor,
as in docs/gemma.md.
"""


from absl import flags

from latent_deliberation.cli import app, convert
from latent_deliberation.errors import UserError
from latent_deliberation.files import as_path
from latent_deliberation.model import weights

_SOURCE = app.define_decoder('source', 'Directory, GGUF file or name of the decoder to read.', '')
_COPROCESSOR = app.define_directory(
    'coprocessor', 'Trained coprocessor to write again in another dtype. Default: none.', '')
_TARGET = app.define_directory(
    'target', 'Directory to write to, which must not exist yet. Default: only describe the '
    'decoder.', '')
_FORMAT = flags.DEFINE_enum(
    'format', weights.FORMATS[0], weights.FORMATS, 'Format to write the decoder in.')
_DTYPE = flags.DEFINE_enum(
    'dtype', None, weights.READABLE,
    'Dtype to round the weights to; needed with --coprocessor. Default: every bit is kept.')
_LIST = flags.DEFINE_bool(
    'list', False, 'Also list every tensor of the source; without --source, the known names.')


def main() -> None:
  if _COPROCESSOR.value:
    if _SOURCE.value or not _TARGET.value:
      raise UserError('--coprocessor: give --target with it, and no --source')
    print(convert.convert_coprocessor(
        as_path(_COPROCESSOR.value), as_path(_TARGET.value), _DTYPE.value))
    return
  if not _SOURCE.value:
    if not _LIST.value:
      raise UserError('--source: give the decoder to read, or --list alone for the known names')
    print(convert.list_names())
    return
  checkpoint = weights.open_checkpoint(_SOURCE.value)
  print(convert.describe(checkpoint, _SOURCE.value))
  if _LIST.value:
    print(convert.list_tensors(checkpoint))
  checkpoint.check()
  if _TARGET.value:
    print(convert.convert(checkpoint, as_path(_TARGET.value), _FORMAT.value, _DTYPE.value))


if __name__ == '__main__':
  app.run(main)
