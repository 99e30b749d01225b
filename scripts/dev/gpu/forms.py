"""Section `forms`: every kernel for CUDA against its reference in torch, on the device.

The cases are those of tests/kernels/test_forms.py. A row is a form: how many cases it served, and
whether it is right, or what was wrong. First come the seconds that each source took nvcc, all at
once. On a CPU the forms for it are looked at.
"""

import importlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _measure import device, emit, synchronize

import quip.kernels
from quip.kernels import cuda
from quip.kernels.operation import Form, Operation

ON = device()
ELSEWHERE = "cpu" if ON.type == "cuda" else "cuda"  # what forms for another device are called


def main() -> int:
    if ON.type == "cuda":
        compile_all()
    try:
        tests = importlib.import_module("tests.kernels.test_forms")
    except ImportError as error:
        print(f"forms: the cases need pytest: {error}", file=sys.stderr)
        return 1
    wrong = 0
    for operation in tests.OPERATIONS:
        for label, form in operation.forms.items():
            if label != ELSEWHERE:
                wrong += not check(tests, operation, label, form)
    return min(wrong, 1)


def compile_all() -> None:
    """A row for each source, with the seconds until it could be used."""
    sources = sorted(Path(quip.kernels.__file__).parent.glob("*/*.cu"))

    def compiled(source: Path) -> tuple[bool, float]:
        start = time.perf_counter()
        return cuda.available(source), round(time.perf_counter() - start, 1)

    with ThreadPoolExecutor(len(sources)) as pool:
        for source, (done, seconds) in zip(sources, pool.map(compiled, sources), strict=True):
            emit(source=f"{source.parent.name}/{source.name}", compiled=done, compile_s=seconds)


def check(tests, operation: Operation, label: str, form: Form) -> bool:
    """One row; whether the form computes what the reference does."""
    name, served, said = f"{tests.name(operation)} {label}", 0, "right"
    start = time.perf_counter()
    try:
        if not form.available():
            said = "not available"
        else:
            served = compare(tests, operation, form)
            synchronize()
    except Exception as error:  # whatever it is, it is what this section is for
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    seconds = round(time.perf_counter() - start, 2)
    if said == "right" and not served:
        said = "serves no case on this device"
    right = said == "right" or label != ON.type
    emit(form=name, cases=served, right=right, said=said, seconds=seconds)
    return right


def compare(tests, operation: Operation, form: Form) -> int:
    """How many cases the form serves. Raises AssertionError where it differs."""
    tested, served = tests.OPERATIONS[operation], 0
    for ours, expected in zip(tested.cases(), tested.cases(), strict=True):
        ours.move(ON)
        expected.move(ON)
        if not form.serves(*ours.args, **ours.options):
            continue
        served += 1
        found = tests.results(form.compute, ours)
        for one, other in zip(found, tests.results(operation.reference, expected), strict=True):
            tested.compare(one, other)
    return served


if __name__ == "__main__":
    sys.exit(main())
