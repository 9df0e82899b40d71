"""What `import nbl_export.transformers` does, in a process of its own."""

from __future__ import annotations

import subprocess
import sys


def test_the_import_registers_every_type() -> None:
    code = (
        "from transformers import CONFIG_MAPPING\n"
        "assert 'nbl_llama' not in CONFIG_MAPPING\n"
        "import nbl_export.transformers\n"
        "from nbl_export.models.registered import TYPES\n"
        "assert all('nbl_' + one in CONFIG_MAPPING for one in TYPES)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
