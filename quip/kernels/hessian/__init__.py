"""Add x x^T of many tokens to a float64 matrix, on and below its diagonal."""

from quip.kernels.hessian import cuda, reference
from quip.kernels.hessian.reference import QUANTUM, add_rounded
from quip.kernels.operation import Operation

__all__ = ["QUANTUM", "add_products", "add_rounded"]

add_products = Operation(reference.add_products, cuda=cuda.FORM)
