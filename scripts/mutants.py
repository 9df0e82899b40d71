"""Mutants of the files that nbl-export reads: what a broken disk, a careless edit or an enemy makes of them.

:func:`mutate` changes one file in place and says how. What it does is drawn from a ``random.Random``, so that a seed
gives the same mutant again. :func:`seal` writes the digests of an output folder anew, as an enemy would: without it
nearly every mutant ends at the digest, and the code behind is never reached.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUGE = "9" * 5000  # more digits than Python turns into an integer
STRINGS = (
    "",
    "../victim",
    "/etc/passwd",
    "\x1b[2J\x1b]0;owned\x07",
    "a[/b]",
    "<script>alert(1)</script>|`x`",
    "\0",
    "\udcff",
    "nan",
    "x" * 70_000,
    "٣",
    "{0.__class__}",
    "~m",
    "..",
    "\u202e\r\n# h",
)
NUMBERS = (0, -1, 1, 2, 2**31, 2**62, 2**63, 10**30, -(2**63), 1e308, -0.0, float("nan"), float("inf"), 0.5)
RAW = "\x01raw:"  # marks a JSON string that is written as it is, without quotes


def mutate(path: Path, rng: random.Random, victim: Path) -> str:
    """Change ``path`` in place; the words say how. ``victim`` is a file outside that links may point to."""
    if rng.random() < 0.08:
        return _swap(path, rng, victim)
    special = next((kind for suffix, kind in KINDS.items() if path.name.endswith(suffix)), None)
    if special is None or rng.random() < 0.2:
        return _bytes(path, rng)
    try:
        return special(path, rng)
    except (ValueError, struct.error, LookupError, TypeError) as error:
        return f"{_bytes(path, rng)} (no {special.__name__}: {type(error).__name__})"


# what stands at the path -------------------------------------------------------------------------


def _swap(path: Path, rng: random.Random, victim: Path) -> str:
    how = rng.choice(
        ["missing", "empty", "fifo", "folder", "link out", "link to itself", "device", "dangling"]
    )
    path.unlink()
    if how == "empty":
        path.touch()
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how != "missing":
        targets = {"link out": victim, "link to itself": path, "device": Path("/dev/zero")}
        path.symlink_to(targets.get(how, path.parent / "nowhere"))
    return how


def _bytes(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    how = rng.choice(["flip", "flips", "cut", "grow", "zeros", "noise", "repeat", "ones"])
    at, size = rng.randrange(len(content) or 1), rng.randrange(1, 65)
    if how in ("flip", "flips") and content:
        for _ in range(1 if how == "flip" else 20):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del content[at:]
    elif how == "grow":
        content += rng.randbytes(size)
    elif how == "repeat":
        content[at:at] = content[at : at + size]
    else:
        fill = {"zeros": bytes(size), "ones": b"\xff" * size}.get(how) or rng.randbytes(size)
        content[at : at + size] = fill[: max(0, len(content) - at)]
    path.write_bytes(content)
    return f"{how} at {at}"


# JSON --------------------------------------------------------------------------------------------


def value(rng: random.Random, old: Any) -> Any:
    """Something else in the place of ``old``: often of another type."""
    if isinstance(old, (int, float)) and not isinstance(old, bool) and rng.random() < 0.4:
        return rng.choice([old * 1000, -old, old + 1, old * 10**9, *NUMBERS])
    if isinstance(old, str) and rng.random() < 0.4:
        return rng.choice([old + "x", old[: len(old) // 2], old.upper(), old * 50, *STRINGS])
    deep: Any = []
    for _ in range(rng.choice([3, 400])):
        deep = [deep]
    others = [
        None,
        True,
        False,
        [],
        {},
        [old],
        {"a": old},
        [old] * 300,
        deep,
        RAW + HUGE,
        RAW + "[" * 200_000,
    ]
    return rng.choice([*others, rng.choice(NUMBERS), rng.choice(STRINGS)])


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below ``tree``."""
    found, stack = [], [tree]
    while stack:
        node = stack.pop()
        keys: Any = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            stack.append(node[key])
    return found


