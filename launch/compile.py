"""Plans training on a TPU slice that is not there: memory, time, utilisation, collectives.

  python launch/compile.py --config=configs/gemma2_2b.py --topology=v5e:16x16 --output=plan.json \\
      --mesh=data=16,fsdp=16 --mesh=fsdp=256

Compiles the very step that launch/train.py runs with TPU's own compiler (pip install -e '.[tpu]'),
without a TPU; --topology=cpu:8 plans memory and collectives on eight virtual devices. Every --mesh
is planned under every --rules; several plans make a table, with a CSV and a PNG beside --output.
The seconds are an estimate by the compiler's cycles and the links' bandwidth: contention in the
network and host input are left out, and nothing is run. Flags for the compiler are those of
LIBTPU_INIT_ARGS where it is set, otherwise those that the recipes train with (recipes/tpu.env).
Next, train on the mesh that is best: launch/train.py --config.mesh.fsdp=...
"""

from pathlib import Path

from absl import flags

from latent_deliberation.cli import app
from latent_deliberation.experiment import define_config, read_config
from latent_deliberation.planning import table, topology
from latent_deliberation.planning.compile import plan_training
from latent_deliberation.sharding import parse_mesh, parse_rules

define_config(__file__)
_TOPOLOGY = flags.DEFINE_string(
    'topology', 'v5e:16x16', 'Chip and shape of the slice, such as v5e:16x16, or cpu:8.')
_MESHES = flags.DEFINE_multi_string(
    'mesh', [], 'Sizes of mesh axes, such as data=16,fsdp=16; may be repeated. Default: the config.')
_RULES = flags.DEFINE_multi_string(
    'rules', [], 'Changes of the sharding rules, such as embed=fsdp+tensor; may be repeated.')
_OUTPUT = app.define_json('output', 'JSON file to write.', 'plan.json')


def main() -> None:
  experiment = read_config()
  meshes = [parse_mesh(text) for text in _MESHES.value]
  rules = [parse_rules(text) for text in _RULES.value]
  plans = plan_training(experiment, topology.find_topology(_TOPOLOGY.value), meshes, rules,
                        Path(_OUTPUT.value))
  print('\n\n'.join(table.describe(plan) for plan in plans))
  if len(plans) > 1:
    print(f'\n{table.compare(plans)}')
  print(f'\nPlan: {_OUTPUT.value}')


if __name__ == '__main__':
  recipe = Path(__file__).parent / 'recipes/tpu.env'
  app.run(main, prepare=lambda: topology.prepare(_TOPOLOGY.value, recipe))
