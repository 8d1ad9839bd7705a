"""Values and masks as bytes: bounds that hold for any float, torch as oracle, bytes that no peer writes."""

import hashlib
import math
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlora.errors import PeerError
from contextlora.federated.bitmaps import decode_mask, encode_mask, mask_bound, mask_hash
from contextlora.federated.codec import BLOCK, Codec, decode, encode, error_bound, pack, unpack

any_float = st.floats(width=32, allow_nan=False, allow_infinity=False)
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 2.0**-133, 1.1754942e-38, 3.4028235e38, -3.4028235e38, 1.0, -127.0, 0.5]


@st.composite
def slices(draw):
    """(values, counts): layers of any length, among them none, of one magnitude, constant, or of anything."""
    layers = []
    for _ in range(draw(st.integers(0, 4))):
        n = draw(st.sampled_from([0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]))
        seed, kind = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from(["normal", "constant", "bits", "special"]))
        rng = np.random.default_rng(seed)
        with np.errstate(over="ignore", under="ignore"):
            layers.append(
                {
                    "normal": (rng.standard_normal(n) * 10.0 ** rng.integers(-44, 36)).astype(np.float32),
                    "constant": np.full(n, draw(any_float), np.float32),
                    "bits": rng.integers(0, 2**32, n, dtype=np.uint32).view(np.float32),
                    "special": rng.choice(np.array(SPECIAL, np.float32), n),
                }[kind]
            )
    values = np.concatenate([np.empty(0, np.float32), *layers])
    values[~np.isfinite(values)] = 1
    return values, [layer.size for layer in layers]


@pytest.mark.parametrize("codec", Codec)
@settings(max_examples=150, deadline=None)
@given(one=slices())
def test_error_is_within_the_documented_bound(codec, one):
    values, counts = one
    again = decode(encode(values, counts, codec), counts, codec)
    assert again.dtype == np.float32
    error = np.abs(again.astype(np.float64) - values)
    assert (error <= error_bound(values, counts, codec)).all()


@settings(max_examples=150, deadline=None)
@given(one=slices())
def test_bf16_rounds_as_torch_does(one):
    values, counts = one
    theirs = torch.from_numpy(values).bfloat16().float().numpy()
    ours = decode(encode(values, counts, Codec.BF16), counts, Codec.BF16)
    finite = np.isfinite(theirs)
    np.testing.assert_array_equal(ours[finite].view(np.uint32), theirs[finite].view(np.uint32))
    assert (np.abs(ours[~finite]) == float.fromhex("0x1.FEp127")).all()


@settings(max_examples=100, deadline=None)
@given(one=slices())
def test_bf16_is_lossless_for_what_bf16_can_hold(one):
    values, counts = one
    once = decode(encode(values, counts, Codec.BF16), counts, Codec.BF16)
    twice = decode(encode(once, counts, Codec.BF16), counts, Codec.BF16)
    np.testing.assert_array_equal(once.view(np.uint32), twice.view(np.uint32))


@pytest.mark.parametrize(("codec", "levels"), [(Codec.INT8, 127), (Codec.INT4, 7)])
def test_levels_times_a_bf16_scale_are_lossless(codec, levels):
    rng = np.random.default_rng(0)
    whole = rng.integers(-levels, levels + 1, (5, BLOCK))
    whole[:, 0] = levels  # the peak, from which the scale follows
    scales = np.array([[1.0], [1.5], [2.0**-20], [1.9921875], [2.0**100]])
    values = (whole * scales).astype(np.float32).ravel()
    np.testing.assert_array_equal(decode(encode(values, [values.size], codec), [values.size], codec), values)


@pytest.mark.parametrize(("codec", "levels"), [(Codec.INT8, 127), (Codec.INT4, 7)])
def test_the_bound_is_nearly_reached(codec, levels):
    """A bound ten times too wide would pass the test above as well."""
    values = np.random.default_rng(1).standard_normal(100 * BLOCK).astype(np.float32)
    error = np.abs(decode(encode(values, [values.size], codec), [values.size], codec) - values)
    assert (error / error_bound(values, [values.size], codec)).max() > 0.98