def change(tree: Any, rng: random.Random) -> tuple[Any, str]:
    """One place of a JSON value changed, and how."""
    places = _places(tree)
    # Of a vocabulary or a list of merges there is more than of everything else together.
    shallow = [p for p in places if len(p[0]) < 100]
    places = shallow if shallow and rng.random() < 0.9 else places
    if not places or rng.random() < 0.03:
        return value(rng, tree), "another value for all of it"
    node, key = rng.choice(places)
    how = rng.choice(["value", "value", "value", "delete", "rename", "swap", "double"])
    if how == "swap":
        other, name = rng.choice(places)
        node[key], other[name] = other[name], node[key]
        if _is_circular(tree):
            raise ValueError("a circle")
    elif how == "delete":
        del node[key]
    elif how == "rename" and isinstance(node, dict):
        node[rng.choice(["", key + "x", *STRINGS])] = node.pop(key)
    elif how == "double" and isinstance(node, list):
        node.insert(key, node[key])
    else:
        node[key] = value(rng, node[key])
    return tree, f"{how} of {key!r}"[:80]


def _is_circular(tree: Any) -> bool:
    try:
        json.dumps(tree)
    except ValueError:
        return True
    return False


def dumped(tree: Any) -> bytes:
    """JSON as Python writes it, with the raw pieces as they are."""
    text = json.dumps(tree)
    mark = json.dumps(RAW)[:-1]
    while mark in text:
        before, _, rest = text.partition(mark)
        raw, _, after = rest.partition('"')
        text = before + raw + after
    return text.encode()


def _json(path: Path, rng: random.Random) -> str:
    tree, how = change(json.loads(path.read_text(encoding="utf-8")), rng)
    path.write_bytes(dumped(tree))
    return how


def _lines(path: Path, rng: random.Random) -> str:
    """JSON lines, plain or packed."""
    packed = path.name.endswith(".gz")
    content = path.read_bytes()
    lines = (gzip.decompress(content) if packed else content).split(b"\n")
    how = rng.choice(["line", "line", "line", "long", "many", "bytes"])
    at = rng.randrange(len(lines))
    if how == "line":
        tree, words = change(json.loads(lines[at]), rng)
        lines[at], how = dumped(tree), f"line {at}: {words}"
    elif how == "long":
        lines[at] = json.dumps(
            {"text": rng.choice(["ab ", "x", " ", "\N{GRINNING FACE}"]) * 3_000_000}
        ).encode()
    elif how == "many":
        lines = [b"" if rng.random() < 0.5 else b'{"text": ""}'] * 300_000
    else:
        lines[at] = rng.randbytes(200)
    joined = b"\n".join(lines)
    path.write_bytes(gzip.compress(joined, 1) if packed else joined)
    return how


