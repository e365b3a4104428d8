"""Imported first by the process that workers are forked from: it is not on the path of :mod:`sitecustomize`."""

from tests.integration.startup import lean_imports

lean_imports.install()
