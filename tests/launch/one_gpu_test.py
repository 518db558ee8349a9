"""The recipe for a GPU without a network: pieces go there, and what has finished comes back."""

import os
import shutil

import pytest

from tests.launch.recipes_test import recipe

# Stands for Python on both machines: it downloads and installs a wheel, and runs a study. The arm
# 'slow' takes longer than the test, the arm 'bad' fails.
PYTHON = """#!/bin/bash
set -e
for word; do case $word in
  --dest=*) mkdir -p "${word#*=}"; seq 200000 >"${word#*=}/model.whl" ;;
  --target=*) mkdir -p "${word#*=}"; cp "${@: -1}" "${word#*=}/model" ;;
  --workdir=*) work=${word#*=} ;;
  --arm=*) arm=${word#*=} ;;
esac; done
[[ -n ${work:-} ]] || exit 0
[[ $PYTHONPATH == "$(dirname "$work")/site:"* && -f configs/quickstart.py ]]
[[ $arm != slow ]] || exec sleep 30
[[ $arm != bad ]] || exit 1
echo "$*" >"$work/results.json"
mkdir -p "$work/arms/$arm/seed0/coprocessor"
touch "$work/arms/$arm/seed0/coprocessor/coprocessor.json"
"""


@pytest.mark.parametrize('last, code, said', [
    ('slow', 2, "the 1 minutes are over before the arm 'slow' ended"),
    ('bad', 2, "the arm 'bad' failed"), ('', 0, '')])
def test_training_goes_to_a_gpu_in_pieces(tmp_path, last, code, said):
  """Pieces come one by one; what arms have finished is kept when the time is over."""
  tools, data, away = tmp_path / 'bin', tmp_path / 'data', tmp_path / 'away'
  for folder in (tools, data / 'rows/train', away):
    folder.mkdir(parents=True)
  (tools / 'python3').write_text(PYTHON)
  timeout = shutil.which('timeout')  # a minute is a second here
  (tools / 'timeout').write_text(f'#!/bin/bash\nexec {timeout} "$1" "$2" 1 "${{@:4}}"')
  for tool in tools.iterdir():
    tool.chmod(0o755)
  (data / 'rows/train/rows.npy').write_text('rows')
  (data / 'vocabulary.model').write_text('pieces')

  def one_gpu(arguments):
    return recipe('one_gpu', arguments, path=f'{tools}:{os.environ["PATH"]}')

  (tmp_path / 'payload.partial/archive').mkdir(parents=True)  # of a command that was stopped
  packed = one_gpu(f'pack --data={data} --to={tmp_path}/payload --megabytes=1')
  assert packed.returncode == 0, packed.stderr
  assert "is there already" in one_gpu(f'pack --data={data} --to={tmp_path}/payload').stderr
  pieces = sorted((tmp_path / 'payload').glob('piece.*'))
  assert len(pieces) == 2
  shutil.copy(tmp_path / 'payload/pieces.sha256', away)
  for number, piece in enumerate(pieces, start=1):
    shutil.move(piece, away)
    brought = one_gpu(f'bring --from={away} --to={tmp_path}/gpu')
    assert brought.returncode == 0 and f'{number} of 2 pieces' in brought.stdout, brought.stderr
    for file in away.iterdir():
      file.unlink()
  assert (tmp_path / 'gpu/work/rows/train/rows.npy').read_text() == 'rows'
  assert (tmp_path / 'gpu/site/model').is_file()
  arms = '/'.join(['own', '32 latents', *filter(None, [last])])
  trained = one_gpu(f"train --from={tmp_path}/gpu --to={tmp_path}/out --minutes=1 --arms='{arms}' "
                    '-- --config.x=1')
  assert trained.returncode == code and said in trained.stderr
  written = (tmp_path / 'out/results.json').read_text()
  assert '--arm=own --arm=32 latents' in written and written.endswith('--config.x=1\n')
  assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [
      '32_latents_seed0.tar.gz', 'own_seed0.tar.gz', 'results.json']


def test_damaged_piece(tmp_path):
  """A piece that changed on its way is named."""
  (tmp_path / 'piece.000').write_text('damaged')
  (tmp_path / 'pieces.sha256').write_text(f'{"0" * 64}  piece.000\n')
  process = recipe('one_gpu', f'bring --from={tmp_path} --to={tmp_path}/gpu')
  assert process.returncode == 2 and 'a piece is damaged: bring it again' in process.stderr
  assert 'piece.000: FAILED' in process.stdout
