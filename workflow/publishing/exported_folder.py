"""Check that an exported folder works for somebody who does not have this package."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from complexity_deep.workflow.command import InputError, say

PROBE_TOKENS = 16  # enough for every part of the architecture to show in the logits
LOGITS_TOLERANCE = 1e-4  # relative; another process may choose another kernel
# Runs files that cannot import this package, whatever the environment has installed. Each is named before it runs.
STRANGER = """\
import gc, runpy, sys
sys.modules["complexity_deep"] = None
for path in sys.argv[1:]:
    print(path, file=sys.stderr)
    runpy.run_path(path, run_name="__main__")
    gc.collect()
"""
LOAD_CHECK = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

hub = {{"revision": {revision!r}, "trust_remote_code": True}}
AutoTokenizer.from_pretrained({repo_id!r}, **hub)
model = AutoModelForCausalLM.from_pretrained({repo_id!r}, **hub).eval()
expected = torch.load({expected!r})
with torch.no_grad():
    found = model(expected["input_ids"]).logits
error = (found - expected["logits"]).abs().max() / expected["logits"].abs().max()
if not error < {tolerance}:
    raise SystemExit(f"its logits differ from those of the original by {{error:.1e}} of their scale")
"""


def python_snippets(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", card, flags=re.MULTILINE | re.DOTALL)


def check_folder(folder: Path, repo_id: str, revision: str, expected: dict[str, torch.Tensor]) -> None:
    """Load the folder, and run the snippets of its card as they stand, in a process without this package.

    The folder is put where the Hub's client would have downloaded it, so that repo_id and revision mean it. Raises
    `InputError` with the name and the error of what fails.
    """
    with tempfile.TemporaryDirectory(prefix="export-") as scratch:
        scratch = Path(scratch).resolve()
        commit = "0" * 40
        cache = scratch / "hub" / f"models--{repo_id.replace('/', '--')}"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / revision).write_text(commit)
        (cache / "snapshots").mkdir()
        (cache / "snapshots" / commit).symlink_to(folder.resolve())
        torch.save(expected, scratch / "expected.pt")
        checks = {
            "The exported folder": LOAD_CHECK.format(
                repo_id=repo_id,
                revision=revision,
                expected=str(scratch / "expected.pt"),
                tolerance=LOGITS_TOLERANCE if expected["logits"].dtype == torch.float32 else 1e-2,
            )
        }
        for index, snippet in enumerate(python_snippets((folder / "README.md").read_text(encoding="utf-8")), start=1):
            checks[f"Snippet {index} of the card"] = snippet
        caches = {"HF_HOME": "", "HF_HUB_CACHE": "hub", "HF_MODULES_CACHE": "modules"}
        environment = {**os.environ, **{name: str(scratch / place) for name, place in caches.items()}}
        environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        names = {}
        for number, (name, code) in enumerate(checks.items()):
            path = scratch / f"check_{number}.py"
            path.write_text(code, encoding="utf-8")
            names[str(path)] = name
        say(f"the folder and the {len(checks) - 1} snippets of its card are tried in a process without this package")
        command = [sys.executable, "-P", "-c", STRANGER, *names]
        result = subprocess.run(
            command, cwd=scratch, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if result.returncode:
            lines = result.stderr.strip().splitlines()
            failed = [names[line] for line in lines if line in names][-1]
            reason = f"exit status {result.returncode}" if lines[-1] in names else lines[-1]
            raise InputError(f"{failed} does not work for somebody else, so nothing was written: {reason}")


@torch.no_grad()
def probe(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Logits of some ids, to be had again from the exported folder."""
    input_ids = torch.randint(model.config.vocab_size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": input_ids, "logits": model(input_ids).logits}
