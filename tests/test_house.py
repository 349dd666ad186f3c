"""Is the code built as we say it is? Read from the sources, so that a wrong import is red before it does harm."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("adapters", "lora_fn")
SOURCES = {path.relative_to(ROOT).as_posix(): path for package in PACKAGES for path in ROOT.glob(f"{package}/**/*.py")}
MODULES = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in SOURCES}

COLLECTIVES = (
    *("all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object"),
    *("all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single"),
    *("broadcast", "broadcast_object_list", "collective_permute"),
    *("gather", "gather_object", "reduce", "reduce_scatter", "reduce_scatter_coalesced", "reduce_scatter_tensor"),
    *("scatter", "scatter_object_list"),
    *("batch_isend_irecv", "irecv", "isend", "recv", "send"),
)

# Name -> the files that may use it. The longest name that fits decides, so a row can make an exception to another.
ROOMS: dict[str, tuple[str, ...]] = {
    "adapters": ("adapters/*",),
    "neuronx_distributed": ("adapters/nxd.py", "adapters/nxd_attention.py", "adapters/nxd_layers.py"),
    "peft": (),
    "safetensors": ("lora_fn/checkpoint.py",),
    "torch._C._distributed_c10d": ("lora_fn/collectives.py",),
    "torch.distributed": ("lora_fn/collectives.py", "adapters/*"),  # in adapters: to set up and to launch
    "torch.distributed._functional_collectives": ("lora_fn/collectives.py",),
    "torch.distributed.nn": ("lora_fn/collectives.py",),
    "torch.distributed.tensor": ("lora_fn/placement.py", "adapters/*"),  # to convert our placements to torch's
    "torch.ops._c10d_functional": ("lora_fn/collectives.py",),
    "torch.ops.c10d": ("lora_fn/collectives.py",),
    "torch.ops.c10d_functional": ("lora_fn/collectives.py",),
    "torch_xla": ("lora_fn/collectives.py", "adapters/*"),
    **{
        f"{home}.{op}": ("lora_fn/collectives.py",)
        for home in ("torch.distributed", "torch.distributed.distributed_c10d", "torch_xla.core.xla_model")
        for op in COLLECTIVES
    },
}

# Imported where they are used, never when one of our modules is imported: they are slow, and some are optional.
LATE = (
    *("matplotlib", "regex", "tqdm", "transformers"),
    *("torch.distributed._functional_collectives", "torch.distributed.tensor"),
)

# What `import lora_fn, adapters` brings along beyond torch, and what Python itself has.
BROUGHT = {"adapters", "lora_fn", "safetensors"}

# Calls that import the module that their first argument names.
IMPORTERS = ("__import__", "import_module", "importlib.import_module")


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One dotted name in a source file."""

    name: str
    line: int
    is_import: bool
    is_late: bool  # inside a function
    is_hint: bool  # under `if TYPE_CHECKING:`


