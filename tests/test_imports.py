"""Imports go one way, and the heavy ones stay out of what must be quick or torch-free."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import projaudit

PACKAGE = Path(projaudit.__file__).parent
# Lowest first: a module imports only modules of earlier rows, or of its own.
LAYERS = [
    ["data", "inert", "errors", "findings", "evidence", "screened"],
    ["metrics", "strict", "report", "chain"],
    [
        "refs",
        "source",
        "safetensors_header",
        "gguf_header",
        "lanczos",
        "linalg",
        "rules",
        "position",
        "recipe",
    ],
    ["torch_entries"],
    ["torch_pickle"],
    ["torch_zip"],
    ["peft_config", "quantised_config", "quantised_layouts", "quantised_values"],
    ["peft_methods"],
    ["projector"],
    ["hub", "weight_files", "family", "module", "policy", "quantised", "gguf_values"],
    ["matching"],
    ["locating"],
    ["remote", "mmproj", "clip_keys", "readings", "explain"],
    ["checkpoint", "weights"],
    ["config_changes"],
    ["adapters", "align", "base", "coverage", "judge"],
    ["update", "formats", "rounding"],
    ["undo"],
    ["pair"],
    ["analyses", "targets"],
    ["session"],
    ["opened"],
    ["sides"],
    ["measure", "against_base"],
    ["behaviour"],
    ["calibration", "screen"],
    ["listening", "lens"],
    ["reporting"],
    ["audit"],
    ["demo", "repair"],
    ["cli", "__main__", "__init__"],
]
RANK = {name: i for i, row in enumerate(LAYERS) for name in row}


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []  # types may point anywhere
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("projaudit"):
            path = (node.module or "").split(".")
            found |= {path[1]} if len(path) > 1 else {a.name for a in node.names}
    return found & RANK.keys()


def test_imports_go_one_way():
    for file in sorted(PACKAGE.rglob("*.py")):
        own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for other in imported(ast.parse(file.read_text())) - {own}:
            assert RANK[other] <= RANK[own], f"{file.name} imports {other}"
            if other != "analyses":
                assert RANK[other] < RANK[own] or own in LAYERS[RANK[own]], f"{own} ↔ {other}"


def test_imports_inside_the_hub_go_one_way_too():
    graph: dict[str, set[str]] = {}
    for file in sorted(PACKAGE.glob("hub/*.py")):
        nodes = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)]
        graph[f"projaudit.hub.{file.stem}"] = {n.module for n in nodes if n.module}
    assert len(list(TopologicalSorter(graph).static_order())) > 9  # raises for a circle


def test_imports_inside_the_behaviour_go_one_way_too():
    # What audits never imports what runs the model, which is for the process of its own.
    order = ["reasons", "stage", "confinement", "sandbox", "child"]
    for i, name in enumerate(order):
        tree = ast.parse((PACKAGE / "behaviour" / f"{name}.py").read_text())
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
        own = {n.module.split(".")[2] for n in nodes if n.module.startswith("projaudit.behaviour.")}
        assert own <= {*order[:i], "probe"} if name == "child" else own <= set(order[:i])
    assert not loaded("import projaudit.behaviour.stage, projaudit.behaviour.child") & {
        "torch", "transformers", "numpy",
    }  # fmt: skip


def loaded(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(' '.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_below_the_waist_nothing_imports_torch():
    modules = [
        "rules",
        "policy",
        "judge",
        "report",
        "findings",
        "formats",
        "metrics",
        "analyses",
        "base",
        "coverage",
    ]
    code = "\n".join(f"import projaudit.{name}" for name in [*modules, "checkpoint", "weights"])
    heavy = {"torch", "transformers", "ray", "matplotlib"}
    assert not loaded(code) & heavy
    assert "torch" in loaded("import projaudit.linalg")  # the control: the test can see it


def test_help_is_quick_and_torch_free():
    code = "from projaudit.cli import main\ntry: main(['check', '--help'])\nexcept SystemExit: pass"
    assert not loaded(code) & {"torch", "transformers", "huggingface_hub", "numpy", "matplotlib"}
    # Of the processor, so that what else the machine does is not counted.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(5):
        subprocess.run(
            [sys.executable, "-m", "projaudit", "--help"], capture_output=True, check=True
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent / 5 < 0.3


def test_the_public_names_are_these():
    assert len(projaudit.__all__) == len(set(projaudit.__all__))
    assert set(projaudit.__all__) == {
        "Finding", "ProjauditError", "Report", "Verdict", "__version__", "check", "locate",
    }  # fmt: skip
    for name in projaudit.__all__:
        assert getattr(projaudit, name) is not None
