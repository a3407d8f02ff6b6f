#!/usr/bin/env bash
# Put the extensions into a checkout of upstream's LLaVA: moe_patch/patch.sh [LLAVA_DIR] [options of `apply`].
# LLAVA_DIR is the current directory by default. Needs Python 3.10 or later and nothing else; PYTHON names another one.
# Undo with: python -m moe_patch revert LLAVA_DIR
set -euo pipefail
python="${PYTHON:-python3}"
"$python" -I -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "moe_patch needs Python 3.10 or later; '$python' is: $("$python" --version 2>&1). Name another: PYTHON=... $0" >&2
    exit 1
}
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# -I keeps the current directory, which is the checkout, out of the places that Python imports from.
exec "$python" -I -B -c 'import sys
sys.path.insert(0, sys.argv.pop(1))
from moe_patch.__main__ import main
sys.exit(main())' "$here" apply "$@"
