#!/usr/bin/env bash
# Asks for known vulnerabilities of every package of the locks: `make audit`. Needs a network that reaches pypi.org
# (SERVICE=osv: api.osv.dev); installs pip-audit into a folder that it deletes again, and nothing of the locks.
# Fails for a vulnerability, and where a package could not be asked about: silence is no answer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

readonly PIP_AUDIT_VERSION=2.10.1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "pip-audit==$PIP_AUDIT_VERSION"

result=0
for lock in cpu gpu bench; do
    # A local version (+cpu) is a build of its own, with the vulnerabilities of the release.
    sed 's/+[a-z0-9.]*//' "$lock.txt" > "$work/$lock.txt"
    echo "requirements/$lock.txt:"
    if ! "$work/venv/bin/pip-audit" --disable-pip --no-deps --progress-spinner=off --format=json \
        --vulnerability-service "${SERVICE:-pypi}" --requirement "$work/$lock.txt" > "$work/$lock.json" 2> "$work/log"
    then
        [[ -s $work/$lock.json ]] || { tail -n 1 "$work/log" >&2; result=1; continue; }
    fi
    "$work/venv/bin/python" - "$work/$lock.json" << 'PYTHON' || result=1
import json
import sys

found = json.load(open(sys.argv[1]))["dependencies"]
unknown = [one for one in found if "skip_reason" in one]
bad = [one for one in found if one.get("vulns")]
for one in bad:
    for vulnerability in one["vulns"]:
        fixed = ", ".join(vulnerability["fix_versions"]) or "no release"
        print(f"  {one['name']} {one['version']}: {vulnerability['id']}, fixed in {fixed}")
for one in unknown:
    print(f"  not asked about: {one['name']}: {one['skip_reason']}")
print(f"  {len(found)} packages, {len(bad)} with vulnerabilities, {len(unknown)} not asked about")
sys.exit(bool(bad or unknown))
PYTHON
done
exit "$result"
