"""Where a number comes from: the device, the versions and the commit that it was measured with."""

import datetime
import platform
import subprocess
from pathlib import Path

import torch
import transformers

REPOSITORY = Path(__file__).resolve().parents[1]  # or the folder of the installed package


def commit() -> str:
    """The commit of this clone, with "-dirty" where files were changed; "none" where pip installed the package."""
    if not (REPOSITORY / ".git").exists():
        return "none"
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        return found.stdout.strip() or "none"
    except OSError:
        return "none"


def provenance() -> dict:
    cpu = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    try:
        import triton
    except ImportError:
        triton = None
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": triton.__version__ if triton else "",
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
