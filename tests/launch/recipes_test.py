"""The recipes for TPU pods: what they would run, without a cloud, and what they refuse."""

import os
import re
import shlex
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest

from tests import finished

RECIPES = finished.ROOT / 'launch/recipes'
SCRIPTS = ('babysit', 'bucket', 'experts', 'gke', 'host', 'one_gpu', 'tpu_vm')
TOOLS = ('gcloud', 'git', 'xpk', 'docker', 'kubectl', 'mkdir')
KNOWN = {
    'RECIPE_NAME': 'pod', 'RECIPE_ZONE': 'us-west4-b', 'RECIPE_PROJECT': 'money',
    'RECIPE_BUCKET': 'store', 'RECIPE_CLUSTER': 'tpus', 'RECIPE_TYPE': 'v5litepod-256',
    'RECIPE_IMAGE': 'registry/image', 'RECIPE_LOCATION': 'us-west4'}
TRAIN = "-- launch/train.py --config.data.mode=packed '--config.data.name=my task'"


def recipe(script: str, arguments: str, variables: dict[str, str] = KNOWN,
           path: str = os.environ['PATH']) -> subprocess.CompletedProcess:
  """Runs a recipe with these variables of its own and no others."""
  environment = {'PATH': path, 'HOME': '/home/user', **variables}
  return subprocess.run(['bash', RECIPES / f'{script}.sh', *shlex.split(arguments)], text=True,
                        env=environment, cwd=finished.ROOT, capture_output=True, timeout=60)


def shown(script: str, arguments: str, variables: dict[str, str] = KNOWN) -> list[list[str]]:
  """The commands of a dry run, each as its words."""
  action, _, others = arguments.partition(' ')
  process = recipe(script, f'{action} --dry_run {others}', variables)
  assert process.returncode == 0, process.stderr
  return [shlex.split(line) for line in process.stdout.splitlines()]


@pytest.mark.parametrize('script', sorted(RECIPES.glob('*.sh')), ids=lambda path: path.stem)
def test_recipe_is_strict_bash(script):
  """Every recipe parses as bash and stops at the first error."""
  subprocess.run(['bash', '-n', script], check=True)
  if script.stem in SCRIPTS:
    assert '\nset -euo pipefail\n' in script.read_text()
    assert script.stat().st_mode & stat.S_IXUSR


def test_dry_run_is_what_runs(tmp_path):
  """Runs whole recipes with tools that only write down how they were called."""
  called = tmp_path / 'called'
  for tool in TOOLS:
    (tmp_path / tool).write_text(
        f'#!/bin/bash\nprintf "%s\\0" {tool} "$@" >>{called}\nprintf "\\n\\0" >>{called}\n')
    (tmp_path / tool).chmod(0o755)
  for script, arguments in [
      ('tpu_vm', 'create --type=v5litepod-256 --version=v2 --spot=yes'), ('tpu_vm', 'install'),
      ('tpu_vm', f'run {TRAIN}'), ('tpu_vm', 'logs --worker=3'), ('tpu_vm', 'stop'),
      ('tpu_vm', 'delete'), ('gke', 'cluster --slices=2 --capacity=spot'), ('gke', 'image'),
      ('gke', f'run --name=first --slices=2 {TRAIN}'),
      ('gke', 'logs --name=first'), ('gke', 'stop --name=first'), ('gke', 'delete'),
      ('bucket', 'create'), ('bucket', 'upload --from=data --to=data'),
      ('bucket', 'download --from=runs --to=runs')]:
    called.unlink(missing_ok=True)
    process = recipe(script, arguments, path=f'{tmp_path}:{os.environ["PATH"]}')
    assert process.returncode == 0, process.stderr
    expected = ''.join(word + '\0' for words in shown(script, arguments) for word in [*words, '\n'])
    assert called.read_text() == expected


