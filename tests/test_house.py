"""The house: who may import whom, how long files and functions may get, what a command may load before it starts."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("kernels/*.py")])
PROGRAM = [path for path in SOURCES if not path.name.startswith(("test_", "conftest"))]
OURS = {path.stem for path in PROGRAM} | {"support"}
PACKAGES = {"torch", "torchvision", "numpy", "tqdm", "sklearn", "PIL"}
OPTIONAL = {"safetensors", "onnx", "onnxscript", "onnxruntime", "scipy", "torchcodec"}  # imported only where asked for
LEAVES = {"model", "losses", "data", "heads", "mask2former"}
SUPPORT = {path.stem for path in PROGRAM if path.parent.name == "support"}
EVENING = ("model.py", "losses.py", "data.py", "train.py", "eval_knn.py")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path, anywhere: bool = True) -> set[str]:
    """Names of the imported modules; those of support/ as support.NAME."""
    found = set()
    for node in ast.walk(tree(path)) if anywhere else tree(path).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"support.{a.name}" for a in node.names} if node.module == "support" else {node.module}
    return found


def lines(name: str) -> int:
    return len((ROOT / name).read_text().splitlines())


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: path.stem)
def test_house_imports(path):
    """Leaves import nothing of ours; support/ nothing from the top, but for evaluation, which may use hub and data;
    nothing imports a command, but for train and bench; no package beyond the five, Pillow and the optional ones."""
    names = imports(path)
    ours = {name for name in names if name.split(".")[0] in OURS}
    allowed = {f"support.{name}" for name in SUPPORT - {"evaluation"}}
    if path.stem in LEAVES:
        allowed = set()
    elif path.stem == "evaluation":
        allowed |= {"hub", "data", "model"}
    elif path.parent == ROOT:
        allowed |= LEAVES | {"hub", "support.evaluation"}
        allowed |= {"train": {"eval_knn"}, "visualize": {"eval_knn"}, "bench": OURS}.get(path.stem, set())
    assert ours <= allowed, f"{path.name} imports {sorted(ours - allowed)}"
    outside = {name.split(".")[0] for name in names} - OURS - set(sys.stdlib_module_names) - PACKAGES - OPTIONAL
    assert not outside, f"{path.name} imports {sorted(outside)}"
    assert not {name.split(".")[0] for name in imports(path, anywhere=False)} & OPTIONAL


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: path.stem)
def test_house_lengths(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            n = node.end_lineno - node.lineno + 1
            assert n <= (120 if node.name == "main" else 80), f"{path.name}: {node.name} has {n} lines"
    wide = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120]
    assert not wide, f"{path.name}: lines {wide} have more than 120 columns"


def test_house_lines():
    assert sum(map(lines, EVENING)) <= 2600
    for name, most in {"train.py": 850, "data.py": 700, "test_all.py": 3000, "README.md": 250}.items():
        assert lines(name) <= most, name
    assert not list(ROOT.rglob("utils.py")) and not (ROOT / "support/__init__.py").exists()
    assert not (ROOT / "kernels/__init__.py").exists()  # would shadow the package of that name of Hugging Face


def test_house_commands_start_light():
    """A mistyped flag is answered in about the time that importing torch takes: nothing else slow comes before it."""
    slow = {"torchvision", "sklearn", "scipy", "torch.distributed.checkpoint", "torch.distributed.fsdp",
            "torch.distributed.tensor", "torch._dynamo"}
    code = ("import sys, torch; before = set(sys.modules)\n"
            "import hub, train, eval_knn, eval_linear, eval_logreg, eval_dense, visualize, export\n"
            f"print(sorted((set(sys.modules) - before) & {slow}))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