def fits(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def dotted(node: ast.AST) -> str | None:
    """`a.b.c` of nested attributes, None for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return owner and f"{owner}.{node.attr}"
    return None


def uses(source: str, package: str = "") -> list[Use]:
    """Every module or member that a source imports, and every attribute that it reaches through an import.

    `from a import b` gives `a.b`, and `import torch.distributed as dist` followed by `dist.send` gives
    `torch.distributed.send`. `package` is the one that relative imports start from.
    """
    tree = ast.parse(source)
    alias: dict[str, str] = {}
    found: list[Use] = []

    def imported(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            for entry in node.names:
                first = entry.name.split(".")[0]
                alias[entry.asname or first] = entry.name if entry.asname else first
                yield entry.name
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            home = ".".join([*parents, *([node.module] if node.module else [])])
            for entry in node.names:
                name = home if entry.name == "*" else f"{home}.{entry.name}"
                alias[entry.asname or entry.name] = name
                yield name
        elif isinstance(node, ast.Call) and dotted(node.func) in IMPORTERS:
            yield from (
                arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            )

    def visit(node: ast.AST, is_late: bool, is_hint: bool) -> None:
        where = {"line": getattr(node, "lineno", 0), "is_late": is_late, "is_hint": is_hint}
        found.extend(Use(name=name, is_import=True, **where) for name in imported(node))
        if isinstance(node, ast.Attribute) and (name := dotted(node)):
            found.append(Use(name=name, is_import=False, **where))
            return
        if isinstance(node, ast.If) and (dotted(node.test) or "").endswith("TYPE_CHECKING"):
            for child in node.body:
                visit(child, is_late, True)
            for child in node.orelse:
                visit(child, is_late, is_hint)
            return
        is_late = is_late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, is_late, is_hint)

    visit(tree, False, False)

    def resolved(use: Use) -> Iterator[Use]:
        first, _, rest = use.name.partition(".")
        if use.is_import:
            yield use
        elif first in alias:
            yield replace(use, name=f"{alias[first]}.{rest}")

    return [known for use in found for known in resolved(use)]


def uses_of(file: str) -> list[Use]:
    """`uses` of one of our files."""
    return uses(SOURCES[file].read_text(encoding="utf-8"), ".".join(file.split("/")[:-1]))


def strangers(found: list[Use], file: str) -> list[str]:
    """What `file` uses and another file is the only one to use."""
    wrong = []
    for use in found:
        row = max((name for name in ROOMS if fits(use.name, name)), key=len, default=None)
        if row and not use.is_hint and not any(fnmatch(file, pattern) for pattern in ROOMS[row]):
            wrong.append(
                f"{file}:{use.line} uses {use.name}, which belongs to {' and '.join(ROOMS[row]) or 'the tests'}"
            )
    return wrong


def early(found: list[Use], file: str) -> list[str]:
    """What `file` imports at its top and may only import inside a function."""
    return [
        f"{file}:{use.line} imports {use.name} at module level, move it into the function that needs it"
        for use in found
        if use.is_import and not use.is_late and not use.is_hint and any(fits(use.name, name) for name in LATE)
    ]


def cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """Modules that import each other in a ring, None where there is no ring."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def undocumented(source: str) -> list[str]:
    """Public functions and classes of a module that have no docstring."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    public = [node for node in ast.parse(source).body if isinstance(node, kinds) and not node.name.startswith("_")]
    return [node.name for node in public if not ast.get_docstring(node)]


def module_of(name: str) -> str | None:
    """The module of ours that an imported name is in: `lora_fn.spec` of `lora_fn.spec.LoraSpec`."""
    return max((module for module in MODULES if fits(name, module)), key=len, default=None)


def test_no_import_cycles():
    graph: dict[str, set[str]] = {}
    for module, file in MODULES.items():
        targets = {module_of(use.name) for use in uses_of(file) if use.is_import}
        graph[module] = {target for target in targets if target} - {module}
    assert cycle(graph) is None


@pytest.mark.parametrize("file", sorted(SOURCES))
def test_outside_names_stay_in_their_room(file: str):
    assert strangers(uses_of(file), file) == []


@pytest.mark.parametrize("file", sorted(SOURCES))
def test_slow_and_optional_modules_are_imported_late(file: str):
    assert early(uses_of(file), file) == []


@pytest.mark.parametrize("file", sorted(SOURCES))
def test_public_names_have_docstrings(file: str):
    assert undocumented(SOURCES[file].read_text(encoding="utf-8")) == []


def test_the_oracle_is_independent():
    oracle = ROOT / "tests" / "oracle.py"
    if not oracle.exists():
        pytest.skip("tests/oracle.py is not written yet")
    found = uses(oracle.read_text(encoding="utf-8"), "tests")
    assert [use.name for use in found if any(fits(use.name, package) for package in PACKAGES)] == []


def imported_by(words: str) -> set[str]:
    """The modules that a fresh process has after an import, beyond those of torch and of Python itself."""
    script = f"import sys, torch; before = {{*sys.modules}}; import {words}; print(*{{*sys.modules}} - before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    return {name for name in done.stdout.split() if name.partition(".")[0] not in sys.stdlib_module_names}


def test_import_brings_nothing_slow_along():
    """Each module that is brought takes time that nobody asked for: see suite B12 of the benchmarks."""
    found = imported_by("lora_fn, adapters")
    assert {name for name in found if name.partition(".")[0] not in BROUGHT} == set()
    assert len(found) <= 70


def test_the_functions_need_neither_layers_nor_disk():
    assert {name.partition(".")[0] for name in imported_by("lora_fn")} == {"lora_fn"}


def test_what_an_import_brings_is_seen():
    assert "regex" in imported_by("regex")


# The checks above pass on good code; these show that they fail on bad code.


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("lora_fn/layers.py", "import adapters.bind"),
        ("lora_fn/layers.py", "from adapters import bind"),
        ("lora_fn/layers.py", "from ..adapters import bind"),
        ("lora_fn/layers.py", "def f():\n    from safetensors.torch import save_file"),
        ("lora_fn/layers.py", "import torch\ntorch.distributed.is_initialized()"),
        ("lora_fn/spec.py", "import torch.distributed.tensor"),
        ("adapters/train.py", "import peft"),
        ("adapters/train.py", "import importlib\ndef f():\n    return importlib.import_module('peft')"),
        ("adapters/train.py", "import torch.distributed as dist\ndef f(x):\n    dist.all_reduce(x)"),
        ("adapters/train.py", "import torch.distributed\ntorch.distributed.all_reduce(x)"),
        ("adapters/train.py", "from torch import distributed as dist\ndist.all_reduce(x)"),
        ("adapters/train.py", "from torch.distributed import all_reduce"),
        ("adapters/train.py", "import torch_xla.core.xla_model as xm\nxm.all_reduce('sum', x)"),
        ("adapters/train.py", "import torch\ntorch.ops._c10d_functional.all_reduce(x)"),
    ],
)
def test_a_stranger_is_found(file: str, source: str):
    assert strangers(uses(source, file.split("/")[0]), file)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("adapters/train.py", "import torch.distributed as dist\ndist.init_process_group()\ndist.barrier()"),
        ("adapters/train.py", "from torch.distributed.device_mesh import init_device_mesh"),
        ("adapters/train.py", "from .peft import get_peft_model\nfrom adapters import peft"),
        ("lora_fn/spec.py", "if TYPE_CHECKING:\n    from torch.distributed.device_mesh import DeviceMesh"),
        ("lora_fn/placement.py", "def f():\n    from torch.distributed import tensor\n    return tensor.Shard(0)"),
        ("lora_fn/placement.py", "import torch\ndef f():\n    return torch.distributed.tensor.Shard(0)"),
        ("lora_fn/collectives.py", "import torch.distributed as dist\ndist.all_reduce(x)"),
        ("lora_fn/layers.py", "def f(dist):\n    return dist.all_reduce"),
    ],
)
def test_a_resident_is_left_alone(file: str, source: str):
    assert not strangers(uses(source, file.split("/")[0]), file)


def test_an_early_import_is_found():
    assert early(uses("import transformers"), "adapters/models.py")
    assert early(uses("try:\n    from tqdm import tqdm\nexcept ImportError:\n    pass"), "adapters/train.py")
    assert not early(uses("def f():\n    import transformers"), "adapters/models.py")
    assert not early(uses("if TYPE_CHECKING:\n    import transformers"), "adapters/models.py")


def test_a_cycle_is_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_a_missing_docstring_is_found():
    assert undocumented("def f(): pass\ndef _g(): pass\nclass C:\n    'has one'") == ["f"]
