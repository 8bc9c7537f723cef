"""Payloads: every tensor survives the trip bit for bit, and nothing that was not announced gets through."""

import dataclasses
import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrt.errors import PayloadError
from fedrt.payload import (
    CHUNK_BYTES,
    MAX_ID_LENGTH,
    MAX_NAME_LENGTH,
    MAX_TENSORS,
    Assembler,
    Chunk,
    ElementType,
    Manifest,
    TensorHeader,
    chunks,
    describe,
    headers_of,
    pack,
    unpack,
)
from tests.strategies import tensors as tensor_sets

ONE = TensorHeader("context", ElementType.FLOAT32, (2, 3))


def assemble(manifest, pieces):
    assembler = Assembler(manifest)
    return assembler, [assembler.add(piece) for piece in pieces]


def bytes_payload(size):
    """A payload of so many bytes, which must be even."""
    return describe("p", {"t": (np.arange(size // 2) % 997).astype(np.float16)})


@given(tensor_sets)
def test_any_tensors_survive_bit_for_bit(tensors):
    manifest, data = describe("p", tensors)
    assembler, complete = assemble(manifest, chunks("p", data))
    assert complete[-1]
    received = assembler.tensors()
    assert sorted(received) == sorted(tensors)
    for name, array in tensors.items():
        assert received[name].shape == array.shape
        assert received[name].dtype == array.dtype.newbyteorder("<")
        assert received[name].tobytes() == array.astype(array.dtype.newbyteorder("<")).tobytes()


@given(tensor_sets, st.data())
def test_tensors_survive_however_the_bytes_are_cut(tensors, data):
    manifest, packed = describe("p", tensors)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(packed) - 1), max_size=5))) if len(packed) > 1 else []
    edges = [0, *cuts, len(packed)]
    pieces = [Chunk("p", start, packed[start:stop]) for start, stop in itertools.pairwise(edges)]
    assembler, complete = assemble(manifest, pieces)
    assert complete == [False] * len(cuts) + [True]
    assert bytes(assembler.data()) == bytes(packed)


@pytest.mark.parametrize("size", [2, CHUNK_BYTES - 2, CHUNK_BYTES, CHUNK_BYTES + 2, 3 * CHUNK_BYTES])
def test_chunks_are_full_but_for_the_last(size):
    manifest, data = bytes_payload(size)
    pieces = list(chunks("p", data))
    assert [len(piece.data) for piece in pieces[:-1]] == [CHUNK_BYTES] * (len(pieces) - 1)
    assert len(pieces) == -(-size // CHUNK_BYTES)
    assembler, complete = assemble(manifest, pieces)
    assert complete == [False] * (len(pieces) - 1) + [True]
    assert assembler.data() == data


def test_the_bytes_are_little_endian_in_name_order():
    tensors = {"b": np.array([1], ">i8"), "a": np.array([[1.0, 2.0]], np.float16)}
    assert bytes(pack(tensors)) == b"\x00\x3c\x00\x40" + b"\x01" + b"\0" * 7
    assert headers_of(tensors) == (
        TensorHeader("a", ElementType.FLOAT16, (1, 2)),
        TensorHeader("b", ElementType.INT64, (1,)),
    )


def test_a_tensor_that_is_not_contiguous_is_written_in_c_order():
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert unpack(headers_of({"a": array}), pack({"a": array}))["a"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_single_contiguous_tensor_is_not_copied():
    array = np.zeros(5, np.float32)
    data = pack({"a": array})
    array[0] = 1.0
    assert bytes(data[:4]) == b"\x00\x00\x80\x3f"


def test_received_tensors_cannot_be_changed():
    manifest, data = describe("p", {"a": np.zeros(3, np.float32), "s": np.float32(2).reshape(())})
    assembler, _ = assemble(manifest, chunks("p", data))
    for array in assembler.tensors().values():
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 1


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint8, np.bool_, np.complex64, "<U3", object])
def test_other_element_types_are_not_exchanged(dtype):
    with pytest.raises(PayloadError, match=r"tensor 'a' has type .*, which is not exchanged"):
        describe("p", {"a": np.zeros(2, dtype)})


def test_a_payload_without_tensors_is_not_described():
    with pytest.raises(PayloadError, match="a manifest has 0 tensors"):
        describe("p", {})


class TestAssembler:
    SIZE = 1000

    def setup_method(self):
        self.manifest, self.data = bytes_payload(self.SIZE)
        self.assembler = Assembler(self.manifest)

    def piece(self, start, stop):
        return Chunk("p", start, self.data[start:stop])

    def test_a_gap_is_an_error(self):
        self.assembler.add(self.piece(0, 100))
        with pytest.raises(PayloadError, match="starts at byte 200; expected was 100"):
            self.assembler.add(self.piece(200, 300))

    def test_an_overlap_is_an_error(self):
        self.assembler.add(self.piece(0, 100))
        with pytest.raises(PayloadError, match="starts at byte 99; expected was 100"):
            self.assembler.add(self.piece(99, 300))

    def test_chunks_out_of_order_are_an_error(self):
        with pytest.raises(PayloadError, match="starts at byte 500; expected was 0"):
            self.assembler.add(self.piece(500, 1000))

    def test_a_repeated_chunk_is_an_error(self):
        self.assembler.add(self.piece(0, 100))
        with pytest.raises(PayloadError, match="starts at byte 0; expected was 100"):
            self.assembler.add(self.piece(0, 100))

    def test_one_byte_too_many_is_an_error_and_is_not_kept(self):
        self.assembler.add(self.piece(0, 600))
        with pytest.raises(PayloadError, match="more than the announced 1000 bytes"):
            self.assembler.add(Chunk("p", 600, b"x" * 401))
        assert len(self.assembler.data()) == 600

    def test_a_chunk_after_the_last_is_an_error(self):
        assert self.assembler.add(self.piece(0, 1000))
        with pytest.raises(PayloadError, match="more than the announced"):
            self.assembler.add(Chunk("p", 1000, b"x"))

    def test_a_truncated_payload_is_never_complete(self):
        assert not self.assembler.add(self.piece(0, 500))
        assert not self.assembler.add(self.piece(500, 999))

    @pytest.mark.parametrize("place", [0, 499, 999])
    def test_one_changed_bit_is_an_error_at_the_end(self, place):
        spoilt = bytearray(self.data)
        spoilt[place] ^= 1
        self.assembler.add(Chunk("p", 0, bytes(spoilt[:500])))
        with pytest.raises(PayloadError, match="digest of a payload differs"):
            self.assembler.add(Chunk("p", 500, bytes(spoilt[500:])))

    def test_a_huge_announcement_alone_takes_no_memory(self):
        header = TensorHeader("context", ElementType.FLOAT32, (2**31, 2**20))
        assembler = Assembler(Manifest("p", (header,), header.byte_count, b"\0" * 32))
        assert not assembler.add(Chunk("p", 0, b"abc"))
        assert len(assembler.data()) == 3


