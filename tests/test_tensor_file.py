"""Tensor files against the safetensors library, both ways; files that lie are refused."""

from __future__ import annotations

import itertools
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from upath import UPath

from gemma_xla import tensor_file
from gemma_xla.errors import UserError
from gemma_xla.tensor_file import Entry, TensorFile, write_tensors

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OTHERS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
SHAPES = ((), (1,), (7,), (0, 3), (5, 4), (2, 3, 4))


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"of rank {len(shape)}, {shape}": (100 * torch.randn(shape)).to(dtype) for shape in SHAPES}


def write(path: Path, values: dict[str, torch.Tensor], dtype: torch.dtype | None = None, **options) -> Path:
    entries = {name: Entry(dtype or value.dtype, tuple(value.shape)) for name, value in values.items()}
    with path.open("wb") as file:
        write_tensors(file, entries, iter(values.values()), **options)
    return path


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    bits = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


@pytest.fixture(params=[tensor_file.CHUNK, 24])
def chunk(request, monkeypatch) -> None:
    """As it is, and so small that rows, or parts of them, are read by themselves."""
    monkeypatch.setattr(tensor_file, "CHUNK", request.param)


@pytest.mark.parametrize("dtype", [*FLOATS, *OTHERS, torch.bool])
def test_reads_what_safetensors_wrote(tmp_path, dtype, chunk):
    expected = tensors(dtype)
    save_file(expected, tmp_path / "a", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "a")
    assert sorted(file.names()) == sorted(expected)
    for name, value in expected.items():
        assert (file.shape(name), file.dtype(name)) == (tuple(value.shape), dtype)
        assert same(file.read(name), value)


@pytest.mark.parametrize("dtype", [*FLOATS, *OTHERS, torch.bool])
def test_safetensors_reads_what_was_written(tmp_path, dtype, chunk):
    expected = tensors(dtype)
    path = write(tmp_path / "a", expected, metadata={"format": "pt"})
    found = load_file(path)
    assert list(TensorFile(path).names()) == list(expected)
    assert all(same(found[name], value) for name, value in expected.items())
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_a_file_of_one_tensor_is_that_of_safetensors(tmp_path):
    values = {"x": torch.randn(3, 5)}
    save_file(values, tmp_path / "theirs", metadata={"format": "pt"})
    assert (
        write(tmp_path / "ours", values, metadata={"format": "pt"}).read_bytes() == (tmp_path / "theirs").read_bytes()
    )
    assert load_file(write(tmp_path / "none", {})) == {}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_part_of_a_tensor(tmp_path, shape, chunk):
    value = torch.randn(shape)
    file = TensorFile(write(tmp_path / "a", {"first": torch.ones(3), "x": value}))
    slices = [[slice(None), *(slice(i, j) for i in range(size + 1) for j in range(i, size + 1))] for size in shape]
    for index in itertools.chain.from_iterable(itertools.product(*slices[:rank]) for rank in range(len(shape) + 1)):
        assert same(file.read("x", index), value[index]), index


@pytest.mark.parametrize(("stored", "wanted"), itertools.product(FLOATS, FLOATS))
def test_values_are_converted_on_the_way(tmp_path, stored, wanted, chunk):
    value = (1000 * torch.randn(6, 5)).to(stored)
    file = TensorFile(write(tmp_path / "a", {"x": value}))
    # A view with strides of its own, in a larger tensor that must keep its other values.
    whole = torch.full((7, 12), 9.0, dtype=wanted)
    out = whole.t()[1:11:2, 1:7].t()
    file.copy_to("x", out)
    assert same(out, value.to(wanted))
    assert int((whole == 9).sum()) >= 7 * 12 - value.numel()
    written = load_file(write(tmp_path / "b", {"x": value.t()}, wanted))["x"]
    assert same(written, value.t().to(wanted))


def test_parameters_are_written_and_filled_like_tensors(tmp_path):
    parameter = torch.nn.Parameter(torch.randn(4, 3))
    file = TensorFile(write(tmp_path / "a", {"x": parameter}))
    other = torch.nn.Parameter(torch.zeros(4, 3))
    file.copy_to("x", other)
    assert torch.equal(other, parameter)


def test_files_that_are_no_local_ones():
    expected = tensors(torch.bfloat16)
    file = TensorFile(write(UPath("memory://tensors/a.safetensors"), expected))
    assert all(same(file.read(name), value) for name, value in expected.items())
    assert same(file.read("of rank 2, (5, 4)", (slice(1, 3), slice(2, 4))), expected["of rank 2, (5, 4)"][1:3, 2:4])
    with pytest.raises(UserError, match="memory://tensors/b: cannot be read .there is no such file."):
        TensorFile(UPath("memory://tensors/b"))


def test_values_are_written_one_at_a_time(tmp_path):
    """Each value is made after the one before was written and forgotten."""
    made: list[weakref.ref] = []

    def make() -> torch.Tensor:
        value = torch.ones(3)
        made.append(weakref.ref(value))
        return value

    def values():
        for _ in range(4):
            assert all(value() is None for value in made)
            yield make()

    with (tmp_path / "a").open("wb") as file:
        write_tensors(file, {str(i): Entry(torch.float32, (3,)) for i in range(4)}, values())
    assert len(made) == 4


HEADER = {"x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
HEADER |= {"y": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}}


def lying(**changes) -> bytes:
    """A file of 32 bytes of data whose header says something else of x; ... takes a field away."""
    fields = {key: value for key, value in (HEADER["x"] | changes).items() if value is not ...}
    return whole(json.dumps(HEADER | {"x": fields}).encode())


