"""nbl-export: Neural Block Linearization (arXiv 2505.21077) from PyTorch into ONNX graphs, with proof.

The Python API is :mod:`nbl_export.api`: the verbs of the command line as functions.
"""

__version__ = "0.1.0"
