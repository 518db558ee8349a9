"""What every launch script does before and around its job: flags, logging, errors for people."""

import os
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from latent_deliberation.jobs.experiment import Experiment, bind

CONFIG_HELP = 'Config file. Override any key of it, as in --config.training.batch_size=16.'


def define_config(launch_script: str, default: str | None = None) -> None:
  """Defines --config; a default is a path relative to the root of the source tree."""
  root = Path(launch_script).resolve().parents[1]
  config_flags.DEFINE_config_file(
      'config', str(root / default) if default else None, CONFIG_HELP, lock_config=True)
  if default is None:
    flags.mark_flag_as_required('config')


def define_directory(name: str, meaning: str, default: str | None = None) -> flags.FlagHolder:
  """Defines a flag that names a directory; required where there is no default."""
  return flags.DEFINE_string(name, default, meaning, required=default is None)


def experiment_from_flags() -> Experiment:
  """The experiment that --config and its overrides describe, checked."""
  return bind(flags.FLAGS.config)


def run(job: Callable[[], None]) -> None:
  """Parses the flags and runs the job.

  Bad input ends the process with its message and code 1, without a traceback (--verbosity=1 logs
  it); anything unforeseen keeps its traceback.
  """

  def main(argv: list[str]) -> None:
    if len(argv) > 1:
      raise app.UsageError(f'{argv[1:]} are not flags: write --name=value')
    logging.set_verbosity(max(flags.FLAGS.verbosity, logging.INFO))
    # orbax logs a dozen lines a checkpoint; its warnings and errors come back as exceptions.
    logging.get_absl_logger().addFilter(lambda record: f'{os.sep}orbax{os.sep}' not in
                                        record.pathname)
    logging.info('%d %s devices, process %d of %d', jax.device_count(), jax.default_backend(),
                 jax.process_index(), jax.process_count())
    try:
      job()
    except jax.errors.JaxRuntimeError:
      raise
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
      logging.debug('the error below, with its traceback:', exc_info=True)
      raise SystemExit(f'{type(error).__name__}: {error}') from None

  app.run(main)
