"""GGUF files are read as the decoders that they were written from, or refused."""

import dataclasses
import hashlib
import re
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn

from latent_deliberation.errors import UserError
from latent_deliberation.model import weights
from latent_deliberation.model.checkpoints import gguf_io, hugging_face, named
from latent_deliberation.model.decoder import Decoder, fingerprint
from latent_deliberation.model.rotary import rotary_frequencies
from latent_deliberation.model.transformer_config import PRESETS, TransformerConfig
from latent_deliberation.paths import CACHE_VARIABLE

gguf = pytest.importorskip('gguf')

_LLAMA = TransformerConfig(
    vocab_size=48, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    hidden_dim=64, layer_pattern=('global',), attention_softcap=None, final_softcap=None,
    post_norms=False, norm_offset=False, activation='silu', scale_embeddings=False,
    norm_epsilon=1e-5, rope_base=5e4)
_SIZES = dict(vocab_size=48, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
              hidden_dim=64, window=8)
CONFIGS = {
    'gemma': dataclasses.replace(PRESETS['gemma1_2b'], **{**_SIZES, 'window': 4096}),
    'gemma2': dataclasses.replace(PRESETS['gemma2_2b'], **_SIZES),
    'gemma3': dataclasses.replace(PRESETS['gemma3_1b'], **_SIZES),
    'llama': _LLAMA,
    'llama untied': dataclasses.replace(_LLAMA, tied_head=False),
    'llama 3': dataclasses.replace(_LLAMA, rope_llama3=(32.0, 1.0, 4.0, 8192.0)),
    'qwen2': dataclasses.replace(_LLAMA, qkv_bias=True),
    'qwen3': dataclasses.replace(_LLAMA, qk_norm=True)}
STORED = {'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k', 'self_attn.v_proj': 'attn_v',
          'self_attn.o_proj': 'attn_output', 'self_attn.q_norm': 'attn_q_norm',
          'self_attn.k_norm': 'attn_k_norm', 'mlp.gate_proj': 'ffn_gate', 'mlp.up_proj': 'ffn_up',
          'mlp.down_proj': 'ffn_down', 'input_layernorm': 'attn_norm',
          'pre_feedforward_layernorm': 'ffn_norm', 'post_feedforward_layernorm': 'post_ffw_norm'}


def random_params(config):
  boxed = jax.jit(Decoder(config).init)(jax.random.key(0), np.zeros((1, 1), int))
  params = nn.unbox(boxed)['params']
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return jax.tree.unflatten(tree, [jax.random.normal(key, leaf.shape) * 0.3
                                   for key, leaf in zip(keys, leaves, strict=True)])


def interleave(values, heads):
  """Rows of heads in llama.cpp's order for the architecture 'llama': pairs are neighbours."""
  return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def write(path, kind, config, params, leave_out=(), quantise=None, architecture=None, more=(),
          metadata=lambda writer: None):
  """Writes a GGUF file as llama.cpp's converter does from the Hugging Face tensors.

  Args:
    kind: key of CONFIGS, whose first word is the architecture.
    leave_out: names of tensors that are missing.
    quantise: type of the matrices; default F32.
    architecture: another name of the architecture.
    more: additional tensors and their names.
    metadata: function that adds metadata to the writer.
  """
  arch = kind.split()[0]
  writer = gguf.GGUFWriter(path, architecture or arch)
  writer.add_block_count(config.num_layers)
  writer.add_embedding_length(config.embed_dim)
  writer.add_feed_forward_length(config.hidden_dim)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_key_length(config.head_dim)
  writer.add_layer_norm_rms_eps(config.norm_epsilon)
  writer.add_rope_freq_base(config.rope_base)
  if kind in ('gemma2', 'gemma3'):
    writer.add_sliding_window(config.window)
  if kind == 'gemma2':
    writer.add_attn_logit_softcapping(config.attention_softcap)
    writer.add_final_logit_softcapping(config.final_softcap)
  metadata(writer)
  if config.rope_llama3:
    plain = rotary_frequencies(config.head_dim, config.rope_base)
    scaled = rotary_frequencies(config.head_dim, config.rope_base, 1, config.rope_llama3)
    writer.add_tensor('rope_freqs.weight', (plain / scaled).astype(np.float32))
  layout = hugging_face.find_layout(config)
  for name, values in hugging_face.stored_tensors(layout, config, params):
    values = np.ascontiguousarray(values, np.float32)
    if name.endswith('norm.weight') and config.norm_offset:
      values = values + 1
    if arch == 'llama' and re.search(r'\.[qk]_proj\.', name):
      values = interleave(values, config.num_heads if '.q_' in name else config.num_kv_heads)
    stored = name.replace('model.embed_tokens', 'token_embd').replace('model.norm', 'output_norm')
    stored = stored.replace('lm_head', 'output').replace('model.layers.', 'blk.')
    second = 'post_attention_norm' if config.post_norms else 'ffn_norm'
    stored = stored.replace('post_attention_layernorm', second)
    for theirs, ours in STORED.items():
      stored = stored.replace(theirs, ours)
    if stored in leave_out:
      continue
    if quantise is not None and values.ndim == 2 and 'token_embd' not in stored:
      writer.add_tensor(stored, gguf.quantize(values, quantise), raw_dtype=quantise)
    else:
      writer.add_tensor(stored, values)
  for name, values in more:
    writer.add_tensor(name, values)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize('kind', CONFIGS)
