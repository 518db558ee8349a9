"""A trained run, with its config, decoder and data, for the commands that score it."""

import contextlib
import dataclasses
from pathlib import Path

from latent_deliberation.build import with_decoder
from latent_deliberation.cli.config_flag import given_keys, read_config
from latent_deliberation.deliberation.coprocessor_checkpoint import locate_coprocessor
from latent_deliberation.errors import UserError
from latent_deliberation.experiment import Experiment
from latent_deliberation.files import as_path
from latent_deliberation.paths import DECODER, PRETRAINING, ROWS
from latent_deliberation.training.run_identity import noted_data


@dataclasses.dataclass(frozen=True)
class TrainedRun:
  """A run to score.

  Attributes:
    experiment: --config with its overrides, or the config of the run.
    decoder_dir: directory of the frozen decoder.
    coprocessor_dir: directory of the trained coprocessor, or the work directory of its run.
    prepared_dir: directory of prepared data.
  """
  experiment: Experiment
  decoder_dir: Path
  coprocessor_dir: Path
  prepared_dir: Path


def open_run(decoder: str, coprocessor: str, data: str) -> TrainedRun:
  """Returns the run of a coprocessor, with what flags say and what the run itself knows.

  Args:
    decoder: --decoder, or ''.
    coprocessor: --coprocessor: the work directory of a run, or the coprocessor/ in it.
    data: --data, or ''.

  Raises:
    UserError: neither the flags nor the run say where the decoder or the data are.
  """
  # The run, and the quickstart that it may be a phase of.
  run_dir = locate_coprocessor(as_path(coprocessor)).parent
  quickstart = run_dir.absolute().parent
  experiment = with_decoder(read_config(on_devices=True), decoder, given_keys())
  pretrained = quickstart / PRETRAINING / DECODER
  if not experiment.decoder_from and not pretrained.is_dir():
    raise UserError(f"--decoder = '': {run_dir} does not say which decoder it was trained on; "
                    'give its directory')
  return TrainedRun(experiment, as_path(experiment.decoder_from or pretrained),
                    as_path(coprocessor), as_path(data) if data else _find_rows(run_dir))


def _find_rows(run_dir: Path) -> Path:
  """Returns the directory of prepared data of a run. Raises UserError where it is not known."""
  noted = None
  with contextlib.suppress(FileNotFoundError, UserError):  # the coprocessor alone is here
    noted = noted_data(run_dir)
  # Runs of earlier code note nothing, and a quickstart has its data in the directory above.
  places = [noted] if noted else [run_dir, run_dir.absolute().parent]
  for place in places:
    if (place / ROWS).is_dir():
      return place
  raise UserError(f"--data = '': there are no {ROWS}/ in {' or '.join(map(str, places))}; give the "
                  f'directory of prepared data of {run_dir}')
