"""CI's audit of the installed packages, with a pip-audit that says what it is told to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

AUDIT = Path(__file__).parent.parent / ".ci" / "audit.py"
FOUND = '{"dependencies": [%s]}'
GOOD = '{"name": "a", "version": "1", "vulns": []}'
BAD = '{"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}'
UNKNOWN = '{"name": "c", "skip_reason": "not found"}'


@pytest.mark.skipif(not AUDIT.exists(), reason="CI is no part of the package")
@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        (FOUND % GOOD, 0, "0 known vulnerabilities in 1 packages"),
        (FOUND % f"{GOOD}, {BAD}", 1, "b 2: PYSEC-1, fixed in 3"),
        (FOUND % f"{BAD}, {UNKNOWN}", 1, "WARNING: 1 of 2 packages are not known"),
        (FOUND % UNKNOWN, 0, "WARNING: 1 of 1 packages are not known"),
        ("", 0, "WARNING: nothing was audited"),
    ],
)
def test_a_known_vulnerability_fails_and_a_silent_service_warns(tmp_path, answer, status, message):
    program = tmp_path / "pip-audit"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\n", encoding="utf-8")
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, str(AUDIT), "folder"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == status and message in done.stdout, done.stdout + done.stderr