def test_create_has_type_and_scopes():
  """A slice has the type asked for, and may write to buckets."""
  (command,) = shown('tpu_vm', 'create --type=v5p-256 --version=v2-alpha-tpuv5')
  assert command[:6] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'create', 'pod']
  assert set(command[6:]) == {
      '--accelerator-type=v5p-256', '--version=v2-alpha-tpuv5', '--scopes=cloud-platform',
      '--zone=us-west4-b', '--project=money'}


def test_run_starts_on_all_hosts():
  """Training begins on all hosts; they read the bucket themselves."""
  (start,) = shown('tpu_vm', f'run {TRAIN}')
  assert start[:6] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', 'pod']
  assert '--worker=all' in start
  inside = shlex.split(start[7].removeprefix('--command='))
  assert inside[-6:] == ['launch/recipes/host.sh', 'start', *shlex.split(TRAIN)]


def test_host_uses_tpu_env():
  """A host trains with the variables of tpu.env, and a cache that its user alone writes to."""
  _, command = shown('host', f'start {TRAIN}')
  line, _, _ = command[2].partition(' >')
  words = shlex.split(line.removeprefix('('))
  variables = [line for line in (RECIPES / 'tpu.env').read_text().splitlines()
               if line and not line.startswith('#')]
  cache = 'JAX_COMPILATION_CACHE_DIR=/home/user/.cache/latent_deliberation/compiled'
  assert not any('/tmp' in line for line in variables)
  assert words == ['env', *variables, cache, 'nohup', '/home/user/venv/bin/python',
                   *shlex.split(TRAIN)[1:]]


def test_host_has_one_run(tmp_path):
  """A second run is refused, and `stop` asks the first one to end."""
  python = tmp_path / 'venv/bin/python'
  python.parent.mkdir(parents=True)
  python.write_text('#!/bin/bash\ntrap "echo saved; exit" TERM\necho "$LIBTPU_INIT_ARGS $*"\n'
                    'for _ in {1..300}; do sleep 0.1; done\n')
  python.chmod(0o755)
  home, log = {'HOME': str(tmp_path)}, tmp_path / 'run.log'
  assert recipe('host', 'state', home).stdout == 'none\n'
  assert recipe('host', f'start {TRAIN}', home).returncode == 0
  wait_for(log, '\n')
  assert recipe('host', 'state', home).stdout == 'running\n'
  again = recipe('host', f'start {TRAIN}', home)
  assert again.returncode == 2 and 'is still running' in again.stderr
  assert recipe('host', 'stop', home).returncode == 0
  wait_for(log, 'saved')
  wait_for(tmp_path / 'run.code', '0\n')
  assert recipe('host', 'state', home).stdout == 'ended 0\n'
  (tmp_path / 'run.code').unlink()  # of a host that was restarted
  assert recipe('host', 'state', home).stdout == 'lost\n'
  flags = re.search('^LIBTPU_INIT_ARGS=(.*)$', (RECIPES / 'tpu.env').read_text(), re.MULTILINE)[1]
  assert log.read_text().splitlines()[0] == f'{flags} {" ".join(shlex.split(TRAIN)[1:])}'


def wait_for(log: Path, text: str) -> None:
  end = time.monotonic() + 20
  while not log.exists() or text not in log.read_text():
    assert time.monotonic() < end, log.read_text() if log.exists() else log
    time.sleep(0.05)


