#!/usr/bin/env bash
# safetensors 0.8.0: save_file writes files that only their owner may read, whatever the umask says.
#
# With the usual umask 022 a program that writes a file leaves it readable by all (0644), as numpy.save does beside it.
# safetensors writes a temporary file, whose mode is 0600, and renames it. So does each library that saves through it,
# such as transformers' save_pretrained. On a machine that a group shares, config.json can then be read by everybody and
# the weights beside it by nobody else. An existing file that was readable is replaced by one that is not.
#
# Seen with umask 022: numpy.save 644, save_file 600, a file of mode 644 saved again 600. transformers 5.23.0 leaves its
# model.safetensors with 600 and its config.json with 644.
#
# Exits with 0 while this is so, with 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet safetensors==0.8.0 numpy==2.4.2

cat >demo.py <<'PYTHON'
import os
import sys
from importlib.metadata import version

import numpy as np
from safetensors.numpy import save_file

os.umask(0o022)


def mode(path):
    return f"{os.stat(path).st_mode & 0o777:o}"


weights = np.zeros(3, dtype=np.float32)
np.save("plain.npy", weights)
save_file({"weights": weights}, "new.safetensors")
save_file({"weights": weights}, "old.safetensors")
os.chmod("old.safetensors", 0o644)
save_file({"weights": weights}, "old.safetensors")
modes = [mode(name) for name in ("plain.npy", "new.safetensors", "old.safetensors")]
print("safetensors", version("safetensors"), "modes of plain.npy, new.safetensors, old.safetensors:", *modes)
sys.exit(modes != ["644", "600", "600"])
PYTHON
venv/bin/python demo.py