@given(tensor_sets)
def test_a_sink_gets_the_bytes_as_they_arrive_and_nothing_is_collected(tensors):
    manifest, data = describe("p", tensors)
    taken = bytearray()
    assembler = Assembler(manifest, taken.extend)
    complete = [assembler.add(piece) for piece in chunks("p", data)]
    assert complete[-1]
    assert taken == data
    assert len(assembler.data()) == 0


def test_a_sink_never_gets_more_than_was_announced():
    manifest, data = bytes_payload(1000)
    taken = bytearray()
    assembler = Assembler(manifest, taken.extend)
    assembler.add(Chunk("p", 0, data[:600]))
    for wrong in (Chunk("p", 600, b"x" * 401), Chunk("p", 599, b"x"), Chunk("p", 700, b"x")):
        with pytest.raises(PayloadError):
            assembler.add(wrong)
    assert taken == data[:600]


@pytest.mark.parametrize("size", [0, CHUNK_BYTES + 1])
def test_a_chunk_has_one_byte_to_256_kib(size):
    with pytest.raises(PayloadError, match=f"a chunk has {size} bytes; allowed are 1 to 262144"):
        Chunk("p", 0, bytes(size))


class TestManifest:
    def make(self, **changes):
        fields = {"payload_id": "p", "tensors": (ONE,), "byte_count": 24, "sha256": b"\0" * 32, **changes}
        return Manifest(**fields)

    def test_consistent_announcements_are_accepted(self):
        two = (ONE, dataclasses.replace(ONE, name="other", element_type=ElementType.INT64))
        assert self.make(tensors=two, byte_count=24 + 48).tensors == two

    @pytest.mark.parametrize("byte_count", [0, 23, 25, -24, 2**64])
    def test_a_size_that_contradicts_the_shapes_is_refused(self, byte_count):
        with pytest.raises(PayloadError, match=f"announces {byte_count} bytes, but its tensors take 24"):
            self.make(byte_count=byte_count)

    def test_a_tensor_named_twice_is_refused(self):
        with pytest.raises(PayloadError, match="names a tensor twice"):
            self.make(tensors=(ONE, ONE), byte_count=48)

    @pytest.mark.parametrize("size", [0, 31, 33, 64])
    def test_a_digest_of_another_length_is_refused(self, size):
        with pytest.raises(PayloadError, match=f"digest has {size} bytes; expected are 32"):
            self.make(sha256=bytes(size))

    @pytest.mark.parametrize("length", [0, MAX_ID_LENGTH + 1])
    def test_a_payload_id_has_1_to_200_characters(self, length):
        assert self.make(payload_id="p" * MAX_ID_LENGTH)
        with pytest.raises(PayloadError, match=f"a payload id has {length} characters"):
            self.make(payload_id="p" * length)

    def test_a_million_tensors_are_refused(self):
        with pytest.raises(PayloadError, match="a manifest has 1000000 tensors; allowed are 1 to 1024"):
            self.make(tensors=(ONE,) * 1_000_000)

    def test_as_many_tensors_as_allowed_are_accepted(self):
        many = tuple(TensorHeader(f"t{number}", ElementType.FLOAT16, ()) for number in range(MAX_TENSORS))
        assert self.make(tensors=many, byte_count=2 * MAX_TENSORS).byte_count == 2048


@pytest.mark.parametrize("length", [0, MAX_NAME_LENGTH + 1])
def test_a_tensor_name_has_1_to_128_characters(length):
    assert TensorHeader("n" * MAX_NAME_LENGTH, ElementType.FLOAT32, ()).byte_count == 4
    with pytest.raises(PayloadError, match=f"a tensor name has {length} characters; allowed are 1 to 128"):
        TensorHeader("n" * length, ElementType.FLOAT32, ())


@pytest.mark.parametrize("shape", [(0,), (3, 0), (-1,), (1,) * 9])
def test_an_impossible_shape_is_refused(shape):
    with pytest.raises(PayloadError, match="'context' has an impossible shape"):
        TensorHeader("context", ElementType.FLOAT32, shape)


def test_the_digest_is_that_of_the_bytes():
    manifest, data = describe("p", {"a": np.arange(3, dtype=np.int64)})
    assert manifest.sha256 == hashlib.sha256(bytes(data)).digest()
    assert manifest.byte_count == len(data) == 24