# A cloud that plays a part: each look at the slice, or at the run, takes the next line of a file.
CLOUD = """#!/bin/bash
echo "$*" >>{place}/called
next() {{
  head --lines=1 {place}/$1
  sed --in-place 1d {place}/$1
}}
case "$*" in
  *queued-resources\\ describe*)
    line=$(next slice)
    case $line in
      '') echo 'ERROR: NOT_FOUND: there is no such resource' >&2; exit 1 ;;
      offline) echo 'ERROR: the network is down' >&2; exit 1 ;;
      expired)
        printf '%s\\n' 'ERROR: log in again' 'Accounts were not found.' '  $ gcloud auth login' >&2
        exit 1
        ;;
      *) echo "$line" ;;
    esac
    ;;
  *\\ create\\ * | *\\ delete\\ * | *host.sh\\ install* | *host.sh\\ start*)
    [[ $(next refusals) != refused ]] || exit 1
    ;;
  *host.sh\\ state*)
    line=$(next hosts)
    [[ $line != unreachable ]] || exit 255
    tr , '\\n' <<<"$line"
    ;;
esac
"""
KEEP = 'keep --type=v5litepod-16 --version=v2 --minutes=0'


def babysat(place: Path, slice_states: str, host_states: str, arguments: str = f'{KEEP} {TRAIN}',
            refusals: str = '') -> tuple[list[str], subprocess.CompletedProcess]:
  """What a babysitter did, one word a command, while slice and hosts went through states."""
  (place / 'slice').write_text(slice_states.replace(' ', '\n').replace('absent', '') + '\n')
  (place / 'hosts').write_text(host_states.replace('; ', '\n') + '\n')
  (place / 'refusals').write_text(refusals.replace(' ', '\n') + '\n')
  (place / 'gcloud').write_text(CLOUD.format(place=place))
  (place / 'git').write_text('#!/bin/bash\n')
  (place / 'sleep').write_text('#!/bin/bash\n')
  for tool in ('gcloud', 'git', 'sleep'):
    (place / tool).chmod(0o755)
  process = recipe('babysit', arguments, path=f'{place}:{os.environ["PATH"]}')
  kinds = {'queued-resources create': 'create', 'queued-resources delete': 'delete',
           'host.sh install': 'install', 'host.sh start': 'start', 'host.sh stop': 'stop'}
  done = [word for line in (place / 'called').read_text().splitlines()
          for text, word in kinds.items() if text in line]
  return done, process


def test_babysitter_keeps_a_run(tmp_path):
  """A slice is asked for, installed and used, again after it was taken away, until the run ends."""
  done, process = babysat(
      tmp_path, 'absent WAITING_FOR_RESOURCES ACTIVE ACTIVE ACTIVE SUSPENDED PROVISIONING ACTIVE '
      'ACTIVE ACTIVE', 'new,new; running,running; unreachable; new; running; ended 0,ended 0')
  assert process.returncode == 0, process.stderr
  assert done == ['create', 'install', 'start', 'delete', 'create', 'install', 'start', 'delete']
  assert 'the run is done' in process.stderr


def test_babysitter_starts_a_failed_run_again(tmp_path):
  """Hosts that stay are not installed again, and a run that is at work is left alone."""
  done, process = babysat(tmp_path, ' '.join(['ACTIVE'] * 5),
                          'none; ended 134,running; ended 1,ended 134; running; ended 0')
  assert process.returncode == 0, process.stderr
  assert done == ['start', 'start', 'delete']
  assert 'the run has ended: ended 1, ended 134' in process.stderr


def test_babysitter_outlasts_a_cloud_that_fails(tmp_path):
  """Calls that fail are made again. A state that is not known is no reason to ask for a slice."""
  done, process = babysat(
      tmp_path, 'absent absent offline ACTIVE ACTIVE ACTIVE SUSPENDED absent ACTIVE ACTIVE',
      'new; new; none; new; ended 0', refusals='refused ok refused ok refused ok refused ok ok ok')
  assert process.returncode == 0, process.stderr
  assert done == ['create', 'create', 'install', 'install', 'start', 'start', 'delete', 'create',
                  'install', 'start', 'delete']
  assert 'the slice is UNKNOWN: ERROR: the network is down\n' in process.stderr
  assert 'the installation failed; trying again' in process.stderr


