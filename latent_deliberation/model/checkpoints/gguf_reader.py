"""Opens a GGUF file with the gguf library, in half a second, or says what is wrong with it.

Only gguf_io.py imports this module, and only for such a file: the library is an extra.
"""

import struct
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

from latent_deliberation.errors import UserError


class ArrayReader(gguf.GGUFReader):
  """The library's reader, which takes each array of the metadata at once.

  The library makes numpy arrays of every entry. For the 262,144 tokens of a Gemma and their scores
  and types, that takes 17 seconds. The method is private to the library: if a later version names
  it otherwise, files open slowly, and nothing else changes.
  """

  def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, Sequence, Sequence, list]:
    """Returns the size in bytes of a value, its parts, the indices of its entries, and types."""
    if raw_type != gguf.GGUFValueType.ARRAY or self.byte_order != 'I':  # I: this machine's order
      return super()._get_field_parts(orig_offs, raw_type)
    kind = gguf.GGUFValueType(self._get(orig_offs, np.uint32)[0])
    count = int(self._get(orig_offs + 4, np.uint64)[0])
    types, start = [gguf.GGUFValueType.ARRAY, kind], orig_offs + 12
    # Numbers are one part. Of strings, each is a part, as a view of the file.
    if kind in self.gguf_scalar_to_np:
      values = self._get(start, self.gguf_scalar_to_np[kind], count)
      return 12 + values.nbytes, [values], [0], types
    if kind != gguf.GGUFValueType.STRING:
      return super()._get_field_parts(orig_offs, raw_type)
    content, strings, place = memoryview(self.data), [], start
    for _ in range(count):
      length, = struct.unpack_from('=Q', content, place)
      strings.append(content[place + 8:place + 8 + length])
      place += 8 + length
    return place - orig_offs, strings, range(count), types


def open_file(file: Path) -> ArrayReader:
  """Opens a file, and reads its metadata and the list of its tensors, but no weights.

  Raises:
    UserError: the file is no GGUF file or is cut short, or has a tensor of a type that the library
      does not know or cannot dequantise.
  """
  try:
    reader = ArrayReader(file)
  except Exception as error:  # the library raises whatever numpy raises
    if gguf.GGMLQuantizationType.__name__ in str(error):
      raise UserError(f'{file}: a tensor has a type that the gguf library does not know ({error}): '
                      'update the library, or give a file of another type') from error
    raise UserError(f'{file} ({file.stat().st_size:,} bytes) is not a whole GGUF file ({error}): '
                    'download it again') from error
  if reader.byte_order != 'I':
    raise UserError(f'{file} has its bytes in the order of other machines (big-endian): give a '
                    'file for this one')
  # One block of zeros tells whether the library can dequantise a type.
  for kind, name in {tensor.tensor_type: tensor.name for tensor in reader.tensors}.items():
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
      gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError as error:
      raise UserError(f'{file}: {name} is stored as {kind.name}, which the gguf library cannot '
                      'dequantise: give a file of another type') from error
  return reader

