"""The methods; importing them here makes their short names known to the command line."""

from lit_diffrl.methods.base import Method
from lit_diffrl.methods.diffuser import Diffuser
from lit_diffrl.methods.dmemm import DMEMM

__all__ = ["DMEMM", "Diffuser", "Method"]
