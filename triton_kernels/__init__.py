"""Fused Triton kernels of pymcip, one module per op; installed as `pymcip.triton_kernels`."""

if __name__ != "pymcip.triton_kernels":
    raise ImportError(
        f"pymcip's Triton kernels were imported as {__name__!r}. Another package on PyPI owns the name "
        "'triton_kernels', so these are only to be had as 'pymcip.triton_kernels': install pymcip "
        "(pip install .) and import that, and run 'pytest' rather than 'python -m pytest' in the "
        "repository's root."
    )