def test_a_block_belongs_to_one_layer():
    small, large = np.full(10, 1e-6, np.float32), np.full(10, 1e6, np.float32)
    values, counts = np.concatenate([small, large]), [10, 10]
    again = decode(encode(values, counts, Codec.INT8), counts, Codec.INT8)
    np.testing.assert_allclose(again, values, rtol=0.01)


@pytest.mark.parametrize("codec", Codec)
def test_same_bytes_every_time_and_in_any_memory_layout(codec):
    steps = np.arange(2000) * 2654435761 % 65536 - 32768
    values = ((steps / 4096.0) ** 3).astype(np.float32)
    first = encode(values[::2].copy(), [400, 0, 600], codec)
    assert first == encode(values[::2], [400, 0, 600], codec)
    # Decoded values are part of the format: they may not change with numpy, zlib or the machine.
    digest = hashlib.sha256(decode(first, [400, 0, 600], codec).astype("<f4").tobytes()).hexdigest()[:16]
    assert digest == GOLDEN[codec]


GOLDEN = {Codec.BF16: "371cd57671aee601", Codec.INT8: "802485ad0c4aa727", Codec.INT4: "84294de83626f401"}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", Codec)
def test_what_is_not_finite_is_refused(codec, bad):
    values = np.array([1, bad, bad], np.float32)
    with pytest.raises(PeerError, match="E633 2 of 3 values are not finite"):
        encode(values, [3], codec)


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros(4, np.float32), np.zeros((3, 1), np.float32)])
def test_another_shape_or_kind_is_refused(values):
    with pytest.raises(PeerError, match=r"E633 values should be float32 \(3,\)"):
        encode(values, [1, 2], Codec.INT8)


@pytest.mark.parametrize("codec", Codec)
def test_an_untrained_slice_costs_next_to_nothing(codec):
    assert len(encode(np.zeros(100_000, np.float32), [100_000], codec)) < 1000


def fails(payload, counts, codec):
    with pytest.raises(PeerError, match="E631"):
        decode(payload, counts, codec)


def bf16_sections(*words):
    turned = [(w << 1 | w >> 15) & 0xFFFF for w in words]
    return pack(bytes(t >> 8 for t in turned)) + pack(bytes(t & 255 for t in turned))


def test_numbers_that_no_encoder_writes_are_refused():
    fails(bf16_sections(0x7F80), [1], Codec.BF16)  # infinity
    fails(bf16_sections(0xFFC1), [1], Codec.BF16)  # nan
    fails(bf16_sections(0x7F80) + pack(b"\1"), [1], Codec.INT8)
    fails(bf16_sections(0xBF80) + pack(b"\1"), [1], Codec.INT8)  # scale -1
    fails(bf16_sections(0x3F80) + pack(b"\x80"), [1], Codec.INT8)  # level -128
    fails(bf16_sections(0x3F80) + pack(b"\x00"), [1], Codec.INT4)  # level -8
    fails(bf16_sections(0x3F80) + pack(b"\x99"), [1], Codec.INT4)  # two levels where one belongs
    assert decode(bf16_sections(0x3F80) + pack(b"\x90"), [1], Codec.INT4) == [1]


@pytest.mark.parametrize("codec", Codec)
def test_cut_or_lengthened_payloads_are_refused(codec):
    values = np.random.default_rng(3).standard_normal(100).astype(np.float32)
    payload = encode(values, [100], codec)
    for n in range(len(payload)):
        fails(payload[:n], [100], codec)
    fails(payload + b"\0", [100], codec)
    fails(payload, [99], codec)
    fails(payload, [101], codec)


def test_a_deflate_bomb_costs_no_memory():
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = b"".join(deflater.compress(bytes(1 << 20)) for _ in range(100)) + deflater.flush()  # 100 MB in 100 kB
    section = b"\1" + len(body).to_bytes(4, "little") + body
    values, mask = section * 3, bytes(6) + section
    tracemalloc.start()
    fails(values, [1000], Codec.INT8)
    with pytest.raises(PeerError, match="E631"):
        decode_mask(mask, 8000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(body)


def unless_refused(read, *args):
    try:
        return read(*args)
    except PeerError as e:
        return None if e.code == "E631" else pytest.fail(str(e))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 100), st.sampled_from(Codec))
