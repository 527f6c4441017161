"""Public checkers on what users get: `python tools/checkers.py`. One that is not installed is named and left out.

bandit on all code of the pack, the rules of the registry (ruff), and the static levels of comfy-test on the files that publishing
packs: git's files without those that .comfyignore names. comfy-lint checks the examples in tests/host/test_examples.py.
"""

from __future__ import annotations

import importlib.util
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What the registry runs before it takes a version.
REGISTRY = ["-m", "ruff", "check", "--quiet", "--isolated", "--select", "S102,S307,E702", "."]
# Without: assert, and a number under a name with "token", seeded draws.
BANDIT = ["-m", "bandit", "--quiet", "--recursive", "--skip", "B101,B105,B311", "."]
COMFY_TEST = ["-m", "comfy_test", "lint", "."]


def tracked(*options: str) -> set[str]:
    command = ["git", "-C", str(ROOT), "ls-files", "-z", *options]
    return set(filter(None, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")))


def sent() -> set[str]:
    """Return the files that publishing packs."""
    return tracked() - tracked("--cached", "--ignored", f"--exclude-from={ROOT / '.comfyignore'}")


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        pack = pathlib.Path(folder) / "slipstream"
        for name in sent():
            (pack / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, pack / name)
        for module, command in (("ruff", REGISTRY), ("bandit", BANDIT), ("comfy_test", COMFY_TEST)):
            if importlib.util.find_spec(module) is None:
                print(f"{module} is not installed and was left out.")
                continue
            done = subprocess.run([sys.executable, *command], cwd=pack, capture_output=True, text=True, check=False)
            failed += done.returncode != 0
            print(f"{module}: {'FAILED' if done.returncode else 'passed'}")
            if done.returncode:
                print(done.stdout, done.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
