"""Known vulnerabilities of the packages in a folder: `python audit.py SITE_PACKAGES`, by pip-audit.

Ends with status 1 if there is one. Where the service cannot be reached, or knows nothing of a
package, it warns and ends with 0: a machine without that service shall still test.
"""

import json
import subprocess
import sys

SECONDS = 300


def audit(folder: str) -> int:
    """Run pip-audit, print what it found."""
    command = ["pip-audit", "--path", folder, "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        found = json.loads(done.stdout)["dependencies"]
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError) as error:
        print(f"audit: WARNING: nothing was audited, pip-audit did not answer: {error}")
        return 0
    skipped = [one["name"] for one in found if "skip_reason" in one]
    if skipped:
        print(
            f"audit: WARNING: {len(skipped)} of {len(found)} packages are not known to the service"
        )
    known = [(one, vulnerability) for one in found for vulnerability in one.get("vulns", [])]
    for one, vulnerability in known:
        fixed = ", ".join(vulnerability["fix_versions"]) or "none"
        print(f"audit: {one['name']} {one['version']}: {vulnerability['id']}, fixed in {fixed}")
    print(f"audit: {len(known)} known vulnerabilities in {len(found) - len(skipped)} packages")
    return int(bool(known))


if __name__ == "__main__":
    sys.exit(audit(sys.argv[1]))
