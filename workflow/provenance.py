"""Where a number comes from: the device, the versions and the commit that it was measured with."""

import datetime
import platform
import subprocess
from pathlib import Path

import torch
import transformers

REPOSITORY = Path(__file__).resolve().parents[1]


def provenance() -> dict:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
    try:
        import triton
    except ImportError:
        triton = None
    return {
        "device": f"{device}" if torch.cuda.is_available() else f"{device}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": triton.__version__ if triton else "",
        "commit": commit.stdout.strip() or "none",
        "date": datetime.date.today().isoformat(),
    }
