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

from latent_deliberation.cli import app, flags
from latent_deliberation.cli.flags import read_mesh, read_rules
from latent_deliberation.planning import table, topology
from latent_deliberation.planning.compile import plan_training

flags.define_config(__file__)
_TOPOLOGY = flags.define_text(
    'topology', 'v5e:16x16', 'Chip and shape of the slice (v5e:16x16, v5p:4x4x8), or cpu:8.')
_MESHES = flags.define_texts(
    'mesh', 'Sizes of mesh axes, such as data=16,fsdp=16; several to compare. Default: the config.')
_RULES = flags.define_texts(
    'rules', 'Changes of the rules, such as embed=fsdp+tensor,vocab=; several to compare.')
_OUTPUT = flags.define_json('output', 'JSON file to write.', 'plan.json')


def main() -> None:
  experiment = flags.experiment_from_flags()
  meshes = [read_mesh(text) for text in _MESHES.value]
  rules = [read_rules(text) for text in _RULES.value]
  plans = plan_training(experiment, topology.find_topology(_TOPOLOGY.value), meshes, rules,
                        Path(_OUTPUT.value))
  print('\n\n'.join(table.describe(plan) for plan in plans))
  if len(plans) > 1:
    print(f'\n{table.compare(plans)}')
  print(f'\nPlan: {_OUTPUT.value}')


if __name__ == '__main__':
  recipe = Path(__file__).parent / 'recipes/tpu.env'
  app.run(main, prepare=lambda: topology.prepare(_TOPOLOGY.value, recipe))
