"""Commands that must end with a message, and patterns of the key and the value in each."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Bad:
  """A command that must end with a message.

  Attributes:
    script: its name in launch/.
    arguments: {run} is a finished quickstart, {new} does not exist, {files} has two bad configs,
      a bad GGUF file and a bad tokenizer.
    message: pattern of its output, with what is wrong and, where there is one, the remedy.
    alone: without the config of the finished quickstart.
  """
  script: str
  arguments: str
  message: str
  alone: bool = False


BAD = {
    'misspelt keys': Bad(
        'pretrain', '--workdir={new} --config.training.stepz=4 --config.trainin.batch_size=4',
        r"^Error: .*'training.stepz'.*'training.loop.num_steps'.*'trainin.batch_size'"
        r".*'training.batch_size'.*docs/config.md.*launch/config.py"),
    'mistakes of several kinds': Bad(
        'pretrain', '--worxdir={new} --config.data.fils=a --config.training.batch_size=x',
        "^Error: .*'data.fils'.*'data.files'.*batch_size=x: give an integer.*'worxdir'.*workdir"),
    'several impossible values': Bad(
        'quickstart', '--workdir={new} --config.deliberation.num_traces=63 '
        '--config.evaluation.delay=9 --config.training.accumulation=0 --config.seed=-1 '
        '--config.mesh.fsdp=3',
        '(?s)--config.training.accumulation = 0.*--config.evaluation.delay = 9.*--config.seed = -1'
        ".*--config.deliberation.num_traces = 63.*'fsdp': 3"),
    'a value of another type beside one that is not allowed': Bad(
        'quickstart', '--workdir={new} --config.training.batch_size=x --config.evaluation.delay=9',
        '--config.training.batch_size=x: give an integer.*--config.evaluation.delay = 9: it must'),
    'two sources of text': Bad(
        'quickstart', '--workdir={new} --config.data.source=stdlib', "files = .*source = 'stdlib'"),
    'a pretraining of a decoder that exists': Bad(
        'pretrain', '--workdir={new} --config.decoder_from=gemma', "decoder_from = 'gemma'"),
    'the run of a pretraining as config': Bad(
        'train', '--workdir={new} --config={run}/pretraining/run.json', "run.json .*'pretrain'"),
    'no decoder at all': Bad('train', '--workdir={new}', "--decoder = ''.*decoder_from"),
    'too many texts for what a run knows': Bad(
        'evaluate', '--coprocessor={run}/coprocessor --output={new} '
        '--config.evaluation.num_texts=8000', '8000 .*evaluation.num_texts', alone=True),
    'too few texts for the gate of a run': Bad(
        'gate', '--coprocessor={run}/coprocessor --output={new}_gate '
        '--config.evaluation.rows_per_text=9999', 'evaluation.num_texts', alone=True),
    'value of another type': Bad(
        'pretrain', '--workdir={new} --config.training.batch_size=four',
        'config.training.batch_size=four: give an integer'),
    'misspelt key in a file': Bad(
        'pretrain', '--workdir={new} --config={files}/typo.py',
        "typo.py.*DeliberationConfig.*'num_latent'"),
    'impossible value in a file': Bad(
        'quickstart', '--workdir={new} --config={files}/ahead.py',
        'ahead.py.*num_ahead = 64.* 64 tokens.*num_ahead'),
    'impossible value': Bad(
        'quickstart', '--workdir={new} --config.deliberation.num_traces=63',
        'num_traces = 63.* 64 tokens .* 62 .*num_traces'),
    'no config': Bad(
        'pretrain', '--workdir={new} --config=configs/nothing.py',
        '^Error: --config=configs/nothing.py: .*no such file'),
    'a misspelt config': Bad(
        'pretrain', '--workdir={new} --config=configs/quickstrat.py',
        '--config=configs/quickstrat.py: .*did you mean configs/quickstart.py'),
    'a directory as config': Bad(
        'pretrain', '--workdir={new} --config configs', '--config=configs: .*no such file'),
    'no config at all': Bad(
        'compile', '--topology=cpu:2 --config.seed=1', '--config.seed=1 without --config',
        alone=True),
    'neither a config nor a run': Bad(
        'study', '--workdir={new} --config.seeds=(0,1)', '--workdir=.* has no run.json of a run'),
    'a coprocessor without its run': Bad(
        'evaluate', '--coprocessor={new} --output={new}_report', '--coprocessor=.* has no run.json',
        alone=True),
    'an override before its config': Bad(
        'study', '--config.seeds=(0,1) --config=configs/study/text.py --workdir={new}',
        r'--config.seeds=\(0,1\) is before --config'),
    'a config that is no Python': Bad(
        'study', '--config=README.md --workdir={new}', r'^Error: --config: .*README.md, line'),
    'a report that exists': Bad(
        'evaluate', '--coprocessor={run}/coprocessor --data={run} '
        '--decoder={run}/pretraining/decoder --output={run}',
        'report.json, .*exist already.*--overwrite'),
    'a report of other settings': Bad(
        'quickstart', '--workdir={run} --config.evaluation.bootstrap_samples=10',
        'report.json .*\n.*evaluation.bootstrap_samples: 2000 saved, 10 now\n.*--overwrite'),
    'a plan that exists': Bad(
        'compile', '--topology=cpu:2 --output={files}/plan.json',
        'plan.json exists already.*--overwrite'),
    'a shorter run': Bad(
        'pretrain', '--workdir={run}/pretraining --data={run} '
        '--config.pretraining.loop.num_steps=3',
        'pretraining.loop.num_steps: 4 saved, 3 now\n.*may only grow'),
    'a longer decoder of a quickstart': Bad(
        'quickstart', '--workdir={run} --overwrite --config.pretraining.loop.num_steps=8',
        'num_steps: 4 saved, 8 now, but .*/coprocessor was trained on'),
    'no directory': Bad('pretrain', '', '--workdir is missing'),
    'misspelt flag': Bad(
        'train', '--workdi={new}', "'workdi'. Did you mean: workdir"),
    'no flag': Bad('train', '--workdir={new} --decoder={run} more', r"\['more'\] are not flags"),
    'a file as directory': Bad(
        'pretrain', '--workdir={files}/typo.py', 'workdir=.*/typo.py: .*a file.*directory'),
    'a URL of an unknown kind as directory': Bad(
        'pretrain', '--workdir=az://bucket/run', 'workdir=az://bucket/run: .*s3://BUCKET/PATH'),
    'a backslash': Bad(
        'quickstart', '--workdir={new}\\a', r'^Error: .*new\\a has a backslash.*rename'),
    'rows as data': Bad(
        'pretrain', '--workdir={new} --data={run}/rows', '^Error: .*/rows holds the rows .*give'),
    'a decoder as work directory': Bad(
        'pretrain', '--workdir={run}/pretraining/decoder --data={run}',
        '^Error: .*/pretraining/decoder holds a finished decoder.*/pretraining, '),
    'an indivisible batch': Bad(
        'quickstart', '--workdir={new} --config.training.accumulation=3',
        r'^Error: training\.batch_size = 8 .* 3 '),
    'a multiplier of nothing': Bad(
        'quickstart', "--workdir={new} --config.training.multipliers={{'gat':2.0}}",
        r"training.multipliers .*\['gat'\].*'gate'"),
    'no decoder': Bad(
        'train', '--workdir={new} --data={run} --decoder={run}/rows', 'rows .*decoder.json'),
    'another file as decoder': Bad(
        'train', '--workdir={new} --data={run} --decoder={files}/typo.py',
        '/typo.py is a file: .*directory.*[.]gguf'),
    'a decoder that is not there': Bad(
        'generate', '--decoder={new}/decoder --prompt=a',
        'new/decoder does not exist: .*directory.*gemma3-270m'),
    'an unknown name as decoder': Bad(
        'generate', '--decoder=gemma3-27m --prompt=a',
        r'gemma3-27m does not exist \(did you mean gemma3-270m\?\)'),
    'no repository as decoder': Bad(
        'generate', '--decoder=hf://gemma-3-270m --prompt=a',
        '^Error: hf://gemma-3-270m: .*hf://ORG/NAME'),
    **{f'a decoder that is not there, for the sizes of {script}': Bad(
        script, '--config.decoder_from={new}/decoder' + more, 'new/decoder does not exist')
       for script, more in (
           ('compile', ' --topology=cpu:2 --output={files}/other.json'),
           ('benchmark_plan', ' --topology=cpu:2 --output={files}/other.json'),
           ('benchmark_attention', ' --output={files}/other.json'), ('config', ''))},
    'no source': Bad('convert', '--target={new}', '^Error: --source: .*--list'),
    'a damaged GGUF file as decoder': Bad(
        'generate', '--decoder={files}/gguf/cut.gguf --prompt=a', 'gguf/cut.gguf .*GGUF file'),
    'a damaged tokenizer as vocabulary': Bad(
        'generate', '--decoder={run}/pretraining/decoder --prompt=a --vocabulary={files}/cut.json',
        r'cut.json \(9 bytes\) .*tokenizer.json'),
    'a damaged GGUF file as source': Bad(
        'convert', '--source={files}/gguf/cut.gguf', 'gguf/cut.gguf .*GGUF file'),
    'a URL of an unknown kind as decoder': Bad(
        'augment', '--decoder=http://host/decoder --coprocessor={run}/coprocessor '
        '--document={files}/typo.py --output={new}.cache',
        'decoder=http://host/decoder: .*s3://BUCKET/PATH'),
    'a decoder of other sizes': Bad(
        'train', '--workdir={new} --data={run} --decoder={run}/pretraining/decoder '
        '--config.decoder.window=9', 'decoder.window: 8 .*, 9 .*config'),
    'another config': Bad(
        'train', '--workdir={run}/coprocessor --data={run} --decoder={run}/pretraining/decoder '
        '--config.seed=1', 'coprocessor .*another run.*\n  config.seed: 0 .*, 1 now'),
    'a run that was moved away from its data': Bad(
        'train', '--workdir={files}/moved --decoder={run}/pretraining/decoder',
        "--data = '': .*/moved holds a run, .*no rows/ .*: give the directory"),
    'another job': Bad(
        'pretrain', '--workdir={run}/coprocessor --data={run}',
        "job: 'train' .*, 'pretrain' now"),
    'evaluation of another config': Bad(
        'evaluate', '--coprocessor={run}/constant --data={run} '
        '--decoder={run}/pretraining/decoder --output={new}',
        "trainable: 'constant' .*, 'full' now"),
    'a target that exists': Bad(
        'convert', '--source={run}/pretraining/decoder --target={files}', 'files[0-9]* exists'),
    'a source without a decoder': Bad(
        'convert', '--source={run}/rows', 'rows .*decoder.json'),
    'a coprocessor as decoder': Bad(
        'convert', '--source={run}/coprocessor/coprocessor', 'coprocessor/coprocessor holds a'),
    'an unknown format': Bad(
        'convert', '--source={run}/pretraining/decoder --target={new} --format=pickle',
        'pickle.*<native|huggingface>'),
    'a negative temperature': Bad(
        'generate', '--decoder={run}/pretraining/decoder --prompt=a --temperature=-1',
        'temperature = -1.0: .*0'),
    'a prompt longer than the cache': Bad(
        'generate', '--decoder={run}/pretraining/decoder --prompt=abcdef --length=9 --max_tokens=3',
        'prompt 1 has 7 tokens.* 3 .* 9.*--length'),
    'latents after the end': Bad(
        'generate', '--decoder={run}/pretraining/decoder --coprocessor={run}/coprocessor '
        '--prompt=a --at=100 --max_tokens=10', '--at=100 .*--max_tokens=10'),
    'a chat without a template': Bad(
        'generate', '--decoder={run}/pretraining/decoder --prompt=a --chat',
        'pretraining/decoder .*chat_template.*--chat'),
    'a decoder as coprocessor': Bad(
        'generate', '--decoder={run}/pretraining/decoder --prompt=a '
        '--coprocessor={run}/pretraining/decoder', 'pretraining/decoder .*coprocessor'),
    'a run as gate': Bad(
        'generate', '--decoder={run}/pretraining/decoder --coprocessor={run}/coprocessor '
        '--prompt=a --gate={run}', 'gate.json.*launch/gate.py'),
    'latents without a coprocessor': Bad(
        'generate', '--decoder={run}/pretraining/decoder --prompt=a --every=8',
        '--every.*--coprocessor'),
    'a document that is not there': Bad(
        'augment', '--decoder={run}/pretraining/decoder --coprocessor={run}/coprocessor '
        '--document={new}.txt --output={new}.cache', 'new.txt'),
    'an unknown size': Bad(
        'benchmark_weights', '--preset=gemma9 --output={new}', 'gemma9.*gemma2_2b'),
    'an unknown topology': Bad(
        'compile', '--topology=v9:2x2 --output={files}/other.json',
        'topology=v9:2x2: .*\n  v5e: 2x2, .*v5p: .*v6e: '),
    'a mesh of no devices': Bad(
        'compile', '--topology=cpu:2 --mesh=fsdp=3 --output={files}/other.json',
        "'fsdp': 3, 'tensor': 1} .* of 3 devices, and not 2: give mesh.fsdp=1"),
    'a misspelt mesh': Bad(
        'compile', '--topology=cpu:2 --mesh=fdsp=2 --output={files}/other.json',
        "mesh=fdsp=2: 'fdsp=2' .*AXIS=SIZE"),
    'a rule for no axis of a mesh': Bad(
        'compile', '--topology=cpu:2 --rules=embed=rows --output={files}/other.json',
        r"rule 'embed' -> \('rows',\): .*\['rows'\]"),
    'a misspelt axis of a rule': Bad(
        'compile', '--topology=cpu:2 --rules=emebd=fsdp --output={files}/other.json',
        r"rule 'emebd' -> \('fsdp',\): .*did you mean 'embed'"),
    'heads that do not divide': Bad(
        'compile', '--topology=cpu:8 --mesh=tensor=4 --output={files}/other.json',
        "'kv_heads' of 2 .* 4 .*mesh.* rule"),
    'an output in no directory': Bad(
        'benchmark_weights', '--preset=tiny --output={files}/typo.py/weights.json',
        'output=.*typo.py/weights.json: .*directory that exists'),
    'an output with the name of its picture': Bad(
        'benchmark_step', '--output={files}/step.png', r'output=.*step.png: .*\.json'),
    'no document': Bad(
        'augment', '--decoder={run}/pretraining/decoder --coprocessor={run}/coprocessor '
        '--output={new}.cache', '--document is missing'),
    'an unknown task': Bad(
        'benchmark_tasks', '--decoder={run}/pretraining/decoder --tasks=pica,drop --data={files} '
        '--output={new}', 'did you mean piqa.*drop/train.jsonl is missing', alone=True),
    'no task': Bad(
        'benchmark_tasks', '--decoder={run}/pretraining/decoder --output={new}',
        r'--tasks.*mmlu \(5 shots\)', alone=True),
    'an unknown arm': Bad(
        'study', '--config=configs/study/text.py --workdir={new} --arm=nobody', "nobody"),
    'experts of a server in a store': Bad(
        'serve', '--decoder={run}/pretraining/decoder --experts=gs://bucket/experts',
        '--experts=gs://bucket/experts: .*is a URL'),
    'results in a store': Bad(
        'render_results', '--directory=gs://bucket/results',
        '--directory=gs://bucket/results: .*is a URL'),
    'fewer than no steps of a LoRA': Bad(
        'benchmark_lora', '--decoder=a --expert={run} --workdir={run} --python=python '
        '--output={files}/other.json --steps=-1', '--steps=-1: .*non-negative'),
    **{f'fewer than no threads of {script}': Bad(
        script, f'--decoder=a --output={{files}}/other.json --threads=-1{more}',
        '--threads=-1: .*non-negative')
       for script, more in (
           ('benchmark_lora', ' --expert={run} --workdir={run} --python=python'),
           ('benchmark_experts', ''))},
    'an expert without text': Bad(
        'experts', 'train --name=a --output={new}_package', "--text = ''.*--text=FOLDER",
        alone=True),
    'an expert of an empty folder': Bad(
        'experts', 'train --name=a --text={files}/gguf --output={new}_expert '
        '--decoder={run}/pretraining/decoder', '/gguf.*no file matches|no file matches .*/gguf',
        alone=True),
    'an expert with a bad name': Bad(
        'experts', 'train --name=A/b --text=x --output={new}_package', "name = 'A/b'", alone=True),
    'an unknown command of experts': Bad(
        'experts', 'lists', 'lists: give one of train', alone=True),
    'an index that is not there': Bad(
        'experts', 'list --index={new}', 'new/index.json: there is no such file', alone=True),
    'an expert that was not added': Bad(
        'generate', '--decoder={run}/pretraining/decoder --prompt=a --expert=./moon --strict',
        './moon holds no expert.json', alone=True),
    'an expert beside a coprocessor': Bad(
        'generate', '--decoder={run}/pretraining/decoder --coprocessor={run}/coprocessor '
        '--prompt=a --expert=moon', '--coprocessor=.* and --expert=moon', alone=True)}
