"""Made-up documents of some benchmarks, in the form of their files."""

import gzip
import json
from pathlib import Path

WORDS = ('read', 'write', 'open', 'close', 'begin', 'end', 'forty', 'document', 'the', 'number')


def documents(count: int = 6) -> dict[str, list[dict]]:
  """Returns documents by file, such as 'piqa/validation'."""
  word = lambda number: WORDS[number % len(WORDS)]  # noqa: E731
  numbers = range(count)
  return {
      'piqa/validation': [
          {'goal': f'How do I {word(n)} the {n}th of the forty', 'sol1': f'{word(n)} it twice.',
           'sol2': f'{word(n + 3)} it, then {word(n + 1)} it.', 'label': n % 2} for n in numbers],
      'boolq/validation': [
          {'passage': f'Document {n}: the {n}th of the forty. ' * (1 + n % 3),
           'question': f'is {n} a {word(n)}', 'answer': bool(n % 3)} for n in numbers],
      'winogrande/validation': [
          {'sentence': f'The {word(n)} was before the number since _ came first.',
           'option1': f'the {word(n)}', 'option2': 'the number', 'answer': str(1 + n % 2)}
          for n in numbers],
      'triviaqa/validation_6': [
          {'context': f'Question: What is the {n}th {word(n)}?\nAnswer:', 'answer': word(n),
           'aliases': [word(n), word(n).upper()]} for n in numbers],
      'gsm8k/train': [
          {'question': f'What is {n} and {n}?', 'answer': f'{n} + {n} = {2 * n}\n#### {2 * n}'}
          for n in range(10)],
      'gsm8k/test': [
          {'question': f'How many are {n} and {word(n)}?', 'answer': f'It is {n}.\n#### {n}'}
          for n in numbers],
      'mmlu/dev': [{'question': f'{subject} {n}?', 'subject': subject, 'choices': list('wxyz'),
                    'answer': n % 4} for subject in ('high_school', 'law') for n in range(5)],
      'mmlu/test': [{'question': f'Which {n}?', 'subject': ('high_school', 'law')[n % 2],
                     'choices': [word(n + at) for at in range(4)], 'answer': n % 4}
                    for n in numbers],
      'humaneval/test': [{
          'task_id': f'made/{n}', 'prompt': f'def plus_{n}(x):\n', 'entry_point': f'plus_{n}',
          'canonical_solution': f'  return x + {n}\n',
          'test': f'def check(candidate):\n  assert candidate(1) == {n + 1}\n'} for n in numbers],
      'mbpp/all': [{
          'task_id': n, 'text': f'Add {n}.', 'code': f'def add(x):\r\n  return x + {n}',
          'test_setup_code': '', 'test_list': [f'assert add({each}) == {each + n}' for each in (
              1, 2, 3)]} for n in range(2, 14)],
      'math/test': [{'context': f'What is {n} + 1?', 'answer': str(n + 1),
                     'chain_of_thought': f'It is $\\boxed{{{n + 1}}}$.', 'category': 'algebra'}
                    for n in range(8)],
      'bbh/cot_prompts': [{'task': 'sums', 'prompt': 'A canary.\n-----\nAdd up.' + ''.join(
          f"\n\nQ: {n} + 1 is\nA: Let's think step by step.\nSo the answer is {n + 1}."
          for n in range(3))}],
      'bbh/test': [{'task': 'sums', 'input': f'{n} + 2 is', 'target': str(n + 2)}
                   for n in numbers],
      'agieval/test': [{'task': 'sat-math', 'passage': '', 'question': f'What is {n}?',
                        'options': ['(A)1', '(B)2', '(C)3'], 'label': 'ABC'[n % 3]}
                       for n in numbers] + [
          {'task': 'math', 'passage': None, 'question': f'Find {n}.', 'options': None,
           'label': None, 'answer': str(n)} for n in numbers]}


def write(directory: Path, *names: str, count: int = 6) -> Path:
  """Writes the files of these folders, every second one compressed; returns the directory."""
  for number, (file, docs) in enumerate(documents(count).items()):
    if names and file.split('/')[0] not in names:
      continue
    text = ''.join(json.dumps(doc) + '\n' for doc in docs)
    path = directory / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if number % 2:
      path.with_name(f'{path.name}.jsonl.gz').write_bytes(gzip.compress(text.encode()))
    else:
      path.with_name(f'{path.name}.jsonl').write_text(text)
  return directory
