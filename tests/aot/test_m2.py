"""The operations of `m2`, compiled for a TPU: none by XLA's FFT, in known memory, the kernel by Mosaic."""

import jax
import jax.numpy as jnp
import pytest

import m2
from experiments.aot.programs import compile_for
from tests.aot.conftest import found

pytestmark = pytest.mark.aot
MIB = 2**20
BF16, F32 = jnp.bfloat16, jnp.float32


def shape(*sizes, dtype=BF16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def long_shapes(b, length, d=768, *, dtype=BF16):
    x = shape(b, length, d, dtype=dtype)
    return {"u": x, "k": shape(d, length, dtype=F32), "bias": shape(d, dtype=F32), "input_gate": x, "output_gate": x}


def gradient(operation, arguments, **options):
    """Of the sum of what comes out, in everything that goes in."""

    def total(arguments):
        return jnp.sum(operation(**arguments, **options).astype(F32))

    return jax.grad(total), arguments


@pytest.mark.parametrize(("rows", "length", "most"), [(8, 2048, 320), (128, 128, 320), (8, 65_536, 3200)])
def test_the_long_convolution_is_products_of_matrices_in_known_memory(rows, length, most, v5e):
    program = compile_for(v5e, *gradient(m2.fft_conv, long_shapes(rows, length)))
    assert " fft(" not in program.compiled.as_text()
    assert program.temporaries < most * MIB


def test_that_of_images_is_too(v5e):
    x = shape(64, 14, 14, 768)
    arguments = {"u": x, "k": shape(768, 28, 28, dtype=F32), "input_gate": x, "output_gate": x}
    program = compile_for(v5e, *gradient(m2.fft_conv2d, arguments))
    assert " fft(" not in program.compiled.as_text()
    assert program.temporaries < 400 * MIB


def kernel_cases():
    for sizes, dtype in [((128, 128, 768), BF16), ((2, 1000, 200), F32), ((1, 8192, 128), BF16)]:
        for name in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
            slow = sizes[1] > 4096 or (name != "v5e:2x2" and dtype == BF16)
            yield pytest.param(name, sizes, dtype, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize(("name", "sizes", "dtype"), list(kernel_cases()))
def test_the_kernel_compiles_at_any_size(name, sizes, dtype):
    arguments = long_shapes(*sizes, dtype=dtype)
    target, operation = found(name), gradient(m2.fft_conv, arguments, implementation="pallas")
    if name.startswith("v5p") and sizes[1] > 4096:  # its backward pass takes 79 MiB, and a v5p has 64
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)vmem"):
            compile_for(target, *operation)
        return
    program = compile_for(target, *operation)
    assert "tpu_custom_call" in program.compiled.as_text()
    assert program.temporaries < 64 * MIB


@pytest.mark.parametrize(("length", "most"), [(2048, 1024), (65_536, 4800)])
def test_the_long_convolution_fits_a_gpu(length, most, h100):
    program = compile_for(h100, *gradient(m2.fft_conv, long_shapes(8, length)))
    assert program.temporaries < most * MIB
