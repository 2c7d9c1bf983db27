"""A few hundred hostile arguments, records, commands and logs: each works, or is refused in one line with a name."""

import pytest

from tests import fuzz, fuzz_logs, fuzz_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    fuzz_records.make_base(folder)
    fuzz_logs.make_logs(folder)
    return folder


@pytest.mark.parametrize(("kind", "num"), [("arguments", 400), ("records", 80), ("commands", 60), ("logs", 120)])
def test_hostile_input_works_or_is_refused_by_name(kind, num, folder):
    counts, faults = fuzz.try_cases(kind, range(num), folder)
    assert faults == []
    assert min(counts["works"], counts["refused"]) > num / 20, "cases of both kinds are drawn"
