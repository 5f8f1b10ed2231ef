"""Imports of the processes of checks, done once in the server that they are forked from.

Nothing of it may touch a device: a forked process cannot use one that its parent has used.
"""

import tests.gpu.kernels
import tests.gpu.steps
import tests.gpu.tol  # noqa: F401
