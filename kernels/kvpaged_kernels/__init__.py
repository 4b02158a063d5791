"""Kernels of a paged KV cache: tensors in, tensors out.

- `kvpaged_kernels.reference`: eager oracles, readable, fp64 inside.
- `kvpaged_kernels.gpu`: Triton kernels, each with its launcher beside it.
- `kvpaged_kernels.cpu`: fast paths in stock torch operators.
- `kvpaged_kernels.checks`: what all of them require of their arguments.

The same name has the same signature everywhere. Nothing is imported here, so that importing the
package costs nothing and never pulls in Triton.
"""
