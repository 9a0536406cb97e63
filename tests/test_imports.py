"""The house rules that a reader can't check by eye: who imports whom, what is loaded when, and what may not be used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rankopt"
LONGEST = 350
HEAVY = ("torch", "optuna", "ray", "onnxruntime", "tensorly", "thop", "scipy", "numpy", "pydantic", "rich", "typer")
# package → where it may be imported: a module, or all below it when it ends in a dot
HOMES = {
    "optuna": [
        "rankopt.study",
        "rankopt.loop",
        "rankopt.inheriting",
        "rankopt.begun",
        "rankopt.ledger",
        "rankopt.storages",
        "rankopt.trial_rows",
        "rankopt.heartbeat",
        "rankopt.trials",
        "rankopt.sampling",
        "rankopt.history",
        "rankopt.status",
    ],
    "sqlalchemy": ["rankopt.storages", "rankopt.trial_rows"],
    "tensorly": ["rankopt.decompositions."],
    "thop": ["rankopt.cost", "rankopt.testing"],
    "scipy": ["rankopt.allocate", "rankopt.latency_fit", "rankopt.latency_table", "rankopt.evbmf"],
    "pytest": ["rankopt.testing", "rankopt.target_contract"],
    "hypothesis": ["rankopt.testing", "rankopt.contract_cases"],
    "ray": [
        "rankopt.targets.ray_node",
        "rankopt.executors.bridge",
        "rankopt.executors.ray_training",
        "rankopt.executors.ray_tune",
    ],
    "onnx": ["rankopt.onnx_file"],
    "executorch": ["rankopt.exports.executorch"],
    "transformers": [],
    "onnxscript": ["rankopt.onnx_file"],
    "onnxruntime": ["rankopt.targets.onnxruntime"],
    "openvino": ["rankopt.targets.openvino"],
    "plotly": ["rankopt.report"],
    "jinja2": ["rankopt.report"],
    "matplotlib": ["rankopt.plots"],
    "pandas": ["rankopt.trial_table", "rankopt.result"],
    "tensorboardX": ["rankopt.callbacks"],
    "mlflow": ["rankopt.callbacks"],
    "sklearn": [],
    "torchvision": [],
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def documented() -> list[str]:
    """The order of the fenced list in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```import-order\n(.*?)```", text, re.DOTALL)
    names = [line.split()[0] for line in block.splitlines()]
    return [name if name == "rankopt" else f"rankopt.{name}" for name in names]


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Everything that runs: all but the bodies of ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            for branch in child.orelse:
                yield branch
                yield from nodes(branch)
            continue
        yield child
        yield from nodes(child)


def imports(name: str) -> set[str]:
    """What a module imports anywhere, functions included: modules of the package in full, others as they stand."""
    found: set[str] = set()
    for node in nodes(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import in line {node.lineno}"
            assert node.module is not None
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & set(FILES) or {node.module}
    return found


def test_the_list_in_the_documentation_is_complete() -> None:
    assert sorted(documented()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_modules_import_only_from_lines_above_their_own(name: str) -> None:
    order = documented()
    above = set(order[: order.index(name)])
    own = {module for module in imports(name) if module == "rankopt" or module.startswith("rankopt.")}
    assert own <= above, f"{name} imports {', '.join(sorted(own - above))}, which stand below it in the list"


@pytest.mark.parametrize("package", HOMES)
def test_packages_are_imported_at_home_only(package: str) -> None:
    for name in FILES:
        if any(module.split(".")[0] == package for module in imports(name)):
            at_home = [
                home for home in HOMES[package] if f"{name}.".startswith(home if home[-1] == "." else f"{home}.")
            ]
            assert at_home, f"{name} imports {package}"


def loaded_by(statement: str) -> set[str]:
    """The top-level packages in memory after a statement in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import rankopt; dir(rankopt)").isdisjoint(HEAVY)


def test_the_command_line_starts_without_torch() -> None:
    loaded = loaded_by("import rankopt.cli; from rankopt.study_file import load_study")
    assert loaded.isdisjoint({"torch", "optuna", "ray", "tensorly", "thop", "scipy"})


def test_a_model_is_compressed_without_the_study() -> None:
    loaded = loaded_by("from rankopt import apply, find_layers, count, Plan, load")
    assert loaded.isdisjoint({"optuna", "ray", "onnxruntime", "tensorly", "thop"})


def test_every_public_name_is_there() -> None:
    import rankopt

    assert all(getattr(rankopt, name) is not None for name in rankopt.__all__)
    assert sorted(rankopt._HOMES) == sorted(rankopt.__all__) == dir(rankopt)
    with pytest.raises(AttributeError, match="no_such_name"):
        rankopt.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", FILES)
def test_what_could_run_what_a_file_says_is_not_used(name: str) -> None:
    forbidden = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    assert not {module.split(".")[0] for module in imports(name)} & forbidden
    for node in nodes(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("eval", "exec", "compile", "os.system", "os.popen", "yaml.unsafe_load"), (
            f"{name}:{node.lineno}: {called}"
        )
        if called == "torch.load":
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert given.get("weights_only") == "True", f"{name}:{node.lineno}: torch.load without weights_only=True"
        if called == "torch.export.load":  # unpickles; only files that this process wrote, or a checked copy
            assert name in ("rankopt.program_file", "rankopt.targets.torch_cpu"), f"{name}:{node.lineno}: {called}"
        if called == "yaml.load":
            assert [k.arg for k in node.keywords] == ["Loader"], f"{name}:{node.lineno}: yaml.load without a Loader"
        for keyword in node.keywords:
            shell = keyword.arg == "shell" and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            )
            assert not shell, f"{name}:{node.lineno}: shell"


@pytest.mark.parametrize("name", FILES)
def test_modules_are_short_and_say_what_they_are(name: str) -> None:
    text = FILES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    assert ast.get_docstring(ast.parse(text)), f"{name} has no docstring"
    assert FILES[name].stem not in ("utils", "util", "helpers", "helper", "common", "manager", "base", "misc")