def test_round_trip(kind, tmp_path):
  """Every architecture comes back with its config and, without an offset, every bit."""
  config, params = CONFIGS[kind], random_params(CONFIGS[kind])
  found, loaded = weights.load(write(tmp_path / 'model.gguf', kind, config, params))
  assert found == config
  offset = config.norm_offset  # 1 + scale is rounded where it is stored
  for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 if offset else 0)


def test_directory_with_one_file(tmp_path):
  """A directory with one file is that file; with two, it is refused."""
  write(tmp_path / 'model.gguf', 'llama', _LLAMA, random_params(_LLAMA))
  assert weights.open_checkpoint(tmp_path).format == 'gguf'
  (tmp_path / 'again.gguf').write_bytes((tmp_path / 'model.gguf').read_bytes())
  with pytest.raises(UserError, match=r'2 GGUF files.*again.gguf.*model.gguf'):
    weights.open_checkpoint(tmp_path)


def test_quantised_values_and_dtype(tmp_path):
  """Q8_0 is dequantised, and weights are cast to the dtype that is given."""
  config, params = _LLAMA, random_params(_LLAMA)
  path = write(tmp_path / 'model.gguf', 'llama', config, params,
               quantise=gguf.GGMLQuantizationType.Q8_0)
  _, loaded = weights.load(path, dtype='bfloat16')
  gate = loaded['transformer']['blocks']['feed_forward']['gate']['w']
  assert gate.dtype == 'bfloat16'
  np.testing.assert_allclose(
      np.asarray(gate, np.float32), params['transformer']['blocks']['feed_forward']['gate']['w'],
      atol=0.02)


