"""The GELU x Phi(x) and its slope Phi(x) + x phi(x) in kernels, with Phi and phi of the normal distribution.

With `SHORT` they are for results of 16 bits: a power of two and a few products without branches, 8 and 10
instructions where libdevice's erf alone has about 30. Coefficients are minimax fits to float64 (linear programs over
Chebyshev points). Over all finite values of bfloat16 and float16 the GELU is within 7.6e-5 max(|GELU|, 1e-4) of
float64, the slope within 7.1e-5 max(|slope|, 0.1): 0.02 units in the last place of a bfloat16 that is larger than 1e-4
or 0.1. The slope is NaN where |x| > 6e12.
"""

from fastmum.kernels.dispatch import jit, tl


@jit()
def gelu(
    x,  # float32
    SHORT: tl.constexpr,
):
    """x Phi(x), float32."""
    if SHORT:
        z = tl.abs(x)
        # log2 Phi(-z); its leading coefficient is negative, so that its power vanishes for large z.
        log = ((((-0.000329563449 * z + 0.00591552894) * z - 0.0485343491) * z - 0.463719264) * z - 1.14936217) * z
        value = tl.maximum(x, 0.0) - z * tl.exp2(log - 1.00010718)
    else:
        value = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return value


@jit()
def gelu_slope(
    x,  # float32
    SHORT: tl.constexpr,
):
    """Phi(x) + x phi(x), float32."""
    if SHORT:
        z = tl.abs(x)
        # 0.5 - slope(-z), the slope there as -2^(quadratic) (cubic). The cubic has no factor, which costs a register.
        power = tl.exp2((-0.67733268 * z - 0.81219486) * z - 3.67161515)
        above = 0.5 + power * (((z + 1.783577) * z + 6.56830088) * z - 6.37097331)
        sign = x.to(tl.int32, bitcast=True) & -2147483648
        slope = 0.5 + (above.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    else:
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return slope
