"""The methods; importing them here makes their short names known to the command line."""

from lit_diffrl.methods.base import Method
from lit_diffrl.methods.bc import BC
from lit_diffrl.methods.cql import CQL
from lit_diffrl.methods.crr import CRR
from lit_diffrl.methods.diffuser import Diffuser
from lit_diffrl.methods.dmemm import DMEMM
from lit_diffrl.methods.dql import DiffusionQL
from lit_diffrl.methods.edp import EDPCRR, EDPIQL, EDPTD3
from lit_diffrl.methods.iql import IQL
from lit_diffrl.methods.td3bc import TD3BC

__all__ = [
    "BC",
    "CQL",
    "CRR",
    "DMEMM",
    "EDPCRR",
    "EDPIQL",
    "EDPTD3",
    "IQL",
    "TD3BC",
    "Diffuser",
    "DiffusionQL",
    "Method",
]
