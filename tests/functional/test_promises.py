"""One case of each promise that holds so many times in a hundred; the others take a command."""

import pytest

from benchmarks.findings.promises import PROMISES


@pytest.mark.parametrize("name", PROMISES)
def test_the_first_case_holds(name):
    promise, cases = PROMISES[name]
    findings = promise(cases[0])
    assert findings
    assert [finding for finding in findings if not finding.holds] == []
