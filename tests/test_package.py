"""The public names of `avg_llava`: complete, loaded on first use, and registered with transformers' Auto classes."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import avg_llava
from tests.tiny import make_checkpoint


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_neither_torch_nor_transformers():
    code = "import sys, avg_llava; print(*{'torch', 'transformers', 'numpy', 'yaml'} & set(sys.modules))"
    assert run_python(code) == ""


def test_all_declarations_of_public_names_agree():
    tree = ast.parse(Path(avg_llava.__file__).read_text("utf-8"))
    typed = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("avg_llava.")
        for alias in node.names
    }
    assert typed == {(f"avg_llava.{module}", name) for module, names in avg_llava._MODULES.items() for name in names}
    assert avg_llava.__all__ == sorted(name for _, name in typed)


def test_every_public_name_loads():
    assert {*dir(avg_llava)} == {*avg_llava.__all__, "__version__"}  # what tab completion offers
    for name in avg_llava.__all__:
        assert getattr(avg_llava, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        avg_llava.laod  # noqa: B018


def test_public_names_load_in_several_threads_at_once():
    code = """
import threading, avg_llava
barrier, loaded = threading.Barrier(len(avg_llava.__all__)), []
def load(name):
    barrier.wait()
    loaded.append(getattr(avg_llava, name).__name__)
threads = [threading.Thread(target=load, args=(name,)) for name in avg_llava.__all__]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(*sorted(loaded))
"""
    assert run_python(code) == " ".join(avg_llava.__all__)


def test_version_is_that_of_the_installed_package():
    assert avg_llava.__version__ == importlib.metadata.version("avg-llava")


def test_auto_classes_know_the_imported_classes(tmp_path):
    folder = make_checkpoint(tmp_path)
    code = f"""
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from avg_llava import AvgLlavaForConditionalGeneration, AvgLlavaProcessor
print(*(type(auto.from_pretrained({str(folder)!r})).__name__
        for auto in (AutoConfig, AutoModelForImageTextToText, AutoProcessor)))
"""
    names = "AvgLlavaConfig AvgLlavaForConditionalGeneration AvgLlavaProcessor"
    assert run_python(code).splitlines()[-1] == names
