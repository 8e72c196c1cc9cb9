"""Files that somebody made to do harm, each in a folder of its own, and what loading them says.

    python -m tests.zoo.published.hostile_files FOLDER

writes them, loads one after the other in no more memory than the process has after its imports and one GiB, each in
30 s at most, and prints {case: [exception, message, seconds]} as JSON.
"""

import contextlib
import io
import json
import pickle
import resource
import signal
import struct
import sys
import time
import zipfile
from pathlib import Path

TENSORS = {"x": [2, 2]}


def safetensors(header, body=bytes(16)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def weights(**shapes):
    """Zeros of float32."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4
        for n in shape:
            size *= n
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return safetensors(header, bytes(end))


def zipped(entries, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def op(value):
    return pickle.dumps(value, protocol=2)[2:-1]


def tensor(sizes, strides, numel):
    pid = b"(" + op("storage") + b"ctorch\nFloatStorage\n" + op("0") + op("cpu") + op(numel) + b"tQ"
    args = pid + op(0) + op(sizes) + op(strides) + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + args + b"tR"


def pickled(content, data=bytes(16), **options):
    return zipped({"a/data.pkl": b"\x80\x02" + content + b".", "a/data/0": data}, **options)


def nested_key(depth):
    return b"})q\x00" + b"".join(b"0h%ch%c\x86q%c" % (i, i, i + 1) for i in range(depth)) + op(1) + b"s"


def folder(config, **files):
    """A config.json and files beside it, by default a few zeros."""
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    return {"config.json": text} | (files or {"model.safetensors": weights(**TENSORS)})


MAMBA = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 8, "state_size": 2}
LLAMA = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
M2 = {
    "model_type": "m2_bert",
    "long_conv_l_max": 8,
    "hyena_w": 1,
    "hyena_emb_dim": 3,
    "hidden_size": 8,
    "num_hidden_layers": 1,
}
NATIVE = {"format": "subquadratic-zoo", "format_version": 1, "kind": "CausalLM"}
HUGE = 10**12


def bins(content, config=MAMBA):
    return folder(config, **{"pytorch_model.bin": content})


CASES = {
    # Weights
    "a pickle that calls": bins(pickled(b"cposix\nsystem\n(" + op("touch ran") + b"tR")),
    "a memo of two GiB": bins(pickled(b"}r\x00\x00\x00\x08")),
    "a key of many hashes": bins(pickled(nested_key(120))),
    "text of a TiB": bins(pickled(b"\x8d\x00\x00\x00\x00\x00\x01\x00\x00")),
    "a pickle that unpacks": bins(pickled(b"]" * 10**7, compression=zipfile.ZIP_DEFLATED)),
    "a long pickle": bins(pickled(b"]" * 17_000_000)),
    "one value a trillion times": bins(
        pickled(b"}(" + op("backbone.embeddings.weight") + tensor((HUGE, 8), (0, 0), 4) + b"u"),
        MAMBA | {"vocab_size": HUGE},
    ),
    "a header of 2 ** 62 bytes": folder(MAMBA, **{"model.safetensors": struct.pack("<Q", 2**62) + b"{}"}),
    "a deep header": folder(MAMBA, **{"model.safetensors": safetensors(b"[" * 10**6)}),
    "tensors that overlap": folder(
        MAMBA,
        **{
            "model.safetensors": safetensors(
                {name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in ("x", "y")}
            )
        },
    ),
    "a tensor of 10 ** 24 values": folder(
        MAMBA,
        **{"model.safetensors": safetensors({"x": {"dtype": "F32", "shape": [HUGE, HUGE], "data_offsets": [0, 16]}})},
    ),
    "an index that leaves the folder": folder(
        MAMBA, **{"model.safetensors.index.json": json.dumps({"weight_map": {"x": "../../etc/passwd"}}).encode()}
    ),
    "a deep index": folder(MAMBA, **{"model.safetensors.index.json": b'{"weight_map":' * 10**5}),
    # Configs
    "no JSON": folder(b"\xff\xfe\x00"),
    "a deep config": folder(b'{"a":' * 10**5),
    "a number of a million digits": folder(b'{"model_type": "mamba", "hidden_size": ' + b"9" * 10**6 + b"}"),
    "no heads": folder(LLAMA | {"num_attention_heads": 0}),
    "heads that are text": folder(LLAMA | {"num_attention_heads": "2"}),
    "heads that are a list": folder(LLAMA | {"num_attention_heads": [[]]}),
    "no period": folder({"model_type": "jamba", "num_hidden_layers": 2, "attn_layer_period": 0}),
    "no period of experts": folder({"model_type": "jamba", "num_hidden_layers": 2, "expert_layer_period": 0}),
    "a wide model": folder(MAMBA | {"hidden_size": HUGE, "vocab_size": HUGE}),
    "a wide Llama": folder(LLAMA | {"hidden_size": 2 * HUGE, "intermediate_size": HUGE}),
    "a long BERT": folder({"model_type": "bert", "max_position_embeddings": HUGE, "num_hidden_layers": 1}),
    "a long M2": folder(M2 | {"long_conv_l_max": 10**9}),
    "a rich M2": folder(M2 | {"hyena_emb_dim": 10**9 + 1}),
    "a wide M2": folder(M2 | {"hidden_size": 10**9}),
    "a large image": folder({"model_type": "vit", "image_size": 2**30, "patch_size": 1, "num_hidden_layers": 1}),
    "a long pattern of letters": folder({"model_type": "nemotron_h", "hybrid_override_pattern": "M-" * 10**6}),
    "an official model of 10 ** 8 layers": folder({"d_model": 8, "n_layer": 10**8}),
    "a Codestral of 10 ** 8 layers": folder({"dim": 8, "n_layers": 10**8}),
    **{
        f"a {kind} of 10 ** 5 layers": folder({"model_type": kind, "num_hidden_layers": 10**5})
        for kind in (
            "mamba",
            "mamba2",
            "llama",
            "jamba",
            "bamba",
            "granitemoehybrid",
            "zamba2",
            "bert",
            "modernbert",
            "vit",
        )
    },
    "one of ours of 10 ** 9 layers": folder(NATIVE | {"config": {"n_layers": 10**9}}),
    "one of ours that repeats": folder(NATIVE | {"config": {"n_layers": 8, "pattern": "mamba*999999999"}}),
    "one of ours that repeats what repeats": folder(
        NATIVE | {"config": {"n_layers": 8, "pattern": "(" * 30 + "mamba*99" + ")*99" * 30}}
    ),
    "one of ours that shares": folder(NATIVE | {"config": {"n_layers": 10**9, "pattern": "mamba@a"}}),
    "long filters of ours": folder(NATIVE | {"config": {"n_layers": 1, "pattern": "m2", "m2": {"l_max": 10**9}}}),
    "rich filters of ours": folder(
        NATIVE | {"config": {"n_layers": 1, "pattern": "m2", "m2": {"filter": {"emb_dim": 10**9}}}}
    ),
    "filters of a word of ours": folder(
        NATIVE | {"config": {"n_layers": 1, "vocab_size": 8, "pattern": "m2[l_max=1000000000]"}}
    ),
    "one of ours without a config": folder(NATIVE),
    "one of ours with a list": folder(NATIVE | {"config": [1]}),
}


def load(path):
    """What loading says: kind of the exception and its message."""
    import zoo

    try:
        zoo.from_pretrained(path)
    except BaseException as error:  # of every kind, since the kind is what is asked
        return [type(error).__name__, str(error)]
    return ["nothing", "loaded"]


def main(root: Path) -> int:
    """Loads all cases within the limits."""
    import zoo  # noqa: F401, what it takes is none of the files'

    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[0])
    limit = pages * resource.getpagesize() + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    said = {}
    for number, (name, files) in enumerate(CASES.items()):
        path = root / str(number)
        path.mkdir()
        for file, content in files.items():
            (path / file).write_bytes(content)
        start = time.monotonic()
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("30 s are over")))
        signal.alarm(30)
        with contextlib.suppress(TimeoutError):
            said[name] = [*load(path), time.monotonic() - start]
        signal.alarm(0)
    print(json.dumps(said))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
