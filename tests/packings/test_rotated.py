"""The rotation's Metal kernel: compiled as C++ with a thread a lane, and chosen with care.

Where Metal is, it is also run as it is.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from requant.nn import rotation as rotation_module
from requant.nn.rotation import KERNEL, PLAIN, Rotation

pytestmark = pytest.mark.sweep(1)

# What the kernel's text needs of Metal, in C++: attributes, the threadgroup's memory and its
# barrier. Threadgroups run one after the other, the lanes of each at once.
HOST = """
#include <barrier>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>
using uint = unsigned int;
struct uint3 { uint x, y, z; };
enum class mem_flags { mem_threadgroup };
#define threadgroup static
#define threadgroup_barrier(flags) lanes.arrive_and_wait()
constexpr uint GROUP = %(group)d, INPUTS = %(inputs)d, ROUNDS = %(rounds)d, ROWS = %(rows)d;
using T = float;
std::barrier lanes(GROUP / 2);
void body(uint3 thread_position_in_threadgroup, uint3 threadgroup_position_in_grid,
          const float* x, const float* scales, const float* cosines, const float* sines,
          const int32_t* pairs, float* out) {
%(kernel)s
}
template <typename V> std::vector<V> take(size_t count) {
    std::vector<V> values(count);
    if (fread(values.data(), sizeof(V), count, stdin) != count) abort();
    return values;
}
int main() {
    auto x = take<float>(size_t(ROWS) * INPUTS);
    auto scales = take<float>(INPUTS);
    auto cosines = take<float>(size_t(ROUNDS) * INPUTS / 2);
    auto sines = take<float>(size_t(ROUNDS) * INPUTS / 2);
    auto pairs = take<int32_t>(size_t(ROUNDS) * INPUTS);
    std::vector<float> out(x.size());
    for (uint row = 0; row < ROWS; row++) for (uint group = 0; group < INPUTS / GROUP; group++) {
        std::vector<std::thread> threads;
        for (uint lane = 0; lane < GROUP / 2; lane++) threads.emplace_back([=, &out, &x, &scales,
                &cosines, &sines, &pairs] {
            body({lane, 0, 0}, {0, group, row}, x.data(), scales.data(), cosines.data(),
                 sines.data(), pairs.data(), out.data());
        });
        for (auto& thread : threads) thread.join();
    }
    fwrite(out.data(), sizeof(float), out.size(), stdout);
}
"""


def made(rounds: int, group: int, groups: int, no_op: bool = False) -> Rotation:
    """A random rotation; one whose last round rotates nothing and names one input only."""
    rng = np.random.default_rng(rounds * group)
    pairs = [[rng.permutation(group) for _ in range(groups)] for _ in range(rounds)]
    listed = np.array(pairs).reshape(rounds, -1).astype(np.int16)
    theta = rng.standard_normal((rounds, group * groups // 2)).astype(np.float16)
    if no_op:
        listed[-1], theta[-1] = 0, 0
    scales = rng.uniform(0.5, 2, (1, group * groups)).astype(np.float16)
    return Rotation(mx.array(theta), mx.array(listed), mx.array(scales), group)


def inputs(rotation: Rotation, x: np.ndarray) -> bytes:
    parts = (rotation.scales, rotation.cosines, rotation.sines, rotation.pairs)
    return b"".join([x.tobytes(), *(np.array(part).tobytes() for part in parts)])


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["", "thread"])
@pytest.mark.parametrize(
    ("rounds", "group", "groups", "no_op"),
    [(1, 32, 1, False), (8, 64, 3, False), (3, 128, 2, True), (2, 4, 5, False)],
)
def test_the_kernel_s_text(
    rounds: int, group: int, groups: int, no_op: bool, sanitizer: str, tmp_path: Path
) -> None:
    """Its index arithmetic gives the plain operations' values, and no two lanes meet."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler is here")
    rows = 2
    text = HOST % {
        **{"group": group, "inputs": group * groups, "rounds": rounds, "rows": rows},
        "kernel": KERNEL,
    }
    (tmp_path / "kernel.cpp").write_text(text)
    command = [compiler, "-std=c++20", "-O1", "-pthread", "-Wall", "-Werror"]
    command += [f"-fsanitize={sanitizer}"] if sanitizer else ["-ffp-contract=off"]
    program = tmp_path / "kernel"
    built = subprocess.run(
        [*command, str(tmp_path / "kernel.cpp"), "-o", str(program)], capture_output=True, text=True
    )
    if sanitizer and built.returncode and "tsan" in built.stderr:
        pytest.skip("the compiler comes without the thread sanitizer")
    assert built.returncode == 0, built.stderr
    rotation = made(rounds, group, groups, no_op)
    x = np.random.default_rng(1).standard_normal((rows, group * groups)).astype(np.float32)
    ran = subprocess.run([str(program)], input=inputs(rotation, x), capture_output=True)
    if sanitizer and b"unexpected memory mapping" in ran.stderr:
        pytest.skip("the thread sanitizer does not run on this kernel")
    assert (ran.returncode, ran.stderr) == (0, b"")
    found = np.frombuffer(ran.stdout, np.float32).reshape(x.shape)
    np.testing.assert_allclose(found, np.array(rotation.plain(mx.array(x))), atol=2e-6)