def test_any_bytes_decode_or_are_refused(data, count, codec):
    values = unless_refused(decode, data, [count], codec)
    assert values is None or (values.shape == (count,) and np.isfinite(values).all())
    mask = unless_refused(decode_mask, data, count)
    assert mask is None or mask.shape == (count,)


@given(st.binary(max_size=500))
def test_sections_round_trip(stream):
    section = pack(stream)
    assert len(section) <= len(stream) + 5
    out, rest = unpack(memoryview(section + b"more"), len(stream))
    assert (out, bytes(rest)) == (stream, b"more")


# --- masks -----------------------------------------------------------------------------------------------------------


def mask_of(size, active, seed=0):
    mask = np.zeros(size, bool)
    mask[np.random.default_rng(seed).choice(size, active, replace=False)] = True
    return mask


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 3000), st.floats(0, 1), st.integers(0, 2**31), st.sampled_from([1, 1, 7, 64]))
def test_masks_round_trip(size, density, seed, run):
    mask = np.repeat(np.random.default_rng(seed).random(-(-size // run)) < density, run)[:size]
    payload = encode_mask(mask)
    np.testing.assert_array_equal(decode_mask(payload, size), mask)
    assert payload == encode_mask(mask)
    for other in {size - 1, size + 1, 2 * size + 9} - {-1}:
        read = unless_refused(decode_mask, payload, other)
        assert read is None or read.size == other  # a mask of that size may look like this too


@pytest.mark.parametrize("density", [0.0005, 0.01, 0.05, 0.1, 0.25, 0.75, 0.9, 0.999])
def test_masks_are_near_the_entropy_bound(density):
    size = 2_000_000
    active = round(size * density)
    bits = 8 * len(encode_mask(mask_of(size, active)))
    assert 1 <= bits / mask_bound(size, active) < (1.03 if min(density, 1 - density) > 0.001 else 1.15)


def test_a_coin_toss_mask_costs_its_bits():
    assert len(encode_mask(mask_of(80_000, 40_000))) <= 10_000 + 11


@pytest.mark.parametrize("step", [1, 2, 10])
def test_regular_masks_cost_next_to_nothing(step):
    mask = np.zeros(1_000_000, bool)
    mask[::step] = True
    assert len(encode_mask(mask)) < 3000


def test_the_bound_counts_masks():
    assert mask_bound(10, 3) == pytest.approx(math.log2(math.comb(10, 3)))
    assert mask_bound(5, 0) == pytest.approx(0)


def test_a_mask_hash_tells_length_and_bits():
    masks = [mask_of(8, 1), mask_of(8, 2), np.zeros(8, bool), np.zeros(7, bool), np.zeros(0, bool)]
    assert len({mask_hash(m) for m in masks}) == len(masks)
    assert mask_hash(masks[0]) == mask_hash(masks[0].copy())


def test_gaps_that_lead_out_of_the_mask_are_refused():
    def gaps(count, stream, low=b"", form=1, shift=0):
        return bytes([form, shift]) + count.to_bytes(4, "little") + pack(stream) + pack(low)

    np.testing.assert_array_equal(np.flatnonzero(decode_mask(gaps(2, bytes([3, 5])), 10)), [3, 9])
    bad = [
        gaps(2, bytes([3, 6])),  # the second would be entry 10
        gaps(2, bytes([3])),  # one gap too few
        gaps(2, bytes([3, 255])),  # the last one does not end
        gaps(0, bytes([255])),
        gaps(6, bytes(6)),  # more than half: then the others would be sent
        gaps(1, bytes([3]), b"\0", shift=1),  # another shift than these numbers call for
        gaps(2**32 - 1, bytes(9)),
        gaps(2, bytes([3, 5]), form=3),
        gaps(2, bytes([3, 5])) + b"\0",
    ]
    for payload in bad:
        with pytest.raises(PeerError, match="E631"):
            decode_mask(payload, 10)
