"""What `make audit` says of what pip-audit found."""

import pytest
from audit import verdict

FLAW = {"id": "GHSA-1", "fix_versions": ["2.1"]}


@pytest.mark.parametrize(
    "found, said, code",
    [
        ("no network", "audit: skipped, no network", 0),
        ({"dependencies": []}, "audit: skipped, no package's advisories could be reached", 0),
        (
            {"dependencies": [{"name": "a", "skip_reason": "not found"}]},
            "audit: skipped, no package's advisories could be reached",
            0,
        ),
        (
            {
                "dependencies": [
                    {"name": "a", "version": "1", "vulns": []},
                    {"name": "b", "skip_reason": ""},
                ]
            },
            "audit: 0 known vulnerabilities, 1 of 2 packages looked up",
            0,
        ),
        (
            {"dependencies": [{"name": "a", "version": "2.0", "vulns": [FLAW]}]},
            "a 2.0: GHSA-1, fixed in ['2.1']\naudit: 1 known vulnerabilities, 1 of 1 packages looked up",
            1,
        ),
    ],
)
def test_audit_fails_on_a_known_vulnerability_only(found, said, code):
    assert verdict(found) == (said, code)
