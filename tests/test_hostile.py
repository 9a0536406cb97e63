"""Saved models by somebody who means harm: each is refused with one line; nothing runs, nothing is written."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saved_models import Net, edit, net, rehash, saved_net

import rankopt
from rankopt.artifact import load
from rankopt.checkpoint import load_checkpoint
from rankopt.cli import main
from rankopt.errors import RankoptError
from rankopt.plan import Plan
from rankopt.program_file import load_program
from rankopt.tensor_file import read_header

BOMB = 'open("struck", "w")'


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_net(tmp_path_factory.mktemp("good") / "net")


@pytest.fixture
def saved(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy to be spoiled; what would be struck is looked at afterwards."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good, tmp_path / "net")
    yield tmp_path / "net"
    assert not (tmp_path / "struck").exists(), "code from the file was run"


def listed(folder: Path) -> dict[str, int]:
    return {str(p): p.lstat().st_mtime_ns for p in sorted(folder.rglob("*"))}


def refused(folder: Path, action: Callable[[], Any]) -> str:
    before = listed(folder)
    tracemalloc.start()
    try:
        with pytest.raises(RankoptError) as caught:
            action()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 600
    assert peak < 64 * 2**20
    assert listed(folder) == before
    return caught.value.message


def one_line(error: RankoptError) -> None:
    assert "\n" not in error.message
    assert len(error.message) < 600


class Struck:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (exec, (BOMB,))


# the directory -------------------------------------------------------------------------------------------------------


def tensors(directory: Path, change: Callable[[dict[str, Any], bytes], tuple[dict[str, Any] | bytes, bytes]]) -> None:
    """Rewrite the header and the values of the safetensors file."""
    path = directory / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, values = change(json.loads(content[8 : 8 + length]), content[8 + length :])
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + values)


def of_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def changed(header: dict[str, Any], values: bytes) -> tuple[dict[str, Any], bytes]:
        change(header)
        return header, values

    return lambda d: tensors(d, changed)


def first(header: dict[str, Any]) -> dict[str, Any]:
    return header["head.weight"]


def text(name: str, content: str | bytes) -> Callable[[Path], Any]:
    return lambda d: (d / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def plan(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    return lambda d: edit(d, "plan.json", change)


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    return lambda d: edit(d, "manifest.json", change)


def linked(name: str) -> Callable[[Path], Any]:
    def change(d: Path) -> None:
        shutil.copy(d / name, d.parent / "elsewhere")
        (d / name).unlink()
        (d / name).symlink_to(d.parent / "elsewhere")

    return change


def piped(d: Path) -> None:
    (d / "plan.json").unlink()
    os.mkfifo(d / "plan.json")


def swapped(d: Path) -> None:
    a, b = (d / "plan.json").read_bytes(), (d / "measurements.json").read_bytes()
    (d / "plan.json").write_bytes(b)
    (d / "measurements.json").write_bytes(a)


def layer(data: dict[str, Any]) -> dict[str, Any]:
    return data["layers"]["second"]


def with_nan(d: Path) -> None:
    from safetensors.torch import load_file, save_file

    values = load_file(d / "model.safetensors")
    values["head.weight"][0, 0] = float("nan")
    save_file(values, d / "model.safetensors", metadata={"aliases": "{}"})


def of_another_shape(d: Path) -> None:
    from safetensors.torch import load_file, save_file

    values = load_file(d / "model.safetensors")
    values["head.weight"] = torch.zeros(5, 13)
    save_file(values, d / "model.safetensors", metadata={"aliases": "{}"})


def pickled(d: Path) -> None:
    (d / "model.safetensors").write_bytes(pickle.dumps(Struck()))


def of_torch(d: Path) -> None:
    torch.save({"head.weight": Struck()}, d / "model.safetensors")


DAMAGED: dict[str, Callable[[Path], Any]] = {
    "no manifest": lambda d: (d / "manifest.json").unlink(),
    "empty manifest": text("manifest.json", ""),
    "manifest cut off": lambda d: (d / "manifest.json").write_bytes((d / "manifest.json").read_bytes()[:200]),
    "manifest is a list": text("manifest.json", "[]"),
    "manifest nested": text("manifest.json", '{"schema":' + "[" * 100_000),
    "manifest of another schema": manifest(lambda m: m.update(schema=7)),
    "manifest schema true": manifest(lambda m: m.update(schema=True)),
    "manifest with NaN": text("manifest.json", '{"schema": NaN}'),
    "manifest with a key twice": text("manifest.json", '{"schema": 2, "schema": 2}'),
    "manifest with an unknown key": manifest(lambda m: m.update(run="x")),
    "manifest is linked": linked("manifest.json"),
    "manifest is huge": lambda d: (d / "manifest.json").write_bytes(b" " * (17 * 2**20)),
    "manifest climbs out": manifest(lambda m: m["files"].update({"../secret": m["files"]["plan.json"]})),
    "manifest names an absolute path": manifest(lambda m: m["files"].update({"/etc/passwd": m["files"]["plan.json"]})),
    "manifest names a hidden file": manifest(lambda m: m["files"].update({".bashrc": m["files"]["plan.json"]})),
    "manifest names itself": manifest(lambda m: m["files"].update({"manifest.json": m["files"]["plan.json"]})),
    "manifest lists too much": manifest(
        lambda m: m["files"].update({f"f{n}": m["files"]["plan.json"] for n in range(100)})
    ),
    "manifest without files": manifest(lambda m: m.update(files={})),
    "manifest bytes are text": manifest(lambda m: m["files"]["plan.json"].update(bytes="12")),
    "manifest bytes below zero": manifest(lambda m: m["files"]["plan.json"].update(bytes=-1)),
    "manifest hash is short": manifest(lambda m: m["files"]["plan.json"].update(sha256="ab")),
    "manifest export of no file": manifest(lambda m: m["exports"].update(onnx={"files": ["gone.onnx"]})),
    "manifest export without files": manifest(lambda m: m["exports"].update(onnx={})),
    "manifest inputs are a list": manifest(lambda m: m.update(inputs=[])),
    "weights digest is a number": manifest(lambda m: m.update(weights=3)),
    "plan not listed": manifest(lambda m: m["files"].update({"plan.jsn": m["files"].pop("plan.json")})),
    "plan changed": lambda d: (d / "plan.json").write_text((d / "plan.json").read_text().replace("5", "4")),
    "plan and measurements swapped": swapped,
    "plan is linked": linked("plan.json"),
    "plan is a pipe": piped,
    "plan is missing": lambda d: (d / "plan.json").unlink(),
    "plan is a folder": lambda d: ((d / "plan.json").unlink(), (d / "plan.json").mkdir()),
    "tensors are linked": linked("model.safetensors"),
    "tensors cut off": lambda d: os.truncate(d / "model.safetensors", 700),
    "tensors changed": lambda d: (
        (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-1] + b"\x01") and None
    ),
    "tensors are missing": lambda d: (d / "model.safetensors").unlink(),
}
REHASHED: dict[str, Callable[[Path], Any]] = {
    "plan is empty": text("plan.json", ""),
    "plan is no text": text("plan.json", b"\xff\xfe\x00"),
    "plan is nested": text("plan.json", '{"layers":' * 50_000),
    "plan is a pickle": text("plan.json", pickle.dumps(Struck())),
    "plan has a layer twice": text(
        "plan.json", '{"schema": 1, "layers": {"a": {"method": "svd"}, "a": {"method": "svd"}}}'
    ),
    "plan of another schema": plan(lambda p: p.update(schema=99)),
    "plan with an unknown key": plan(lambda p: p.update(code=BOMB)),
    "plan without layers": plan(lambda p: p.pop("layers") and None),
    "plan of an unknown layer": plan(lambda p: p["layers"].update(gone=layer(p))),
    "plan with a path for a layer": plan(lambda p: p["layers"].update({"../../etc/passwd": layer(p)})),
    "plan with an unknown method": plan(lambda p: layer(p).update(method="os.system")),
    "plan with a method that is none": plan(lambda p: layer(p).update(method=["svd"])),
    "plan with an absurd rank": plan(lambda p: layer(p)["ranks"].update(rank=2**30)),
    "plan with a rank beyond 64 bits": plan(lambda p: layer(p)["ranks"].update(rank=10**40)),
    "plan with a rank of 10000 digits": lambda d: (
        (d / "plan.json").write_text((d / "plan.json").read_text().replace('"rank": 5', '"rank": ' + "9" * 10_000))
        and None
    ),
    "plan with a negative rank": plan(lambda p: layer(p)["ranks"].update(rank=-1)),
    "plan with rank NaN": text(
        "plan.json", '{"schema": 1, "layers": {"second": {"method": "svd", "ranks": {"rank": NaN}}}}'
    ),
    "plan with rank 2.5": plan(lambda p: layer(p)["ranks"].update(rank=2.5)),
    "plan with rank true": plan(lambda p: layer(p)["ranks"].update(rank=True)),
    "plan with another rank name": plan(lambda p: layer(p).update(ranks={"__class__": 3})),
    "plan with a smaller rank than saved": plan(lambda p: layer(p)["ranks"].update(rank=4)),
    "plan of another model": plan(lambda p: p["fingerprint"].update(architecture="0" * 16)),
    "plan with a fingerprint of a megabyte": plan(lambda p: p["fingerprint"].update(architecture="0" * 2**20)),
    "plan with a million layers": plan(lambda p: p["layers"].update({f"x{n}": layer(p) for n in range(20_000)})),
    "tensors are a pickle": pickled,
    "tensors are of torch.save": of_torch,
    "tensors are empty": text("model.safetensors", b""),
    "header of 2**62 bytes": lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}"),
    "header longer than the file": text("model.safetensors", struct.pack("<Q", 500) + b"{}"),
    "header is no JSON": lambda d: tensors(d, lambda h, v: (b"{" + b"x" * 99, v)),
    "header is nested": lambda d: tensors(d, lambda h, v: (b'{"a":' + b"[" * 50_000, v)),
    "header has a key twice": lambda d: tensors(
        d,
        lambda h, v: (json.dumps(h).encode()[:-1] + b', "head.bias": ' + json.dumps(h["head.bias"]).encode() + b"}", v),
    ),
    "an absurd shape": of_header(lambda h: first(h).update(shape=[2**40, 2**20])),
    "a shape that overflows": of_header(lambda h: first(h).update(shape=[2**61, 2**61, 16])),
    "a shape with zero and much": of_header(lambda h: first(h).update(shape=[0, 2**61])),
    "a negative shape": of_header(lambda h: first(h).update(shape=[-5, -12])),
    "a shape of texts": of_header(lambda h: first(h).update(shape=["5", "12"])),
    "a shape of true": of_header(lambda h: first(h).update(shape=[True, 60])),
    "an unknown dtype": of_header(lambda h: first(h).update(dtype="PICKLE")),
    "a dtype that is a list": of_header(lambda h: first(h).update(dtype=[])),
    "another dtype": of_header(lambda h: first(h).update(dtype="I32")),
    "offsets that overlap": of_header(lambda h: first(h).update(data_offsets=h["head.bias"]["data_offsets"])),
    "offsets beyond the file": of_header(lambda h: first(h).update(data_offsets=[2**40, 2**40 + 240])),
    "offsets backwards": of_header(lambda h: first(h).update(data_offsets=[240, 0])),
    "values behind the last": lambda d: tensors(d, lambda h, v: (h, v + b"more")),
    "an entry more": of_header(lambda h: h.update(extra={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})),
    "an entry less": of_header(lambda h: h.pop("head.bias") and None),
    "an unknown field": of_header(lambda h: first(h).update(run=BOMB)),
    "aliases that are a list": of_header(lambda h: h.update(__metadata__={"aliases": "[]"})),
    "aliases to nothing": of_header(lambda h: h.update(__metadata__={"aliases": '{"head.bias": "gone"}'})),
    "metadata that are numbers": of_header(lambda h: h.update(__metadata__={"a": 1})),
    "NaN among the weights": with_nan,
    "weights of another shape": of_another_shape,
}
SOURCES = {
    "a function that could do anything": "os:getcwd",
    "a file": "/tmp/evil.py:Net",
    "a module that is not there": "no.such.module:Net",
    "a call": "os:system('x')",
    "a list": ["os"],
    "not a model": "saved_models:LAYERS",
}


def test_there_are_enough_cases() -> None:
    assert len(DAMAGED) + len(REHASHED) + len(SOURCES) + len(PROGRAMS) >= 60


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(saved: Path, case: str) -> None:
    DAMAGED[case](saved)
    refused(saved.parent, lambda: load(saved, Net))


@pytest.mark.parametrize("case", REHASHED)
def test_spoiled_with_the_hashes_made_right(saved: Path, case: str) -> None:
    REHASHED[case](saved)
    rehash(saved)
    message = refused(saved.parent, lambda: load(saved, Net))
    assert "SHA" not in message
    assert "bytes, saved were" not in message


@pytest.mark.parametrize("case", SOURCES)
def test_sources(saved: Path, case: str) -> None:
    edit(saved, "environment.json", lambda e: e.update(source=SOURCES[case]))
    rehash(saved)
    assert "pass model=" in refused(saved.parent, lambda: load(saved))


@pytest.mark.parametrize("case", ["manifest is linked", "plan is a pipe", "tensors cut off", "no manifest"])
def test_at_the_command_line(saved: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    DAMAGED[case](saved)
    before = listed(saved.parent)
    code = main(["verify", str(saved)])
    out, err = capsys.readouterr()
    assert code in (1, 2)
    assert (len(err.splitlines()) == 1 and err.startswith("rankopt: error: ")) if code == 2 else "FAIL" in out
    assert listed(saved.parent) == before


# programs ------------------------------------------------------------------------------------------------------------


Records = dict[str, bytes]


def repacked(change: Callable[[Records], Any], compress: bool = False) -> Callable[[Path], Any]:
    def spoil(directory: Path) -> None:
        path = directory / "model.pt2"
        with zipfile.ZipFile(path) as file:
            records = {i.filename.partition("/")[2]: file.read(i) for i in file.infolist()}
        change(records)
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as file:
            for name, content in records.items():
                file.writestr(f"model/{name}", content)
        path.write_bytes(out.getvalue())

    return spoil


def program(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def spoil(records: Records) -> None:
        data = json.loads(records["models/model.json"])
        change(data)
        records["models/model.json"] = json.dumps(data).encode()

    return repacked(spoil)


def weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def spoil(records: Records) -> None:
        name = "data/weights/model_weights_config.json"
        data = json.loads(records[name])
        change(data["config"])
        records[name] = json.dumps(data).encode()

    return repacked(spoil)


def one(config: dict[str, Any]) -> dict[str, Any]:
    return next(iter(config.values()))


def node(data: dict[str, Any]) -> dict[str, Any]:
    return data["graph_module"]["graph"]["nodes"][0]


def symbol(expression: str) -> Callable[[Path], Any]:
    def change(data: dict[str, Any]) -> None:
        written = json.dumps(data["graph_module"]["graph"])
        start = written.index('"expr_str": "') + len('"expr_str": "')
        end = written.index('"', start)
        changed = written[:start] + json.dumps(expression)[1:-1] + written[end:]
        data["graph_module"]["graph"] = json.loads(changed)

    return program(change)


def loaded_pickle(records: Records) -> None:
    records["data/sample_inputs/model.pt"] = saved_pickle()


def saved_pickle() -> bytes:
    out = io.BytesIO()
    torch.save((Struck(),), out)
    return out.getvalue()


def called(target: str) -> Callable[[Path], Any]:
    return program(lambda p: node(p).update(target=target))


def renamed(name: str) -> Callable[[Path], Any]:
    """The result of the first operation gets a name that would be written into source."""

    def change(data: dict[str, Any]) -> None:
        old = node(data)["outputs"][0]["as_tensor"]["name"]
        written = json.dumps(data["graph_module"]["graph"]).replace(f'"{old}"', json.dumps(name))
        data["graph_module"]["graph"] = json.loads(written)

    return program(change)


def with_argument(argument: dict[str, Any]) -> Callable[[Path], Any]:
    return program(lambda p: node(p)["inputs"].append({"name": "x", "arg": argument, "kind": 1}))


def legacy(records: Records) -> None:
    for name in [n for n in records if n.startswith("data/weights")]:
        del records[name]
    records["data/weights/model.pt"] = saved_pickle()


def nothing_but_a_pickle(directory: Path) -> None:
    torch.save(Struck(), directory / "model.pt2")


def twice(directory: Path) -> None:
    path = directory / "model.pt2"
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr(file.infolist()[0].filename, b"other")


def outside(directory: Path) -> None:
    with zipfile.ZipFile(directory / "model.pt2", "a") as file:
        file.writestr("model/../../struck", b"x")


PROGRAMS: dict[str, Callable[[Path], Any]] = {
    "no archive": text("model.pt2", b"PK nothing"),
    "empty": text("model.pt2", b""),
    "cut off": lambda d: os.truncate(d / "model.pt2", 2000),
    "a pickle": nothing_but_a_pickle,
    "pickled example inputs": repacked(loaded_pickle),
    "weights of an old form": repacked(legacy),
    "a pickled weight": weights(lambda c: one(c).update(use_pickle=True)),
    "a weight in no record": weights(lambda c: one(c).update(path_name="weight_999")),
    "a weight in another place": weights(lambda c: one(c).update(path_name="../../models/model.json")),
    "a weight that is an object": weights(lambda c: one(c).update(path_name="opaque_obj_0")),
    "an absurd weight": weights(
        lambda c: one(c)["tensor_meta"].update(sizes=[{"as_int": 2**40}], strides=[{"as_int": 1}])
    ),
    "a weight that reads beyond": weights(lambda c: one(c)["tensor_meta"].update(storage_offset={"as_int": 10**6})),
    "a weight of a symbolic size": weights(
        lambda c: one(c)["tensor_meta"].update(sizes=[{"as_expr": {"expr_str": BOMB, "hint": None}}])
    ),
    "a weight of an unknown dtype": weights(lambda c: one(c)["tensor_meta"].update(dtype=99)),
    "a weight on a GPU": weights(lambda c: one(c)["tensor_meta"].update(device={"type": "cuda", "index": 0})),
    "an empty record of an absurd shape": repacked(lambda r: r.update({"data/weights/weight_0": b""})),
    "compressed": repacked(lambda r: None, compress=True),
    "a bomb": repacked(lambda r: r.update({"data/weights/weight_99": b"\0" * 2**22}), compress=True),
    "compiled code": repacked(lambda r: r.update({"data/aotinductor/model/x.so": b"\x7fELF"})),
    "an extra file": repacked(lambda r: r.update({"extra/run.py": BOMB.encode()})),
    "a record twice": twice,
    "a record outside": outside,
    "no program": repacked(lambda r: r.pop("models/model.json") and None),
    "a second program": repacked(lambda r: r.update({"models/other.json": r["models/model.json"]})),
    "the program is no JSON": repacked(lambda r: r.update({"models/model.json": b"{"})),
    "the program has a key twice": repacked(lambda r: r.update({"models/model.json": b'{"a": 1, "a": 2}'})),
    "the program is nested": repacked(lambda r: r.update({"models/model.json": b'{"a":' * 50_000})),
    "another format": repacked(lambda r: r.update(archive_format=b"pkl")),
    "calls os.system": called("torch.os.system"),
    "calls torch.load": called("torch.load"),
    "calls torch.ops.load_library": called("torch.ops.load_library"),
    "calls a custom operator": called("torch.ops.mylib.op.default"),
    "reads a file": called("torch.ops.aten.from_file.default"),
    "writes a file": called("torch.ops.aten.save.default"),
    "skips the checks of bounds": called("torch.ops.aten._index_put_impl_.default"),
    "lays a tensor over other memory": called("torch.ops.aten.set_.source_Tensor"),
    "calls what is no operator": called("_operator.methodcaller"),
    "calls call": called("_operator.call"),
    "calls an attribute of an operator": called("torch.ops.aten.add.Tensor.__class__"),
    "calls a higher-order operator": called("torch.ops.higher_order.cond"),
    "calls an unknown text": called(BOMB),
    "calls an extension": called("#x:y"),
    "a size that is code": symbol(f"__import__('os').system('x') or {BOMB}"),
    "a size that calls": symbol("exec(s0)"),
    "a size with an attribute": symbol("s0.__class__"),
    "a size without end": symbol("9**9**9**9**9**9"),
    "a size of many brackets": symbol("(" * 5000 + "s0" + ")" * 5000),
    "a size with a name that is none": symbol("lambda: s0"),
    "a name that is code": renamed(f"x; {BOMB}; y"),
    "a name with a line break": renamed(f"x\n{BOMB}"),
    "a name with a quote": renamed("x'+'"),
    "an argument that is a graph": with_argument({"as_graph": {"name": "g", "graph": {}}}),
    "an argument that is an object": with_argument({"as_custom_obj": {"name": "g", "class_fqn": "os"}}),
    "an argument that is an operator": with_argument({"as_operator": "torch.os.system"}),
    "an argument that is a path": with_argument({"as_string": "/etc/passwd"}),
    "an argument on a GPU": with_argument({"as_device": {"type": "cuda", "index": 0}}),
    "a parameter with a name that is code": program(
        lambda p: p["graph_module"]["signature"]["input_specs"][0]["parameter"].update(parameter_name=f"a[{BOMB}]")
    ),
    "returns an object": program(
        lambda p: p["graph_module"]["module_call_graph"][0]["signature"].update(
            out_spec='[1, {"type": "builtins.object", "context": null, "children_spec": []}]'
        )
    ),
    "a nest that is no JSON": program(
        lambda p: p["graph_module"]["module_call_graph"][0]["signature"].update(in_spec=BOMB)
    ),
    "an argument name that is code": program(
        lambda p: p["graph_module"]["module_call_graph"][0]["signature"].update(forward_arg_names=[f"x=({BOMB})"])
    ),
    "no graph": program(lambda p: p.update(graph_module=[])),
    "no calls": program(lambda p: p["graph_module"].pop("module_call_graph") and None),
    "a version that is none": program(lambda p: p.update(torch_version=f"{BOMB};")),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_programs(saved: Path, case: str) -> None:
    PROGRAMS[case](saved)
    rehash(saved)
    refused(saved.parent, lambda: load(saved, standalone=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.update(guards_code=[BOMB]),
        lambda p: node(p)["metadata"].update(stack_trace=BOMB, source_fn_stack=f"x,{BOMB}", custom="{"),
        lambda p: p["graph_module"]["metadata"].update(custom="{"),
    ],
)
def test_what_only_describes_is_left_out(saved: Path, change: Any) -> None:
    program(change)(saved)
    rehash(saved)
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(load(saved, standalone=True)(x), net()[1](x), rtol=1e-4, atol=1e-5)


def test_the_same_files_do_harm_where_nothing_is_checked(saved: Path) -> None:
    """The suite's own check: what it calls hostile is."""
    repacked(loaded_pickle)(saved)
    with pytest.raises(Exception):  # noqa: B017, PT011 (whatever torch makes of the rest)
        torch.export.load(saved / "model.pt2")
    assert Path("struck").exists()
    Path("struck").unlink()


