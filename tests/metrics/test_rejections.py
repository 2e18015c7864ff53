"""The codes with which the API and the engine turn requests away are the label values of the rejections: none is counted as "other"."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import appliance
from appliance.engine.wire import Rejected
from appliance.errors import ContextLengthExceeded, RateLimited, Unavailable
from appliance.metrics.labels import REJECTIONS, SHED

SOURCES = Path(appliance.__file__).parent
REFUSALS = {error.__name__: error.code for error in (RateLimited, Unavailable)}  # class -> code where none is given
OTHER_ROUTES = {"api/status.py"}  # /health and /ready refuse no request


def _calls() -> Iterator[tuple[str, ast.Call]]:
    """Every `Name(...)` in the API's and the engine's sources."""
    for folder in ("api", "engine"):
        for path in sorted((SOURCES / folder).rglob("*.py")):
            if path.relative_to(SOURCES).as_posix() in OTHER_ROUTES:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    yield node.func.id, node


def _codes() -> Iterator[str]:
    """The codes of all refusals: of errors that are raised, and of those that the engine process sends, which the client makes errors of."""
    code_at = Rejected.__struct_fields__.index("code")
    for name, call in _calls():
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if name in REFUSALS:
            code = given.get("code", ast.Constant(REFUSALS[name]))
        elif name == Rejected.__name__:
            code = given["code"] if "code" in given else call.args[code_at]
        else:
            continue
        if isinstance(code, ast.Constant):
            assert isinstance(code.value, str)
            yield code.value
        else:
            assert ast.unparse(code) == "rejected.code", f"a code that this test cannot read: {ast.unparse(code)}"


def test_every_refusal_has_its_label_and_every_label_its_refusal() -> None:
    """What is raised is declared, and what is declared is raised; what no route raises today is there as its error's own code alone."""
    raised = set(_codes()) - {ContextLengthExceeded.code}  # a 400 of the client's making
    assert {"queue_full", "loading", "draining"} <= raised
    assert raised <= REJECTIONS
    assert raised | set(REFUSALS.values()) >= REJECTIONS
    assert SHED <= REJECTIONS
