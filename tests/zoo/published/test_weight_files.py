"""Weight files: what is read is what was written, by torch, by safetensors and by us, and nothing in them is run."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from tests.places import ROOT
from zoo.published import weight_files
from zoo.published.weight_files import open_weights, save_weights

DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
HELLO = np.arange(6, dtype=np.float32).reshape(2, 3)
FORMATS = ["safetensors", "bin"]
SINGLE = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin", "pth": "checkpoint.pth"}


def read(folder):
    return {name: tensor.read() for name, tensor in open_weights(folder).items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype, name
        assert got[name].shape == array.shape, name
        assert got[name].tobytes() == np.asarray(array, order="C").tobytes(), name


def arrays():
    """Every dtype of both formats, a scalar, an empty one and a transposed one."""
    tensors = {dtype: np.arange(-3, 3).reshape(2, 3).astype(jnp.dtype(dtype)) for dtype in DTYPES}
    return tensors | {"scalar": np.array(7.0, np.float32), "empty": np.zeros((3, 0), np.float16), "turned": HELLO.T}


# Files made by hand: what torch 1.6 and later write, without torch.


def zipped(entries, **options):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def op(value):
    return pickle.dumps(value, protocol=2)[2:-1]


def tensor_op(sizes=(2, 3), strides=(3, 1), offset=0, numel=6, storage="torch\nFloatStorage", key="0", rest=b""):
    pid = b"(" + op("storage") + b"c" + storage.encode() + b"\n" + op(key) + op("cpu") + op(numel) + b"tQ"
    args = pid + op(offset) + op(sizes) + op(strides) + b"\x89ccollections\nOrderedDict\n)R" + rest
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + args + b"tR"


def dict_op(**values):
    return b"}(" + b"".join(op(name) + value for name, value in values.items()) + b"u"


def bin_file(pickled, *, data=HELLO.tobytes(), prefix="any name/", byteorder=b"little", **options):
    entries = {f"{prefix}data.pkl": b"\x80\x02" + pickled + b".", f"{prefix}data/0": data}
    if byteorder is not None:
        entries[f"{prefix}byteorder"] = byteorder
    return zipped(entries, **options)


def safetensors_file(header, body=HELLO.tobytes()):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def about(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def words(value):
    """Names a test case by its words, not by its bytes."""
    return value if isinstance(value, str) else ""


METADATA = b"}" + op("_metadata") + b"}sb"  # what torch sets on a state dict


@pytest.mark.parametrize(
    "content",
    [
        bin_file(dict_op(x=tensor_op())),
        bin_file(dict_op(x=tensor_op()), prefix="", byteorder=None),
        bin_file(b"ccollections\nOrderedDict\n)R(" + op("x") + tensor_op() + b"u" + METADATA),
        bin_file(dict_op(x=b"ctorch._utils\n_rebuild_parameter\n(" + tensor_op() + b"\x88}tR")),
        bin_file(dict_op(model=dict_op(x=tensor_op()), step=op(3))),
        bin_file(dict_op(state_dict=dict_op(x=tensor_op()))),
        bin_file(dict_op(x=tensor_op(rest=b"}"))),  # torch's metadata argument, empty
    ],
    ids=["plain", "no prefix", "state dict", "parameter", "model", "state_dict", "tensor metadata"],
)
def test_reads_what_torch_writes(content, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert_same(read(tmp_path), {"x": HELLO})


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ({"sizes": (3, 2), "strides": (1, 3)}, HELLO.T),
        ({"sizes": (2,), "strides": (3,), "offset": 1}, HELLO[:, 1]),
        ({"sizes": (), "strides": (), "offset": 5}, HELLO[1, 2:].reshape(())),
        ({"sizes": (4, 3), "strides": (0, 1)}, np.broadcast_to(HELLO[0], (4, 3))),
        ({"sizes": (1, 6), "strides": (2**70, 1)}, HELLO.reshape(1, 6)),  # a stride that is never taken
        ({"sizes": (0, 3), "strides": (3, 1), "offset": 6}, HELLO[:0]),
        ({"sizes": (9, 0), "strides": (1, 1)}, np.zeros((9, 0), np.float32)),  # as torch.zeros(9, 0)
    ],
)
def test_views_of_one_storage_come_out_right(view, expected, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(bin_file(dict_op(tied=tensor_op(), x=tensor_op(**view))))
    got = read(tmp_path)
    assert_same(got, {"tied": HELLO, "x": expected})
    got["x"][...] = 9  # an array of one's own: neither the file nor the other view moves
    assert_same({"tied": got["tied"]}, {"tied": HELLO})
    assert_same(read(tmp_path), {"tied": HELLO, "x": expected})


HOSTILE = {
    "posix.system": b"cposix\nsystem\n(" + op("touch ran") + b"tR",
    "builtins.eval": b"cbuiltins\neval\n(" + op("open('ran', 'w')") + b"tR",
    "os.system": b"\x8c\x02os\x8c\x06system\x93" + op("touch ran") + b"\x85R",  # STACK_GLOBAL, protocol 4
    "collections.OrderedDict.__class__": b"\x8c\x0bcollections\x8c\x15OrderedDict.__class__\x93",  # a dotted name
    "torch.nn.modules.linear.Linear": b"ctorch.nn.modules.linear\nLinear\n)\x81",
    "torch._utils.os.system": b"ctorch._utils\nos.system\n(" + op("touch ran") + b"tR",
    "subprocess.call": b"(" + op(["touch", "ran"]) + b"isubprocess\ncall\n",  # INST
}


@pytest.mark.parametrize("asked", HOSTILE)
@pytest.mark.parametrize("protocol", [b"", b"\x80\x04"], ids=["protocol 2", "protocol 4"])
def test_a_pickle_that_asks_for_anything_else_is_refused_before_it_runs(asked, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = bin_file(protocol + dict_op(x=tensor_op(), y=HOSTILE[asked]))
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=f"pytorch_model.bin: asks for {asked}, which is not .*; nothing was executed"):
        open_weights(tmp_path)
    assert not (tmp_path / "ran").exists()


# What training keeps beside the weights, and what pickles do with objects: make them, call them, fill them, set them.
BESIDE = HOSTILE | {
    "namespace": b"cargparse\nNamespace\n)\x81" + dict_op(lr=op(0.1), __class__=op(1)) + b"b",
    "old object": b"ccopy_reg\n_reconstructor\n(cargparse\nNamespace\nc__builtin__\nobject\nNtR"
    + dict_op(lr=op(1))
    + b"b",
    "scalar": b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(" + op("f8") + b"tRU\x0812345678tR",
    "dictionary": b"ccollections\ndefaultdict\n(cbuiltins\nlist\ntR(" + op("a") + op(1) + op("b") + op(2) + b"u",
    "list": b"cmade.up\nList\n)\x81(" + op(1) + op(2) + b"e" + op(3) + b"a",
    "key": b"}cmade.up\nKey\n)R" + op(1) + b"s",
    "slots": b"cmade.up\nSlots\n)\x81N" + dict_op(a=op(1)) + b"\x86b",
}


@pytest.mark.parametrize("beside", BESIDE)
def test_what_stands_beside_the_weights_is_neither_read_nor_run(beside, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = dict_op(model=dict_op(x=tensor_op()), beside=BESIDE[beside], model_ema=dict_op(x=op(3)))
    (tmp_path / "weights.pth").write_bytes(bin_file(content))
    assert_same(read(tmp_path), {"x": HELLO})
    assert_same(read(tmp_path / "weights.pth"), {"x": HELLO})
    assert not (tmp_path / "ran").exists()
    (tmp_path / "weights.pth").write_bytes(bin_file(dict_op(model=dict_op(x=tensor_op(), y=BESIDE[beside]))))
    with pytest.raises(ValueError, match=r"weights\.pth: (asks for .*; nothing was executed|holds a dict at 'y')"):
        open_weights(tmp_path)


def test_a_stand_in_cannot_be_set_itself(tmp_path):
    (tmp_path / "weights.pth").write_bytes(
        bin_file(dict_op(model=dict_op(x=tensor_op()), args=b"cargparse\nNamespace\n" + dict_op(asked=op(1)) + b"b"))
    )
    with pytest.raises(ValueError, match=r"weights\.pth: truncated or damaged, TypeError"):
        open_weights(tmp_path)


def test_the_hostile_pickles_run_elsewhere(tmp_path):
    """Else the test above would pass for pickles that do nothing."""
    for asked in ("posix.system", "builtins.eval", "os.system", "subprocess.call"):
        program = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
        content = b"\x80\x04" + HOSTILE[asked] + b"."
        subprocess.run([sys.executable, "-I", "-c", program], input=content, cwd=tmp_path, check=False)
        assert (tmp_path / "ran").exists(), asked
        (tmp_path / "ran").unlink()


@pytest.mark.parametrize(
    "pickled",
    [
        b"ccollections\nOrderedDict\nN" + dict_op(name=op("posix.system")) + b"\x86b",
        b"ctorch._utils\n_rebuild_tensor_v2\n" + dict_op(__defaults__=b"N") + b"b",
        dict_op(x=tensor_op() + dict_op(offset=op(10**9)) + b"b"),
        dict_op(x=tensor_op() + b"N" + dict_op(offset=op(10**9)) + b"\x86b"),
    ],
    ids=["class", "function", "tensor", "tensor slots"],
)
def test_a_pickle_sets_no_attributes(pickled, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(bin_file(pickled))
    with pytest.raises(ValueError, match=r"pytorch_model.bin: .*sets attributes of a (Named|_View)"):
        open_weights(tmp_path)


def test_what_is_set_on_a_state_dict_is_dropped(tmp_path):
    state = dict_op(__class__=op(1), __setstate__=op(2), items=op(3))
    pickled = b"ccollections\nOrderedDict\n)R(" + op("x") + tensor_op() + b"u" + state + state + b"\x86b"
    (tmp_path / "pytorch_model.bin").write_bytes(bin_file(pickled))
    assert_same(read(tmp_path), {"x": HELLO})


LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LEGACY, "not a zip archive; files of torch before 1.6"),
        (b"", "empty"),
        (bin_file(dict_op(x=tensor_op()), byteorder=b"big"), "byteorder is b'big'"),
        (bin_file(dict_op(x=tensor_op()), compression=zipfile.ZIP_DEFLATED), "compressed"),
        (bin_file(dict_op(x=tensor_op()), data=HELLO.tobytes()[:-4]), "data/0 has 20 bytes, expected 6 elements"),
        (bin_file(dict_op(x=tensor_op(numel=5))), "data/0 has 24 bytes, expected 5 elements"),
        (bin_file(dict_op(x=tensor_op(key="1"))), "no item named 'any name/data/1'"),
        (bin_file(dict_op(x=tensor_op(offset=1))), "'x' reaches element 6 of data/0, which has 6"),
        (bin_file(dict_op(x=tensor_op(strides=(4, 1)))), "'x' reaches element 6"),
        (bin_file(dict_op(x=tensor_op(sizes=(2**40, 2**40)))), "'x' reaches element"),
        (bin_file(dict_op(x=tensor_op(offset=-1))), "'x' has .-1, 6. where sizes are expected"),
        (bin_file(dict_op(x=tensor_op(strides=(-3, 1)))), "'x' has .-3, 1. where sizes are expected"),
        (bin_file(dict_op(x=tensor_op(sizes=(2, 3.0)))), "'x' has .2, 3.0. where sizes are expected"),
        (bin_file(dict_op(x=tensor_op(strides=(1,)))), "sizes .2, 3. but strides .1,."),
        (bin_file(dict_op(x=tensor_op(sizes=(1,) * 99, strides=(1,) * 99))), "dimension"),
        (bin_file(dict_op(x=tensor_op(rest=dict_op(neg=b"\x88")))), "'neg': True"),
        (bin_file(dict_op(x=tensor_op(storage="collections\nOrderedDict"))), "expected a storage"),
        (bin_file(dict_op(x=b"ctorch\nFloatStorage\n)R")), "calls torch.FloatStorage"),
        (bin_file(dict_op(x=tensor_op(), step=op(3))), "holds a int at 'step', expected tensors"),
        (bin_file(b"}" + op(3) + tensor_op() + b"s"), "holds a _View at 3"),
        (bin_file(dict_op(x=dict_op(y=tensor_op()))), "holds a dict at 'x'"),
        (bin_file(tensor_op()), "holds a _View, expected"),
        (bin_file(b"]"), "holds a list, expected"),
        (bin_file(b"u"), "truncated or damaged, UnpicklingError"),
        (bin_file(b"}", byteorder=None).replace(b"PK\3\4", b"PK\3\5"), "data.pkl is not where the archive says"),
        (zipped({"a/data/0": b""}), "holds 0 files data.pkl"),
    ],
    ids=words,
)
def test_a_bin_that_is_not_right_is_an_error_that_names_it(content, message, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=f"pytorch_model.bin: .*{message}"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"abc", "truncated or damaged"),
        (struct.pack("<Q", 2**63) + b"{}", "a header of 9223372036854775808 bytes in a file of 10"),
        (struct.pack("<Q", 3) + b"{}", "a header of 3 bytes in a file of 10"),
        (safetensors_file(b"{"), "Expecting property name"),
        (safetensors_file(b"[" * 100_000), "nested too deep"),
        (safetensors_file({"x": about()}, HELLO.tobytes() + b"more"), "cover 24 of 28"),
        (safetensors_file({"x": about(), "y": about(offsets=(12, 36))}, bytes(36)), "'y' float32.* in bytes 12 to 36"),
        (safetensors_file({"x": about(offsets=(4, 28))}, bytes(28)), "in bytes 4 to 28"),
        (safetensors_file({"x": about(shape=(2, 2))}), "'x' float32.2, 2. in bytes 0 to 24"),
        (safetensors_file({"x": about(shape=(-2, -3))}), "where sizes are expected"),
        (safetensors_file({"x": about(dtype="F4")}), "'x' has dtype F4"),
        (safetensors_file({"x": {}}), "truncated or damaged"),
        (safetensors_file([]), "truncated or damaged"),
    ],
    ids=words,
)
def test_a_safetensors_that_is_not_right_is_an_error_that_names_it(content, message, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"model.safetensors: .*{message}"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pytorch_model.bin", bin_file(dict_op(x=tensor_op()))),
        ("model.safetensors", safetensors_file({"x": about()})),
    ],
    ids=words,
)
def test_a_file_cut_anywhere_is_an_error_that_names_it(name, content, tmp_path):
    for length in range(len(content)):
        (tmp_path / name).write_bytes(content[:length])
        with pytest.raises(ValueError, match=name):
            open_weights(tmp_path)


def test_reads_float8_and_unaligned_tensors(tmp_path):
    small = np.array([1.5, -2.0, 0.25], jnp.float8_e4m3fn)
    header = {"__metadata__": {"format": "pt"}, "x": about(offsets=(3, 27)), "small": about("F8_E4M3", (3,), (0, 3))}
    (tmp_path / "model.safetensors").write_bytes(safetensors_file(header, small.tobytes() + HELLO.tobytes()))
    assert_same(read(tmp_path), {"x": HELLO, "small": small})


def test_the_first_of_the_files_is_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no weights, looked for model.safetensors, model.s"):
        open_weights(tmp_path)
    index = json.dumps({"weight_map": {"an index": "shard"}})
    for name in reversed(weight_files.FILES):
        if name.endswith(".json"):
            (tmp_path / "shard").write_bytes(bin_file(b"}" + op("an index") + tensor_op() + b"s"))
            (tmp_path / name).write_text(index)
            assert list(open_weights(tmp_path)) == ["an index"]
        else:
            bin = bin_file(b"}" + op(name) + tensor_op() + b"s")
            (tmp_path / name).write_bytes(bin if name.endswith(".bin") else safetensors_file({name: about()}))
            assert list(open_weights(tmp_path)) == [name]


def test_a_lone_pth_is_read_where_there_is_nothing_else(tmp_path):
    (tmp_path / "a.pth").write_bytes(bin_file(dict_op(a=tensor_op())))
    assert list(open_weights(tmp_path)) == ["a"]
    (tmp_path / "b.pth").write_bytes(bin_file(dict_op(b=tensor_op())))
    with pytest.raises(ValueError, match=r"holds a\.pth, b\.pth: name the one to read"):
        open_weights(tmp_path)
    assert list(open_weights(tmp_path / "b.pth")) == ["b"]
    (tmp_path / "pytorch_model.bin").write_bytes(bin_file(dict_op(c=tensor_op())))
    assert list(open_weights(tmp_path)) == ["c"]


def test_a_saved_pth_is_one_file_with_the_tensors_under_model(tmp_path):
    (path,) = save_weights(tmp_path, arrays(), format="pth", max_shard_bytes=1)
    assert path.name == SINGLE["pth"]
    assert_same(read(tmp_path), arrays())
    pickled = zipfile.ZipFile(path).read("archive/data.pkl")
    whole = weight_files._read_pickle(pickled)
    assert whole.keys() == {"model"}
    assert whole["model"].keys() == arrays().keys()
    save_weights(tmp_path, {"x": HELLO}, format="pth")
    assert_same(read(tmp_path), {"x": HELLO})
    for name in ("a.pth", "model.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(FileExistsError, match=f"{name} exists and would be read instead of checkpoint.pth"):
            save_weights(tmp_path, {"x": HELLO}, format="pth")
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("weight_map", "error", "message"),
    [
        ({"x": "a.bin", "y": "b.bin", "z": "c.bin"}, FileNotFoundError, "c.bin is missing: pytorch_model.bin.index"),
        ({"x": "a.bin", "y": "b.bin", "z": "b.bin"}, ValueError, "places 'z' in b.bin, which does not hold it"),
        ({"y": "b.bin"}, None, ""),
        ({"x": "a.bin"}, ValueError, "a.bin holds 'y', but the index does not name it"),
        ({"x": "a.bin", "y": "b.bin"}, ValueError, "a.bin holds 'y', but the index places it in b.bin"),
        ({"x": "../a.bin"}, ValueError, "names the shard '../a.bin', expected a file beside it"),
        (["x"], ValueError, "truncated or damaged"),
    ],
)
def test_an_index_and_its_shards_agree(weight_map, error, message, tmp_path):
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    a = dict_op(x=tensor_op()) if "z" in weight_map else dict_op(x=tensor_op(), y=tensor_op())
    (tmp_path / "a.bin").write_bytes(bin_file(a))
    (tmp_path / "b.bin").write_bytes(bin_file(dict_op(y=tensor_op())))
    if error is None:
        assert_same(read(tmp_path), {"y": HELLO})
    else:
        with pytest.raises(error, match=message):
            open_weights(tmp_path)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 60], ids=["single", "shards"])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_saved_is_read_back(format, max_shard_bytes, tmp_path):
    if format == "safetensors":
        pytest.importorskip("safetensors")
    tensors = arrays()
    paths = save_weights(tmp_path / "new", tensors, format=format, max_shard_bytes=max_shard_bytes)
    assert sorted(paths) == sorted((tmp_path / "new").iterdir())
    assert_same(read(tmp_path / "new"), tensors)
    if max_shard_bytes == 10**9:
        assert [path.name for path in paths] == [SINGLE[format]]
    else:
        stem, _, suffix = SINGLE[format].partition(".")
        shards = [f"{stem}-{i:05d}-of-{len(paths) - 1:05d}.{suffix}" for i in range(1, len(paths))]
        assert [path.name for path in paths] == [*shards, f"{SINGLE[format]}.index.json"]
        index = json.loads(paths[-1].read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        for path in paths[:-1]:
            here = [name for name in tensors if index["weight_map"][name] == path.name]
            assert here
            assert sum(tensors[name].nbytes for name in here) <= 60


def test_shards_are_filled_in_order_and_a_tensor_larger_than_one_has_its_own(tmp_path):
    tensors = {"a": np.stack([HELLO, HELLO]), "b": HELLO[0], "c": HELLO[0], "d": HELLO[0]}  # 48 bytes, then 12 each
    *paths, _index = save_weights(tmp_path, tensors, format="bin", max_shard_bytes=24)
    assert [list(weight_files._open_file(path)) for path in paths] == [["a"], ["b", "c"], ["d"]]


def test_entries_of_a_saved_bin_are_aligned(tmp_path):
    (path,) = save_weights(tmp_path, arrays(), format="bin")
    content = path.read_bytes()
    for entry in zipfile.ZipFile(path).infolist():
        sizes = struct.unpack("<HH", content[entry.header_offset + 26 : entry.header_offset + 30])
        assert (entry.header_offset + 30 + sum(sizes)) % 64 == 0, entry.filename


def test_an_interrupted_save_leaves_nothing_and_an_older_one_whole(tmp_path, monkeypatch):
    save_weights(tmp_path, {"a": HELLO}, format="bin")

    def pickle_once(tensors):
        if "b" in tensors:
            raise KeyboardInterrupt
        return pickled(tensors)

    pickled = weight_files._pickle_state_dict
    monkeypatch.setattr(weight_files, "_pickle_state_dict", pickle_once)
    with pytest.raises(KeyboardInterrupt):
        save_weights(tmp_path / "new", {"a": HELLO, "b": HELLO}, format="bin", max_shard_bytes=24)
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        save_weights(tmp_path, {"b": HELLO}, format="bin")
    assert sorted(os.listdir(tmp_path)) == ["new", "pytorch_model.bin"]
    assert_same(read(tmp_path), {"a": HELLO})


def test_open_tensors_outlive_a_save_over_their_file(tmp_path):
    save_weights(tmp_path, {"a": HELLO}, format="bin")
    old = open_weights(tmp_path)
    save_weights(tmp_path, {"a": HELLO + 1}, format="bin")
    assert_same({"a": old["a"].read()}, {"a": HELLO})
    assert_same(read(tmp_path), {"a": HELLO + 1})


def test_save_refuses_what_it_cannot_keep(tmp_path, unchecked):
    with pytest.raises(ValueError, match=r"tensors\['x'\] has dtype complex64, which the format 'bin' does not hold"):
        save_weights(tmp_path, {"x": np.zeros(3, np.complex64)}, format="bin")
    with pytest.raises(ValueError, match="has dtype >f4"):
        save_weights(tmp_path, {"x": np.zeros(3, ">f4")}, format="bin")
    with pytest.raises(ValueError, match="unknown format 'safetensor', did you mean 'safetensors'"):
        save_weights(tmp_path, {"x": HELLO}, format="safetensor")
    with pytest.raises(ValueError, match="max_shard_bytes=0, expected at least 1"):
        save_weights(tmp_path, {"x": HELLO}, max_shard_bytes=0)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileExistsError, match=r"model.safetensors exists and would be read instead of pytorch_model.b"):
        save_weights(tmp_path, {"x": HELLO}, format="bin")
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_without_safetensors_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        save_weights(tmp_path, {"x": HELLO})
    assert os.listdir(tmp_path) == []


def test_reading_imports_neither_torch_nor_safetensors(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(safetensors_file({"x": about()}))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(bin_file(dict_op(x=tensor_op())))
    program = (
        "import pathlib, sys; from zoo.published.weight_files import open_weights\n"
        "for folder in sys.argv[1:]: open_weights(pathlib.Path(folder))['x'].read()\n"
        "assert not {'torch', 'safetensors', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path, tmp_path / "bin"], cwd=ROOT, check=True)


# Against the packages that the world writes with.


def torch_values(torch, tensor):
    """Bit for bit, for dtypes that NumPy lacks too."""
    bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    array = bits.detach().contiguous().numpy()
    return array.view(jnp.bfloat16) if tensor.dtype == torch.bfloat16 else array


def test_reads_what_torch_saves(tmp_path):
    torch = pytest.importorskip("torch")
    x = torch.arange(24.0).reshape(4, 6)
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()  # with _metadata
    state |= {dtype: (x - 5).to(getattr(torch, dtype)) for dtype in DTYPES}
    state |= {"tied": x, "again": x, "turned": x.T, "offset": x[1:, 2:5], "every other": x[:, ::2], "half": x[2].half()}
    state |= {
        "scalar": torch.tensor(3.0),
        "picked": x[2, 3],
        "empty": x[:, :0],
        "none": torch.zeros(3, 0),
        "wide": x[:, :1].expand(4, 5),
    }
    state |= {"parameter": torch.nn.Parameter(x.T), "bfloat16 turned": x.bfloat16().T}
    expected = {name: torch_values(torch, tensor) for name, tensor in state.items()}
    for whole in (state, {"model": state, "step": 3}, {"state_dict": dict(state)}):
        torch.save(whole, tmp_path / "pytorch_model.bin")
        assert_same(read(tmp_path), expected)
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"pytorch_model.bin: not a zip archive; files of torch before 1.6"):
        open_weights(tmp_path)
    torch.save({"x": x, "negative": torch._neg_view(x)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="'neg': True"):
        open_weights(tmp_path)


def test_refuses_a_whole_module_that_torch_saved(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(3, 2), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"asks for torch.nn.modules.linear.Linear, .*nothing was executed"):
        open_weights(tmp_path)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 60], ids=["single", "shards"])
@pytest.mark.parametrize("format", FORMATS)
def test_torch_and_safetensors_read_what_is_saved(format, max_shard_bytes, tmp_path):
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    tensors = arrays()
    got = {}
    for path in save_weights(tmp_path, tensors, format=format, max_shard_bytes=max_shard_bytes):
        if path.suffix == ".bin":
            got |= torch.load(path, weights_only=True)
            torch.load(path, weights_only=True, mmap=True)
        elif path.suffix == ".safetensors":
            got |= load_file(path)
            with pytest.importorskip("safetensors").safe_open(path, framework="numpy") as file:
                assert file.metadata() == {"format": "pt"}
    assert_same({name: torch_values(torch, got[name]) for name in tensors}, tensors)
