"""Says what decoder is in a directory, lists its tensors, or writes it in another format.

  python launch/convert.py --source=gemma-2-2b
  python launch/convert.py --source=gemma-2-2b --list
  python launch/convert.py --source=gemma-2-2b --target=decoder
  python launch/convert.py --source=runs/decoder/decoder --target=exported --format=huggingface

Sources are our own directories, Hugging Face's (safetensors) and the orbax checkpoints of Google's
gemma library; nothing needs converting before it is trained on. Without --target nothing is loaded.
Next, train a coprocessor with launch/train.py --config=configs/gemma2_2b.py:DIRECTORY.
"""

from pathlib import Path

from latent_deliberation.cli import app, convert, flags
from latent_deliberation.model import weights

_SOURCE = flags.define_directory('source', 'Of the decoder to read.')
_TARGET = flags.define_directory('target', 'To be written; must not exist yet.', '')
_FORMAT = flags.define_choice('format', weights.FORMATS, 'To write.')
_DTYPE = flags.define_choice('dtype', ('float32', 'bfloat16', 'float16'),
                                    'To round to; by default every bit is kept.', required=False)
_LIST = flags.define_switch('list', 'Also list every tensor.')


def main() -> None:
  checkpoint = weights.open_checkpoint(_SOURCE.value)
  print(convert.describe(checkpoint))
  if _LIST.value:
    print(convert.list_tensors(checkpoint))
  checkpoint.check()
  if _TARGET.value:
    print(convert.convert(checkpoint, Path(_TARGET.value), _FORMAT.value, _DTYPE.value))


if __name__ == '__main__':
  app.run(main)
