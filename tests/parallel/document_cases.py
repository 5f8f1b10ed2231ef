"""What the ranks of the test of separate documents run."""

from tests.parallel.parity_cases import run_case


def run_separated(cases: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Errors of each case against documents run one by one."""
    found = {}
    for name, case in cases.items():
        found[name] = run_case(**case | {"data": {"separate_documents": True}})
    return found
