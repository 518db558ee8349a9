"""Lets orbax keep arrays in s3://, for which TensorStore has a driver and orbax has no name."""

import os
import re
from collections.abc import Mapping
from typing import Any

from latent_deliberation.errors import UserError
from latent_deliberation.stores import open_filesystem


def teach_orbax() -> None:
  """Puts s3:// into the function with which orbax describes the place of arrays for TensorStore.

  The function is private to the library. After the first call this does nothing.

  Raises:
    UserError: a later version of orbax has no such function.
  """
  try:
    from orbax.checkpoint._src.serialization import tensorstore_utils
    describe_place = tensorstore_utils.build_kvstore_tspec
  except (ImportError, AttributeError) as error:
    raise UserError('this version of orbax-checkpoint has no way to s3://: install 0.12.8, or give '
                    'gs:// or a path of this machine') from error
  if hasattr(describe_place, 'knows_s3'):
    return

  def build(directory: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    scheme, _, rest = directory.partition('://')
    if scheme != 's3':
      return describe_place(directory, *args, **kwargs)
    # As for gs://, with another driver wherever that one stands.
    return _with_s3(describe_place(f'gs://{rest}', *args, **kwargs), _s3_options(directory))

  build.knows_s3 = True
  tensorstore_utils.build_kvstore_tspec = build


def _with_s3(spec: Any, options: Mapping[str, Any]) -> Any:
  if isinstance(spec, list):
    return [_with_s3(each, options) for each in spec]
  if not isinstance(spec, dict):
    return spec
  if spec.get('driver') in ('gcs', 'gcs_grpc'):
    return {**spec, **options}
  return {key: _with_s3(value, options) for key, value in spec.items()}


def _s3_options(url: str) -> dict[str, Any]:
  """Returns TensorStore's options for the endpoint and region that s3fs found."""
  client = open_filesystem('s3', url)
  client.connect()
  endpoint, region = client.s3.meta.endpoint_url, client.s3.meta.region_name
  options: dict[str, Any] = {'driver': 's3'}
  if not re.search(r'\.amazonaws\.com(\.cn)?/?$', endpoint):
    options |= {'endpoint': endpoint, 'aws_region': region or 'us-east-1'}
  if os.environ.get('AWS_ACCESS_KEY_ID'):
    # Otherwise TensorStore looks in more places, and writes of each that it does not find.
    options['aws_credentials'] = {'type': 'environment'}
  return options