# checkpoints of users ------------------------------------------------------------------------------------------------


def test_a_checkpoint_with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": net()[0].state_dict(), "args": Struck()}, tmp_path / "c.pt")
    message = refused(tmp_path, lambda: load_checkpoint(Net(), tmp_path / "c.pt"))
    assert "holds Python objects besides tensors" in message
    assert "torch.save(model.state_dict(), ...)" in message
    assert not Path("struck").exists()


# anything ------------------------------------------------------------------------------------------------------------


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
plans = st.fixed_dictionaries(
    {"schema": st.just(1) | json_values, "layers": st.dictionaries(
        st.sampled_from(["first", "second", "head", "x"]),
        st.fixed_dictionaries({"method": st.sampled_from(["svd", "cp", "dense"]) | json_values,
                               "ranks": st.dictionaries(st.just("rank"), json_values) | json_values}),
    ) | json_values},
    optional={"fingerprint": json_values, "skipped": json_values, "other": json_values},
)  # fmt: skip
QUICK = settings(max_examples=150, suppress_health_check=list(HealthCheck))


@QUICK
@given(plans | json_values)
def test_any_plan_is_read_or_refused(value: Any) -> None:
    try:
        read = Plan.from_json(json.dumps(value))
    except RankoptError as error:
        one_line(error)
    else:
        assert Plan.from_json(read.to_json()) == read


