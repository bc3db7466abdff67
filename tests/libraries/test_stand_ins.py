"""Layouts without transformers, and the real packages for whoever imports them afterwards."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import requant
from requant.libraries import MLX_LM
from requant.libraries.stand_ins import StandIns, StandInUsedError
from tests.support.checkpoints import MICRO_LLAMA

LIBRARY = """
from heavy_one import Base, Registry
from heavy_one.inner.names import Other

class Derived(Base):
    pass

Registry.register("derived", Derived)

def convert():
    return Derived.__mro__[1].__module__

def use():
    return Other("name")
"""
HEAVY = "class Base: pass\nclass Registry:\n    register = staticmethod(lambda *_: None)\n"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "light_one.py").write_text(LIBRARY)
    inner = tmp_path / "heavy_one" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "heavy_one" / "__init__.py").write_text(HEAVY)
    (inner / "__init__.py").write_text("")
    (inner / "names.py").write_text("Other = str\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [x for x in sys.modules if x.startswith(("light_one", "heavy_one"))]:
        del sys.modules[name]


def test_names_of_a_package_can_be_imported_without_it(packages: None) -> None:
    stand_ins = StandIns("light_one", ["heavy_one"])
    before, path = {*sys.modules}, [*sys.meta_path]
    with stand_ins.in_place():
        import light_one  # type: ignore[import-not-found]

        assert light_one.convert() == "heavy_one"
        assert not hasattr(sys.modules["heavy_one"], "__file__")
    assert {*sys.modules} == before and sys.meta_path == path
    import heavy_one  # type: ignore[import-not-found]

    assert heavy_one.Base().__class__.__name__ == "Base"  # the real one
    with stand_ins.in_place():  # which is used from now on
        import light_one as again

        assert again is not light_one and again.use() == "name"


def test_modules_are_kept_for_the_next_time(packages: None) -> None:
    stand_ins = StandIns("light_one", ["heavy_one"])
    found = []
    for _ in range(2):
        with stand_ins.in_place():
            import light_one

            found.append(light_one)
    assert found[0] is found[1]


def test_what_is_used_is_imported_the_next_time(packages: None) -> None:
    stand_ins = StandIns("light_one", ["heavy_one"])
    used = pytest.raises(StandInUsedError, match=r"heavy_one\.inner\.names\.Other")
    with used, stand_ins.in_place():
        import light_one

        light_one.use()
    assert "light_one" not in sys.modules
    with stand_ins.in_place():
        import light_one as real

        assert real.use() == "name"
    assert "heavy_one" in sys.modules


@pytest.mark.slow
def test_a_layout_imports_no_transformers() -> None:
    """A process of its own: the layout is that of the real packages, which can be imported."""
    code = f"""
import sys, requant
plan = requant.plan({str(MICRO_LLAMA)!r}, bits=4)
print(plan.layout, [x for x in ("torch", "transformers", "mlx_lm") if x in sys.modules])
import mlx_lm.tokenizer_utils, transformers
print(mlx_lm.tokenizer_utils.AutoTokenizer is transformers.AutoTokenizer)
again = requant.plan({str(MICRO_LLAMA)!r}, bits=4)
print(again.hash == plan.hash, plan.hash)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    plan = requant.plan(MICRO_LLAMA, bits=4)
    assert result.stdout.splitlines() == ["mlx-lm []", "True", f"True {plan.hash}"], result.stderr
    assert MLX_LM.stand_ins is not None