def _text(path: Path, rng: random.Random) -> str:
    text = path.read_text(encoding="utf-8")
    words = text.split("\n")
    at = rng.randrange(len(words))
    how = rng.choice(["hostile", "number", "drop", "double", "cut"])
    if how == "hostile":
        words[at] = rng.choice(["", words[at]]) + rng.choice(STRINGS)
    elif how == "number":
        words[at] = (
            words[at].partition("=")[0] + "= " + rng.choice([HUGE, "-1", "nan", "[]", "{}", "1e400", '""'])
        )
    elif how == "drop":
        del words[at]
    elif how == "double":
        words.insert(at, words[at])
    else:
        words[at] = words[at][: len(words[at]) // 2]
    path.write_bytes("\n".join(words).encode("utf-8", "surrogatepass"))
    return f"{how} in line {at}"


# safetensors -------------------------------------------------------------------------------------


def _safetensors(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    how = rng.choice(["header", "header", "metadata", "number", "number", "length"])
    if how == "metadata" and isinstance(header.get("__metadata__"), dict):
        known = header["__metadata__"]
        name = rng.choice(list(known))
        tree, words = change(json.loads(known[name]), rng)
        known[name], how = dumped(tree).decode("utf-8", "replace"), f"metadata: {words}"
    elif how == "number" and data:
        at = rng.randrange(max(1, len(data) // 8)) * 8
        number = rng.choice([float("nan"), float("inf"), -1e30, 0.0, 1e300])
        packed = (
            struct.pack("<d", number) if rng.random() < 0.5 else struct.pack("<ff", *[min(number, 1e38)] * 2)
        )
        data[at : at + 8] = packed[: len(data) - at]
        how = f"{number} at {at}"
    elif how == "length":
        written = rng.choice([0, 1, size + 1, 2**40, 2**63])
        path.write_bytes(struct.pack("<Q", written) + content[8:])
        return f"length {written}"
    else:
        header, how = change(header, rng)
    text = dumped(header)
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return how


# ONNX --------------------------------------------------------------------------------------------


def _onnx(path: Path, rng: random.Random) -> str:
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    bomb = rng.choice([*BOMBS, None, None, None, None, None, None])
    how = BOMBS[bomb](model, rng) or bomb if bomb else _message(model, rng)
    path.write_bytes(model.SerializeToString())
    return str(how)


def _message(message: Any, rng: random.Random, name: str = "") -> str:
    """Change one field somewhere in a protobuf message: down a random way."""
    fields = [(f, v) for f, v in message.ListFields()]
    field: Any = None
    old: Any = None
    if fields:
        field, old = rng.choice(fields)
    if field is None or rng.random() < 0.1:
        unset = [f for f in message.DESCRIPTOR.fields if f.message_type is None]
        field = rng.choice(unset)
        old = getattr(message, field.name)
    name = f"{name}.{field.name}"
    repeated = hasattr(old, "append") or hasattr(old, "add")
    if repeated:
        how = rng.choice(["delete", "double", "swap", "inside", "inside", "inside", "inside", "inside"])
        at = rng.randrange(len(old)) if len(old) else 0
        if field.message_type is not None and len(old):
            if how == "delete":
                del old[at]
            elif how == "double":
                old.add().CopyFrom(old[at])
            elif how == "swap":
                other, copy = rng.randrange(len(old)), type(old[at])()
                copy.CopyFrom(old[at])
                old[at].CopyFrom(old[other])
                old[other].CopyFrom(copy)
            else:
                return _message(old[at], rng, f"{name}[{at}]")
            return f"{how} of {name}[{at}]"
        if field.message_type is None:
            if len(old) and how == "delete":
                del old[at]
            elif len(old) and how != "double":
                old[at] = _scalar(old[at], rng)
            else:
                old.append(_scalar({9: "", 12: b"", 2: 0.0, 1: 0.0}.get(field.type, 0), rng))
            return f"{how} of {name}[{at}]"
        return "nothing"
    if field.message_type is not None:
        if rng.random() < 0.05:
            message.ClearField(field.name)
            return f"no {name}"
        return _message(old, rng, name)
    try:
        setattr(message, field.name, _scalar(old, rng))
    except (ValueError, TypeError, OverflowError):
        message.ClearField(field.name)
    return f"value of {name}"


def _scalar(old: Any, rng: random.Random) -> Any:
    if isinstance(old, bytes):
        hostile = [b"", old[:-1], old + b"x", b"\x1b[2J", b"\xff\xfe", rng.randbytes(len(old) or 4)]
        return rng.choice(hostile)
    if isinstance(old, str):
        return rng.choice(["", old + "x", "input_ids", "attention_mask", *STRINGS]).replace("\udcff", "?")
    if isinstance(old, float):
        return rng.choice([0.0, -1.0, 1e38, float("nan"), float("inf")])
    return rng.choice([0, 1, -1, 2, 7, 16, 99, 2**31 - 1, old + 1, -old, 2**62])


def _loop(model: Any, _rng: random.Random) -> None:
    """A loop that never ends, whose result the first output needs."""
    from onnx import TensorProto, helper

    graph = model.graph
    kind = graph.output[0].type.tensor_type.elem_type
    condition = helper.make_tensor_value_info("go", TensorProto.BOOL, [])
    inner = [
        helper.make_node("Identity", ["go_in"], ["go"]),
        helper.make_node("Identity", ["state_in"], ["state"]),
    ]
    body = helper.make_graph(
        inner,
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state_in", kind, None),
        ],
        [condition, helper.make_tensor_value_info("state", kind, None)],
    )
    name = graph.output[0].name
    for node in graph.node:
        node.output[:] = ["before_loop" if o == name else o for o in node.output]
    graph.initializer.append(helper.make_tensor("many", TensorProto.INT64, [], [2**62]))
    graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    graph.node.append(helper.make_node("Loop", ["many", "yes", "before_loop"], [name], body=body))


def _functions(model: Any, rng: random.Random) -> None:
    """Local functions that each call the one below three times: 3^30 nodes when they are inlined."""
    from onnx import helper

    depth = rng.choice([4, 30])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    model.opset_import.append(helper.make_opsetid("local", 1))
    for level in range(depth):
        below = {"op_type": "Identity"} if level == 0 else {"op_type": f"F{level - 1}", "domain": "local"}
        nodes = [
            helper.make_node(inputs=[a], outputs=[b], **below)
            for a, b in (("x", "a"), ("a", "b"), ("b", "y"))
        ]
        model.functions.append(helper.make_function("local", f"F{level}", ["x"], ["y"], nodes, opsets))
    name = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["before_call" if o == name else o for o in node.output]
    model.graph.node.append(helper.make_node(f"F{depth - 1}", ["before_call"], [name], domain="local"))


def _chain(model: Any, rng: random.Random) -> None:
    """Very many nodes in a row."""
    from onnx import helper

    length = rng.choice([1000, 30_000])
    name = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["c0" if o == name else o for o in node.output]
    chain = [helper.make_node("Identity", [f"c{i}"], [f"c{i + 1}"]) for i in range(length)]
    chain[-1].output[0] = name
    model.graph.node.extend(chain)


def _metadata(model: Any, rng: random.Random) -> str:
    """The metadata that nbl-export itself reads."""
    key = rng.choice(["nbl_export.kv_layers", "nbl_export.layers", "nbl_export.static"])
    text = rng.choice(
        ["", "1", "null", '[{"layer": 0}]', "[[1]]", '[{"layer": "x", "kind": []}]', "[1e400]", "{}"]
    )
    text = rng.choice(
        [text, "[" * 100_000, f"[{HUGE}]", '[{"layer": 0, "kind": "linear"}]', "[0, 0, 0]", "[null]"]
    )
    known = {p.key: p for p in model.metadata_props}
    entry: Any = known.get(key) or model.metadata_props.add()
    entry.key, entry.value = key, text
    return f"metadata {key} {text[:30]!r}"


def _dimensions(model: Any, rng: random.Random) -> str:
    """A size of an initializer, or where its data lies."""
    tensor = rng.choice(list(model.graph.initializer))
    how = rng.choice(["dims", "type", "offset", "length", "location", "nothing"])
    entries = {e.key: e for e in tensor.external_data}
    if how == "dims":
        tensor.dims[:] = rng.choice([[-1], [2**62], [2**31, 2**31], [0], [], [1] * 5000, [3, 5]])
    elif how == "type":
        tensor.data_type = rng.choice([0, 8, 9, 14, 99, 2**31 - 1])
    elif how == "nothing":
        tensor.ClearField("raw_data")
        del tensor.external_data[:]
    else:
        entry = entries.get(how) or tensor.external_data.add()
        tensor.data_location = 1
        entry.key, entry.value = (
            how,
            rng.choice(["-1", str(2**62), HUGE, "x", "", "../victim", "/dev/zero", "0"]),
        )
    return f"{how} of {tensor.name}"


def _memory(model: Any, rng: random.Random) -> None:
    """A tensor of 1 or 32 times 4 GiB that the first output needs, of a size that is known only in the run."""
    from onnx import TensorProto, helper

    graph = model.graph
    name = graph.output[0].name
    for node in graph.node:
        node.output[:] = ["before_bomb" if o == name else o for o in node.output]
    graph.initializer.append(helper.make_tensor("many", TensorProto.INT64, [1], [2 ** rng.choice([30, 35])]))
    graph.initializer.append(helper.make_tensor("none", TensorProto.INT64, [1], [0]))
    kind = graph.output[0].type.tensor_type.elem_type
    graph.node.extend(
        [
            helper.make_node("Shape", ["before_bomb"], ["bomb_shape"]),
            helper.make_node("Gather", ["bomb_shape", "none"], ["bomb_rows"]),
            helper.make_node("Mul", ["bomb_rows", "many"], ["bomb_size"]),
            helper.make_node("ConstantOfShape", ["bomb_size"], ["filled"]),
            helper.make_node("ReduceMax", ["filled"], ["most"], keepdims=0),
            helper.make_node("Cast", ["most"], ["most_cast"], to=kind),
            helper.make_node("Add", ["before_bomb", "most_cast"], [name]),
        ]
    )


BOMBS: dict[str, Callable[[Any, random.Random], str | None]] = {
    "loop": _loop,
    "functions": _functions,
    "chain": _chain,
    "memory": _memory,
    "metadata": _metadata,
    "dimensions": _dimensions,
}
KINDS: dict[str, Callable[[Path, random.Random], str]] = {
    ".json": _json,
    ".jsonl": _lines,
    ".jsonl.gz": _lines,
    ".safetensors": _safetensors,
    ".onnx": _onnx,
    ".toml": _text,
    ".txt": _text,
}


# digests -----------------------------------------------------------------------------------------


def seal(out: Path) -> None:
    """Write every digest of an output folder anew, where what they are of can be read at all."""
    for path in sorted(out.rglob("*.safetensors")):
        _reseal_tensors(path)
    _reseal_plan(out / "nbl" / "plan.json")
    _reseal_state(out)


def _read(path: Path) -> Any:
    try:
        found = (
            json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not path.is_symlink() else None
        )
    except (ValueError, RecursionError, OSError):
        return None
    return found if isinstance(found, dict) else None


def _reseal_tensors(path: Path) -> None:
    from safetensors.numpy import load, save

    from nbl_export import tensorfile

    if path.is_symlink() or not path.is_file():
        return
    content = path.read_bytes()
    try:
        header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
        marked = json.loads(header["__metadata__"][tensorfile._KEY])
        tensors = load(content)
        if marked.pop(tensorfile._DIGEST, None) is None:
            return
        marked[tensorfile._DIGEST] = tensorfile._digest(tensors, marked)
        path.write_bytes(save(tensors, {tensorfile._KEY: json.dumps(marked, sort_keys=True)}))
    except Exception:  # what cannot be read cannot be sealed
        return


def _reseal_plan(path: Path) -> None:
    from nbl_export.files import sha256_of_json

    header = _read(path)
    weights = path.with_suffix(".safetensors")
    if header is None or "sha256" not in header:
        return
    if weights.is_file() and not weights.is_symlink():
        header["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    del header["sha256"]
    try:
        path.write_text(json.dumps({**header, "sha256": sha256_of_json(header)}), encoding="utf-8")
    except ValueError:
        return


def _reseal_state(out: Path) -> None:
    """The digests of files, and the keys of stages, which are made of each other."""
    from nbl_export.files import sha256_of_json
    from nbl_export.stage_record import STAGES, key_of

    path = out / "nbl" / "workspace.json"
    state: Any = _read(path)
    if state is None or path.is_symlink():
        return
    stages: Any = state.get("stages")
    results: dict[str, str] = {}
    for stage in STAGES if isinstance(stages, dict) else ():
        record: Any = stages.get(stage)
        files: Any = record.get("files") if isinstance(record, dict) else None
        for name in files if isinstance(files, dict) else ():
            if "\0" in name or len(name) > 255 or name.startswith("/") or ".." in name:
                continue
            if (out / name).is_file() and not (out / name).is_symlink():
                files[name] = hashlib.sha256((out / name).read_bytes()).hexdigest()
        try:
            record["made_of"] |= {n: d for n, d in results.items() if n in record["made_of"]}
            record["key"] = key_of(stage, record["settings"], record["made_of"])
            results[stage] = sha256_of_json([record["key"], files])
        except (TypeError, KeyError, ValueError, AttributeError):
            continue
    path.write_bytes(dumped(state))


def copy(source: Path, target: Path) -> None:
    """A fresh copy of the material for one mutant."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
