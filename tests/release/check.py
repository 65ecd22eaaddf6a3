"""Look into the wheel of a release, install it where there is nothing else, and use it there.

python tests/release/check.py dist

It downloads torch and what else the wheel needs, at the versions of constraints.txt.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def check_contents(wheel: Path) -> None:
    """The wheel has every file of the package, and nothing beside it."""
    package = ROOT / "peft_eas"
    wanted = {str(path.relative_to(ROOT)) for path in package.rglob("*.py")} | {"peft_eas/py.typed"}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    if found != wanted:
        raise SystemExit(f"{wheel}: missing {sorted(wanted - found)}, unexpected {sorted(found - wanted)}")


def use(wheel: Path) -> None:
    """Install the wheel into a new virtual environment, and run `use.py` there."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", f"{folder}/venv"], check=True)
        python = f"{folder}/venv/bin/python"
        constraints = ROOT / "constraints.txt"
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", str(constraints), str(wheel)], check=True)
        subprocess.run([python, str(HERE / "use.py"), folder], check=True, cwd=folder)


def main() -> None:
    (wheel,) = Path(sys.argv[1]).resolve().glob("*.whl")
    check_contents(wheel)
    use(wheel)
    print(f"{wheel.name} works in an empty virtual environment")


if __name__ == "__main__":
    main()
