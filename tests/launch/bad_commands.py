"""Commands that must end with a message, and the messages."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Bad:
  """A command that must end with a message. {run} is a finished quickstart, {new} is empty."""
  script: str
  arguments: str
  message: str


BAD = {
    'misspelt key': Bad(
        'pretrain', '--workdir={new} --config.training.batchsize=4',
        r"ValueError: --config names what is not there: 'batchsize'\nDid you mean \"batch_size\""),
    'misspelt section': Bad(
        'quickstart', '--workdir={new} --config.trainin.batch_size=4',
        "'trainin'\nDid you mean \"training\""),
    'value of another type': Bad(
        'pretrain', '--workdir={new} --config.training.batch_size=four',
        "--config.training.batch_size=four: invalid literal for int.*'four'"),
    'misspelt key in a file': Bad(
        'pretrain', '--workdir={new} --config={files}/typo.py',
        "typo.py.*DeliberationConfig.* unexpected keyword argument 'num_latent'"),
    'impossible value in a file': Bad(
        'quickstart', '--workdir={new} --config={files}/ahead.py',
        'ahead.py.*num_ahead = 64 tokens do not fit behind an anchor in a trunk of 64 .*lower'),
    'impossible value': Bad(
        'quickstart', '--workdir={new} --config.deliberation.num_traces=63',
        'num_traces = 63, but a trunk of 64 tokens has 62 places .*: lower num_traces'),
    'no config': Bad(
        'pretrain', '--workdir={new} --config=configs/nothing.py',
        'No such file .*configs/nothing.py'),
    'no directory': Bad('pretrain', '', '--workdir must have a value'),
    'misspelt flag': Bad(
        'train', '--workdi={new}', "Unknown.*'workdi'. Did you mean: workdir"),
    'no flag': Bad('train', '--workdir={new} --decoder={run} more', r"\['more'\] are not flags"),
    'a file as directory': Bad(
        'pretrain', '--workdir={files}/typo.py',
        'workdir=.*/typo.py: it is a file, and must be a directory: give another'),
    'a URL as directory': Bad(
        'pretrain', '--workdir=gs://bucket/run',
        'workdir=gs://bucket/run: it is a URL, and must be a path: mount'),
    'an indivisible batch': Bad(
        'quickstart', '--workdir={new} --config.training.accumulation=3',
        'ValueError: training: batch_size = 8 does not divide into 3 micro.* a multiple of 3'),
    'a multiplier of nothing': Bad(
        'quickstart', "--workdir={new} --config.training.multipliers={{'gat':2.0}}",
        r"training.multipliers names \['gat'\]: what learns there is among"),
    'no decoder': Bad(
        'train', '--workdir={new} --data={run} --decoder={files}',
        'holds no decoder: neither decoder.json'),
    'a decoder of other sizes': Bad(
        'train', '--workdir={new} --data={run} --decoder={run}/pretraining/decoder '
        '--config.decoder.window=9',
        'decoder.window: 8 there, 9 in the config\nChange the config'),
    'another config': Bad(
        'train', '--workdir={run}/coprocessor --data={run} --decoder={run}/pretraining/decoder '
        '--config.seed=1',
        'coprocessor belongs to another run:\n  config.seed: 0 there, 1 now\nUse another'),
    'another job': Bad(
        'pretrain', '--workdir={run}/coprocessor --data={run}',
        "job: 'train' there, 'pretrain' now"),
    'evaluation of another config': Bad(
        'evaluate', '--coprocessor={run}/constant --data={run} '
        '--decoder={run}/pretraining/decoder --output={new}',
        "trainable: 'constant' there, 'full' now"),
    'a target that exists': Bad(
        'convert', '--source={run}/pretraining/decoder --target={files}',
        'files[0-9]* exists already and is not written over'),
    'a source without a decoder': Bad(
        'convert', '--source={run}/rows', 'rows holds no decoder: neither decoder.json'),
    'an unknown format': Bad(
        'convert', '--source={run}/pretraining/decoder --target={new} --format=pickle',
        "pickle.* should be one of <native|huggingface>"),
    'a negative temperature': Bad(
        'generate', '--decoder={run}/pretraining/decoder --prompt=a --temperature=-1',
        'temperature = -1.0: it must be 0'),
    'a prompt longer than the cache': Bad(
        'generate', '--decoder={run}/pretraining/decoder --prompt=abcdef --length=9 --max_tokens=3',
        'text 0 has 7 tokens, 3 more are asked for, and the cache has room for 9: shorten it'),
    'a decoder as coprocessor': Bad(
        'generate', '--decoder={run}/pretraining/decoder --prompt=a '
        '--coprocessor={run}/pretraining/decoder', 'holds no trained coprocessor'),
    'a run as gate': Bad(
        'generate', '--decoder={run}/pretraining/decoder --coprocessor={run}/coprocessor '
        '--prompt=a --gate={run}', 'holds no gate.json: give the output of launch/gate.py'),
    'latents without a coprocessor': Bad(
        'generate', '--decoder={run}/pretraining/decoder --prompt=a --every=8',
        '--every without a --coprocessor, which makes the latents: give one'),
    'a document that is not there': Bad(
        'augment', '--decoder={run}/pretraining/decoder --coprocessor={run}/coprocessor '
        '--document={new}.txt --output={new}.cache', 'no file .*new.txt: give one with the text'),
    'an unknown size': Bad(
        'benchmark_weights', '--preset=gemma9 --output={new}', 'gemma9.* should be one of .*gemma'),
    'an unknown topology': Bad(
        'compile', '--topology=v9:2x2 --output={files}/plan.json',
        'topology=v9:2x2: a topology is .*\n  v5e: 2x2, .*v5p: .*v6e: '),
    'a mesh of no devices': Bad(
        'compile', '--topology=cpu:2 --mesh=fsdp=3 --output={files}/plan.json',
        "'fsdp': 3, 'tensor': 1} has .* for 2 devices: the sizes must multiply"),
    'a misspelt mesh': Bad(
        'compile', '--topology=cpu:2 --mesh=fdsp=2 --output={files}/plan.json',
        "mesh=fdsp=2: 'fdsp=2' must be AXIS=SIZE"),
    'a rule for no axis of a mesh': Bad(
        'compile', '--topology=cpu:2 --rules=embed=rows --output={files}/plan.json',
        r"rule 'embed' -> \('rows',\): \['rows'\] are not mesh axes"),
    'a misspelt axis of a rule': Bad(
        'compile', '--topology=cpu:2 --rules=emebd=fsdp --output={files}/plan.json',
        r"rule 'emebd' -> \('fsdp',\): no tensor has .* did you mean 'embed'"),
    'heads that do not divide': Bad(
        'compile', '--topology=cpu:8 --mesh=tensor=4 --output={files}/plan.json',
        "its axis 'kv_heads' of 2 does not divide by the 4 shards .*change the mesh or the rule"),
    'an output in no directory': Bad(
        'benchmark_weights', '--preset=tiny --output={files}/typo.py/weights.json',
        'must be a file in a directory that exists'),
    'an output with the name of its picture': Bad(
        'benchmark_step', '--output={files}/step.png', 'step.png: .* and end in .json'),
    'no document': Bad(
        'augment', '--decoder={run}/pretraining/decoder --coprocessor={run}/coprocessor '
        '--output={new}.cache', '--document must have a value'),
}