def test_babysitter_says_why_it_waits(tmp_path):
  """A login that has expired is no missing slice, and its error is shown."""
  done, process = babysat(tmp_path, 'expired expired ACTIVE', 'ended 0')
  assert process.returncode == 0 and done == ['delete'], process.stderr
  assert process.stderr.count('the slice is UNKNOWN: ERROR: log in again\n') == 2


@pytest.mark.parametrize('arguments', [f'{KEEP} {TRAIN}', 'state', 'stop'])
def test_babysitter_without_gcloud(tmp_path, arguments):
  """It ends at once, and asks for nothing."""
  for tool in ('bash', 'dirname'):
    (tmp_path / tool).symlink_to(shutil.which(tool))
  process = recipe('babysit', arguments, path=str(tmp_path))
  assert process.returncode == 2 and not process.stdout
  assert process.stderr.startswith('babysit.sh: gcloud is not installed')


def test_babysitter_gives_up(tmp_path):
  """A run that fails at once, again and again, is not started for ever, and its slice is kept."""
  done, process = babysat(tmp_path, ' '.join(['ACTIVE'] * 9),
                          'none; ended 1; ended 1; ended 1; ended 1',
                          f'{KEEP} --tries=3 {TRAIN}')
  assert process.returncode == 2 and 'failed 3 times in a row' in process.stderr
  assert 'costs money: delete it with babysit.sh stop' in process.stderr
  assert done == ['start'] * 3


def test_babysitter_does_not_wait_for_ever(tmp_path):
  """Hosts that no look reaches cost money without a run, so they are told."""
  _, process = babysat(tmp_path, ' '.join(['ACTIVE'] * 20), '; '.join(['unreachable'] * 20))
  assert process.returncode == 2 and 'not be reached 15 times in a row' in process.stderr
  assert 'costs money: delete it with babysit.sh stop' in process.stderr


def test_babysitter_stops(tmp_path):
  """The slice goes when every host has saved and ended."""
  done, process = babysat(tmp_path, '', 'running,ended 143; running; ended 143',
                          'stop --minutes=0')
  assert process.returncode == 0 and done == ['stop', 'delete'], process.stderr
  assert (tmp_path / 'hosts').read_text().strip() == ''


def test_babysitter_stops_when_the_last_host_has_saved(tmp_path):
  """Many hosts that are at work, or cannot be reached, are waited for."""
  many = ','.join(['running'] * 400)
  looks = '; '.join([many] * 125)
  done, process = babysat(tmp_path, '', f'{looks}; unreachable; {many}; ended 143',
                          'stop --minutes=0')
  assert process.returncode == 0 and done == ['stop', 'delete'], process.stderr
  assert (tmp_path / 'hosts').read_text().strip() == ''


def test_babysitter_shows_a_life():
  """Its dry run has every command that a slice needs."""
  commands = [' '.join(command) for command in shown('babysit', f'{KEEP} {TRAIN}')]
  for text in ('queued-resources create pod --node-id=pod --accelerator-type=v5litepod-16 '
               '--runtime-version=v2 --scopes=cloud-platform --async --spot',
               'queued-resources describe pod', 'host.sh install', 'host.sh start',
               'host.sh state', 'queued-resources delete pod --force --quiet'):
    assert sum(text in command for command in commands) == 1, text
  assert not any('--spot' in ' '.join(command) for command in shown(
      'babysit', f'{KEEP} --spot=no {TRAIN}'))


def test_slices_are_one_workload():
  """All slices of a cluster train as one workload."""
  (command,) = shown('gke', f'run --name=first --slices=2 {TRAIN}')
  assert command[:3] == ['xpk', 'workload', 'create']
  assert {'--workload=first', '--tpu-type=v5litepod-256', '--num-slices=2', '--cluster=tpus',
          '--docker-image=registry/image', f'--env-file={RECIPES}/tpu.env'} < set(command)
  (inside,) = [word for word in command if word.startswith('--command=')]
  *_, last = inside.split(' && ')
  assert shlex.split(last) == ['exec', 'python', *shlex.split(TRAIN)[1:]]


