"""Many clients of one server at once, in a process of their own, with nothing but Python's library.

  echo '{"port": 8000, ...}' | python -m latent_deliberation.benchmarks.load_clients

Each client sends its requests one after the other and reads the streams. The result of each goes to
the standard output as a line of JSON.
"""

import http.client
import json
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

_SECONDS = 600.0  # after which a client gives an answer up


def main() -> None:
  """Runs the clients of a JSON object on the standard input: port, clients (lists of bodies)."""
  asked = json.load(sys.stdin)
  results: list[dict[str, Any]] = []

  def work(bodies: list[Mapping[str, Any]]) -> None:
    for body in bodies:
      results.append(ask(asked['port'], body))

  threads = [threading.Thread(target=work, args=(bodies,)) for bodies in asked['clients']]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for result in results:
    print(json.dumps(result))


def ask(port: int, body: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what became of one request: status, text, tokens, latents and seconds."""
  found: dict[str, Any] = {'model': body['model'], 'prompt': body['prompt'], 'status': 0,
                           'text': '', 'tokens': 0, 'first': None, 'latents': {}, 'ended': None}
  begun = time.perf_counter()
  connection = http.client.HTTPConnection('127.0.0.1', port, timeout=_SECONDS)
  try:
    connection.request('POST', '/v1/completions', json.dumps({**body, 'stream': True}),
                       {'Content-Type': 'application/json'})
    answer = connection.getresponse()
    found['status'] = answer.status
    if answer.status != 200:
      found['error'] = answer.read(2000).decode(errors='replace')
    for line in answer:
      if not line.startswith(b'data: {'):
        continue
      choice = json.loads(line[len(b'data: '):])['choices'][0]
      found['latents'] |= choice.get('latents') or {}
      if choice['logprobs']['tokens'] and found['first'] is None:
        found['first'] = time.perf_counter() - begun
      found['text'] += choice['text']
      found['tokens'] += len(choice['logprobs']['tokens'])
      found['ended'] = choice['ended_by'] or found['ended']
  except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
    found['error'] = f'{type(error).__name__}: {error}'
  finally:
    connection.close()
  return {**found, 'seconds': time.perf_counter() - begun}


if __name__ == '__main__':
  main()