@pytest.mark.parametrize('kind', ['llama', 'gemma3', 'qwen2'])
def test_a_host_dequantises_its_rows(kind, tmp_path, monkeypatch):
  """A shard is read from its own rows, also where the file has them in another order."""
  config = CONFIGS[kind]
  path = write(tmp_path / 'model.gguf', kind, config, random_params(config),
               quantise=gguf.GGMLQuantizationType.Q8_0)
  source, read = weights.open_checkpoint(path).source, []
  dequantise = source._dequantise
  monkeypatch.setattr(source, '_dequantise', lambda data, type_: read.append(
      len(data)) or dequantise(data, type_))
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ('rows', 'others'))
  for name, stored in source.tensors.items():
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    expected = source.read(name, stored.shape, one)
    axes = ('rows', 'others')[:len(stored.shape)]
    read.clear()
    found = source.read(name, stored.shape, jax.NamedSharding(
        mesh, jax.sharding.PartitionSpec(*axes)))
    np.testing.assert_array_equal(found, expected)
    if len(stored.shape) == 2:  # each row once, although two devices hold parts of it
      assert read == [stored.shape[0] // 4] * 4


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The bytes of a whole file, with arrays of all kinds in its metadata."""
  def add_arrays(writer):
    writer.add_token_list(['a', 'bc', '', 'é'])
    writer.add_token_scores([0.5, -1.0, 2.0, 3.0])
    writer.add_array('flags', [True, False])
    writer.add_array('nested', [[1, 2], [3]])

  path = tmp_path_factory.mktemp('whole') / 'model.gguf'
  return write(path, 'llama', _LLAMA, random_params(_LLAMA), metadata=add_arrays).read_bytes()


@pytest.fixture
def damaged(tmp_path, whole):
  """A function that writes the file with some bytes replaced, or cut to a size."""
  def write_damaged(old=b'', new=b'', size=None):
    assert whole.count(old) == 1 or not old
    (tmp_path / 'model.gguf').write_bytes(whole.replace(old, new)[:size])
    return tmp_path / 'model.gguf'

  return write_damaged


def test_name(damaged, tmp_path, monkeypatch):
  """A name gives the decoder that its file gives: known by its weights, not by a path."""
  path = damaged()
  sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
  model = named.PackagedModel('Tiny', 'none', 'tiny', (('tiny', 'model.gguf'),), path.name, sha256)
  monkeypatch.setitem(named.MODELS, 'tiny', model)
  monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / 'cache'))
  monkeypatch.setattr(named, '_find_parts', lambda name: [path])
  checkpoint = weights.open_checkpoint(Path('tiny'), weights.open_checkpoint(path).config)
  assert checkpoint.directory == path
  assert fingerprint(checkpoint.load()) == fingerprint(weights.load(path)[1])


def test_fast_reader(damaged):
  """Arrays are read as the library reads them, but numbers are one part."""
  from latent_deliberation.model.checkpoints import gguf_reader  # imports the library
  ours, library = gguf_reader.ArrayReader(damaged()), gguf.GGUFReader(damaged())
  assert {key: field.contents() for key, field in ours.fields.items()} == {
      key: field.contents() for key, field in library.fields.items()}
  assert len(ours.fields['tokenizer.ggml.scores'].parts) == 4  # name, its length, type, values
  assert [tensor.data_offset for tensor in ours.tensors] == [
      tensor.data_offset for tensor in library.tensors]


def test_cut_short(damaged, whole):
  """A file that is cut short anywhere is refused."""
  in_tokens = whole.index(b'tokenizer.ggml.tokens') + 50
  in_scores = whole.index(b'tokenizer.ggml.scores') + 40
  for size in (0, 10, in_tokens, in_scores, len(whole) // 2, len(whole) - 100):
    with pytest.raises(UserError, match=f'model.gguf .{size:,} bytes. .*download it again'):
      weights.open_checkpoint(damaged(size=size))


@pytest.mark.parametrize('number, message', [
    (99, 'library does not know .*99.*update'), (26, 'blk.0.ffn_up.weight is stored as I32')])
def test_unknown_type(damaged, number, message):
  """A type of a tensor that the library does not know or cannot dequantise is refused at once."""
  name = b'blk.0.ffn_up.weight'
  stored, other = (name + struct.pack('<IQQI', 2, 32, 64, kind) for kind in (0, number))
  with pytest.raises(UserError, match=f'model.gguf: .*{message}.*of another type'):
    weights.open_checkpoint(damaged(stored, other))


@pytest.mark.parametrize('key', [
    'llama.block_count', 'llama.embedding_length', 'llama.feed_forward_length',
    'llama.attention.head_count', 'llama.attention.layer_norm_rms_epsilon'])
def test_missing_key(damaged, key):
  """A key of the metadata that is missing is named."""
  stored = struct.pack('<Q', len(key)) + key.encode()
  with pytest.raises(UserError, match=f"model.gguf lacks '{key}'.*download it again"):
    weights.open_checkpoint(damaged(stored, stored[:-1] + b'_'))


def test_heads_without_groups(tmp_path):
  """llama.cpp names the heads of keys only if the model's config did; else there are as many."""
  config = dataclasses.replace(_LLAMA, num_kv_heads=_LLAMA.num_heads)
  params = random_params(config)
  path = write(tmp_path / 'model.gguf', 'llama', config, params)
  key = b'llama.attention.head_count_kv'
  path.write_bytes(path.read_bytes().replace(key, key[:-1] + b'_'))
  found, loaded = weights.load(path)
  assert found == config and fingerprint(loaded) == fingerprint(params)


@pytest.mark.parametrize('keys, expected', [
    ({'scaling.factor': 8.0, 'scaling.type': 'linear'}, 8.0), ({'scaling.factor': 8.0}, 8.0),
    ({'scale_linear': 4.0}, 4.0), ({'scaling.factor': 8.0, 'scaling.type': 'none'}, 1.0)])
def test_scaling_of_positions(tmp_path, keys, expected):
  """A factor counts as llama.cpp counts it: also without a type, and by its older name."""
  def add(writer):
    for key, value in keys.items():
      (writer.add_string if isinstance(value, str) else writer.add_float32)(
          f'llama.rope.{key}', value)

  path = write(tmp_path / 'model.gguf', 'llama', _LLAMA, random_params(_LLAMA), metadata=add)
  assert weights.open_checkpoint(path).config.rope_scaling == expected


@pytest.mark.parametrize('pattern, expected', [
    (3, ('local', 'local', 'global')), (1, ('global',)), ([True, False], ('local', 'global'))])
def test_gemma3_of_other_settings(tmp_path, pattern, expected):
  """What a file says goes before Google's values; without local layers there is no window."""
  config = dataclasses.replace(
      CONFIGS['gemma3'], layer_pattern=expected, final_softcap=30.0, rope_local_base=2e4,
      window=CONFIGS['gemma3' if 'local' in expected else 'gemma'].window)

  def add(writer):
    writer.add_sliding_window_pattern(pattern)
    writer.add_rope_freq_base_swa(config.rope_local_base)
    writer.add_final_logit_softcapping(config.final_softcap)

  path = write(tmp_path / 'model.gguf', 'gemma3', config, random_params(config), metadata=add)
  assert weights.open_checkpoint(path).config == config
  if expected == ('global',):
    path.write_bytes(path.read_bytes().replace(b'sliding_window\x04', b'sliding_windoW\x04'))
    assert weights.open_checkpoint(path).config.layer_pattern == expected


def test_gemma3_pattern_of_other_length(tmp_path):
  config = CONFIGS['gemma3']
  path = write(tmp_path / 'model.gguf', 'gemma3', config, random_params(config),
               metadata=lambda writer: writer.add_sliding_window_pattern([True] * 3))
  with pytest.raises(UserError, match='sliding_window_pattern has 3 values for 2 layers'):
    weights.open_checkpoint(path)


def test_gemma3_names_its_rotary_base(tmp_path):
  config = CONFIGS['gemma3']
  path = write(tmp_path / 'model.gguf', 'gemma3', config, random_params(config))
  path.write_bytes(path.read_bytes().replace(b'gemma3.rope.freq_base', b'gemma3.rope.freq_bas_'))
  with pytest.raises(UserError, match='lacks .*gemma3.rope.freq_base'):
    weights.open_checkpoint(path)


def test_other_order_of_bytes(tmp_path):
  """A big-endian file would be read as other numbers."""
  writer = gguf.GGUFWriter(tmp_path / 'model.gguf', 'llama', endianess=gguf.GGUFEndian.BIG)
  writer.add_block_count(2)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(UserError, match='big-endian'):
    weights.open_checkpoint(tmp_path / 'model.gguf')


@pytest.mark.parametrize('options, message', [
    ({'metadata': lambda writer: writer.add_string('split.count', 'many')}, 'one of many parts'),
    ({'architecture': 'mamba'}, "architecture 'mamba'"),
    ({'leave_out': ('blk.1.attn_v.weight',)}, 'layers.1.self_attn.v_proj.weight: missing'),
    ({'more': [('blk.0.attn_qkv.weight', np.zeros((2, 2), np.float32))]}, 'blk.0.attn_qkv.weight'),
    ({'more': [('rope_freqs.weight', np.ones(3, np.float32))]}, r'rope_freqs.weight \[3\]'),
    ({'leave_out': ('blk.0.ffn_up.weight',),
      'more': [('blk.0.ffn_up.weight', np.zeros((63, 32), np.float32))]},
     r'layers.0.mlp.up_proj.weight: has shape \[63, 32\], expected \[64, 32\]'),
    ({'leave_out': ('token_embd.weight',)}, 'lacks .*embed_tokens'),
    ({'metadata': lambda writer: writer.add_uint16('split.count', 3)}, 'one of 3 parts'),
    ({'metadata': lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)},
     "scaling.type = 'yarn'")])
def test_unsupported_files(options, message, tmp_path):
  """Files that we would read wrongly are refused, with the name of what differs."""
  path = write(tmp_path / 'model.gguf', 'llama', _LLAMA, random_params(_LLAMA), **options)
  with pytest.raises(UserError, match=message):
    weights.open_checkpoint(path).check()


def test_library_missing(tmp_path, monkeypatch):
  """Without the gguf library, the error says how to install it."""
  path = write(tmp_path / 'model.gguf', 'llama', _LLAMA, random_params(_LLAMA))
  monkeypatch.setattr(gguf_io.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"pip install -e '.\[gguf\]'"):
    weights.open_checkpoint(path)