@pytest.mark.parametrize('capacity, flag', [
    ('spot', '--spot'), ('on-demand', '--on-demand'), ('mine', '--reservation=mine')])
def test_cluster_slices_and_capacity(capacity, flag):
  """A cluster has the number of slices and the capacity asked for."""
  (command,) = shown('gke', f'cluster --slices=4 --capacity={capacity}')
  assert {'--num-slices=4', flag} < set(command)


def test_bucket():
  """A bucket is a flat one, which every account has."""
  (command,) = shown('bucket', 'create')
  assert 'gs://store' in command
  assert not any('namespace' in word or 'fuse' in word for word in command)


def test_no_mounts():
  """No recipe mounts a bucket: runs read and write gs:// themselves."""
  for path in RECIPES.iterdir():
    assert 'gcsfuse' not in path.read_text(), path


@pytest.mark.parametrize('script, arguments, missing', [
    ('babysit', 'state', 'RECIPE_PROJECT'), ('babysit', f'{KEEP} {TRAIN}', 'RECIPE_ZONE'),
    ('tpu_vm', 'delete', 'RECIPE_ZONE'), ('bucket', 'upload --from=a --to=b', 'RECIPE_BUCKET'),
    ('tpu_vm', f'run {TRAIN}', 'RECIPE_NAME'), ('gke', 'delete', 'RECIPE_CLUSTER'),
    ('gke', 'cluster --capacity=spot', 'RECIPE_TYPE'),
    ('gke', 'image', 'RECIPE_IMAGE'), ('bucket', 'create', 'RECIPE_LOCATION')])
def test_missing_flag_is_named(script, arguments, missing):
  """A missing value is named with its flag and its variable."""
  others = {name: value for name, value in KNOWN.items() if name != missing}
  process = recipe(script, arguments, others)
  flag = missing.removeprefix('RECIPE_').lower()
  assert process.returncode == 2 and not process.stdout
  assert process.stderr == f'{script}.sh: --{flag} is missing: give it, or set {missing}\n'
  assert shown(script, f'{arguments.split()[0]} --{flag}=given '
               f'{" ".join(shlex.quote(word) for word in shlex.split(arguments)[1:])}', others)


@pytest.mark.parametrize('script, arguments, message', [
    ('tpu_vm', 'delete --nam=pod', '--nam is not a flag; the flags are: name zone'),
    ('tpu_vm', "delete '--name zone=pod'", '--name zone is not a flag; the flags are: name zone'),
    ('host', 'install --=x', '-- is not a flag'),
    ('bucket', 'create --bucket=gs://store', '--bucket=gs://store: give the name'),
    ('bucket', 'upload --bucket=gs://store --from=a --to=b', '--bucket=gs://store: give the name'),
    ('gke', 'delete pod', 'pod: flags are --name=value, of: cluster zone'),
    ('gke', 'run --name=first', 'run needs a script and its flags'),
    ('gke', f'run --name=My_run {TRAIN}', '--name=My_run: Kubernetes'),
    ('gke', 'run --slices=two', '--slices=two: the number of slices, 1 or more'),
    ('gke', 'cluster', 'cluster needs --capacity: spot, on-demand or the name of a reservation'),
    ('tpu_vm', 'create', 'create needs --type=v5litepod-256 and --version='),
    ('tpu_vm', 'create --type=a --version=b --spot=maybe', '--spot=maybe: yes or no'),
    ('tpu_vm', 'run', 'run needs a script and its flags'),
    ('babysit', KEEP, 'keep needs a script and its flags'),
    ('babysit', f'keep {TRAIN}', 'keep needs --type=v5litepod-256 and --version='),
    ('babysit', f'{KEEP} --spot=maybe {TRAIN}', '--spot=maybe: yes or no'),
    ('babysit', f'{KEEP} --tries=0 {TRAIN}', '--tries=0: a number of failures'),
    ('babysit', f'keep --type=a --version=b --minutes=soon {TRAIN}', '--minutes=soon: a number'),
    ('bucket', 'upload --from=data', 'upload needs --from=DIRECTORY and --to=PATH'),
    ('one_gpu', 'pack --to=x', 'pack needs --data'),
    ('one_gpu', 'pack --data=no/rows --to=x', '--data=no/rows has no rows: make them'),
    ('one_gpu', 'bring --from=x', 'bring needs --to'),
    ('one_gpu', 'train --from=no/payload --to=x', '--from=no/payload has no work/rows'),
    ('one_gpu', 'train --from=a --to=b --minutes=soon', '--minutes=soon: give a whole number'),
    ('one_gpu', 'train --from=a --to=b --dry_run', '--dry_run is not a flag of this recipe'),
    *((script, 'begin', "'begin' is not an action: ") for script in SCRIPTS),
    *((script, '', "'' is not an action: ") for script in SCRIPTS)])
