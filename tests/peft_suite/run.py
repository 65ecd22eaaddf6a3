"""Run PEFT's own tests, unmodified, against EAS: `python tests/peft_suite/run.py [arguments of pytest]`.

The tests come from PEFT's source distribution, at the version that is installed; `eas_plugin.py` puts EAS in the place
of PEFT's tuners. See docs/peft-test-suite.md.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CACHE = REPOSITORY / ".cache"
FILES = (
    "test_config.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
)


def fetch(version: str) -> Path:
    """PEFT's source distribution, unpacked."""
    folder = CACHE / f"peft-{version}"
    package = folder / "tests" / "__init__.py"
    if not package.exists():
        CACHE.mkdir(exist_ok=True)
        archive = CACHE / f"peft-{version}.tar.gz"
        if not archive.exists():
            download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*download, f"peft=={version}"], cwd=CACHE, check=True)
        shutil.unpack_archive(archive, CACHE, filter="data")
        # The tests import one another as a package, but the archive lacks this (empty) file.
        package.touch()
    return folder


def main() -> int:
    folder = fetch(importlib.metadata.version("peft"))
    path = os.pathsep.join(filter(None, [str(HERE), str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    # no configuration file, neither PEFT's (it measures coverage) nor ours
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(folder), "-p", "no:cacheprovider"]
    command += ["-p", "eas_plugin", "-q", "--disable-warnings"]
    command += [*(str(folder / "tests" / name) for name in FILES), *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as models:
        environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, cwd=models, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
