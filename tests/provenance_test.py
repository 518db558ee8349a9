"""The commit that a result names."""

import subprocess

from latent_deliberation.provenance import git_commit


def test_git_commit(tmp_path, monkeypatch):
  """The commit shows changes, and is unknown outside git."""
  monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
  for name in ('GIT_DIR', 'GIT_WORK_TREE', 'GIT_INDEX_FILE'):  # set inside a git hook
    monkeypatch.delenv(name, raising=False)
  assert git_commit(tmp_path) == 'unknown'

  def git(*arguments: str) -> str:
    command = ('git', '-c', 'user.name=a', '-c', 'user.email=a@b', *arguments)
    return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True,
                          text=True).stdout.strip()

  git('init')
  (tmp_path / 'code.py').write_text('1')
  assert git_commit(tmp_path) == 'unknown'
  git('add', 'code.py')
  git('commit', '--no-verify', '--no-gpg-sign', '-m', 'first')
  assert git_commit(tmp_path) == git('rev-parse', 'HEAD')
  (tmp_path / 'code.py').write_text('2')
  assert git_commit(tmp_path) == git('rev-parse', 'HEAD') + '+changes'
