"""Mutants fit the code as it is, so that who moves it mends them at once."""

from __future__ import annotations

import importlib.util
import shutil
import sys

import pytest


@pytest.fixture(scope="module")
def mutants(pack):
    spec = importlib.util.spec_from_file_location("mutants_under_test", pack.root / "checks" / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.path.remove(str(pack.root))
    yield module
    del sys.modules[spec.name]


def test_each_fits_one_place_and_names_tests_that_exist(mutants, pack, tmp_path):
    for number, mutant in enumerate(mutants.MUTANTS):
        copy = tmp_path / str(number)
        for room in mutants.ROOMS:
            shutil.copytree(pack.root / room, copy / room)
        assert mutants.mutate(mutant, copy) is None, mutant.name
        for test in mutant.tests:
            file, name = test.split("::")
            assert f"def {name}(" in (pack.root / file).read_text(encoding="utf-8"), mutant.name


@pytest.mark.parametrize("old", ["no such line in the pack", "import"])
def test_one_that_does_not_fit_says_so(mutants, pack, old):
    complaint = mutants.mutate(mutants.Mutant("any", old, "", ()), pack.root)
    assert complaint.startswith("no longer fits") and "Update it" in complaint
