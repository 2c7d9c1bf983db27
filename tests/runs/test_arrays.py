"""Arrays of an archive are those that NumPy's own reader gives, and what that refuses is refused."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from lightning_spectral.runs.safe_files import open_arrays
from lightning_spectral.runs.writing import write_arrays

SHAPES = arrays_of.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
TYPES = st.sampled_from([np.float64, np.float32, np.int64, np.bool_, np.dtype("<U7"), np.dtype(">f8")])
ARRAYS = st.dictionaries(
    st.sampled_from(["tokens", "activation/é[0].weight/eigenvalues", "a/b/vectors"]),
    arrays_of.arrays(TYPES, SHAPES),
    min_size=1,
)


@given(ARRAYS, st.sampled_from(["ours", np.savez, np.savez_compressed]), st.booleans())
def test_arrays_are_those_of_numpy(tmp_path_factory, arrays: dict[str, np.ndarray], writer, by_columns: bool) -> None:
    file = io.BytesIO()
    arrays = {name: np.asfortranarray(array) if by_columns else array for name, array in arrays.items()}
    write_arrays(file, arrays) if writer == "ours" else writer(file, **arrays)
    path = tmp_path_factory.mktemp("arrays") / "a.npz"
    path.write_bytes(file.getvalue())
    with open_arrays(path) as found, np.load(io.BytesIO(file.getvalue()), allow_pickle=False) as expected:
        assert list(found) == expected.files
        for name in expected.files:
            np.testing.assert_array_equal(found[name], expected[name])
            assert found[name].dtype == expected[name].dtype
            assert found[name].flags.writeable


@pytest.mark.parametrize("where", range(20))
def test_a_damaged_member_is_refused(tmp_path: Path, where: int) -> None:
    file = io.BytesIO()
    write_arrays(file, {"a": np.arange(50.0), "vectors": np.ones(50)})
    content = bytearray(file.getvalue())
    with zipfile.ZipFile(file) as archive:
        start = archive.infolist()[where % 2].header_offset
    content[start + 80 + where] ^= 0xFF
    (tmp_path / "a.npz").write_bytes(content)
    with open_arrays(tmp_path / "a.npz") as found, pytest.raises(Exception, match=r"damaged|invalid|Error"):
        found["vectors" if where % 2 else "a"]


def test_pickles_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.asarray([{}], dtype=object))
    with open_arrays(tmp_path / "a.npz") as found, pytest.raises(ValueError, match="neither numbers nor text"):
        found["a"]