@QUICK
@given(st.data())
def test_any_change_of_a_plan_is_read_or_refused(good: Path, data: st.DataObject) -> None:
    content = bytearray((good / "plan.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        Plan.from_json(content.decode("utf-8", "replace"))
    except RankoptError as error:
        one_line(error)


entries = st.dictionaries(
    st.sampled_from(["head.weight", "head.bias", "__metadata__", "a"]),
    st.fixed_dictionaries({
        "dtype": st.sampled_from(["F32", "I64", "BOOL", "X"]) | json_values,
        "shape": st.lists(st.integers(-2, 2**62), max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(-1, 2**62), min_size=2, max_size=2) | json_values,
    }) | json_values,
    max_size=4,
)  # fmt: skip


@QUICK
@given(header=entries | json_values, values=st.binary(max_size=64), length=st.none() | st.integers(0, 2**64 - 1))
def test_any_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: Any, values: bytes, length: int | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    content = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + values)
    try:
        stored, _ = read_header(path)
    except RankoptError as error:
        one_line(error)
    else:  # the format's own reader agrees
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            assert {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()} == {  # noqa: SIM118
                n: s.shape for n, s in stored.items()
            }


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_change_of_a_program_is_read_or_refused(
    good: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes of the program's text, which hold operators, names and sizes."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.pt2"

    def change(records: Records) -> None:
        content = bytearray(records["models/model.json"])
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(32, 126))
        records["models/model.json"] = bytes(content)

    folder = tmp_path_factory.mktemp("p")
    shutil.copy(good / "model.pt2", folder / "model.pt2")
    repacked(change)(folder)
    shutil.move(folder / "model.pt2", path)
    try:
        load_program(path)
    except RankoptError as error:
        one_line(error)


@pytest.mark.slow
def test_memory_is_bounded_by_the_system(good: Path, tmp_path: Path) -> None:
    """With 4 GiB of address space beyond what imports take, every hostile case still ends in one line."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_hostile as t, shutil, os
from pathlib import Path
from rankopt.artifact import load
from rankopt.errors import RankoptError
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, used + 2**32))
for name, cases, alone in (("d", t.DAMAGED, False), ("r", t.REHASHED, False), ("p", t.PROGRAMS, True)):
    for case, spoil in cases.items():
        if case == "a record twice":
            continue
        shutil.rmtree("net", ignore_errors=True)
        shutil.copytree({str(good)!r}, "net")
        Path("elsewhere").unlink(missing_ok=True)
        spoil(Path("net").resolve())
        if name != "d":
            t.rehash(Path("net"))
        try:
            load("net", None if alone else t.Net, standalone=alone)
        except RankoptError:
            continue
        raise SystemExit(case)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(rankopt.__file__).parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-800:]
    assert resource.getrlimit(resource.RLIMIT_AS)[0] != 0