# -- how it is chosen ------------------------------------------------------------------------
class Emulated:
    """Takes the place of MLX's kernel: the same call, the values by NumPy."""

    def __init__(self, error: float = 0.0) -> None:
        self.error, self.calls = error, 0

    def __call__(self, inputs: Any, template: Any, grid: Any, **rest: Any) -> list[mx.array]:
        self.calls += 1
        x, scales, cosines, sines, pairs = inputs
        sizes = dict(template)
        group, count = sizes["GROUP"], sizes["INPUTS"]
        assert grid == (group // 2, count // group, x.size // count)
        assert rest["threadgroup"] == (group // 2, 1, 1)
        assert rest["output_shapes"] == [x.shape]
        assert rest["output_dtypes"] == [x.dtype] == [sizes["T"]]
        rotated = np.array(x.astype(mx.float32)).reshape(-1, count // group, group)
        rotated *= np.array(scales).reshape(1, -1, group)
        for turn in range(sizes["ROUNDS"]):
            for number in range(count // group):
                at = slice(number * group // 2, (number + 1) * group // 2)
                c, s = np.array(cosines[turn])[at], np.array(sines[turn])[at]
                listed = np.array(pairs[turn]).reshape(-1, group // 2, 2)[number]
                i, j = listed[:, 0], listed[:, 1]
                left, right = rotated[:, number, i], rotated[:, number, j]
                rotated[:, number, i] = c * left + s * right
                rotated[:, number, j] = c * right - s * left
        return [mx.array(rotated.reshape(x.shape) + self.error).astype(x.dtype)]


@pytest.fixture
def on_metal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """As if Metal were here, with a kernel of the given error."""

    def pretend(error: float = 0.0) -> Emulated:
        emulated = Emulated(error)
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        monkeypatch.setattr(rotation_module, "kernel", lambda: emulated)
        return emulated

    monkeypatch.delenv(PLAIN, raising=False)
    rotation_module._kernel_matches_reference.cache_clear()
    yield pretend
    rotation_module._kernel_matches_reference.cache_clear()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_metal_is_tried_once_and_used(on_metal: Any, dtype: mx.Dtype) -> None:
    emulated = on_metal()
    rotation = made(8, 64, 2)
    x = mx.random.normal((2, 3, 128)).astype(dtype)
    found = rotation(x)
    assert emulated.calls == 2  # the trial, and this
    assert (found.dtype, found.shape) == (dtype, x.shape)
    rotation(x)
    assert emulated.calls == 3
    room = {mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 4e-2}[dtype]
    assert mx.allclose(found, rotation.plain(x), rtol=room, atol=room)


def test_gradients_pass_through_the_kernel(on_metal: Any) -> None:
    on_metal()
    rotation = made(2, 32, 2)
    x = mx.random.normal((3, 64))
    weights = mx.random.normal((3, 64))
    wanted = mx.grad(lambda x: (rotation.plain(x) * weights).sum())(x)
    assert mx.allclose(mx.grad(lambda x: (rotation(x) * weights).sum())(x), wanted, atol=1e-6)


def test_a_wrong_kernel_is_not_used(on_metal: Any) -> None:
    emulated = on_metal(error=0.01)
    rotation = made(2, 32, 2)
    x = mx.random.normal((3, 64))
    with pytest.warns(RuntimeWarning, match=r"is off by 0\.01 in a trial: plain operations"):
        found = rotation(x)
    assert mx.array_equal(found, rotation.plain(x))
    assert emulated.calls == 1
    rotation(x)  # nor tried, nor warned of, again
    assert emulated.calls == 1


def test_a_kernel_that_does_not_compile_is_not_used(on_metal: Any, monkeypatch: pytest.MonkeyPatch):
    on_metal()

    def failing() -> Any:
        raise RuntimeError("no such function")

    monkeypatch.setattr(rotation_module, "kernel", failing)
    rotation = made(2, 32, 2)
    x = mx.random.normal((3, 64))
    with pytest.warns(RuntimeWarning, match=r"cannot be run \(no such function\)"):
        assert mx.array_equal(rotation(x), rotation.plain(x))


def test_the_kernel_can_be_turned_off(on_metal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated = on_metal()
    monkeypatch.setenv(PLAIN, "1")
    rotation = made(2, 32, 2)
    x = mx.random.normal((3, 64))
    assert mx.array_equal(rotation(x), rotation.plain(x))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    monkeypatch.delenv(PLAIN)
    assert mx.array_equal(rotation(x), rotation.plain(x))
    assert rotation(mx.zeros((0, 64))).shape == (0, 64)
    assert emulated.calls == 0


@pytest.mark.skipif(not mx.metal.is_available(), reason="Metal is not here")
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_on_metal(dtype: mx.Dtype) -> None:
    rotation = made(8, 128, 4, no_op=True)
    x = mx.random.normal((5, 512)).astype(dtype)
    room = {mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 4e-2}[dtype]
    assert rotation_module.uses_metal(dtype)
    assert mx.allclose(rotation.launch(x), rotation.plain(x), rtol=room, atol=room)
