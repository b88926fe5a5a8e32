"""Engines leave their process as they found it, also where they never came to be."""

import subprocess
import sys


def test_an_engine_that_ended_before_vllm_was_imported_does_not_import_it() -> None:
    program = (
        "import sys; from topd_ray.engines.process import SLOTS; SLOTS.enter(); SLOTS.leave(); "
        "assert 'vllm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
