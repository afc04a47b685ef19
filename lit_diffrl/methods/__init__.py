"""The methods; importing them here makes their short names known to the command line."""

from lit_diffrl.methods.aepo import AEPO
from lit_diffrl.methods.base import Method
from lit_diffrl.methods.bc import BC
from lit_diffrl.methods.cql import CQL
from lit_diffrl.methods.crr import CRR
from lit_diffrl.methods.diffuser import Diffuser
from lit_diffrl.methods.dmemm import DMEMM
from lit_diffrl.methods.dql import DiffusionQL
from lit_diffrl.methods.dydiff import (
    DyDiffCQL,
    DyDiffCRR,
    DyDiffDQL,
    DyDiffEDPCRR,
    DyDiffEDPIQL,
    DyDiffEDPTD3,
    DyDiffIQL,
    DyDiffTD3BC,
)
from lit_diffrl.methods.edp import EDPCRR, EDPIQL, EDPTD3
from lit_diffrl.methods.iql import IQL
from lit_diffrl.methods.qgpo import QGPO
from lit_diffrl.methods.synther import (
    SynthERCQL,
    SynthERCRR,
    SynthERDQL,
    SynthEREDPCRR,
    SynthEREDPIQL,
    SynthEREDPTD3,
    SynthERIQL,
    SynthERTD3BC,
)
from lit_diffrl.methods.td3bc import TD3BC

__all__ = [
    "AEPO",
    "BC",
    "CQL",
    "CRR",
    "DMEMM",
    "EDPCRR",
    "EDPIQL",
    "EDPTD3",
    "IQL",
    "QGPO",
    "TD3BC",
    "Diffuser",
    "DiffusionQL",
    "DyDiffCQL",
    "DyDiffCRR",
    "DyDiffDQL",
    "DyDiffEDPCRR",
    "DyDiffEDPIQL",
    "DyDiffEDPTD3",
    "DyDiffIQL",
    "DyDiffTD3BC",
    "Method",
    "SynthERCQL",
    "SynthERCRR",
    "SynthERDQL",
    "SynthEREDPCRR",
    "SynthEREDPIQL",
    "SynthEREDPTD3",
    "SynthERIQL",
    "SynthERTD3BC",
]