def test_unknown_input_is_refused(script, arguments, message):
  """A recipe refuses flags, values and actions that it does not know."""
  process = recipe(script, arguments)
  assert process.returncode == 2 and not process.stdout
  assert process.stderr.startswith(f'{script}.sh: {message}')


def test_tpu_env_gives_reasons():
  """Every variable of tpu.env has a comment above it."""
  lines = (RECIPES / 'tpu.env').read_text().splitlines()
  variables = [number for number, line in enumerate(lines)
               if line and not line.startswith('#')]
  for number in variables:
    assert re.fullmatch(r'[A-Z_]+=\S.*', lines[number]) and lines[number - 1].startswith('# ')


def test_image_files_exist():
  """The image is built from files that exist."""
  copied = re.findall(r'^COPY (\S+) \.$', (RECIPES / 'Dockerfile').read_text(), re.MULTILINE)
  kept = re.findall(r'^!(\S+)$', (RECIPES / 'Dockerfile.dockerignore').read_text(), re.MULTILINE)
  assert copied == ['requirements.txt', '.']
  for name in kept:
    assert Path(finished.ROOT, name).exists()


def test_experts_are_trained_once_and_judged(tmp_path):
  """Each named folder gets an expert, with the others' text as general text; all are judged on."""
  for name in ('law', 'poems', 'stars'):
    (tmp_path / 'texts' / name).mkdir(parents=True)
    (tmp_path / 'texts' / name / 'train.jsonl').touch()
    (tmp_path / 'texts' / name / 'heldout.jsonl.gz').touch()
  (tmp_path / 'out/law').mkdir(parents=True)
  (tmp_path / 'out/law/expert.json').touch()
  texts, out = tmp_path / 'texts', tmp_path / 'out'
  flags = f'--decoder=d --texts={texts} --names=law,stars --output={out} -- --config=c.py'
  trained, judged = shown('experts', f'all {flags}')
  assert trained[:5] == ['python', 'launch/experts.py', 'train', '--config=c.py', '--decoder=d']
  assert {f'--text={texts}/stars/train.jsonl', '--name=stars', f'--output={out}/stars',
          f'--general={texts}/law/train.jsonl,{texts}/poems/train.jsonl'} <= set(trained)
  assert judged[3:5] == [f'{out}/law', f'{out}/stars']
  assert {f'--domain={name}={texts}/{name}/heldout.jsonl.gz'
          for name in ('law', 'poems', 'stars')} <= set(judged)
  for arguments, message in (
      ('train --decoder=d --texts=x', '--names is missing'),
      (f'train --decoder=d --texts={tmp_path}/no --names=a', 'is no directory'),
      (f'train --decoder=d --texts={texts} --names=moon', 'moon has no train.jsonl')):
    process = recipe('experts', arguments)
    assert process.returncode == 2 and message in process.stderr
