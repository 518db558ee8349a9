"""x

  python launch/experts.py train
Next
"""

from pathlib import Path

from absl import flags

from latent_deliberation.build import with_decoder
from latent_deliberation.cli import app
from latent_deliberation.cli.config_flag import define_config, given_keys, read_config
from latent_deliberation.cli.make_expert import ExpertRequest, make_expert

define_config(__file__, 'configs/gemma3_270m.py')
_DECODER = app.define_decoder('decoder', 'Decoder', '')
_TEXT = flags.DEFINE_string('text', '', 'Text.')
_GENERAL = flags.DEFINE_string('general', '', 'Text.')
_NAME = flags.DEFINE_string('name', '', 'Text.')
_OUTPUT = app.define_directory('output', 'Decoder', '')
_WORKDIR = app.define_directory('workdir', 'Decoder', '')
_MINUTES = flags.DEFINE_float('minutes', 0.0, 'x')


def main(words) -> None:
  experiment = with_decoder(read_config(on_devices=True), _DECODER.value, given_keys())
  request = ExpertRequest(_NAME.value, _TEXT.value, _GENERAL.value, _MINUTES.value)
  card = make_expert(experiment, request, Path(_WORKDIR.value), Path(_OUTPUT.value), given_keys())
  print(card.address)


if __name__ == '__main__':
  app.run(main, takes_words=True)
