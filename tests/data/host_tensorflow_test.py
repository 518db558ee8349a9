"""TensorFlow's greetings are left out, and everything else that it says is kept."""

import os

from latent_deliberation.data.host_tensorflow import without_greetings

GREETINGS = (
    'WARNING: All log messages before absl::InitializeLog() is called are written to STDERR',
    'I0000 00:00:1795968976.400190   12769 port.cc:153] oneDNN custom operations are on.',
    'E0000 00:00:1795968980.006725   12769 cuda_platform.cc:52] failed call to cuInit: INTERNAL',
    'normalizer.cc(51) LOG(INFO) precompiled_charsmap is empty. use identity normalization.')
OTHERS = ('W0000 00:00:1.2 3 file.cc:1] a warning', 'E0000 00:00:1.2 3 file.cc:1] an error',
          'I1129 16:56:34.027925 140416993467264 app.py:134] a line of ours')


def test_greetings(capfd):
  """Greetings do not come out; other lines do, at the end and in their order."""
  with without_greetings():
    os.write(2, ''.join(f'{line}\n' for line in (*GREETINGS, *OTHERS)).encode())
    assert not capfd.readouterr().err
  assert capfd.readouterr().err == ''.join(f'{line}\n' for line in OTHERS)
