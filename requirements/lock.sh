#!/usr/bin/env bash
# Remakes cpu.txt, gpu.txt and bench.txt from the .in files: `make lock`. Reads metadata only, about a minute.
# Pins already in the locks are kept while they fit; UPGRADE=1 takes the newest versions that the .in files allow.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# What uv writes behind every package that all the machines below need: left out of the locks.
machines=" ; python_full_version < '3.13' and implementation_name == 'cpython' and platform_machine == 'x86_64'"
machines+=" and platform_python_implementation == 'CPython' and sys_platform == 'linux'"
readonly UV_VERSION=0.13.9

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION"

# The two Pythons and the one platform that the locks are for.
cat > "$work/pyproject.toml" <<'TOML'
[project]
name = "lock"
version = "0"
requires-python = ">=3.11,<3.13"

[tool.uv]
environments = ["""sys_platform == 'linux' and platform_machine == 'x86_64' \
and python_full_version >= '3.11' and python_full_version < '3.13' \
and implementation_name == 'cpython' and platform_python_implementation == 'CPython'"""]
TOML
cp ./*.in ./*.txt "$work"

compile() {  # compile DEVICE HEADING [uv option ...]: writes DEVICE.txt
    local device=$1 heading=$2
    shift 2
    [[ -z ${UPGRADE:-} ]] || set -- --upgrade "$@"
    (cd "$work" && venv/bin/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header \
        "$@" base.in test.in "$device.in" -o "$device.txt" > /dev/null)
    {
        echo "# $heading"
        echo "# Complete, for Python 3.11 and 3.12 on Linux x86-64. Made by \`make lock\`; requirements/setup.sh"
        echo "# installs it with pip's --no-deps: every need is in the list, and nothing outside it is wanted."
        sed "s/${machines}\$//" "$work/$device.txt"
        [[ $device != cpu ]] || grep '^torch==' cpu.in
    } > "$work/$device.lock"
    mv "$work/$device.lock" "$device.txt"
    echo "requirements/$device.txt: $(grep -c '^[^#]' "$device.txt") packages"
}

# torch's +cpu builds are not in every index, so the resolver sees torch's own needs in its place.
printf '%s\n' "torch; python_version < '3'" >> "$work/cpu-overrides.txt"
printf '%s\n' filelock fsspec jinja2 networkx setuptools sympy typing-extensions >> "$work/cpu.in"
compile cpu "Every package for a machine without a GPU." --override cpu-overrides.txt
compile gpu "Every package for a machine with an NVIDIA GPU."

# The peers, resolved beside the packages of cpu.txt as they are pinned there: bench.txt is what that adds.
(cd "$work" && grep -v '^triton;' cpu-overrides.txt > bench-overrides.txt && cp "$OLDPWD/cpu.txt" pinned.txt &&
    sed -i '/^torch==/d' pinned.txt && venv/bin/uv pip compile --quiet --universal --python-version 3.11 \
    --no-annotate --no-header --override bench-overrides.txt --constraint pinned.txt \
    base.in test.in cpu.in bench.in -o bench-all.txt > /dev/null)
{
    echo "# What \`make bench\` needs beyond .venv."
    echo "# Complete, for Python 3.11 and 3.12 on Linux x86-64. Made by \`make lock\`; requirements/bench.sh"
    echo "# installs it with pip's --no-deps: every need is in the list, and nothing outside it is wanted."
    sed "s/${machines}\$//" "$work/bench-all.txt" | grep -vxFf cpu.txt
} > bench.txt
echo "requirements/bench.txt: $(grep -c '^[^#]' bench.txt) packages"
