"""The environment of the tests, and fixtures that several files use."""

import importlib.util
import os
from pathlib import Path

import pytest
import transformers
from engine import LlamaCpp

pytest.register_assert_rewrite("checks", "damage", "searches")
# processes that tests start find the helpers, too
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))


@pytest.fixture(autouse=True)
def progress_bars():
    """Scripts turn them off for their whole process, in which other tests run after those of the script."""
    yield
    transformers.logging.enable_progress_bar()


@pytest.fixture
def unpacked(monkeypatch):
    """bitsandbytes leaves 4-bit weights as they are; on some CPUs it repacks them, if layers are of certain sizes."""
    if importlib.util.find_spec("bitsandbytes"):
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture
def llama_cpp():
    """`llama_cpp(folder)` is a running llama.cpp."""
    pytest.importorskip("xllamacpp")  # there are no wheels for some platforms
    running = []

    def run(folder):
        running.append(LlamaCpp(folder))
        return running[-1]

    yield run
    for server in running:
        server.process.kill()
        server.process.communicate()
