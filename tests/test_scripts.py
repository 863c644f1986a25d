#!/usr/bin/env python3
"""Tests what holds for every Python file in scripts/: --help without packages, and convert.py with its modules alone.

    python3 tests/test_scripts.py [part of a test's name]

One line per test, then `N passed, N failed, N skipped`; exit 1 if any failed. Standard library only.
"""
import ast
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile

from test_convert import ROOT, SCRIPT, in_directory, run_tests
import convert

SCRIPTS = sorted(glob.glob(os.path.join(ROOT, "scripts", "*.py")))


def run_python(*arguments, cwd=None):
    """Without site-packages and PYTHON* variables: Python's own library and what lies beside the script."""
    return subprocess.run([sys.executable, "-S", "-E", "-B", *arguments], stdin=subprocess.DEVNULL, cwd=cwd, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)


def help_test(path):
    def test():
        done = run_python(path, "--help", cwd=os.path.sep)
        assert done.returncode == 0 and not done.stderr, (done.returncode, done.stderr)
        assert len(done.stdout.split()) > 8, done.stdout
    return test


def listed_modules():
    """The names of the modules that convert.py says are beside it."""
    names = re.findall(r"^    (\w+)  +\S", convert.__doc__.split("reading order:")[1], re.M)
    assert names, "none in its docstring"
    return names


def test_modules_that_convert_lists():
    """They are those that it loads, all of them; and any Python from 3.8 on can read them."""
    done = run_python("-c", "import sys; own = sys.argv[1]; sys.path.insert(0, own); import convert\n"
                      "print(*(name for name, module in sys.modules.items()\n"
                      "        if (getattr(module, '__file__', None) or '').startswith(own)))", os.path.dirname(SCRIPT))
    assert sorted(done.stdout.split()) == sorted(["convert", *listed_modules()]), (done.stdout, done.stderr)
    for name in done.stdout.split():
        with open(os.path.join(os.path.dirname(SCRIPT), name + ".py"), encoding="utf-8") as file:
            ast.parse(file.read(), feature_version=(3, 8))


@in_directory
def test_convert_in_another_folder(source, out):
    """convert.py and the modules that it lists, copied somewhere else and run from somewhere else."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ["convert", *listed_modules()]:
            shutil.copy(os.path.join(os.path.dirname(SCRIPT), name + ".py"), folder)
        for script, path in ((SCRIPT, out), (os.path.join(folder, "convert.py"), out + "2")):
            done = run_python(script, source, path, cwd=os.path.sep)
            assert done.returncode == 0, done.stderr
    with open(out, "rb") as file, open(out + "2", "rb") as copy:
        assert file.read() == copy.read()


def test_greedy_token_of_a_tie():
    """In bf16 the largest logits are often equal; argmax takes the lowest id, topk's first is any of them."""
    import validate_report
    assert validate_report.greedy_token([9, 4, 7, 1, 2], [3.5, 3.5, 3.5, 3.25, 3.0]) == 4
    assert validate_report.greedy_token([9, 4], [3.5, 3.25]) == 9


if __name__ == "__main__":
    sys.exit(run_tests([(name, test) for name, test in globals().items() if name.startswith("test_")]
                       + [("help of " + os.path.basename(path), help_test(path)) for path in SCRIPTS]))