def whole(header: bytes, data: bytes = bytes(32)) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


LIARS = {
    "empty": (b"", r"announce a header of 0 bytes; the file has 0"),
    "seven bytes": (bytes(7), r"announce a header of 0 bytes; the file has 7"),
    "a header longer than the file": ((2**40).to_bytes(8, "little") + bytes(99), r"a header of 1099511627776 bytes"),
    "a header of more than 8 exabytes": (b"\xff" * 108, r"a header of 18446744073709551615 bytes"),
    "no JSON": (whole(b"{'x': 1}"), "Expecting property name"),
    "no text": (whole(b"\xff\xfe\xfd"), "can't decode"),
    "JSON nested too deep": (whole(b"[" * 10**5), "recursion"),
    "a list": (whole(b"[]"), "its header is not a JSON object"),
    "a tensor that is a number": (whole(b'{"x": 3}'), "x is described by 3"),
    "an unknown dtype": (lying(dtype="F31"), "x has dtype 'F31'; known are F64"),
    "a dtype that is a list": (lying(dtype=["F32"]), r"x has dtype \['F32'\]"),
    "no dtype": (lying(dtype=...), "x has dtype None"),
    "no shape": (lying(shape=...), "x has shape None"),
    "a negative size": (lying(shape=[-2, -3]), r"x has shape \[-2, -3\]"),
    "a broken size": (lying(shape=[2, 3.0]), r"x has shape \[2, 3.0\]"),
    "a true size": (lying(shape=[True, 6]), r"x has shape \[True, 6\]"),
    "an absurd size": (lying(shape=[2**64, 0]), r"x has shape \[18446744073709551616, 0\]"),
    "negative offsets": (lying(data_offsets=[-24, 0]), r"x has data_offsets \[-24, 0\]"),
    "one offset": (lying(data_offsets=[24]), r"24 bytes, but data_offsets \[24\]"),
    "offsets the wrong way round": (lying(data_offsets=[24, 0]), r"24 bytes, but data_offsets \[24, 0\]"),
    "the wrong size for its shape": (lying(shape=[2, 4]), r"dtype F32, 32 bytes, but data_offsets \[0, 24\]"),
    "the wrong size for its dtype": (lying(dtype="F16"), r"dtype F16, 12 bytes, but data_offsets \[0, 24\]"),
    "overlapping tensors": (lying(shape=[2], data_offsets=[20, 28]), "x starts at byte 20 of the data, 0 is expected"),
    "a tensor twice in one place": (lying(shape=[2], data_offsets=[24, 32]), "starts at byte 24 of the data, 0 is"),
    "a gap": (lying(shape=[2, 2], data_offsets=[0, 16]), "y starts at byte 24 of the data, 16 is expected"),
    "offsets beyond the end": (lying(shape=[9], data_offsets=[0, 36]), "y starts at byte 24 of the data, 36 is"),
    "data cut short": (whole(json.dumps(HEADER).encode(), bytes(31)), "describes [0-9]+ bytes; the file has"),
    "trailing bytes": (whole(json.dumps(HEADER).encode(), bytes(33)), "describes [0-9]+ bytes; the file has"),
}


@pytest.mark.parametrize("case", LIARS)
def test_files_that_lie_are_refused(tmp_path, case):
    data, message = LIARS[case]
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        TensorFile(path)
    assert str(error.value).startswith(f"{path}: cannot be read (")
    assert "\n" not in str(error.value)


def test_the_header_of_these_cases_is_fine_when_it_does_not_lie(tmp_path):
    (tmp_path / "a").write_bytes(lying())
    assert TensorFile(tmp_path / "a").names() == ["x", "y"] == sorted(load_file(tmp_path / "a"))


def test_files_that_vanish_or_shrink_are_named(tmp_path):
    for path, reason in ((tmp_path / "none", "there is no such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=f"{path}: cannot be read .{reason}"):
            TensorFile(path)
    path = write(tmp_path / "a", {"x": torch.ones(100)})
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="a: cannot be read .it ends before its tensors do"):
        file.read("x")
    path.unlink()
    with pytest.raises(UserError, match="a: cannot be read .there is no such file"):
        file.read("x")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([torch.ones(3)], "b: the value is missing"),
        ([torch.ones(3), torch.ones(2, 2), torch.ones(1)], "more values than the 2 entries"),
        ([torch.ones(3), torch.ones(4)], r"b: the value has shape \(4,\); its entry says \(2, 2\)"),
    ],
)
def test_values_that_are_not_those_announced(tmp_path, values, message):
    entries = {"a": Entry(torch.float32, (3,)), "b": Entry(torch.float32, (2, 2))}
    with (tmp_path / "a").open("wb") as file, pytest.raises(ValueError, match=message):
        write_tensors(file, entries, values)


def test_wider_types_come_first(tmp_path):
    values = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(1)}
    with pytest.raises(ValueError, match="b .torch.float32. would start at byte 6; write wider dtypes first"):
        write(tmp_path / "a", values)
    assert load_file(write(tmp_path / "a", dict(reversed(values.items())))).keys() == values.keys()


def test_out_must_have_the_shape_of_the_part(tmp_path):
    file = TensorFile(write(tmp_path / "a", {"x": torch.ones(4, 3)}))
    with pytest.raises(ValueError, match="x: out has shape"):
        file.copy_to("x", torch.ones(3, 3), (slice(0, 2),))
