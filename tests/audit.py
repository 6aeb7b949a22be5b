"""Looks up known vulnerabilities of what is installed: `make audit`.

Exit code 1 if there are any. Where advisories cannot be reached, one line says so, and the code is 0.
"""

import json
import subprocess
import sys

SECONDS = 300


def report() -> dict | str:
    """What pip-audit found, or why it found nothing out."""
    command = [sys.executable, "-m", "pip_audit", "--format=json", "--progress-spinner=off"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer within {SECONDS} s"
    try:
        return json.loads(result.stdout)
    except ValueError:
        return (result.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]


def verdict(found: dict | str) -> tuple[str, int]:
    """A line or more for the reader, and the exit code."""
    if isinstance(found, str):
        return f"audit: skipped, {found}", 0
    packages = found["dependencies"]
    audited = [package for package in packages if "vulns" in package]
    if not audited:
        return "audit: skipped, no package's advisories could be reached", 0
    flaws = [
        f"{package['name']} {package['version']}: {flaw['id']}, fixed in {flaw['fix_versions']}"
        for package in audited
        for flaw in package["vulns"]
    ]
    count = f"{len(audited)} of {len(packages)} packages looked up"
    return "\n".join([*flaws, f"audit: {len(flaws)} known vulnerabilities, {count}"]), int(bool(flaws))


if __name__ == "__main__":
    said, code = verdict(report())
    print(said)
    sys.exit(code)
